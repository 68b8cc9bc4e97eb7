"""Write one self-contained HTML page of a run: curves, comparison, videos and configuration.

The input is the output of other commands in the workdir: `metrics.jsonl`, `config.json` and
`evaluation/`. If files of a section are missing, the section names the command that writes them.
Pictures, videos and curves are embedded, so the page needs no network and can be sent as one file.
"""

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, NotRequired, TypedDict

from jax_idgrpo.data.places import COLOURS
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import read_metrics
from jax_idgrpo.workdir import write_text


class Curve(NamedTuple):
    """One figure.

    Attributes:
      title: heading.
      note: text below the heading.
      names: plotted metrics of `metrics.jsonl`.
      noisy: whether to draw the running mean over the first metric.
    """

    title: str
    note: str
    names: tuple[str, ...]
    noisy: bool = True


CURVES = (
    Curve("Training reward", "mean over the videos of a step, and its running mean", ("reward",)),
    Curve(
        "Likeness",
        "cosine between photo and face by the reward's embedder; a missing person counts 0",
        ("similarity",),
    ),
    Curve(
        "Held-out prompts",
        "reward and independent judge, from fixed noise: they should rise together",
        ("watch_reward", "watch_judge_identity"),
        False,
    ),
    Curve(
        "People recognised",
        "held-out people whom the judge takes for themselves among all references, and "
        "references that somebody is taken for",
        ("watch_recognised", "watch_identities"),
        False,
    ),
    Curve(
        "Distance from the base",
        "KL divergence of a denoising step, adapter on against adapter off",
        ("kl",),
    ),
    Curve(
        "Probability ratio",
        "of the first update: 1 when sampler and trainer agree",
        ("ratio_min", "ratio_max"),
        False,
    ),
    Curve(
        "Spread within groups",
        "standard deviation of the reward: what there is to choose from",
        ("reward_group_std",),
    ),
    Curve("Faces", "found per person asked for, at most 1", ("faces_share",)),
    Curve("Motion", "mean change between neighbouring frames, outside the faces", ("motion",)),
    Curve("Gradient norm", "before clipping", ("gradient_norm",)),
    Curve("Seconds per step", "", ("seconds_rollout", "seconds_update"), False),
)
STYLE = (Path(__file__).parent / "report.css").read_text()
EMBEDDED = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg"}
"""Suffix -> media type of embedded files."""
CARDS = 4  # number of metrics in large print
WIDTH, HEIGHT, LEFT, BOTTOM = 440, 200, 52, 26


GROUPS = {
    "first": "First prompts",
    "gains": "Largest gains over the base, of the first 64 prompts",
    "losses": "Largest losses against the base, or smallest gains",
}
"""Group of the gallery -> heading."""


class ShownVideo(TypedDict, total=False):
    """A video of the gallery with the value beside it: the judge's, or the reward."""

    path: str
    judge_identity: float
    reward: float


class ShownPrompt(TypedDict):
    """A prompt of the gallery, with its photos, its videos by model, and the boxes of its people.

    The group is a key of `GROUPS`. The boxes are x0 y0 x1 y1 in the first and in the last frame, in
    shares of the picture.
    """

    prompt: str
    references: list[str]
    videos: dict[str, ShownVideo]
    group: NotRequired[str]
    places: NotRequired[list[list[list[float]]]]


class Evaluation(TypedDict):
    """The part of an evaluation's `metrics.json` that the page shows."""

    note: str
    labels: dict[str, str]
    less: NotRequired[list[str]]
    models: dict[str, dict[str, dict[str, float]]]
    differences: dict[str, dict[str, dict[str, float]]]
    shown: list[ShownPrompt]


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return steps and finite values of a metric. The last row of a repeated step is used."""
    points = {
        row["step"]: row[name]
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    }
    steps = sorted(points)
    return [float(step) for step in steps], [float(points[step]) for step in steps]


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Compute the exponential moving average with bias correction."""
    mean, total, out = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        out.append(mean / total)
    return out


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Choose about `count` round numbers within [low, high].

    Args:
      low: lower end of the axis.
      high: upper end of the axis.
      count: approximate number of ticks.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * min((m for m in (1, 2, 5, 10) if m * power >= raw), default=10)
    return [
        round(k * step, 12)
        for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def number(value: float) -> str:
    """Format with four significant digits."""
    return f"{value:.4g}"


def curve(
    title: str, note: str, lines: dict[str, tuple[list[float], list[float]]], trend: bool
) -> str:
    """Draw one figure as inline SVG.

    Args:
      title: heading.
      note: text below the heading.
      lines: name -> (steps, values).
      trend: draw every line faint, with its running mean on top.
    """
    steps = [x for xs, _ in lines.values() for x in xs]
    values = [y for _, ys in lines.values() for y in ys]
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or max(abs(high), 1e-6) * 0.05
    low, high = low - room, high + room
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - 8)

    def y(value: float) -> float:
        return 8 + (high - value) / (high - low) * (HEIGHT - BOTTOM - 8)

    def polyline(xs: Sequence[float], ys: Sequence[float], style: str) -> str:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys))
        return f'<polyline class="{style}" points="{points}"/>'

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{number(t)}</text>'
        for t in ticks(low, high)
    ]
    parts += [
        f'<text class="tick" x="{x(t):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(t)}</text>'
        for t in ticks(first, last)
        if t == int(t)
    ]
    for index, (xs, ys) in enumerate(lines.values()):
        if trend:
            parts += [
                polyline(xs, ys, f"line faint c{index}"),
                polyline(xs, smooth(ys), f"line c{index}"),
            ]
        else:
            parts.append(polyline(xs, ys, f"line c{index}"))
    legend = (
        " ".join(
            f'<span class="key c{i}">{html.escape(name)}</span>' for i, name in enumerate(lines)
        )
        if len(lines) > 1
        else ""
    )
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> {legend}<small>{html.escape(note)}</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg></figure>'
    )


