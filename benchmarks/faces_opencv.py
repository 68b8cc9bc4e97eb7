r"""Benchmark the networks for photographs, YuNet and SFace, against OpenCV and deepface.

All load the published files and process the same frames of two real people side by side, on one
core and with one thread each, alternating in one process; the figures are medians of processor
time. OpenCV's loop is `FaceDetectorYN.detect`, then `FaceRecognizerSF.alignCrop` and `feature` for
each face. deepface runs SFace on ONNX Runtime
behind its default detector, `opencv`. Our stack takes the frames as
one video and has the default number of faces per frame.

    python -m benchmarks.faces_opencv [--frames 8] [--height 240] [--width 416] [--rounds 5]

Downloads the packages of `real_people` once. OpenCV has to be 4.x: OpenCV 5 refuses SFace's file.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import real_people
from checkpoints_convert import photographs
from jax_idgrpo.rewards.faces import load_stack


def write_files(home: Path) -> tuple[Path, Path]:
    """Write both networks as published where deepface looks for them, and return their paths."""
    folder = home / ".deepface" / "weights"
    folder.mkdir(parents=True)
    paths = folder / "yunet.onnx", folder / "face_recognition_sface_2021dec.onnx"
    for path, member in zip(paths, (photographs.DETECTOR, photographs.EMBEDDER), strict=True):
        path.write_bytes(real_people.member("networks", member.path))
    return paths


class Fed:
    """Feed a session with the inputs that the published file lists and does not use."""

    def __init__(self, session: Any):
        self._session = session
        self._unused = {one.name: np.zeros(one.shape, np.float32) for one in self.get_inputs()}

    def get_inputs(self) -> list:
        return self._session.get_inputs()

    def run(self, names: list[str] | None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(names, self._unused | inputs)


def processor_seconds(rounds: int, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median processor time of each function; they alternate, after a round unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            time.sleep(0.5)  # the threads of ONNX Runtime spin for a while after a call
            began = time.process_time()
            function()
            if number:
                seconds[name].append(time.process_time() - began)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("frames", 8), ("height", 240), ("width", 416), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts its threads
    cv2.setNumThreads(1)
    frames, size = arguments.frames, (arguments.height, arguments.width // 2)
    video = np.concatenate(
        [
            real_people.clip(real_people.LEFT, frames, size, 0.85),
            real_people.clip(real_people.RIGHT, frames, size, 0.4),
        ],
        2,
    )
    pictures = [np.ascontiguousarray(frame[..., ::-1]) for frame in video]
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {
            "DEEPFACE_HOME": home,
            "DEEPFACE_BACKEND_ENGINE": "pytorch",
            "OMP_NUM_THREADS": "1",
        }
        files = write_files(Path(home))
        folder = Path(home) / "ours"
        wheel, archive = real_people.package("networks"), real_people.package("judge")
        photographs.write_photographs(folder, wheel, archive)
        stack = load_stack(folder, "embedder")
        detector = cv2.FaceDetectorYN.create(str(files[0]), "", video.shape[2:0:-1], 0.6, 0.3, 5000)
        embedder = cv2.FaceRecognizerSF.create(str(files[1]), "")
        from deepface import DeepFace

        model = DeepFace.build_model("SFace")
        model.model = Fed(model.model)
    graph, state = nnx.split(stack)
    program = jax.jit(lambda state, videos: nnx.merge(graph, state)(videos))
    network, weights = nnx.split(stack.detector)
    find = jax.jit(
        lambda weights, pictures: nnx.merge(network, weights).find(
            pictures, stack.max_faces, stack.threshold
        )
    )
    pixels = jnp.asarray(real_people.pixels(video))[None]
    single = [jax.block_until_ready(pixels[:, t]) for t in range(frames)]

    def opencv() -> list[list[np.ndarray]]:
        return [
            [
                embedder.feature(embedder.alignCrop(picture, face))
                for face in detector.detect(picture)[1]
            ]
            for picture in pictures
        ]

    def deepface() -> list[list[dict]]:
        return [
            DeepFace.represent(picture, "SFace", detector_backend="opencv", enforce_detection=False)
            for picture in pictures
        ]

    faces = program(state, pixels)
    theirs = opencv()
    cosines = [
        float(np.max(np.asarray(faces.embeddings[0, t]) @ (one[0] / np.linalg.norm(one))))
        for t, found in enumerate(theirs)
        for one in found
    ]
    seconds = processor_seconds(
        arguments.rounds,
        {
            "ours": lambda: jax.block_until_ready(program(state, pixels)),
            "OpenCV": opencv,
            "ours, detector": lambda: [jax.block_until_ready(find(weights, one)) for one in single],
            "OpenCV, detector": lambda: [detector.detect(picture) for picture in pictures],
            "deepface, opencv/SFace": deepface,
        },
    )
    print(
        f"{frames} frames of {arguments.height} x {arguments.width}, OpenCV {cv2.__version__}; "
        f"faces: ours {int(faces.mask.sum())}, OpenCV {sum(map(len, theirs))}; cosine of ours with "
        f"OpenCV's at least {min(cosines):.4f}\n"
    )
    print("| on one core | ms per frame | frames per second | ours over this |")
    print("| --- | --- | --- | --- |")
    for name, value in seconds.items():
        ours = seconds["ours, detector" if name.endswith("detector") else "ours"]
        print(
            f"| {name} | {value / frames * 1e3:.1f} | {frames / value:.1f} | {value / ours:.2f} |"
        )


if __name__ == "__main__":
    main()
