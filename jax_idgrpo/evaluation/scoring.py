"""Values of videos in an evaluation: the training reward, the judge, motion and counts.

The judge is an embedder that never serves as reward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.parallel import sharding
from jax_idgrpo.rewards.base import References, Reward, check_references
from jax_idgrpo.rewards.factory import make_judge, make_reward
from jax_idgrpo.rewards.host import collect

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
REPORTED = {"similarity": "embedder_identity"}
"""Term of the reward -> value of a video, where the names differ."""


def make_scorer(
    config: Config, batch: int, mesh: Mesh | None = None, prompts: Sequence[Prompt] = ()
) -> Scorer:
    """A function from at most `batch` videos and their prompts to values of `statistics.LABELS`, one of each per video.

    reward: the training reward. judge_identity: cosine between the judge's embeddings of photo and matched face, a missing person
    counting 0, mean over frames and people; judge_minimum: that of the least alike person; judge_largest: of the largest face alone, as
    papers with one person measure. embedder_identity: as the judge's, by the embedder of the reward. faces: detected faces per person
    asked for, at most 1. count: share of frames with the right number. motion: mean change between neighbouring frames outside the faces.

    Only a face reward has an embedder. Other terms that a reward reports, such as each of several dimensions, are there by their names.
    Without `reward.faces` there is no judge, so that what it measures is left out.

    Args:
      config: names the reward and the face networks.
      batch: videos of one program call.
      mesh: where videos are scored, their rows divided; `batch` is then a number that it divides.
      prompts: those of the videos; their photos are looked at before any video is made.

    Raises:
      UserError: a network or a photo cannot be used.
    """
    reward, judge = make_reward(config, mesh), make_judge(config, mesh)
    for looking in (reward, judge) if judge is not None else (reward,):
        check_references(looking, prompts)

    def placed(tree: Any) -> Any:
        return jax.tree.map(jnp.asarray, tree) if mesh is None else sharding.device_put_global(tree, sharding.batch_sharding(mesh))

    def score(videos: Float[np.ndarray, "B F H W 3"], prompts: Sequence[Prompt]) -> bootstrap.Scores:
        filled = np.minimum(np.arange(batch), len(prompts) - 1)     # one program, however many videos there are
        listed = [prompts[n] for n in filled]
        photos, texts = References.of_prompts(listed, config.data.max_people), [prompt.text for prompt in listed]
        watched = placed(videos[filled])

        def terms_of(reward: Reward) -> dict[str, np.ndarray]:
            return collect(reward.score(watched, placed(reward.encode_references(photos, texts, videos.shape[1:4]))))

        terms = terms_of(reward)
        found = {REPORTED.get(name, name): terms[name] for name in ("reward", "motion", *reward.reported) if name in terms}
        if judge is not None:
            judged = terms_of(judge)
            found |= {name: judged[term] for name, term in JUDGED.items()}
        return {name: np.asarray(value, np.float64)[: len(prompts)] for name, value in found.items()}

    return score
