"""The schema of a run: frozen dataclasses, checked when built, read from a Python file and overridden from the command line.

A configuration file holds values only: `get_config() -> Config`. `load(path, overrides)` runs it, applies `section.field=value`
pairs and returns the checked `Config`. Every error is one line that names the field and the remedy.
"""

import dataclasses
import json
import math
import os
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any, get_type_hints

from jax_idgrpo.errors import UserError, closest
from jax_idgrpo.objectives import OBJECTIVES, REPLAY, REWARD, Objective
from jax_idgrpo.workdir import local_path, refuse_addresses

FILMING = 96    # channels of the published VAE
EMBEDDED = Path(__file__).parent / "synthetic" / "assets"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"config: {message}")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} is {value!r}; use {', '.join(choices[:-1])} or {choices[-1]}")


def require_seed(name: str, seed: int) -> None:
    """Refuse a seed of more than 32 bits: it would draw the same as its remainder.

    Raises:
      UserError: the seed is negative or too large. The message begins with `name`, the field's own.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"{name} is {seed}; use 0 to {2**32 - 1}")


def _require_size(section: str, frames: int, height: int, width: int, unset: str = "") -> None:
    """Refuse a size of videos that the VAE and the transformer cannot divide.

    Args:
      section: of the configuration.
      frames: of a video.
      height: in pixels.
      width: in pixels.
      unset: what 0 stands for; "" if 0 is refused.
    """
    other = f", or 0 for {unset}" if unset else ""
    allowed = bool(unset)
    _require((allowed and frames == 0) or (frames >= 1 and frames % 4 == 1),
             f"{section}.frames is {frames}; use 4n+1, such as 33 or 81{other}")
    for name, size in (("height", height), ("width", width)):
        _require((allowed and size == 0) or (size >= 16 and size % 16 == 0),
                 f"{section}.{name} is {size}; use a multiple of 16{other}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which video model is the policy and how it is held.

    path: checkpoint folder (diffusers layout); "embedded" is the tiny set in the package.
    kind: "vace", or "phantom", whose tensors cannot be told from plain Wan's: how the photos condition it (see `sampling.conditioning`).
    dtype: dtype of the transformer's matrix products, "float32" or "bfloat16"; everything else is float32.
    remat: what a block keeps for the backward pass, "none" (everything), "dots" (outputs of linear layers), "attention" (outputs of
        attentions) or "full" (its input alone); all but "none" compute the rest again. With "full" the forward pass of the replay is
        the rollout's to the bit; with the others, to rounding.
    unroll: unroll the block scan (fast on CPU for few layers; program size grows with depth).
    text_memory: where the text encoder lies while no prompt is encoded, "device", or "host" where the devices have no room for it: it is
        then fetched whenever a step has a prompt that was not encoded yet.
    rank, alpha: LoRA rank and alpha on q, k, v, o of both attentions, in main and VACE blocks.
    adapter: PEFT adapter to start from; "" starts from B = 0.
    """

    path: str = "embedded"
    kind: str = "vace"
    dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False
    text_memory: str = "device"
    rank: int = 32
    alpha: float = 32.0
    adapter: str = ""

    def __post_init__(self) -> None:
        _choice("model.kind", self.kind, ("vace", "phantom"))
        _require(self.dtype in ("float32", "bfloat16"), f"model.dtype is {self.dtype!r}; use float32 or bfloat16")
        _choice("model.remat", self.remat, ("none", "dots", "attention", "full"))
        _choice("model.text_memory", self.text_memory, ("device", "host"))
        _require(self.rank >= 1, f"model.rank is {self.rank}; an adapter needs a rank of 1 or more")
        _require(self.alpha > 0, f"model.alpha is {self.alpha}; use a positive number, usually the rank")

    def folder(self) -> Path:
        """The checkpoint folder."""
        return EMBEDDED / "pipeline" if self.path == "embedded" else Path(self.path)

    def draws(self) -> bool:
        """Whether the model is of the bundled one's kind, with a small VAE of its own, and not one that films; what is absent films."""
        try:
            return bool(json.loads((self.folder() / "vae" / "config.json").read_text())["base_dim"] < FILMING)
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Prompts with reference photos.

    prompts: CSV `ref_paths,prompt`; "embedded:rl" and "embedded:eval" are the sets in the package.
    max_people: most reference photos that a row may have; rows with fewer are padded and masked.
    text_length: tokens a prompt is padded or cut to.
    negative_prompt: text of the unguided branch; "@FILE" reads it from a file.
    reference_order: order of VACE's reference latents, "diffusers" (last photo first) or "original"; Phantom has one order.
    """

    prompts: str = "embedded:rl"
    max_people: int = 4
    text_length: int = 512
    negative_prompt: str = (
        "garish colours, overexposed, motionless, blurry details, captions, painting, drab grey, poor quality, compression "
        "artefacts, ugly, malformed hands, malformed faces, merged fingers, messy background, crowd, extra legs, walking backwards"
    )
    reference_order: str = "diffusers"

    def __post_init__(self) -> None:
        _require(1 <= self.max_people <= 8, f"data.max_people is {self.max_people}; use 1 to 8")
        _require(self.text_length >= 1, f"data.text_length is {self.text_length}; use 1 or more")
        _require(self.reference_order in ("diffusers", "original"),
                 f"data.reference_order is {self.reference_order!r}; use diffusers or original")

    def prompts_file(self) -> Path:
        """The prompts CSV."""
        return prompts_file(self.prompts)


def prompts_file(name: str) -> Path:
    """The CSV that `name` means: "embedded:SET" is a set of the package, anything else a path.

    ~ is the user's home.
    """
    if name.startswith("embedded:"):
        return EMBEDDED / "prompts" / name.removeprefix("embedded:") / "prompts.csv"
    return Path(os.path.expanduser(name))


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """Size of the videos that training samples: frames (4n+1), height and width in pixels (multiples of 16), frames per second."""

    frames: int = 33
    height: int = 240
    width: int = 416
    fps: int = 16

    def __post_init__(self) -> None:
        _require_size("video", self.frames, self.height, self.width)
        _require(self.fps >= 1, f"video.fps is {self.fps}; use 1 or more")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a group of videos is sampled.

    prompts, group: prompts per training step and videos per prompt; together the batch.
    micro_batch: rows per program call in rollout and update alike, 0 = all rows of an update.
    steps, shift, guidance: denoising steps, flow shift (0 = the checkpoint's), guidance scale of the prompt (1 = no negative branch).
    image_guidance: scale of the photos, for Phantom, which has such a branch (0 = its own 5.0); with both scales 1 no other branch runs.
    sampler: of the stochastic steps, "identity" (as published), "flow", "dance" or "cps" (see `flow`).
    noise_level: of the sampler; 0 = its own (1, 0.7, 0.3 and 0.7).
    window: which steps are stochastic and trained; the others are Euler steps. "all" (as published); "fixed" (window_size from
        window_start on); "random" (a start drawn per training step from the first half of the schedule); "per_prompt" (one drawn for
        every prompt, shared by its group: with window_size 1 the iso-temporal step of Flash-GRPO); "progressive" (from window_start on,
        one later every window_every training steps, and back when the end is reached, as MixGRPO); "none" (no noise along the way and
        no trajectory, for objectives that train on the final latents).
    final_step: last step of the schedule, "sde" (as published) or "ode"; it is never trained.
    start_noise: "distinct" (as published) or "shared": the videos of a group start from the same noise, so that only the noise of the
        trained steps tells them apart. Pays where the window is short: the start noise decides most, and is not trained.
    """

    prompts: int = 16
    group: int = 8
    micro_batch: int = 0
    steps: int = 25
    shift: float = 0.0
    guidance: float = 4.5
    image_guidance: float = 0.0
    sampler: str = "identity"
    noise_level: float = 0.0
    window: str = "all"
    window_start: int = 0
    window_size: int = 0
    window_every: int = 25
    final_step: str = "ode"
    start_noise: str = "distinct"

    def __post_init__(self) -> None:
        _require(self.prompts >= 1, f"rollout.prompts is {self.prompts}; use 1 or more")
        _require(self.group >= 2, f"rollout.group is {self.group}; a group needs 2 or more videos to be compared")
        _require(self.micro_batch >= 0, f"rollout.micro_batch is {self.micro_batch}; use 0 (whole batch) or a positive number")
        rows = self.prompts * self.group
        _require(self.micro_batch == 0 or rows % self.micro_batch == 0,
                 f"rollout.micro_batch {self.micro_batch} does not divide the {rows} rows of {self.prompts} prompts x {self.group} videos")
        _require(self.steps >= 2, f"rollout.steps is {self.steps}; use 2 or more")
        _require(self.shift >= 0, f"rollout.shift is {self.shift}; use a positive number, or 0 for the checkpoint's own")
        _require(self.image_guidance >= 0, f"rollout.image_guidance is {self.image_guidance}; use a scale, or 0 for Phantom's 5.0")
        _choice("rollout.sampler", self.sampler, ("identity", "flow", "dance", "cps"))
        _require(self.noise_level >= 0, f"rollout.noise_level is {self.noise_level}; use a positive number, or 0 for the sampler's own")
        _require(self.sampler != "cps" or self.noise_level <= 1,
                 f"rollout.noise_level is {self.noise_level}; cps takes at most 1, where all noise of a step is fresh")
        _choice("rollout.window", self.window, ("all", "fixed", "random", "per_prompt", "progressive", "none"))
        _choice("rollout.final_step", self.final_step, ("sde", "ode"))
        _choice("rollout.start_noise", self.start_noise, ("distinct", "shared"))
        if self.window in ("fixed", "progressive"):
            _require(self.window_size >= 1 and self.window_start >= 0 and self.window_start + self.window_size <= self.steps - 1,
                     f"rollout.window {self.window_start}+{self.window_size} does not lie inside the first {self.steps - 1} steps")
        if self.window in ("random", "per_prompt"):
            _require(1 <= self.window_size <= self.steps // 2,
                     f"rollout.window_size is {self.window_size}; a random window needs 1 to {self.steps // 2} of {self.steps} steps")
        _require(self.window_every >= 1, f"rollout.window_every is {self.window_every}; use 1 or more")
        if self.window == "none":
            _require(self.final_step == "ode", "rollout.final_step sde adds noise, which rollout.window none excludes; use ode")
            _require(self.start_noise == "distinct",
                     "rollout.start_noise shared with rollout.window none makes all videos of a group equal; use distinct")

    @property
    def rows(self) -> int:
        """Videos per training step."""
        return self.prompts * self.group

    @property
    def trained_steps(self) -> int:
        """Denoising steps that are stochastic and trained per video."""
        return {"all": self.steps - 1, "none": 0}.get(self.window, self.window_size)


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """The objective, and what it is computed on.

    objective: on replayed steps, "clip" (as published), "guard" or "divergence"; on the final latents, with the prompt's branch alone
        and rollout.window none, "nft", "awm", "dpo" or "sft" (see `grpo`); or "reward_gradient", with rollout.window none: up the
        gradient of the reward itself, through the video and the last gradient_steps denoising steps (DRaFT-K; IPRO with kl).
    clip: range of the ratio of "clip", "guard" and "awm"; its meaning depends on the objective and on the size of the videos.
    divergence: of a step from the old policy's, beyond which "divergence" stops pushing.
    time_weights: weigh steps by 1 / c(t), so that the gradient of each counts alike; for "clip" and "divergence".
    kl, kl_units: coefficient of the distance from the LoRA-off base, in units of the step's "std" (as published: the KL divergence) or
        of the "velocity" (mean squared difference, alike at all noise levels).
    advantage_clip, advantage_eps, global_std: see `grpo.advantages`.
    best, worst: videos of each group that are trained, the best and the worst by advantage; 0 and 0 train all.
    drop_constant: leave out groups whose rewards are all equal; without it they still pull towards the base.
    updates, epochs: optimizer steps per pass over the rollout, each over an equal share of the prompts, and passes; all after the
        first are off-policy.
    times: noise levels per video, for objectives on the final latents. levels: where they lie, "grid" (evenly over the noisiest 90 %
        of the rollout's schedule) or "logit_normal" (sigmoid of a normal, shifted as the schedule).
    nft_beta, nft_normalise: step size of "nft", and whether its errors are divided by their size. dpo_beta: inverse temperature of
        "dpo". awm_weighting: "uniform", "sigma", "sigma2", "huber" or "ghuber".
    """

    objective: str = "clip"
    clip: float = 1e-3
    divergence: float = 1e-5
    time_weights: bool = False
    kl: float = 0.004
    kl_units: str = "std"
    advantage_clip: float = 5.0
    advantage_eps: float = 1e-4
    global_std: bool = False
    best: int = 0
    worst: int = 0
    drop_constant: bool = False
    updates: int = 1
    epochs: int = 1
    times: int = 2
    levels: str = "grid"
    nft_beta: float = 1.0
    nft_normalise: bool = True
    dpo_beta: float = 2000.0
    awm_weighting: str = "ghuber"
    gradient_steps: int = 4

    def __post_init__(self) -> None:
        _choice("grpo.objective", self.objective, tuple(OBJECTIVES))
        for name in ("clip", "divergence", "advantage_clip", "advantage_eps", "nft_beta", "dpo_beta"):
            _require(getattr(self, name) > 0, f"grpo.{name} is {getattr(self, name)}; use a positive number")
        for name in ("kl", "best", "worst"):
            _require(getattr(self, name) >= 0, f"grpo.{name} is {getattr(self, name)}; use 0 or more")
        for name in ("updates", "epochs", "times", "gradient_steps"):
            _require(getattr(self, name) >= 1, f"grpo.{name} is {getattr(self, name)}; use 1 or more")
        _choice("grpo.kl_units", self.kl_units, ("std", "velocity"))
        _choice("grpo.levels", self.levels, ("grid", "logit_normal"))
        _choice("grpo.awm_weighting", self.awm_weighting, ("uniform", "sigma", "sigma2", "huber", "ghuber"))
        _require(not self.time_weights or (self.replays and "unweighted" not in self.needs),
                 f"grpo.time_weights changes nothing that {self.objective} has: guard weighs steps alike, the others replay none")
        _require(self.replays or self.kl == 0 or self.kl_units == "velocity",
                 f"grpo.kl_units std needs the std of replayed steps, and {self.objective} replays none; use velocity")
        _require("pairs" not in self.needs or (self.best, self.worst) == (1, 1),
                 f"grpo.objective {self.objective} trains pairs, and grpo.best {self.best}, worst {self.worst} are none; use 1 and 1")
        _require("on_policy" not in self.needs or self.on_policy,
                 f"grpo.objective {self.objective} goes through the sampler, and {self.optimizer_steps} updates per rollout would leave "
                 "it; use grpo.updates 1 and epochs 1")
        _require("winners" not in self.needs or (self.best >= 1 and self.worst == 0),
                 f"grpo.objective {self.objective} imitates what it is given: use grpo.best 1 or more and grpo.worst 0, not {self.worst}")

    @property
    def definition(self) -> Objective:
        """The objective's entry in the table of objectives."""
        return OBJECTIVES[self.objective]

    @property
    def needs(self) -> frozenset[str]:
        """What the objective needs of the rest of the configuration, as names of `objectives.NEEDS`."""
        return self.definition.needs

    @property
    def replays(self) -> bool:
        """Whether the objective replays the stochastic steps of the rollout."""
        return self.definition.kind == REPLAY

    @property
    def through_reward(self) -> bool:
        """Whether the objective is the gradient of the reward itself."""
        return self.definition.kind == REWARD

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps per training step."""
        return self.updates * self.epochs

    @property
    def on_policy(self) -> bool:
        """Whether every update is the first after its rollout, so that the old policy is the new one."""
        return self.optimizer_steps == 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW after global-norm clipping; `warmup` linear steps, then constant or ("cosine") decaying to 0 at the run's end."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    max_norm: float = 1.0
    warmup: int = 0
    schedule: str = "constant"
    ema_decay: float = 0.9487

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; use a positive number")
        _require(self.schedule in ("constant", "cosine"), f"optimizer.schedule is {self.schedule!r}; use constant or cosine")
        _require(0 <= self.ema_decay < 1, f"optimizer.ema_decay is {self.ema_decay}; use 0 to below 1")
        _require(self.max_norm > 0, f"optimizer.max_norm is {self.max_norm}; use a positive number")


def photographs_folder() -> Path:
    """Where the face networks for photographs lie: `jax-idgrpo/faces/photographs` in XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()
    return base / "jax-idgrpo" / "faces" / "photographs"


