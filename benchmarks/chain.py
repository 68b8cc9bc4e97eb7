"""Run the whole chain of docs/your-people.md on drawn films, and time and measure every stage.

    python -m benchmarks.chain --folder runs/chain [--films 60] [--pairs 400] [--labels 200]
        [--adapter-steps 600] [--grpo-steps 40] [--held-out-films 48]

    films            drawn films of two clips with a hard cut between them
    ingest           clips, photos and the texts of the clips
    sample           four videos of the bundled model for each clip's text and photos
    annotate         labels by the bundled face reward
    annotate --page  labels over HTTP by a scripted annotator, who sees the better of two videos by
                     the face reward and is wrong in a tenth of the answers
    train-reward     a linear reward on both
    finetune         an adapter on the clips
    train            GRPO from that adapter, with the linear reward
    evaluate         base, adapter and adapter after GRPO, on the clips of films of other people

The judge of the evaluation takes part in nothing before it. A stage that is complete is not
repeated, so the command continues where it was stopped.
"""

import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jax_idgrpo.data.video import FINE, to_uint8, write_video
from tests.helpers.films import FPS, FRAMES, drawn_clips
from tests.helpers.label_client import get, post, serving

WRONG = 0.1  # share of the scripted annotator's answers
VIDEOS = 4  # per clip


def idgrpo(*words: object) -> None:
    """Run a command of the package.

    Raises:
      CalledProcessError: it fails.
    """
    subprocess.run([sys.executable, "-m", "jax_idgrpo", *map(str, words)], check=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)


def make_films(folder: Path, count: int, split: str) -> None:
    """Write films of two clips with other people each, and `texts.json`: film -> texts of its clips.

    The two clips of the same people are in neighbouring films.

    Args:
      folder: folder to create.
      count: number of films.
      split: whose people are drawn, "train" or "eval".
    """
    folder.mkdir(parents=True)
    pairs = list(itertools.islice(drawn_clips(17, split=split), count))
    texts = {}
    for number, (pair, other) in enumerate(zip(pairs, [pairs[-1], *pairs[:-1]], strict=True)):
        name = f"film-{number:03d}.mp4"
        shots = [to_uint8(clip.video) for clip in (pair.clips[0], other.clips[1])]
        write_video(folder / name, np.concatenate(shots), FPS, FINE)
        texts[name] = [pair.prompt, other.prompt]
    (folder / "texts.json").write_text(json.dumps(texts))


