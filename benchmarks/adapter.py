r"""Measure what an adapter of one kind of people gains, and what random references are worth.

    python -m benchmarks.adapter [--folder DIR] [--clips 400] [--steps 600] [--batch 16]
        [--prompts 48] [--videos 2] [--rate 1e-3] [--photo-dropout 0.1] [--arms random same]

The clips show synthetic people who all wear a hat and glasses. Two adapters of rank 8 are trained on
them by `idgrpo finetune`: `random`, whose photos are portraits of the person, drawn anew at every
step, and `same`, whose photo is cut from the middle frame of the clip itself. Printed are the flow
loss on clips of other people of that kind (same noise for all), and `idgrpo evaluate` on their
prompts, with 95 % intervals over clips and prompts.
"""

import argparse
import csv
import dataclasses
import io
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from jax_idgrpo import config as configuration
from jax_idgrpo import rng
from jax_idgrpo.config import Config
from jax_idgrpo.data.video import FINE, to_uint8, write_video
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.evaluation.commands import evaluate
from jax_idgrpo.ingest.faces import cut_photo
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.preferences.adapter_batches import prepare_rows, read_row
from jax_idgrpo.preferences.adapter_rows import read_options, read_rows_of
from jax_idgrpo.synthetic import captions, scenes
from jax_idgrpo.synthetic.people import FRAMES_PER_SECOND, SPLITS, _Labels, identity
from jax_idgrpo.training.adapter_task import Learner
from jax_idgrpo.training.finetune import finetune
from jax_idgrpo.training.setup import load

ROOT = Path(__file__).parent.parent
CHUNK, FRAMES = 16, 9
NOISES = 4  # noises per held-out clip


def ids_of_kind(split: str, count: int) -> np.ndarray:
    """Return the first ids of a split whose people wear a hat and glasses."""
    first, last = SPLITS[split]
    listed = np.arange(first, min(last, first + 40 * count))
    labels = np.asarray(jax.jit(lambda ids: identity(ids).labels)(jnp.asarray(listed)))
    at = {name: number for number, name in enumerate(_Labels._fields)}
    return listed[(labels[:, at["hat"]] > 0) & (labels[:, at["glasses"]] > 0)][:count]


