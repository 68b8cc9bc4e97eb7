"""Recognise people across clips, and choose the reference photos of every clip.

Mean embeddings are joined by average linkage: two groups join while the mean cosine between them
stays above a bound, so a chain of likenesses does not join strangers. The photo of a person comes
from another clip wherever there is one, so that a model cannot learn to copy the frame; this is the
random reference of ID-Animator (arXiv 2404.15275).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.cluster.hierarchy
from jaxtyping import Float, Int

MORE = 4  # further photos of a person


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A photo that can serve as reference.

    Attributes:
      clip: number of its clip.
      path: its file, relative to the output folder.
      quality: see `faces.Shot`.
      yaw: degrees.
    """

    clip: int
    path: str
    quality: float
    yaw: float


def group(embeddings: Float[np.ndarray, "N E"], same: float) -> Int[np.ndarray, " N"]:
    """Return the identity of every embedding, numbered from 0 in order of appearance.

    Args:
      embeddings: unit vectors.
      same: least mean cosine between two groups that are joined.
    """
    if len(embeddings) < 2:
        return np.zeros(len(embeddings), np.int64)
    tree = scipy.cluster.hierarchy.linkage(embeddings, method="average", metric="cosine")
    labels = scipy.cluster.hierarchy.fcluster(tree, 1 - same, criterion="distance")
    numbers: dict[int, int] = {}
    return np.asarray([numbers.setdefault(int(label), len(numbers)) for label in labels])


def choose_photos(
    candidates: Sequence[Candidate], clip: int
) -> tuple[Candidate, tuple[Candidate, ...]]:
    """Choose the reference photo of a person for a clip, and further photos.

    Photos of other clips come first. The reference is the best of them. Further photos are spread
    in yaw.

    Args:
      candidates: photos of the person, at least one.
      clip: number of the clip.
    """
    others = [photo for photo in candidates if photo.clip != clip] or list(candidates)
    ranked = sorted(others, key=lambda photo: (-photo.quality, photo.path))
    chosen, rest = ranked[:1], ranked[1:]
    while rest and len(chosen) <= MORE:
        best = max(rest, key=lambda photo: min(abs(photo.yaw - other.yaw) for other in chosen))
        chosen.append(best)
        rest.remove(best)
    return chosen[0], tuple(chosen[1:])
