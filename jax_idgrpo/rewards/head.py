"""Compute the learned reward from matched and tracked faces.

The reward is a small network, trained on preference pairs.

Every requested person becomes a feature vector, and every video a row of terms that do not depend
on identities (`tokens`). Then, all in float32,

    score = f(mean_i phi(x_i), min_i phi(x_i), max_i phi(x_i), z)
    f = LayerNorm -> 64 -> 64 -> 1

over the people i, with x the people's features and z the video's terms. Each feature is clipped to
its range in training and mapped to [-1, 1], because a network extrapolates and a policy would
exploit that. By construction, the score does not depend on the order of people or faces, nor on
padding. Only differences of scores are meaningful; they are log-odds (see `preference`).

A person is compared with two faces: the matched face, which is most like the person, and the face
on the person's track over the whole video. If two people exchange faces, the matched faces score
high and the tracked faces low.

Gradients reach the embeddings through cosines; assignments, boxes and landmarks carry none. Source:
deep sets (arXiv 1703.06114); the choice of features is ours.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from checkpoints_convert import faces as tables
from checkpoints_convert import rules, store
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.rewards.faces import Faces, reward_settings
from jax_idgrpo.rewards.identity import IdentityConfig, level
from jax_idgrpo.rewards.matching import cosines, match_videos, most_alike
from jax_idgrpo.rewards.tracks import tracks

NAME = "head"
WIDTH = 64
_COURSE = ("mean", "least", "spread", "change")
PEOPLE = (
    *(f"alike_{name}" for name in _COURSE),
    *(f"placed_{name}" for name in _COURSE),
    "steady",
    "kept",
    "kept_last",
    "lead",
    "lead_least",
    "rival",
    "rival_most",
    "presence",
    "size",
    "yaw",
    "turned",
    "quality",
)
"""Features of a person, in order (see `tokens`)."""
TERMS = (
    "identity_mean",
    "identity_soft_min",
    "similarity_min",
    "extra",
    "missing",
    "duplicated",
    "swapped",
    "switched",
    "blended",
    "area",
    "copied",
    "mimr",
    "id_conf",
    "unique_faces",
    "stalled",
    "detail",
)
VIDEO = (*TERMS, "apart_log", "still", "twins", "twins_most", "people")
"""Features of a video, in order: `TERMS` of `identity.reward_terms` and others (see `tokens`)."""


@flax.struct.dataclass
class Tokens:
    """Features of people and videos.

    Attributes:
      people: one feature vector per requested person.
      mask: False on padding of `people`.
      video: one row per video.
    """

    people: Float[Array, "B M P"]
    mask: Bool[Array, "B M"]
    video: Float[Array, "B G"]


def _of_face(values: Float[Array, "B T K"], face: Int[Array, "B T M"]) -> Float[Array, "B T M"]:
    """Select the value of every person's face; 0 without a face."""
    return jnp.take_along_axis(jnp.pad(values, ((0, 0), (0, 0), (0, 1))), face, axis=-1)


def _mean(values: Float[Array, "B T M"], where: Bool[Array, "B T M"]) -> Float[Array, "B M"]:
    return jnp.sum(jnp.where(where, values, 0.0), 1) / jnp.maximum(jnp.sum(where, 1), 1)


def _spread(values: Float[Array, "B T M"], where: Bool[Array, "B T M"]) -> Float[Array, "B M"]:
    """Compute the standard deviation over frames, with a finite gradient at 0."""
    return jnp.sqrt(_mean((values - _mean(values, where)[:, None]) ** 2, where) + 1e-8)


def _course(values: Float[Array, "B T M"]) -> list[Float[Array, "B M"]]:
    """Compute mean, minimum, standard deviation and change of a value over all frames.

    The change is the rise of the least-squares line from the first to the last frame.
    """
    time = jnp.linspace(-1.0, 1.0, values.shape[1])[:, None]
    time = time - jnp.mean(time)  # 0 for one frame
    change = 2 * jnp.sum(time * values, 1) / jnp.maximum(jnp.sum(time * time), 1.0)
    return [
        jnp.mean(values, 1),
        jnp.min(values, 1),
        _spread(values, jnp.ones_like(values, bool)),
        change,
    ]


