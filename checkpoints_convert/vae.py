"""Define the names of the Wan VAE in diffusers' `AutoencoderKLWan` and in `Wan2.1_VAE.pth`.

Our modules have diffusers' names; the leaf `weight` becomes `kernel`. Sources: diffusers,
`autoencoder_kl_wan.py`; Wan2.1, `wan/modules/vae.py`.
"""

import re
from collections.abc import Mapping
from typing import Literal

from checkpoints_convert.lazy import Shaped
from checkpoints_convert.rules import (
    CONV2D,
    CONV3D,
    GAMMA2D,
    GAMMA3D,
    POINTWISE2D,
    POINTWISE3D,
    VECTOR,
    Op,
    Rule,
)
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.vae import VAEConfig

Layout = Literal["diffusers", "original"]

LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
TIME_CONV = Op((2, 3, 4, 1, 0), (3, 1, 1), (None, None, None, 1, 1))  # [O, I, t, 1, 1] -> [t, I, O]


_WAN_2_1 = {
    "attn_scales": [],
    "is_residual": False,
    "patch_size": None,
    "decoder_base_dim": None,
    "in_channels": 3,
    "out_channels": 3,
}


def config_from_json(values: dict) -> VAEConfig:
    """Read a `vae/config.json` of diffusers; ValueError for other architectures than Wan 2.1's."""
    for name, value in _WAN_2_1.items():
        if values.get(name, value) != value:
            raise ValueError(
                f"{name} is {values[name]!r}, Wan 2.1 has {value!r}; other autoencoders are not "
                "supported"
            )
    return VAEConfig(
        base_dim=values["base_dim"],
        dim_mult=tuple(values["dim_mult"]),
        num_res_blocks=values["num_res_blocks"],
        temporal_downsample=tuple(values["temperal_downsample"]),
        latents_mean=tuple(values["latents_mean"]),
        latents_std=tuple(values["latents_std"]),
        z_dim=values["z_dim"],
    )