def ingest(films: Path, out: Path, captions: Path) -> None:
    """Make clips of the films, and give each the text of its place in the film."""
    given = ("ingest", "--videos", films, "--out", out, "--faces", "embedded", "--face", 6)
    given = (*given, "--same", 0.7)
    idgrpo(*given)
    texts = json.loads((films / "texts.json").read_text())
    rows = read_csv(out / "untitled.csv")
    for row in rows:
        row["prompt"] = texts[row["film"]][round(float(row["from"]) * FPS) // FRAMES]
    write_csv(captions, rows)
    idgrpo(*given, "--captions", captions)


def label(pairs: Path, out: Path, scores: dict[str, float], count: int) -> None:
    """Answer `count` questions of the page.

    Args:
      pairs: the pairs to label.
      out: folder of the page.
      scores: hash of a video -> what the annotator thinks of it.
      count: number of answers.
    """
    rng = np.random.default_rng(1)

    def seen(address: str, unit: dict, side: str) -> float:
        with urllib.request.urlopen(f"{address}media/{unit['pair']}/{side}", timeout=60) as reply:
            return scores[hashlib.sha256(reply.read()).hexdigest()]

    with serving(pairs, out) as (_, address):
        state = get(f"{address}next?annotator=Script")
        for _ in range(count):
            unit = state["now"]
            if unit is None:
                break
            better = seen(address, unit, "A") > seen(address, unit, "B")
            answer = "A" if better != (rng.random() < WRONG) else "B"
            labels = dict.fromkeys(unit["dimensions"], answer)
            state = post(
                f"{address}label", {"annotator": "Script", "unit": unit["unit"], "labels": labels}
            )
        with urllib.request.urlopen(f"{address}pairs.csv", timeout=60) as reply:
            reply.read()


def absolute(path: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows whose paths do not depend on the folder of their CSV."""
    for row in rows:
        for name in ("path_A", "path_B"):
            row[name] = str((path.parent / row[name]).resolve())
        photos = row["ref_paths"].split(";")
        row["ref_paths"] = ";".join(str((path.parent / photo).resolve()) for photo in photos)
    return rows


def join(automatic: Path, trusted: Path, out: Path) -> None:
    """Write the labels by the page and, of the other pairs, those by the reward."""
    mine = [row for row in absolute(trusted, read_csv(trusted)) if row["SA"]]
    done = {(row["path_A"], row["path_B"]) for row in mine}
    others = [
        row
        for row in absolute(automatic, read_csv(automatic))
        if (row["path_A"], row["path_B"]) not in done
    ]
    columns = [name for name in mine[0] if name in others[0]]
    write_csv(out, [{name: row[name] for name in columns} for row in [*mine, *others]])
    print(f"{len(mine)} trusted and {len(others)} automatic labels")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--folder", type=Path, required=True)
    sizes = dict(
        films=60, pairs=400, labels=200, adapter_steps=600, grpo_steps=40, held_out_films=48
    )
    for name, value in sizes.items():
        options.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = options.parse_args()
    folder: Path = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    clips, videos, labels = folder / "clips", folder / "videos", folder / "labels"
    automatic, pairs, linear = folder / "automatic.csv", folder / "pairs.csv", folder / "linear"
    adapter, tuned, out = folder / "adapter", folder / "tuned", folder / "evaluation"
    others, held_out = folder / "other_films", folder / "held_out"

    def stage(name: str, result: Path, run: Callable[[], object]) -> None:
        """Run a stage whose result is missing, and note its seconds."""
        if not result.exists():
            began = time.monotonic()
            run()
            with (folder / "seconds.jsonl").open("a") as file:
                file.write(json.dumps({name: round(time.monotonic() - began, 1)}) + "\n")

    def make_pairs() -> None:
        idgrpo(
            "annotate", "quickstart", "--videos", videos, "--prompts", clips / "clips.csv",
            "--out", automatic, "--pairs-per-prompt", 6,
        )  # fmt: skip
        write_csv(automatic, read_csv(automatic)[: given.pairs])

    def label_pairs() -> None:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(labels)
        scored = folder / "scores.jsonl"
        idgrpo(
            "score", "quickstart", "--videos", videos, "--prompts", clips / "clips.csv",
            "--out", scored,
        )  # fmt: skip
        scores = {}
        for line in scored.read_text().splitlines():
            row = json.loads(line)
            digest = hashlib.sha256((videos / row["file"]).read_bytes()).hexdigest()
            scores[digest] = row["reward"]
        label(automatic, labels, scores, given.labels)

    def fit() -> None:
        join(automatic, labels / "pairs.csv", pairs)
        task = json.dumps({"pairs": str(pairs), "held_out": str(pairs)})
        idgrpo("train-reward", "reward_linear", "--workdir", linear, "--finetune.options", task)

    stage("films", folder / "films", lambda: make_films(folder / "films", given.films, "train"))
    stage(
        "ingest",
        clips / "clips.csv",
        lambda: ingest(folder / "films", clips, folder / "captions.csv"),
    )
    stage(
        "sample",
        videos,
        lambda: idgrpo(
            "sample", "quickstart", "--prompts", clips / "clips.csv", "--out", videos,
            "--evaluate.videos", VIDEOS,
        ),
    )  # fmt: skip
    stage("annotate", automatic, make_pairs)
    stage("annotate --page", labels / "pairs.csv", label_pairs)
    stage("train-reward", linear / "export", fit)
    stage(
        "finetune",
        adapter / "export",
        lambda: idgrpo(
            "finetune", "adapter", "--workdir", adapter, "--run.steps", given.adapter_steps,
            "--finetune.options", json.dumps({"clips": str(clips)}),
        ),
    )  # fmt: skip
    stage(
        "train",
        tuned / "export",
        lambda: idgrpo(
            "train", "quickstart", "--workdir", tuned, "--run.steps", given.grpo_steps,
            "--model.adapter", adapter / "export",
            "--reward.linear", linear / "export", "--reward.frames", 9,
        ),
    )  # fmt: skip
    stage("other films", others, lambda: make_films(others, given.held_out_films, "eval"))
    stage(
        "ingest of other films",
        held_out / "clips.csv",
        lambda: ingest(others, held_out, folder / "other_captions.csv"),
    )
    stage(
        "evaluate",
        out / "table.md",
        lambda: idgrpo(
            "evaluate", "quickstart", "--out", out, "--lora", f"adapter={adapter / 'export'}",
            "--lora", f"grpo={tuned / 'export'}", "--prompts", held_out / "clips.csv",
        ),
    )  # fmt: skip
    print((folder / "seconds.jsonl").read_text())


if __name__ == "__main__":
    main()
