"""Rewards of other work: equal to their formulas written out in numpy, blind to order and padding, finite without faces."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.rewards import identity
from jax_idgrpo.rewards.matching import cosines
from tests.helpers.identity_cases import case

TERMS = {
    "mimr": lambda embeddings, mask, references, asked: identity.multi_identity_matching(
        cosines(embeddings, references), mask, asked
    ),
    "id_conf": lambda embeddings, mask, references, asked: identity.identity_confidence(
        cosines(embeddings, references), mask, asked
    ),
    "unique_faces": lambda embeddings, mask, references, asked: identity.unique_faces(
        embeddings, mask
    ),
}


def arguments(inputs) -> list:
    return [
        jnp.asarray(inputs[name])
        for name in ("embeddings", "face_mask", "references", "reference_mask")
    ]


def frames(inputs):
    """(video, cosines [people, faces] of one frame, faces [faces, E]), what is masked left out."""
    for b, t in np.ndindex(inputs["face_mask"].shape[:2]):
        faces = inputs["embeddings"][b, t][inputs["face_mask"][b, t]]
        yield b, inputs["references"][b][inputs["reference_mask"][b]] @ faces.T, faces


def mimr(cosine, faces):
    """Over every assignment of as many pairs as there can be, unlike ones too."""
    people, count = cosine.shape
    if not count:
        return 0.0
    pairs = min(people, count)
    best = max(
        (
            list(zip(rows, columns, strict=True))
            for rows in itertools.combinations(range(people), pairs)
            for columns in itertools.permutations(range(count), pairs)
        ),
        key=lambda chosen: sum(cosine[pair] for pair in chosen),
    )
    sign = -np.ones_like(cosine)
    sign[tuple(zip(*best, strict=True))] = 1
    return (sign * cosine).mean()


def id_conf(cosine, faces):
    found = []
    for row in cosine:
        second, first = np.sort([0.0, 0.0, *row])[-2:]
        found.append(np.clip(1 - second / first, 0, 1) if first > 0 else 0.0)
    return np.mean(found)


def unique_faces(cosine, faces):
    alike = [a @ b for a, b in itertools.combinations(faces, 2)]
    return 1 - max(alike) if alike else 0.5


@pytest.mark.parametrize(
    ("name", "formula"), [("mimr", mimr), ("id_conf", id_conf), ("unique_faces", unique_faces)]
)
@pytest.mark.parametrize(
    ("people", "faces", "noise"), [(3, 5, 0.3), (3, 3, 3.0), (4, 4, 1.0), (1, 1, 1.0)]
)
def test_a_term_is_its_formula(name, formula, people, faces, noise):
    inputs = case(seed=people + faces, people=people, faces=faces, noise=noise, batch=4)
    inputs["reference_mask"][:] = True
    inputs["reference_mask"][-1, 1:] = False
    want = [[] for _ in range(4)]
    for b, cosine, seen in frames(inputs):
        want[b].append(formula(cosine, seen))
    got = TERMS[name](*arguments(inputs))
    np.testing.assert_allclose(got, np.mean(want, axis=1), atol=1e-5)
    assert faces == 1 or np.ptp(got) > 0


@pytest.mark.parametrize("name", TERMS)
def test_order_and_padding_change_nothing(name):
    inputs, rng = case(), np.random.default_rng(1)
    want = TERMS[name](*arguments(inputs))
    p, k = rng.permutation(3), rng.permutation(5)
    changed = {
        "embeddings": np.pad(
            inputs["embeddings"][:, ::-1][:, :, k],
            ((0, 0), (0, 0), (0, 2), (0, 0)),
            constant_values=0.7,
        ),
        "face_mask": np.pad(inputs["face_mask"][:, ::-1][:, :, k], ((0, 0), (0, 0), (0, 2))),
        "references": np.pad(
            inputs["references"][:, p], ((0, 0), (0, 1), (0, 0)), constant_values=0.7
        ),
        "reference_mask": np.pad(inputs["reference_mask"][:, p], ((0, 0), (0, 1))),
    }
    np.testing.assert_allclose(TERMS[name](*arguments(changed)), want, atol=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_finite_without_faces_in_one_frame_for_eight_people(name):
    inputs = case(people=8, faces=9, frames=1)
    inputs["face_mask"][0] = False
    got = np.asarray(TERMS[name](*arguments(inputs)))
    assert np.isfinite(got).all()
    assert got[0] == {"mimr": 0, "id_conf": 0, "unique_faces": 0.5}[name]


def test_one_face_for_two_people_costs():
    """What each is for: MIMR and confidence fall when two people get one face, uniqueness too; a right video is near the best."""
    references = np.eye(2, 6, dtype=np.float32)[None]
    same = (references[:, :1] + references[:, 1:]) / np.sqrt(2)
    honest, blended = references[:, None], np.repeat(same, 2, axis=1)[:, None]
    mask = (jnp.ones((1, 1, 2), bool), jnp.asarray(references), jnp.ones((1, 2), bool))
    for name, best in (("mimr", 0.5), ("id_conf", 1.0), ("unique_faces", 1.0)):
        good, bad = (
            float(TERMS[name](jnp.asarray(faces), *mask)[0]) for faces in (honest, blended)
        )
        assert good == pytest.approx(best), name
        assert bad == pytest.approx(0.0, abs=1e-6), name