def config_to_json(config: VAEConfig) -> dict:
    """Make the config for diffusers' `AutoencoderKLWan.from_pretrained`."""
    return {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": "0.35.0",
        "attn_scales": [],
        "base_dim": config.base_dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks,
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


def config_from_shapes(tensors: Mapping[str, Shaped], layout: Layout) -> VAEConfig:
    """Infer the config of a file without one from its tensors.

    The statistics of the latents are those of Wan 2.1.

    Raises:
      UserError: a tensor that determines a size is missing.
    """
    first, blocks, leaf, last = {
        "diffusers": ("encoder.conv_in", "encoder.down_blocks", "conv1", "post_quant_conv"),
        "original": ("encoder.conv1", "encoder.downsamples", "residual.2", "conv2"),
    }[layout]
    for name in (f"{first}.weight", f"{last}.weight", f"{blocks}.0.{leaf}.weight"):
        if name not in tensors or len(tensors[name].shape) != 5:
            raise UserError(
                f"tensor {name} is missing or no convolution, so that the sizes are not known"
            )
    base, z_dim = tensors[f"{first}.weight"].shape[0], tensors[f"{last}.weight"].shape[0]
    if z_dim != len(LATENTS_MEAN):
        raise UserError(
            f"{z_dim} latent channels, Wan 2.1 has {len(LATENTS_MEAN)}; other autoencoders are not "
            "supported"
        )
    found = (re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) for name in tensors)
    widths: list[int] = []
    temporal: list[bool] = []
    level = residual = 0  # blocks counted in this level, blocks of the previous level
    for index in range(1 + max(int(match.group(1)) for match in found if match)):
        block = f"{blocks}.{index}"
        if f"{block}.{leaf}.weight" in tensors:
            widths += [int(tensors[f"{block}.{leaf}.weight"].shape[0])] if level == 0 else []
            level += 1
        else:
            temporal.append(f"{block}.time_conv.weight" in tensors)
            level, residual = 0, level
    return VAEConfig(
        base_dim=int(base),
        dim_mult=tuple(width // int(base) for width in widths),
        num_res_blocks=level or residual,
        temporal_downsample=tuple(temporal),
        latents_mean=LATENTS_MEAN,
        latents_std=LATENTS_STD,
        z_dim=int(z_dim),
    )


def rules(config: VAEConfig, layout: Layout = "diffusers") -> list[Rule]:
    """List the rules of all tensors of the VAE in a layout.

    The helpers take our name of a module and the original name.
    """
    table: list[Rule] = []

    def weight_bias(name: str, original: str, op: Op, diffusers: str | None = None) -> None:
        torch = original if layout == "original" else diffusers or name
        table.append(Rule(f"{torch}.weight", f"{name}.kernel", op))
        table.append(Rule(f"{torch}.bias", f"{name}.bias", VECTOR))

    def gamma(name: str, original: str, op: Op) -> None:
        table.append(
            Rule(f"{original if layout == 'original' else name}.gamma", f"{name}.gamma", op)
        )

    def res_block(name: str, original: str, shortcut: bool) -> None:
        for part, (norm, conv) in (("1", (0, 2)), ("2", (3, 6))):
            gamma(f"{name}.norm{part}", f"{original}.residual.{norm}", GAMMA3D)
            weight_bias(f"{name}.conv{part}", f"{original}.residual.{conv}", CONV3D)
        if shortcut:
            weight_bias(f"{name}.conv_shortcut", f"{original}.shortcut", POINTWISE3D)

    def ends(name: str) -> None:
        """Add the first, middle and last layers of the encoder or decoder."""
        weight_bias(f"{name}.conv_in", f"{name}.conv1", CONV3D)
        res_block(f"{name}.mid_block.resnets.0", f"{name}.middle.0", False)
        res_block(f"{name}.mid_block.resnets.1", f"{name}.middle.2", False)
        attention, original = f"{name}.mid_block.attentions.0", f"{name}.middle.1"
        gamma(f"{attention}.norm", f"{original}.norm", GAMMA2D)
        for part in ("to_qkv", "proj"):
            weight_bias(f"{attention}.{part}", f"{original}.{part}", POINTWISE2D)
        gamma(f"{name}.norm_out", f"{name}.head.0", GAMMA3D)
        weight_bias(f"{name}.conv_out", f"{name}.head.2", CONV3D)

    def resample(name: str, original: str, time: bool) -> None:
        weight_bias(f"{name}.resample", f"{original}.resample.1", CONV2D, f"{name}.resample.1")
        if time:
            weight_bias(f"{name}.time_conv", f"{original}.time_conv", TIME_CONV)

    widths = [config.base_dim * multiple for multiple in config.dim_mult]
    ends("encoder")
    index, channels = 0, config.base_dim
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            res_block(
                f"encoder.down_blocks.{index}", f"encoder.downsamples.{index}", channels != width
            )
            index, channels = index + 1, width
        if level < len(config.temporal_downsample):
            time = config.temporal_downsample[level]
            resample(f"encoder.down_blocks.{index}", f"encoder.downsamples.{index}", time)
            index += 1
    weight_bias("quant_conv", "conv1", POINTWISE3D)
    weight_bias("post_quant_conv", "conv2", POINTWISE3D)
    ends("decoder")
    index, channels = 0, widths[-1]
    for level, width in enumerate(reversed(widths)):
        for block in range(config.num_res_blocks + 1):
            shortcut = block == 0 and channels != width
            res_block(
                f"decoder.up_blocks.{level}.resnets.{block}", f"decoder.upsamples.{index}", shortcut
            )
            index += 1
        if level < len(config.temporal_downsample):
            time = config.temporal_downsample[::-1][level]
            resample(f"decoder.up_blocks.{level}.upsamplers.0", f"decoder.upsamples.{index}", time)
            index += 1
        channels = width // 2
    return table
