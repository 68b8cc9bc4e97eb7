"""Prepare the model's inputs: photos and frames as patches, the prompt as tokens.

    <system> <user> Picture 1: [photo] Picture 2: [photo] ... Video 1: [frames] TEXT with the
    reward tokens ...

Sizes and order are those of the published code. Tokens after the last reward token cannot change a
score and are omitted. Photos are resized by PIL, frames on the device. Both use bicubic
interpolation with antialiasing and are rounded to whole grey levels, as in the original.

Sources: `alibaba/identity-grpo` `vace_reward`, `KwaiVGI/VideoAlign`, transformers' Qwen2-VL
processors.
"""

import ast
import dataclasses
import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jaxtyping import Array, ArrayLike, Float, Int
from PIL import Image

from jax_idgrpo.data.prompts import on_white
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.qwen_vl import Grids, Sequences, VisionConfig, grid_tables, layout, windows

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
# Limits in pixels that override the configuration.
LEAST_PICTURE, LEAST_FRAME, MOST_FRAME = (4 * 28**2, 128 * 28**2, 768 * 28**2)
FRAMES_BY_RATE = (4, 10)  # minimum and maximum number of frames if selected by frame rate
TOKENS_PER_SECOND = 2
# Capacities in patches and windows; few steps limit the number of compiled programs.
PATCHES = (256, 512, 768, 1024, 1536, 2048, 3072)
WINDOWS = (16, 32, 64, 128, 256, 512)
TOKENS = 128  # sequences are padded to a multiple of this


