"""Compare the reference photos of a prompt with one another before a run.

Photos of one person in two slots ask for a person twice. People whom the network hardly tells apart
can be exchanged or merged without loss of reward. Both are warnings, because members of a family
may look alike.
"""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import PurePath

import numpy as np

from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.rewards.base import References, Reward
from jax_idgrpo.rewards.deepface import HostFaceReward
from jax_idgrpo.rewards.face_reward import FaceReward

LISTED = 3  # examples in a warning
CLOSE = 0.6  # share of the way from similarity_low to similarity_high at which people are too alike


def warn_of_lookalikes(reward: Reward, prompts: Sequence[Prompt]) -> None:
    """Warn of prompts with two photos of one person, and of people that look too much alike.

    Two photos show one person if their cosine is above `reward.similarity_high`. People are too much
    alike above `CLOSE` of the way from `reward.similarity_low` to `similarity_high`. Photos of equal
    content are left to `load_prompts`. Each photo was encoded by `check_references`, so none is
    opened here. Rewards without face networks have no warning.

    Args:
      reward: the reward of the run.
      prompts: all prompts of the run.
    """
    if not isinstance(reward, FaceReward | HostFaceReward):
        return
    low, high = reward.config.low, reward.config.high
    close = low + CLOSE * (high - low)
    same: list[tuple[str, str]] = []
    alike: list[tuple[str, str]] = []
    for prompt in prompts:
        for names, cosine in _pairs(reward, prompt):
            if cosine > close:
                found = same if cosine > high else alike
                found.append((prompt.where, f"{names} ({cosine:.2f})"))
    if same:
        warnings.warn(
            f"{_number(same)} of a prompt seem to show one person twice (cosine above "
            f"{high:.2f}): {_examples(same)}; name one photo per person",
            stacklevel=2,
        )
    if alike:
        warnings.warn(
            f"{_number(alike)} of a prompt show people that the face network hardly tells apart "
            f"(cosine above {close:.2f}): {_examples(alike)}; the reward hardly notices when the two are "
            "exchanged; other photos, or another embedder, may separate them",
            stacklevel=2,
        )


def _pairs(reward: FaceReward | HostFaceReward, prompt: Prompt) -> Iterator[tuple[str, float]]:
    """List every two photos of a prompt with different content, and their cosine."""
    count = len(prompt.references)
    if count < 2:
        return
    encoded = reward.encode_references(References.of_prompts([prompt], count), [prompt.text])
    cosines = np.asarray(encoded.embeddings[0]) @ np.asarray(encoded.embeddings[0]).T
    contents = prompt.digests or prompt.references
    for one, other in itertools.combinations(range(count), 2):
        if contents[one] != contents[other]:
            names = (PurePath(str(prompt.references[number])).name for number in (one, other))
            yield " and ".join(names), float(cosines[one, other])


def _number(found: Sequence[object]) -> str:
    return "two photos" if len(found) == 1 else f"{len(found)} pairs of photos"


def _examples(found: Sequence[tuple[str, str]]) -> str:
    """List the first pairs with their lines. The file of the prompts is named once."""
    texts: list[str] = []
    for where, names in found[:LISTED]:
        line = where.rpartition(", ")[2] if texts else where
        texts.append(f"{line}: {names}" if line else names)
    more = f", and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return ", ".join(texts) + more
