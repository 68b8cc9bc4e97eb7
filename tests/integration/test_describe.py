"""`idgrpo describe` with a small random Qwen2.5-VL: what is written, what is counted, and damaged folders."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.cli import main
from jax_idgrpo.data.mentions import keeps_words
from jax_idgrpo.rewards.vlm import describer
from tests.helpers import vlm_folders
from tests.helpers.command import stop_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and three prompts with two photos."""
    root = tmp_path_factory.mktemp("describe")
    vlm_folders.write_instruct(root / "model", tied=False)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (60, 90)), ("b.png", (140, 100))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / name)
    (root / "prompts.csv").write_text(
        "ref_paths,prompt\na.png;b.png,A man and a boy run.\nb.png,A girl sings.\na.png,Anna sits.\n"
    )
    return root


def test_rows_are_completed_or_keep_their_text_and_are_counted(folder, monkeypatch, capsys):
    photos = []

    def phrase(answer, finished):
        """The random answers are of no language: one is taken for a description, the other for none."""
        photos.append(answer)
        return "" if len(photos) == 2 else "with red hair"

    monkeypatch.setattr(describer, "phrase", phrase)
    words = f"idgrpo describe --prompts {folder}/prompts.csv --describer {folder}/model"
    monkeypatch.setattr("sys.argv", [*words.split(), "--out", str(folder / "out.csv")])
    main()
    printed = capsys.readouterr()
    assert "1 of 3 prompts are completed; 2 keep their text" in printed.out
    assert "(lines 2, 3)" in printed.out
    assert "describing photos" in printed.err
    assert len(photos) == 2  # each photo once, though both are in two rows
    assert photos[0] != photos[1]
    with (folder / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [
        "A man and a boy run.",
        "A girl sings.",
        "Anna sits. The person has red hair.",
    ]
    assert all(keeps_words(row["prompt_before"], row["prompt"]) for row in rows)


def damaged(folder, config=None, generation=None, drop=""):
    """Change a file of the model, and write its name."""
    if config:
        sizes = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(sizes | config))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if drop:
        (folder / drop).unlink()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"config": {"model_type": "qwen2_vl"}}, "model_type is 'qwen2_vl', only 'qwen2_5_vl'"),
        ({"generation": {"eos_token_id": "end"}}, "has no eos_token_id"),
        ({"generation": {"repetition_penalty": -1.0}}, "repetition_penalty is -1.0"),
        ({"drop": "tokenizer.json"}, "tokenizer.json"),
        ({"drop": "model.safetensors"}, "model"),
    ],
)
def test_a_damaged_folder_ends_in_one_line_and_writes_nothing(
    folder, tmp_path, monkeypatch, capsys, changes, told
):
    model = tmp_path / "model"
    model.mkdir()
    for file in (folder / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    damaged(model, **changes)
    words = ("--prompts", folder / "prompts.csv", "--describer", model, "--out", tmp_path / "o.csv")
    ended = stop_of(main, monkeypatch, capsys, "idgrpo", "describe", *words)
    assert ended.status == 2
    assert re.search(re.escape(told), ended.err), ended.err
    assert len([line for line in ended.err.splitlines() if line.startswith("idgrpo: ")]) == 1
    assert not (tmp_path / "o.csv").exists()