def smart_resize(
    height: int, width: int, pixels: tuple[int, int], factor: int = 28
) -> tuple[int, int]:
    """Round height and width to multiples of `factor`, keeping the aspect ratio.

    Args:
      height: height in pixels.
      width: width in pixels.
      pixels: minimum and maximum of the product of the results.
      factor: divisor of both results.

    Raises:
      UserError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(
            f"a picture of {width} x {height} pixels is too long and thin; the sides may differ by a factor of 200"
        )
    low, high = pixels
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > high:
        shrink = math.sqrt(height * width / high)
        rows, columns = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif rows * columns < low:
        grow = math.sqrt(low / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def frame_indices(total: int, wanted: float, rate: float = 0.0, fps: float = 10.0) -> np.ndarray:
    """Select an even number of evenly spaced frames, including first and last.

    Args:
      total: number of frames of the video.
      wanted: number of frames, rounded to an even number (5 gives 4); 0 selects by `rate`.
      rate: frames per second to select.
      fps: frame rate of the video.

    Raises:
      UserError: fewer than 2 frames would be selected, or more than there are.
    """
    if wanted:
        count = 2 * round(wanted / 2)
    else:
        fewest, most = FRAMES_BY_RATE
        count = int(min(max(total / fps * rate, fewest), min(most, total) // 2 * 2)) // 2 * 2
    if not 2 <= count <= total:
        raise UserError(
            f"{count} frames of a video of {total} are to be looked at; the reward needs 2 to {total}"
        )
    return np.round(np.linspace(0, total - 1, count)).astype(int)


def seconds_per_grid(total: int, fps: float, count: int) -> float:
    """Return the seconds of video that a temporal grid (two of `count` sampled frames) covers.

    Args:
      total: number of frames of the video.
      fps: frame rate of the video.
      count: number of sampled frames.
    """
    return 2 / (count / total * fps)


def patches(
    pictures: Float[ArrayLike, "n H W 3"], config: VisionConfig
) -> Float[ArrayLike, "t P F"]:
    """Cut pictures of equal size into normalised patches, in merge order.

    Args:
      pictures: grey levels 0 .. 255; `config.frames` consecutive pictures share their patches.
      config: sizes of the patches.
    """
    return rearrange(
        (pictures / 255 - MEAN) / STD,
        "(t f) (h m p) (w n q) c -> t (h w m n) (c f p q)",
        f=config.frames,
        m=config.merge,
        n=config.merge,
        p=config.patch,
        q=config.patch,
    )


class Picture(NamedTuple):
    """A photo as patches, repeated over all frames of a temporal patch.

    Attributes:
      patches: normalised patches, in merge order.
      grid: height and width in patches.
    """

    patches: Float[np.ndarray, "P F"]
    grid: Int[np.ndarray, "2"]


def picture(image: Image.Image, config: VisionConfig, pixels: int) -> Picture:
    """Cut a photo into patches.

    Args:
      image: the photo.
      config: sizes of the patches.
      pixels: maximum number of pixels.

    Raises:
      UserError: the aspect ratio exceeds 200.
    """
    height, width = smart_resize(
        image.height, image.width, (LEAST_PICTURE, pixels), config.patch * config.merge
    )
    levels = np.asarray(
        on_white(image).resize((width, height), Image.Resampling.BICUBIC), np.float32
    )
    found = patches(np.repeat(levels[None], config.frames, 0), config)
    return Picture(np.asarray(found[0]), np.array([height // config.patch, width // config.patch]))


def frame_size(height: int, width: int, config: VisionConfig, pixels: int) -> tuple[int, int]:
    """Return the height and width to which the frames of a video are resized.

    Args:
      height: height of the video in pixels.
      width: width of the video in pixels.
      config: sizes of the patches.
      pixels: maximum number of pixels of a frame.
    """
    return smart_resize(
        height, width, (LEAST_FRAME, min(pixels, MOST_FRAME)), config.patch * config.merge
    )


def resized_frames(
    videos: Float[Array, "B T H W 3"], size: tuple[int, int]
) -> Float[Array, "B T h w 3"]:
    """Resize frames in [-1, 1] to whole grey levels 0 .. 255 at `size` (height, width).

    Levels are truncated before resizing and rounded after it. Whole levels, as those of a file, are
    preserved: a small offset compensates rounding errors of the range [-1, 1].
    """
    levels = jnp.floor(jnp.clip((videos.astype(jnp.float32) + 1) * 127.5, 0, 255) + 1e-3)
    shape = (*levels.shape[:2], *size, 3)
    if shape == levels.shape:
        return levels
    return jnp.clip(jnp.round(jax.image.resize(levels, shape, "cubic", antialias=True)), 0, 255)


def capacity(needed: int, steps: Sequence[int]) -> int:
    """Return the smallest of `steps` that is at least `needed`.

    Beyond the largest step, returns the next multiple of the largest step.
    """
    return next((step for step in steps if step >= needed), -(-needed // steps[-1]) * steps[-1])


# ---- the prompt ----------------------------------------------------------------------------------


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
BLOCK = "<|vision_start|><|{kind}_pad|><|vision_end|>"
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"  # used by poolings other than "special"
CAPTION = "{text_prompt}"  # placeholder of the video's own prompt
CONSTANTS = {  # names in the published `prompt_template.py`, by template
    "subject_alignment_special": "SUBJECT_ALIGNMENT_PROMPT_WITH_SPECIAL_TOKEN",
    "detailed_special": "DETAILED_PROMPT_WITH_SPECIAL_TOKEN",
    "detailed": "DETAILED_PROMPT",
}
DIGESTS = {
    "subject_alignment_special": "afe13a75fd89e39d841913f31ee02f0df832f8bbf20e17420449d2c3fcb8d894"
}  # SHA-256 of the published texts


def read_text(path: Path, template: str) -> str:
    """Read the text of the prompt.

    A text file is used as it is. From the published `prompt_template.py`, which is not executed,
    the constant of the template is used. Other texts than the published one are used with a
    warning.

    Raises:
      UserError: the file cannot be read, or does not hold the constant.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"reward.vlm_prompt {path}: cannot be read ({reason}); pass a text file or prompt_template.py"
        ) from None
    if path.suffix == ".py":
        text = _constant(path, text, template)
    if template in DIGESTS and hashlib.sha256(text.encode()).hexdigest() != DIGESTS[template]:
        warnings.warn(
            f"reward.vlm_prompt {path}: is not the published text of {template}; scores are not those of the paper",
            stacklevel=2,
        )
    return text


