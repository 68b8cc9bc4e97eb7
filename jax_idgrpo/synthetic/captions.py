"""Write prompts of synthetic scenes, and folders of prompts with reference photos."""

import csv
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool
from PIL import Image

from jax_idgrpo import rng, workdir
from jax_idgrpo.config import require_seed
from jax_idgrpo.errors import UserError
from jax_idgrpo.synthetic.people import (
    _ACTIONS,
    _BACKGROUNDS,
    _BEARD_NAMES,
    _CLOTHES_NAMES,
    _COLOUR_NAMES,
    _COUNTS,
    _GLASSES_NAMES,
    _HAIR_NAMES,
    _HAT_NAMES,
    _STYLE_NAMES,
    MAX_PEOPLE,
    SPLITS,
    Identity,
    _Labels,
    identity,
)
from jax_idgrpo.synthetic.renderer import render_portrait
from jax_idgrpo.synthetic.scenes import Batch, Scene, sample_ids, sample_mask, sample_scene

_LIGHT_PHRASES = (
    "in soft light",
    "in bright light",
    "in dim light",
    "in warm light",
    "in cold light",
)


def _background_phrase(kind: int, one: str, two: str) -> str:
    return (
        f"in front of a plain {one} wall",
        f"in front of a {one} sky that fades to {two}",
        f"in front of {one} and {two} stripes",
        f"in front of {one} and {two} tiles",
        f"in front of {one} hills",
        f"in a {one} room with a window and a {two} floor",
        "on a beach by the sea",
        f"in front of {two} lights in a dark {one} night",
    )[kind]


def _person_phrase(labels: np.ndarray) -> str:
    """Describe a person's hair, hat, glasses, beard and clothes in a phrase."""
    label = _Labels(*(int(k) for k in labels))
    style = _STYLE_NAMES[label.hair_style]
    parts = ["a bald head" if style == "bald" else f"{style} {_HAIR_NAMES[label.hair]} hair"]
    if _HAT_NAMES[label.hat] != "none":
        parts.append(f"a {_COLOUR_NAMES[label.hat_colour]} {_HAT_NAMES[label.hat]}")
    if _GLASSES_NAMES[label.glasses] != "none":
        parts.append(f"{_GLASSES_NAMES[label.glasses]} glasses")
    if _BEARD_NAMES[label.beard] != "none":
        beard = _BEARD_NAMES[label.beard]
        parts.append("stubble" if beard == "stubble" else f"a {beard}")
    parts.append(f"a {_COLOUR_NAMES[label.clothes]} {_CLOTHES_NAMES[label.garment]}")
    return "with " + ", ".join(parts[:-1]) + " and " + parts[-1]


def prompt(scene: Scene, people: Identity, mask: Bool[Array | np.ndarray, " M"]) -> str:
    """Describe one clip in English, on the host.

    Args:
      scene: scene without a batch axis.
      people: people in the order of the references.
      mask: people who are present.
    """
    labels, actions, mask = np.asarray(people.labels), np.asarray(scene.action), np.asarray(mask)
    phrases = [
        f"person {_person_phrase(labels[k])} {_ACTIONS[int(actions[k])]}"
        for k in np.flatnonzero(mask)
    ]
    one, two = (_COLOUR_NAMES[int(k)] for k in np.asarray(scene.colours))
    background = _background_phrase(int(scene.background), one, two)
    place = f"{background} {_LIGHT_PHRASES[int(scene.light_kind)]}"
    if len(phrases) == 1:
        return f"one person {place}: a {phrases[0]}."
    listed = ", ".join(
        f"{'a' if k == 0 else 'another'} {phrase}" for k, phrase in enumerate(phrases)
    )
    return f"{_COUNTS[len(phrases) - 1]} people {place}: {listed}."


def prompts(batch: Batch) -> list[str]:
    """Describe every clip of a batch."""
    return describe(batch.scene, batch.people, batch.mask)


def describe(scene: Scene, people: Identity, mask: Bool[ArrayLike, "B M"]) -> list[str]:
    """Describe every row with `prompt`.

    Args:
      scene: scenes with a batch axis.
      people: people in the order of the references.
      mask: people who are present.
    """
    host = jax.device_get((scene, people, mask))
    row = lambda k: jax.tree.map(lambda leaf: leaf[k], host)  # noqa: E731
    return [prompt(*row(k)) for k in range(len(host[2]))]