def tokens(
    terms: Mapping[str, Float[Array, " B"]],
    faces: Faces,
    references: Float[Array, "B M E"],
    reference_mask: Bool[Array, "B M"],
    size: tuple[int, int],
    config: IdentityConfig,
) -> Tokens:
    """Compute the features of the head from faces and their `reward_terms`.

    Features of a person, over frames (0 without a face; s is the cosine of the matched face, g as
    in `identity`):

      alike: mean, minimum, standard deviation and change of g(s).
      placed: the same for the face on the person's track.
      steady, kept: minimum cosine of neighbouring faces, and of any two faces, on that track.
      kept_last: mean cosine of the last face on that track to all of its faces.
      lead, lead_least: s minus the cosine of the next best face, mean and minimum.
      rival, rival_most: excess of the matched face's cosine to another reference over the cosine
        of the two references, mean and maximum.
      presence: share of frames with a matched face.
      size: side of the matched face as a share of the frame's, mean.
      yaw, turned: standard deviation and mean absolute value of the nose's position between the
        eyes, in eye distances.
      quality: the detector's score, mean.

    Features of a video:

      `TERMS`: terms of `reward_terms`.
      apart_log: logarithm of `apart`, which resolves small displacements near a copy.
      still: relative shortfall of `motion` below its floor.
      twins, twins_most: excess cosine of the most alike faces of a frame over the most alike
        references, mean and maximum.
      people: number of requested people, in units of 4.

    Args:
      terms: terms of `reward_terms`.
      faces: faces of the frames.
      references: unit embeddings of the references.
      reference_mask: False on padding.
      size: height and width of the frames in pixels.
      config: constants of the identity reward.
    """
    embeddings, shown = faces.embeddings, faces.mask
    everyone = (embeddings, shown, references, reference_mask)
    matches = match_videos(*everyone, config.null_similarity)
    followed = tracks(faces.boxes, *everyone, config.null_similarity, config.tracks)
    cosine = cosines(embeddings, references)
    matched = matches.matched & reference_mask[:, None]

    # [B,T,M,K]
    placed = (followed.track[:, :, None] == followed.of_reference[:, None, :, None]) & shown[
        :, :, None
    ]
    in_place = jnp.any(placed, -1)
    of_place = jnp.einsum(
        "btmk,btke->btme", placed.astype(jnp.float32), embeddings, precision="highest"
    )
    neighbours = jnp.sum(of_place[:, 1:] * of_place[:, :-1], -1)
    steady = jnp.min(jnp.where(in_place[:, 1:] & in_place[:, :-1], neighbours, 1.0), 1, initial=1.0)
    with_all = jnp.einsum("btme,bsme->btsm", of_place, of_place, precision="highest")
    with_all = jnp.where(in_place[:, :, None] & in_place[:, None], with_all, 1.0)
    kept, kept_last = jnp.min(with_all, (1, 2)), jnp.mean(with_all[:, -1], 1)

    own = jax.nn.one_hot(matches.face, shown.shape[-1], dtype=bool)  # [B,T,M,K]
    second = jnp.max(jnp.where(shown[:, :, None] & ~own, cosine, 0.0), -1, initial=0.0)
    lead = jnp.where(matched, matches.similarity - second, 0.0)

    mutual = jnp.einsum("bme,bne->bmn", references, references, precision="highest")
    others = (
        reference_mask[:, :, None]
        & reference_mask[:, None]
        & ~jnp.eye(mutual.shape[-1], dtype=bool)
    )
    of_face = jnp.einsum("btmk,btjk->btmj", own.astype(jnp.float32), cosine, precision="highest")
    rival = jnp.max(jnp.where(others[:, None], of_face - mutual[:, None], -1.0), -1)
    rival = jnp.where(matched & jnp.any(others, -1)[:, None], rival, 0.0)

    sides = (faces.boxes[..., 2:] - faces.boxes[..., :2]) / jnp.asarray(
        (size[1], size[0]), jnp.float32
    )
    eyes, nose = faces.landmarks[..., :2, 0], faces.landmarks[..., 2, 0]
    turned = (nose - jnp.mean(eyes, -1)) / jnp.maximum(jnp.abs(eyes[..., 1] - eyes[..., 0]), 1.0)

    people = [
        *_course(jnp.where(matched, level(matches.similarity, config.low, config.high), 0.0)),
        *_course(
            jnp.where(
                in_place,
                level(jnp.sum(jnp.where(placed, cosine, 0.0), -1), config.low, config.high),
                0.0,
            )
        ),
        steady,
        kept,
        kept_last,
        jnp.mean(lead, 1),
        jnp.min(lead, 1),
        _mean(rival, matched),
        jnp.max(rival, 1),
        jnp.mean(matched, 1),
        _mean(_of_face(jnp.sqrt(jnp.prod(jnp.maximum(sides, 0.0), -1)), matches.face), matched),
        _spread(_of_face(jnp.clip(turned, -1, 1), matches.face), matched),
        _mean(_of_face(jnp.abs(jnp.clip(turned, -1, 1)), matches.face), matched),
        _mean(_of_face(faces.scores, matches.face), matched),
    ]
    expected = jnp.max(jnp.where(others, mutual, -1.0), (1, 2))[:, None]
    twins = jnp.where(
        jnp.sum(shown, -1) > 1, most_alike(embeddings, shown) - jnp.maximum(expected, 0.0), 0.0
    )
    video = {
        **terms,
        "apart_log": jnp.log(1e-3 + terms["apart"]),
        "still": jax.nn.relu(1.0 - terms["motion"] / config.motion_floor),
        "twins": jnp.mean(twins, 1),
        "twins_most": jnp.max(twins, 1),
        "people": jnp.sum(reference_mask, -1) / 4,
    }
    return Tokens(
        people=jnp.where(reference_mask[..., None], jnp.stack(people, -1), 0.0).astype(jnp.float32),
        mask=jnp.asarray(reference_mask),
        video=jnp.stack([video[name] for name in VIDEO], -1).astype(jnp.float32),
    )