def _constant(path: Path, source: str, template: str) -> str:
    try:
        found = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    except SyntaxError as error:
        raise UserError(
            f"reward.vlm_prompt {path}: is not Python (line {error.lineno}); get the file again"
        ) from None
    for node in found:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if (
            CONSTANTS.get(template) in names
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            return node.value.value
    raise UserError(
        f"reward.vlm_prompt {path}: does not hold the text of the template {template}; pass it as a text file"
    )


def own_text(tokens: Sequence[str]) -> str:
    """Write a prompt of this project, for rewards that are trained here."""
    places = "".join(f"{token}\n" for token in tokens)
    return (
        "\nLook at every reference picture, then at the video. Does each person of the pictures appear in the video, and does the face "
        "stay that of the same person in every frame? Weigh the shape of face and features most, then hair, then skin, clothing least.\n"
        f"Rating:\n{places}END\n"
    )


@dataclasses.dataclass(frozen=True)
class Prompting:
    """The text around the pictures.

    Attributes:
      tokenizer: tokenizer of transformers, with the reward tokens.
      text: the prompt, with the reward tokens in it; `CAPTION` in it is replaced by a row's prompt.
      rewards: the reward tokens; without any, the whole turn is used.
    """

    tokenizer: Any
    text: str
    rewards: tuple[str, ...]

    def __post_init__(self) -> None:
        for token in self.rewards:
            if (count := self.text.count(token)) != 1:
                raise UserError(
                    f"the text of the reward holds {token} {count} times instead of once; is it this model's prompt?"
                )

    def tokens(
        self, counts: Sequence[int], video: int, caption: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokenise the prompt up to the last reward token.

        Args:
          counts: vision tokens of each photo.
          video: vision tokens of the video.
          caption: the row's prompt.

        Returns:
          Ids, kinds (0 text, 1 picture, 2 video), and positions of the reward tokens.
        """
        pictures = "".join(
            f"Picture {n}: {BLOCK.format(kind='image')}" for n in range(1, len(counts) + 1)
        )
        words = f"{SYSTEM}{pictures}Video 1: {BLOCK.format(kind='video')}{self.text.replace(CAPTION, caption)}{BEHIND}"
        ids = np.asarray(self.tokenizer(words, add_special_tokens=False)["input_ids"])
        image, film, *rewards = (
            self.tokenizer.convert_tokens_to_ids(name)
            for name in ("<|image_pad|>", "<|video_pad|>", *self.rewards)
        )
        kinds = np.where(ids == image, 1, np.where(ids == film, 2, 0))
        repeats = np.ones(len(ids), int)
        repeats[kinds > 0] = [*counts, video]
        ids, kinds = np.repeat(ids, repeats), np.repeat(kinds, repeats)
        places = np.array(
            [int(np.flatnonzero(ids == token)[0]) for token in rewards] or [len(ids) - 1]
        )
        last = int(places.max()) + 1
        return ids[:last], kinds[:last], places


# ---- a batch -------------------------------------------------------------------------------------


@struct.dataclass
class Asked:
    """Inputs of B rows as host arrays: M photo slots of one capacity per row, and the sequence.

    The fields `patches`, `place`, `mask`, `window` and `back` are those of `Grids`, as [B,M,...].
    The fields `ids`, `vision`, `position`, `token` and `tokens` (the mask) are those of
    `Sequences`, with position as [B,3,L].
    """

    patches: np.ndarray
    place: np.ndarray
    mask: np.ndarray
    window: np.ndarray
    back: np.ndarray
    ids: np.ndarray
    vision: np.ndarray
    position: np.ndarray
    token: np.ndarray
    tokens: np.ndarray

    def pictures(self) -> Grids:
        """Return the photos of all rows, one grid after another."""
        parts = {
            name: getattr(self, name) for name in ("patches", "place", "mask", "window", "back")
        }
        return Grids(**{name: value.reshape(-1, *value.shape[2:]) for name, value in parts.items()})

    def people(self) -> Int[Array, " B"]:
        """Count the photos of each row."""
        return jnp.sum(jnp.any(self.mask, axis=2), axis=1)

    def sequences(self) -> Sequences:
        """Return the sequences of all rows."""
        return Sequences(
            ids=self.ids,
            vision=self.vision,
            position=jnp.moveaxis(self.position, 1, 0),
            token=self.token,
            mask=self.tokens,
        )


def video_grid(
    frames: int, height: int, width: int, config: VisionConfig, pixels: int
) -> tuple[int, int, int]:
    """Return the grid (t, h, w) in patches of a video with `frames` sampled frames.

    Args:
      frames: number of sampled frames.
      height: height of the video in pixels.
      width: width of the video in pixels.
      config: sizes of the patches.
      pixels: maximum number of pixels of a frame.
    """
    rows, columns = frame_size(height, width, config, pixels)
    return frames // config.frames, rows // config.patch, columns // config.patch


class Question(NamedTuple):
    """The sequence of one row, without padding.

    Attributes:
      ids: token ids, [L].
      position: positions of the tokens, [3, L].
      order: index of each token among the vision tokens of the row, -1 for text, [L].
      token: positions of the reward tokens.
      video: grid of the video.
    """

    ids: np.ndarray
    position: np.ndarray
    order: np.ndarray
    token: np.ndarray
    video: np.ndarray


def question(
    shown: Sequence[Picture],
    caption: str,
    video: tuple[int, int, int],
    seconds: float,
    prompting: Prompting,
    config: VisionConfig,
) -> Question:
    """Build the sequence of one row.

    Args:
      shown: the row's photos.
      caption: the row's prompt.
      video: grid of the row's video.
      seconds: seconds of video per temporal grid, from `seconds_per_grid`.
      prompting: the text around the pictures.
      config: sizes of the patches.
    """
    grids = [tuple(picture.grid.tolist()) for picture in shown]
    ids, kinds, token = prompting.tokens(
        [h * w // config.merge**2 for h, w in grids], math.prod(video) // config.merge**2, caption
    )
    shapes = [*((1, h, w) for h, w in grids), video]
    position, order = layout(ids, kinds, shapes, seconds * TOKENS_PER_SECOND, config.merge)
    return Question(ids, position, order, token, np.asarray(video))


def ask(
    photos: Sequence[Sequence[Picture]], questions: Sequence[Question], config: VisionConfig
) -> Asked:
    """Pad the photos and the sequence of each row to common capacities.

    Args:
      photos: photos of each row.
      questions: sequence of each row; the videos have the same number of temporal grids.
      config: sizes of the patches.
    """
    return Asked(**_slots(photos, config), **_sequences(photos, questions, config))


def ask_each(
    photos: Sequence[Sequence[Picture]],
    questions: Sequence[Sequence[Question]],
    config: VisionConfig,
) -> Asked:
    """Pad the photos of each row and its Q sequences to common capacities.

    The fields of the sequences have a second axis of length Q.

    Args:
      photos: photos of each row.
      questions: Q sequences of each row.
      config: sizes of the patches.
    """
    shown = [row for row, asked in zip(photos, questions, strict=True) for _ in asked]
    found = _sequences(shown, [one for row in questions for one in row], config)
    split = {
        name: value.reshape(len(questions), -1, *value.shape[1:]) for name, value in found.items()
    }
    return Asked(**_slots(photos, config), **split)


def _rooms(photos: Sequence[Sequence[Picture]], config: VisionConfig) -> tuple[int, int, int]:
    """Return slots per row, and the capacities of a slot in patches and windows."""
    grids = [picture.grid.tolist() for row in photos for picture in row]
    return (
        max(len(row) for row in photos),
        capacity(max(h * w for h, w in grids), PATCHES),
        capacity(max(len(windows(h, w, config)) for h, w in grids), WINDOWS),
    )


def _slots(photos: Sequence[Sequence[Picture]], config: VisionConfig) -> dict[str, np.ndarray]:
    """Pad the photos of each row; the result has the fields of `Grids`."""
    slots, room, count = _rooms(photos, config)

    def slot(values: Float[np.ndarray, "P F"], grid: Sequence[int]) -> dict[str, np.ndarray]:
        return padded_grid(values, (grid[0], grid[1]), config, room, count)

    empty = slot(np.zeros((0, config.features), np.float32), (0, 0))
    rows = [
        [slot(shown.patches, shown.grid.tolist()) for shown in row] + [empty] * (slots - len(row))
        for row in photos
    ]
    return {
        name: np.stack([np.stack([table[name] for table in tables]) for tables in rows])
        for name in empty
    }


def _sequences(
    photos: Sequence[Sequence[Picture]], questions: Sequence[Question], config: VisionConfig
) -> dict[str, np.ndarray]:
    """Pad the sequence of each row.

    Args:
      photos: photos of each row.
      questions: sequence of each row.
      config: sizes of the patches.
    """
    group = config.merge**2
    slots, room, _ = _rooms(photos, config)
    frame_room = capacity(max(math.prod(row.video[1:].tolist()) for row in questions), PATCHES)
    rows = []
    for row, asked in zip(photos, questions, strict=True):
        video = asked.video.tolist()
        sizes = [math.prod(shown.grid.tolist()) // group for shown in row]
        features = [n * room // group + np.arange(size) for n, size in enumerate(sizes)]
        behind = slots * room // group
        features += [
            behind + t * frame_room // group + np.arange(video[1] * video[2] // group)
            for t in range(video[0])
        ]
        vision = np.where(asked.order >= 0, np.concatenate(features)[asked.order], -1)
        rows.append({"ids": asked.ids, "vision": vision, "position": asked.position})
    length = -(-max(len(given["ids"]) for given in rows) // TOKENS) * TOKENS

    def padded(name: str, fill: int) -> np.ndarray:
        out = np.full((len(rows), *rows[0][name].shape[:-1], length), fill, np.int32)
        for into, given in zip(out, rows, strict=True):
            into[..., : given[name].shape[-1]] = given[name]
        return out

    return {
        "ids": padded("ids", 0),
        "vision": padded("vision", -1),
        "position": padded("position", 0),
        "token": np.stack([asked.token for asked in questions]).astype(np.int32),
        "tokens": np.stack([np.arange(length) < len(given["ids"]) for given in rows]),
    }


def padded_grid(
    values: Float[np.ndarray, "P F"],
    grid: tuple[int, int],
    config: VisionConfig,
    room: int,
    count: int,
) -> dict[str, np.ndarray]:
    """Compute the leaves of `Grids` for one grid, padded to common capacities.

    Args:
      values: patches of the grid.
      grid: height and width in patches.
      config: sizes of the patches.
      room: patches after padding.
      count: windows after padding.
    """
    return grid_tables(*grid, config, room, count) | {
        "patches": np.pad(values, ((0, room - len(values)), (0, 0)))
    }


_resized = jax.jit(resized_frames, static_argnames="size")


def frame_grids(
    videos: Sequence[Float[np.ndarray, "T H W 3"]], config: VisionConfig, pixels: int
) -> Grids:
    """Compute the grids of selected frames on the host, row by row; videos may differ in size.

    Args:
      videos: selected frames of each video, in [-1, 1].
      config: sizes of the patches.
      pixels: maximum number of pixels of a frame.
    """
    sizes = [frame_size(video.shape[1], video.shape[2], config, pixels) for video in videos]
    grids = [(height // config.patch, width // config.patch) for height, width in sizes]
    room = capacity(max(h * w for h, w in grids), PATCHES)
    count = capacity(max(len(windows(h, w, config)) for h, w in grids), WINDOWS)
    rows = [
        padded_grid(np.asarray(part), grid, config, room, count)
        for video, size, grid in zip(videos, sizes, grids, strict=True)
        for part in patches(np.asarray(_resized(video[None], size=size))[0], config)
    ]
    return Grids(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})


def frames_of(
    videos: Float[Array, "B T H W 3"], chosen: np.ndarray, config: VisionConfig, pixels: int
) -> Grids:
    """Compute the grids of the selected frames on the device, row by row.

    Args:
      videos: values in [-1, 1].
      chosen: indices of the selected frames.
      config: sizes of the patches.
      pixels: maximum number of pixels of a frame.
    """
    size = frame_size(videos.shape[2], videos.shape[3], config, pixels)
    grid = size[0] // config.patch, size[1] // config.patch
    levels = resized_frames(videos[:, chosen], size)
    found = patches(levels.reshape(-1, *size, 3), config)
    room, count = (
        capacity(grid[0] * grid[1], PATCHES),
        capacity(len(windows(*grid, config)), WINDOWS),
    )
    tables = grid_tables(*grid, config, room, count)
    repeated = {
        name: jnp.broadcast_to(table, (len(found), *table.shape)) for name, table in tables.items()
    }
    return Grids(patches=jnp.pad(found, ((0, 0), (0, room - found.shape[1]), (0, 0))), **repeated)
