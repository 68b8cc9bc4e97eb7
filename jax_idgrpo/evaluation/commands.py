"""Sample videos, score videos, and compare adapters with the base on held-out prompts.

Sampling is deterministic. Its noise is a pure function of (seed, prompt, member), so every model
starts a video from the same noise and differences are paired. Identity is judged by an embedder
that is never used as reward.

Video files are named `NUMBER-MEMBER.mp4`. NUMBER is the row of the prompts CSV and MEMBER the video
of the prompt, both from 0. An interrupted command continues when it is run again (see `journal`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array
from PIL import Image

from checkpoints_convert.places import LoRASum
from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt, load_prompts, load_reference, row_digests
from jax_idgrpo.data.video import list_videos, to_uint8, write_video
from jax_idgrpo.errors import Failure, UserError
from jax_idgrpo.evaluation import (
    bootstrap,
    hacking,
    journal,
    opens2v,
    recognition,
    score_files,
    score_page,
)
from jax_idgrpo.evaluation.listing import SAMPLES, list_named, list_rows
from jax_idgrpo.evaluation.recorder import Recorder
from jax_idgrpo.evaluation.sampler import (
    Row,
    all_rows,
    best_videos,
    evaluated,
    fetch,
    make_models,
    make_sampler,
)
from jax_idgrpo.evaluation.scoring import RewardScorer, make_scorer
from jax_idgrpo.evaluation.streaming import make_clip_scorer
from jax_idgrpo.parallel.hosts import (
    assert_same_across_hosts,
    print_once,
    run_once,
)
from jax_idgrpo.rewards.faces import load_architecture
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.workdir import prepare_workdir, write_text

SOLVER_NAMES = {"euler": "Euler", "unipc": "UniPC"}
CANDIDATES = 64  # number of prompts whose first video is written, for the report to choose from
SHOWN = 4  # number of prompts that the report shows of each group
SCORES = "scores.jsonl"


# ---- sample --------------------------------------------------------------------------------------


def sample(
    config: Config, prompts: Path, out: Path, lora: Path | LoRASum | None, best_of: int = 1
) -> None:
    """Write `evaluate.videos` videos per row of the CSV, and `samples.jsonl`, one line per video.

    Videos from an earlier run of the same command are kept. With `best_of`, each video is the one
    with the highest reward of that many, and its line has the rewards of all.

    Args:
      config: model and sampling settings.
      prompts: the prompts CSV.
      out: output folder.
      lora: adapter, or a sum of adapters; None samples from the base.
      best_of: number of videos from which each written one is chosen; 1 loads no reward.

    Raises:
      UserError: the CSV, a photo, the checkpoint or the adapter cannot be used, or the folder
        contains videos of other prompts, settings or weights.
      Failure: a video is not finite.
    """
    config = evaluated(config)
    listed = load_prompts(prompts, config.data.max_people)
    conditioning.refuse_controls(listed, config.model.kind)
    assert_same_across_hosts(config, row_digests(listed), **journal.lora_files("adapter", lora))
    rows = all_rows(listed, config.evaluate.videos)
    facts = journal.video_facts(config, lora)
    if best_of > 1:
        facts = [*facts, best_of, journal.reward_facts(config)]
    of_prompt = {prompt.id: journal.prompt_facts(prompt) for prompt in listed}
    lines = {row.name: _sample_line(row, config, lora) for row in rows}
    for row in rows:
        lines[row.name]["key"] = journal.digest(facts, of_prompt[row.prompt.id], row.member)
    kept = set(journal.decided(lambda: _kept_videos(out, lines)))
    if kept:
        print_once(f"{len(kept)} of {len(rows)} videos are in {out} already")
    missing = [row for row in rows if row.name not in kept]
    if missing:
        sampler = make_sampler(config)
        conditioning.warn_of_cut(sampler.pipe.tokenizer, listed, config.data.text_length)
        name, model = list(make_models(sampler, {"tuned": lora} if lora else {}).items())[-1]
        scorer = None
        if best_of > 1:
            mesh = sampler.pipe.transformer.config.mesh
            scorer = RewardScorer(config, sampler.batch, mesh, listed)
        prepare_workdir(out)
        known = {line["file"]: line for line in journal.read_lines(out / SAMPLES)}
        for row in rows:
            if row.name in kept:
                lines[row.name] = known[lines[row.name]["file"]]
        ours = [lines[row.name] for row in rows if row.name in kept]
        written = journal.Journal(out / SAMPLES, ours)
        label = f"sampling {name}"
        for row, pixels, rewards in best_videos(sampler, model, missing, best_of, scorer, label):
            if rewards:
                lines[row.name]["rewards"] = rewards
            # The line is written first, because a video without a line is refused on resume.
            written.add([lines[row.name]])
            run_once(write_video, out / lines[row.name]["file"], pixels, config.video.fps)
    run_once(write_text, out / SAMPLES, journal.text_of(lines.values()))
    print_once(f"{len(lines)} videos in {out}")


def _sample_line(row: Row, config: Config, lora: Path | LoRASum | None) -> dict[str, Any]:
    return {
        "file": f"{row.name}.mp4",
        "prompt": row.prompt.text,
        "references": [str(path) for path in row.prompt.references],
        "seed": config.run.seed,
        "lora": str(lora or ""),
    }


def _kept_videos(out: Path, lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """List the names of the videos in a folder, all of which this command must have written.

    Raises:
      UserError: the folder contains other videos.
    """
    if not out.is_dir():
        return []
    known = {line.get("file"): line.get("key") for line in journal.read_lines(out / SAMPLES)}
    ours = {line["file"]: line["key"] for line in lines.values()}
    videos = list_videos(out)[0]
    others = [
        file.name
        for file in videos
        if file.name not in ours or known.get(file.name) != ours[file.name]
    ]
    if others:
        raise UserError(
            f"--out {out}: holds {len(others)} videos that were made otherwise (by other prompts, "
            f"settings or weights), such as {others[0]}; name another folder, or remove them"
        )
    return [file.stem for file in videos]


# ---- score ---------------------------------------------------------------------------------------


def score(
    config: Config,
    videos: Path,
    prompts: Path,
    out: Path,
    report: Path | None = None,
    benchmark: bool = False,
) -> None:
    """Score videos against the CSV and write one JSON line per video, in the order of their names.

    `listing` finds the row of each video. A video that cannot be scored gets a null reward and the
    reason. Unfinished scores are written to `OUT.part`. With a report, the faces of every video are
    recorded (`recorder`) and shown by a page (`score_page`), which is written even if videos could
    not be scored.

    Args:
      config: settings of the reward.
      videos: a folder of videos, or one video file.
      prompts: the prompts CSV.
      out: output file.
      report: folder of the report; None writes none.
      benchmark: whether `prompts` is OpenS2V-Eval (`opens2v`), whose table goes to the report.

    Raises:
      UserError: no video is found, the row of a video is unknown, or a report is asked for without
        face networks.
      Failure: videos could not be scored.
    """
    asked = opens2v.load(prompts, config.data.max_people) if benchmark else None
    rows, base = _rows_to_score(config, videos, prompts, asked)
    shown = list({prompt.id: prompt for _, prompt in rows}.values())
    # A picture of a benchmark cannot be replaced, so one without a face costs its own videos only.
    checked = shown if asked is None else []
    keys = score_files.keys_of(config, rows, checked)
    part = out.with_name(f"{out.name}.part")
    lines = score_files.finished_lines(part, report, keys)
    waiting = [(key, *row) for key, row in zip(keys, rows, strict=True) if key not in lines]
    scorer = make_clip_scorer(config, checked if waiting else [])
    recorder = None
    if report is not None:
        measure = {} if asked is None else {"measure": opens2v.measure}
        recorder = Recorder(config, scorer, report, base, **measure)
        prepare_workdir(report)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    lines, refused = score_files.score_rows(scorer, recorder, waiting, part, lines)
    every = [lines.get(key) or refused[key] for key in keys]
    if report is not None:  # it is shared
        places = [videos if videos.is_dir() else videos.parent, base]
        for line in refused.values():
            line["error"] = score_page.without_folders(line["error"], places)
    score_files.write_scores(out, every)
    if report is not None:
        run_once(_report, config, videos, report, every, asked)
    if refused:
        raise Failure(
            f"{len(refused)} of {len(every)} videos could not be scored, and have null as their "
            f"reward in {out}; mend them and run the same command again, which keeps the other "
            f"scores ({next(iter(refused.values()))['error']})"
        )
    run_once(part.unlink)


def _rows_to_score(
    config: Config, videos: Path, prompts: Path, asked: opens2v.Benchmark | None
) -> tuple[list[score_files.Row], Path]:
    """Find the prompt of each video, and print which files are none of them.

    Args:
      config: settings of the reward.
      videos: a folder of videos, or one video file.
      prompts: the prompts CSV, or the folder of the benchmark.
      asked: the benchmark, if any.

    Returns:
      The videos with their prompts, and the folder that the photos are relative to.

    Raises:
      UserError: no video is found, or the row of a video is unknown.
    """
    if asked is None:
        listed, base = load_prompts(prompts, config.data.max_people), prompts.parent
        rows, passed_over = list_rows(videos, prompts, listed)
    else:
        listed, base = asked.prompts, asked.folder
        rows, passed_over = list_named(videos, asked.rows, prompts, listed)
    if passed_over:
        names = ", ".join(passed_over[:5]) + (", ..." if len(passed_over) > 5 else "")
        print_once(f"{len(passed_over)} other files in {videos} are passed over: {names}")
    assert_same_across_hosts(config, row_digests(listed), videos=videos)
    return rows, base


def _report(
    config: Config,
    videos: Path,
    report: Path,
    lines: Sequence[dict[str, Any]],
    asked: opens2v.Benchmark | None,
) -> None:
    """Write the tables and the page of a report, and print the table of a benchmark.

    Args:
      config: settings of the reward.
      videos: the scored videos.
      report: folder of the report.
      lines: the lines of all videos.
      asked: the benchmark, if any.
    """
    folder = config.reward.folder()
    names = {name: load_architecture(folder, name) for name in score_page.NETWORKS}
    table = None
    if asked is not None:
        table = opens2v.table(lines, asked, names)
        write_text(report / "table.md", opens2v.markdown(table))
        print_once(opens2v.markdown(table))
    score_page.write(report, videos, lines, names, table)
    print_once(f"report: {report / score_page.PAGE}")


# ---- evaluate ------------------------------------------------------------------------------------


def evaluate(
    config: Config,
    prompts: Path,
    out: Path,
    loras: Mapping[str, Path | LoRASum],
    checkpoints: Mapping[str, Path] | None = None,
) -> None:
    """Compare the base with adapters and with other checkpoints on the CSV's prompts.

    Writes `metrics.json`, `table.md` (also printed), `scores.jsonl`, one line per model and video,
    and `videos/` for the report. Scores from an earlier run are kept if all their inputs are
    unchanged.

    Args:
      config: model, sampling and reward settings.
      prompts: the prompts CSV.
      out: output folder.
      loras: adapters, or sums of adapters, by name.
      checkpoints: pipeline folders of the same architecture by name; no name is also an adapter's.

    Raises:
      UserError: the CSV, a photo, a checkpoint or an adapter cannot be used.
      Failure: a video is not finite.
    """
    config, checkpoints = evaluated(config), checkpoints or {}
    listed = load_prompts(prompts, config.data.max_people, decode=False)
    conditioning.refuse_controls(listed, config.model.kind)
    compared = {**checkpoints, **loras}
    folders = {
        label: place
        for name, lora in loras.items()
        for label, place in journal.lora_files(f"adapter {name}", lora).items()
    }
    folders |= {f"checkpoint {name}": path for name, path in checkpoints.items()}
    assert_same_across_hosts(config, row_digests(listed), **folders)
    rows = all_rows(listed, config.evaluate.videos)
    reward = journal.reward_facts(config), recognition.gallery_facts(config, listed)
    of_prompt = {prompt.id: journal.prompt_facts(prompt) for prompt in listed}
    keys = {}
    for name, path in {"base": None, **compared}.items():
        facts = journal.video_facts(config, path)
        keys[name] = {
            row.name: journal.digest(facts, reward, of_prompt[row.prompt.id], row.member)
            for row in rows
        }
    known = journal.decided(lambda: _known_scores(out, keys))
    found = {
        name: {line["video"]: line["values"] for line in known if line["model"] == name}
        for name in keys
    }
    if known:
        print_once(f"{len(known)} of {len(keys) * len(rows)} scores are in {out / SCORES} already")
    if any(len(scores) < len(rows) for scores in found.values()):
        sampler = make_sampler(config)
        conditioning.warn_of_cut(sampler.pipe.tokenizer, listed, config.data.text_length)
        models = make_models(sampler, loras, checkpoints)
        mesh = sampler.pipe.transformer.config.mesh
        scorer = make_scorer(config, sampler.batch, mesh, listed, sampler.photo_encoder(listed))
        prepare_workdir(out)
        written = journal.Journal(out / SCORES, known)
        for name, model in models.items():
            missing = [row for row in rows if row.name not in found[name]]
            for batch, videos in sampler.batches(model, missing, f"evaluating {name}"):
                values = scorer(videos, [row.prompt for row in batch])
                _keep_shown(videos, batch, name, config.video.fps, out)
                lines = [
                    {"model": name, "video": row.name, "key": keys[name][row.name]}
                    | {"values": scores}
                    for row, scores in zip(batch, bootstrap.lines(values), strict=True)
                ]
                written.add(lines)
                found[name] |= {line["video"]: line["values"] for line in lines}
    run_once(_conclude, config, listed, rows, found, out)


def _keep_shown(videos: Array, rows: Sequence[Row], model: str, fps: int, out: Path) -> None:
    """Write those videos of a batch that the report shows (collective)."""
    for number, row in enumerate(rows):
        if _is_shown(row):
            pixels = fetch(videos, number)
            run_once(write_video, out / _shown_path(row, model), pixels, fps)


def _is_shown(row: Row) -> bool:
    return row.member == 0 and row.prompt.id < CANDIDATES


def _shown_path(row: Row, model: str) -> str:
    return f"videos/{row.prompt.id:04d}/{model}.mp4"


def _known_scores(out: Path, keys: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Read the valid lines of an earlier run, except those whose video for the report is absent."""
    kept = {}
    for line in journal.read_lines(out / SCORES):
        model, video = str(line.get("model")), str(line.get("video"))
        key = keys.get(model, {}).get(video)
        if key is None or line.get("key") != key:
            continue
        number, member = map(int, video.split("-"))
        shown = member == 0 and number < CANDIDATES
        if not shown or (out / f"videos/{number:04d}/{model}.mp4").is_file():
            kept[model, video] = line
    return list(kept.values())


