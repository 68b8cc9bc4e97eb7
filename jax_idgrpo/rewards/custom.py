"""Compute a reward with a user's function.

`reward.custom` names the function as "package.module:function" or "file.py:function":

    function(videos, prompts, references) -> rewards

    videos       float32 [B, F, H, W, 3] in [-1, 1]
    prompts      B texts
    references   for each video the photos of its people in the order of the prompt, as upright RGB
                 `PIL.Image`s at their own size
    rewards      [B] numbers, higher is better; or a dict of [B] with the key "reward", whose other
                 values are logged under their names

Arrays of numpy, JAX or PyTorch are accepted. The function runs on the host in a thread beside the
accelerator. It receives the videos of one program call that this process holds. Calls do not
overlap.

A call that raises is repeated for each video separately, so an exception affects only the videos
that cannot be scored. A call that takes longer than `reward.custom_timeout` seconds, or returns
another shape, fails all videos of the call. NaN fails only its own video. The reward of a failed
video is NaN, and the video is excluded from the update.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float, Int
from PIL import Image

from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards.base import NumberedRows, Photo, References
from jax_idgrpo.rewards.host import HostPool, Pending, Scored, in_time

HELD = 16  # decoded photos that are held in memory

Function = Callable[[np.ndarray, list[str], list[list[Image.Image]]], Any]


class Unusable(Exception):
    """The function returned something that is not a reward of the videos."""


class CustomReward:
    """Compute the reward with a function on the host.

    Attributes:
      reported: names of the terms that the function has returned so far, without the reward.
    """

    term_names = ("reward",)
    motion_of_all_frames = False

    def __init__(self, function: Function, timeout: float = 600.0):
        """Wrap a function as a reward.

        Args:
          function: the user's function (see the module).
          timeout: seconds after which a call is abandoned; its thread continues, and its result is
            discarded.
        """
        self._function, self._timeout = function, timeout
        self.reported: tuple[str, ...] = ()
        self._pool = HostPool(workers=1)
        self._rows = NumberedRows()
        self._open = functools.lru_cache(maxsize=HELD)(_read)

    def encode_references(
        self,
        references: References,
        prompts: Sequence[str],
        video: tuple[int, int, int] | None = None,
    ) -> Int[np.ndarray, " P"]:
        """Return indices under which texts and photos are stored; no photo is opened.

        Args:
          references: the photos of the prompts.
          prompts: the texts of the prompts.
          video: unused.
        """
        return self._rows.add(references, prompts)

    def frames_read(self, total: int) -> np.ndarray | None:
        """Return None: the function receives all frames."""
        return None

    def score(
        self, videos: Float[ArrayLike, "B F H W 3"], encoded: Int[ArrayLike, " B"]
    ) -> Pending:
        """Submit videos for scoring without waiting for their rewards."""
        return self._pool.submit_together(self._scores, (videos, encoded), "reward.custom")

    def _scores(
        self, videos: Float[np.ndarray, "B F H W 3"], numbers: Int[np.ndarray, " B"]
    ) -> list[Scored]:
        """Return the terms of every video, or the reason why it has none."""
        try:
            return self._call(videos, numbers)
        except (Unusable, TimeoutError) as error:
            return [error] * len(videos)
        except Exception as error:  # whatever a user's function raises
            if len(videos) == 1:
                return [error]
            return [
                self._scores(videos[n : n + 1], numbers[n : n + 1])[0] for n in range(len(videos))
            ]

    def _call(
        self, videos: Float[np.ndarray, "B F H W 3"], numbers: Int[np.ndarray, " B"]
    ) -> list[Scored]:
        rows = [self._rows[number] for number in numbers]
        photos = [[self._open(photo) for photo in row.photos] for row in rows]
        given = videos.astype(np.float32), [row.text for row in rows], photos
        found = in_time(lambda: self._function(*given), self._timeout, "reward.custom")
        named = found if isinstance(found, Mapping) else {"reward": found}
        if "reward" not in named:
            raise Unusable(
                f'a dict without "reward", but with {", ".join(map(str, named)) or "nothing"}'
            )
        terms: dict[str, np.ndarray] = {}
        for name, value in named.items():
            try:
                terms[str(name)] = np.asarray(value, np.float32)
            except (TypeError, ValueError):
                raise Unusable(
                    f"{name} is no array of numbers but {type(value).__name__}"
                ) from None
            if terms[str(name)].shape != (len(videos),):
                raise Unusable(
                    f"{name} has shape {terms[str(name)].shape} and not {(len(videos),)}"
                )
        self.reported = tuple(
            dict.fromkeys([*self.reported, *(name for name in terms if name != "reward")])
        )
        return [
            {name: float(value[n]) for name, value in terms.items()}
            if np.isfinite(terms["reward"][n])
            else Unusable(f"the reward is {terms['reward'][n]}")
            for n in range(len(videos))
        ]


def _read(photo: Photo) -> Image.Image:
    """Decode a photo; its pixels are not held by the photo itself."""
    try:
        return photo.open()
    finally:
        photo.close()


def load_function(name: str) -> Function:
    """Import the function that `reward.custom` names.

    Modules are also searched in the current folder.

    Raises:
      UserError: the function does not exist, or the file cannot be imported.
    """
    where, _, attribute = name.rpartition(":")
    what = f"reward.custom {name}"
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    except FileNotFoundError:
        raise UserError(
            f"{what}: no such file; name a Python file, relative to the current folder"
        ) from None
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what}: no module {error.name!r}; install it, or start in the folder that holds it"
        ) from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{what}: cannot be imported ({reason}); correct the file") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{what}: {where} has no function {attribute}; define it there")
    return function


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.absolute()))  # so that it can import files beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
