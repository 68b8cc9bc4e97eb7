"""The Wan VAE: diffusers `AutoencoderKLWan` names and json against our parameter paths.

Names are equal but for the last one: `weight` is `kernel`, and the layouts turn (section ops). Source: diffusers,
`autoencoder_kl_wan.py`.
"""

from jax_idgrpo.models.vae import VAEConfig


def config_from_json(values: dict) -> VAEConfig:
    """The config of a diffusers `vae/config.json`. Raises ValueError for an architecture other than Wan 2.1's."""
    fixed = {"attn_scales": [], "is_residual": False, "patch_size": None, "decoder_base_dim": None,
             "in_channels": 3, "out_channels": 3}
    for name, value in fixed.items():
        if values.get(name, value) != value:
            raise ValueError(f"VAE config.json: {name} = {values[name]!r} is not Wan 2.1's {value!r}")
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


def rules(config: VAEConfig) -> list[tuple[str, str, str]]:
    """(diffusers name, parameter path, op) of every tensor."""
    table = []

    def add(torch_name, path, op):
        table.append((torch_name, path, op))

    def weight_bias(name, op):
        add(f"{name}.weight", f"{name}.kernel", op)
        add(f"{name}.bias", f"{name}.bias", "identity")

    def res_block(name, shortcut):
        for part in ("1", "2"):
            add(f"{name}.norm{part}.gamma", f"{name}.norm{part}.gamma", "gamma_video")
            weight_bias(f"{name}.conv{part}", "conv3d")
        if shortcut:
            weight_bias(f"{name}.conv_shortcut", "pointwise3d")

    def mid_block(name):
        res_block(f"{name}.resnets.0", False)
        res_block(f"{name}.resnets.1", False)
        add(f"{name}.attentions.0.norm.gamma", f"{name}.attentions.0.norm.gamma", "gamma_image")
        weight_bias(f"{name}.attentions.0.to_qkv", "pointwise2d")
        weight_bias(f"{name}.attentions.0.proj", "pointwise2d")

    def ends(name):
        weight_bias(f"{name}.conv_in", "conv3d")
        add(f"{name}.norm_out.gamma", f"{name}.norm_out.gamma", "gamma_video")
        weight_bias(f"{name}.conv_out", "conv3d")

    def resample(name, time):
        add(f"{name}.resample.1.weight", f"{name}.resample.kernel", "conv2d")
        add(f"{name}.resample.1.bias", f"{name}.resample.bias", "identity")
        if time:
            weight_bias(f"{name}.time_conv", "time_conv")

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
    weight_bias("quant_conv", "pointwise3d")
    weight_bias("post_quant_conv", "pointwise3d")
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
