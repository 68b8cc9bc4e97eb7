"""Identify the network and the layout of a file by the names of its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from flax import nnx

from checkpoints_convert import lora_checks, rules, umt5, vae, wan
from checkpoints_convert.quantized import MARKER
from jax_idgrpo.config.model_kinds import MODEL_KINDS
from jax_idgrpo.models.layers import FLOAT32
from jax_idgrpo.models.umt5 import UMT5Encoder
from jax_idgrpo.models.vae import WanVAE
from jax_idgrpo.models.wan import WanTransformer

KINDS = tuple(MODEL_KINDS)
TRANSFORMER = "transformer"
TEXT_ENCODER = "text_encoder"
ADAPTER = "adapter"
FACE = "face"
STANDALONE = (ADAPTER, FACE)  # networks that are no part of a pipeline


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of network.

    Attributes:
      table: module with the table of names.
      build: makes the network from its config.
      published: layout of the diffusers folder in `table`.
      weights: name of the weights in the diffusers folder, without suffix.
      original: name of the weights in the original folder.
      ignored: prefixes of further tensors in published files.
    """

    table: ModuleType
    build: Callable[[Any], nnx.Module]
    published: str
    weights: str
    original: str
    ignored: tuple[str, ...] = ()


FAMILIES = {
    TRANSFORMER: Family(
        wan,
        lambda config: WanTransformer(config, dtypes=FLOAT32, rngs=nnx.Rngs(0)),
        "diffusers",
        "diffusion_pytorch_model",
        "diffusion_pytorch_model.safetensors",
    ),
    "vae": Family(
        vae,
        lambda config: WanVAE(config, rngs=nnx.Rngs(0)),
        "diffusers",
        "diffusion_pytorch_model",
        "Wan2.1_VAE.pth",
    ),
    "text_encoder": Family(
        umt5,
        lambda config: UMT5Encoder(config, dtypes=FLOAT32, rngs=nnx.Rngs(0)),
        "transformers",
        "model",
        "models_t5_umt5-xxl-enc-bf16.pth",
        umt5.IGNORED,
    ),
}
CLASSES = {  # class named by a config.json of the diffusers layout -> part
    "WanTransformer3DModel": TRANSFORMER,
    "WanVACETransformer3DModel": TRANSFORMER,
    "AutoencoderKLWan": "vae",
    "UMT5EncoderModel": "text_encoder",
} | {kind.class_name: TRANSFORMER for kind in MODEL_KINDS.values() if kind.class_name}
LORA = rf"\.lora[_.]|\.diff(_b|_m)?$|{lora_checks.LYCORIS}"  # names of any adapter
BLOCK = r"(vace_)?blocks\.\d+\."
# fmt: off
# Patterns of names that only one network has, in one layout. The most frequent pattern decides.
SIGNS = {
    (TRANSFORMER, "diffusers"):
        rf"condition_embedder\.|{BLOCK}(attn[12]\.|ffn\.net\.|scale_shift_table)",
    (TRANSFORMER, "original"):
        r"(time_embedding|time_projection|text_embedding|head)\."
        rf"|{BLOCK}(self_attn\.|cross_attn\.|modulation)",
    (TRANSFORMER, "store"):
        rf"condition_embedder\.|{BLOCK}(attn[12]\.|ffn\.linear_|scale_shift_table)",
    ("vae", "diffusers"):
        r"(en|de)coder\.(conv_|norm_out|mid_block\.|down_blocks\.|up_blocks\.)"
        r"|(post_)?quant_conv\.",
    ("vae", "original"):
        r"(en|de)coder\.(conv1|middle|downsamples|upsamples|head)\.",
    ("vae", "store"):
        r"(en|de)coder\.(conv_|norm_out|mid_block\.|down_blocks\.|up_blocks\.)"
        r"|(post_)?quant_conv\.",
    ("text_encoder", "transformers"):
        r"encoder\.(block|final_layer_norm|embed_tokens)\.|shared\.",
    ("text_encoder", "original"):
        r"token_embedding\.|blocks\.\d+\.(attn\.|pos_embedding\.|ffn\.(gate|fc)|norm[12]\.)",
    ("text_encoder", "store"):
        r"embedding$|blocks\.\d+\.(attention\.|ffn\.(gate|up|down)\.|norm[12]\.scale)",
}
# fmt: on
IMAGE_TO_VIDEO = r"^img_emb\.|\.k_img\.|^condition_embedder\.image_embedder\.|\.add_k_proj\."
# Prefixes that DDP, FSDP, compiled modules and ComfyUI add to every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "diffusion_model.", "transformer.")


def identify(names: Iterable[str]) -> tuple[str, str] | None:
    """Return (part, layout) of a file with these tensors; None for no network of this project."""
    names = list(names)
    if any(re.search(LORA, name) for name in names):
        return ADAPTER, "peft"
    stored = rules.is_stored(names)
    counts = {
        sign: sum(bool(re.match(pattern, name)) for name in names)
        for sign, pattern in SIGNS.items()
        if (sign[1] == "store") == stored
    }
    best = max(counts, key=lambda sign: counts[sign])
    return best if counts[best] else None


def refuse_others(names: Iterable[str]) -> None:
    """Raise a ValueError for the tensors of a Wan network that this project does not have."""
    names = list(names)
    if any(re.search(IMAGE_TO_VIDEO, name) for name in names):
        raise ValueError(wan.NO_IMAGE_TO_VIDEO)
    if is_module(names):
        raise ValueError(
            "these are VACE blocks without the main model; lay them over it with idgrpo-convert "
            "import FILE STORE --with T2V, or give the whole VACE checkpoint"
        )


def is_module(names: Iterable[str]) -> bool:
    """Return whether these are the VACE blocks of a transformer without its main blocks."""
    stacks = {name.split(".")[0] for name in names}
    return "vace_blocks" in stacks and "blocks" not in stacks


def common_prefix(names: Iterable[str]) -> str:
    """Return the common prefix of the names of a known network, such as `model.diffusion_model.`.

    The prefix is empty if there is none, or if the names without it are of no known network.
    ComfyUI's marker of scaled 8-bit floats may be without it.
    """
    rest, start = [name for name in names if name != MARKER], ""
    while rest and identify(rest) is None:
        found = next(
            (prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in rest)), None
        )
        if found is None:
            return ""
        start, rest = start + found, [name.removeprefix(found) for name in rest]
    return start
