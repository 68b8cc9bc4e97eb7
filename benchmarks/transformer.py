"""One call of the video transformer, and its gradient by a LoRA, against diffusers and peft on PyTorch.

Both sides load the same randomly filled VACE checkpoint and get the same input, in float32, alternating in one process; the figure is the
ratio of medians, ours over theirs. Needs the `test` extra:

    python benchmarks/transformer.py [--rows 2] [--rounds 7]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx

from jax_idgrpo import policy
from jax_idgrpo.keys import key
from jax_idgrpo.pipeline import add_adapter, load_transformer

SIZES = dict(
    num_attention_heads=6, attention_head_dim=64, ffn_dim=1536, num_layers=12, text_dim=512, freq_dim=256, vace_layers=[0, 4, 8],
    in_channels=16, out_channels=16, vace_in_channels=96, patch_size=(1, 2, 2), qk_norm="rms_norm_across_heads", cross_attn_norm=True,
)
FRAMES, HEIGHT, WIDTH, TEXT, RANK = 5, 16, 16, 64, 8


def medians(rounds: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each call, taken in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    theirs = diffusers.WanVACETransformer3DModel(**SIZES).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder) / "transformer")
        ours = load_transformer(folder)
    parameters = sum(p.numel() for p in theirs.parameters())
    targets = r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)"
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    actor, lora, base = policy.split(add_adapter(ours, RANK, float(RANK), key(0, "init")), 1.0)

    rng = np.random.default_rng(0)
    rows = arguments.rows
    latents = rng.standard_normal((rows, FRAMES, HEIGHT, WIDTH, 16), np.float32)
    control = rng.standard_normal((rows, FRAMES, HEIGHT, WIDTH, 96), np.float32)
    text = rng.standard_normal((rows, TEXT, SIZES["text_dim"]), np.float32)
    time_steps = np.full(rows, 500)

    def channels_first(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1)))

    given = dict(
        hidden_states=channels_first(latents), timestep=torch.from_numpy(time_steps), encoder_hidden_states=torch.from_numpy(text),
        control_hidden_states=channels_first(control), return_dict=False,
    )

    def apply(lora: nnx.State, base: nnx.State) -> jax.Array:
        return nnx.merge(actor.adapted, base, lora)(jnp.asarray(latents), jnp.asarray(time_steps), jnp.asarray(text), jnp.asarray(control))

    forward = jax.jit(apply)
    gradient = jax.jit(jax.grad(lambda lora, base: jnp.sum(apply(lora, base) ** 2)))

    def their_gradient() -> None:
        theirs.zero_grad()
        (theirs(**given)[0] ** 2).sum().backward()

    with torch.no_grad():
        want = np.moveaxis(theirs(**given)[0].numpy(), 1, -1)
        error = np.linalg.norm(forward(lora, base) - want) / np.linalg.norm(want)
        tokens = FRAMES * HEIGHT * WIDTH // 4
        print(f"{parameters / 1e6:.0f}M parameters, {rows} x {tokens} tokens, float32; relative difference {error:.1e}")
        calls = medians(arguments.rounds, ours=lambda: jax.block_until_ready(forward(lora, base)), theirs=lambda: theirs(**given))
    report("forward", calls)
    calls = medians(arguments.rounds, ours=lambda: jax.block_until_ready(gradient(lora, base)), theirs=their_gradient)
    report("gradient of the adapter", calls)


def report(name: str, seconds: dict[str, float]) -> None:
    print(f"{name}: ours {seconds['ours']:.3f} s, PyTorch {seconds['theirs']:.3f} s, ratio {seconds['ours'] / seconds['theirs']:.2f}")


if __name__ == "__main__":
    main()
