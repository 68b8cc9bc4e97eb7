"""Define the protocol of rewards, reference photos, and the selection of scored frames.

A reward encodes the photos of some prompts once (`encode_references`), and then scores videos
against the encoded references (`score`). Only `factory` names the reward classes; all other modules
use the protocol.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from flax import struct
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree
from PIL import Image

from jax_idgrpo.data.photos import Decoded, decode_photo
from jax_idgrpo.data.places import Places
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import File, to_uint8
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.rewards.host import Pending
from jax_idgrpo.rewards.people import ReferencePeople
from jax_idgrpo.rewards.placed import PlaceTargets

Terms = dict[str, Float[Array, " B"]]
Consumer = Callable[[File, Image.Image], None]
"""Gets a photo's file and its pixels, upright RGB at the photo's own size."""
Opened = concurrent.futures.Future[Image.Image]
LISTED = 5  # photos that an error message names
AHEAD = 3  # photos that are decoded while an earlier one is encoded; each is in memory

# ---- reference photos ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Photo:
    """A reference photo that is opened on demand.

    Attributes:
      source: the file, or the picture itself.
      where: origin of the photo for messages, such as a line of a CSV.
    """

    source: File | Image.Image
    where: str = ""

    def open(self) -> Image.Image:
        """Return the photo at its own size, upright RGB.

        The file is decoded at the first call, and the pixels are held until `close`.

        Raises:
          UserError: the file is missing or damaged.
        """
        return self._decoded.image

    @property
    def note(self) -> str:
        """What looks odd about the file, or ""; it is decoded as by `open`."""
        return self._decoded.note

    @functools.cached_property
    def _decoded(self) -> Decoded:
        if isinstance(self.source, Image.Image):
            return Decoded(self.source, "")
        return decode_photo(self.source)

    def close(self) -> None:
        """Drop the pixels that `open` holds; it decodes the file again if it is called again."""
        self.__dict__.pop("_decoded", None)

    def content(self) -> bytes:
        """Return the bytes of the file; of a picture without a file, those of a PNG.

        Raises:
          OSError: the file cannot be read.
        """
        if not isinstance(self.source, Image.Image):
            return self.source.read_bytes()
        buffer = io.BytesIO()
        self.source.save(buffer, "PNG")
        return buffer.getvalue()

    @functools.cached_property
    def key(self) -> Hashable:
        """Key of the photo within a run: the file, or a hash of the pixels of a picture."""
        if not isinstance(self.source, Image.Image):
            return self.source
        return self.source.size, hashlib.sha256(self.source.tobytes()).digest()

    @property
    def name(self) -> str:
        """Name of the photo in messages; "" for a picture without a file."""
        file = "" if isinstance(self.source, Image.Image) else f"image {self.source}"
        return f"{self.where}: {file}" if self.where and file else file


@dataclasses.dataclass(frozen=True)
class References:
    """The reference photos of P prompts, on the host.

    Attributes:
      photos: the photos of each prompt, in its order.
      people: slots per prompt in encoded arrays; a prompt with fewer photos is padded.
      more: further photos of each person of each prompt, in the order of `photos`; () without any.
      places: where the people of each prompt stand; () if the prompts come without that column.
    """

    photos: tuple[tuple[Photo, ...], ...]
    people: int
    more: tuple[tuple[tuple[Photo, ...], ...], ...] = ()
    places: tuple[Places, ...] = ()

    @property
    def mask(self) -> Bool[np.ndarray, "P M"]:
        """True on photos, False on padding."""
        return np.arange(self.people) < np.array([[len(row)] for row in self.photos])

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt], people: int) -> "References":
        """List the photos of prompts without opening them."""
        return cls(
            tuple(
                tuple(Photo(file, prompt.where) for file in prompt.references) for prompt in prompts
            ),
            people,
            tuple(
                tuple(
                    tuple(Photo(file, prompt.where) for file in group)
                    for group in prompt.more or ((),) * prompt.people
                )
                for prompt in prompts
            ),
            tuple(prompt.places or Places() for prompt in prompts)
            * any(prompt.places is not None for prompt in prompts),
        )

    @classmethod
    def of_pixels(
        cls, images: Float[ArrayLike, "P M h w 3"], mask: Bool[ArrayLike, "P M"]
    ) -> "References":
        """Take photos from pixels, rounded to 8 bits.

        Args:
          images: pixels in [-1, 1].
          mask: True on photos, which come first in their row.
        """
        rows = [
            tuple(Photo(Image.fromarray(to_uint8(image))) for image in row[shown])
            for row, shown in zip(np.asarray(images), np.asarray(mask, bool), strict=True)
        ]
        return cls(tuple(rows), np.shape(mask)[1])


class Row(NamedTuple):
    """A prompt with its photos."""

    text: str
    photos: tuple[Photo, ...]


class NumberedRows:
    """Prompts with their photos under numbers, for a reward that reads both on the host."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._numbers: dict[Hashable, int] = {}

    def __getitem__(self, number: SupportsIndex) -> Row:
        return self._rows[number]

    def add(self, references: References, prompts: Sequence[str]) -> Int[np.ndarray, " P"]:
        """Return the numbers of prompts, each stored once; no photo is opened."""
        numbers = []
        for text, photos in zip(prompts, references.photos, strict=True):
            name = text, tuple(photo.key for photo in photos)
            if name not in self._numbers:
                self._numbers[name] = len(self._rows)
                self._rows.append(Row(text, photos))
            numbers.append(self._numbers[name])
        return np.asarray(numbers, np.int32)


