"""Score videos of an evaluation: the training reward, the judge, motion and counts.

The judge is an embedder that is never used as reward. Sampled videos are scored on the devices,
sharded over the mesh by rows. Only their values are copied to the host.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import to_host
from jax_idgrpo.rewards.base import References, Reward, Terms, check_references
from jax_idgrpo.rewards.factory import make_judge, make_reward
from jax_idgrpo.rewards.host import Pending, collect

Scorer = Callable[[Float[Array, "B F H W 3"], Sequence[Prompt]], bootstrap.Scores]

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
"""Metric -> term of the judge."""
REPORTED = {"similarity": "embedder_identity"}
"""Term of the reward -> metric, where the names differ."""


def values(reward: Reward, terms: dict[str, Any], judged: dict[str, Any] | None) -> dict[str, Any]:
    """Select the metrics of videos from the terms of the reward and of the judge.

    The metrics are:

        reward             the training reward
        judge_identity     cosine between the judge's embeddings of photo and matched face, mean
                           over frames and people; a missing person counts as 0
        judge_minimum      judge_identity of the person with the lowest value
        judge_largest      judge_identity of the largest face only, as in single-person papers
        embedder_identity  judge_identity by the embedder of the reward; face rewards only
        faces              detected faces per requested person, at most 1
        count              share of frames with the right number of faces
        motion             mean change between neighbouring frames outside the faces

    Other terms that a reward reports, such as its separate dimensions, keep their names.

    Args:
      reward: the training reward.
      terms: terms of the reward by name.
      judged: terms of the judge by name; None without a judge.
    """
    reported = ("reward", "motion", *reward.reported)
    found = {REPORTED.get(name, name): terms[name] for name in reported if name in terms}
    if judged is not None:
        found |= {name: judged[term] for name, term in JUDGED.items()}
    return found


class BatchScorer:
    """Score batches of sampled videos by the reward and the judge of a configuration.

    Without `reward.faces` there is no judge, and its metrics are absent (see `values`).
    """

    def __init__(self, config: Config, batch: int, mesh: Mesh | None, prompts: Sequence[Prompt]):
        """Load the networks, and check the photos of the prompts before any video is made.

        Args:
          config: settings of the reward and the face networks.
          batch: videos per program call, a multiple of the mesh's batch shards.
          mesh: devices of the videos; the networks are replicated over them.
          prompts: prompts of the videos.

        Raises:
          UserError: a network or a photo cannot be used.
        """
        self.reward, self.judge = make_reward(config, mesh), make_judge(config, mesh)
        check_references(self.reward, prompts, self.judge)
        self.people, self.batch, self.mesh = config.data.max_people, batch, mesh

    def terms(
        self, reward: Reward, videos: Float[ArrayLike, "B F H W 3"], prompts: Sequence[Prompt]
    ) -> Terms | Pending:
        """Score a whole batch by one reward. The terms stay on the devices.

        Args:
          reward: the reward or the judge.
          videos: videos in [-1, 1].
          prompts: one prompt per video.
        """
        shown = {prompt.id: prompt for prompt in prompts}
        numbers = {name: number for number, name in enumerate(shown)}
        of_row = np.array([numbers[prompt.id] for prompt in prompts])
        texts = [prompt.text for prompt in shown.values()]
        photos = References.of_prompts(list(shown.values()), self.people)
        encoded = reward.encode_references(photos, texts, tuple(videos.shape[1:4]))
        rows = jax.tree.map(lambda leaf: np.asarray(leaf)[of_row], encoded)
        return reward.score(videos, self._placed(rows))

    def __call__(
        self, videos: Float[ArrayLike, "B F H W 3"], prompts: Sequence[Prompt]
    ) -> bootstrap.Scores:
        """Score the first videos of a batch, one per prompt (collective).

        Raises:
          UserError: a reference photo cannot be used.
        """
        filled = [prompts[min(n, len(prompts) - 1)] for n in range(self.batch)]
        if self.mesh is None:
            videos = jnp.asarray(videos)
        terms = self.terms(self.reward, videos, filled)
        judged = None if self.judge is None else to_host(self.terms(self.judge, videos, filled))
        found = values(self.reward, collect(terms), judged)
        return {
            name: np.asarray(value, np.float64)[: len(prompts)] for name, value in found.items()
        }

    def _placed(self, tree: Any) -> Any:
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return sharding.device_put_global(tree, sharding.batch_sharding(self.mesh))


def make_scorer(
    config: Config, batch: int, mesh: Mesh | None = None, prompts: Sequence[Prompt] = ()
) -> Scorer:
    """Make the scorer of a configuration.

    Args:
      config: settings of the reward and the face networks.
      batch: videos per program call, a multiple of the mesh's batch shards.
      mesh: devices of the videos; None uses the default device.
      prompts: prompts of the videos, whose photos are checked.

    Raises:
      UserError: a network or a photo cannot be used.
    """
    return BatchScorer(config, batch, mesh, prompts)
