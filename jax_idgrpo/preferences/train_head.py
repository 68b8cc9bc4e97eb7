"""Train the reward head (`rewards.head`) on preference pairs by Bradley-Terry with ties.

Faces are detected and embedded once per video, with the configuration's face reward
(`reward.faces`, `frames`, `similarity_low`, `similarity_high`, `missing`); photos keep their own
size. The head's only input are the resulting tokens. The export is a folder for `reward.head`.

Options (`finetune.options`): those of `batches.PairOptions`, with one dimension; and `tokens`, a
folder that caches the tokens of every video. Cached tokens are reused by resumed runs and by other
runs on the same pairs, so face detection is not repeated. `finetune.start` is a head to continue
from.
"""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from checkpoints_convert import store
from jax_idgrpo.config import Config
from jax_idgrpo.data.video import File, read_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.preferences.batches import (
    Differences,
    PairOptions,
    filter_automatic,
    pair_loss,
    read_options,
    step_pairs,
    write_accuracy,
)
from jax_idgrpo.preferences.csv_source import Pair, by_source, pair_digests
from jax_idgrpo.preferences.tfds_source import open_pairs
from jax_idgrpo.rewards.base import Photo, References
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.factory import faces_alone, make_face_reward
from jax_idgrpo.rewards.head import (
    PEOPLE,
    VIDEO,
    Head,
    Tokens,
    fingerprint,
    load_head,
    reading,
    save_head,
    seen,
)
from jax_idgrpo.training.task import Loss, Task

Sides = dict[Pair, tuple[Tokens, Tokens]]
"""Maps a pair to the tokens of its two videos, each without a batch axis."""


@struct.dataclass
class PairBatch:
    """B pairs: tokens of the A videos, then of the B videos [2 B], and the labels."""

    tokens: Tokens
    labels: Int[Array, "B 1"]


@dataclasses.dataclass(frozen=True)
class HeadOptions(PairOptions):
    """Options of `finetune.options`; tokens: folder of cached tokens, "" for none."""

    tokens: str = ""


def token_cache(
    folder: str, reward: FaceReward, config: Config
) -> Callable[[Pair, File, Callable[[], Tokens]], Tokens]:
    """Make a function (pair, video, compute) -> tokens that caches the tokens in files.

    The name of a file is a hash of everything that its tokens depend on: the bytes of the video and
    photos, the face networks, the settings, and the version of this package.

    Args:
      folder: folder of the cache; "" disables it.
      reward: face reward that computes the tokens.
      config: its configuration.
    """
    if not folder:
        return lambda pair, path, read: read()
    names, size = (*PEOPLE, *VIDEO), ("photos at their own size", config.data.max_people)
    common = repr(
        (
            names,
            size,
            reading(config.reward),
            importlib.metadata.version("jax-idgrpo"),
            fingerprint(reward.state),
        )
    )

    def of(pair: Pair, path: File, read: Callable[[], Tokens]) -> Tokens:
        try:
            parts = [common.encode(), *(file.read_bytes() for file in (path, *pair.references))]
        except OSError:
            return read()  # raises the error that names the file
        name = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
        file = Path(folder) / f"{name}.safetensors"
        try:
            return Tokens(
                **{name: np.asarray(value) for name, value in store.open_tensors(file).items()}
            )
        except (UserError, TypeError):  # the file is missing or damaged
            tokens = read()
            store.write_file(
                file,
                {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)},
            )
            return tokens

    return of


def read_tokens(
    reward: FaceReward, pairs: Iterable[Pair], config: Config, folder: str = ""
) -> Sides:
    """Compute the tokens of every pair; each video is read once per set of photos.

    Args:
      reward: face reward that computes the tokens.
      pairs: pairs, possibly repeated.
      config: configuration of the run.
      folder: see `token_cache`.

    Raises:
      UserError: a file cannot be read, a photo shows no face, a pair has more photos than
        `data.max_people`, or `folder` cannot be used.
    """
    listed, known, found = list(dict.fromkeys(pairs)), {}, {}
    tokens_of = token_cache(folder, reward, config)
    with progress("finding faces", len(listed)) as update:
        for done, pair in enumerate(listed, 1):
            for path in pair.videos:
                if (pair.references, path) not in known:
                    known[pair.references, path] = tokens_of(
                        pair, path, lambda: read_one(reward, pair, path, config)[1]
                    )
            found[pair] = (
                known[pair.references, pair.videos[0]],
                known[pair.references, pair.videos[1]],
            )
            update(done)
    return found


