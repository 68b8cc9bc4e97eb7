"""Benchmark the conversion of large checkpoints: time relative to `cp`, peak memory, and parity.

    python benchmarks/convert.py streaming --folder DIR [--layers 4] [--dtype float32] [--repeats 2]
        A random checkpoint in the original layout with the widths of Wan 14B and a few of its
        layers is copied with cp, imported into the store, exported to the diffusers and the
        original layout, and verified. Each step runs in its own process. With --dtype
        float8_e4m3fn, matrices are scaled fp8, and every step dequantizes them to bfloat16, which
        writes twice the bytes that cp writes; so the output is copied with cp as well.
    python benchmarks/convert.py vace --folder DIR [--dtype float32]
        Wan2.1-VACE-1.3B (2.154 B parameters) with random weights, written by diffusers, is
        imported, compared with diffusers on a small input, exported and verified. Requires the
        `test` extra and 16 GB of memory in float32, 9 in bfloat16.

DIR needs space for four copies. It is deleted afterwards, unless --keep is given.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

FP8 = "float8_e4m3fn"
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    FP8: ml_dtypes.float8_e4m3fn,
}
INPUTS = {"latents": (1, 3, 16, 16, 16), "control": (1, 3, 16, 16, 96), "text": (1, 16, 4096)}
TIMESTEP = 666
STEPS = ("source", "theirs", "ours")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run_measured(name: str, *words: str) -> tuple[float, float]:
    """Run a process; returns seconds and peak resident memory in GB, including mapped files."""
    began = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds, peak = time.perf_counter() - began, usage.ru_maxrss / 1e6
    if status:
        raise SystemExit(f"{name} failed: {output}")
    last = output.strip().splitlines()[-1] if output.strip() else ""
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"{name:<34} {seconds:7.1f} s   cpu {cpu:6.1f} s   peak {peak:5.2f} GB   {last}", flush=True
    )
    return seconds, peak


def convert(*words: object) -> tuple[str, ...]:
    """Build the command line of `idgrpo-convert`."""
    return (sys.executable, "-m", "checkpoints_convert", *map(str, words))


def warm(path: Path) -> None:
    """Read a file into the page cache, as far as it fits, so that all steps start alike."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


# ---- streaming -----------------------------------------------------------------------------------


def write_14b_shaped(folder: Path, layers: int, dtype: str) -> None:
    """Write a transformer in the original layout with the widths of Wan 14B.

    Prints the size of the largest tensor in GB.

    Args:
      folder: folder to create.
      layers: number of blocks.
      dtype: name of the dtype.
    """
    from flax import nnx

    from checkpoints_convert import lazy, rules, store, wan
    from jax_idgrpo.models.layers import FLOAT32
    from jax_idgrpo.models.wan import WanTransformer, wan_14b

    config = dataclasses.replace(wan_14b(), num_layers=layers)
    shapes = nnx.state(
        nnx.eval_shape(lambda: WanTransformer(config, dtypes=FLOAT32, rngs=nnx.Rngs(0)))
    )
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype(DTYPES[dtype])
    short = noise[: 1 << 16].astype(ml_dtypes.bfloat16)

    class Random:
        """An array whose values are generated when it is written."""

        def __init__(self, shape: tuple[int, ...]):
            values = short if dtype == FP8 and len(shape) != 2 else noise
            self.shape, self.dtype, self.values = shape, values.dtype, values

        def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
            bits = self.values.view(f"u{self.dtype.itemsize}")
            return np.resize(bits, self.shape).view(self.dtype)

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        slot.torch: Random(slot.torch_shape)
        for slot in rules.expand(wan.rules(config, "original"), shapes)
    }
    if dtype == FP8:
        for name in [name for name, tensor in tensors.items() if tensor.dtype == noise.dtype]:
            layer = name.removesuffix(".weight")
            tensors[f"{layer}.scale_weight"] = np.full((), 0.0123, np.float32)
    store.write_json(folder / "config.json", wan.config_to_original(config))
    store.write_file(folder / WEIGHTS, tensors)
    print(max(map(lazy.size, tensors.values())) / 1e9)