def vocabulary() -> list[str]:
    """Return every word that occurs in prompts, sorted, without punctuation."""
    texts = [
        *_ACTIONS,
        *_LIGHT_PHRASES,
        *_STYLE_NAMES,
        *_HAIR_NAMES,
        *_COLOUR_NAMES,
        *_HAT_NAMES[1:],
    ]
    texts += [*_GLASSES_NAMES[1:], *_BEARD_NAMES[1:], *_CLOTHES_NAMES, *_COUNTS[:MAX_PEOPLE]]
    texts += [_background_phrase(k, "", "") for k in range(len(_BACKGROUNDS))]
    texts += ["a bald head hair glasses with and another person people"]
    return sorted({word for text in texts for word in text.split()})


@functools.partial(jax.jit, static_argnames=("count", "split", "portraits"))
def _sample_prompts(seed, count: int, split: str, portraits: int = 1):
    """Sample portraits [count,M,n,64,64,3], scenes, people and mask: a batch without its clips."""
    id_key, mask_key, scene_key, portrait_key = jax.random.split(rng.key(seed, "data"), 4)
    ids, mask = sample_ids(id_key, count, split), sample_mask(mask_key, count)
    people = identity(ids)
    keys = [portrait_key, *(rng.fold(portrait_key, number) for number in range(1, portraits))]
    photos = jnp.stack(
        [
            jax.vmap(jax.vmap(render_portrait))(people, jax.random.split(key, ids.shape))
            for key in keys
        ],
        axis=2,
    )
    # Fold in the split, so that splits share no scenes either.
    scene_keys = jax.random.split(rng.fold(scene_key, SPLITS[split][0]), count)
    return photos, jax.vmap(sample_scene)(scene_keys, mask), people, mask


def write_prompts(out: Path, split: str, count: int, seed: int = 0, photos: int = 1) -> None:
    """Write a folder with prompts.csv and portraits (PNG) of every person in its prompts.

    Args:
      out: folder to create.
      split: "train", "rl" or "eval".
      count: number of prompts.
      seed: seed of people and scenes.
      photos: portraits of every person; those after the first are in the column `more_paths`.

    Raises:
      UserError: `out` exists or cannot be created, or an argument is invalid.
    """
    check_request(split, count, seed)
    if photos < 1:
        raise UserError(f"--photos {photos}: use 1 or more")
    with workdir.new_folder(out) as folder:
        portraits, scenes, people, mask = jax.device_get(
            _sample_prompts(seed, count, split, photos)
        )
        pixels = np.rint((portraits + 1.0) * 127.5).astype(np.uint8)
        with (folder / "prompts.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("ref_paths", "prompt", *(["more_paths"] if photos > 1 else [])))
            for k in range(count):
                slots = np.flatnonzero(mask[k])
                names = [
                    [f"{k:04d}-{slot}{f'-{n}' if n else ''}.png" for n in range(photos)]
                    for slot in slots
                ]
                for slot, of_person in zip(slots, names, strict=True):
                    for n, name in enumerate(of_person):
                        Image.fromarray(pixels[k, slot, n]).save(folder / name, optimize=True)
                scene, who = jax.tree.map(lambda leaf: leaf[k], (scenes, people))
                first, *more = zip(*names, strict=True)
                further = [";".join("|".join(row) for row in zip(*more, strict=True))]
                rows.writerow(
                    (";".join(first), prompt(scene, who, mask[k]), *(further if more else []))
                )


def check_request(split: str, count: int, seed: int) -> None:
    """Check the arguments of a generator.

    Args:
      split: "train", "rl" or "eval".
      count: number of rows.
      seed: seed of people and scenes.

    Raises:
      UserError: the split does not exist, the count is less than 1, or the seed exceeds 32 bits.
    """
    if split not in SPLITS:
        raise UserError(f"--split {split}: no such split; use one of {', '.join(SPLITS)}")
    if count < 1:
        raise UserError(f"--count {count}: nothing to write; use 1 or more")
    require_seed("--seed", seed)