def _conclude(
    config: Config,
    listed: Sequence[Prompt],
    rows: Sequence[Row],
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
    out: Path,
) -> None:
    """Write and print the comparison.

    Args:
      config: model, sampling and reward settings.
      listed: prompts of the CSV.
      rows: all videos of a model.
      found: model -> name of the video -> metric -> value.
      out: output folder.
    """
    measured = {
        name: {
            metric: bootstrap.column([values[row.name] for row in rows], metric)
            for metric in dict.fromkeys(metric for row in rows for metric in values[row.name])
        }
        for name, values in found.items()
    }
    summarised = {name: recognition.summarised(scores) for name, scores in measured.items()}
    summarised = {
        name: hacking.with_hacked(scores, summarised["base"]) for name, scores in summarised.items()
    }
    metrics = [metric for metric in bootstrap.LABELS if metric in summarised["base"]]
    scores = bootstrap.without_rare(
        {
            name: {metric: values[metric] for metric in metrics if metric in values}
            for name, values in summarised.items()
        }
    )
    told = "judge_identity" if "judge_identity" in metrics else "reward"
    candidates = {row.name: row for row in rows if _is_shown(row)}
    values_of = {
        video: {name: values[video][told] for name, values in found.items()} for video in candidates
    }
    shown = [
        _show(out, candidates[video].prompt, config)
        | {
            "group": group,
            "videos": {
                name: {"path": _shown_path(candidates[video], name), told: value}
                for name, value in values_of[video].items()
            },
        }
        for group, chosen in gallery_groups(values_of).items()
        for video in chosen
    ]
    clusters = np.asarray([row.prompt.id for row in rows])
    resampling = config.run.seed, config.evaluate.bootstrap
    means, changes = bootstrap.summarise(scores, clusters, *resampling)
    compared = bootstrap.pairs(scores, clusters, *resampling)
    note = (
        f"{len(listed)} prompts x {config.evaluate.videos} videos, {config.evaluate.steps} "
        f"{SOLVER_NAMES[config.evaluate.solver]} steps, the same noise for every model; "
        f"95 % bootstrap intervals over prompts"
        f"{recognition.chance_note(measured['base'])}"
        f"{_guidance_note(config) if len(found) > 1 else ''}"
    )
    parts = bootstrap.document(means, changes, compared) | {
        "videos": bootstrap.per_video(scores, clusters)
    }
    table = bootstrap.markdown(means, changes)
    table += f"\n{bootstrap.pairs_markdown(compared)}" if compared else ""
    write_text(out / "metrics.json", json.dumps({"note": note, **parts, "shown": shown}, indent=1))
    write_text(out / "table.md", f"{table}\n{note}\n")
    print_once(f"{table}\n{note}")


