"""Write the report of scored videos: `scores.csv`, `people.csv` and the page `index.html`.

The page lists the videos, worst first. Each opens to a playable copy, the terms of its score and,
for every person, the reference photo, the similarity over all frames, and the matched faces of some
frames. Its files are beside it (`recorder`), with relative names only, and it loads nothing else:
its content security policy refuses other addresses. Pictures are loaded when they come into view,
and the page is written video by video, so hundreds of videos remain usable.
"""

import csv
import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jax_idgrpo.evaluation.recorder import FACES, VIDEOS, folder_name
from jax_idgrpo.evaluation.report import STYLE
from jax_idgrpo.evaluation.sightings import MARGIN

PAGE, SCORES, PEOPLE = "index.html", "scores.csv", "people.csv"
NETWORKS = ("embedder", "judge")
_HERE = Path(__file__).parent
_POLICY = (
    "default-src 'none'; img-src 'self' data:; media-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; form-action 'none'"
)
PERSON_COLUMNS = (
    "video",
    "person",
    "photo",
    "found",
    "ambiguous",
    "similarity_mean",
    "similarity_min",
    "similarity_max",
    "judge_mean",
    "judge_min",
    "judge_max",
    "track",
    "track_share",
    "track_changes",
    "frames_found",
)
ORDERS = {  # value of a video and sign -> label
    "identity 1": "identity, lowest first",
    "identity_minimum 1": "least person, lowest first",
    "judge_identity 1": "judge identity, lowest first",
    "reward 1": "reward, lowest first",
    "count 1": "wrong number of faces first",
    "copied -1": "copied, most first",
    "identity -1": "identity, highest first",
    "number 1": "file name",
}
_SORTED = tuple(dict.fromkeys(name.split()[0] for name in ORDERS))
WIDTH, HEIGHT, POINTS = 600, 76, 300  # of the curve of a person, and its maximum number of points
_PLAIN = ("file", "prompt", "key", "error")


def without_folders(text: str, folders: Sequence[Path]) -> str:
    """Remove folders of this machine from a message, because reports are shared."""
    for folder in sorted(map(str, folders), key=len, reverse=True):
        if folder != ".":
            text = text.replace(f"{folder}/", "")
    return text


