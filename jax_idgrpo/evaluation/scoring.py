"""Score videos of an evaluation: the training reward, the judge, motion and counts.

The judge is an embedder that is never used as reward. Sampled videos are scored on the devices,
sharded over the mesh by rows. Only their values are copied to the host.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, PyTree

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.evaluation.recognition import Gallery
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import to_host
from jax_idgrpo.rewards.base import Consumer, References, Reward, Terms, check_references
from jax_idgrpo.rewards.factory import make_assigner, make_judge, make_reward
from jax_idgrpo.rewards.host import Pending, collect
from jax_idgrpo.rewards.recognition import Assigner, judge_people
from jax_idgrpo.rewards.turns import BINS

Value = TypeVar("Value")

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
    "copied": "copied",
    "stalled": "stalled",
    "placed": "placed",
    "turning": "turning",
    **{f"{kind}_{name}": f"{kind}_{name}" for name in BINS for kind in ("faces", "similarity")},
}
"""Metric -> term of the judge.

It has `placed` only for prompts with the column `places`, and head turns only with a detector whose
landmarks show them.
"""
FURTHER = (
    "missing",
    "switched",
    "area",
    "extra",
    "apart",
    "detail",
    "faces_asked",
    "faces_found",
    "faces_seen",
    "mimr",
    "id_conf",
    "unique_faces",
)
"""Terms of the judge that a report of videos lists besides `JUDGED`."""
REPORTED = {"similarity": "embedder_identity"}
"""Term of the reward -> metric, where the names differ."""


def values(
    reward: Reward, terms: Mapping[str, Value], judged: Mapping[str, Value] | None
) -> dict[str, Value]:
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
        placed             people who are in their places (`rewards.placed`); NaN without places
        turning            how far heads turn; also shares of faces and their similarity by yaw
                           (`rewards.turns`)

    `recognition` adds the metrics of who is recognised, and `hacking` that of hacked videos. Other terms that a reward reports, such as
    its separate dimensions, keep their names.

    Args:
      reward: the training reward.
      terms: terms of the reward by name.
      judged: terms of the judge by name; None without a judge.
    """
    reported = ("reward", "motion", *reward.reported)
    found = {REPORTED.get(name, name): terms[name] for name in reported if name in terms}
    if judged is not None:
        found |= {name: judged[term] for name, term in JUDGED.items() if term in judged}
    return found


class RewardScorer:
    """Score batches of sampled videos by the reward of a configuration alone."""

    def __init__(self, config: Config, batch: int, mesh: Mesh | None, prompts: Sequence[Prompt]):
        """Load the reward, and check the photos of the prompts before any video is made.

        Args:
          config: settings of the reward.
          batch: videos per program call, a multiple of the mesh's batch shards.
          mesh: devices of the videos.
          prompts: prompts of the videos.

        Raises:
          UserError: a network or a photo cannot be used.
        """
        self.reward = make_reward(config, mesh)
        self.people, self.batch, self.mesh = config.data.max_people, batch, mesh
        check_references(self.reward, prompts)

    def __call__(
        self, videos: Float[ArrayLike, "B F H W 3"], prompts: Sequence[Prompt]
    ) -> Float[np.ndarray, " n"]:
        """Return the rewards of the first videos of a batch, one per prompt (collective)."""
        filled = [prompts[min(n, len(prompts) - 1)] for n in range(self.batch)]
        encoded = _encoded(self.reward, videos, filled, self.people, self.mesh)
        found = collect(self.reward.score(videos, encoded))["reward"]
        return np.asarray(found, np.float64)[: len(prompts)]


