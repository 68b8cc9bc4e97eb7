"""Replace one person of a drawn clip through a mask, and measure both sides of the mask.

    python -m benchmarks.masks [--clips 32] [--guidance 1]

The clips show two or three synthetic people. One of them is masked: the column of 8 x 8 cells from
above their head to the lower edge, over all frames. Their photo and their description are replaced
by another person's, and the bundled model generates the masked part (`control`, `mask` of the
prompts CSV). Outside, the mean absolute error of the video is compared with that of the clip's own
round trip through the VAE. Inside, the judge compares the faces with the new and with the old
person. Rows of the table: the clip, its round trip, the masked sample, and a sample from the same
noise without control video and mask. Intervals are over clips. The bundled model was never trained
with a control video or a mask.
"""

import argparse
import csv
import dataclasses
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int
from PIL import Image

from jax_idgrpo import config as configuration
from jax_idgrpo.data.controls import read_control
from jax_idgrpo.data.prompts import Prompt, load_prompts
from jax_idgrpo.data.video import FINE, to_uint8, write_video
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.evaluation.sampler import Row, make_models, make_sampler
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.factory import make_judge
from jax_idgrpo.sampling.conditioning import encode_video
from jax_idgrpo.synthetic import captions, scenes
from jax_idgrpo.synthetic.people import FRAMES_PER_SECOND, MAX_PEOPLE, identity
from tests.helpers.paths import ROOT

FRAMES, SIZE, CELL = 9, (64, 64), 8
SEED = 11


class Clips(NamedTuple):
    """Prompts of masked clips, of the same clips without a mask, and the photos of who is replaced.

    Attributes:
      masked: prompts with control video and mask.
      free: the same prompts without them.
      new: one-person prompts with the photo of the new person.
      old: one-person prompts with the photo of the masked person.
    """

    masked: list[Prompt]
    free: list[Prompt]
    new: list[Prompt]
    old: list[Prompt]


