"""Conversion of large checkpoints: time against `cp`, peak memory, and a full-size model against diffusers.

    python benchmarks/convert.py streaming --folder DIR [--layers 4] [--dtype float32] [--repeats 2]
        a file of the original layout with the widths of Wan 14B and some of its layers, random values: copied with cp, imported
        into the store, exported to diffusers and to the original names, verified. Each step is a process of its own.
    python benchmarks/convert.py vace --folder DIR [--dtype float32]
        Wan2.1-VACE-1.3B (2.154 B parameters) with random weights, written by diffusers: imported, run on a small input and
        compared with diffusers on the same input, exported, verified. Needs the `test` extra and 16 GB of memory in float32, 9 in bfloat16.

DIR needs room for four copies; what is there is removed afterwards, unless --keep is given.
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

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
INPUTS = {"latents": (1, 3, 16, 16, 16), "control": (1, 3, 16, 16, 96), "text": (1, 16, 4096)}
TIMESTEP = 666
STEPS = ("source", "theirs", "ours")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def measured(name: str, *words: str) -> tuple[float, float]:
    """Run a process to its end; -> seconds, gigabytes of peak resident memory (mapped pages of files among them)."""
    began = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    told = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds, peak = time.perf_counter() - began, usage.ru_maxrss / 1e6
    if status:
        raise SystemExit(f"{name} failed: {told}")
    print(
        f"{name:<34} {seconds:7.1f} s   peak {peak:5.2f} GB   {told.strip().splitlines()[-1] if told.strip() else ''}",
        flush=True,
    )
    return seconds, peak


def convert(*words: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "checkpoints_convert", *map(str, words))


def warm(path: Path) -> None:
    """Read a file once, so that every step finds it in the page cache, as far as it fits."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


# ---- streaming -------------------------------------------------------------------------------------------------------


def write_14b_shaped(folder: Path, layers: int, dtype: str) -> None:
    """An original folder's transformer with the widths of Wan 14B; prints the gigabytes of the largest tensor."""
    from flax import nnx

    from checkpoints_convert import lazy, rules, store, wan
    from jax_idgrpo.models.layers import FLOAT32
    from jax_idgrpo.models.wan import WanTransformer, wan_14b

    config = dataclasses.replace(wan_14b(), num_layers=layers)
    shapes = nnx.state(
        nnx.eval_shape(lambda: WanTransformer(config, dtypes=FLOAT32, rngs=nnx.Rngs(0)))
    )
    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype(DTYPES[dtype])

    class Random:
        """Values made when they are written."""

        def __init__(self, shape: tuple[int, ...]):
            self.shape, self.dtype = shape, noise.dtype

        def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
            return np.resize(noise, self.shape)

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        slot.torch: Random(slot.torch_shape)
        for slot in rules.expand(wan.rules(config, "original"), shapes)
    }
    store.write_json(folder / "config.json", wan.config_to_original(config))
    store.write_file(folder / WEIGHTS, tensors)
    print(max(map(lazy.size, tensors.values())) / 1e9)


def streaming(folder: Path, layers: int, dtype: str, repeats: int) -> None:
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
    made = subprocess.run(
        script, check=True, stdout=subprocess.PIPE, text=True
    )  # not here: a child's peak is the parent's
    largest = float(made.stdout)
    file = folder / "source" / WEIGHTS
    size = file.stat().st_size / 1e9
    print(
        f"{size:.2f} GB, {dtype}, {layers} layers of the widths of Wan 14B; largest tensor {largest:.2f} GB"
    )
    os.sync()
    seconds = {}
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
                "export", folder / "store", folder / "diffusers", "--format", "diffusers"
            ),
            "export --format original": convert(
                "export", folder / "store", folder / "original", "--format", "original"
            ),
        }.items():
            for leftover in (
                "copy",
                *(("store",) if name == "import" else ()),
                "diffusers",
                "original",
            ):
                path = folder / leftover
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            os.sync()
            warm(file)
            taken, peak = measured(f"{name} ({repeat + 1})", *words)
            seconds.setdefault(name, []).append(taken)
            assert peak < largest + 2, f"{name}: {peak:.2f} GB"
    measured("verify source original", *convert("verify", file.parent, folder / "original"))
    copy = min(seconds["cp"])
    flushed = min(seconds["cp, flushed to the disk"])
    for name in ("import", "export --format diffusers", "export --format original"):
        best = min(seconds[name])
        print(
            f"{name}: {best / copy:.2f} times cp, {best / flushed:.2f} times cp flushed to the disk; {size / best:.2f} GB/s"
        )


# ---- the full-size model -----------------------------------------------------------------------------------------------


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in INPUTS.items()}


def theirs(folder: Path, dtype: str) -> None:
    """diffusers: random weights, saved, and the velocity of a small input."""
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
        if parameter.ndim == 1:  # norm weights and biases, of which none is constant then
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
    """This project: the store's weights, the velocity of the same input, its difference from diffusers'."""
    import jax
    from flax import nnx

    from jax_idgrpo.sampling.pipeline import load_transformer

    began = time.perf_counter()
    model = load_transformer(folder / "store", dtype)
    loaded = time.perf_counter() - began
    given = inputs()
    began = time.perf_counter()
    graph, state = nnx.split(model)  # not nnx.jit, which would return a second copy of the weights
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
    script = str(Path(__file__))
    source, transformer = folder / "source", folder / "source" / "transformer"
    measured(
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
    measured("import", *convert("import", transformer, folder / "store"))
    measured(
        "ours: load, run, compare",
        sys.executable,
        script,
        "ours",
        "--folder",
        str(folder),
        "--dtype",
        dtype,
    )
    measured(
        "export --format diffusers",
        *convert("export", folder / "store", folder / "out", "--format", "diffusers"),
    )
    measured("verify source out", *convert("verify", transformer, folder / "out"))
    index = f"{WEIGHTS}.index.json"
    assert (
        json.loads((folder / "out" / index).read_text()).keys()
        == json.loads((transformer / index).read_text()).keys()
    )
    shutil.rmtree(folder / "out")
    measured(
        "export --format original",
        *convert("export", folder / "store", folder / "out", "--format", "original"),
    )
    measured("verify source out", *convert("verify", source / "transformer", folder / "out"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=("streaming", "vace", *STEPS), help="the last are steps of the first two"
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--repeats", type=int, default=2, help="of every step of streaming; the fastest counts"
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
