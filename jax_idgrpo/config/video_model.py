"""Define the configuration of the video model: checkpoint, prompts, size, sampling and mesh."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, ClassVar

from jax_idgrpo.config.model_kinds import REFERENCE_KINDS
from jax_idgrpo.config.options import Section, option, require
from jax_idgrpo.config.weakened import HELP, weak_branch

EMBEDDED = Path(__file__).parents[1] / "synthetic" / "assets"
PUBLISHED_VAE_WIDTH = 96  # first channels of the published VAE; the bundled one has fewer


def require_size(section: str, frames: int, height: int, width: int, unset: str = "") -> None:
    """Refuse a video size that the VAE and the transformer cannot divide.

    Args:
      section: name of the section, for messages.
      frames: number of frames.
      height: height in pixels.
      width: width in pixels.
      unset: meaning of 0; "" refuses 0.
    """
    other = f", or 0 for {unset}" if unset else ""
    allowed = bool(unset)
    require(
        (allowed and frames == 0) or (frames >= 1 and frames % 4 == 1),
        f"{section}.frames is {frames}; use 4n+1, such as 33 or 81{other}",
    )
    for name, size in (("height", height), ("width", width)):
        require(
            (allowed and size == 0) or (size >= 16 and size % 16 == 0),
            f"{section}.{name} is {size}; use a multiple of 16{other}",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The video model that is the policy, and what is trained of it."""

    section: ClassVar[str] = "model"

    path: str = option("embedded", 'checkpoint folder; "embedded" is the bundled model')
    kind: str = option(
        "vace",
        "how photos condition the model; all kinds but vace have plain Wan's tensors, so the kind "
        "must be named",
        choices=REFERENCE_KINDS,
    )
    dtype: str = option(
        "float32",
        "dtype of the transformer's weights and products",
        choices=("float32", "bfloat16"),
    )
    remat: str = option(
        "none",
        "what a block keeps for the backward pass: everything, outputs of linear layers, outputs "
        "of attention, or its input only (then the replay equals the rollout bit for bit)",
        choices=("none", "dots", "attention", "full"),
    )
    unroll: bool = option(
        False, "unroll the scan over blocks: faster on CPU with few layers, larger programs"
    )
    text_memory: str = option(
        "device",
        "where the text encoder is kept while idle; host frees device memory and copies it for new "
        "prompts",
        choices=("device", "host"),
    )
    train: str = option(
        "lora",
        "what is trained: an adapter, or the transformer's own weights (float32 masters, a complete "
        "checkpoint as export; rank and alpha have no effect)",
        choices=("lora", "full"),
    )
    train_layers: str = option(
        "",
        "weights that train full trains: patterns joined by commas, in which * matches any text "
        "and ? one character, and which match a weight's name in diffusers, its end, or a module "
        'in it, such as blocks.2? or attn1; "" = all',
    )
    experts_idle: str = option(
        "device",
        "where the experts of a model with two transformers are kept while they do not run; host "
        "frees device memory and copies an expert for every program that runs it",
        choices=("device", "host"),
    )
    rank: int = option(32, "LoRA rank of the layers of lora_targets", least=1)
    alpha: float = option(32.0, "LoRA alpha; the adapter is scaled by alpha / rank", above=0)
    lora_targets: str = option(
        "to_q,to_k,to_v,to_out",
        "linear layers with LoRA: patterns joined by commas, in which * stands for any text and "
        "which match a layer's name or its end, such as ffn.* or vace_blocks.*; names are those "
        "of diffusers, of the original repository, or of this project",
    )
    lora_ranks: dict[str, Any] = option(
        {},
        'ranks that differ from model.rank, as JSON, such as {"ffn.*": 16}; the first pattern '
        "that matches a layer counts",
    )
    lora_alphas: dict[str, Any] = option(
        {}, 'alphas that differ from model.alpha, as JSON, such as {"ffn.*": 16}'
    )
    adapter: str = option("", 'PEFT adapter to start from; "" starts from a new one')

    base_loras: dict[str, Any] = option(
        {},
        'LoRA files that are merged into the frozen base, as JSON {"PATH": SCALE}; what --lora '
        "PATH:SCALE of train sets",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for path, scale in self.base_loras.items():
            require(
                isinstance(scale, int | float) and not isinstance(scale, bool) and scale > 0,
                f"model.base_loras: {path} is {scale!r}; use a positive number",
            )
        for name, rank in self.lora_ranks.items():
            require(
                isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1,
                f"model.lora_ranks: {name} is {rank!r}; use a whole number of 1 or more",
            )
        for name, alpha in self.lora_alphas.items():
            require(
                isinstance(alpha, int | float) and not isinstance(alpha, bool) and alpha > 0,
                f"model.lora_alphas: {name} is {alpha!r}; use a positive number",
            )
        full = self.train == "full"
        require(
            full or not self.train_layers,
            f"model.train_layers {self.train_layers} selects weights, and model.train lora trains "
            "none; use model.train full",
        )
        require(
            not (full and self.adapter),
            f"model.adapter {self.adapter} has no place with model.train full; start from it with "
            f"--lora {self.adapter}, which merges it into the base",
        )

    def folder(self) -> Path:
        """Return the checkpoint folder."""
        return EMBEDDED / "pipeline" if self.path == "embedded" else Path(self.path)

    def shows_synthetic_people(self) -> bool:
        """Return whether the model is the bundled one or one of its size, judged by its small VAE.

        False if the folder is missing.
        """
        try:
            settings = json.loads((self.folder() / "vae" / "config.json").read_text())
            return bool(settings["base_dim"] < PUBLISHED_VAE_WIDTH)
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclasses.dataclass(frozen=True)
class CurriculumSettings:
    """Settings of `data.curriculum` (see `data.curriculum` in the package).

    Attributes:
      people: largest number of people of a simple prompt.
      steps: training step from which on all prompts are drawn alike.
      power: exponent of the share of prompts that are drawn from all rows.
    """

    people: int
    steps: int
    power: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """Prompts with reference photos."""

    section: ClassVar[str] = "data"

    prompts: str = option(
        "embedded:rl",
        "CSV with the header ref_paths,prompt; embedded:rl and embedded:eval are bundled",
    )
    max_people: int = option(
        4, "largest number of photos per row; rows with fewer are padded", least=1, most=8
    )
    text_length: int = option(512, "tokens that a prompt is padded or cut to", least=1)
    negative_prompt: str = option(
        "garish colours, overexposed, motionless, blurry details, captions, painting, drab grey, "
        "poor quality, compression artefacts, ugly, malformed hands, malformed faces, merged "
        "fingers, messy background, crowd, extra legs, walking backwards",
        "prompt of the unguided branch; @FILE reads it from a file",
    )
    reference_order: str = option(
        "diffusers",
        "order of VACE's reference latents: diffusers puts the last photo first; the other kinds "
        "have one order",
        choices=("diffusers", "original"),
    )
    places_colours: str = option(
        "person",
        "outlines of the boxes in the column places of the prompts, for vace: a colour per person, or "
        "black, as published checkpoints saw boxes",
        choices=("person", "black"),
    )

    curriculum: dict[str, Any] = option(
        {},
        'begin with prompts of few people, as JSON such as {"people": 2, "steps": 200, "power": 1.0}: '
        "all prompts are simple at step 0, and all rows are drawn alike from `steps` on; {} = none",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.curriculum:
            return
        names = [field.name for field in dataclasses.fields(CurriculumSettings)]
        for name, value in self.curriculum.items():
            require(name in names, f"data.curriculum has no {name!r}; use people, steps and power")
            whole = isinstance(value, int) and not isinstance(value, bool)
            real = name == "power" and isinstance(value, float) and math.isfinite(value)
            require(
                (whole or real) and value > 0,
                f"data.curriculum: {name} is {value!r}; use a positive "
                f"{'number' if name == 'power' else 'whole number'}",
            )
        for name in ("people", "steps"):
            require(name in self.curriculum, f"data.curriculum needs {name}; add it")

    @property
    def curriculum_settings(self) -> CurriculumSettings | None:
        """Settings of the curriculum; None without one."""
        return CurriculumSettings(**self.curriculum) if self.curriculum else None

    def prompts_file(self) -> Path:
        """Return the path of the prompts CSV."""
        return prompts_file(self.prompts)


def prompts_file(name: str) -> Path:
    """Return the path of a CSV: "embedded:SET" is bundled; in any other path, ~ is the home."""
    if name.startswith("embedded:"):
        return EMBEDDED / "prompts" / name.removeprefix("embedded:") / "prompts.csv"
    return Path(os.path.expanduser(name))


@dataclasses.dataclass(frozen=True)
class VideoConfig(Section):
    """Size of the videos that are sampled for training."""

    section: ClassVar[str] = "video"

    frames: int = option(33, "frames, 4n+1")
    height: int = option(240, "height in pixels, a multiple of 16")
    width: int = option(416, "width in pixels, a multiple of 16")
    fps: int = option(16, "frames per second of the written files", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_size("video", self.frames, self.height, self.width)

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.height, self.width


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Section):
    """Sampling of groups of videos.

    Windows of stochastic steps:
      all: every step but the last, as published.
      fixed: window_size steps from window_start.
      random: a start drawn per training step from the first half of the schedule.
      per_prompt: a start drawn per prompt and shared by its group; with window_size 1 this is
        Flash-GRPO's iso-temporal step.
      progressive: starts at window_start and moves by one step every window_every training steps
        (MixGRPO).
    With two experts, random and per_prompt draw from all steps of one expert (window_low_noise).
      none: no stochastic step, for objectives that train on final latents.
    """

    section: ClassVar[str] = "rollout"

    prompts: int = option(16, "prompts per training step", least=1)
    group: int = option(8, "videos per prompt", least=2)
    micro_batch: int = option(
        0, "videos per program call, in rollout and update; 0 = all rows of an update", least=0
    )
    steps: int = option(25, "denoising steps", least=2)
    shift: float = option(0.0, "flow shift; 0 = the checkpoint's", least=0)
    guidance: float = option(4.5, "guidance scale of the prompt; 1 = no negative branch")
    guidance_2: float = option(
        0.0,
        "guidance scale of the prompt for the low-noise expert of a model with two; 0 = guidance",
        least=0,
    )
    image_guidance: float = option(
        0.0,
        "guidance scale of the photos, for all kinds but vace; 0 = 5.0, and 1.0 for skyreels",
        least=0,
    )
    weakened: dict[str, Any] = option({}, HELP)
    control_scale: float = option(
        1.0, "strength of the photos' hints in the main blocks, for vace; 1 = as trained", least=0
    )
    sampler: str = option(
        "identity",
        "stochastic steps; identity is as published",
        choices=("identity", "flow", "dance", "cps"),
    )
    noise_level: float = option(
        0.0, "noise level of the sampler; 0 = its own (1, 0.7, 0.3 and 0.7)", least=0
    )
    window: str = option(
        "all",
        "which steps are stochastic and trained; the others are Euler steps",
        choices=("all", "fixed", "random", "per_prompt", "progressive", "none"),
    )
    window_start: int = option(0, "first step of a fixed or progressive window")
    window_size: int = option(0, "steps of a window")
    window_every: int = option(25, "training steps between moves of a progressive window", least=1)
    window_low_noise: float = option(
        0.5,
        "share of the training steps whose random window has steps of the low-noise expert, for a "
        "model with two; the other windows have steps of the high-noise expert",
        least=0,
        most=1,
    )
    final_step: str = option(
        "ode",
        "last step of the schedule; it is never trained; sde is as published",
        choices=("sde", "ode"),
    )
    start_noise: str = option(
        "distinct",
        "initial noise of the videos of a group; with shared, they differ only by the noise of the "
        "trained steps",
        choices=("distinct", "shared"),
    )

    def __post_init__(self) -> None:
        require(
            self.group >= 2,
            f"rollout.group is {self.group}; a group needs 2 or more videos to be compared",
        )
        super().__post_init__()
        weak_branch("rollout.weakened", self.weakened)
        rows = self.prompts * self.group
        require(
            self.micro_batch == 0 or rows % self.micro_batch == 0,
            f"rollout.micro_batch {self.micro_batch} does not divide the {rows} rows of "
            f"{self.prompts} prompts x {self.group} videos",
        )
        require(
            self.sampler != "cps" or self.noise_level <= 1,
            f"rollout.noise_level is {self.noise_level}; cps takes at most 1, where all noise of a "
            "step is fresh",
        )
        if self.window in ("fixed", "progressive"):
            require(
                self.window_size >= 1
                and self.window_start >= 0
                and self.window_start + self.window_size <= self.steps - 1,
                f"rollout.window {self.window_start}+{self.window_size} is not inside the first "
                f"{self.steps - 1} steps",
            )
        if self.window in ("random", "per_prompt"):
            require(
                1 <= self.window_size <= self.steps // 2,
                f"rollout.window_size is {self.window_size}; a random window needs 1 to "
                f"{self.steps // 2} of {self.steps} steps",
            )
        if self.window == "none":
            require(
                self.final_step == "ode",
                "rollout.final_step sde adds noise, which rollout.window none excludes; use ode",
            )
            require(
                self.start_noise == "distinct",
                "rollout.start_noise shared with rollout.window none makes all videos of a group "
                "equal; use distinct",
            )

    @property
    def rows(self) -> int:
        """Number of videos per training step."""
        return self.prompts * self.group

    @property
    def trained_steps(self) -> int:
        """Number of denoising steps that are stochastic and trained per video."""
        return {"all": self.steps - 1, "none": 0}.get(self.window, self.window_size)


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh; -1 takes the devices that are left."""

    section: ClassVar[str] = "mesh"

    data: int = option(-1, "shards rows")
    fsdp: int = option(1, "shards rows and weights")
    seq: int = option(1, "shards tokens")
    tensor: int = option(1, "shards heads and hidden features; must divide both")

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name} is {size}; use -1 or 1 and more")
        require(list(sizes.values()).count(-1) <= 1, "mesh: only one axis can be -1")
