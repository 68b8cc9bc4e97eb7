"""What the vision-language reward is shown: photos and frames as patches, the prompt as tokens. Sizes and order as in the published code.

    <system> <user> Picture 1: [photo] Picture 2: [photo] ... Video 1: [frames] TEXT with the reward tokens ...

What stands behind the last reward token cannot change a score and is left out. Photos are resized by PIL, frames on the device, both
bicubic with antialiasing and rounded to whole grey levels, as the original does. Sources: `alibaba/identity-grpo` `vace_reward`,
`KwaiVGI/VideoAlign`, transformers' Qwen2-VL processors.
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
from flax import struct
from jaxtyping import Array, ArrayLike, Float, Int
from PIL import Image

from jax_idgrpo.data.prompts import on_white
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.qwen_vl import Grids, Sequences, VisionConfig, grid_tables, layout, windows

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
LEAST_PICTURE, LEAST_FRAME, MOST_FRAME = (
    4 * 28**2,
    128 * 28**2,
    768 * 28**2,
)  # pixels, whatever a configuration asks for
FRAMES_BY_RATE = (4, 10)  # fewest and most frames where a frame rate is asked for
TOKENS_PER_SECOND = 2
PATCHES = (
    256,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
)  # capacities, so that a run compiles a handful of programs
WINDOWS = (16, 32, 64, 128, 256, 512)
TOKENS = 128  # sequences are padded to a multiple of it


def smart_resize(
    height: int, width: int, pixels: tuple[int, int], factor: int = 28
) -> tuple[int, int]:
    """Height and width as multiples of `factor` near the given ones, their product within `pixels`, the aspect ratio kept.

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
    """Which frames of `total` are looked at, evenly spaced, first and last among them: an even number of them.

    wanted: how many, rounded to an even number (5 asks for 4); 0 asks for `rate` frames per second of a video of `fps`.

    Raises:
      UserError: fewer than 2 frames, or more than there are.
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
    """Seconds of video that a temporal grid (two of `count` sampled frames) stands for. fps: that of the video."""
    return 2 / (count / total * fps)


def patches(
    pictures: Float[ArrayLike, "n H W 3"], config: VisionConfig
) -> Float[ArrayLike, "t P F"]:
    """Grey levels 0 .. 255 of pictures of equal size, taken `config.frames` at a time -> their normalised patches, in merge order."""
    n, height, width, _ = pictures.shape
    merge, patch, frames = config.merge, config.patch, config.frames
    x = (pictures / 255 - MEAN) / STD
    x = x.reshape(
        n // frames,
        frames,
        height // patch // merge,
        merge,
        patch,
        width // patch // merge,
        merge,
        patch,
        3,
    )
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(n // frames, -1, config.features)


class Picture(NamedTuple):
    """A photo as patches, standing for all frames of a temporal patch. grid: its height and width in patches."""

    patches: Float[np.ndarray, "P F"]
    grid: Int[np.ndarray, "2"]


def picture(image: Image.Image, config: VisionConfig, pixels: int) -> Picture:
    """Cut a photo into patches. pixels: at most.

    Raises:
      UserError: it is too long and thin.
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
    """Height and width to which the frames of a video are resized. pixels: at most."""
    return smart_resize(
        height, width, (LEAST_FRAME, min(pixels, MOST_FRAME)), config.patch * config.merge
    )


def resized_frames(
    videos: Float[Array, "B T H W 3"], size: tuple[int, int]
) -> Float[Array, "B T h w 3"]:
    """Frames in [-1, 1] -> whole grey levels 0 .. 255 at `size`; cut to whole levels before and rounded after resizing.

    Levels that were whole, as those of a file, stay what they are: rounding errors of the range [-1, 1] do not cut them.
    """
    levels = jnp.floor(jnp.clip((videos.astype(jnp.float32) + 1) * 127.5, 0, 255) + 1e-3)
    shape = (*levels.shape[:2], *size, 3)
    if shape == levels.shape:
        return levels
    return jnp.clip(jnp.round(jax.image.resize(levels, shape, "cubic", antialias=True)), 0, 255)


