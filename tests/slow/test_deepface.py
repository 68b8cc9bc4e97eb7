"""deepface as a backend of the face reward, on a photograph: where the face is, what shows nobody, and training beside it."""

from pathlib import Path

import numpy as np

from jax_idgrpo.rewards.deepface import DeepFace, HostFaceReward
from jax_idgrpo.rewards.identity import IdentityConfig
from jax_idgrpo.training import setup
from jax_idgrpo.training import train as loop
from tests.helpers.deepface import astronaut, fake, grey
from tests.helpers.tiny_run import rows, tiny


def test_a_step_is_trained_on_the_scores_of_the_host(monkeypatch, tmp_path):
    constants = IdentityConfig(null_similarity=-1.0)
    monkeypatch.setattr(
        setup,
        "make_reward",
        lambda config, mesh: HostFaceReward(fake(), constants, config.reward.frames),
    )
    loop.train(tiny(1, micro_batch=2), tmp_path)
    (row,) = rows(tmp_path)
    assert row["faces_seen"] == 1
    assert row["rewards_failed"] == 0
    assert row["skipped"] == 0
    assert row["gradient_norm"] > 0


def test_a_model_of_deepface_embeds_as_deepface_does(monkeypatch, tmp_path):
    """Random weights in the file that deepface reads: the same numbers as `DeepFace.represent` gives for the photograph."""
    monkeypatch.setenv("DEEPFACE_HOME", str(tmp_path))
    monkeypatch.setenv("DEEPFACE_BACKEND_ENGINE", "pytorch")
    import torch
    from deepface.models.facial_recognition.pytorch.ArcFace import ArcFaceModel
    from deepface.modules.representation import represent

    (tmp_path / ".deepface" / "weights").mkdir(parents=True)
    torch.save(
        ArcFaceModel().state_dict(), tmp_path / ".deepface" / "weights" / "arcface_weights.pth"
    )
    faces = DeepFace("deepface:opencv/ArcFace", Path("nowhere"))
    for pictures in (
        [astronaut()],
        [astronaut(), np.full((512, 512, 3), 9, np.uint8), grey(astronaut())],
    ):
        boxes, _, embeddings, mask = faces(np.stack(pictures))
        assert mask.sum(1).tolist() == [1, 0, 1][: len(pictures)]
        (theirs,) = represent(
            pictures[0][..., ::-1], "ArcFace", detector_backend="opencv", l2_normalize=True
        )
        np.testing.assert_allclose(embeddings[0, 0], np.ravel(theirs["embedding"]), atol=1e-5)
        area = theirs["facial_area"]
        assert boxes[0, 0].tolist() == [
            area["x"],
            area["y"],
            area["x"] + area["w"],
            area["y"] + area["h"],
        ]