class Seen(nnx.Variable):
    """Minimum and maximum of every feature in training, [2, P]; not trained."""


def seen(values: Float[np.ndarray, "N P"]) -> Float[np.ndarray, "2 P"]:
    """Compute the range of every feature."""
    return np.stack([values.min(0), values.max(0)])


def scale_to_range(values: Float[Array, "*n P"], seen: Float[Array, "2 P"]) -> Float[Array, "*n P"]:
    """Clip features to the range and map it to [-1, 1]; an empty range maps to 0."""
    low, high = seen
    middle, half = (low + high) / 2, (high - low) / 2
    return jnp.where(
        half > 0, (jnp.clip(values, low, high) - middle) / jnp.where(half > 0, half, 1.0), 0.0
    )


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, precision="highest", rngs=rngs)


class Head(nnx.Module):
    """Map the features of a video to a score."""

    def __init__(
        self, people: Float[np.ndarray, "2 P"], video: Float[np.ndarray, "2 G"], *, rngs: nnx.Rngs
    ):
        """Initialise the network.

        Args:
          people: minimum and maximum of the people's features in training.
          video: minimum and maximum of the video's features in training.
          rngs: random keys of the weights.
        """
        self.people, self.video = Seen(jnp.asarray(people)), Seen(jnp.asarray(video))
        self.phi = nnx.List([_linear(people.shape[1], WIDTH, rngs), _linear(WIDTH, WIDTH, rngs)])
        pooled = 3 * WIDTH + video.shape[1]
        self.norm = nnx.LayerNorm(pooled, rngs=rngs)
        self.layers = nnx.List(
            [_linear(pooled, WIDTH, rngs), _linear(WIDTH, WIDTH, rngs), _linear(WIDTH, 1, rngs)]
        )

    def __call__(self, given: Tokens) -> Float[Array, " B"]:
        """Return the score of every video, in log-odds; higher is better."""
        x = scale_to_range(given.people, self.people[...])
        for layer in self.phi:
            x = jax.nn.gelu(layer(x))
        asked, some = given.mask[..., None], jnp.any(given.mask, -1, keepdims=True)
        mean = jnp.sum(jnp.where(asked, x, 0.0), 1) / jnp.maximum(jnp.sum(asked, 1), 1)
        least, most = (
            jnp.min(jnp.where(asked, x, jnp.inf), 1),
            jnp.max(jnp.where(asked, x, -jnp.inf), 1),
        )
        pooled = [mean, *(jnp.where(some, end, 0.0) for end in (least, most))]
        x = self.norm(jnp.concatenate([*pooled, scale_to_range(given.video, self.video[...])], -1))
        for layer in self.layers[:-1]:
            x = jax.nn.gelu(layer(x))
        return self.layers[-1](x)[..., 0]


