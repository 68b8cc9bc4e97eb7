"""Label pairs of videos by a reward, for training another reward on them.

Every video is scored by the reward of a configuration (`evaluation.commands.score`). Two videos of
one prompt become a pair. In each dimension, the video with the better value wins, unless the values
are close: then the label is "same". With a second annotator, a label is kept where both agree.

Which video is A depends on a hash of the two paths, so the position carries no information.

Source: VisionPrefer, arXiv 2404.15100, where GPT-4V is the annotator; the tie bands and the second
annotator are ours.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jax_idgrpo.config import Config
from jax_idgrpo.data.prompts import Prompt, load_prompts
from jax_idgrpo.errors import Failure, UserError, closest
from jax_idgrpo.evaluation.commands import score
from jax_idgrpo.evaluation.listing import list_rows
from jax_idgrpo.parallel.hosts import print_once, run_once
from jax_idgrpo.preferences.couples import (
    REWARD,
    Couple,
    Scored,
    agreed,
    by_prompt,
    couple,
    couples,
    kappa,
    labelled,
    margins,
    path_hash,
    select_couples,
    write_couples,
)
from jax_idgrpo.preferences.csv_source import check_dimensions
from jax_idgrpo.rewards.vlm.checklist import is_checklist

MAX_PEOPLE = 64  # photos of a prompt that a page can show
NO_PAIR = "no prompt has two videos; sample two or more per prompt, or name several folders"


def annotate(
    config: Config,
    videos: Sequence[Path],
    prompts: Path,
    out: Path,
    dimensions: Sequence[str] = (REWARD,),
    per_prompt: int = 0,
    margin: float = 0.25,
    ties: float = 0.2,
    second: Config | None = None,
) -> None:
    """Score videos and write the CSV of labelled pairs.

    Scores are kept in `OUT.scores/`, so an interrupted command continues when it is run again.

    Args:
      config: its reward is the annotator.
      videos: folders of videos, as `idgrpo sample` or other programs write them.
      prompts: the prompts CSV.
      out: CSV to write, as `csv_source` describes it.
      dimensions: columns of labels: "SA" is the reward, others are terms by name.
      per_prompt: see `couples`.
      margin: see `margins`.
      ties: see `select_couples`.
      second: configuration of the second annotator; None for one annotator.

    Raises:
      UserError: an option or file cannot be used, or no pair has a label.
    """
    check_options(dimensions, per_prompt, margin, ties)
    annotators = [config, *([second] if second else [])]
    folder = out.with_name(f"{out.name}.scores")
    listed = load_prompts(prompts, config.data.max_people)
    found = []
    for number, annotator in enumerate(annotators):
        scored = [
            video
            for place, source in enumerate(videos)
            for video in _score(
                annotator, source, prompts, listed, folder / f"{number}-{place}.jsonl", dimensions
            )
        ]
        wanted = annotator.reward
        trained = wanted.vlm and not is_checklist(wanted.vlm)
        bands = margins(scored, dimensions, margin, bool(wanted.head or wanted.linear or trained))
        found.append((scored, bands))
    first = couples(*found[0], per_prompt)
    if not first:
        raise UserError(f"--videos {videos[0]}: {NO_PAIR}")
    if second is not None:
        first = _with_second(first, *found[1])
    kept = select_couples(first, ties)
    if not kept:
        raise UserError(
            f"--videos {videos[0]}: no pair got a label in {', '.join(dimensions)}; "
            "use a smaller --margin, or other videos"
        )
    run_once(write_couples, out, kept, dimensions, annotator_name(config))
    counts = [
        f"{name}: "
        + ", ".join(
            f"{sum(pair.labels[name] == text for pair in kept)} {text}"
            for text in ("A", "B", "same", "invalid")
        )
        for name in dimensions
    ]
    print_once(f"{len(kept)} pairs in {out} ({'; '.join(counts)})")


def _with_second(
    first: Sequence[Couple], videos: Sequence[Scored], bands: Mapping[str, float]
) -> list[Couple]:
    """Keep the labels that the second annotator confirms, and print the agreement.

    Args:
      first: pairs of the first annotator.
      videos: videos with the values of the second annotator.
      bands: its margins.
    """
    of_file = {video.file: video for video in videos}
    theirs = [labelled(of_file[pair.a.file], of_file[pair.b.file], bands) for pair in first]
    for name in bands:
        sides = ([pair.labels[name] for pair in pairs] for pairs in (first, theirs))
        print_once(f"agreement of the annotators in {name}: kappa {kappa(*sides):.3f}")
    return agreed(first, theirs)


def check_options(dimensions: Sequence[str], per_prompt: int, margin: float, ties: float) -> None:
    """Refuse invalid options of `annotate`.

    Args:
      dimensions: see `annotate`.
      per_prompt: see `annotate`.
      margin: see `annotate`.
      ties: see `annotate`.

    Raises:
      UserError: an option is invalid.
    """
    check_dimensions(dimensions)
    if per_prompt < 0:
        raise UserError(f"--pairs-per-prompt is {per_prompt}; use 1 or more, or 0 for all")
    if not 0 <= margin < math.inf:
        raise UserError(f"--margin is {margin}; use 0 or more")
    if not 0 <= ties < 1:
        raise UserError(f"--ties is {ties}; use 0 to below 1")


def annotator_name(config: Config) -> str:
    """Return a short description of the reward, for the column `annotator`."""
    wanted = config.reward
    for name in ("custom", "head", "linear", "vlm", "backend"):
        if value := getattr(wanted, name):
            return f"reward.{name} {value}"
    return f"reward.faces {wanted.faces}"


def score_folder(
    config: Config, videos: Path, prompts: Path, listed: Sequence[Prompt], out: Path
) -> Iterator[tuple[Path, Prompt, dict[str, object]]]:
    """Score a folder of videos; of those that cannot be scored, the reward is None.

    Args:
      config: its reward scores.
      videos: the folder.
      prompts: the prompts CSV.
      listed: its prompts.
      out: file of the scores.

    Yields:
      A video, its prompt, and the line of its scores.

    Raises:
      UserError: the videos or prompts cannot be used.
    """
    try:
        score(config, videos, prompts, out)
    except Failure as failure:
        run_once(print, f"{failure}; these videos are in no pair", file=sys.stderr)
    prompt_of = {
        file.name: (file, prompt) for file, prompt in list_rows(videos, prompts, listed)[0]
    }
    for text in out.read_text().splitlines():
        line = json.loads(text)
        yield *prompt_of[line["file"]], line


def _score(
    config: Config,
    videos: Path,
    prompts: Path,
    listed: Sequence[Prompt],
    out: Path,
    dimensions: Sequence[str],
) -> list[Scored]:
    """Read the dimensions of the videos of a folder; those that cannot be scored have none.

    Args:
      config: the annotator.
      videos: the folder.
      prompts: the prompts CSV.
      listed: its prompts.
      out: file of the scores.
      dimensions: values to read.

    Raises:
      UserError: a dimension is no term of the reward, or the videos or prompts cannot be used.
    """
    found = []
    for file, prompt, line in score_folder(config, videos, prompts, listed, out):
        if line["reward"] is not None:
            for name in dimensions:
                if name != REWARD and name not in line:
                    terms = [key for key, value in line.items() if isinstance(value, int | float)]
                    raise UserError(
                        f"--dimensions: the scores have no {name!r}{closest(name, terms)}"
                    )
        values = {
            name: _number(line.get("reward" if name == REWARD else name)) for name in dimensions
        }
        found.append(Scored(file, prompt, values))
    return found


def write_unlabelled(videos: Sequence[Path], prompts: Path, out: Path, per_prompt: int = 0) -> None:
    """Write the CSV of all pairs of videos of one prompt, without labels.

    Args:
      videos: folders of videos.
      prompts: the prompts CSV.
      out: CSV to write.
      per_prompt: largest number of pairs of a prompt, chosen by a hash; 0 takes all.

    Raises:
      UserError: the videos or prompts cannot be used, or no prompt has two videos.
    """
    if per_prompt < 0:
        raise UserError(f"--pairs-per-prompt is {per_prompt}; use 1 or more, or 0 for all")
    listed = load_prompts(prompts, MAX_PEOPLE)
    found = [
        Scored(file, prompt, {})
        for source in videos
        for file, prompt in list_rows(source, prompts, listed)[0]
    ]
    pairs = []
    for group in by_prompt(found):
        made = [couple(*two, {}) for two in itertools.combinations(group, 2)]
        made.sort(key=lambda pair: path_hash(pair.a.file, pair.b.file))
        pairs += made[: per_prompt or None]
    if not pairs:
        raise UserError(f"--videos {videos[0]}: {NO_PAIR}")
    write_couples(out, pairs, (), "")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
