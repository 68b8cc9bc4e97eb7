"""Videos from prompts, scores of videos, and base against adapters on held-out prompts.

Sampling is deterministic from noise that is a pure function of (seed, prompt, member), so every model starts a video
from the same noise and differences are paired. Identity is judged by an embedder that never serves as reward.

Video files are named `NUMBER-MEMBER.mp4`: NUMBER counts the rows of the prompts CSV from 0, MEMBER the videos of a prompt.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt, load_prompts, load_reference, row_digests
from jax_idgrpo.data.video import read_video, to_uint8, write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import bootstrap
from jax_idgrpo.evaluation.sampler import Model, Sampler, all_rows, evaluated, make_models, make_sampler
from jax_idgrpo.evaluation.scoring import Scorer, make_scorer
from jax_idgrpo.metrics import progress
from jax_idgrpo.parallel.hosts import assert_same_across_hosts, print_once, run_once, written_once
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.workdir import prepare_workdir, write_text

SOLVER_NAMES = {"euler": "Euler", "unipc": "UniPC"}
SHOWN = 8  # prompts whose videos are kept for the report


# ---- commands ------------------------------------------------------------------------------------------------------------


def sample(config: Config, prompts: Path, out: Path, lora: Path | None) -> None:
    """Write `evaluate.videos` videos per row of the CSV, and `samples.jsonl`, one line per video.

    Raises:
      UserError: the CSV, a photo, the checkpoint or the adapter cannot be used.
    """
    config = evaluated(config)
    listed = load_prompts(prompts, config.data.max_people)
    assert_same_across_hosts(config, row_digests(listed), adapter=lora or out / "none")
    sampler = make_sampler(config)
    conditioning.warn_of_cut(sampler.pipe.tokenizer, listed, config.data.text_length)
    name, model = list(make_models(sampler, {"tuned": lora} if lora else {}).items())[-1]
    prepare_workdir(out)
    lines = []
    with written_once(out) as folder:
        for batch, videos in sampler.batches(model, all_rows(listed, config.evaluate.videos), f"sampling {name}"):
            for row, video in zip(batch, videos, strict=True):
                file = f"{row.prompt.id:04d}-{row.member}.mp4"
                run_once(write_video, folder / file, video, config.video.fps)
                asked = {"prompt": row.prompt.text, "references": [str(path) for path in row.prompt.references]}
                lines.append({"file": file, **asked, "seed": config.run.seed, "lora": str(lora or "")})
        write_text(folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    print_once(f"{len(lines)} videos in {out}")


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
    assert_same_across_hosts(config, row_digests(listed), videos=videos)
    scorer = make_scorer(config, 1, prompts=[prompt for _, prompt in rows])
    lines = []
    with progress("scoring", len(rows)) as update:
        for done, (file, prompt) in enumerate(rows, 1):
            values = scorer(read_video(file)[None], [prompt])
            lines.append({"file": file.name, "prompt": prompt.text, **{name: float(value[0]) for name, value in values.items()}})
            update(done)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with written_once(out.parent) as folder:
        write_text(folder / out.name, "".join(json.dumps(line) + "\n" for line in lines))
    print_once(f"{len(lines)} scores in {out}; mean reward {np.mean([line['reward'] for line in lines]):.4f}")


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
    assert_same_across_hosts(config, row_digests(listed), **{f"adapter {name}": path for name, path in loras.items()})
    sampler = make_sampler(config)
    conditioning.warn_of_cut(sampler.pipe.tokenizer, listed, config.data.text_length)
    models = make_models(sampler, loras)
    scorer = make_scorer(config, sampler.batch, sampler.pipe.transformer.config.mesh, listed)
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
                    run_once(write_video, out / path, video, config.video.fps)
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
    print_once(f"{table}\n{note}")


def _show(out: Path, prompt: Prompt, config: Config) -> dict[str, Any]:
    """The report's entry of a prompt, its photos stored beside the videos."""
    paths = []
    for m, path in enumerate(prompt.references):
        photo = conditioning.canvas(load_reference(path), config.video.height, config.video.width)
        paths.append(f"videos/{prompt.id:04d}/reference-{m}.png")
        (out / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(photo)).save(out / paths[-1])
    return {"prompt": prompt.text, "references": paths, "videos": {}}
