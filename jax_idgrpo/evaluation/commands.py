"""Videos from prompts, scores of videos, and base against adapters on held-out prompts.

Sampling is deterministic from noise that is a pure function of (seed, prompt, member), so every model starts a video
from the same noise and differences are paired. Identity is judged by an embedder that never serves as reward.

Video files are named `NUMBER-MEMBER.mp4`: NUMBER counts the rows of the prompts CSV from 0, MEMBER the videos of a prompt.
"""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from PIL import Image

from jax_idgrpo import rng
from jax_idgrpo.config import Config, MeshConfig, RewardConfig, prompts_file
from jax_idgrpo.data.prompts import Prompt, load_prompts, load_reference
from jax_idgrpo.data.video import read_video, to_uint8, write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.metrics import progress
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import prove, say, to_host, written_once
from jax_idgrpo.rewards import FaceReward, References, load_reward
from jax_idgrpo.rewards.deepface import DeepFace, HostFaceReward
from jax_idgrpo.rewards.faces import load_stack
from jax_idgrpo.rewards.head import fingerprint, load_head
from jax_idgrpo.rewards.identity import IdentityConfig
from jax_idgrpo.rewards.vlm.reward import VlmReward, load_vlm
from jax_idgrpo.sampling import conditioning, policy, rollout
from jax_idgrpo.sampling.pipeline import Pipeline, add_adapter, load_pipeline, lora_scale
from jax_idgrpo.training.checkpoint import prepare_workdir, write_text

SOLVER_NAMES = {"euler": "Euler", "unipc": "UniPC"}
SHOWN = 8  # prompts whose videos are kept for the report


@dataclasses.dataclass(frozen=True)
class Row:
    """A video that is asked for: its prompt, and its number among the prompt's."""

    prompt: Prompt
    member: int


def all_rows(prompts: Sequence[Prompt], videos: int) -> list[Row]:
    """`videos` videos of each prompt, those of one prompt together."""
    return [Row(prompt, member) for prompt in prompts for member in range(videos)]