PENALTIES = ("missing", "duplicated", "swapped", "switched", "blended", "area", "copied")
PRICES = {"copied": 0.5}  # of penalties that cost something unless the configuration says otherwise


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The reward: face similarity over `frames` evenly spaced frames of each video, a vision-language model's score, or your own function.

    faces: folder with detector, embedder and judge; "embedded" is the drawn-people set in the package, for its own video model alone;
        "photographs" the one of `idgrpo-convert faces --photographs` in the user's cache; "" where none of them is needed.
    custom: function that is the reward, as "package.module:function" or "file.py:function" (see `rewards.custom`); "" is none.
    custom_timeout: seconds after which a call of it is given up, and its videos with it.
    backend: what finds and embeds faces for the reward: "" is the networks of `faces`, on the accelerator; "deepface:DETECTOR/MODEL" is
        deepface's, on the host, such as deepface:retinaface/ArcFace, or deepface:opencv/embedder with the embedder of `faces`.
    head: folder of a reward head trained on pairs (`train-reward` with the task reward_face), as its export; what it says, in log-odds,
        less the costs is then the reward, and the price of a penalty is in log-odds too; "" is the fixed formula.
    vlm: folder of a vision-language reward, as released or as `train-reward` exports it, which is then the reward; "" is the face reward.
    vlm_base: folder of the Qwen2.5-VL model that it was trained from, for what its own folder does not hold.
    vlm_prompt: file with the text that it is asked (text, or the release's prompt_template.py); "" is prompt.txt in its folder.
    vlm_dtype: of its weights and products. vlm_fps: frames per second that it is told; the published scores are at 10.
    vlm_rows: videos that it scores at once, 0 = all. vlm_devices: how many devices it has for itself, the last ones, so that scoring
        overlaps with the next rollout; 0 = it shares the mesh of the video model.
    similarity_low, similarity_high: cosines that score 0 and 1. missing: cosine below which a face counts as nobody. None: as the JSON
        file of the embedder says, since cosines of different networks differ. The judge always has its own.
    soft_weight: share of the soft-minimum over people against their mean.
    penalties: prices of what faces followed through the video show, as JSON {"swapped": 0.5}: missing, duplicated, swapped, switched,
        blended, area (see `rewards.tracks`) and copied (see `rewards.photo_copy`). All are logged; those without a price cost nothing, but
        for copied, which costs 0.5 unless it is given another.
    mixture: weights of further terms by name, as JSON {"motion": 0.25}: the advantage of each within its group, in units of its own spread,
        is added to the reward's, whose weight is 1 unless "reward" is among them. Any term that a step logs for the reward will do.
    """

    faces: str = "embedded"
    custom: str = ""
    custom_timeout: float = 600.0
    backend: str = ""
    frames: int = 5
    similarity_low: float | None = None
    similarity_high: float | None = None
    missing: float | None = None
    soft_weight: float = 0.5
    head: str = ""
    vlm: str = ""
    vlm_base: str = ""
    vlm_prompt: str = ""
    vlm_dtype: str = "bfloat16"
    vlm_fps: float = 10.0
    vlm_rows: int = 0
    vlm_devices: int = 0
    penalties: dict[str, Any] = dataclasses.field(default_factory=dict)
    mixture: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _choice("reward.vlm_dtype", self.vlm_dtype, ("float32", "bfloat16"))
        _require(self.vlm_fps > 0, f"reward.vlm_fps is {self.vlm_fps}; use a positive number")
        for name in ("vlm_rows", "vlm_devices"):
            _require(getattr(self, name) >= 0, f"reward.{name} is {getattr(self, name)}; use 0 or more")
        _require(not self.backend or re.fullmatch(r"deepface:[\w-]+/[\w-]+", self.backend) is not None,
                 f"reward.backend is {self.backend!r}; use deepface:DETECTOR/MODEL, such as deepface:opencv/ArcFace, or leave it out")
        _require(not (self.backend and self.vlm), "reward.backend and reward.vlm are both set; use one of them")
        _require(self.faces != "" or not self.reads_faces,
                 "reward.faces is empty; only a reward.vlm, a reward.custom and models of deepface can do without face networks")
        _require(not (self.head and self.vlm), "reward.head and reward.vlm are mutually exclusive; leave one empty")
        _require(not self.custom or re.fullmatch(r".+:[A-Za-z_]\w*", self.custom) is not None,
                 f"reward.custom is {self.custom!r}; use package.module:function or file.py:function")
        _require(not (self.custom and (self.head or self.vlm or self.backend)),
                 "reward.custom excludes reward.head, reward.vlm and reward.backend; leave them empty")
        _require(not (self.custom and self.mixture), "reward.mixture weighs terms, which reward.custom can do itself; leave it out")
        _require(self.custom_timeout > 0, f"reward.custom_timeout is {self.custom_timeout}; use a positive number of seconds")
        _require(not (self.head and self.backend),
                 "reward.head reads the faces of reward.faces, and reward.backend takes others; leave one empty")
        _require(self.frames >= 1, f"reward.frames is {self.frames}; use 1 or more")
        low, high = self.similarity_low, self.similarity_high
        _require(low is None or high is None or low < high, f"reward.similarity_low {low} is not below similarity_high {high}")
        _require(0 <= self.soft_weight <= 1, f"reward.soft_weight is {self.soft_weight}; use 0 to 1")
        for name, price in self.penalties.items():
            _require(name in PENALTIES, f"reward.penalties knows no {name!r}{closest(name, list(PENALTIES))}")
            _require(isinstance(price, int | float) and price >= 0, f"reward.penalties: {name} is {price!r}; use a number of 0 or more")
        for name, weight in self.mixture.items():
            _require(isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight),
                     f"reward.mixture: {name} is {weight!r}; use a number")

    @property
    def reads_faces(self) -> bool:
        """Whether the reward itself, not the judge alone, reads networks of `faces`."""
        return not (self.vlm or self.custom or (self.backend and not self.backend.endswith("/embedder")))

    def prices(self) -> dict[str, float]:
        """What every penalty costs that costs anything."""
        return PRICES | self.penalties

    def folder(self) -> Path:
        """Folder of the face networks."""
        named = {"embedded": EMBEDDED / "faces", "photographs": photographs_folder()}
        return named.get(self.faces, Path(self.faces))


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation: ODE sampling of `videos` videos per held-out prompt with fixed noise, and bootstrap intervals.

    solver: of the ODE, "euler" (as published) or "unipc". guidance, image_guidance: scales, 0 = the rollout's.
    batch: videos per program call, or the next number that the mesh divides.
    frames, height, width: size of the videos of `evaluate` and `sample`, 0 = video's. Options that
        turn the training videos from landscape to portrait, or back, turn height and width too,
        unless these are given as well.
    """

    prompts: str = "embedded:eval"
    videos: int = 4
    steps: int = 50
    solver: str = "euler"
    guidance: float = 0.0
    image_guidance: float = 0.0
    batch: int = 32
    bootstrap: int = 2000
    frames: int = 0
    height: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        for name in ("videos", "steps", "batch", "bootstrap"):
            _require(getattr(self, name) >= 1, f"evaluate.{name} is {getattr(self, name)}; use 1 or more")
        _choice("evaluate.solver", self.solver, ("euler", "unipc"))
        for name in ("guidance", "image_guidance"):
            _require(getattr(self, name) >= 0, f"evaluate.{name} is {getattr(self, name)}; use a scale, or 0 for the rollout's")
        _require_size("evaluate", self.frames, self.height, self.width, "video's")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of a run, its seed, and what it leaves behind and how often (in training steps; 0 = never).

    give_up_after: training steps in a row without a usable update (none had a finite gradient) that end the run.
    watch_every: sample the first watch_prompts of evaluate.prompts with the averaged weights, score them by reward and judge, and warn
        when the two part: the reward's rise is then no gain in identity.
    """

    steps: int = 1000
    seed: int = 42
    save_every: int = 20
    keep: int = 3
    sample_every: int = 20
    give_up_after: int = 10
    watch_every: int = 0
    watch_prompts: int = 16
    wandb: str = ""

    def __post_init__(self) -> None:
        require_seed("config: run.seed", self.seed)
        _require(self.steps >= 1, f"run.steps is {self.steps}; use 1 or more")
        _require(self.save_every >= 1, f"run.save_every is {self.save_every}; use 1 or more")
        _require(self.keep >= 1, f"run.keep is {self.keep}; use 1 or more")
        _require(self.give_up_after >= 1, f"run.give_up_after is {self.give_up_after}; use 1 or more")
        _require(self.sample_every >= 0, f"run.sample_every is {self.sample_every}; use 0 or more")
        _require(self.watch_every >= 0, f"run.watch_every is {self.watch_every}; use 0 or more")
        _require(self.watch_prompts >= 2, f"run.watch_prompts is {self.watch_prompts}; an interval needs 2 or more")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes the devices that are left.

    data: rows. fsdp: rows and weights. seq: tokens. tensor: heads and hidden features (it must divide both).
    """

    data: int = -1
    fsdp: int = 1
    seq: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(size == -1 or size >= 1, f"mesh.{name} is {size}; use -1 or 1 and more")
        _require(list(sizes.values()).count(-1) <= 1, "mesh: only one axis can be -1")


REWARD_TASKS = ("reward_face", "reward_vlm")
"""Tasks of supervised training that train a reward."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Supervised training: which task, rows per step, and the task's own values as a flat dict (documented by the task).

    task: "vae", "text", "transformer", "detector", "embedder", "reward_face" or "reward_vlm". out: where the trained network is
    stored, in published layout; "" is `export/` in the workdir. start: folder to continue from; "" starts from random weights.
    log_every: training steps that one row of metrics is the mean of.
    """

    task: str = "transformer"
    batch: int = 32
    out: str = ""
    start: str = ""
    log_every: int = 20
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.batch >= 1, f"finetune.batch is {self.batch}; use 1 or more")
        _require(self.log_every >= 1, f"finetune.log_every is {self.log_every}; use 1 or more")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    video: VideoConfig = VideoConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    reward: RewardConfig = RewardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()
    mesh: MeshConfig = MeshConfig()
    finetune: FinetuneConfig = FinetuneConfig()

    def __post_init__(self) -> None:
        sections = dataclasses.asdict(self) | {"finetune.options": self.finetune.options}
        refuse_addresses(sections, but=("data.negative_prompt", "run.wandb"))
        rollout, grpo = self.rollout, self.grpo
        if self.model.kind == "vace":
            for section in ("rollout", "evaluate"):
                scale = getattr(self, section).image_guidance
                _require(scale == 0, f"{section}.image_guidance {scale} scales a branch that only model.kind phantom has; leave it out")
        else:
            _require(self.data.max_people <= 4, f"data.max_people is {self.data.max_people}; model.kind phantom takes up to 4 photos")
        _require(self.judged or not self.reward.reads_faces,
                 f"reward.faces embedded knows drawn people only, and model.path is {self.model.path}; pass --reward.faces FOLDER with "
                 "face networks for photographs, as idgrpo-convert faces makes it")
        _require(rollout.prompts % grpo.updates == 0,
                 f"grpo.updates {grpo.updates} does not divide the {rollout.prompts} prompts of a rollout")
        _require(not grpo.replays or rollout.window != "none",
                 f"grpo.objective {grpo.objective} replays stochastic steps, and rollout.window none has none; use all or a window")
        _require(grpo.replays or rollout.window == "none",
                 f"grpo.objective {grpo.objective} trains on final latents and stores no trajectory; set rollout.window none")
        if rollout.sampler == "cps":
            _require(grpo.kl == 0 or grpo.kl_units == "velocity",
                     "rollout.sampler cps has log-probabilities without std, so that grpo.kl_units std means nothing; use velocity")
            _require("gaussian" not in grpo.needs,
                     f"grpo.objective {grpo.objective} corrects a Gaussian's ratio, and cps has none; use another")
        _require(grpo.best + grpo.worst <= rollout.group,
                 f"grpo.best {grpo.best} and worst {grpo.worst} are more than the {rollout.group} videos of a group")
        _require(not grpo.through_reward or grpo.gradient_steps < rollout.steps,
                 f"grpo.gradient_steps is {grpo.gradient_steps}; use fewer than the {rollout.steps} of rollout.steps")
        _require(not grpo.through_reward or not self.reward.mixture,
                 f"reward.mixture weighs advantages, and grpo.objective {grpo.objective} has none; use reward.penalties")
        for name in ("backend", "custom"):
            _require("smooth_reward" not in grpo.needs or not getattr(self.reward, name),
                     f"grpo.objective {grpo.objective} needs a reward in JAX, and reward.{name} runs beside it; leave the {name} out")
        _require("smooth_reward" not in grpo.needs or not self.reward.vlm,
                 f"grpo.objective {grpo.objective} needs a reward that is smooth in the pixels, and reward.vlm rounds them; use another")
        share = self.trained_rows // grpo.updates
        _require(rollout.rows % self.rows_per_call == 0 and share % self.rows_per_call == 0,
                 f"rollout.micro_batch {self.rows_per_call} does not divide the {rollout.rows} rows of a rollout, or the {share} rows of "
                 f"one of {grpo.updates} updates")
        _require("pairs" not in grpo.needs or self.rows_per_call % 2 == 0,
                 f"rollout.micro_batch {self.rows_per_call} would part the two videos of a pair; use an even number")

    @property
    def judged(self) -> bool:
        """Whether there are face networks that fit what the model shows: those of the package know drawn people only."""
        return self.reward.faces != "" and (self.reward.faces != "embedded" or self.model.draws())

    def image_guidance(self, evaluation: bool = False) -> float | None:
        """Scale of the photos' branch in rollouts or in evaluation; None for a model without it."""
        chosen = (self.evaluate.image_guidance if evaluation else 0) or self.rollout.image_guidance or 5.0
        return chosen if self.model.kind == "phantom" else None

    @property
    def trained_rows(self) -> int:
        """Videos of a rollout that are trained."""
        return self.rollout.prompts * (self.grpo.best + self.grpo.worst or self.rollout.group)

    @property
    def rows_per_call(self) -> int:
        """Rows of one program call, in rollout and update alike."""
        return self.rollout.micro_batch or self.trained_rows // self.grpo.updates

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def _parse(name: str, text: str, kind: Any) -> Any:
    """`text` as a value of type `kind`."""
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"--{name}: {text!r} is not true or false")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"--{name}: {text!r} is not a number of type {kind.__name__}") from None
    if kind is str:
        return text
    if kind == float | None:
        return None if text.lower() in ("none", "null") else _parse(name, text, float)
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise UserError(f"--{name}: {text!r} is not JSON") from None


