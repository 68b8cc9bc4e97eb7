"""Values of videos in an evaluation: the training reward, the judge, motion and counts.

The judge is an embedder that never serves as reward. Sampled videos are scored where they are,
their rows divided over the mesh, and only their values are fetched.
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
"""Value of a video -> the judge's term."""
REPORTED = {"similarity": "embedder_identity"}
"""Term of the reward -> value of a video, where the names differ."""


def values(reward: Reward, terms: dict[str, Any], judged: dict[str, Any] | None) -> dict[str, Any]:
    """Choose the values of videos from the terms of the reward and of the judge, None without one.

    reward: the training reward.
    judge_identity: cosine between the judge's embeddings of photo and matched face, mean over
        frames and people; a missing person counts 0.
    judge_minimum: that of the least alike person.
    judge_largest: that of the largest face alone, as papers with one person measure.
    embedder_identity: as the judge's, by the embedder of the reward.
    faces: detected faces per person asked for, at most 1.
    count: share of frames with the right number of faces.
    motion: mean change between neighbouring frames outside the faces.

    Only a face reward has an embedder. Other terms that a reward reports, such as each of several
    dimensions, keep their names.
    """
    reported = ("reward", "motion", *reward.reported)
    found = {REPORTED.get(name, name): terms[name] for name in reported if name in terms}
    if judged is not None:
        found |= {name: judged[term] for name, term in JUDGED.items()}
    return found


def check_photos(rewards: Sequence[Reward | None], prompts: Sequence[Prompt]) -> None:
    """Let every reward look at the photos of some prompts.

    Raises:
      UserError: a photo cannot be used.
    """
    for reward in rewards:
        if reward is not None:
            check_references(reward, prompts)


class BatchScorer:
    """Scores batches of sampled videos by the reward and the judge of a configuration.

    Without `reward.faces` there is no judge, and what it measures is left out (see `values`).
    """

    def __init__(self, config: Config, batch: int, mesh: Mesh | None, prompts: Sequence[Prompt]):
        """Load the networks, and look at the photos of the prompts before any video is made.

        Args:
          config: names the reward and the face networks.
          batch: videos of one program call; a number that the mesh divides.
          mesh: where the videos are; the networks are on each of its devices.
          prompts: those of the videos.

        Raises:
          UserError: a network or a photo cannot be used.
        """
        self.reward, self.judge = make_reward(config, mesh), make_judge(config, mesh)
        check_photos((self.reward, self.judge), prompts)
        self.people, self.batch, self.mesh = config.data.max_people, batch, mesh

    def terms(
        self, reward: Reward, videos: Float[ArrayLike, "B F H W 3"], prompts: Sequence[Prompt]
    ) -> Terms | Pending:
        """Score a whole batch by one reward; the terms stay on the devices."""
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
        """Score the first videos of a batch, one for each prompt; all processes call it together.

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
    """Make the scorer of a configuration; arguments and errors are those of `BatchScorer`."""
    return BatchScorer(config, batch, mesh, prompts)
