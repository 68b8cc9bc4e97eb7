"""Define the tables of names of the IR residual networks (`models.faces.arcface`).

The family has three sets of names: those of deepface's `arcface_weights.pth`, which our small
embedder also uses, of insightface and of CurricularFace. The configuration selects one, since no two
of them build the same network.
"""

import dataclasses
from collections.abc import Mapping

from checkpoints_convert.lazy import Shaped
from checkpoints_convert.rules import CONV2D, TRANSPOSE, VECTOR, FlattenedDense, Rule
from jax_idgrpo.models.faces.arcface import (
    ARCFACE_R34,
    IR_101,
    IRESNET_34,
    IRESNET_50,
    IRESNET_100,
    ArcFaceConfig,
)

UNIT_SCALE = "features.weight"  # insightface's frozen scale of ones


def _batch_norm(torch: str, jax: str, norm: str = "affine") -> list[Rule]:
    pairs = (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "mean"),
        ("running_var", "var"),
    )
    return [
        Rule(f"{torch}.{theirs}", f"{jax}.{ours}", VECTOR)
        for theirs, ours in pairs[{"affine": 0, "bias": 1, "plain": 2}[norm] :]
    ]


def _conv(torch: str, jax: str) -> Rule:
    return Rule(f"{torch}.weight", f"{jax}.kernel", CONV2D)


@dataclasses.dataclass(frozen=True)
class _Names:
    """Names of the parts of an ArcFace network in one family of files."""

    stem: tuple[str, str, str]  # convolution, norm, PReLU
    unit: str  # with {stage} from 1, {k} within the stage, {n} over all stages
    parts: tuple[str, ...]  # of a unit: norm, convolution, norm, PReLU, convolution, norm
    shortcut: tuple[str, str]  # of a unit: convolution, norm
    tail: tuple[str, str, str]  # norm, dense, norm of the embedding


_DEEPFACE = _Names(
    ("backbone.conv1_conv", "backbone.conv1_bn", "backbone.conv1_prelu"),
    "backbone.conv{stage1}.{k}",
    ("bn_1", "conv_1", "bn_2", "prelu_1", "conv_2", "bn_3"),
    ("conv_0", "bn_0"),
    ("bn", "dense", "embedding"),
)
_INSIGHTFACE = _Names(
    ("conv1", "bn1", "prelu"),
    "layer{stage}.{k}",
    ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3"),
    ("downsample.0", "downsample.1"),
    ("bn2", "fc", "features"),
)
_CURRICULARFACE = _Names(
    ("input_layer.0", "input_layer.1", "input_layer.2"),
    "body.{n}",
    tuple(f"res_layer.{k}" for k in range(6)),
    ("shortcut_layer.0", "shortcut_layer.1"),
    ("output_layer.0", "output_layer.3", "output_layer.4"),
)
_BY_NORM = {"affine": _DEEPFACE, "bias": _INSIGHTFACE, "plain": _CURRICULARFACE}


def names(config: ArcFaceConfig) -> list[Rule]:
    """List the rules of an ArcFace network; its last norm selects the family of names."""
    parts_of = _BY_NORM[config.embedding_norm]
    rules = [_conv(parts_of.stem[0], "conv"), *_batch_norm(parts_of.stem[1], "norm")]
    rules += [Rule(f"{parts_of.stem[2]}.weight", "prelu.slope", VECTOR)]
    number = 0
    for stage, units in enumerate(config.units):
        for k in range(units):
            torch = parts_of.unit.format(stage=stage + 1, stage1=stage + 2, k=k, n=number)
            jax = f"stages.{stage}.{k}"
            number += 1
            if k == 0 and (stage or config.first_shortcut == "conv"):
                conv, norm = (f"{torch}.{part}" for part in parts_of.shortcut)
                rules += [
                    _conv(conv, f"{jax}.shortcut.conv"),
                    *_batch_norm(norm, f"{jax}.shortcut.norm"),
                ]
            norm1, conv1, norm2, prelu, conv2, norm3 = (
                f"{torch}.{part}" for part in parts_of.parts
            )
            rules += [
                _conv(conv1, f"{jax}.conv1"),
                _conv(conv2, f"{jax}.conv2"),
                Rule(f"{prelu}.weight", f"{jax}.prelu.slope", VECTOR),
            ]
            for part, norm in ((1, norm1), (2, norm2), (3, norm3)):
                rules += _batch_norm(norm, f"{jax}.norm{part}")
    norm, dense, embedding = parts_of.tail
    flattened = FlattenedDense(
        TRANSPOSE.permutation, TRANSPOSE.groups, TRANSPOSE.sizes, channels=config.widths[-1]
    )
    rules += [
        Rule(f"{dense}.weight", "dense.kernel", flattened),
        Rule(f"{dense}.bias", "dense.bias", VECTOR),
    ]
    return [
        *rules,
        *_batch_norm(norm, "tail_norm"),
        *_batch_norm(embedding, "embedding_norm", config.embedding_norm),
    ]


NETWORKS: dict[str, tuple[str, ArcFaceConfig]] = {  # name -> (a tensor of its files, configuration)
    "ArcFace-R34 of deepface": ("backbone.conv1_conv.weight", ARCFACE_R34),
    "IResNet-34": ("layer1.0.bn1.weight", IRESNET_34),
    "IResNet-50": ("layer1.0.bn1.weight", IRESNET_50),
    "IResNet-100": ("layer1.0.bn1.weight", IRESNET_100),
    "IR-101 of CurricularFace": ("input_layer.0.weight", IR_101),
}
FILES = {
    "affine": "arcface_weights.pth",
    "bias": "backbone.pth",
    "plain": "CurricularFace_Backbone.pth",
}


def nearest(tensors: Mapping[str, Shaped]) -> tuple[str, ArcFaceConfig] | None:
    """Return the ArcFace network whose names differ least; `rules.match` reports differences."""
    there = set(tensors) - {UNIT_SCALE}
    sets = {
        name: {rule.torch for rule in names(config)}
        for name, (example, config) in NETWORKS.items()
        if example in there
    }
    if not sets:
        return None
    closest = min(sets, key=lambda name: len(sets[name] ^ there))
    return closest, NETWORKS[closest][1]