@struct.dataclass
class ReferenceFaces:
    """The faces of P prompts' reference photos, zero on padding.

    Attributes:
      embeddings: unit vectors.
      crops: crops of the faces (see `photo_copy`).
      mask: True where there is a person.
      people: the whole people; None if they are not compared.
      places: where the people should stand; None leaves out the term `placed`.
    """

    embeddings: Float[Array, "P M E"]
    crops: Float[Array, "P M S S 3"]
    mask: Bool[Array, "P M"]
    people: ReferencePeople | None = None
    places: PlaceTargets | None = None


# ---- the protocol --------------------------------------------------------------------------------


@runtime_checkable
class Reward(Protocol):
    """Score videos against reference photos and prompts; higher is better."""

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of every video; "reward" is among them."""

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of the terms that an evaluation reports beside the reward."""

    def encode_references(
        self,
        references: References,
        prompts: Sequence[str],
        video: tuple[int, int, int] | None = None,
    ) -> PyTree:
        """Encode photos and texts as a pytree of arrays with leading axis P.

        Each photo is encoded once in a run.

        Args:
          references: the photos of the prompts.
          prompts: the texts of the prompts.
          video: frames, height and width of the scored videos, if they differ from the
            configuration.

        Raises:
          UserError: a photo cannot be used; the message names the photo.
        """

    @property
    def motion_of_all_frames(self) -> bool:
        """Whether `motion` covers all frames, including those that `frames_read` omits."""

    def frames_read(self, total: int) -> np.ndarray | None:
        """Return the indices of the frames that the reward depends on; None for all frames.

        A video reduced to these frames has the same terms, except for `motion`.

        Args:
          total: number of frames of the video.
        """

    def score(self, videos: Float[ArrayLike, "B F H W 3"], encoded: PyTree) -> Terms | Pending:
        """Score videos against encoded references without waiting for the result.

        Args:
          videos: pixels in [-1, 1].
          encoded: encoded references, one row per video.
        """


@runtime_checkable
class DifferentiableReward(Reward, Protocol):
    """A reward that is a function of arrays.

    Attributes:
      state: arrays of its networks.
    """

    state: PyTree

    def apply(self, state: PyTree, videos: Float[ArrayLike, "B F H W 3"], encoded: PyTree) -> Terms:
        """Score videos as `score` does, with the networks' arrays as an argument.

        Args:
          state: arrays of the networks.
          videos: pixels in [-1, 1].
          encoded: encoded references, one row per video.
        """

    def shapes(self, rows: int, people: int) -> PyTree:
        """Return the shapes of encoded references for `rows` videos with `people` slots each."""


@runtime_checkable
class RemoteReward(Reward, Protocol):
    """A reward of another process, which may not answer."""

    def check(self, references: References, prompts: Sequence[str]) -> None:
        """Try the reward on a blank video per prompt.

        Args:
          references: the photos of the prompts.
          prompts: the texts of the prompts.

        Raises:
          UserError: the other process refuses the request or gives no usable answer.
        """


def differentiable(reward: object) -> DifferentiableReward:
    """Return the reward as one that gradients can flow through.

    Raises:
      UserError: the reward runs on the host.
    """
    if not isinstance(reward, DifferentiableReward):
        raise UserError(
            "this reward runs on the host, and no program can hold it; use the face reward of reward.faces"
        )
    return reward


def reads_pools(reward: Reward) -> bool:
    """Return whether a reward compares people with several photos of each."""
    return getattr(reward.encode_references, "pooled", False)