# ---- sampling ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """One of the compared models: the policy with its adapter's and its base's arrays."""

    policy: policy.Policy
    lora: nnx.State
    base: nnx.State


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What turns prompts into videos: the networks, the schedule, the encoded negative prompt, and what was encoded so far.

    batch: rows per program call, `evaluate.batch` or the next number that the mesh divides.
    """

    config: Config
    pipe: Pipeline
    batch: int
    schedule: rollout.Schedule
    negative: Float[Array, "L D"]
    cache: conditioning.Cache

    def videos(self, model: Model, rows: Sequence[Row]) -> Float[np.ndarray, "B F H W 3"]:
        """One video in [-1, 1] per row; few rows are filled up to the batch, so that one program serves all."""
        filled = [rows[min(n, len(rows) - 1)] for n in range(self.batch)]
        asked = conditioning.encode(self.pipe, [row.prompt for row in filled], self.config, self.cache)
        ids = jnp.asarray([row.prompt.id for row in filled], jnp.int32)
        members = jnp.asarray([row.member for row in filled], jnp.int32)
        noise = rng.row_keys(rng.key(self.config.run.seed, "evaluate"), ids, members)
        mesh = self.pipe.transformer.config.mesh
        if mesh is not None:
            asked, noise = sharding.put((asked, noise), sharding.batch_sharding(mesh))
        latents = rollout.generate(model.policy, model.lora, model.base, asked, self.negative, self.schedule, noise)
        frames = asked.video_frames(self.config.data.max_people)
        return to_host(rollout.decode(nnx.split(self.pipe.vae), latents, asked.video_start, frames))[: len(rows)]

    def batches(self, model: Model, rows: Sequence[Row], label: str) -> Iterator[tuple[Sequence[Row], Float[np.ndarray, "B F H W 3"]]]:
        """`videos` of many rows, batch by batch, with a progress bar."""
        with progress(label, len(rows)) as update:
            for start in range(0, len(rows), self.batch):
                batch = rows[start : start + self.batch]
                yield batch, self.videos(model, batch)
                update(start + len(batch), {})


def evaluated(config: Config) -> Config:
    """The configuration with the video size of the evaluation."""
    chosen = {name: value for name in ("frames", "height", "width") if (value := getattr(config.evaluate, name))}
    return dataclasses.replace(config, video=dataclasses.replace(config.video, **chosen))


def make_sampler(config: Config, pipe: Pipeline | None = None) -> Sampler:
    """The sampler of a configuration; reads the checkpoint unless it is given."""
    model = config.model
    if pipe is None:
        mesh = sharding.make_mesh(config.mesh, policy_devices(config))
        pipe = load_pipeline(
            model.folder(), model.dtype, model.kind,
            remat=model.remat, unroll=model.unroll, mesh=mesh, text_memory=model.text_memory,
        )
    schedule = rollout.Schedule.make(config.evaluate.steps, config.rollout.shift or pipe.shift, solver=config.evaluate.solver)
    given = schedule, conditioning.encode_negative(pipe, config.data)
    mesh = pipe.transformer.config.mesh
    schedule, negative = jax.device_put(given) if mesh is None else sharding.put(given, sharding.replicated(mesh))
    batch = sharding.rows_for(mesh, config.evaluate.batch)
    return Sampler(config=config, pipe=pipe, batch=batch, schedule=schedule, negative=negative, cache=conditioning.Cache())


def make_models(sampler: Sampler, loras: Mapping[str, Path]) -> dict[str, Model]:
    """"base" and the adapters. The base is held as an adapter whose output is zero, so that one program runs them all.

    Raises:
      UserError: an adapter does not fit the checkpoint.
    """
    config, mesh = sampler.config, sampler.pipe.transformer.config.mesh
    guidance = config.evaluate.guidance or config.rollout.guidance, config.image_guidance(evaluation=True)

    def model(transformer: WanTransformer) -> Model:
        actor, lora, base = policy.split(transformer, *guidance)
        return Model(actor, lora if mesh is None else sharding.place(mesh, lora), base)

    rank, alpha = lora_scale(next(iter(loras.values()))) if loras else (1, 1.0)
    plain = add_adapter(sampler.pipe.transformer, rank, alpha, rng.key(0, "init"))
    models = {"base": model(plain)}
    for name, path in loras.items():
        sampler.pipe.load_lora(path)
        models[name] = dataclasses.replace(model(sampler.pipe.transformer), base=models["base"].base)
    return models


# ---- scoring -------------------------------------------------------------------------------------------------------------


def make_reward(config: RewardConfig, embedder: str = "embedder", mesh: Mesh | None = None) -> FaceReward:
    """The reward of a configuration; `embedder="judge"` measures with the network that never serves as reward, and by our own stack.

    mesh: where the videos will be; the networks are then on each of its devices.

    Raises:
      UserError: a network is missing or damaged, or the backend is not installed.
    """
    constants = IdentityConfig(
        null_similarity=config.missing,
        low=config.similarity_low,
        high=config.similarity_high,
        mean_weight=1 - config.soft_weight,
        penalties=tuple(config.prices().items()),
    )
    if embedder != "embedder":
        return load_reward(config.folder(), embedder, 0, constants)
    if config.backend:
        return HostFaceReward(DeepFace(config.backend, config.folder()), constants, config.frames)
    stack = load_stack(config.folder(), embedder)
    head = load_head(Path(config.head), fingerprint(stack), config) if config.head else None
    reward = FaceReward(stack, constants, config.frames, head)
    if mesh is not None:
        reward.state = sharding.put(reward.state, sharding.replicated(mesh))
    return reward


def policy_devices(config: Config) -> list[jax.Device]:
    """The devices of the video model: all but those that the reward has for itself.

    Raises:
      UserError: the reward would have them all, or devices of other processes.
    """
    devices, own = jax.devices(), config.reward.vlm_devices
    if own >= len(devices):
        raise UserError(f"reward.vlm_devices is {own}, but there are {len(devices)} devices; leave one or more to the video model")
    if own and jax.process_count() > 1:
        raise UserError(f"reward.vlm_devices is {own}, but the run has several processes; use 0, so that the reward shares their mesh")
    return devices[: len(devices) - own]


def make_vlm(config: Config, mesh: Mesh | None) -> VlmReward:
    """The vision-language reward, for videos of the configuration's size, on its own devices or on `mesh`."""
    own, video = config.reward.vlm_devices, config.video
    if own:
        policy_devices(config)
        mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1), jax.devices()[-own:])
    return load_vlm(config.reward, (video.frames, video.height, video.width), mesh)


