"""The page holds everything inside itself, shows what the run says, and stands a half-finished run."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import config
from jax_idgrpo.data import video
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import bootstrap, report


def make_run(workdir: Path, steps: int = 40) -> None:
    """A run as `idgrpo train` leaves it, with numbers that are drawn."""
    rng = np.random.default_rng(0)
    workdir.mkdir(exist_ok=True)
    rows = [
        {
            "step": step,
            "reward": 0.4 + 0.1 * step / steps + rng.normal(0, 0.02),
            "kl": step * 1e-4,
            "ratio_min": 1.0,
            "ratio_max": 1.0,
            "gradient_norm": rng.gamma(3, 0.1),
            "motion": 0.05,
            "seconds": None,
        }
        for step in range(steps)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workdir / "config.json").write_text(config.Config().to_json())


def make_evaluation(workdir: Path, prompts: int = 4) -> None:
    """An evaluation as `idgrpo evaluate` leaves it."""
    rng = np.random.default_rng(1)
    folder = workdir / "evaluation"
    base = {name: rng.uniform(0.3, 0.8, 64) for name in bootstrap.LABELS}
    scores = {"base": base, "tuned": {name: values + 0.05 for name, values in base.items()}}
    clusters = np.repeat(np.arange(16), 4)
    means, changes = bootstrap.summarise(scores, clusters, 0, 200)
    shown = []
    for prompt in range(prompts):
        clip = np.tanh(
            rng.normal(0, 1, (1, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
            + rng.normal(0, 0.3, (9, 1, 1, 3))
        ).astype(np.float32)
        files = {}
        for model in scores:
            files[model] = {"path": f"videos/{prompt}/{model}.mp4", "judge_identity": 0.4}
            video.write_video(folder / files[model]["path"], clip, 8)
        references = [f"videos/{prompt}/reference-{n}.png" for n in range(1 + prompt % 3)]
        for path in references:
            Image.fromarray(rng.integers(0, 255, (48, 48, 3)).astype(np.uint8)).save(folder / path)
        shown.append(
            {"prompt": f"Two <people> & prompt {prompt}", "references": references, "videos": files}
        )
    compared = bootstrap.pairs(scores, clusters, 0, 200)
    document = {
        "note": "16 prompts x 4 videos",
        **bootstrap.document(means, changes, compared),
        "shown": shown,
    }
    (folder / "metrics.json").write_text(json.dumps(document))


class Links(HTMLParser):
    """Everything that a page would load, and whether its tags close."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")
        ]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_well_formed(tmp_path):
    make_run(tmp_path)
    make_evaluation(tmp_path)
    text = report.report(tmp_path).read_text()
    parsed = Links(text)
    assert not parsed.open
    assert all(link.startswith("data:") for link in parsed.links)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert text.count("<video") == 8
    assert text.count("<img") == 1 + 2 + 3 + 1
    assert "Two &lt;people&gt; &amp; prompt 0" in text
    for label in bootstrap.LABELS.values():
        assert label in text
    assert "learning_rate" in text
    assert "Training reward" in text
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_page_of_an_unfinished_run(tmp_path):
    make_run(tmp_path, steps=1)
    text = report.report(tmp_path).read_text()
    assert not Links(text).open
    assert "No evaluation yet" in text


def test_page_of_an_evaluation_alone(tmp_path):
    make_evaluation(tmp_path)
    text = report.report(tmp_path).read_text()
    assert "No training steps yet" in text
    assert "No config.json" in text
    assert "<video" in text


def test_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither metrics\.jsonl nor evaluation"):
        report.report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../secret.png", "no picture or video of this folder"),
        ("/etc/passwd", "no picture or video of this folder"),
        ("metrics.json", "no picture or video of this folder"),
        ("videos/0/gone.mp4", "which is missing"),
    ],
)
def test_files_from_elsewhere_do_not_enter_the_page(tmp_path, name, reason):
    run = tmp_path / "run"
    make_run(run)
    make_evaluation(run)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    path = run / "evaluation" / "metrics.json"
    evaluation = json.loads(path.read_text())
    evaluation["shown"][0]["references"][0] = name
    path.write_text(json.dumps(evaluation))
    with pytest.raises(UserError, match=reason):
        report.report(run)
    assert not (run / "report.html").exists()


def test_page_does_not_say_where_files_were(tmp_path):
    make_run(tmp_path)
    places = config.Config(
        model=config.ModelConfig(path="/home/anna/models/Wan2.1"),
        reward=config.RewardConfig(faces="C:\\Users\\anna\\faces", vlm="~/anna/vlm"),
        finetune=config.FinetuneConfig(options={"folder": ["../anna/clips"]}),
    )
    (tmp_path / "config.json").write_text(places.to_json())
    text = report.report(tmp_path).read_text()
    assert "anna" not in text
    assert all(f".../{name}" in text for name in ("Wan2.1", "faces", "vlm", "clips"))


def test_series_keeps_the_last_value_of_a_step_and_drops_gaps():
    rows = [
        {"step": 0, "a": 1.0},
        {"step": 1, "a": None},
        {"step": 2, "a": 3.0},
        {"step": 2, "a": 4.0},
        {"step": 3},
        {"step": 4, "a": float("nan")},
    ]
    assert report.series(rows, "a") == ([0.0, 2.0], [1.0, 4.0])


def test_curve_puts_the_highest_value_on_top():
    drawn = report.curve("t", "", {"a": ([0.0, 1.0, 2.0], [0.0, 5.0, 1.0])}, trend=False)
    heights = [
        float(point.split(",")[1]) for point in re.search(r'points="([^"]+)"', drawn)[1].split()
    ]
    assert heights.index(min(heights)) == 1
    assert heights[0] == max(heights)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3e-4, 2e-4), (17.0, 23456.0), (0.9999, 1.0001)]
)
def test_ticks_are_few_round_and_inside(low, high):
    values = report.ticks(low, high)
    assert 2 <= len(values) <= 6
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)


def test_running_mean_of_a_constant_is_the_constant():
    np.testing.assert_allclose(report.smooth([2.0] * 5), 2.0)