def write(
    folder: Path,
    videos: Path,
    lines: Sequence[Mapping[str, Any]],
    networks: Mapping[str, str],
    table: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write the tables and the page of a report whose videos are recorded.

    Args:
      folder: folder of the report.
      videos: the scored videos, whose name is the title.
      lines: the lines of all videos; those that could not be scored have an `error`.
      networks: architectures of `NETWORKS`.
      table: table of a benchmark, a header and rows of cells.
    """
    with _replaced(folder / SCORES) as file:
        _write_scores(file, lines)
    with _replaced(folder / PEOPLE) as file:
        _write_people(file, folder, lines)
    with _replaced(folder / PAGE) as file:
        for part in _page(folder, videos, lines, networks, table):
            file.write(part)


class _replaced:
    """Open a text file that replaces `path` when the block ends without an error."""

    def __init__(self, path: Path):
        self._path, self._aside = path, path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> TextIO:
        self._file = self._aside.open("w", encoding="utf-8", newline="")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        self._file.close()
        if kind is None:
            self._aside.replace(self._path)
        else:
            self._aside.unlink()


# ---- tables --------------------------------------------------------------------------------------


def _cell(value: object) -> object:
    return round(value, 6) if isinstance(value, float) else value


def _write_scores(file: TextIO, lines: Sequence[Mapping[str, Any]]) -> None:
    found = dict.fromkeys(name for line in lines for name in line if name not in _PLAIN)
    first = [name for name in ("identity", "identity_minimum", "judge_identity") if name in found]
    names = [*first, *(name for name in found if name not in first)]
    table = csv.writer(file)
    table.writerow(["video", "prompt", *names, "error"])
    for line in lines:
        values = [_cell(line.get(name)) for name in names]
        table.writerow([line["file"], line["prompt"], *values, line.get("error", "")])


def _write_people(file: TextIO, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    table = csv.DictWriter(file, PERSON_COLUMNS, extrasaction="ignore")
    table.writeheader()
    for line in lines:
        if "error" not in line:
            for number, person in enumerate(_details(folder, line)["people"], 1):
                row = {name: _cell(value) for name, value in person.items()}
                table.writerow(row | {"video": line["file"], "person": number})


def _details(folder: Path, line: Mapping[str, Any]) -> dict[str, Any]:
    """Read what was recorded of a scored video."""
    return json.loads((folder / VIDEOS / folder_name(str(line["file"])) / FACES).read_text())


# ---- page ----------------------------------------------------------------------------------------


def _page(
    folder: Path,
    videos: Path,
    lines: Sequence[Mapping[str, Any]],
    networks: Mapping[str, str],
    table: Sequence[Sequence[str]] | None,
) -> Iterator[str]:
    """Yield the page in parts, one per video."""
    title = html.escape(videos.resolve().name)
    style = STYLE + (_HERE / "score_page.css").read_text()
    order = sorted(range(len(lines)), key=lambda n: lines[n].get("identity", -1.0))
    scored = [line for line in lines if "error" not in line]
    options = "".join(
        f'<option value="{value}">{html.escape(label)}</option>' for value, label in ORDERS.items()
    )
    yield (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}: people in videos</title><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body><main>"
        f"<header><h1>{title}</h1><p>{len(scored)} of {len(lines)} videos scored. Embedder "
        f"{html.escape(networks['embedder'])}, judge {html.escape(networks['judge'])}. "
        f'Tables: <a href="{SCORES}">{SCORES}</a>, <a href="{PEOPLE}">{PEOPLE}</a>.</p></header>'
        f"{_cards(scored)}{_table(table)}<h2>Videos</h2>{_legend()}"
        f'<form id="controls"><label>Sort by<select id="sort">{options}</select></label>'
        '<label>Filter by name or prompt<input id="filter" type="search"></label>'
        '<output id="shown" for="sort filter" aria-live="polite"></output></form><div id="videos">'
    )
    for rank, n in enumerate(order):
        yield _video(folder, lines[n], n, opened=rank == 0)
    script = (_HERE / "score_page.js").read_text()
    yield f"</div></main><script>{script}</script></body></html>"


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if line.get(name) is not None]
    return sum(values) / len(values) if values else None


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _cards(lines: Sequence[Mapping[str, Any]]) -> str:
    """Format the means over all videos in large print."""
    shown = {
        "identity": ("identity", "cosine of photo and face, missing = 0"),
        "identity_minimum": ("least person", "the least similar person of each video"),
        "judge_identity": ("judge identity", "by the network that never is a reward"),
        "count": ("right number of faces", "share of frames"),
    }
    cards = "".join(
        f'<div class="card"><small>{label}</small><b>{_number(_mean(lines, name))}</b>'
        f"<span>{note}</span></div>"
        for name, (label, note) in shown.items()
    )
    return f'<div class="cards">{cards}</div>'


def _table(table: Sequence[Sequence[str]] | None) -> str:
    if table is None:
        return ""
    rows = [
        f"<tr><th>{html.escape(row[0])}</th>"
        + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row[1:])
        + "</tr>"
        for row, tag in zip(table, ["th", *["td"] * (len(table) - 1)], strict=True)
    ]
    return f'<h2>Benchmark</h2><div class="wide"><table>{"".join(rows)}</table></div>'


def _legend() -> str:
    return (
        '<p class="legend"><span>Numbers below faces are cosines with the photo.</span>'
        '<span><b class="matched">matched</b> the person</span>'
        '<span><b class="ambiguous">ambiguous</b> another face or person comes within '
        f"{MARGIN}, or the face is on the track of another person</span>"
        '<span><b class="missing">missing</b> no face reaches the smallest cosine of a match; each '
        "network has its own</span></p>"
    )


def _video(folder: Path, line: Mapping[str, Any], number: int, opened: bool) -> str:
    """Format one video.

    Args:
      folder: folder of the report.
      line: its line of the scores.
      number: its position by name, from 0.
      opened: whether its details are shown at first.
    """
    name, prompt = html.escape(str(line["file"])), html.escape(str(line["prompt"]))
    data = " ".join(f'data-{value}="{_sort_value(line, value, number)}"' for value in _SORTED)
    text = f'<span class="text"><span class="name">{name}</span><span class="prompt">{prompt}</span></span>'
    if "error" in line:
        reason = html.escape(str(line["error"]))
        return (
            f'<details class="video" {data}><summary><span></span>{text}'
            f'<span class="error">not scored</span></summary><div class="body"><p class="error">{reason}</p></div></details>'
        )
    details = _details(folder, line)
    place = f"{VIDEOS}/{folder_name(str(line['file']))}"
    numbers = "".join(
        f"<span>{_number(line.get(value))}<small>{label}</small></span>"
        for value, label in (
            ("identity", "identity"),
            ("identity_minimum", "least"),
            ("judge_identity", "judge"),
        )
    )
    flags = "".join(f"<span>{html.escape(flag)}</span>" for flag in _flags(line, details))
    people = "".join(
        _person(place, number, person, details)
        for number, person in enumerate(details["people"], 1)
    )
    return (
        f'<details class="video" {data}{" open" if opened else ""}><summary>'
        f'<img class="poster" src="{place}/poster.jpg" alt="" loading="lazy" width="128" height="72">'
        f'{text}<span class="numbers">{numbers}</span>'
        f'{f"""<span class="flags">{flags}</span>""" if flags else ""}</summary><div class="body">'
        f'<div class="overview"><video src="{place}/clip.mp4" poster="{place}/poster.jpg" controls '
        f'loop muted playsinline preload="none" aria-label="{name}"></video>'
        f"<div><p>{prompt}</p>{_counts(details)}{_terms(line)}</div></div>"
        f"{people}{_others(place, details)}</div></details>"
    )


def _sort_value(line: Mapping[str, Any], name: str, number: int) -> str:
    if name == "number":
        return str(number)
    value = line.get(name)
    return "" if value is None else f"{value:.6g}"


def _flags(line: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """List what is noticeable about a video in words."""
    found = []
    for number, person in enumerate(details["people"], 1):
        if person["found"] < 0.95:
            found.append(f"person {number} missing in {1 - person['found']:.0%} of frames")
        if person["ambiguous"] > 0.05:
            found.append(f"person {number} ambiguous in {person['ambiguous']:.0%}")
    count = line.get("count")
    if count is not None and count < 0.95:
        found.append(f"wrong number of faces in {1 - count:.0%}")
    found += [
        f"{name} {line[name]:.2f}"
        for name in ("copied", "swapped", "duplicated", "stalled")
        if (line.get(name) or 0) > 0.05
    ]
    return found


def _terms(line: Mapping[str, Any]) -> str:
    terms = [(name, value) for name, value in line.items() if name not in _PLAIN]
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{_number(value, 3)}</dd></div>"
        for name, value in terms
        if value is None or isinstance(value, int | float)
    )
    return f'<dl class="terms">{rows}</dl>'


def _person(place: str, number: int, person: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """Format a person: photo, numbers, curve and faces.

    Args:
      place: folder of the video's pictures.
      number: number of the person, from 1.
      person: the person's entry of `faces.json`.
      details: content of `faces.json`.
    """
    photo = html.escape(str(person["photo"]))
    track = "no track"
    if person["track"] is not None:
        changes = person["track_changes"]
        track = f"track {person['track']} in {person['track_share']:.0%}" + (
            f", {changes} change{'s' if changes > 1 else ''} of track" if changes else ""
        )
    cells = "".join(_face(place, number, cell) for cell in person["shown"])
    return (
        f'<section class="person"><img src="{place}/person-{number}.jpg" alt="reference photo of '
        f'person {number}" loading="lazy"><div><h3>Person {number}: {photo}</h3>'
        f"<p>found in {person['found']:.0%} of {details['frames']} frames; embedder "
        f"{_range(person, 'similarity')}; judge {_range(person, 'judge')}; {track}</p>"
        f'{_curve(number, person, details["least"])}</div><ul class="strip">{cells}</ul></section>'
    )


def _range(person: Mapping[str, Any], name: str) -> str:
    text = _number(person[f"{name}_mean"])
    if person[f"{name}_min"] is None:
        return text
    return f"{text} ({_number(person[f'{name}_min'])} to {_number(person[f'{name}_max'])})"


def _face(place: str, number: int, cell: Mapping[str, Any]) -> str:
    """Format a person in one frame."""
    state, frame = cell["state"], cell["frame"]
    if state == "missing":
        nearest = cell.get("nearest")
        told = "no other face" if nearest is None else f"nearest {_number(nearest)}"
        return (
            f'<li class="missing"><span class="none" aria-hidden="true">&times;</span>'
            f"<b>missing</b><small>{told}</small><small>frame {frame}</small></li>"
        )
    cosine = _number(cell["similarity"])
    judged = f"<small>judge {_number(cell['judge'])}</small>"
    if not cell["judged"]:
        judged = judged.replace("<small>", '<small class="missing">') + "<small>no match</small>"
    return (
        f'<li class="{state}"><img src="{place}/{cell["image"]}" alt="face of person {number} in '
        f'frame {frame}, {state}" loading="lazy" width="70" height="70"><b>{cosine}</b>'
        f"<small>{state}</small>{judged}"
        f"<small>frame {frame}</small></li>"
    )


def _others(place: str, details: Mapping[str, Any]) -> str:
    """Format the faces that are matched to nobody."""
    if not details["others"]:
        return ""
    cells = "".join(
        f'<li class="other"><img src="{place}/{face["image"]}" alt="unmatched face in frame '
        f'{face["frame"]}" loading="lazy" width="70" height="70"><b>{_number(face["similarity"])}</b>'
        f"<small>to person {face['person']}</small><small>frame {face['frame']}</small></li>"
        for face in details["others"]
    )
    return (
        '<section class="others"><h3>Unmatched faces</h3><p>with the person that each resembles '
        f'most</p><ul class="strip">{cells}</ul></section>'
    )


def _curve(number: int, person: Mapping[str, Any], least: float) -> str:
    """Draw the similarity by both networks over all frames, and the state of every frame below.

    Args:
      number: number of the person.
      person: the person's entry of `faces.json`.
      least: the embedder's smallest cosine of a match.
    """
    frames = len(person["state"])
    scale, bottom = WIDTH / max(frames, 1), HEIGHT - 16

    def y(value: float) -> float:
        return 3 + (bottom - 6) * (1 - min(max(value, 0.0), 1.0))

    parts = [f'<line class="level" x1="0" x2="{WIDTH}" y1="{y(least):.1f}" y2="{y(least):.1f}"/>']
    step = -(-frames // POINTS)
    for values, style in ((person["judge"], "c1"), (person["similarity"], "c0")):
        points: list[str] = []
        for frame in [*range(0, frames, step), frames]:
            value = values[frame] if frame < frames else None
            if value is not None:
                points.append(f"{(frame + 0.5) * scale:.1f},{y(value):.1f}")
            elif points:
                ends = points if len(points) > 1 else points * 2
                parts.append(f'<polyline class="line {style}" points="{" ".join(ends)}"/>')
                points = []
    parts.append(_bar(person["state"], HEIGHT - 10))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="'
        f'similarity of person {number} over {frames} frames">{"".join(parts)}</svg>'
        '<p><span class="key c0">embedder</span><span class="key c1">judge (dashed)</span>, from 0 '
        f"to 1; dotted: smallest match {_number(least)}; bar: matched, ambiguous or missing</p>"
    )


def _bar(state: str, top: int) -> str:
    """Draw the state of every frame as a bar: m for matched, a for ambiguous, - for missing."""
    names, scale = {"m": "matched", "a": "ambiguous", "-": "missing"}, WIDTH / max(len(state), 1)
    parts = []
    for match in re.finditer(r"(.)\1*", state):
        x, width = match.start() * scale, (match.end() - match.start()) * scale
        style = names[match[1]]
        parts.append(
            f'<rect class="{style}" x="{x:.1f}" y="{top}" width="{width:.1f}" height="8"/>'
        )
    return "".join(parts)


def _counts(details: Mapping[str, Any]) -> str:
    """Draw in which frames there are as many faces as people, more, or fewer."""
    asked, faces = len(details["people"]), details["faces"]
    state = "".join("m" if count == asked else "a" if count > asked else "-" for count in faces)
    low, high = min(faces), max(faces)
    found = f"{low}" if low == high else f"{low} to {high}"
    return (
        f'<p class="count">{asked} face{"s" if asked > 1 else ""} requested, {found} found: as many '
        "in green frames, more in yellow, fewer in red</p>"
        f'<svg class="count" viewBox="0 0 {WIDTH} 8" preserveAspectRatio="none" role="img" '
        f'aria-label="requested {asked}, found {found} faces per frame">{_bar(state, 0)}</svg>'
    )
