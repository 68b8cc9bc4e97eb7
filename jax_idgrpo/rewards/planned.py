"""Describe the reward of a plan: its networks as shapes on a mesh, with or without their files.

Networks without files on this machine are planned with published sizes, with a warning:
RetinaFace-R50 with ArcFace-R34 as embedder and Facenet512 as judge, ViT-S/16 for whole people, and
Qwen2.5-VL with 3 billion parameters.
"""

import dataclasses
import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from checkpoints_convert import dino
from checkpoints_convert.faces import NETWORKS
from jax_idgrpo.config import Config, MeshConfig, RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.dino import Dino, DinoConfig
from jax_idgrpo.models.faces.arcface import ARCFACE_R34, ArcFace
from jax_idgrpo.models.faces.facenet import Facenet, FacenetConfig
from jax_idgrpo.models.faces.retinaface import RetinaFace, RetinaFaceConfig
from jax_idgrpo.parallel import sharding
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.faces import FaceStack, Settings
from jax_idgrpo.rewards.factory import (
    assigning,
    identity_constants,
    make_face_reward,
    make_judge,
)
from jax_idgrpo.rewards.photo_copy import PHOTOGRAPHS
from jax_idgrpo.rewards.vlm import files, inputs
from jax_idgrpo.rewards.vlm.checklist import is_checklist
from jax_idgrpo.rewards.vlm.checklist_reward import describe_checklist
from jax_idgrpo.rewards.vlm.reward import VlmReward

WORDS = 1024  # text tokens of a planned question, beside its photos and frames
DISTRACTORS = 1024  # planned people of all prompts; their photos need not exist


@dataclasses.dataclass(frozen=True)
class HostReward:
    """A reward that runs on the host, with no program and no network on the devices.

    Attributes:
      option: the configuration field and value that select the reward.
      state: empty.
    """

    option: str
    state: tuple[()] = ()


Planned = FaceReward | VlmReward | HostReward


def planned_reward(config: Config, mesh: Mesh) -> Planned:
    """Describe the reward that a configuration selects.

    Args:
      config: the configuration.
      mesh: the devices of the video model, which need not exist here.

    Raises:
      UserError: a file on this machine is damaged, or the reward reserves more devices than the
        video model has.
    """
    wanted = config.reward
    for name in ("custom", "backend"):
        if value := getattr(wanted, name):
            return HostReward(f"reward.{name} {value}")
    return _vlm(config, mesh) if wanted.vlm else _faces(wanted, mesh, wanted.contrasted)


def planned_assigner(config: Config, reward: Planned, mesh: Mesh) -> FaceReward:
    """Describe the face reward that `factory.make_assigner` returns.

    Args:
      config: the configuration.
      reward: the described reward of the configuration.
      mesh: as for `planned_reward`.

    Raises:
      UserError: a file on this machine is damaged.
    """
    if isinstance(reward, FaceReward):
        return reward
    return _faces(assigning(config.reward), mesh)


def _faces(config: RewardConfig, mesh: Mesh, contrasted: bool = False) -> FaceReward:
    """Describe the face reward of a configuration.

    Args:
      config: the reward.
      mesh: as for `planned_reward`.
      contrasted: compare people with distractors.
    """
    people = _whole_people(config)
    if config.folder().is_dir():
        reward = make_face_reward(config, people=people)
    else:
        _warn_of_absent(config)
        constants = identity_constants(config, Settings(), PHOTOGRAPHS)
        reward = FaceReward(_published_faces("embedder"), constants, config.frames, people=people)
    if contrasted:
        size = reward.shapes(1, 1).embeddings.shape[-1]
        reward.contrast(jax.ShapeDtypeStruct((DISTRACTORS, size), jnp.float32))
    return _described(reward, mesh)


def _whole_people(config: RewardConfig) -> Dino | None:
    """Describe the network of `reward.people`; None if none is configured."""
    if not config.people or Path(config.people).is_dir():
        return dino.load(Path(config.people)) if config.people else None
    warnings.warn(
        f"reward.people {config.people}: no such folder; planned with ViT-S/16", stacklevel=3
    )
    return nnx.eval_shape(lambda: Dino(DinoConfig(), rngs=nnx.Rngs(0)))


