"""What rewards share: the protocol that they follow, reference photos, and the frames that are scored.

A reward looks at the photos of some prompts once (`encode_references`), and then scores videos against what it found (`score`).
Only `factory` knows which rewards there are; everybody else goes by the protocol.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import struct
from jaxtyping import Array, ArrayLike, Bool, Float
from PIL import Image

from jax_idgrpo.data.prompts import Prompt, load_reference
from jax_idgrpo.data.video import File, to_uint8
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.rewards.host import Pending

Terms = dict[str, Float[Array, "B"]]
LISTED = 5  # photos that an error names

# ---- reference photos ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Photo:
    """A reference photo, opened when it is needed.

    source: the file, or the picture itself. where: the place that names it, such as a line of a CSV, for messages.
    """

    source: File | Image.Image
    where: str = ""

    def open(self) -> Image.Image:
        """Return the photo at its own size, upright RGB.

        Raises:
          UserError: the file is missing or damaged.
        """
        return self.source if isinstance(self.source, Image.Image) else load_reference(self.source)

    @functools.cached_property
    def key(self) -> Hashable:
        """What the photo is known by during a run: the file, or for a picture a hash of its pixels."""
        if not isinstance(self.source, Image.Image):
            return self.source
        return self.source.size, hashlib.sha256(self.source.tobytes()).digest()

    @property
    def name(self) -> str:
        """What a message calls the photo; "" for a picture that came from no file."""
        file = "" if isinstance(self.source, Image.Image) else f"image {self.source}"
        return f"{self.where}: {file}" if self.where and file else file


@dataclasses.dataclass(frozen=True)
class References:
    """The reference photos of P prompts, on the host.

    photos: those of each prompt, in its order. people: slots per prompt in encoded arrays; a prompt with fewer photos is padded.
    """

    photos: tuple[tuple[Photo, ...], ...]
    people: int

    @property
    def mask(self) -> Bool[np.ndarray, "P M"]:
        """True where there is a photo, False on the padding."""
        return np.arange(self.people) < np.array([[len(row)] for row in self.photos])

    @classmethod
    def of_prompts(cls, prompts: Sequence[Prompt], people: int) -> "References":
        """Name the photos of prompts; none is opened."""
        return cls(
            tuple(
                tuple(Photo(file, prompt.where) for file in prompt.references) for prompt in prompts
            ),
            people,
        )

    @classmethod
    def of_pixels(
        cls, images: Float[ArrayLike, "P M h w 3"], mask: Bool[ArrayLike, "P M"]
    ) -> "References":
        """Take photos from pixels in [-1, 1], rounded to 8 bits; mask is True on photos, which come first in their row."""
        rows = [
            tuple(Photo(Image.fromarray(to_uint8(image))) for image in row[shown])
            for row, shown in zip(np.asarray(images), np.asarray(mask, bool), strict=True)
        ]
        return cls(tuple(rows), np.shape(mask)[1])


@struct.dataclass
class ReferenceFaces:
    """The faces of P prompts' reference photos, zero on padding.

    embeddings: unit vectors. crops: see `photo_copy`. mask: True where there is a person.
    """

    embeddings: Float[Array, "P M E"]
    crops: Float[Array, "P M S S 3"]
    mask: Bool[Array, "P M"]


# ---- the protocol --------------------------------------------------------------------------------


@runtime_checkable
class Reward(Protocol):
    """A score of videos against reference photos and prompts; higher is better."""

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms that every video gets, "reward" among them."""

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of the terms that an evaluation reports beside the reward."""

    def encode_references(
        self,
        references: References,
        prompts: Sequence[str],
        video: tuple[int, int, int] | None = None,
    ) -> Any:
        """Turn photos and texts into a pytree of arrays with leading axis P; each photo is looked at once in a run.

        Args:
          references: the photos of the prompts.
          prompts: their texts.
          video: frames, height and width of the videos that will be scored, if not those of the configuration.

        Raises:
          UserError: a photo cannot be used; the message names it.
        """

    @property
    def motion_of_all_frames(self) -> bool:
        """Whether `motion` is that of all frames, also of those that `frames_read` leaves out."""

    def frames_read(self, total: int) -> np.ndarray | None:
        """Numbers of the frames, of a video of so many, that the reward depends on; None if on all.

        Videos of these frames alone have the same terms, except for `motion`.
        """

    def score(self, videos: Float[ArrayLike, "B F H W 3"], encoded: Any) -> Terms | Pending:
        """Score videos in [-1, 1] against encoded references, a row for each video; does not wait for the result."""


@runtime_checkable
class DifferentiableReward(Reward, Protocol):
    """A reward that is a function of arrays.

    state: arrays of its networks.
    """

    state: Any

    def apply(self, state: Any, videos: Float[ArrayLike, "B F H W 3"], encoded: Any) -> Terms:
        """Score videos as `score` does, with the networks' arrays as an argument."""

    def shapes(self, rows: int, people: int) -> Any:
        """Shapes of the encoded references of `rows` videos with room for so many people."""


def differentiable(reward: Reward) -> DifferentiableReward:
    """Return the reward as one that gradients can run through.

    Raises:
      UserError: it runs on the host.
    """
    if not isinstance(reward, DifferentiableReward):
        raise UserError(
            "this reward runs on the host, and no program can hold it; use the face reward of reward.faces"
        )
    return reward


def check_references(reward: Reward, prompts: Sequence[Prompt]) -> None:
    """Look at all photos of some prompts, each once, before work is spent on any of them.

    Raises:
      UserError: photos cannot be used; the one line names the first of them, each with its line in the CSV, and how many there are.
    """
    photos: dict[Hashable, tuple[Photo, str]] = {}
    for prompt, row in zip(prompts, References.of_prompts(prompts, 1).photos, strict=True):
        for photo in row:
            photos.setdefault(photo.key, (photo, prompt.text))
    refused: list[str] = []
    with progress("looking at photos", len(photos)) as update:
        for done, (photo, text) in enumerate(photos.values(), 1):
            try:
                reward.encode_references(References(((photo,),), 1), [text])
            except UserError as error:
                refused.append(str(error))
            update(done)
    if len(refused) == 1:
        raise UserError(refused[0])
    if refused:
        reasons = [message.rpartition("; ") for message in refused]  # each ends in what to do
        more = f" and {len(refused) - LISTED} more" if len(refused) > LISTED else ""
        shown = ", ".join(reason for reason, _, _ in reasons[:LISTED])
        raise UserError(
            f"{len(refused)} of {len(photos)} reference photos cannot be used: {shown}{more}; {reasons[0][2]}"
        )


# ---- frames --------------------------------------------------------------------------------------


def frame_numbers(frames: int, wanted: int) -> np.ndarray:
    """`wanted` evenly spaced frame numbers of `frames`, first and last among them; all of them for 0."""
    if wanted == 0 or wanted >= frames:
        return np.arange(frames)
    return np.round(np.linspace(0, frames - 1, wanted)).astype(int)