def data_uri(path: Path) -> str:
    """Encode a file as a data URL."""
    return f"data:{EMBEDDED[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def inside(folder: Path, name: str) -> Path:
    """Return the path of a picture or video of an evaluation.

    Pages are shared, so only files within the folder are embedded.

    Raises:
      UserError: the file is outside the folder, is missing, or has another type.
    """
    path, where = folder / name, f"{folder / 'metrics.json'}: names {name}"
    if not path.resolve().is_relative_to(folder.resolve()) or path.suffix not in EMBEDDED:
        raise UserError(
            f"{where}, which is no picture or video of this folder; "
            "run idgrpo evaluate again, or correct the file"
        )
    if not path.is_file():
        raise UserError(f"{where}, which is missing; run idgrpo evaluate again")
    return path


def without_places(value: object) -> object:
    """Shorten paths in a configuration value to their last part, because the page is shared."""
    if isinstance(value, dict):
        return {name: without_places(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~", "..")) or PureWindowsPath(value).drive:
        return f".../{PureWindowsPath(value).name}"
    return value


def curves(rows: Sequence[dict[str, Any]]) -> str:
    """Draw the figures of all metrics that the run has."""
    figures = []
    for one in CURVES:
        lines = {name: line for name in one.names if (line := series(rows, name))[0]}
        if lines:
            figures.append(curve(one.title, one.note, lines, one.noisy))
    if not figures:
        return '<p class="absent">No training steps yet: <code>idgrpo train</code> writes metrics.jsonl.</p>'
    return f'<div class="curves">{"".join(figures)}</div>'


def interval(value: dict[str, float], sign: bool = False) -> str:
    """Format a mean and its 95 % interval as HTML."""
    form = "{:+.3f}" if sign else "{:.3f}"
    return f"{form.format(value['mean'])} <small>[{form.format(value['low'])}, {form.format(value['high'])}]</small>"


def judged(change: dict[str, float], less: bool) -> str:
    """Return the style class of a change.

    The class is "up" if the 95 % interval contains only improvements, "down" if it contains only
    deteriorations, and "same" otherwise. `less` means that lower is better.
    """
    low, high = (-change["high"], -change["low"]) if less else (change["low"], change["high"])
    return "up" if low > 0 else "down" if high < 0 else "same"


def table(evaluation: Evaluation) -> str:
    """Format the comparison as an HTML table: base, then each adapter with paired differences."""
    adapters = list(evaluation["differences"])
    head = "".join(
        f"<th>{html.escape(name)}</th><th>change</th><th>relative</th>" for name in adapters
    )
    body = []
    for name, label in evaluation["labels"].items():
        cells = f"<td>{interval(evaluation['models']['base'][name])}</td>"
        for adapter in adapters:
            change = evaluation["differences"][adapter][name]
            verdict = judged(change, name in evaluation.get("less", ()))
            cells += f'<td>{interval(evaluation["models"][adapter][name])}</td><td class="{verdict}">{interval(change, sign=True)}</td>'
            cells += f'<td class="{verdict}">{change["relative"]:+.1%}</td>'
        body.append(f"<tr><th>{html.escape(label)}</th>{cells}</tr>")
    return f'<div class="wide"><table><tr><th></th><th>base</th>{head}</tr>{"".join(body)}</table></div>'


def headline(evaluation: Evaluation) -> str:
    """Format the first metrics of the first adapter in large print."""
    adapter = next(iter(evaluation["differences"]), None)
    if adapter is None:
        return ""
    cards = []
    for name, label in list(evaluation["labels"].items())[:CARDS]:
        change = evaluation["differences"][adapter][name]
        verdict = judged(change, name in evaluation.get("less", ()))
        base, tuned = (evaluation["models"][model][name]["mean"] for model in ("base", adapter))
        cards.append(
            f'<div class="card"><small>{html.escape(label)}</small><b class="{verdict}">{change["relative"]:+.1%}</b>'
            f"<span>{base:.3f} &rarr; {tuned:.3f}</span></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _told(video: ShownVideo) -> str:
    """Format the judge's value of a video, or the reward if there is no judge."""
    return (
        f"judge {video['judge_identity']:.2f}"
        if "judge_identity" in video
        else f"reward {video['reward']:.2f}"
    )


def outlines(places: Sequence[Sequence[Sequence[float]]]) -> str:
    """Draw the boxes of people over a video: the first one solid, the last one dashed if it differs.

    Args:
      places: x0 y0 x1 y1 of each person in the first and in the last frame, in shares of the picture.
    """
    parts = []
    for person, (first, last) in enumerate(places):
        colour = "#{:02x}{:02x}{:02x}".format(*COLOURS[person % len(COLOURS)])
        for box, style in ((first, ""), (last, ' stroke-dasharray="4 3"'))[: 1 + (first != last)]:
            x0, y0, x1, y1 = (100 * float(value) for value in box)
            parts.append(
                f'<rect x="{x0:.4g}" y="{y0:.4g}" width="{x1 - x0:.4g}" height="{y1 - y0:.4g}" '
                f'stroke="{colour}"{style}/>'
            )
    if not parts:
        return ""
    return f'<svg class="places" viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(parts)}</svg>'


def gallery(evaluation: Evaluation, folder: Path) -> str:
    """Format the reference photos and every model's video of the shown prompts."""

    def source(name: str) -> str:
        return data_uri(inside(folder, name))

    groups: dict[str, list[str]] = {}
    for shown in evaluation["shown"]:
        photos = "".join(
            f'<img src="{source(path)}" alt="reference photo">' for path in shown["references"]
        )
        boxes = outlines(shown.get("places", []))
        videos = "".join(
            f'<div><div class="frame"><video src="{source(video["path"])}" autoplay loop muted playsinline></video>'
            f"{boxes}</div><span>{html.escape(model)} <small>{_told(video)}</small></span></div>"
            for model, video in shown["videos"].items()
        )
        prompt = html.escape(shown["prompt"])
        groups.setdefault(shown.get("group", "first"), []).append(
            f'<article><div class="photos">{photos}</div><div class="videos">{videos}</div><p>{prompt}</p></article>'
        )
    return "".join(
        f'<h3>{GROUPS.get(group, "Prompts")}</h3><div class="gallery">{"".join(items)}</div>'
        for group, items in groups.items()
    )


def _trains_weights(path: Path) -> bool:
    """Return whether a run's configuration has `model.train full`."""
    config = json.loads(path.read_text()) if path.is_file() else {}
    return bool(config.get("model", {}).get("train") == "full")


def configuration(path: Path) -> str:
    """Format the configuration with one table per section."""
    if not path.is_file():
        return '<p class="absent">No config.json: <code>idgrpo train</code> writes it.</p>'
    sections = []
    for section, fields in json.loads(path.read_text()).items():
        texts = {name: json.dumps(without_places(value)) for name, value in fields.items()}
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>"
            for name, text in texts.items()
        )
        sections.append(
            f"<details open><summary>{html.escape(section)}</summary><table>{rows}</table></details>"
        )
    return f'<div class="sections">{"".join(sections)}</div>'


def page(workdir: Path) -> str:
    """Return the HTML of the whole page.

    Raises:
      UserError: the folder contains neither metrics nor an evaluation, or the evaluation is
        incomplete.
    """
    rows = read_metrics(workdir / "metrics.jsonl")
    results = workdir / "evaluation" / "metrics.json"
    if not rows and not results.is_file():
        raise UserError(
            f"workdir {workdir}: holds neither metrics.jsonl nor evaluation/metrics.json; pass the --workdir of a run"
        )
    if results.is_file():
        evaluation = json.loads(results.read_text())
        compared = (
            f'{headline(evaluation)}<h2>Base against tuned</h2><p class="note">{html.escape(evaluation["note"])}</p>{table(evaluation)}'
            '<h2>Videos</h2><p class="note">Reference photos, then the models, each from the same noise.</p>'
            f"{gallery(evaluation, results.parent)}"
        )
    else:
        option = "--checkpoint" if _trains_weights(workdir / "config.json") else "--lora"
        command = f"idgrpo evaluate CONFIG --out W/evaluation {option} tuned=W/export"
        compared = f'<p class="absent">No evaluation yet: <code>{command}</code></p>'
    name = html.escape(workdir.resolve().name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{name}: identity by reinforcement</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body><main>'
        f"<header><h1>{name}</h1><p>Identity-GRPO in JAX: {len({row['step'] for row in rows})} training steps</p></header>"
        f"{compared}<h2>Training</h2>{curves(rows)}<h2>Configuration</h2>{configuration(workdir / 'config.json')}"
        f"</main></body></html>"
    )


def report(workdir: Path) -> Path:
    """Write `workdir/report.html` and return its path.

    Raises:
      UserError: the folder contains neither metrics nor an evaluation, or the evaluation is
        incomplete.
    """
    path = workdir / "report.html"
    write_text(path, page(workdir))
    return path
