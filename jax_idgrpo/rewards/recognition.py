"""Average the judge's embedding of every person over the frames of a video.

The reward's network assigns faces to people, and the judge embeds them. A policy that earns its
reward from faces that no other network recognises is then told apart from one that draws the
people of the photos. Both networks see the same faces, because the networks of a folder share one
detector.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, ArrayLike, Bool, Float

from jax_idgrpo.rewards.base import ReferenceFaces, Terms
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.faces import Faces
from jax_idgrpo.rewards.identity import IdentityConfig, reward_terms
from jax_idgrpo.rewards.matching import match_videos, most_alike


@struct.dataclass
class Assigner:
    """The network that assigns faces to people, and the references in its embedding.

    Attributes:
      graph: graph of the face stack and the head of a `FaceReward`.
      state: arrays of the face stack and the head.
      references: unit vectors of the references by this network.
      missing: minimum cosine of a face that is assigned.
    """

    graph: nnx.GraphDef = struct.field(pytree_node=False)
    state: nnx.State
    references: Float[Array, "B M E"]
    missing: float = struct.field(pytree_node=False)

    @classmethod
    def make(
        cls, reward: FaceReward, references: Float[Array | jax.ShapeDtypeStruct, "B M E"]
    ) -> "Assigner":
        """Take the networks of a face reward; shapes instead of arrays describe them."""
        return cls(reward.graph, reward.state, references, reward.config.null_similarity)


@struct.dataclass
class PeopleShown:
    """The faces that a video shows of its people, summed over frames.

    Attributes:
      total: sum of the judge's embeddings of the faces assigned to a person.
      frames: number of frames in which the person has a face.
      alike: largest cosine of two faces of a frame by the judge; -1 without two faces.
    """

    total: Float[ArrayLike, "B M E"]
    frames: Float[ArrayLike, "B M"]
    alike: Float[ArrayLike, " B"]

    def __add__(self, other: "PeopleShown") -> "PeopleShown":
        """Add further frames of the same videos."""
        return PeopleShown(
            self.total + other.total,
            self.frames + other.frames,
            jnp.maximum(self.alike, other.alike),
        )


def people_shown(
    faces: Faces,
    videos: Float[Array, "B T H W 3"],
    reference_mask: Bool[Array, "B M"],
    assigner: Assigner,
    counted: Bool[ArrayLike, " T"] | None = None,
) -> PeopleShown:
    """Sum the embeddings of every person's face over the frames of a video.

    Args:
      faces: faces of the videos, embedded by the judge.
      videos: values in [-1, 1].
      reference_mask: False on padding.
      assigner: the network that assigns faces to people.
      counted: frames that count; None for all.
    """
    stack = nnx.merge(assigner.graph, assigner.state)[0]
    seen = stack.embed(videos, faces.landmarks, faces.mask)
    references = assigner.references, reference_mask
    matches = match_videos(seen, faces.mask, *references, assigner.missing)
    picked = jax.nn.one_hot(matches.face, faces.mask.shape[-1])
    alike = most_alike(faces.embeddings, faces.mask)
    if counted is not None:
        picked = picked * counted[:, None, None]
        alike = jnp.where(counted, alike, -1.0)
    total = jnp.einsum("btmk,btke->bme", picked, faces.embeddings, precision="highest")
    return PeopleShown(total, jnp.sum(picked, (1, 3)), jnp.max(alike, 1))


@functools.partial(jax.jit, static_argnums=0)
def judge_program(
    static: tuple[nnx.GraphDef, IdentityConfig],
    state: nnx.State,
    videos: Float[Array, "B T H W 3"],
    people: ReferenceFaces,
    assigner: Assigner,
) -> tuple[Terms, PeopleShown]:
    """Score videos as `judge_people` does.

    Args:
      static: graph and constants of the judge.
      state: arrays of the judge.
      videos: values in [-1, 1].
      people: references encoded by the judge, one row per video.
      assigner: the network that assigns faces to people.
    """
    graph, config = static
    videos = videos.astype(jnp.float32)
    faces = nnx.merge(graph, state)[0](videos)
    found = faces.boxes, faces.landmarks, faces.embeddings, faces.mask
    known = people.embeddings, people.crops, people.mask
    terms = reward_terms(videos, *found, *known, config, places=people.places)
    return terms, people_shown(faces, videos, people.mask, assigner)


def judge_people(
    judge: FaceReward,
    videos: Float[ArrayLike, "B T H W 3"],
    people: ReferenceFaces,
    assigner: Assigner,
) -> tuple[Terms, PeopleShown]:
    """Score videos by the judge, with the faces of their people from the same detection.

    Args:
      judge: the judge, which scores all frames and has no head.
      videos: values in [-1, 1].
      people: references encoded by the judge, one row per video.
      assigner: the network that assigns faces to people.
    """
    return judge_program((judge.graph, judge.config), judge.state, videos, people, assigner)
