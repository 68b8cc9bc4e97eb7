"""Make pools of videos from several sources, and pair the videos of a prompt by dominance.

Sources of a prompt's videos: models with and without adapters, real clips with the prompt's text,
and, on request, the photo held still. Every video is scored by the configuration's reward. Of each
prompt, the pair with the largest gap is kept whose winner is at least as good in every term
(`grpo.dominant_pairs`).

    OUT/videos/SOURCE/NUMBER-MEMBER.mp4
    OUT/pool.jsonl    source, file and scores of every video, by the reward and by the judge
    OUT/pairs.csv     pairs for task "adapter" with loss dpo, and for `train-reward`

Source: MagicID, arXiv 2503.12689. Still photos are its winners of identity; real clips of the same
people take their place here wherever there are any.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from checkpoints_convert.places import LoRASum
from jax_idgrpo import grpo
from jax_idgrpo.config import Config
from jax_idgrpo.data.photos import load_reference
from jax_idgrpo.data.prompts import Prompt, load_prompts
from jax_idgrpo.data.video import FINE, list_videos, read_frames, write_video
from jax_idgrpo.errors import UserError, closest
from jax_idgrpo.evaluation.commands import sample
from jax_idgrpo.evaluation.sampler import evaluated
from jax_idgrpo.parallel.hosts import print_once, run_once
from jax_idgrpo.preferences.annotate import annotator_name, score_folder
from jax_idgrpo.preferences.couples import REWARD, Couple, Scored, in_order, write_couples
from jax_idgrpo.preferences.video_clips import read_clips
from jax_idgrpo.sampling import conditioning
from jax_idgrpo.workdir import write_text

JUDGE = "judge_"  # prefix of the terms of the judge's own embedder


@dataclasses.dataclass(frozen=True)
class Rule:
    """How pairs are chosen; see `grpo.dominant_pairs`.

    Attributes:
      terms: weights of the terms by name; "reward" is the reward itself.
      slack: spreads by which a winner may be worse, by name.
      margin: least weighted gap.
    """

    terms: Mapping[str, float]
    slack: Mapping[str, float]
    margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Member:
    """A video of the pool with its source and scores; a missing score is NaN."""

    source: str
    video: Scored


def make_pool(
    config: Config,
    prompts: Path,
    out: Path,
    models: Mapping[str, Path | LoRASum | None],
    clips: Path | None,
    still: bool,
    rule: Rule,
) -> None:
    """Make, score and pair the videos of all sources; an interrupted command continues.

    Args:
      config: its model makes the videos and its reward scores them.
      prompts: the prompts CSV.
      out: output folder.
      models: adapters by name; None is the base.
      clips: clips.csv of real clips; None uses none.
      still: whether photos held still are a source.
      rule: chooses the pairs.

    Raises:
      UserError: an input cannot be used, or no prompt has a pair.
      Failure: a video is not finite.
    """
    listed = load_prompts(prompts, config.data.max_people)
    for name, lora in models.items():
        sample(config, prompts, out / "videos" / name, lora)
    made = list(models)
    if clips is not None:
        run_once(write_matching_clips, config, clips, listed, out / "videos" / "clip")
        made.append("clip")
    if still:
        run_once(write_stills, config, listed, out / "videos" / "still")
        made.append("still")
    members = [
        member
        for name in made
        if list_videos(out / "videos" / name)[0]
        for member in _scored(config, name, out, prompts, listed)
    ]
    check_terms(rule, members)
    run_once(_write_pool, out, members)
    couples = dominant_couples(members, rule)
    if not couples:
        raise UserError(
            f"--out {out}: no prompt has two videos of which one is at least as good in every one "
            f"of {', '.join(rule.terms)}; use fewer --terms, more --slack, more models, or a larger "
            "evaluate.videos"
        )
    makers = {member.video.file: member.source for member in members}
    pairs = [couple for couple, _ in couples]
    run_once(write_couples, out / "pairs.csv", pairs, (REWARD,), annotator_name(config), makers)
    wins = {name: sum(winner.source == name for _, winner in couples) for name in made}
    shown = ", ".join(f"{count} won by {name}" for name, count in wins.items())
    print_once(
        f"{len(members)} videos in {out / 'pool.jsonl'}; {len(couples)} pairs of {len(listed)} "
        f"prompts in {out / 'pairs.csv'} ({shown})"
    )


def write_matching_clips(
    config: Config, csv: Path, prompts: Sequence[Prompt], folder: Path
) -> None:
    """Write the clips whose text is that of a prompt, at the size of the evaluation.

    Args:
      config: of the run.
      csv: the clips.
      prompts: the prompts.
      folder: output folder.

    Raises:
      UserError: the clips cannot be read, or none has the text of a prompt and enough frames.
    """
    video = evaluated(config).video
    of_text: dict[str, list[Path]] = {}
    for clip in read_clips(csv):
        of_text.setdefault(clip.prompt, []).append(clip.video)
    written = 0
    folder.mkdir(parents=True, exist_ok=True)
    for prompt in prompts:
        for number, path in enumerate(of_text.get(prompt.text, [])):
            frames = read_frames(path, video.frames, (video.height, video.width), video.fps)
            if len(frames) == video.frames:
                write_video(folder / f"{prompt.id:04d}-{number}.mp4", frames, video.fps, FINE)
                written += 1
    if not written:
        raise UserError(
            f"--clips {csv}: no clip of {video.frames} frames or more has the text of a prompt; "
            "take the prompts from the clips, with the columns ref_paths and prompt of clips.csv"
        )


def write_stills(config: Config, prompts: Sequence[Prompt], folder: Path) -> None:
    """Write the photo of every prompt with one person, held still for the length of a video.

    Args:
      config: of the run.
      prompts: the prompts.
      folder: output folder.

    Raises:
      UserError: no prompt has one person.
    """
    video = evaluated(config).video
    alone = [prompt for prompt in prompts if prompt.people == 1]
    if not alone:
        raise UserError("--still holds the photo of one person still, and no prompt has one person")
    folder.mkdir(parents=True, exist_ok=True)
    for prompt in alone:
        photo = conditioning.canvas(load_reference(prompt.references[0]), video.height, video.width)
        frames = np.broadcast_to(photo, (video.frames, *photo.shape))
        write_video(
            folder / f"{prompt.id:04d}-0.mp4", np.ascontiguousarray(frames), video.fps, FINE
        )


def _scored(
    config: Config, name: str, out: Path, prompts: Path, listed: Sequence[Prompt]
) -> list[Member]:
    """Score the videos of a source.

    Args:
      config: of the run.
      name: of the source.
      out: folder of the pool.
      prompts: the prompts CSV.
      listed: its prompts.
    """
    folder, lines = out / "videos" / name, out / "scores" / f"{name}.jsonl"
    found = []
    for file, prompt, line in score_folder(config, folder, prompts, listed, lines):
        values = {
            key: float(value)
            for key, value in line.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        found.append(Member(name, Scored(file, prompt, values)))
    return found


def check_terms(rule: Rule, members: Sequence[Member]) -> None:
    """Refuse terms that no video has a score of, and the identity that the judge measures.

    Args:
      rule: names the terms.
      members: the scored videos.

    Raises:
      UserError: a term is unknown, or would train on the judge.
    """
    for name in rule.terms:
        if name.startswith(JUDGE):
            raise UserError(
                f"--terms: {name} is how evaluations measure identity, so a model must not be "
                "trained on it; use reward"
            )
    known = sorted({name for member in members for name in member.video.values})
    for name in rule.terms:
        if name not in known:
            raise UserError(f"--terms: the scores have no {name!r}{closest(name, known)}")


def _write_pool(out: Path, members: Sequence[Member]) -> None:
    lines = [
        {
            "source": member.source,
            "file": member.video.file.relative_to(out).as_posix(),
            "prompt": member.video.prompt.id,
            **member.video.values,
        }
        for member in members
    ]
    write_text(out / "pool.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))


def dominant_couples(members: Sequence[Member], rule: Rule) -> list[tuple[Couple, Member]]:
    """Choose at most one pair per prompt; returns it with its winner.

    Args:
      members: the scored videos.
      rule: chooses the pairs.
    """
    groups: dict[int, list[Member]] = {}
    for member in members:
        groups.setdefault(member.video.prompt.id, []).append(member)
    listed = [group for _, group in sorted(groups.items()) if len(group) > 1]
    if not listed:
        return []
    most, names = max(map(len, listed)), list(rule.terms)
    values = np.full((len(listed), most, len(names)), np.nan)
    for place, group in enumerate(listed):
        for number, member in enumerate(group):
            values[place, number] = [member.video.values.get(name, math.nan) for name in names]
    pairs, usable = grpo.dominant_pairs(
        values,
        np.asarray([rule.terms[name] for name in names]),
        np.asarray([rule.slack.get(name, 0.0) for name in names]),
        margin=rule.margin,
    )
    found = []
    for group, (winner, loser), used in zip(listed, pairs.tolist(), usable.tolist(), strict=True):
        if used:
            found.append((_couple(group[winner].video, group[loser].video), group[winner]))
    return found


def _couple(winner: Scored, loser: Scored) -> Couple:
    """Label a pair by its winner."""
    a, b = in_order(winner, loser)
    difference = a.values.get("reward", math.nan) - b.values.get("reward", math.nan)
    return Couple(a, b, {REWARD: "A" if a is winner else "B"}, {REWARD: difference})