class BatchScorer:
    """Score batches of sampled videos by the reward and the judge of a configuration.

    Without `reward.faces` there is no judge, and its metrics are absent (see `values`).
    """

    def __init__(
        self,
        config: Config,
        batch: int,
        mesh: Mesh | None,
        prompts: Sequence[Prompt],
        consume: Consumer | None = None,
        reward: Reward | None = None,
    ):
        """Load the networks, and check the photos of the prompts before any video is made.

        Args:
          config: settings of the reward and the face networks.
          batch: videos per program call, a multiple of the mesh's batch shards.
          mesh: devices of the videos; the networks are replicated over them.
          prompts: prompts of the videos. Their photos are the references among which people are
            recognised; without prompts this is not measured.
          consume: gets every decoded photo as well.
          reward: the reward of the configuration, if it is loaded already.

        Raises:
          UserError: a network or a photo cannot be used.
        """
        self.reward = make_reward(config, mesh) if reward is None else reward
        self.judge = make_judge(config, mesh)
        self.people, self.batch, self.mesh = config.data.max_people, batch, mesh
        self.gallery = self.assigner = None
        if self.judge is None or not prompts:
            check_references(self.reward, prompts, consume=consume)
        else:
            self.assigner = make_assigner(config, self.reward, mesh)
            check_references(self.reward, prompts, [self.judge, self.assigner], consume)
            self.gallery = Gallery.make(
                self.judge,
                prompts,
                self.people,
                self.judge.config.high,
                config.evaluate.same,
            )

    def terms(
        self, reward: Reward, videos: Float[ArrayLike, "B F H W 3"], prompts: Sequence[Prompt]
    ) -> Terms | Pending:
        """Score a whole batch by one reward. The terms stay on the devices.

        Args:
          reward: the reward or the judge.
          videos: videos in [-1, 1].
          prompts: one prompt per video.
        """
        return reward.score(videos, self._encoded(reward, videos, prompts))

    def _encoded(
        self, reward: Reward, videos: Float[ArrayLike, "B F H W 3"], prompts: Sequence[Prompt]
    ) -> PyTree:
        return _encoded(reward, videos, prompts, self.people, self.mesh)

    def __call__(
        self, videos: Float[ArrayLike, "B F H W 3"], prompts: Sequence[Prompt]
    ) -> bootstrap.Scores:
        """Score the first videos of a batch, one per prompt (collective).

        The values include the columns of `recognition`, which `recognition.summarised` replaces.

        Raises:
          UserError: a reference photo cannot be used.
        """
        filled = [prompts[min(n, len(prompts) - 1)] for n in range(self.batch)]
        if self.mesh is None:
            videos = jnp.asarray(videos)
        terms = self.terms(self.reward, videos, filled)
        judged, columns = self._judged(videos, filled, len(prompts))
        found = values(self.reward, collect(terms), judged)
        return {
            name: np.asarray(value, np.float64)[: len(prompts)] for name, value in found.items()
        } | columns

    def _judged(
        self, videos: Float[ArrayLike, "B F H W 3"], prompts: Sequence[Prompt], count: int
    ) -> tuple[dict[str, Float[np.ndarray, " B"]] | None, dict[str, Float[np.ndarray, " n"]]]:
        """Return the terms of the judge, and who the people of the first `count` videos are."""
        if self.judge is None:
            return None, {}
        if self.gallery is None or self.assigner is None:
            return collect(self.terms(self.judge, videos, prompts)), {}
        assigned = self._encoded(self.assigner, videos, prompts).embeddings
        people = self._encoded(self.judge, videos, prompts)
        judged, shown = to_host(
            judge_people(self.judge, videos, people, Assigner.make(self.assigner, assigned))
        )
        return judged, self.gallery.columns(prompts[:count], shown)


def _encoded(
    reward: Reward,
    videos: Float[ArrayLike, "B F H W 3"],
    prompts: Sequence[Prompt],
    people: int,
    mesh: Mesh | None,
) -> PyTree:
    """Encode the references of every row, on the devices of the videos.

    Args:
      reward: encodes them.
      videos: the rows.
      prompts: one prompt per video.
      people: slots of a prompt.
      mesh: devices of the videos; None is the default device.
    """
    shown = {prompt.id: prompt for prompt in prompts}
    numbers = {name: number for number, name in enumerate(shown)}
    of_row = np.array([numbers[prompt.id] for prompt in prompts])
    texts = [prompt.text for prompt in shown.values()]
    photos = References.of_prompts(list(shown.values()), people)
    encoded = reward.encode_references(photos, texts, tuple(videos.shape[1:4]))
    rows = jax.tree.map(lambda leaf: np.asarray(leaf)[of_row], encoded)
    if mesh is None:
        return jax.tree.map(jnp.asarray, rows)
    return sharding.device_put_global(rows, sharding.batch_sharding(mesh))


def make_scorer(
    config: Config,
    batch: int,
    mesh: Mesh | None = None,
    prompts: Sequence[Prompt] = (),
    consume: Consumer | None = None,
    reward: Reward | None = None,
) -> Scorer:
    """Make the scorer of a configuration.

    Args:
      config: settings of the reward and the face networks.
      batch: videos per program call, a multiple of the mesh's batch shards.
      mesh: devices of the videos; None uses the default device.
      prompts: prompts of the videos, whose photos are checked.
      consume: gets every decoded photo as well.
      reward: the reward of the configuration, if it is loaded already.

    Raises:
      UserError: a network or a photo cannot be used.
    """
    return BatchScorer(config, batch, mesh, prompts, consume, reward)
