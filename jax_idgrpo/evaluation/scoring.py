"""Values of videos in an evaluation: the training reward, the judge, motion and counts.

The judge is an embedder that never serves as reward.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.rewards.base import references
from jax_idgrpo.rewards.factory import make_reward, make_vlm

Scorer = Callable[[np.ndarray, Sequence[Prompt]], bootstrap.Scores]

JUDGED = {
    "judge_identity": "similarity",
    "faces": "faces_share",
    "motion": "motion",
    "judge_minimum": "similarity_min",
    "judge_largest": "largest_face",
    "count": "count_accuracy",
    "swapped": "swapped",
    "duplicated": "duplicated",
    "blended": "blended",
}
"""Value of a video -> the judge's term."""


def make_scorer(config: Config, batch: int, mesh: Mesh | None = None) -> Scorer:
    """A function from at most `batch` videos and their prompts to values of `statistics.LABELS`, one of each per video.

    reward: the training reward. judge_identity: cosine between the judge's embeddings of photo and matched face, a missing person
    counting 0, mean over frames and people; judge_minimum: that of the least alike person; judge_largest: of the largest face alone, as
    papers with one person measure. embedder_identity: as the judge's, by the embedder of the reward. faces: detected faces per person
    asked for, at most 1. count: share of frames with the right number. motion: mean change between neighbouring frames outside the faces.

    A vision-language reward has no embedder of its own; where it has several dimensions each is there by its name, and without
    `reward.faces` there is no judge, so that what it measures is left out.
    """
    vlm = make_vlm(config, mesh) if config.reward.vlm else None
    reward = vlm or make_reward(config.reward)
    judge = make_reward(config.reward, "judge") if config.reward.faces else None

    def score(videos: Float[np.ndarray, "B F H W 3"], prompts: Sequence[Prompt]) -> bootstrap.Scores:
        filled = np.minimum(np.arange(batch), len(prompts) - 1)     # one program, however many videos there are
        listed = [prompts[n] for n in filled]
        asked, texts = references(listed, config), [prompt.text for prompt in listed]
        watched = jnp.asarray(videos[filled])
        reward(watched, asked, texts)
        found = {"reward": reward.terms["reward"], "motion": reward.terms["motion"]}
        if vlm is None:
            found["embedder_identity"] = reward.terms["similarity"]
        elif len(vlm.settings.dimensions) > 1:
            found |= {name: vlm.terms[name] for name in vlm.settings.dimensions}
        if judge is not None:
            judge(watched, asked, texts)
            found |= {name: judge.terms[term] for name, term in JUDGED.items()}
        return {name: np.asarray(value, np.float64)[: len(prompts)] for name, value in found.items()}

    return score