def region(boxes: Float[np.ndarray, "F 4"]) -> Bool[np.ndarray, "H W"]:
    """Return the cells of a person, from above the head to the lower edge.

    Args:
      boxes: x0 y0 x1 y1 of the face in pixels.
    """
    left, top, right = boxes[:, 0].min(), boxes[:, 1].min(), boxes[:, 2].max()
    room = (boxes[:, 2:] - boxes[:, :2]).mean(0) / 4
    low = [max(int((value - more) // CELL), 0) for value, more in zip((left, top), room)]
    high = int(-(-(right + room[0]) // CELL))
    mask = np.zeros(SIZE, bool)
    mask[CELL * low[1] :, CELL * low[0] : CELL * high] = True
    return mask


def write_clips(folder: Path, count: int) -> Clips:
    """Write clips with masks and photos, and read them as prompts.

    Args:
      folder: existing folder.
      count: number of clips.
    """
    drawn = jax.device_get(scenes.batch(SEED, 0, 3 * count, "eval", FRAMES, SIZE))
    other = jax.device_get(scenes.batch(SEED, 1, 3 * count, "eval", FRAMES, SIZE))
    several = np.flatnonzero(drawn.mask.sum(1) > 1)[:count]
    if len(several) < count:
        raise SystemExit(f"only {len(several)} clips have several people; use fewer --clips")
    chosen = np.random.default_rng(SEED).integers(0, drawn.mask[several].sum(1))
    ids: Int[np.ndarray, "B M"] = drawn.ids.copy()
    ids[several, chosen] = other.ids[several, 0]
    people = jax.jit(identity)(jnp.maximum(ids, 0))
    texts = captions.describe(drawn.scene, people, drawn.mask)
    rows: dict[str, list[tuple[str, ...]]] = {name: [] for name in Clips._fields}
    for n, replaced in zip(several, chosen, strict=True):
        name, present = f"{n:04d}", np.flatnonzero(drawn.mask[n])
        write_video(folder / f"{name}.mp4", drawn.video[n], FRAMES_PER_SECOND, FINE)
        mask = region(drawn.boxes[n, :, replaced])
        Image.fromarray(np.uint8(255 * mask)).save(folder / f"{name}-mask.png")
        photos = {m: drawn.portraits[n, m] for m in present}
        Image.fromarray(to_uint8(photos[replaced])).save(folder / f"{name}-old.png")
        photos[replaced] = other.portraits[n, 0]
        for m, photo in photos.items():
            Image.fromarray(to_uint8(photo)).save(folder / f"{name}-{m}.png")
        listed = ";".join(f"{name}-{m}.png" for m in present)
        rows["masked"].append((listed, texts[n], f"{name}.mp4", f"{name}-mask.png"))
        rows["free"].append((listed, texts[n], "", ""))
        rows["new"].append((f"{name}-{replaced}.png", texts[n], "", ""))
        rows["old"].append((f"{name}-old.png", texts[n], "", ""))
    found = []
    for name, lines in rows.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("ref_paths", "prompt", "control", "mask"), *lines])
        found.append(load_prompts(folder / f"{name}.csv", MAX_PEOPLE))
    return Clips(*found)


def likeness(
    judge: FaceReward, videos: Float[np.ndarray, "B F H W 3"], people: list[Prompt]
) -> Float[np.ndarray, " B"]:
    """Return the judge's cosine of one person with the most alike face of every frame.

    Args:
      judge: the judge.
      videos: values in [-1, 1].
      people: a prompt with one photo per video.
    """
    photos = References.of_prompts(people, 1)
    encoded = judge.encode_references(photos, [prompt.text for prompt in people])
    return np.asarray(judge.score(videos, encoded)["similarity"])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=32, help="clips, a multiple of 8")
    parser.add_argument("--guidance", type=float, default=1.0)
    arguments = parser.parse_args()
    base = configuration.load(ROOT / "configs" / "quickstart.py", [])
    evaluate = dataclasses.replace(base.evaluate, videos=1, batch=8, guidance=arguments.guidance)
    config = dataclasses.replace(base, evaluate=evaluate)
    with tempfile.TemporaryDirectory() as name:
        clips = write_clips(Path(name), arguments.clips)
        sampler = make_sampler(config)
        model = make_models(sampler, {})["base"]
        videos: dict[str, list[np.ndarray]] = {}
        given = [
            read_control(prompt.control, prompt.mask, FRAMES, SIZE, FRAMES_PER_SECOND)
            for prompt in clips.masked
            if prompt.control
        ]
        videos["the clip itself"] = [clip for clip, _ in given]
        vae = sampler.pipe.vae
        decode = nnx.jit(lambda vae, x: vae.decode(x, vae.chunk(*x.shape[1:4])))
        videos["its VAE round trip"] = [
            np.clip(decode(vae, encode_video(vae, clip[None]))[0], -1, 1) for clip, _ in given
        ]
        for label, prompts in (("masked", clips.masked), ("no control", clips.free)):
            rows = [Row(prompt, 0) for prompt in prompts]
            videos[label] = [
                one
                for batch, made in sampler.batches(model, rows, label)
                for one in np.clip(np.asarray(made), -1, 1)[: len(batch)]
            ]
        judge = make_judge(config)
        assert judge is not None
        masks = np.stack([mask > 0.5 for _, mask in given])[..., None]
        clip = np.stack(videos["the clip itself"])
        numbers = np.arange(len(clip))
        errors = {}
        print("| video | error outside | inside | new person | old person |")
        print("| --- | --- | --- | --- | --- |")
        for label, made in videos.items():
            video = np.stack(made)
            gap = np.abs(video - clip).mean(-1, keepdims=True)
            errors[label] = [
                (gap * part).sum((1, 2, 3, 4)) / part.sum((1, 2, 3, 4)) for part in (~masks, masks)
            ]
            measured = [*errors[label], *(likeness(judge, video, who) for who in clips[2:])]
            cells = [bootstrap.bootstrap(one, numbers, 0, 2000).text() for one in measured]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
            if label == "masked":
                gain = bootstrap.bootstrap(measured[2] - measured[3], numbers, 0, 2000)
        ratio = errors["masked"][0] / errors["its VAE round trip"][0]
        interval = bootstrap.bootstrap(ratio, numbers, 0, 2000)
        print(f"\nerror outside, masked over the round trip's own: {interval.text()}")
        print(f"new person - old person, masked: {gain.text(sign=True)}")
        print(f"share of the picture masked: {masks.mean():.3f}")


if __name__ == "__main__":
    main()
