"""Create the reward that a configuration selects."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax
from jax.sharding import Mesh

from checkpoints_convert import dino
from jax_idgrpo.config import Config, MeshConfig, RewardConfig
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.dino import Dino
from jax_idgrpo.models.faces.bundled_detector import Detector
from jax_idgrpo.parallel import sharding
from jax_idgrpo.rewards import photo_copy
from jax_idgrpo.rewards.base import Reward, check_references
from jax_idgrpo.rewards.custom import CustomReward, load_function
from jax_idgrpo.rewards.deepface import DeepFace, HostFaceReward
from jax_idgrpo.rewards.distractors import encode_distractors
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.faces import FaceStack, Settings, load_settings, load_stack, reward_settings
from jax_idgrpo.rewards.head import Head, fingerprint, load_head
from jax_idgrpo.rewards.identity import IdentityConfig
from jax_idgrpo.rewards.linear import LinearReward, load_linear
from jax_idgrpo.rewards.remote import HttpReward
from jax_idgrpo.rewards.turns import YawCalibration
from jax_idgrpo.rewards.vlm.checklist import is_checklist
from jax_idgrpo.rewards.vlm.checklist_reward import load_checklist
from jax_idgrpo.rewards.vlm.reward import VlmReward, load_vlm

Contrasted = TypeVar("Contrasted", FaceReward, HostFaceReward)


def make_reward(config: Config, mesh: Mesh | None = None) -> Reward:
    """Create the reward that a configuration selects.

    Args:
      config: the configuration.
      mesh: devices of the videos; networks that run in JAX are replicated on it.

    Raises:
      UserError: a network is missing or damaged, the backend is not installed or cannot be
        reached, or the custom function cannot be imported.
    """
    wanted = config.reward
    if wanted.custom:
        return CustomReward(load_function(wanted.custom), wanted.custom_timeout)
    if wanted.vlm:
        return make_vlm(config, mesh)
    if wanted.served:
        video = config.video.frames, config.video.height, config.video.width
        return HttpReward(wanted.backend, video, wanted.http_timeout, wanted.http_retries)
    if wanted.backend:
        host = HostFaceReward(
            DeepFace(wanted.backend, wanted.folder()),
            identity_constants(wanted, reward_settings(wanted), photo_copy.PHOTOGRAPHS),
            wanted.frames,
            photo_pool=wanted.pool == "pool",
        )
        return _contrasted(config, host)
    return _on_mesh(_contrasted(config, make_face_reward(wanted)), mesh)


def _contrasted(config: Config, reward: Contrasted) -> Contrasted:
    """Give a reward the people of `data.prompts` as distractors, if a term of the run needs them.

    Raises:
      UserError: the prompts or their photos cannot be used.
    """
    if config.reward.contrasted:
        prompts = load_prompts(config.data.prompts_file(), config.data.max_people, decode=False)
        check_references(reward, prompts)
        reward.contrast(encode_distractors(reward, prompts))
    return reward


def make_judge(config: Config, mesh: Mesh | None = None) -> FaceReward | None:
    """Create the judge, the face reward that measures identity and never serves as reward.

    The judge scores all frames with the networks of `reward.faces`, whatever the reward is. It uses
    the cosines stored with its own network, because the cosines of the reward are on another scale.

    Args:
      config: the configuration.
      mesh: as for `make_reward`.

    Returns:
      The judge; None, with a warning, if no face networks fit the videos of the model.

    Raises:
      UserError: a network is missing or damaged.
    """
    wanted = config.reward
    if not config.judged:
        if wanted.faces:
            warnings.warn(
                "no judge: reward.faces embedded knows synthetic people only; pass --reward.faces FOLDER with face networks for "
                'photographs, or --reward.faces "" to go without',
                stacklevel=2,
            )
        return None
    stack = load_stack(wanted.folder(), "judge")
    constants = identity_constants(
        wanted, load_settings(wanted.folder(), "judge"), copy_calibration(stack), stack.yaw
    )
    return _on_mesh(FaceReward(stack, constants), mesh)


def make_assigner(config: Config, reward: Reward, mesh: Mesh | None = None) -> FaceReward:
    """Return the face reward whose network tells which face of a video is which person.

    This is the reward itself if its networks run in JAX, and the embedder of `reward.faces`
    otherwise.

    Args:
      config: the configuration.
      reward: the reward of the configuration.
      mesh: as for `make_reward`.

    Raises:
      UserError: a network is missing or damaged.
    """
    if isinstance(reward, FaceReward):
        return reward
    return make_face_reward(assigning(config.reward), mesh)


def assigning(config: RewardConfig) -> RewardConfig:
    """Return the configuration of the face reward with the embedder of `reward.faces` alone."""
    return dataclasses.replace(
        faces_alone(config), head="", linear="", vlm="", custom="", backend="", pool="photo"
    )


def faces_alone(config: RewardConfig) -> RewardConfig:
    """Return the configuration of the reward without whole people, and without the mixture."""
    return dataclasses.replace(config, people="", mixture={})


def make_face_reward(
    config: RewardConfig, mesh: Mesh | None = None, people: Dino | None = None
) -> FaceReward:
    """Create the face reward from the networks of `reward.faces`, with the configured learned reward if any.

    Args:
      config: the reward.
      mesh: as for `make_reward`.
      people: network of whole people; None loads that of `reward.people`, if one is configured.

    Raises:
      UserError: a network is missing or damaged, or the learned reward was trained on others.
    """
    stack = load_stack(config.folder(), "embedder")
    head: Head | LinearReward | None = None
    if config.head:
        head = load_head(Path(config.head), fingerprint(stack), config)
    elif config.linear:
        head = load_linear(Path(config.linear), fingerprint(stack), config)
    constants = identity_constants(
        config, reward_settings(config), copy_calibration(stack), stack.yaw
    )
    if people is None and config.people:
        people = dino.load(Path(config.people))
    pool = config.pool == "pool"
    return _on_mesh(FaceReward(stack, constants, config.frames, head, pool, people), mesh)


def copy_calibration(stack: FaceStack) -> photo_copy.Calibration:
    """Return what counts as a copy: the bundled detector knows drawn people only."""
    return photo_copy.DRAWN if isinstance(stack.detector, Detector) else photo_copy.PHOTOGRAPHS


def identity_constants(
    config: RewardConfig,
    cosines: Settings,
    copies: photo_copy.Calibration,
    yaw: YawCalibration | None = None,
) -> IdentityConfig:
    """Combine the identity constants of a configuration with those of its networks.

    Args:
      config: the configuration.
      cosines: of the embedder.
      copies: what counts as a copy of the photo.
      yaw: constants of the yaw for the detector's landmarks; None leaves out head turns.
    """
    return IdentityConfig(
        null_similarity=cosines.missing,
        low=cosines.similarity_low,
        high=cosines.similarity_high,
        mean_weight=1 - config.soft_weight,
        penalties=tuple(config.penalty_weights().items()),
        copies=copies,
        yaw=yaw,
    )


def _on_mesh(reward: FaceReward, mesh: Mesh | None) -> FaceReward:
    """Replicate the networks of the reward on the mesh."""
    if mesh is not None:
        reward.state = sharding.device_put_global(reward.state, sharding.replicated(mesh))
    return reward


def policy_devices(config: Config, devices: Sequence[jax.Device] | None = None) -> list[jax.Device]:
    """Return the devices of the video model: all except those reserved for the reward.

    Args:
      config: the configuration.
      devices: the available devices; by default those of this run.

    Raises:
      UserError: the reward would take all devices, or devices of other processes.
    """
    found, own = list(jax.devices() if devices is None else devices), config.reward.vlm_devices
    if own >= len(found):
        raise UserError(
            f"reward.vlm_devices is {own}, but there are {len(found)} devices; leave one or more to the video model"
        )
    if own and len({device.process_index for device in found}) > 1:
        raise UserError(
            f"reward.vlm_devices is {own}, but the run has several processes; use 0, so that the reward shares their mesh"
        )
    return found[: len(found) - own]


def make_vlm(config: Config, mesh: Mesh | None) -> VlmReward:
    """Create the vision-language reward for videos of the configured size.

    The reward runs on its own devices if `reward.vlm_devices` is set, and on `mesh` otherwise.
    """
    own, video = config.reward.vlm_devices, config.video
    if own:
        policy_devices(config)
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[-own:])
    load = load_checklist if is_checklist(config.reward.vlm) else load_vlm
    return load(config.reward, (video.frames, video.height, video.width), mesh)