def write_clips(folder: Path, split: str, count: int, seed: int, reuse: bool = False) -> None:
    """Write drawn clips of that kind of people, photos of both arms, and a CSV for each arm.

    Args:
      folder: new folder.
      split: of the people.
      count: number of clips.
      seed: seed of the scenes.
      reuse: show a person in several clips, where the split has too few.
    """
    folder.mkdir(parents=True)
    ids = ids_of_kind(split, count * scenes.MAX_PEOPLE)
    random, rows = np.random.default_rng(seed), {"random": [], "same": []}
    if not reuse and len(ids) < count * scenes.MAX_PEOPLE:
        raise SystemExit(f"only {len(ids)} people of the kind in the split {split}")
    draw = jax.jit(
        lambda key, ids, mask, variant: scenes.draw(key, ids, mask, FRAMES, variant=variant)
    )
    for start in range(0, count, CHUNK):
        key = rng.fold(rng.key(seed, "data"), start)
        shape = (CHUNK, scenes.MAX_PEOPLE)
        if reuse:
            chosen = np.stack([random.permutation(ids)[: shape[1]] for _ in range(CHUNK)])
        else:
            chosen = ids[(np.arange(np.prod(shape)) + start * shape[1]) % len(ids)].reshape(shape)
        mask = scenes.sample_mask(rng.fold(key, 1), CHUNK)
        drawn = jax.device_get(draw(key, jnp.asarray(chosen), mask, 0))
        other = jax.device_get(draw(rng.fold(key, 2), jnp.asarray(chosen), mask, 0))
        prompts = captions.prompts(drawn)
        for n in range(min(CHUNK, count - start)):
            name = f"{start + n:05d}"
            write_video(folder / f"{name}.mp4", drawn.video[n], FRAMES_PER_SECOND, FINE)
            middle = to_uint8(drawn.video[n, FRAMES // 2])
            present = np.flatnonzero(drawn.mask[n])
            for m in present:
                Image.fromarray(to_uint8(drawn.portraits[n, m])).save(folder / f"{name}_{m}a.png")
                Image.fromarray(to_uint8(other.portraits[n, m])).save(folder / f"{name}_{m}b.png")
                cut = cut_photo(middle, drawn.boxes[n, FRAMES // 2, m])
                Image.open(io.BytesIO(cut)).save(folder / f"{name}_{m}c.png")
            people = ";".join(f"p{chosen[n, m]}" for m in present)
            joined = {k: ";".join(f"{name}_{m}{k}.png" for m in present) for k in "abc"}
            rows["random"].append((f"{name}.mp4", joined["a"], joined["b"], people, prompts[n]))
            rows["same"].append((f"{name}.mp4", joined["c"], "", people, prompts[n]))
    for arm, listed in rows.items():
        with (folder / f"{arm}.csv").open("w", newline="") as file:
            header = ("path", "ref_paths", "more_paths", "people", "prompt")
            csv.writer(file).writerows([header, *listed])


def configured(folder: Path, arm: str, arguments: argparse.Namespace) -> Config:
    """Return the configuration of an arm's training.

    Args:
      folder: folder of the clips.
      arm: "random" or "same".
      arguments: sizes.
    """
    base = configuration.load(ROOT / "configs" / "adapter.py", [])
    options = {
        "clips": str(folder / f"{arm}.csv"),
        "references": "random" if arm == "random" else "listed",
        "augment": False,
        "photo_dropout": arguments.photo_dropout,
        "split": "all",
        "cache": str(folder.parent / "latents"),
    }
    run = dataclasses.replace(
        base.run, steps=arguments.steps, save_every=arguments.steps, sample_every=0
    )
    return dataclasses.replace(
        base,
        run=run,
        optimizer=dataclasses.replace(base.optimizer, learning_rate=arguments.rate),
        finetune=dataclasses.replace(
            base.finetune, batch=arguments.batch, log_every=25, options=options
        ),
    )


def flow_losses(folder: Path, adapters: dict[str, Path], arguments) -> dict[str, np.ndarray]:
    """Compute the flow loss of every held-out clip with the base and with every adapter.

    Args:
      folder: folder of the held-out clips.
      adapters: adapters by name.
      arguments: sizes.
    """
    config = configured(folder, "random", arguments)
    options = read_options(config.finetune.options)
    pipe = load(config)
    rows = prepare_rows(
        pipe,
        config,
        options,
        read_rows_of(options, config.data.max_people),
        folder.parent / "latents",
    )
    learner = Learner.make(pipe.transformer, config, config.rollout.shift or pipe.shift, rows.grey)
    read = [read_row(rows, config, options, item[0], None) for item in rows.items]
    program = jax.jit(lambda *given: learner.flow_rows(*given)["video_error"])
    found = {}
    for name, adapter in {"base": None, **adapters}.items():
        if adapter is not None:
            pipe.load_lora(adapter)
        _, lora, base = nnx.split(pipe.transformer, LoRAParam, ...)
        losses = []
        for start in range(0, len(read) - len(read) % CHUNK, CHUNK):
            batch = jax.tree.map(lambda *x: jnp.stack(x), *read[start : start + CHUNK])
            keys = [rng.fold(rng.key(0, "evaluate"), start, noise) for noise in range(NOISES)]
            losses.append(np.mean([program(lora, base, batch, key) for key in keys], axis=0))
        found[name] = np.concatenate(losses)
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = dict(clips=400, held_out=64, steps=600, batch=16, prompts=48, videos=2)
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--photo-dropout", type=float, default=0.1, help="rows without photos")
    parser.add_argument("--arms", nargs="+", default=["random", "same"])
    parser.add_argument("--folder", type=Path, help="folder of clips and runs, which are reused")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        for name, split, count, seed in (
            ("train", "train", arguments.clips, 1),
            ("held_out", "eval", arguments.held_out, 2),
        ):
            if not (folder / name / "same.csv").exists():
                write_clips(folder / name, split, count, seed, reuse=split == "eval")
        adapters = {}
        for arm in arguments.arms:
            began = time.monotonic()
            finetune(configured(folder / "train", arm, arguments), folder / "runs" / arm)
            print(f"{arm}: {time.monotonic() - began:.0f} s", flush=True)
            adapters[arm] = folder / "runs" / arm / "export"
        losses = flow_losses(folder / "held_out", adapters, arguments)
        print(
            f"| flow loss on {len(losses['base'])} held-out clips | | from base |\n| --- | --- | --- |"
        )
        for name, values in losses.items():
            clips = np.arange(len(values))
            mean = bootstrap.bootstrap(values, clips, 0, 2000).text()
            change = bootstrap.bootstrap(values - losses["base"], clips, 0, 2000).text(sign=True)
            print(f"| {name} | {mean} | {change if name != 'base' else ''} |", flush=True)
        config = configuration.load(ROOT / "configs" / "quickstart.py", [])
        settings = dataclasses.replace(config.evaluate, videos=arguments.videos)
        prompts = folder / "held_out" / "prompts.csv"
        with (folder / "held_out" / "random.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))[: arguments.prompts]
        with prompts.open("w", newline="") as file:
            listed = ((row["ref_paths"], row["prompt"]) for row in rows)
            csv.writer(file).writerows([("ref_paths", "prompt"), *listed])
        evaluate(
            dataclasses.replace(config, evaluate=settings), prompts, folder / "evaluation", adapters
        )


if __name__ == "__main__":
    main()