def streaming(folder: Path, layers: int, dtype: str, repeats: int) -> None:
    """Benchmark the conversion of a checkpoint with the widths of Wan 14B.

    Args:
      folder: folder for the checkpoints.
      layers: number of blocks.
      dtype: name of the dtype.
      repeats: runs of every step; the fastest is reported.
    """
    script = (
        sys.executable,
        __file__,
        "source",
        "--folder",
        str(folder),
        "--layers",
        str(layers),
        "--dtype",
        dtype,
    )
    # In its own process: the peak memory of a child includes that of its parent at the fork.
    made = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True)
    largest = float(made.stdout)
    file = folder / "source" / WEIGHTS
    size = file.stat().st_size / 1e9
    print(
        f"{size:.2f} GB, {dtype}, {layers} layers with the widths of Wan 14B; "
        f"largest tensor {largest:.2f} GB"
    )
    os.sync()
    seconds = {}
    outputs = {
        "import": "store",
        "export --format diffusers": "diffusers",
        "export --format original": "original",
    }
    exported = file.parent if dtype == FP8 else folder / "store"
    for repeat in range(repeats):
        for name, words in {
            "cp": ("cp", str(file), str(folder / "copy")),
            "cp, flushed to the disk": (
                "sh",
                "-c",
                f"cp '{file}' '{folder / 'copy'}' && sync '{folder / 'copy'}'",
            ),
            "import": convert("import", file.parent, folder / "store"),
            "export --format diffusers": convert(
                "export", exported, folder / "diffusers", "--format", "diffusers"
            ),
            "export --format original": convert(
                "export", exported, folder / "original", "--format", "original"
            ),
        }.items():
            for leftover in (
                "copy",
                *(("store",) if name == "import" or dtype == FP8 else ()),
                "diffusers",
                "original",
            ):
                path = folder / leftover
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            os.sync()
            warm(file)
            taken, peak = run_measured(f"{name} ({repeat + 1})", *words)
            seconds.setdefault(name, []).append(taken)
            assert peak < largest + 2, f"{name}: {peak:.2f} GB"
            if dtype == FP8 and name in outputs:
                (folder / "copy").unlink(missing_ok=True)
                words = ("cp", "-r", str(folder / outputs[name]), str(folder / "copy"))
                taken, _ = run_measured(f"cp of its output ({repeat + 1})", *words)
                seconds.setdefault(f"cp of {name}", []).append(taken)
                shutil.rmtree(folder / "copy")
    run_measured("verify source original", *convert("verify", file.parent, folder / "original"))
    copy = min(seconds["cp"])
    flushed = min(seconds["cp, flushed to the disk"])
    for name in outputs:
        best = min(seconds[name])
        written = seconds.get(f"cp of {name}")
        beside = f", {best / min(written):.2f} times cp of its output" if written else ""
        print(
            f"{name}: {best / copy:.2f} times cp, "
            f"{best / flushed:.2f} times cp flushed to the disk{beside}; {size / best:.2f} GB/s"
        )


# ---- the full-size model -------------------------------------------------------------------------


def inputs() -> dict[str, np.ndarray]:
    """Generate the input of both sides, channels last."""
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in INPUTS.items()}


