"""The schema of a run: frozen dataclasses, checked when built, read from a Python file and overridden from the command line.

A configuration file holds values only: `get_config() -> Config`. `load(path, overrides)` runs it, applies `section.field=value`
pairs and returns the checked `Config`. Every error is one line that names the field and the remedy.
"""

import dataclasses
import difflib
import json
import runpy
import sys
from pathlib import Path
from typing import Any, get_type_hints

from jax_idgrpo.errors import UserError

EMBEDDED = Path(__file__).parent / "embedded"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"config: {message}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which video model is the policy and how it is held.

    path: checkpoint folder (diffusers layout); "embedded" is the tiny set in the package.
    dtype: dtype of the transformer's matrix products, "float32" or "bfloat16"; everything else is float32.
    remat: rematerialisation policy of the block scan, "none", "dots" or "full".
    unroll: unroll the block scan (fast on CPU for few layers; program size grows with depth).
    rank, alpha: LoRA rank and alpha on q, k, v, o of both attentions, in main and VACE blocks.
    adapter: PEFT adapter to start from; "" starts from B = 0.
    """

    path: str = "embedded"
    kind: str = "vace"
    dtype: str = "float32"
    remat: str = "none"
    unroll: bool = False
    rank: int = 32
    alpha: float = 32.0
    adapter: str = ""

    def __post_init__(self) -> None:
        _require(self.kind == "vace", f"model.kind is {self.kind!r}; only 'vace' is supported")
        _require(self.dtype in ("float32", "bfloat16"), f"model.dtype is {self.dtype!r}; use float32 or bfloat16")
        _require(self.remat in ("none", "dots", "full"), f"model.remat is {self.remat!r}; use none, dots or full")
        _require(self.rank >= 1, f"model.rank is {self.rank}; an adapter needs a rank of 1 or more")
        _require(self.alpha > 0, f"model.alpha is {self.alpha}; use a positive number, usually the rank")

    def folder(self) -> Path:
        """The checkpoint folder."""
        return EMBEDDED / "pipeline" if self.path == "embedded" else Path(self.path)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Prompts with reference photos.

    prompts: CSV `ref_paths,prompt`; "embedded:rl" and "embedded:eval" are the sets in the package.
    max_people: most reference photos that a row may have; rows with fewer are padded and masked.
    text_length: tokens a prompt is padded or cut to.
    negative_prompt: text of the unguided branch; "@FILE" reads it from a file.
    reference_order: order of the reference latents, "diffusers" (last photo first) or "original".
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
    """The CSV that `name` means: "embedded:SET" is a set of the package, anything else a path."""
    return EMBEDDED / "prompts" / name.removeprefix("embedded:") / "prompts.csv" if name.startswith("embedded:") else Path(name)


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """Size of the videos that training samples: frames (4n+1), height and width in pixels (multiples of 16), frames per second."""

    frames: int = 33
    height: int = 240
    width: int = 416
    fps: int = 16

    def __post_init__(self) -> None:
        _require(self.frames >= 1 and self.frames % 4 == 1, f"video.frames is {self.frames}; use 4n+1, such as 33 or 81")
        for name in ("height", "width"):
            size = getattr(self, name)
            _require(size >= 16 and size % 16 == 0, f"video.{name} is {size}; use a multiple of 16")
        _require(self.fps >= 1, f"video.fps is {self.fps}; use 1 or more")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a group of videos is sampled.

    prompts, group: prompts per training step and videos per prompt; together the batch.
    micro_batch: rows per program call in rollout and update alike, 0 = all rows of an update.
    steps, shift, guidance: denoising steps, flow shift (0 = the checkpoint's), guidance scale (1 = no negative branch).
    window: which steps are stochastic and trained: "all", "fixed" (window_start, window_size) or "random" (a start drawn per
        training step from the first half of the schedule).
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
    window: str = "all"
    window_start: int = 0
    window_size: int = 0
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
        _require(self.window in ("all", "fixed", "random"), f"rollout.window is {self.window!r}; use all, fixed or random")
        _require(self.final_step in ("sde", "ode"), f"rollout.final_step is {self.final_step!r}; use sde or ode")
        _require(self.start_noise in ("distinct", "shared"), f"rollout.start_noise is {self.start_noise!r}; use distinct or shared")
        if self.window == "fixed":
            _require(self.window_size >= 1 and self.window_start >= 0 and self.window_start + self.window_size <= self.steps - 1,
                     f"rollout.window {self.window_start}+{self.window_size} does not lie inside the first {self.steps - 1} steps")
        if self.window == "random":
            _require(1 <= self.window_size <= self.steps // 2,
                     f"rollout.window_size is {self.window_size}; a random window needs 1 to {self.steps // 2} of {self.steps} steps")

    @property
    def rows(self) -> int:
        """Videos per training step."""
        return self.prompts * self.group

    @property
    def trained_steps(self) -> int:
        """Denoising steps that are trained per video."""
        return self.steps - 1 if self.window == "all" else self.window_size


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """The objective: clip range of the ratio, KL coefficient against the LoRA-off base, advantage clip and denominator constant.

    updates: optimizer steps per rollout, each over an equal share of the prompts (the later ones are off-policy).
    """

    clip: float = 1e-3
    kl: float = 0.004
    advantage_clip: float = 5.0
    advantage_eps: float = 1e-4
    global_std: bool = False
    updates: int = 1

    def __post_init__(self) -> None:
        _require(self.clip > 0, f"grpo.clip is {self.clip}; use a positive number")
        _require(self.kl >= 0, f"grpo.kl is {self.kl}; use 0 or more")
        _require(self.advantage_clip > 0, f"grpo.advantage_clip is {self.advantage_clip}; use a positive number")
        _require(self.advantage_eps > 0, f"grpo.advantage_eps is {self.advantage_eps}; use a positive number")
        _require(self.updates >= 1, f"grpo.updates is {self.updates}; use 1 or more")


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


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """The reward: face similarity over `frames` evenly spaced frames of each video.

    faces: folder with detector, embedder and judge; "embedded" is the drawn-people set in the package.
    similarity_low, similarity_high: cosines that score 0 and 1. missing: cosine below which a face counts as nobody.
    soft_weight: share of the soft-minimum over people against their mean.
    """

    faces: str = "embedded"
    frames: int = 5
    similarity_low: float = 0.0
    similarity_high: float = 0.9
    missing: float = 0.15
    soft_weight: float = 0.5

    def __post_init__(self) -> None:
        _require(self.frames >= 1, f"reward.frames is {self.frames}; use 1 or more")
        _require(self.similarity_low < self.similarity_high,
                 f"reward.similarity_low {self.similarity_low} is not below similarity_high {self.similarity_high}")
        _require(0 <= self.soft_weight <= 1, f"reward.soft_weight is {self.soft_weight}; use 0 to 1")

    def folder(self) -> Path:
        """Folder of the face networks."""
        return EMBEDDED / "faces" if self.faces == "embedded" else Path(self.faces)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation: ODE sampling of `videos` videos per held-out prompt with fixed noise, and bootstrap intervals."""

    prompts: str = "embedded:eval"
    videos: int = 4
    steps: int = 50
    batch: int = 32
    bootstrap: int = 2000
    frames: int = 0
    height: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        for name in ("videos", "steps", "batch", "bootstrap"):
            _require(getattr(self, name) >= 1, f"evaluate.{name} is {getattr(self, name)}; use 1 or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Length of a run, its seed, and what it leaves behind and how often (in training steps; 0 = never)."""

    steps: int = 1000
    seed: int = 42
    save_every: int = 20
    keep: int = 3
    sample_every: int = 20
    wandb: str = ""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"run.steps is {self.steps}; use 1 or more")
        _require(self.save_every >= 1, f"run.save_every is {self.save_every}; use 1 or more")
        _require(self.keep >= 1, f"run.keep is {self.keep}; use 1 or more")
        _require(self.sample_every >= 0, f"run.sample_every is {self.sample_every}; use 0 or more")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis: `data` shards the batch, `fsdp` the batch and the weights; -1 takes the devices that are left."""

    data: int = -1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "fsdp"):
            _require(getattr(self, name) == -1 or getattr(self, name) >= 1, f"mesh.{name} is {getattr(self, name)}; use -1 or 1 and more")
        _require((self.data, self.fsdp).count(-1) <= 1, "mesh: only one axis can be -1")


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Supervised training: which task, rows per step, and the task's own values as a flat dict (documented by the task).

    task: "vae", "text", "transformer", "detector" or "embedder". out: where the trained network is stored, in published layout;
    "" is `export/` in the workdir. start: folder to continue from; "" starts from random weights.
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
        _require(self.rollout.prompts % self.grpo.updates == 0,
                 f"grpo.updates {self.grpo.updates} does not divide the {self.rollout.prompts} prompts of a rollout")
        share = self.rollout.rows // self.grpo.updates
        _require(share % self.rows_per_call == 0,
                 f"rollout.micro_batch {self.rows_per_call} does not divide the {share} rows of one of {self.grpo.updates} updates")

    @property
    def rows_per_call(self) -> int:
        """Rows of one program call, in rollout and update alike."""
        return self.rollout.micro_batch or self.rollout.rows // self.grpo.updates

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def _closest(name: str, names: list[str]) -> str:
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"; did you mean {match[0]}?" if match else ""


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
            raise UserError(f"unknown option --{name}{_closest(name, list(known))}")
        section, field, kind = known[name]
        sections.setdefault(section, {})[field] = _parse(name, text, kind)
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def load(path: str | Path, overrides: list[tuple[str, str]] | None = None) -> Config:
    """Read a configuration file (a Python file that defines `get_config()`; it may import its neighbours) and apply overrides.

    Raises:
      UserError: the file is missing or cannot be run, defines no `get_config`, or holds a value that is refused.
    """
    path = Path(path)
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
