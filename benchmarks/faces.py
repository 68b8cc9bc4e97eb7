r"""Benchmark face detection, alignment and embedding: our jitted stack against deepface.

Both load the same random RetinaFace-R50 and ArcFace-R34 weights, in the files that deepface would
download; nothing is downloaded. Both process the same frames in float32, alternating in one
process; the figures are medians. Our stack takes whole videos and embeds a fixed number of faces
per frame. deepface takes one frame at a time and embeds the detected faces. Random weights detect
either hardly any or very many faces; `calibrate` adjusts the last layer so that deepface detects
some, and `max_faces` limits deepface to the number that our stack embeds.

    python -m benchmarks.faces [--rows 1] [--frames 2] [--height 240] [--width 416] \
        [--faces 2] [--rounds 3]
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.timing import medians
from checkpoints_convert.face_folder import write_folder
from jax_idgrpo.data.video import from_uint8
from jax_idgrpo.rewards.faces import load_stack


def write_weights(home: Path) -> Path:
    """Write random RetinaFace and ArcFace weights to deepface's folder; returns the folder."""
    from deepface.models.facial_recognition.pytorch.ArcFace import ArcFaceModel
    from retinaface.model.retinaface_pth_model import RetinaFace

    folder = home / ".deepface" / "weights"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    detector = RetinaFace()
    detector.bn_data.running_mean.fill_(127.0)
    detector.bn_data.running_var.fill_(3000.0)
    # Small weights of the regression layers keep boxes and landmarks near their anchors.
    for stride in (32, 16, 8):
        torch.nn.init.normal_(
            getattr(detector, f"face_rpn_stride{stride}").bbox_pred.weight, std=1e-3
        )
        torch.nn.init.normal_(
            getattr(detector, f"face_rpn_stride{stride}").landmark_pred.weight, std=1e-3
        )
    torch.save(detector.state_dict(), folder / "retinaface.pth")
    torch.save(ArcFaceModel().state_dict(), folder / "arcface_weights.pth")
    return folder


def calibrate(path: Path, faces: int, frame: np.ndarray) -> None:
    """Adjust the detector so that about `faces` anchors pass the threshold of 0.9.

    Only anchors of the coarsest map can pass: those of the other maps get a constant probability.

    Args:
      path: file of the weights, which is overwritten.
      faces: number of detections.
      frame: the frame to count on.
    """
    from retinaface.commons import preprocess
    from retinaface.model.retinaface_pth_model import RetinaFace

    detector = RetinaFace()
    state = torch.load(path)
    for stride in (16, 8):
        state[f"face_rpn_stride{stride}.cls_score.weight"].zero_()
        state[f"face_rpn_stride{stride}.cls_score.bias"].zero_()
    detector.load_state_dict(state)
    detector.eval()
    pixels = preprocess.preprocess_image(frame[..., ::-1], True)[0]
    with torch.no_grad():
        shares = detector(torch.from_numpy(pixels))[0].numpy()
    odds = np.log(shares[..., 2:] / shares[..., :2]).ravel()
    spread = torch.tensor(np.float32(np.log(9) - np.sort(odds)[-faces - 1]))
    state["face_rpn_stride32.cls_score.bias"][2:] += spread
    torch.save(state, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("rows", 1),
        ("frames", 2),
        ("height", 240),
        ("width", 416),
        ("faces", 2),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    rows, frames, size = arguments.rows, arguments.frames, (arguments.height, arguments.width)
    rng = np.random.default_rng(0)
    coarse = rng.uniform(-1, 1, (rows, frames, 8, 12, 3))
    smooth = np.clip(
        np.asarray(jax.image.resize(jnp.asarray(coarse), (rows, frames, *size, 3), "cubic")), -1, 1
    )
    videos = np.round((smooth + 1) * 127.5).astype(np.uint8)

    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"DEEPFACE_HOME": home, "DEEPFACE_BACKEND_ENGINE": "pytorch"}
        files = write_weights(Path(home))
        calibrate(files / "retinaface.pth", arguments.faces, videos[0, 0])
        from deepface import DeepFace

        write_folder(
            Path(home) / "ours", files / "retinaface.pth", files / "arcface_weights.pth", None
        )
        stack = load_stack(Path(home) / "ours", "embedder")
        DeepFace.build_model("retinaface", "face_detector")
        DeepFace.build_model("ArcFace")

    stack.max_faces = arguments.faces
    graph, state = nnx.split(stack)
    program = jax.jit(lambda state, videos: nnx.merge(graph, state)(videos))
    pixels = jnp.asarray(from_uint8(videos))

    def theirs() -> list[int]:
        seen = []
        for frame in videos.reshape(-1, *size, 3):
            found = DeepFace.represent(
                frame[..., ::-1],
                "ArcFace",
                detector_backend="retinaface",
                enforce_detection=False,
                max_faces=arguments.faces,
            )
            seen.append(sum(face["face_confidence"] > 0 for face in found))
        return seen

    began = time.perf_counter()
    faces = jax.block_until_ready(program(state, pixels))
    compiled = time.perf_counter() - began
    seconds = medians(
        arguments.rounds,
        ours=lambda: jax.block_until_ready(program(state, pixels)),
        deepface=theirs,
    )
    count = rows * frames
    print(
        f"{count} frames of {size[0]} x {size[1]}, at most {arguments.faces} faces each; "
        f"detected by ours {int(faces.mask.sum())}, by deepface {sum(theirs())}; "
        f"on {jax.default_backend()}, first call {compiled:.0f} s\n"
    )
    print("| | seconds per frame | frames per second |\n| --- | --- | --- |")
    for name, value in seconds.items():
        print(f"| {name} | {value / count:.2f} | {count / value:.2f} |")
    ratio = seconds["deepface"] / seconds["ours"]
    print(f"\nRatio of frames per second, ours over deepface: **{ratio:.2f}**")


if __name__ == "__main__":
    main()
