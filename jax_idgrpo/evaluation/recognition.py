"""Measure whether the people of videos are recognised among the references of all prompts.

A person of a video has the mean m of the judge's embeddings of its face (see
`rewards.recognition`). The references of all prompts are R photos, the same photo in several rows
counted once. The person is taken for the reference that is most alike to m. If the judge takes that
reference and the person's own for photos of one person, the person is taken for themselves: several
prompts may show somebody in different photos. Then

    recognised   share of people who are taken for themselves; chance is 1 / R
    identities   references that somebody is taken for, per reference asked for

A person without a face is taken for nobody. Similarity rises when all faces approach the average
face; `recognised` then falls to chance and `identities` to 1 / R. The second is the counterpart,
across prompts, of GIS in DisCo (arXiv 2510.01399).

`identities` is a ratio of two numbers that belong to no single video. Each video therefore gets a
share of it, so that the mean over videos is the ratio and prompts can be resampled: with a the
videos' shares of the references found, b those of the references asked for, and N videos,

    identities + (a - identities b) N / R

which is the linear approximation of a ratio (delta method).

Without references, UFA of DisCo is

    unique       share of videos in which no frame has two faces whose cosine exceeds
                 `evaluate.same`
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt, row_digests
from jax_idgrpo.evaluation.bootstrap import Scores
from jax_idgrpo.rewards.base import References, Reward
from jax_idgrpo.rewards.recognition import PeopleShown

NOBODY = -1
"""Index of a person without a face, and of padding."""

_COLUMN = re.compile(r"(asked|taken)_\d+")


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The references of all prompts, in the judge's embedding.

    Attributes:
      embeddings: unit vectors of R different photos.
      same: cosine above which two photos show one person.
      of_prompt: id of a prompt -> index of the reference of each of its people.
      people: M, slots per prompt.
      alike: cosine above which two faces of a frame count as one person twice.
    """

    embeddings: Float[np.ndarray, "R E"]
    same: float
    of_prompt: Mapping[int, Int[np.ndarray, " m"]]
    people: int
    alike: float

    @classmethod
    def make(
        cls, judge: Reward, prompts: Sequence[Prompt], people: int, same: float, alike: float
    ) -> "Gallery":
        """Encode the photos of all prompts. Equal embeddings are one reference.

        Args:
          judge: the judge, which encodes each photo once.
          prompts: prompts of an evaluation.
          people: maximum number of people of a prompt.
          same: cosine above which two photos show one person.
          alike: cosine above which two faces of a frame count as one person twice.

        Raises:
          UserError: a photo cannot be used.
        """
        photos = References.of_prompts(prompts, people)
        encoded = judge.encode_references(photos, [prompt.text for prompt in prompts])
        embeddings, index = np.unique(
            np.asarray(encoded.embeddings)[photos.mask], axis=0, return_inverse=True
        )
        ends = np.cumsum(photos.mask.sum(1))[:-1]
        rows = np.split(index.ravel(), ends)
        return cls(
            embeddings,
            same,
            {prompt.id: row for prompt, row in zip(prompts, rows, strict=True)},
            people,
            alike,
        )

    def columns(self, prompts: Sequence[Prompt], shown: PeopleShown) -> dict[str, np.ndarray]:
        """Return `unique`, who was asked for and who each person is taken for, by video.

        The other names are `asked_0`, `taken_0`, `asked_1` and so on; the values are indices of
        references, or `NOBODY`.

        Args:
          prompts: one prompt per video.
          shown: the faces of the videos on the host, padded at the end.
        """
        count = len(prompts)
        alike = np.asarray(shown.total)[:count] @ self.embeddings.T
        found = np.asarray(shown.frames)[:count] > 0
        nearest = alike.argmax(-1)
        asked = np.full_like(nearest, NOBODY)
        for n, prompt in enumerate(prompts):
            row = self.of_prompt[prompt.id]
            asked[n, : len(row)] = row
        # Padding has no face, so that its index does not matter.
        cosine = np.sum(self.embeddings[nearest] * self.embeddings[asked], -1)
        taken = np.where(found, np.where(cosine > self.same, asked, nearest), NOBODY)
        unique = np.asarray(shown.alike)[:count] <= self.alike
        return {"unique": unique.astype(np.float64)} | {
            f"{name}_{m}": values[:, m].astype(np.float64)
            for m in range(self.people)
            for name, values in (("asked", asked), ("taken", taken))
        }


def gallery_facts(config: Config, prompts: Sequence[Prompt]) -> str:
    """Hash what decides who a person is taken for, photos and settings; "" without a judge.

    Args:
      config: says whether there is a judge.
      prompts: prompts of an evaluation.
    """
    if not config.judged:
        return ""
    facts = [digest.partition("-")[2] for digest in row_digests(prompts)]
    facts.append(str(config.evaluate.same))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def _indices(scores: Scores, name: str) -> Int[np.ndarray, "N M"] | None:
    columns = [values for key, values in scores.items() if re.fullmatch(rf"{name}_\d+", key)]
    return np.stack(columns, 1).astype(int) if columns else None


def references_asked(scores: Scores) -> int:
    """Count the different references of the videos' prompts; 0 without a judge."""
    asked = _indices(scores, "asked")
    return 0 if asked is None else len(np.unique(asked[asked != NOBODY]))


def chance_note(scores: Scores) -> str:
    """Return the number of references and what chance recognises, or "" without a judge."""
    count = references_asked(scores)
    if not count:
        return ""
    return f"; people are recognised among {count} references, by chance {1 / count:.3f}"


def summarised(scores: Scores, whole: bool = True) -> dict[str, np.ndarray]:
    """Replace the columns of `Gallery.columns` by the metrics `recognised` and `identities`.

    Scores without such columns, which had no judge, are returned as they are.

    Args:
      scores: metric -> one value per video.
      whole: the videos are all of an evaluation; otherwise `identities` is left out.
    """
    kept = {name: values for name, values in scores.items() if not _COLUMN.fullmatch(name)}
    asked, taken = _indices(scores, "asked"), _indices(scores, "taken")
    if asked is None or taken is None:
        return kept
    people = asked != NOBODY
    right = (asked == taken) & people
    kept["recognised"] = right.sum(1) / np.maximum(people.sum(1), 1)
    if whole:
        kept["identities"] = _identities(asked, taken)
    return kept


def _identities(
    asked: Int[np.ndarray, "N M"], taken: Int[np.ndarray, "N M"]
) -> Float[np.ndarray, " N"]:
    """Compute the share of every video in `identities` (see the module's docstring)."""
    found, wanted = _shares(taken), _shares(asked)
    ratio = found.sum() / wanted.sum()
    return ratio + (found - ratio * wanted) * len(asked) / wanted.sum()


def _shares(people: Int[np.ndarray, "N M"]) -> Float[np.ndarray, " N"]:
    """Divide every occurring index equally among its occurrences, and sum over each video."""
    seen = people != NOBODY
    counts = np.bincount(people[seen], minlength=1)
    return np.where(seen, 1 / np.maximum(counts[np.where(seen, people, 0)], 1), 0.0).sum(1)
