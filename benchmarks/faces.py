"""Detect, align and embed the faces of videos: our jitted stack against deepface's loop over frames.

Both read the same random weights from the files that deepface downloads (RetinaFace-R50 and ArcFace-R34; written to a temporary folder, so
nothing is fetched) and look at the same frames, in float32, alternating in one process; the figures are medians. Ours gets videos and
embeds a fixed number of faces per frame, deepface gets one frame after the other and embeds those that it finds: random weights find
hardly any or very many, so their last layer is set until deepface finds some, and no more are embedded by it than by us.

    python -m benchmarks.faces [--rows 1] [--frames 2] [--height 240] [--width 416] [--faces 2] [--rounds 3]
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
    """Random RetinaFace and ArcFace where deepface looks for them -> the folder."""
    from deepface.models.facial_recognition.pytorch.ArcFace import ArcFaceModel
    from retinaface.model.retinaface_pth_model import RetinaFace

    folder = home / ".deepface" / "weights"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    detector = RetinaFace()
    detector.bn_data.running_mean.fill_(127.0)
    detector.bn_data.running_var.fill_(3000.0)
    for stride in (
        32,
        16,
        8,
    ):  # a face wherever the last layer is above its mean by some deviations; see `calibrate`
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
    """Give every face the same probability but for those of the coarsest map, of which about `faces` pass the threshold of 0.9."""
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
        f"{count} frames of {size[0]} x {size[1]}, {arguments.faces} faces each at most; found by ours {int(faces.mask.sum())}, "
        f"by deepface {sum(theirs())}; on {jax.default_backend()}, first call {compiled:.0f} s\n"
    )
    print("| | seconds per frame | frames per second |\n| --- | --- | --- |")
    for name, value in seconds.items():
        print(f"| {name} | {value / count:.2f} | {count / value:.2f} |")
    print(
        f"\nRatio of frames per second, ours over deepface: **{seconds['deepface'] / seconds['ours']:.2f}**"
    )


if __name__ == "__main__":
    main()