def planned_judge(config: Config, mesh: Mesh) -> FaceReward | None:
    """Describe the judge, the face reward that measures identity and never serves as reward.

    Returns:
      The judge; None if no face networks fit the videos of the model.

    Raises:
      UserError: a file on this machine is damaged.
    """
    if not config.judged or config.reward.folder().is_dir():
        judge = make_judge(config)
    else:
        _warn_of_absent(config.reward)
        judge = FaceReward(
            _published_faces("judge"), identity_constants(config.reward, Settings(), PHOTOGRAPHS)
        )
    return None if judge is None else _described(judge, mesh)


def _warn_of_absent(config: RewardConfig) -> None:
    warnings.warn(
        f"reward.faces {config.faces}: no such folder; planned with RetinaFace-R50, ArcFace-R34 and "
        "Facenet512 as judge",
        stacklevel=3,
    )


def _published_faces(name: str) -> FaceStack:
    """Describe published face networks with the embedder `name`, as shapes."""

    def make() -> FaceStack:
        rngs = nnx.Rngs(0)
        embedder = (
            ArcFace(ARCFACE_R34, rngs=rngs)
            if name == "embedder"
            else Facenet(FacenetConfig(), rngs=rngs)
        )
        places = NETWORKS["arcface"].settings(embedder.config)["template"]
        detector = RetinaFace(RetinaFaceConfig(), rngs=rngs)
        settings = NETWORKS["retinaface"].settings(detector.config)
        return FaceStack(detector, embedder, tuple((x, y) for x, y in places), **settings)

    return nnx.eval_shape(make)


def _described(reward: FaceReward, mesh: Mesh) -> FaceReward:
    """Replace the reward's arrays by shapes on every device of the mesh."""
    reward.state = sharding.shapes(reward.state, sharding.replicated(mesh))
    return reward


def _vlm(config: Config, mesh: Mesh) -> VlmReward:
    wanted, own = config.reward, config.reward.vlm_devices
    if own > mesh.size:
        raise UserError(
            f"plan: reward.vlm_devices {own} is more than the {mesh.size} devices of the video "
            "model; give the reward fewer"
        )
    if own:  # the video model's devices serve as placeholders, as all devices are equal
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1), list(mesh.devices.flat)[:own])
    size = config.video.frames, config.video.height, config.video.width
    if is_checklist(wanted.vlm):
        return describe_checklist(wanted, size, mesh)
    model = files.describe(wanted.vlm, wanted.vlm_base or None, wanted.vlm_dtype, mesh)
    text = inputs.own_text(model.settings.tokens)
    return VlmReward(model, text, fps=wanted.vlm_fps, video=size, rows=wanted.vlm_rows, mesh=mesh)


# ---- arguments -----------------------------------------------------------------------------------


def encoded_shapes(
    reward: FaceReward | VlmReward, rows: int, people: int, video: tuple[int, int, int]
) -> PyTree:
    """Describe the encoded references of some rows.

    Args:
      reward: the reward that encodes them.
      rows: number of rows.
      people: maximum number of people in a row.
      video: frames, height and width of the scored videos.

    Raises:
      UserError: a video has too few frames for the reward.
    """
    if isinstance(reward, FaceReward):
        return reward.shapes(rows, people)
    asked = _longest_question(reward, people, video)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), asked
    )


def _longest_question(reward: VlmReward, people: int, video: tuple[int, int, int]) -> inputs.Asked:
    """Encode one row with the largest photos and `WORDS` tokens of text; values are arbitrary.

    A checklist asks as many such questions as it has.
    """
    settings, vision = reward.settings, reward.vision
    total, height, width = video
    count = len(inputs.frame_indices(total, settings.frames, settings.fps, reward.fps))
    grid = inputs.video_grid(count, height, width, vision, settings.pixels)
    side = math.isqrt(settings.pixels)
    rows, columns = (
        each // vision.patch for each in inputs.frame_size(side, side, vision, settings.pixels)
    )
    photo = inputs.Picture(
        np.zeros((rows * columns, vision.features), np.float32), np.array([rows, columns])
    )
    seen = (people * rows * columns + math.prod(grid)) // vision.merge**2
    length = seen + WORDS
    question = inputs.Question(
        ids=np.zeros(length, np.int32),
        position=np.zeros((3, length), np.int32),
        order=np.where(np.arange(length) < seen, np.arange(length), -1),
        token=np.zeros(max(len(settings.tokens), 1), np.int32),
        video=np.asarray(grid),
    )
    return reward.padded([[photo] * people], [[question] * len(reward.promptings)])
