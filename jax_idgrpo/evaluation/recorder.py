"""Record what was seen in every scored video: faces as pictures, a small copy, and `faces.json`.

Each video gets a folder below `videos/` of the report, which is complete or absent:

    clip.mp4, poster.jpg   a small copy that browsers play
    person-1.jpg, ...      the reference photos
    face-FRAME-K.jpg       the faces of some evenly spaced frames
    faces.json             similarity and state of every person in every frame

`faces.json` holds the video's line of the scores and its key, so a video with unchanged inputs is
not scored again. Only the pictures of one block of frames are in memory.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from jax_idgrpo.config import Config
from jax_idgrpo.data.photos import load_reference
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import Clip, preview
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import sightings
from jax_idgrpo.evaluation.sightings import STATES, Follower, Sightings
from jax_idgrpo.evaluation.streaming import ClipScorer, Seen
from jax_idgrpo.rewards.base import frame_numbers
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.faces import load_settings, load_stack
from jax_idgrpo.rewards.factory import copy_calibration, identity_constants

FACES = "faces.json"
VIDEOS = "videos"
SHOWN = 12  # frames of a video whose faces are shown; a shorter video is shown whole
FACE_SIDE, PHOTO_SIDE, CLIP_SIDE = 96, 240, 480  # sides of the pictures in pixels
CONTEXT = 1.5  # side of the picture of a face, in units of its box

Measure = Callable[[Prompt, Sightings], Mapping[str, float]]


def folder_name(file: str) -> str:
    """Return the folder of a video: letters and digits of its name, and a hash to tell it apart."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", file).strip("-")[:40]
    return f"{plain}-{hashlib.sha256(file.encode()).hexdigest()[:6]}".lstrip("-")