def capacity(needed: int, steps: Sequence[int]) -> int:
    """The smallest of `steps` that holds so many, or the next multiple of the largest."""
    return next((step for step in steps if step >= needed), -(-needed // steps[-1]) * steps[-1])


# ---- the prompt ----------------------------------------------------------------------------------


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
BLOCK = "<|vision_start|><|{kind}_pad|><|vision_end|>"
BEHIND = "<|im_end|>\n<|im_start|>assistant\n"  # read by other poolings than that at special tokens
CAPTION = "{text_prompt}"  # stands for the video's own prompt in texts that are not blind to it
CONSTANTS = {  # in the published `prompt_template.py`, by the name of the template
    "subject_alignment_special": "SUBJECT_ALIGNMENT_PROMPT_WITH_SPECIAL_TOKEN",
    "detailed_special": "DETAILED_PROMPT_WITH_SPECIAL_TOKEN",
    "detailed": "DETAILED_PROMPT",
}
DIGESTS = {
    "subject_alignment_special": "afe13a75fd89e39d841913f31ee02f0df832f8bbf20e17420449d2c3fcb8d894"
}  # SHA-256 of the text


def read_text(path: Path, template: str) -> str:
    """What is asked: a text file as it is, or the constant of the template in the published `prompt_template.py`, which is not run.

    A text that is not the published one of this template is used, with a warning.

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
    """A text of this project, for rewards that are trained here."""
    places = "".join(f"{token}\n" for token in tokens)
    return (
        "\nLook at every reference picture, then at the video. Does each person of the pictures appear in the video, and does the face "
        "stay that of the same person in every frame? Weigh the shape of face and features most, then hair, then skin, clothing least.\n"
        f"Rating:\n{places}END\n"
    )


@dataclasses.dataclass(frozen=True)
class Prompting:
    """The words around the pictures.

    tokenizer: of transformers, which knows the reward tokens. text: what is asked, with the reward tokens in it; `CAPTION` in it stands
    for a row's prompt. rewards: the tokens; without any the whole turn is read.
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
        """Ids and kinds (0 text, 1 picture, 2 video) up to the last reward token, and where the reward tokens are.

        counts: vision tokens of each photo. video: those of the video. caption: the row's prompt.
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
    """What B rows ask about, host arrays with the batch first: the photos (M slots a row, of one capacity) and the sequence.

    patches place mask window back: of `Grids`, [B,M,...]. ids vision position token tokens: of `Sequences`, position as [B,3,L].
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
        """The photos of all rows, one grid after another."""
        parts = {
            name: getattr(self, name) for name in ("patches", "place", "mask", "window", "back")
        }
        return Grids(**{name: value.reshape(-1, *value.shape[2:]) for name, value in parts.items()})

    def people(self) -> Int[Array, "B"]:
        """How many photos each row has."""
        return jnp.sum(jnp.any(self.mask, axis=2), axis=1)

    def sequences(self) -> Sequences:
        """The sequences of all rows."""
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
    """(t, h, w) in patches of a video of which `frames` frames are looked at. pixels: of a frame, at most."""
    rows, columns = frame_size(height, width, config, pixels)
    return frames // config.frames, rows // config.patch, columns // config.patch


class Question(NamedTuple):
    """The sequence of one row, without the padding that its batch decides.

    ids, position [3, L]: of the tokens. order: number of each token among the vision tokens of the row, -1 for text. token: places of the
    reward tokens. video: grid of the video.
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
    """Write the sequence of one row.

    Args:
      shown: the row's photos.
      caption: its prompt.
      video: the grid of its video.
      seconds: of `seconds_per_grid`.
      prompting: the words around them.
      config: how pictures are cut.
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
    """The photos and the sequence of each row, padded to common capacities. The videos are equally long in time."""
    group = config.merge**2
    grids = [picture.grid.tolist() for row in photos for picture in row]
    slots = max(len(row) for row in photos)
    room = capacity(max(h * w for h, w in grids), PATCHES)
    count = capacity(max(len(windows(h, w, config)) for h, w in grids), WINDOWS)
    frame_room = capacity(max(math.prod(row.video[1:].tolist()) for row in questions), PATCHES)

    def slot(values: Float[np.ndarray, "P F"], grid: Sequence[int]) -> dict[str, np.ndarray]:
        return padded_grid(values, (grid[0], grid[1]), config, room, count)

    empty = slot(np.zeros((0, config.features), np.float32), (0, 0))
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
        tables = [slot(shown.patches, shown.grid.tolist()) for shown in row] + [empty] * (
            slots - len(row)
        )
        rows.append(
            (
                tables,
                {
                    "ids": asked.ids,
                    "vision": vision,
                    "position": asked.position,
                    "token": asked.token,
                },
            )
        )
    length = -(-max(len(given["ids"]) for _, given in rows) // TOKENS) * TOKENS

    def padded(name: str, fill: int) -> np.ndarray:
        out = np.full((len(rows), *rows[0][1][name].shape[:-1], length), fill, np.int32)
        for into, (_, given) in zip(out, rows, strict=True):
            into[..., : given[name].shape[-1]] = given[name]
        return out

    return Asked(
        **{
            name: np.stack([np.stack([table[name] for table in tables]) for tables, _ in rows])
            for name in empty
        },
        ids=padded("ids", 0),
        vision=padded("vision", -1),
        position=padded("position", 0),
        token=np.stack([given["token"] for _, given in rows]).astype(np.int32),
        tokens=np.stack([np.arange(length) < len(given["ids"]) for _, given in rows]),
    )


def padded_grid(
    values: Float[np.ndarray, "P F"],
    grid: tuple[int, int],
    config: VisionConfig,
    room: int,
    count: int,
) -> dict[str, np.ndarray]:
    """The leaves of `Grids` for one grid, padded to `room` patches and `count` windows."""
    return grid_tables(*grid, config, room, count) | {
        "patches": np.pad(values, ((0, room - len(values)), (0, 0)))
    }


_resized = jax.jit(resized_frames, static_argnames="size")


def frame_grids(
    videos: Sequence[Float[np.ndarray, "T H W 3"]], config: VisionConfig, pixels: int
) -> Grids:
    """The grids of already chosen frames of videos in [-1, 1] of any sizes, row by row, on the host."""
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
    """The grids of the chosen frames of videos in [-1, 1], row by row; on the device, with tables that their size decides."""
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
