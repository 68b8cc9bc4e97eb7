"""Measure head turns of rendered people from the landmarks of a detector.

    python -m benchmarks.turns [--faces FOLDER] [--clips 400] [--height 64] [--width 96]

The truth is the yaw that the held-out people were rendered with. The constants are fitted on clips
of the training people. Printed are the number of faces, the correlation of estimated and true yaw,
the mean error in degrees and the share of faces in the right bin; and, over the clips, the turning
of those whose prompt says that somebody turns and of the others, and what a clip gains that is
frozen at its most frontal frame.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_idgrpo.config import RewardConfig
from jax_idgrpo.evaluation.bootstrap import bootstrap
from jax_idgrpo.rewards.base import References
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.faces import load_network, load_settings, load_stack
from jax_idgrpo.rewards.factory import copy_calibration, identity_constants
from jax_idgrpo.rewards.turns import YawCalibration, fit_yaw
from jax_idgrpo.synthetic import scenes
from jax_idgrpo.synthetic.people import _ACTIONS
from jax_idgrpo.synthetic.training.detector import heads, yaw_levels

BATCH = 16
TURN = _ACTIONS.index("turns around slowly")


def judged(folder: Path, calibration: YawCalibration) -> FaceReward:
    """Return the judge of a folder, with the constants of the yaw.

    Args:
      folder: face networks.
      calibration: constants of the yaw.
    """
    stack = load_stack(folder, "judge")
    cosines = load_settings(folder, "judge")
    constants = identity_constants(
        RewardConfig(faces=str(folder)), cosines, copy_calibration(stack), calibration
    )
    return FaceReward(stack, constants)


def turning(judge: FaceReward, clips: int, size: tuple[int, int]) -> None:
    """Print how `turning` and identity behave on rendered clips.

    Args:
      judge: with constants of the yaw.
      clips: number of clips.
      size: (height, width) in pixels.
    """
    columns: dict[str, list[np.ndarray]] = {}
    for step in range(-(-clips // BATCH)):
        drawn = jax.device_get(scenes.batch(2, step, BATCH, "eval", 9, size))
        known = judge.encode_references(
            References.of_pixels(drawn.portraits, drawn.mask), [""] * BATCH
        )
        yaw = np.stack(
            [
                np.asarray(jax.vmap(lambda scene, t=t: scenes.pose_at(scene, t).yaw)(drawn.scene))
                for t in np.arange(9) / scenes.FRAMES_PER_SECOND
            ],
            axis=1,
        )
        turned = np.abs(np.where(drawn.mask[:, None], yaw, 0)).sum(-1).argmin(1)
        frozen = np.repeat(drawn.video[np.arange(BATCH), turned][:, None], 9, axis=1)
        shown, still = (
            jax.device_get(judge.score(jnp.asarray(v), known)) for v in (drawn.video, frozen)
        )
        asked = np.any((drawn.scene.action == TURN) & drawn.mask, axis=1)
        for name, values in {
            "turning": shown["turning"],
            "asked": asked,
            "turning gained by freezing": still["turning"] - shown["turning"],
            "identity gained by freezing": still["similarity"] - shown["similarity"],
        }.items():
            columns.setdefault(name, []).append(np.asarray(values))
    found = {name: np.concatenate(parts) for name, parts in columns.items()}
    asked = found.pop("asked").astype(bool)
    for name, values in {
        "turning, somebody is asked to turn": found["turning"][asked],
        "turning, nobody is": found["turning"][~asked],
        **{name: values for name, values in found.items() if "freezing" in name},
    }.items():
        interval = bootstrap(np.asarray(values, np.float64), np.arange(len(values)), 0, 2000)
        print(f"{name}: {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faces", type=Path, default=RewardConfig().folder())
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    given = parser.parse_args()
    size = (given.height, given.width)
    detector, values = load_network(given.faces / "detector")
    settings = values["max_faces"], values["threshold"]
    calibration = fit_yaw(*heads(detector, "train", given.clips, size, *settings))
    levels = yaw_levels(*heads(detector, "eval", given.clips, size, *settings), calibration)
    print(f"yaw = {calibration.a} arctan({calibration.b} turn)")
    print(", ".join(f"{name} {value:.4g}" for name, value in levels.items()))
    turning(judged(given.faces, calibration), given.clips, size)


if __name__ == "__main__":
    main()