def references(prompts: Sequence[Prompt], config: Config) -> References:
    """The reference photos of each prompt at the size of the video, white padding behind them, and as they are stored."""
    size, people = (config.video.height, config.video.width), config.data.max_people
    images, mask = np.ones((len(prompts), people, *size, 3), np.float32), np.zeros((len(prompts), people), bool)
    photos = tuple(tuple(load_reference(path) for path in prompt.references) for prompt in prompts)
    for n, row in enumerate(photos):
        for m, photo in enumerate(row):
            images[n, m], mask[n, m] = conditioning.canvas(photo, *size), True
    return References(images=images, mask=mask, photos=photos)


Scorer = Callable[[np.ndarray, Sequence[Prompt]], bootstrap.Scores]

JUDGED = {
    "judge_identity": "similarity",
    "faces": "faces_share",
    "motion": "motion",
    "judge_minimum": "similarity_min",
    "judge_largest": "largest_face",
    "count": "count_accuracy",
    "swapped": "swapped",
    "duplicated": "duplicated",
    "blended": "blended",
}
"""Value of a video -> the judge's term."""


def make_scorer(config: Config, batch: int, mesh: Mesh | None = None) -> Scorer:
    """A function from at most `batch` videos and their prompts to values of `statistics.LABELS`, one of each per video.

    reward: the training reward. judge_identity: cosine between the judge's embeddings of photo and matched face, a missing person
    counting 0, mean over frames and people; judge_minimum: that of the least alike person; judge_largest: of the largest face alone, as
    papers with one person measure. embedder_identity: as the judge's, by the embedder of the reward. faces: detected faces per person
    asked for, at most 1. count: share of frames with the right number. motion: mean change between neighbouring frames outside the faces.

    A vision-language reward has no embedder of its own; where it has several dimensions each is there by its name, and without
    `reward.faces` there is no judge, so that what it measures is left out.
    """
    vlm = make_vlm(config, mesh) if config.reward.vlm else None
    reward = vlm or make_reward(config.reward)
    judge = make_reward(config.reward, "judge") if config.reward.faces else None

    def score(videos: Float[np.ndarray, "B F H W 3"], prompts: Sequence[Prompt]) -> bootstrap.Scores:
        filled = np.minimum(np.arange(batch), len(prompts) - 1)     # one program, however many videos there are
        listed = [prompts[n] for n in filled]
        asked, texts = references(listed, config), [prompt.text for prompt in listed]
        watched = jnp.asarray(videos[filled])
        reward(watched, asked, texts)
        found = {"reward": reward.terms["reward"], "motion": reward.terms["motion"]}
        if vlm is None:
            found["embedder_identity"] = reward.terms["similarity"]
        elif len(vlm.settings.dimensions) > 1:
            found |= {name: vlm.terms[name] for name in vlm.settings.dimensions}
        if judge is not None:
            judge(watched, asked, texts)
            found |= {name: judge.terms[term] for name, term in JUDGED.items()}
        return {name: np.asarray(value, np.float64)[: len(prompts)] for name, value in found.items()}

    return score