def override(config: Config, overrides: list[tuple[str, str]]) -> Config:
    """`config` with `("section.field", "text")` pairs applied, checked again.

    Raises:
      UserError: an unknown section or field (with the closest name), or a value of another type.
    """
    known = {f"{section}.{field}": (section, field, kind)
             for section, schema in get_type_hints(Config).items() for field, kind in get_type_hints(schema).items()}
    sections: dict[str, dict[str, Any]] = {}
    for name, text in overrides:
        if name not in known:
            raise UserError(f"unknown option --{name}{closest(name, list(known))}")
        section, field, kind = known[name]
        sections.setdefault(section, {})[field] = _parse(name, text, kind)
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return _turned(dataclasses.replace(config, **changed), {name for name, _ in overrides})


def _turned(config: Config, given: set[str]) -> Config:
    """Turn the evaluation's height and width if options turned the videos', with a warning.

    Args:
      config: with the options applied.
      given: names of the options. `evaluate.height` or `evaluate.width` among them keep the size.
    """
    video, evaluate = config.video, config.evaluate
    fixed = min(evaluate.height, evaluate.width) > 0
    against = (video.height - video.width) * (evaluate.height - evaluate.width) < 0
    turns = given & {"video.height", "video.width"}
    keeps = given & {"evaluate.height", "evaluate.width"}
    if not (fixed and against and turns) or keeps:
        return config
    turned = dataclasses.replace(evaluate, height=evaluate.width, width=evaluate.height)
    warnings.warn(
        f"evaluate.height is {turned.height} and evaluate.width {turned.width}, turned as "
        f"video.height {video.height} and video.width {video.width} are; pass --evaluate.height "
        f"{evaluate.height} --evaluate.width {evaluate.width} to keep them",
        stacklevel=3,
    )
    return dataclasses.replace(config, evaluate=turned)


def load(path: str | Path, overrides: list[tuple[str, str]] | None = None) -> Config:
    """Read a configuration file (a Python file that defines `get_config()`; it may import its neighbours) and apply overrides.

    Raises:
      UserError: the file is missing or cannot be run, defines no `get_config`, or holds a value that is refused.
    """
    path = local_path(path, "config")
    if not path.is_file():
        raise UserError(f"config {path}: no such file; pass the path of a Python file with get_config(), such as configs/quickstart.py")
    sys.path.insert(0, str(path.parent.absolute()))
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except UserError:
        raise
    except KeyError:
        raise UserError(f"config {path}: defines no get_config()") from None
    except Exception as error:
        raise UserError(f"config {path}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(config, Config):
        raise UserError(f"config {path}: get_config() returned {type(config).__name__}, not a jax_idgrpo.config.Config")
    return override(config, overrides or [])
