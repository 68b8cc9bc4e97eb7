"""The Wan VAE: diffusers `AutoencoderKLWan` names and json against our parameter paths.

The modules are named alike; of the leaves `weight` becomes `kernel`. Source: diffusers, `autoencoder_kl_wan.py`.
"""

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
from jax_idgrpo.models.vae import VAEConfig

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
    """The config of a diffusers `vae/config.json`. Raises ValueError for an architecture other than Wan 2.1's."""
    for name, value in _WAN_2_1.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} is {values[name]!r}, Wan 2.1 has {value!r}; other autoencoders are not supported")
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
    """What diffusers' `AutoencoderKLWan.from_pretrained` reads."""
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


def rules(config: VAEConfig) -> list[Rule]:
    """One rule per tensor: its diffusers name, our path, how its axes move."""
    table: list[Rule] = []

    def weight_bias(name: str, op: Op, torch_name: str | None = None) -> None:
        table.append(Rule(f"{torch_name or name}.weight", f"{name}.kernel", op))
        table.append(Rule(f"{torch_name or name}.bias", f"{name}.bias", VECTOR))

    def gamma(name: str, op: Op) -> None:
        table.append(Rule(f"{name}.gamma", f"{name}.gamma", op))

    def res_block(name: str, shortcut: bool) -> None:
        for part in ("1", "2"):
            gamma(f"{name}.norm{part}", GAMMA3D)
            weight_bias(f"{name}.conv{part}", CONV3D)
        if shortcut:
            weight_bias(f"{name}.conv_shortcut", POINTWISE3D)

    def mid_block(name: str) -> None:
        res_block(f"{name}.resnets.0", False)
        res_block(f"{name}.resnets.1", False)
        gamma(f"{name}.attentions.0.norm", GAMMA2D)
        weight_bias(f"{name}.attentions.0.to_qkv", POINTWISE2D)
        weight_bias(f"{name}.attentions.0.proj", POINTWISE2D)

    def ends(name: str) -> None:
        weight_bias(f"{name}.conv_in", CONV3D)
        gamma(f"{name}.norm_out", GAMMA3D)
        weight_bias(f"{name}.conv_out", CONV3D)

    def resample(name: str, time: bool) -> None:
        weight_bias(f"{name}.resample", CONV2D, f"{name}.resample.1")
        if time:
            weight_bias(f"{name}.time_conv", TIME_CONV)

    widths = [config.base_dim * multiple for multiple in config.dim_mult]
    ends("encoder")
    index, channels = 0, config.base_dim
    for level, width in enumerate(widths):
        for _ in range(config.num_res_blocks):
            res_block(f"encoder.down_blocks.{index}", channels != width)
            index, channels = index + 1, width
        if level < len(config.temporal_downsample):
            resample(f"encoder.down_blocks.{index}", config.temporal_downsample[level])
            index += 1
    mid_block("encoder.mid_block")
    weight_bias("quant_conv", POINTWISE3D)
    weight_bias("post_quant_conv", POINTWISE3D)
    ends("decoder")
    mid_block("decoder.mid_block")
    channels = widths[-1]
    for level, width in enumerate(reversed(widths)):
        for block in range(config.num_res_blocks + 1):
            res_block(f"decoder.up_blocks.{level}.resnets.{block}", block == 0 and channels != width)
        if level < len(config.temporal_downsample):
            resample(f"decoder.up_blocks.{level}.upsamplers.0", config.temporal_downsample[::-1][level])
        channels = width // 2
    return table