# ---- while training goes on ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Watch:
    """A few held-out prompts, one video each from fixed noise, scored by reward and judge every now and then.

    folder: gets one JSON file per time, named by the training step, with the values of every video; 0 is the start of the run.
    """

    sampler: Sampler
    scorer: Scorer
    rows: Sequence[Row]
    folder: Path

    @classmethod
    def make(cls, config: Config, pipe: Pipeline, folder: Path) -> "Watch":
        """The first `run.watch_prompts` of `evaluate.prompts`, at the size of the training videos.

        Raises:
          UserError: the prompts or their photos cannot be used.
        """
        listed = load_prompts(prompts_file(config.evaluate.prompts), config.data.max_people)[: config.run.watch_prompts]
        few = min(config.evaluate.batch, len(listed))
        sampler = make_sampler(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, batch=few)), pipe)
        scorer = make_scorer(config, sampler.batch, pipe.transformer.config.mesh)
        return cls(sampler=sampler, scorer=scorer, rows=all_rows(listed, 1), folder=folder)

    def scores(self, model: Model, step: int) -> bootstrap.Scores:
        """Every video's values, which are also stored."""
        size = self.sampler.batch
        batches = [self.rows[first : first + size] for first in range(0, len(self.rows), size)]
        parts = [self.scorer(self.sampler.videos(model, batch), [row.prompt for row in batch]) for batch in batches]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if jax.process_index() == 0:
            self.folder.mkdir(exist_ok=True)
            write_text(self._file(step), json.dumps({name: values.tolist() for name, values in found.items()}))
        return found

    def begin(self, model: Model) -> None:
        """Score what the run starts from, unless an earlier part of the run did."""
        if not self._file(0).exists():
            self.scores(model, 0)

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        """Means to log after `step` training steps, with a warning where the reward rose and the judge fell, each beyond doubt."""
        now, evaluation = self.scores(model, step), self.sampler.config.evaluate
        first = {name: np.asarray(values) for name, values in json.loads(self._file(0).read_text()).items()}
        scores, clusters = {"base": first, "now": now}, np.arange(len(self.rows))
        changes = bootstrap.summarise(scores, clusters, self.sampler.config.run.seed, evaluation.bootstrap)[1]["now"]
        parted = "judge_identity" in changes and changes["reward"].low > 0 > changes["judge_identity"].high
        if parted:
            warnings.warn(
                f"step {step}: on {len(self.rows)} held-out prompts the reward rose by {changes['reward'].text(sign=True)} and the judge's "
                f"identity fell by {changes['judge_identity'].text(sign=True)} since the start: the policy is gaming the reward; look at "
                "samples/, raise grpo.kl, or go back to an earlier checkpoint",
                stacklevel=2,
            )
        return {f"watch_{name}": float(values.mean()) for name, values in now.items()} | {"watch_parted": float(parted)}

    def _file(self, step: int) -> Path:
        return self.folder / f"{step:06d}.json"


# ---- commands ------------------------------------------------------------------------------------------------------------


