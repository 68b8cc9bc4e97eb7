"""The learned head: what does not matter to it, that it stays finite and inside what it saw, and its training from a CSV to a reward."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import train_head
from jax_idgrpo.preferences.csv_source import load_pairs
from jax_idgrpo.rewards import factory
from jax_idgrpo.rewards import head as heads
from jax_idgrpo.rewards.faces import Faces
from jax_idgrpo.rewards.identity import IdentityConfig, reward_terms
from jax_idgrpo.training.task import make_task
from tests.helpers.identity_cases import case, unit
from tests.helpers.reward_head import configuration, write_pairs

CONFIG = IdentityConfig()


def make_head(seed=0):
    rng = np.random.default_rng(seed)
    ranges = (
        np.stack([-np.ones(n), np.ones(n)]).astype(np.float32)
        for n in (len(heads.PEOPLE), len(heads.VIDEO))
    )
    head = heads.Head(*ranges, rngs=nnx.Rngs(seed))
    head.norm.bias[...] = jnp.asarray(rng.normal(size=head.norm.bias[...].shape), jnp.float32)
    return head


HEAD = make_head()


@jax.jit
def read(inputs):
    faces = Faces(
        *(inputs[name] for name in ("boxes", "landmarks", "scores", "face_mask", "embeddings"))
    )
    found = (faces.boxes, faces.landmarks, faces.embeddings, faces.mask)
    terms = reward_terms(
        inputs["videos"],
        *found,
        inputs["references"],
        inputs["photos"],
        inputs["reference_mask"],
        CONFIG,
    )
    return heads.tokens(
        terms,
        faces,
        inputs["references"],
        inputs["reference_mask"],
        inputs["videos"].shape[2:4],
        CONFIG,
    )


def score(inputs):
    return HEAD(read(inputs))


def given(**options):
    inputs = case(**options)
    rng = np.random.default_rng(9)
    shape = inputs["face_mask"].shape
    return inputs | {"scores": rng.uniform(0.5, 1, shape).astype(np.float32)}


FACES = ("boxes", "landmarks", "scores", "face_mask", "embeddings")


def test_order_of_people_and_faces_changes_nothing():
    inputs = given()
    p, k = np.random.default_rng(1).permutation(3), np.random.default_rng(2).permutation(5)
    people = {name: inputs[name][:, p] for name in ("references", "photos", "reference_mask")}
    shuffled = inputs | people | {name: inputs[name][:, :, k] for name in FACES}
    np.testing.assert_allclose(score(shuffled), score(inputs), atol=1e-5)
    assert np.ptp(score(inputs)) > 1e-3


def test_padding_changes_nothing():
    inputs = given()
    padded = inputs | {
        name: np.concatenate([inputs[name], inputs[name][:, :, :2]], 2) for name in FACES
    }
    padded["face_mask"] = np.pad(inputs["face_mask"], ((0, 0), (0, 0), (0, 2)))
    padded["references"] = np.concatenate(
        [inputs["references"], unit(np.random.default_rng(2), 3, 1, 16)], 1
    )
    padded["reference_mask"] = np.pad(inputs["reference_mask"], ((0, 0), (0, 1)))
    padded["photos"] = np.concatenate([inputs["photos"], inputs["photos"][:, :1]], 1)
    np.testing.assert_allclose(score(padded), score(inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("frames", "people", "faces", "shown"), [(1, 1, 3, True), (4, 2, 3, False), (2, 8, 8, True)]
)
def test_finite_with_gradients_without_faces_with_one_frame_and_with_eight_people(
    frames, people, faces, shown
):
    inputs = given(frames=frames, people=people, faces=faces)
    inputs["face_mask"][:] &= shown
    inputs["embeddings"][:] *= shown

    def total(embeddings):
        return score(inputs | {"embeddings": embeddings}).sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(inputs["embeddings"]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert bool(np.any(gradient)) == shown


def test_beyond_what_training_saw_nothing_changes():
    said = read(given())
    far, edge = (
        said.replace(people=said.people.at[..., 0].set(x), video=said.video.at[..., 3].set(x))
        for x in (50.0, 1.0)
    )
    np.testing.assert_array_equal(HEAD(far), HEAD(edge))


def test_two_people_who_exchange_faces_are_seen_in_their_places():
    """Each keeps their place, and from the middle on has the other's face: every frame alone looks right."""
    references = unit(np.random.default_rng(0), 1, 2, 16)
    inputs = given(batch=1, people=2, faces=2, frames=4) | {
        "references": references,
        "reference_mask": np.ones((1, 2), bool),
    }
    inputs["face_mask"][:] = True
    inputs["boxes"][:] = np.asarray([[0, 0, 4, 4], [8, 8, 12, 12]], np.float32)
    inputs["embeddings"] = np.stack([references, references, references, references[:, ::-1]], 1)
    said = {name: np.asarray(read(inputs).people)[0, :, n] for n, name in enumerate(heads.PEOPLE)}
    np.testing.assert_allclose(said["alike_mean"], 1, atol=1e-5)
    assert (said["placed_mean"] < 0.85).all()
    assert (said["placed_change"] < -0.5).all()
    assert (said["steady"] < 0.9).all()
    apart = float(references[0, 0] @ references[0, 1])
    np.testing.assert_allclose(said["kept"], apart, atol=1e-5)  # least of all pairs of frames
    np.testing.assert_allclose(said["kept_last"], (3 * apart + 1) / 4, atol=1e-5)


def test_kept_tokens_are_read_instead_of_the_videos_and_only_for_what_they_were_made_of(tmp_path):
    config = configuration(write_pairs(tmp_path / "pairs", 2, 0, "train"))
    pair, other = load_pairs(tmp_path / "pairs" / "pairs.csv", ("SA",))
    reward, folder = factory.make_face_reward(config.reward), tmp_path / "tokens"
    looked = []

    def tokens_of(pair, config=config):
        of = train_head.token_cache(str(folder), reward, config)
        return of(
            pair,
            pair.videos[0],
            lambda: (
                looked.append(pair) or train_head.read_one(reward, pair, pair.videos[0], config)[1]
            ),
        )

    first, again = tokens_of(pair), tokens_of(pair)
    assert looked == [pair]
    jax.tree.map(np.testing.assert_array_equal, first, again)
    tokens_of(other)
    tokens_of(
        pair, dataclasses.replace(config, reward=dataclasses.replace(config.reward, missing=0.2))
    )
    assert looked == [pair, other, pair]
    (Path(pair.videos[0])).write_bytes(Path(other.videos[0]).read_bytes())
    assert np.abs(tokens_of(pair).video - first.video).max() > 0
    assert len(looked) == 4
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])  # as a full disk leaves it
    tokens_of(other)
    assert len(looked) == 5
    sides = train_head.read_tokens(reward, [pair, other], config, str(folder))
    jax.tree.map(np.testing.assert_array_equal, sides[other][0], tokens_of(other))
    assert len(looked) == 5
    assert not list(folder.glob(".*"))


def test_one_dimension_only(tmp_path):
    with pytest.raises(UserError, match="scores one dimension, not SA, VQ"):
        make_task(configuration(Path("pairs.csv"), dimensions=["SA", "VQ"]))