def gallery_groups(values: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """Choose the prompts that the report shows: largest gains and largest losses of the last model.

    Args:
      values: first video of a prompt -> model -> judge identity, or reward; "base" is the first
        model.

    Returns:
      Group -> videos; "first" with the first prompts if there is only the base.
    """
    videos = list(values)
    if not videos or len(values[videos[0]]) == 1:
        return {"first": videos[: 2 * SHOWN]}
    gains = {video: list(models.values())[-1] - models["base"] for video, models in values.items()}
    ordered = sorted(videos, key=lambda video: -gains[video])
    count = min(SHOWN, -(-len(videos) // 2))
    return {"gains": ordered[:count], "losses": ordered[count:][-SHOWN:][::-1]}


def _guidance_note(config: Config) -> str:
    """Return a caveat for the table if a published model is sampled without guidance."""
    guidance = config.evaluate.guidance or config.rollout.guidance
    if guidance != 1 or config.model.path == "embedded":
        return ""
    return (
        ". All models are sampled without guidance (scale 1), at which the base is seldom used: "
        "part of the difference may be what guidance itself gives; compare with "
        "--evaluate.guidance 5 too"
    )


def _show(out: Path, prompt: Prompt, config: Config) -> dict[str, Any]:
    """Write the photos of a prompt beside its videos, and return its entry for the report."""
    paths = []
    for m, path in enumerate(prompt.references):
        photo = conditioning.canvas(load_reference(path), config.video.height, config.video.width)
        paths.append(f"videos/{prompt.id:04d}/reference-{m}.png")
        (out / paths[-1]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_uint8(photo)).save(out / paths[-1])
    boxes = {"places": prompt.places.boxes} if prompt.places and prompt.places.boxes else {}
    return {"prompt": prompt.text, "references": paths} | boxes