def theirs(folder: Path, dtype: str) -> None:
    """Save diffusers' model with random weights, and its velocity for a small input."""
    import torch
    from diffusers import WanVACETransformer3DModel

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    torch.set_default_dtype(kind)
    model = WanVACETransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=128,
        ffn_dim=8960,
        num_layers=30,
        text_dim=4096,
        freq_dim=256,
        vace_layers=list(range(0, 30, 2)),
        vace_in_channels=96,
    ).eval()
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norm weights and biases, which diffusers initialises to constants
            parameter += 0.1 * torch.randn(parameter.shape).to(parameter.dtype)
    print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters of {kind}",
        file=sys.stderr,
    )
    model.save_pretrained(folder / "source" / "transformer", max_shard_size="5GB")

    def channels_first(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 1))).to(kind)

    given = inputs()
    began = time.perf_counter()
    out = model(
        hidden_states=channels_first(given["latents"]),
        timestep=torch.tensor([TIMESTEP]),
        encoder_hidden_states=torch.from_numpy(given["text"]).to(kind),
        control_hidden_states=channels_first(given["control"]),
        return_dict=False,
    )[0]
    np.save(folder / "theirs.npy", np.moveaxis(out.float().numpy(), 1, -1))
    print(f"forward {time.perf_counter() - began:.1f} s")


def ours(folder: Path, dtype: str) -> None:
    """Load the store's weights and compare the velocity for the same input with diffusers'."""
    import jax
    from flax import nnx

    from jax_idgrpo.sampling.pipeline import load_transformer

    began = time.perf_counter()
    model = load_transformer(folder / "store", dtype)
    loaded = time.perf_counter() - began
    given = inputs()
    began = time.perf_counter()
    graph, state = nnx.split(model)  # nnx.jit would return a second copy of the weights
    run = jax.jit(
        lambda state, latents, text, control: nnx.merge(graph, state)(
            latents, jax.numpy.array([TIMESTEP]), text, control
        )
    )
    got = np.asarray(run(state, given["latents"], given["text"], given["control"]))
    want = np.load(folder / "theirs.npy")
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    seconds = time.perf_counter() - began
    print(
        f"load {loaded:.1f} s, compile and forward {seconds:.1f} s, relative difference {error:.2e}"
    )
    assert error < (1e-4 if dtype == "float32" else 3e-2)


def vace(folder: Path, dtype: str) -> None:
    """Benchmark the conversion of the full-size VACE-1.3B and compare it with diffusers."""
    script = str(Path(__file__))
    source, transformer = folder / "source", folder / "source" / "transformer"
    run_measured(
        "diffusers: build, save, run",
        sys.executable,
        script,
        "theirs",
        "--folder",
        str(folder),
        "--dtype",
        dtype,
    )
    size = sum(file.stat().st_size for file in transformer.iterdir())
    print(f"{size:,} bytes in {len(list(transformer.glob('*.safetensors')))} files")
    run_measured("import", *convert("import", transformer, folder / "store"))
    run_measured(
        "ours: load, run, compare",
        sys.executable,
        script,
        "ours",
        "--folder",
        str(folder),
        "--dtype",
        dtype,
    )
    run_measured(
        "export --format diffusers",
        *convert("export", folder / "store", folder / "out", "--format", "diffusers"),
    )
    run_measured("verify source out", *convert("verify", transformer, folder / "out"))
    index = f"{WEIGHTS}.index.json"
    assert (
        json.loads((folder / "out" / index).read_text()).keys()
        == json.loads((transformer / index).read_text()).keys()
    )
    shutil.rmtree(folder / "out")
    run_measured(
        "export --format original",
        *convert("export", folder / "store", folder / "out", "--format", "original"),
    )
    run_measured("verify source out", *convert("verify", source / "transformer", folder / "out"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=("streaming", "vace", *STEPS), help="the last three are internal steps"
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        help="runs of every step of streaming; reports the fastest",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    if arguments.what in ("theirs", "ours"):
        {"theirs": theirs, "ours": ours}[arguments.what](arguments.folder, arguments.dtype)
        return
    if arguments.what == "source":
        write_14b_shaped(arguments.folder / "source", arguments.layers, arguments.dtype)
        return
    try:
        if arguments.what == "streaming":
            streaming(arguments.folder, arguments.layers, arguments.dtype, arguments.repeats)
        else:
            vace(arguments.folder, arguments.dtype)
    finally:
        if not arguments.keep:
            shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