def require_pools(reward: Reward, prompts: Sequence[Prompt]) -> None:
    """Refuse `reward.pool pool` for training prompts of which none has further photos.

    Held-out prompts may do without: their people are compared with one photo.
    """
    if reads_pools(reward) and not any(prompt.more for prompt in prompts):
        raise UserError(
            "reward.pool pool: no row of data.prompts has further photos; add the column more_paths, "
            "or leave out reward.pool"
        )


def check_references(
    reward: Reward,
    prompts: Sequence[Prompt],
    further: Sequence[Reward] = (),
    consume: Consumer | None = None,
) -> None:
    """Decode each photo of some prompts once, and give it to everything that encodes it.

    Every photo is decoded, whatever the reward reads, so that a damaged one is found before any
    expensive work. Few photos are in memory at a time. A reward of another process is tried on the
    first prompt.

    Args:
      reward: the reward.
      prompts: the prompts.
      further: other rewards that encode the photos, such as the judge.
      consume: gets every usable photo and its pixels as well, such as the encoder of the video
        model.

    Raises:
      UserError: photos cannot be used, or another process does not score. The message lists the
        first of the photos with their lines in the CSV, and their number.
    """
    if isinstance(reward, RemoteReward) and prompts:
        reward.check(References.of_prompts(prompts[:1], 1), [prompts[0].text])
    photos: dict[Hashable, tuple[Photo, str]] = {}
    listed = References.of_prompts(prompts, 1)
    for prompt, row in zip(prompts, listed.photos, strict=True):
        for photo in row:
            photos.setdefault(photo.key, (photo, prompt.text))
    conditioning = set(photos)
    if reads_pools(reward):
        for prompt, groups in zip(prompts, listed.more, strict=True):
            for photo in itertools.chain(*groups):
                photos.setdefault(photo.key, (photo, prompt.text))
    refused: list[str] = []
    total = len(photos)
    with progress("looking at photos", total) as update:
        for done, (photo, text, opened) in enumerate(_decoded_ahead(list(photos.values())), 1):
            one = References(((photo,),), 1)
            try:
                image = opened.result()
                if photo.note:
                    warnings.warn(f"{photo.where}: {photo.note}", stacklevel=2)
                for encoder in (reward, *further) if photo.key in conditioning else (reward,):
                    encoder.encode_references(one, [text])
                if (
                    photo.key in conditioning
                    and consume is not None
                    and not isinstance(photo.source, Image.Image)
                ):
                    consume(photo.source, image)
            except UserError as error:
                refused.append(_with_line(photo, str(error)))
            update(done)
    if reads_pools(reward) and not refused:
        for prompt in prompts:
            try:
                reward.encode_references(
                    References.of_prompts([prompt], prompt.people), [prompt.text]
                )
            except UserError as error:
                refused.append(str(error))
    if len(refused) == 1:
        raise UserError(refused[0])
    if refused:
        reasons = [message.rpartition("; ") for message in refused]  # each ends in a remedy
        more = f" and {len(refused) - LISTED} more" if len(refused) > LISTED else ""
        shown = ", ".join(reason for reason, _, _ in reasons[:LISTED])
        raise UserError(
            f"{len(refused)} of {total} reference photos cannot be used: {shown}{more}; {reasons[0][2]}"
        )


def _decoded_ahead(photos: Sequence[tuple[Photo, str]]) -> Iterator[tuple[Photo, str, Opened]]:
    """Iterate over photos and their texts, while threads decode the next `AHEAD` photos.

    Yields:
      A photo, its text, and the future of its picture. The pixels are dropped afterwards.
    """
    ahead: collections.deque[tuple[Photo, str, Opened]] = collections.deque()
    readers = min(os.cpu_count() or 1, AHEAD)
    with concurrent.futures.ThreadPoolExecutor(readers, "photos") as pool:
        for number in range(len(photos) + readers):
            if number < len(photos):
                photo, text = photos[number]
                ahead.append((photo, text, pool.submit(photo.open)))
            if number >= readers:
                yield ahead[0]
                ahead.popleft()[0].close()


def _with_line(photo: Photo, message: str) -> str:
    """Add the line of the CSV to the message of an unreadable file, which lacks it."""
    return f"{photo.where}: {message}" if photo.where and message.startswith("image") else message


# ---- frames --------------------------------------------------------------------------------------


def frame_numbers(frames: int, wanted: int) -> np.ndarray:
    """Return `wanted` evenly spaced indices of `frames` frames, first and last included.

    All frames are selected if `wanted` is 0 or not less than `frames`.
    """
    if wanted == 0 or wanted >= frames:
        return np.arange(frames)
    return np.round(np.linspace(0, frames - 1, wanted)).astype(int)
