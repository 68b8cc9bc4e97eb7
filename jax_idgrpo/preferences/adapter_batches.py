"""Encode the rows of the task "adapter", and read the batches of its steps.

Encoded clips, photos and texts are those of `training.clip_latents`. A batch is a pure function of
(seed, step).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jax_idgrpo.config import Config
from jax_idgrpo.data.photos import load_reference
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import print_once
from jax_idgrpo.preferences.adapter_rows import AdapterOptions, Reference, Rows, TrainedVideo
from jax_idgrpo.preferences.clip_pairs import locate
from jax_idgrpo.preferences.video_clips import MOST
from jax_idgrpo.rewards.base import (
    DifferentiableReward,
    ReferenceFaces,
    References,
    check_references,
)
from jax_idgrpo.rewards.faces import load_settings, load_stack
from jax_idgrpo.rewards.head import fingerprint
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.sampling.pipeline import Pipeline
from jax_idgrpo.synthetic.training.transformer import cell_weight
from jax_idgrpo.training.adapter_task import ClipBatch
from jax_idgrpo.training.clip_latents import (
    Encoder,
    Entry,
    FindFace,
    Latents,
    clip_windows,
    content_hash,
    name_of,
    stacked,
)

HELD_OUT = 64  # held-out clips that the loss is measured on, at most


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of the arrays of one video in the cache.

    faces: "" without a face weight. places: "" without boxes of people.
    """

    clip: str
    text: str
    photos: tuple[tuple[str, ...], ...]
    faces: str = ""
    places: str = ""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run's encoded rows, in the order in which steps index them.

    Attributes:
      latents: the cache.
      items: videos of each row: one, or winner and loser.
      held_out: held-out videos.
      names: names of the arrays by video.
      negative: [L,D] embedding of the negative prompt.
      grey: latents of a mid-grey video.
      placed: whether a video has boxes of its people.
      faces: encodes the people of a trained video, without a row axis; None without an identity
        loss.
    """

    latents: Latents
    items: Sequence[tuple[TrainedVideo, ...]]
    held_out: Sequence[TrainedVideo]
    names: Mapping[TrainedVideo, Names]
    negative: Float[np.ndarray, "L D"]
    grey: Float[np.ndarray, "T h w C"]
    placed: bool = False
    faces: Callable[[TrainedVideo], ReferenceFaces] | None = None


def prepare_rows(
    pipe: Pipeline, config: Config, options: AdapterOptions, rows: Rows, folder: Path
) -> Prepared:
    """Encode all clips, photos and texts that are not in the cache (collective).

    Clips that are shorter than `video.frames` are left out.

    Args:
      pipe: encodes.
      config: of the run.
      options: of the task.
      rows: what the run trains on.
      folder: folder of the cache.

    Raises:
      UserError: a file cannot be read, or no clip is long enough.
    """
    encoder, latents = Encoder.make(pipe, config), Latents(folder)
    faces = config.reward.folder() if options.augment or options.face_weight != 1 else None
    find_face, mark = _face_finder(faces) if faces is not None and options.augment else (None, "")
    share = _face_shares(config, faces) if faces is not None and options.face_weight != 1 else None
    entries: list[Entry] = []
    names: dict[TrainedVideo, Names] = {}
    known: dict[tuple[File, bool], str] = {}

    def keep(entry: Entry) -> str:
        entries.append(entry)
        return entry.name

    def photo(reference: Reference) -> str:
        key = (reference.file, reference.own)
        if key not in known:
            known[key] = keep(encoder.photo(*key, find_face, mark))
        return known[key]

    for video in dict.fromkeys(rows.all):
        names[video] = Names(
            keep(encoder.clip(video.path)),
            keep(encoder.text(video.prompt)),
            tuple(tuple(map(photo, group)) for group in video.references),
            keep(share(video)) if share is not None else "",
            keep(encoder.places(video.path, video.places)) if video.places else "",
        )
    latents.fill(entries)

    def usable(video: TrainedVideo) -> bool:
        return len(latents.read(names[video].clip)) > 0

    items = list(rows.pairs or ((video,) for video in rows.videos))
    whole = [item for item in items if all(map(usable, item))]
    if len(whole) < len(items):
        first = next(video for item in items for video in item if not usable(video))
        text = (
            f"{len(items) - len(whole)} of {len(items)} rows have a clip with fewer frames than "
            f"video.frames {config.video.frames} at {config.video.fps} per second, such as "
            f"{first.path}"
        )
        if not whole:
            raise UserError(f"{text}; use a smaller --video.frames, or longer clips")
        print_once(f"{text}; they are left out")
    return Prepared(
        latents,
        whole,
        [video for video in rows.held_out if usable(video)],
        names,
        conditioning.encode_negative(pipe, config.data),
        encoder.grey() if config.model.kind == "vace" else np.zeros((1, 1, 1, 1), np.float32),
        any(one.places for one in names.values()),
    )


def prompt_of(video: TrainedVideo, number: int = 0) -> Prompt:
    """Return the text and photos of a video as a prompt.

    Args:
      video: the video.
      number: of the prompt.
    """
    first = tuple(group[0].file for group in video.references)
    more = tuple(tuple(photo.file for photo in group[1:]) for group in video.references)
    return Prompt(
        number, video.prompt, first, where=str(video.path), more=more if any(more) else ()
    )


def face_encoder(
    reward: DifferentiableReward, videos: Sequence[TrainedVideo], most: int
) -> Callable[[TrainedVideo], ReferenceFaces]:
    """Look at the photos of all videos, and return a function that encodes those of one.

    Args:
      reward: encodes every photo once.
      videos: the videos.
      most: largest number of people of a video.

    Raises:
      UserError: a photo shows no face.
    """
    # Places are no part of the loss, and rows without them would have another structure.
    prompts = {video: dataclasses.replace(prompt_of(video), places=None) for video in videos}
    check_references(reward, list(prompts.values()))

    def encode(video: TrainedVideo) -> ReferenceFaces:
        photos = References.of_prompts([prompts[video]], most)
        return jax.tree.map(lambda leaf: leaf[0], reward.encode_references(photos, [video.prompt]))

    return encode


def _face_finder(folder: Path) -> tuple[FindFace, str]:
    """Return a function that finds the best face of a photo, and a fingerprint of its networks."""
    stack = load_stack(folder, "embedder")
    graph, state = nnx.split(stack)

    @jax.jit
    def program(state: nnx.State, photo: Float[Array, "H W 3"]) -> tuple[Array, Array]:
        faces = nnx.merge(graph, state)(photo[None, None])
        return faces.boxes[0, 0, 0], faces.mask[0, 0, 0]

    def find(photo: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "4"] | None:
        box, found = jax.device_get(program(state, photo))
        return box if found else None

    return find, fingerprint(state)


def _face_shares(config: Config, folder: Path) -> Callable[[TrainedVideo], Entry]:
    """Return a function that describes the share of each latent cell that faces cover.

    Args:
      config: of the run.
      folder: folder of face networks.
    """
    stack, video = load_stack(folder, "embedder"), config.video
    program = locate(stack, load_settings(folder, "embedder").missing)
    mark, size = fingerprint(nnx.state(stack)), (video.height, video.width)

    def entry(row: TrainedVideo) -> Entry:
        files = [group[0].file for group in row.references]

        def make() -> np.ndarray:
            photos = np.ones((MOST, *size, 3), np.float32)
            for number, file in enumerate(files):
                photos[number] = conditioning.canvas(load_reference(file), *size)
            present = np.arange(MOST) < len(files)
            found = []
            for window in clip_windows(row.path, video):
                boxes = program(window, photos, present)[0]
                seen = (boxes[..., 2] > boxes[..., 0]).astype(jnp.float32)
                found.append(np.asarray(cell_weight(boxes[None], seen[None], size, 2.0) - 1)[0])
            return np.stack(found) if found else np.zeros((0, 1, 1, 1))

        parts = [content_hash(file) for file in (row.path, *files)]
        return Entry(name_of("faces", parts, video, mark), make)

    return entry


def make_batch(
    prepared: Prepared, config: Config, options: AdapterOptions, seed: int, step: int
) -> ClipBatch:
    """Read the rows of a training step: a pure function of (seed, step).

    Args:
      prepared: the encoded rows.
      config: of the run.
      options: of the task.
      seed: seed of the run.
      step: training step.
    """
    count = config.finetune.batch
    order = grain.MapDataset.range(len(prepared.items)).seed(seed).shuffle().repeat()
    rows: list[ClipBatch] = []
    for number in range(count):
        item = prepared.items[int(order[step * count + number])]
        for video in item:
            random = np.random.default_rng((seed, step, number))  # one draw for both of a pair
            rows.append(read_row(prepared, config, options, video, random))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def read_row(
    prepared: Prepared,
    config: Config,
    options: AdapterOptions,
    video: TrainedVideo,
    random: np.random.Generator | None,
) -> ClipBatch:
    """Read one row, without a batch axis.

    Args:
      prepared: the encoded rows.
      config: of the run.
      options: of the task.
      video: the row.
      random: draws window, photos and dropout; None reads the first window with the listed photos
        as they are.
    """
    names, read = prepared.names[video], prepared.latents.read

    def pick(count: int) -> int:
        # A fixed amount of the generator's output, so that both rows of a pair draw the same.
        return 0 if random is None else int(random.random() * count)

    windows = read(names.clip)
    window = pick(len(windows))
    latents = np.asarray(windows[window], np.float32)
    weight = np.ones(latents.shape[:-1], np.float32)
    if names.faces:
        weight += (options.face_weight - 1) * np.asarray(read(names.faces)[window], np.float32)
    layout = None
    if prepared.placed:
        boxes = read(names.places)[window] if names.places else prepared.grey
        layout = np.asarray(boxes, np.float32)
    photos = []
    for group in names.photos:
        variants = read(group[pick(len(group))])
        photos.append(variants[pick(len(variants))])
    no_text = no_photos = False
    if options.loss == "flow" and random is not None:
        no_text = random.random() < options.text_dropout
        no_photos = random.random() < options.photo_dropout
    vace = config.model.kind == "vace"
    if vace and config.data.reference_order == "diffusers":
        photos.reverse()
    if no_photos:
        photos = []
    slots = config.data.max_people if vace else config.reference_frames
    text = prepared.negative if no_text else read(names.text)
    return ClipBatch(
        video=latents,
        photos=stacked(photos, slots, latents.shape[1:]),
        people=np.int32(len(photos) if vace else len(names.photos)),
        text=conditioning.padded(np.asarray(text, np.float32), config.data.text_length),
        weight=weight,
        layout=layout,
        faces=None if random is None or prepared.faces is None else prepared.faces(video),
    )


def held_out_batches(
    prepared: Prepared, config: Config, options: AdapterOptions
) -> list[ClipBatch]:
    """Read up to `HELD_OUT` held-out clips in whole batches; the last batch repeats the first rows.

    Args:
      prepared: the encoded rows.
      config: of the run.
      options: of the task.
    """
    chosen = list(prepared.held_out[:HELD_OUT])
    size = config.finetune.batch
    missing = -len(chosen) % size
    filled = [*chosen, *(chosen[n % len(chosen)] for n in range(missing))] if chosen else []
    rows = [read_row(prepared, config, options, video, None) for video in filled]
    return [
        jax.tree.map(lambda *leaves: np.stack(leaves), *rows[start : start + size])
        for start in range(0, len(rows), size)
    ]
