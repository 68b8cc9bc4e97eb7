"""Train an adapter on boxes of people, and measure whether people stand in the boxes that are given.

    python -m benchmarks.places --folder DIR [--clips 800] [--steps 800] [--prompts 48]

The clips show synthetic people; half of the rows have `places`, a box around each face that moves
from its true place in the first frame to that in the last. `idgrpo finetune` trains an adapter on
them and continues a run in DIR. Held-out prompts have the boxes of clips of other people, two or
three in each. Printed are, for the bundled model with and without the adapter, the judge's `placed`
of videos with the boxes given, of the same videos against boxes exchanged between the first two
people (chance), of videos that were made with exchanged boxes against those (do people follow their
colours?), of videos without boxes, and the judge's identity. Intervals are over prompts.
"""

import argparse
import csv
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from jax_idgrpo import config as configuration
from jax_idgrpo.config import Config
from jax_idgrpo.data.places import Places
from jax_idgrpo.data.prompts import Prompt, load_prompts
from jax_idgrpo.data.video import FINE, to_uint8, write_video
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.evaluation.sampler import Model, Row, Sampler, make_models, make_sampler
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.factory import make_judge
from jax_idgrpo.synthetic import captions, scenes
from jax_idgrpo.synthetic.people import FRAMES_PER_SECOND, MAX_PEOPLE
from jax_idgrpo.training.finetune import finetune
from tests.helpers.paths import ROOT

FRAMES, SIZE, CHUNK = 9, 64, 16


def moving_box(boxes: Float[np.ndarray, "F 4"]) -> str:
    """Return the places of a person: the face's box in the first and last frame, twice as large.

    Args:
      boxes: x0 y0 x1 y1 of the face in pixels.
    """
    ends = []
    for x0, y0, x1, y1 in boxes[[0, -1]]:
        width, height = max(x1 - x0, 4.0), max(y1 - y0, 4.0)
        box = np.array([x0 - width / 2, y0 - height / 2, x1 + width / 2, y1 + height / 2]) / SIZE
        low, high = np.clip(box[:2], 0, 0.9), np.clip(box[2:], 0.1, 1)
        ends.append(" ".join(f"{value:.3f}" for value in (*low, *high)))
    return " > ".join(ends)


def write_rows(folder: Path, split: str, count: int, seed: int) -> None:
    """Write drawn clips, photos apart from them, and `clips.csv` with places in every other row.

    Args:
      folder: new folder.
      split: of the people.
      count: number of clips.
      seed: seed of people and scenes.
    """
    folder.mkdir(parents=True)
    rows = []
    for start in range(0, count, CHUNK):
        drawn = jax.device_get(scenes.batch(seed, start, CHUNK, split, FRAMES, (SIZE, SIZE)))
        for n, text in enumerate(captions.prompts(drawn)[: count - start]):
            name, present = f"{start + n:05d}", np.flatnonzero(drawn.mask[n])
            write_video(folder / f"{name}.mp4", drawn.video[n], FRAMES_PER_SECOND, FINE)
            for m in present:
                Image.fromarray(to_uint8(drawn.portraits[n, m])).save(folder / f"{name}_{m}.png")
            places = ";".join(moving_box(drawn.boxes[n, :, m]) for m in present)
            people = ";".join(f"{split}{drawn.ids[n, m]}" for m in present)
            photos = ";".join(f"{name}_{m}.png" for m in present)
            given = places if n % 2 == 0 or split == "eval" else ""
            rows.append((f"{name}.mp4", photos, people, text, given))
    with (folder / "clips.csv").open("w", newline="") as file:
        header = ("path", "ref_paths", "people", "prompt", "places")
        csv.writer(file).writerows([header, *rows])


def configured(folder: Path, steps: int) -> Config:
    """Return the configuration of the training."""
    base = configuration.load(ROOT / "configs" / "adapter.py", [])
    options = {
        "clips": str(folder / "train"),
        "references": "listed",
        "augment": False,
        "photo_dropout": 0,
        "split": "all",
        "cache": str(folder / "latents"),
    }
    return dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, steps=steps, save_every=50, sample_every=0),
        finetune=dataclasses.replace(base.finetune, log_every=25, options=options),
    )


def exchanged(prompt: Prompt) -> Prompt:
    """Return a prompt with the boxes of its first two people exchanged."""
    assert prompt.places is not None
    first, second, *rest = prompt.places.boxes
    return dataclasses.replace(prompt, places=Places(boxes=(second, first, *rest)))


def score(
    judge: FaceReward, videos: Float[np.ndarray, "B F H W 3"], prompts: list[Prompt]
) -> dict[str, Float[np.ndarray, " B"]]:
    """Return the judge's `placed` and `similarity` of videos.

    Args:
      judge: the judge.
      videos: values in [-1, 1].
      prompts: a prompt with boxes per video.
    """
    photos = References.of_prompts(prompts, MAX_PEOPLE)
    encoded = judge.encode_references(photos, [prompt.text for prompt in prompts])
    terms = judge.score(videos, encoded)
    return {name: np.asarray(terms[name]) for name in ("placed", "similarity")}


def sampled(sampler: Sampler, model: Model, prompts: list[Prompt], label: str) -> np.ndarray:
    """Return a video per prompt.

    Args:
      sampler: makes the videos.
      model: the model.
      prompts: the prompts.
      label: text of the progress bar.
    """
    rows = [Row(prompt, 0) for prompt in prompts]
    parts = [np.asarray(made)[: len(batch)] for batch, made in sampler.batches(model, rows, label)]
    return np.clip(np.concatenate(parts), -1, 1)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder of clips and runs")
    parser.add_argument("--clips", type=int, default=800)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--prompts", type=int, default=48)
    arguments = parser.parse_args()
    folder = arguments.folder
    for split, count, seed in (("train", arguments.clips, 1), ("eval", 3 * arguments.prompts, 2)):
        if not (folder / split / "clips.csv").exists():
            write_rows(folder / split, split, count, seed)
    began = time.monotonic()
    finetune(configured(folder, arguments.steps), folder / "run")
    print(f"training: {time.monotonic() - began:.0f} s", flush=True)
    base = configuration.load(ROOT / "configs" / "quickstart.py", [])
    config = dataclasses.replace(
        base, evaluate=dataclasses.replace(base.evaluate, videos=1, batch=16)
    )
    listed = load_prompts(folder / "eval" / "clips.csv", MAX_PEOPLE)
    prompts = [prompt for prompt in listed if prompt.people > 1][: arguments.prompts]
    others = [exchanged(prompt) for prompt in prompts]
    free = [dataclasses.replace(prompt, places=None) for prompt in prompts]
    judge, sampler = make_judge(config), make_sampler(config)
    assert judge is not None
    numbers = np.arange(len(prompts))
    header = ("boxes given", "exchanged boxes (chance)", "made with exchanged", "made without")
    print(f"| model | {' | '.join(header)} | identity, boxes | identity, without |")
    print(f"| {' | '.join(['---'] * 7)} |")
    models = make_models(sampler, {"adapter": folder / "run" / "export"})
    for name, model in models.items():
        given, swapped, plain = (
            sampled(sampler, model, asked, f"{name} {label}")
            for label, asked in (("boxes", prompts), ("exchanged", others), ("without", free))
        )
        own, alone = score(judge, given, prompts), score(judge, plain, prompts)
        columns = (
            own["placed"],
            score(judge, given, others)["placed"],
            score(judge, swapped, others)["placed"],
            alone["placed"],
            own["similarity"],
            alone["similarity"],
        )
        cells = [bootstrap.bootstrap(one, numbers, 0, 2000).text() for one in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