def recorded(report: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the lines of the videos that a report holds, if their keys are among `keys`."""
    wanted, lines = set(keys), []
    for path in sorted((report / VIDEOS).glob(f"*/{FACES}")):
        try:
            line = json.loads(path.read_text())["line"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if line.get("key") in wanted and path.parent.name == folder_name(str(line["file"])):
            lines.append(line)
    return lines


def photo_name(photo: object, base: Path) -> str:
    """Return the name of a photo for reports: relative to `base`, else its last part."""
    name = os.path.relpath(str(photo), base)
    return Path(str(photo)).name if name.startswith("..") else Path(name).as_posix()


def _jpeg(picture: Image.Image, path: Path) -> None:
    picture.save(path, quality=85)


def _face(frame: UInt8[np.ndarray, "H W 3"], box: Float[np.ndarray, "4"]) -> Image.Image:
    """Cut the square about a face, within the frame."""
    height, width = frame.shape[:2]
    side = min(CONTEXT * float(max(box[2] - box[0], box[3] - box[1], 8)), height, width)
    middle = (box[:2] + box[2:] + 1) / 2
    x, y = np.clip(middle - side / 2, 0, np.array([width, height]) - side).tolist()
    picture = Image.fromarray(frame)
    size = (FACE_SIDE, FACE_SIDE)
    return picture.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))


class Recorder:
    """Score videos by a `ClipScorer`, and record what was seen in them."""

    def __init__(
        self,
        config: Config,
        scorer: ClipScorer,
        folder: Path,
        base: Path,
        measure: Measure = lambda prompt, found: {},
    ):
        """Load the embedder, unless the reward has it already.

        Args:
          config: settings of the reward.
          scorer: scores the videos.
          folder: folder of the report.
          base: folder that the names of photos are relative to.
          measure: further values of a video.

        Raises:
          UserError: there is no judge, or the embedder cannot be used.
        """
        if scorer.judge is None:
            raise UserError(
                "--report shows faces, and there are no face networks for these videos; pass "
                "--reward.faces photographs, or a folder of face networks"
            )
        self._scorer, self._judge = scorer, scorer.judge
        self._folder, self._base, self._measure = folder / VIDEOS, base, measure
        if isinstance(scorer.reward, FaceReward):
            self._embedder = scorer.reward
        else:
            place = config.reward.folder()
            stack = load_stack(place, "embedder")
            cosines = load_settings(place, "embedder")
            constants = identity_constants(config.reward, cosines, copy_calibration(stack))
            self._embedder = FaceReward(stack, constants)
        self._fps = config.video.fps

    def __call__(self, clip: Clip, prompt: Prompt) -> tuple[dict[str, float], dict[str, Any]]:
        """Score a video and write its pictures beside its folder.

        Returns:
          Its values, and the content of `faces.json` for `keep`.

        Raises:
          UserError: the video or a photo cannot be used.
        """
        aside = self._aside(clip.path)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        total = len(clip.numbers)
        shown, middle = set(frame_numbers(total, SHOWN).tolist()), total // 2
        encoded = [
            self._scorer.encoded(reward, clip, prompt) for reward in (self._embedder, self._judge)
        ]
        follower = Follower(self._embedder, self._judge.config, *encoded)
        size, rate = (clip.height, clip.width), clip.rate or self._fps
        with preview(aside / "clip.mp4", size, rate, CLIP_SIDE) as add:

            def observe(first: int, frames: UInt8[np.ndarray, "t H W 3"], seen: Seen) -> None:
                follower.show(frames, seen)
                for number, frame in enumerate(frames, first):
                    add(frame)
                    if number == middle:
                        poster = Image.fromarray(frame)
                        poster.thumbnail((CLIP_SIDE, CLIP_SIDE))
                        _jpeg(poster, aside / "poster.jpg")
                    for face in np.flatnonzero(seen.mask[0, number - first] & (number in shown)):
                        picture = _face(frame, np.asarray(seen.boxes[0, number - first, face]))
                        _jpeg(picture, aside / f"face-{number:05d}-{face}.jpg")

            values = self._scorer(clip, prompt, observe)
        found = follower.sightings()
        people = sightings.people_rows(found)
        for number, (person, photo) in enumerate(zip(people, prompt.references, strict=True), 1):
            picture = load_reference(photo)
            picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
            _jpeg(picture, aside / f"person-{number}.jpg")
            person["photo"] = photo_name(photo, self._base)
        means = [person["similarity_mean"] for person in people]
        values = {
            "identity": float(np.mean(means)),
            "identity_minimum": float(min(means)),
            **self._measure(prompt, found),
            **values,
        }
        least = self._embedder.config.null_similarity
        return values, {"least": least, **_details(found, people, sorted(shown), rate)}

    def keep(self, file: Path, line: Mapping[str, Any], details: Mapping[str, Any]) -> None:
        """Finish the folder of a video.

        Args:
          file: the video.
          line: its line of the scores, with its key.
          details: what the recorder returned for it.
        """
        aside, folder = self._aside(file), self._folder / folder_name(file.name)
        (aside / FACES).write_text(json.dumps({"line": line, **details}))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)

    def discard(self, file: Path) -> None:
        """Remove what was written of a video that could not be scored."""
        shutil.rmtree(self._aside(file), ignore_errors=True)

    def _aside(self, file: Path) -> Path:
        return self._folder / f".{folder_name(file.name)}"


def _rounded(values: Float[np.ndarray, " T"]) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def _details(
    found: Sightings, people: list[dict[str, Any]], shown: list[int], rate: float
) -> dict[str, Any]:
    """Describe a video for `faces.json`.

    Args:
      found: its faces and people.
      people: summary of every person, which is completed by the series of all frames.
      shown: numbers of the frames whose faces are pictures.
      rate: frames per second.
    """
    own, judged = sightings.similarities(found), sightings.similarities(found, judge=True)
    state, followed = sightings.states(found), sightings.tracks_of_faces(found)
    others = []
    for m, person in enumerate(people):
        person["similarity"], person["judge"] = _rounded(own[:, m]), _rounded(judged[:, m])
        person["state"] = "".join("-am"[value] for value in state[:, m])
        person["tracks"] = sightings.runs(followed[:, m])
        person["shown"] = [_cell(found, state, number, m) for number in shown]
    for number in shown:
        for face in np.flatnonzero(found.mask[number]):
            if face not in found.face[number]:
                nearest = int(np.argmax(found.cosine[number, :, face]))
                others.append(
                    {
                        "frame": number,
                        "image": f"face-{number:05d}-{face}.jpg",
                        "person": nearest + 1,
                        "similarity": round(float(found.cosine[number, nearest, face]), 4),
                    }
                )
    return {
        "frames": len(found.mask),
        "rate": round(rate, 3),
        "faces": found.mask.sum(1).tolist(),
        "people": people,
        "others": others,
    }


def _cell(found: Sightings, state: np.ndarray, number: int, m: int) -> dict[str, Any]:
    """Describe a person in one frame that is shown."""
    cell = {"frame": number, "state": STATES[state[number, m]]}
    face = int(found.face[number, m])
    if state[number, m]:
        return cell | {
            "image": f"face-{number:05d}-{face}.jpg",
            "similarity": round(float(found.cosine[number, m, face]), 4),
            "judge": round(float(found.judge_cosine[number, m, face]), 4),
            "judged": bool(found.judge_face[number, m] == face),
        }
    free = found.mask[number] & ~np.isin(np.arange(found.mask.shape[1]), found.face[number])
    if not free.any():
        return cell
    best = float(np.max(np.where(free, found.cosine[number, m], -1.0)))
    return cell | {"nearest": round(best, 4)}
