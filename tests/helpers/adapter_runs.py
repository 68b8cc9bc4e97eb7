"""Folders of drawn clips, tiny pipelines of both kinds, and runs of the task `adapter` on them."""

import csv
import dataclasses
import hashlib
import itertools
import shutil

import jax
import numpy as np
from flax import nnx
from PIL import Image

from jax_idgrpo import config as c
from jax_idgrpo.data.video import FINE, to_uint8, write_video
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.wan import VaceConfig, WanTransformer
from jax_idgrpo.preferences.video_clips import split_of
from jax_idgrpo.sampling import pipeline
from jax_idgrpo.synthetic import captions, scenes
from jax_idgrpo.synthetic.people import FRAMES_PER_SECOND
from tests.helpers.noise import add_noise
from tests.helpers.phantom import CONFIG

CLIPS = 8
PLAIN = {"augment": False, "evaluate_every": 2}


def write_clips(folder, count=CLIPS, frames=7, seed=0):
    """Write drawn clips, two photos per person, and clips.csv; return its rows.

    The people of the first two clips are held out.
    """
    folder.mkdir(exist_ok=True)
    drawn, other = (
        jax.device_get(scenes.batch(seed, 0, count, "train", frames=frames, variant=variant))
        for variant in (0, 1)
    )
    prompts, rows = captions.prompts(drawn), []
    for n in range(count):
        write_video(folder / f"{n}.mp4", drawn.video[n], FRAMES_PER_SECOND, FINE)
        names = {"ref": [], "more": []}
        for m in np.flatnonzero(drawn.mask[n]):
            for kind, batch in (("ref", drawn), ("more", other)):
                names[kind].append(f"{kind}{n}-{m}.png")
                picture = np.roll(to_uint8(batch.portraits[n, m]), kind == "more", axis=0)
                Image.fromarray(picture).save(folder / names[kind][-1])
        people = _named([drawn.ids[n, m] for m in np.flatnonzero(drawn.mask[n])], n < 2)
        joined = (";".join(names["ref"]), ";".join(names["more"]))
        rows.append([f"{n}.mp4", *joined, people, prompts[n]])
    write_csv(folder, rows)
    return rows


def _named(ids, held_out):
    """Name people so that they are held out or trained on."""
    for prefix in itertools.count():
        names = [f"{prefix}-{number}" for number in ids]
        cluster = min(hashlib.sha256(name.encode()).hexdigest() for name in names)
        if split_of(cluster) == ("eval" if held_out else "train"):
            return ";".join(names)
    raise AssertionError


def write_csv(folder, rows, header=("path", "ref_paths", "more_paths", "people", "prompt")):
    """Write clips.csv."""
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_pairs(folder, labels):
    """Write pairs.csv of the clips 0 to 3 of a folder, each against the next, with these labels."""
    with (folder / "clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (folder / "pairs.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("path_A", "path_B", "prompt", "ref_paths", "SA"))
        for n, label in enumerate(labels):
            row = rows[n]
            out.writerow((row["path"], rows[n + 1]["path"], row["prompt"], row["ref_paths"], label))
    return folder / "pairs.csv"


def make_checkpoint(folder, kind):
    """Write a pipeline with the bundled VAE and text encoder and a tiny random transformer."""
    shutil.copytree(c.EMBEDDED / "pipeline", folder)
    width = pipeline.load_text_encoder(folder).config.d_model
    vace = VaceConfig((0,)) if kind == "vace" else None
    config = dataclasses.replace(CONFIG, text_dim=width, rank=0, vace=vace)
    transformer = WanTransformer(config, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(5))
    add_noise(transformer)
    pipeline.save_transformer(transformer, folder, 3.0)
    return folder


def adapter_config(checkpoint, kind, options, steps=2, batch=2):
    """Return the configuration of a run of the task."""
    return c.Config(
        model=c.ModelConfig(path=str(checkpoint), kind=kind, rank=2, alpha=2.0, unroll=True),
        data=c.DataConfig(max_people=3, text_length=80),
        video=c.VideoConfig(frames=5, height=64, width=64, fps=8),
        rollout=c.RolloutConfig(steps=3, guidance=1.0),
        optimizer=c.OptimizerConfig(learning_rate=1e-2, ema_decay=0.5),
        evaluate=c.EvaluateConfig(steps=2, batch=2, videos=1),
        run=c.RunConfig(steps=steps, save_every=2, sample_every=0),
        finetune=c.FinetuneConfig(
            task="adapter", batch=batch, log_every=1, options=PLAIN | options
        ),
    )