def read_one(
    reward: FaceReward, pair: Pair, path: File, config: Config
) -> tuple[dict[str, float], Tokens]:
    """Compute the terms of the fixed reward and the tokens of one video, without a batch axis.

    Args:
      reward: face reward.
      pair: supplies the photos and the prompt.
      path: the video.
      config: configuration of the run.

    Raises:
      UserError: as `read_tokens`.
    """
    if len(pair.references) > config.data.max_people:
        raise UserError(
            f"pair with {path}: {len(pair.references)} reference photos, "
            f"but data.max_people is {config.data.max_people}"
        )
    photos = References((tuple(map(Photo, pair.references)),), config.data.max_people)
    people = reward.encode_references(photos, [pair.prompt])
    terms, tokens = jax.device_get(reward.read(reward.state, read_video(path)[None], people))
    return {name: float(value[0]) for name, value in terms.items()}, jax.tree.map(
        lambda leaf: leaf[0], tokens
    )


def collate(pairs: Sequence[Pair], sides: Sides) -> PairBatch:
    """Stack the tokens and labels of pairs."""
    rows = [sides[pair][side] for side in (0, 1) for pair in pairs]
    return PairBatch(
        jax.tree.map(lambda *leaves: np.stack(leaves), *rows),
        np.asarray([pair.labels for pair in pairs], np.int32),
    )


def differences(head: Callable[[Tokens], Array], sides: Sides) -> Differences:
    """Make the function that scores pairs whose tokens are in `sides`."""

    def of(pairs: Sequence[Pair]) -> Float[np.ndarray, "N 1"]:
        a, b = np.split(np.asarray(head(jax.device_put(collate(pairs, sides).tokens))), 2)
        return (a - b)[:, None]

    return of


def new_head(pairs: Sequence[Pair], sides: Sides, key: Array) -> Head:
    """Initialise a head with random weights and the feature range of the pairs.

    Args:
      pairs: training pairs.
      sides: tokens of the pairs.
      key: key of the weights.
    """
    read = collate(pairs, sides).tokens
    return Head(seen(read.people[read.mask]), seen(read.video), rngs=nnx.Rngs(key))


def head_task(
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    sides: Sides,
    networks: str,
    options: PairOptions,
    config: Config,
) -> Task:
    """Make the task from the tokens of all pairs.

    Args:
      pairs: training pairs.
      held_out: pairs for measuring the accuracy.
      sides: tokens of both.
      networks: fingerprint of the face networks.
      options: options of the task.
      config: configuration of the run.
    """
    start, mixed = Path(config.finetune.start), by_source(pairs)

    def init(key: jax.Array) -> nnx.Module:
        return (
            load_head(start, networks, config.reward)
            if config.finetune.start
            else new_head(pairs, sides, key)
        )

    def batch(seed: int, step: int) -> PairBatch:
        return collate(step_pairs(mixed, options, config, seed, step), sides)

    def loss(head: nnx.Module, given: PairBatch, key: jax.Array) -> Loss:
        a, b = jnp.split(head(given.tokens)[:, None], 2)
        return pair_loss(a, b, given.labels, options.theta)

    def save(head: nnx.Module, folder: Path) -> None:
        write_accuracy(folder.parent, held_out, differences(head, sides), options, config.run.seed)
        save_head(head, folder, networks, config.reward)

    return Task(init=init, batch=batch, loss=loss, save=save, rows=pair_digests(pairs))


def make(config: Config) -> Task:
    """Make the task of `configs/reward_face.py`."""
    options = read_options(HeadOptions, config.finetune.options)
    if len(options.dimensions) != 1:
        raise UserError(
            "finetune.options: a head scores one dimension, "
            f"not {', '.join(options.dimensions)}; name one"
        )
    pairs = open_pairs(options.pairs, options.dimensions)
    held_out = open_pairs(options.held_out, options.dimensions) if options.held_out else []
    reward = make_face_reward(dataclasses.replace(faces_alone(config.reward), head=""))
    networks = fingerprint(reward.state)
    sides = read_tokens(reward, [*pairs, *held_out], config, options.tokens)
    pairs = filter_automatic(
        pairs,
        options,
        lambda: differences(load_head(Path(options.teacher), networks, config.reward), sides),
    )
    return head_task(pairs, held_out, sides, networks, options, config)