# ---- stored heads --------------------------------------------------------------------------------


def fingerprint(networks: PyTree) -> str:
    """Hash the arrays of face networks, given as a module or a state, to identify them."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(
        nnx.state(networks) if isinstance(networks, nnx.Module) else networks
    ):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def reading(config: RewardConfig) -> dict[str, int | float]:
    """Return the configuration values that the features depend on, beside the face networks.

    Values missing from the configuration come from the networks.
    """
    return {"frames": config.frames, **dataclasses.asdict(reward_settings(config))}


def save_head(head: Head, folder: Path, networks: str, config: RewardConfig) -> None:
    """Write `head.safetensors` and `head.json` into a folder.

    Args:
      head: the trained head.
      folder: destination.
      networks: `fingerprint` of the face networks behind the training features.
      config: configuration of the training features.
    """
    state = nnx.state(head)
    store.write_file(folder / f"{NAME}.safetensors", rules.to_torch(tables.plain(state), state))
    values = {"networks": networks, "reading": reading(config), "people": PEOPLE, "video": VIDEO}
    store.write_json(folder / f"{NAME}.json", values)


def check_trained_with(
    values: Mapping[str, object], networks: str, config: RewardConfig, what: str
) -> None:
    """Refuse a learned reward that was trained with other face networks or settings.

    Args:
      values: the stored description, with the entries "networks" and "reading".
      networks: `fingerprint` of the current face networks.
      config: current configuration.
      what: names the reward in messages.

    Raises:
      UserError: networks or settings differ.
    """
    if values.get("networks") != networks:
        raise UserError(
            f"{what}: was trained on other face networks than reward.faces has; name those, or train it again"
        )
    trained = values.get("reading")
    trained = trained if isinstance(trained, Mapping) else {}
    for name, value in reading(config).items():
        if trained.get(name) != value:
            then = trained.get(name)
            raise UserError(
                f"{what}: was trained with reward.{name} {then}, not {value}; pass --reward.{name} {then}"
            )


def load_head(folder: Path, networks: str, config: RewardConfig) -> Head:
    """Read the files of `save_head`.

    Args:
      folder: holds the files.
      networks: `fingerprint` of the current face networks.
      config: current configuration.

    Raises:
      UserError: a file is missing or damaged, or the head was trained with other networks, settings
        or features.
    """
    values, what = store.read_json(folder / f"{NAME}.json"), f"reward head {folder}"
    if [values.get("people"), values.get("video")] != [list(PEOPLE), list(VIDEO)]:
        raise UserError(
            f"{what}: was trained on other tokens than this version computes; train it again"
        )
    check_trained_with(values, networks, config, what)
    graph, abstract = nnx.split(
        nnx.eval_shape(
            lambda: Head(np.zeros((2, len(PEOPLE))), np.zeros((2, len(VIDEO))), rngs=nnx.Rngs(0))
        )
    )
    file = folder / f"{NAME}.safetensors"
    return nnx.merge(
        graph, rules.to_jax(tables.plain(abstract), store.open_tensors(file), abstract, str(file))
    )