def sample(config: Config, prompts: Path, out: Path, lora: Path | None) -> None:
    """Write `evaluate.videos` videos per row of the CSV, and `samples.jsonl`, one line per video.

    Raises:
      UserError: the CSV, a photo, the checkpoint or the adapter cannot be used.
    """
    config = evaluated(config)
    listed = load_prompts(prompts, config.data.max_people)
    prove(config, prompts, adapter=lora or out / "none")
    sampler = make_sampler(config)
    name, model = list(make_models(sampler, {"tuned": lora} if lora else {}).items())[-1]
    prepare_workdir(out)
    lines = []
    with written_once(out) as folder:
        for batch, videos in sampler.batches(model, all_rows(listed, config.evaluate.videos), f"sampling {name}"):
            for row, video in zip(batch, videos, strict=True):
                file = f"{row.prompt.id:04d}-{row.member}.mp4"
                write_video(folder / file, video, config.video.fps)
                asked = {"prompt": row.prompt.text, "references": [str(path) for path in row.prompt.references]}
                lines.append({"file": file, **asked, "seed": config.run.seed, "lora": str(lora or "")})
        write_text(folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    say(f"{len(lines)} videos in {out}")


def score(config: Config, videos: Path, prompts: Path, out: Path) -> None:
    """Score the videos of a folder against the CSV and write one JSON line per video, in the order of the file names.

    Raises:
      UserError: no video is found, a name does not start with the number of a row, or a file cannot be read.
    """
    listed = load_prompts(prompts, config.data.max_people)
    files = sorted(videos.glob("*.mp4")) if videos.is_dir() else [videos]
    if not files:
        raise UserError(f"--videos {videos}: holds no .mp4 file; pass a folder that `idgrpo sample` wrote")
    rows = [(file, listed[_row_number(file, len(listed))]) for file in files]
    prove(config, prompts, videos=videos)
    scorer = make_scorer(config, 1)
    lines = []
    with progress("scoring", len(rows)) as update:
        for done, (file, prompt) in enumerate(rows, 1):
            values = scorer(read_video(file)[None], [prompt])
            lines.append({"file": file.name, "prompt": prompt.text, **{name: float(value[0]) for name, value in values.items()}})
            update(done)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with written_once(out.parent) as folder:
        write_text(folder / out.name, "".join(json.dumps(line) + "\n" for line in lines))
    say(f"{len(lines)} scores in {out}; mean reward {np.mean([line['reward'] for line in lines]):.4f}")


def _row_number(file: Path, rows: int) -> int:
    match = re.match(r"\d+", file.name)
    if not match or int(match[0]) >= rows:
        raise UserError(f"video {file}: its name must start with its row in the prompts CSV, 0 to {rows - 1}, as in 0000-0.mp4")
    return int(match[0])


def evaluate(config: Config, prompts: Path, out: Path, loras: Mapping[str, Path]) -> None:
    """Compare the base with adapters on the CSV's prompts: `metrics.json`, `table.md` (also printed) and `videos/` for the report.

    Raises:
      UserError: the CSV, a photo, the checkpoint or an adapter cannot be used.
    """
    config = evaluated(config)
    listed = load_prompts(prompts, config.data.max_people)
    prove(config, prompts, **{f"adapter {name}": path for name, path in loras.items()})
    sampler = make_sampler(config)
    models = make_models(sampler, loras)
    scorer = make_scorer(config, sampler.batch, sampler.pipe.transformer.config.mesh)
    prepare_workdir(out)
    with written_once(out) as folder:
        _compare(config, listed, sampler, models, scorer, folder)


def _compare(
    config: Config, listed: Sequence[Prompt], sampler: Sampler, models: Mapping[str, Model], scorer: Scorer, out: Path
) -> None:
    """Sample, score and write what `evaluate` leaves."""
    rows = all_rows(listed, config.evaluate.videos)
    shown = [_show(out, prompt, config) for prompt in listed[:SHOWN]]
    scores: dict[str, bootstrap.Scores] = {}
    for name, model in models.items():
        parts = []
        for batch, videos in sampler.batches(model, rows, f"evaluating {name}"):
            parts.append(scorer(videos, [row.prompt for row in batch]))
            told = "judge_identity" if "judge_identity" in parts[-1] else "reward"
            for row, video, value in zip(batch, videos, parts[-1][told], strict=True):
                if row.member == 0 and row.prompt.id < SHOWN:
                    path = f"videos/{row.prompt.id:04d}/{name}.mp4"
                    write_video(out / path, video, config.video.fps)
                    shown[row.prompt.id]["videos"][name] = {"path": path, told: float(value)}
        scores[name] = {metric: np.concatenate([part[metric] for part in parts]) for metric in bootstrap.LABELS if metric in parts[0]}
    clusters = np.asarray([row.prompt.id for row in rows])
    means, changes = bootstrap.summarise(scores, clusters, config.run.seed, config.evaluate.bootstrap)
    compared = bootstrap.pairs(scores, clusters, config.run.seed, config.evaluate.bootstrap)
    note = (
        f"{len(listed)} prompts x {config.evaluate.videos} videos, {config.evaluate.steps} {SOLVER_NAMES[config.evaluate.solver]} steps, "
        "the same noise for every model; 95 % bootstrap intervals over prompts"
    )
    found = bootstrap.document(means, changes, compared) | {"videos": bootstrap.per_video(scores, clusters)}
    document = {"note": note, **found, "shown": shown}
    table = bootstrap.markdown(means, changes) + (f"\n{bootstrap.pairs_markdown(compared)}" if compared else "")
    write_text(out / "metrics.json", json.dumps(document, indent=1))
    write_text(out / "table.md", f"{table}\n{note}\n")
    say(f"{table}\n{note}")


def _show(out: Path, prompt: Prompt, config: Config) -> dict[str, Any]:
    """The report's entry of a prompt, its photos stored beside the videos."""
    paths = []
    for m, path in enumerate(prompt.references):
        photo = conditioning.canvas(load_reference(path), config.video.height, config.video.width)
        paths.append(f"videos/{prompt.id:04d}/reference-{m}.png")
        (out / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(photo)).save(out / paths[-1])
    return {"prompt": prompt.text, "references": paths, "videos": {}}
