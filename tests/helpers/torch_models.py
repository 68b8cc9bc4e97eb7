"""Tiny torch models for the parity tests, every parameter random: constants such as a norm weight of 1 would hide faults.

Matrices are N(0, 1 / fan-in), biases 0.2 N, norm weights and gammas 1 + 0.3 N, modulation tables 0.4 N, relative
position biases 1.5 N.
"""

import math

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel, WanVACETransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

torch.set_grad_enabled(False)
torch.set_num_threads(1)


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "ffn_dim": 80,
    "num_layers": 4,
    "text_dim": 32,
    "freq_dim": 64,
    "rope_max_seq_len": 64,
}


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every parameter anew and leaves the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "scale_shift_table" in name:
            value = 0.4 * noise
        elif "relative_attention_bias" in name:
            value = 1.5 * noise
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif name.endswith("gamma") or noise.ndim == 1:
            value = 1 + 0.3 * noise
        else:
            value = noise / math.sqrt(math.prod(noise.shape[1:]))
        parameter.copy_(value)
    return model.eval()


def wan(seed: int = 0, **changes) -> WanTransformer3DModel:
    return randomise(WanTransformer3DModel(**(WAN | changes)), seed)


def vace(
    vace_layers: tuple[int, ...] = (0, 2), seed: int = 0, **changes
) -> WanVACETransformer3DModel:
    sizes = WAN | {"vace_layers": list(vace_layers), "vace_in_channels": 96} | changes
    return randomise(WanVACETransformer3DModel(**sizes), seed)


def vae(seed: int = 0, **changes) -> AutoencoderKLWan:
    return randomise(AutoencoderKLWan(**({"base_dim": 8, "z_dim": 16} | changes)), seed)


def umt5(seed: int = 0, **changes) -> UMT5EncoderModel:
    sizes = {
        "d_model": 32,
        "d_kv": 12,
        "num_heads": 4,
        "d_ff": 48,
        "num_layers": 3,
        "vocab_size": 97,
    }
    return randomise(
        UMT5EncoderModel(UMT5Config(**(sizes | {"feed_forward_proj": "gated-gelu"} | changes))),
        seed,
    )


def tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict as arrays."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def channels_first(array: np.ndarray) -> torch.Tensor:
    """[B,T,H,W,C] -> torch [B,C,T,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    """torch [B,C,T,H,W] -> [B,T,H,W,C]."""
    return np.moveaxis(tensor.numpy(), 1, -1)
