"""The identity reward: exact matching and the properties its users rely on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.rewards import matching
from tests.helpers.identity_cases import CONFIG, case, terms, unit


def test_order_of_references_faces_and_frames_changes_nothing():
    inputs = case()
    base = terms(inputs)
    rng = np.random.default_rng(1)
    p, k, t = rng.permutation(3), rng.permutation(5), rng.permutation(4)
    shuffled = inputs | {
        "references": inputs["references"][:, p],
        "reference_mask": inputs["reference_mask"][:, p],
        "boxes": inputs["boxes"][:, :, k],
        "landmarks": inputs["landmarks"][:, :, k],
        "photos": inputs["photos"][:, p],
        "embeddings": inputs["embeddings"][:, :, k],
        "face_mask": inputs["face_mask"][:, :, k],
    }
    for name, value in terms(shuffled).items():
        np.testing.assert_allclose(value, base[name], atol=1e-6, err_msg=name)
    frames = inputs | {name: inputs[name][:, t] for name in ("boxes", "embeddings", "face_mask")}
    for name in ("identity_mean", "identity_soft_min", "extra", "similarity", "faces_found"):
        np.testing.assert_allclose(terms(frames)[name], base[name], atol=1e-6, err_msg=name)


def test_padding_changes_nothing():
    inputs = case()
    rng = np.random.default_rng(2)
    padded = inputs | {
        "references": np.concatenate([inputs["references"], unit(rng, 3, 1, 16)], 1),
        "reference_mask": np.pad(inputs["reference_mask"], ((0, 0), (0, 1))),
        "boxes": np.concatenate([inputs["boxes"], inputs["boxes"][:, :, :2]], 2),
        "landmarks": np.concatenate([inputs["landmarks"], inputs["landmarks"][:, :, :2]], 2),
        "photos": np.pad(inputs["photos"], ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0))),
        "embeddings": np.concatenate(
            [inputs["embeddings"], np.repeat(inputs["references"][:, None, :2], 4, 1)], 2
        ),
        "face_mask": np.pad(inputs["face_mask"], ((0, 0), (0, 0), (0, 2))),
    }
    base = terms(inputs)
    for name, value in terms(padded).items():
        np.testing.assert_allclose(value, base[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("frames", "people"), [(1, 1), (1, 4), (3, 2)])
def test_finite_without_faces_and_with_one_frame(frames, people):
    inputs = case(frames=frames, people=people)
    inputs["face_mask"][:] = False
    inputs["embeddings"][:] = 0
    inputs["reference_mask"][:] = True
    found = terms(inputs)
    assert all(np.isfinite(value).all() for value in found.values())
    np.testing.assert_allclose(found["identity_mean"], 0)
    np.testing.assert_allclose(found["similarity"], 0)


def test_gradient_reaches_matched_faces_only():
    inputs = case(noise=0.5, people=2, faces=4)
    inputs["face_mask"][:] = True
    inputs["reference_mask"][:] = True
    config = dataclasses.replace(CONFIG, low=-1.0, high=2.0)

    def total(embeddings):
        return terms(inputs | {"embeddings": embeddings}, config)["reward"].sum()

    gradient = np.asarray(jax.grad(total)(jnp.asarray(inputs["embeddings"])))
    matches = matching.match_videos(
        *(
            jnp.asarray(inputs[n])
            for n in ("embeddings", "face_mask", "references", "reference_mask")
        ),
        0.15,
    )
    matched = np.zeros((3, 4, 5), bool)
    np.put_along_axis(matched, np.asarray(matches.face), True, -1)
    assert (np.abs(gradient).max(-1) > 0).tolist() == matched[..., :4].tolist()


def test_a_frozen_video_and_extra_faces_cost():
    inputs = case(noise=0.05, faces=5, people=2)
    inputs["face_mask"][:] = False
    inputs["face_mask"][:, :, :2] = True
    inputs["reference_mask"][:] = True
    honest = terms(inputs)
    frozen = terms(inputs | {"videos": np.repeat(inputs["videos"][:, :1], 4, 1)})
    np.testing.assert_allclose(honest["reward"] - frozen["reward"], CONFIG.motion_weight, atol=1e-6)
    crowded = inputs | {"face_mask": np.ones((3, 4, 5), bool)}
    assert (terms(crowded)["extra"] == 1).all()
    assert (terms(crowded)["reward"] < honest["reward"]).all()
