"""Prompts completed from photos: where words are put, that nothing is lost, files, and users' mistakes."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo import config as configuration
from jax_idgrpo.cli import main
from jax_idgrpo.data.completion import complete_csv
from jax_idgrpo.data.mentions import complete_prompt, keeps_words
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.rewards.vlm.describer import phrase
from jax_idgrpo.synthetic.people import _ACTIONS
from tests.helpers.command import stop_of

ONE, TWO = ["with red hair"], ["with red hair", "with a beard"]
CASES = [
    ("A man walks.", ONE, "A man with red hair walks."),
    ("A man walks.", ["red hair"], "A man (red hair) walks."),
    ("A man walks.", ["With red hair"], "A man with red hair walks."),
    ("Young woman, smiling", ONE, "Young woman with red hair, smiling"),
    (
        "A man and a tall woman dance. The man smiles at the woman.",
        TWO,
        "A man with red hair and a tall woman with a beard dance. The man smiles at the woman.",
    ),
    (
        "One man talks and a man and another man listen.",
        TWO,
        "One man talks and a man with red hair and another man with a beard listen.",
    ),
    ("A woman doctor reads.", ONE, "A woman doctor with red hair reads."),
    ("A man-made lake, a woman's hat, a boy.", ONE, "A man-made lake, a woman's hat, a boy with red hair."),
    (
        "A first person view of a girl and her friend",
        TWO,
        "A first person view of a girl with red hair and her friend with a beard",
    ),
    # Fewer mentions than photos: nobody can tell who is mentioned.
    ("Anna reads", ONE, "Anna reads. The person has red hair."),
    (
        "Anna waves to a man!",
        ["with red hair", "old, bald"],
        "Anna waves to a man! The first person has red hair; the second person: old, bald.",
    ),
    ("Two men talk.", TWO, "Two men talk. The first person has red hair; the second person has a beard."),
    ("A man looks at the man.", TWO, "A man looks at the man. The first person has red hair; the second person has a beard."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words", "completed"), CASES)
def test_words_follow_the_first_mention_of_each_person_or_end_the_prompt(text, words, completed):
    assert complete_prompt(text, words) == completed
    assert keeps_words(text, completed)


def test_a_lost_or_moved_word_is_noticed():
    assert not keeps_words("A man walks home.", "A man with red hair walks.")
    assert not keeps_words("A man walks home.", "A man home walks.")


def test_stripped_prompts_of_the_package_are_completed_to_the_original():
    actions = "|".join(_ACTIONS)
    for prompt in load_prompts(configuration.prompts_file("embedded:eval"), 3):
        pattern = rf"person (with .*?) (?=(?:{actions})[,.])"
        words = re.findall(pattern, prompt.text)
        assert len(words) == prompt.people
        stripped = re.sub(pattern, "person ", prompt.text)
        assert complete_prompt(stripped, words) == prompt.text


@pytest.mark.parametrize(
    ("answer", "finished", "wanted"),
    [
        ("with grey hair and round glasses", True, "with grey hair and round glasses"),
        ('"With grey hair."\n', True, "With grey hair"),
        ("with **grey**\nhair. The photo is dark.", True, "with grey hair"),
        ("with grey hair, a beard, and", False, "with grey hair, a beard"),
        ("with grey hair. The photo", False, "with grey hair"),
        ("with grey", False, ""),
        (" ...", True, ""),
        ("", True, ""),
    ],
)
def test_an_answer_becomes_one_phrase(answer, finished, wanted):
    assert phrase(answer, finished) == wanted


@pytest.fixture
def folder(tmp_path):
    """Prompts with three photos, one of them in both rows, and words for all."""
    rng = np.random.default_rng(0)
    for name in "abc":
        pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "prompts.csv").write_text(
        'ref_paths,prompt,note,more_paths\na.png;b.png,"A man, a woman",x,c.png;\na.png,Anna reads.,,\n'
    )
    (tmp_path / "words.csv").write_text(
        'photo,words\na.png,with red hair\nb.png,"old, with glasses."\nc.png,bald\n'
    )
    return tmp_path


def stopped(monkeypatch, capsys, folder, *words):
    return stop_of(
        main, monkeypatch, capsys, "idgrpo", "describe", "--prompts", folder / "prompts.csv", *words
    )


def test_the_completed_csv_has_the_originals_and_finds_the_photos_from_another_folder(
    folder, monkeypatch, capsys
):
    out = folder / "made" / "completed.csv"
    monkeypatch.setattr(
        "sys.argv",
        f"idgrpo describe --prompts {folder}/prompts.csv --words {folder}/words.csv --out {out}".split(),
    )
    main()
    assert "2 of 2 prompts are completed" in capsys.readouterr().out
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [
        "A man with red hair, a woman (old, with glasses)",
        "Anna reads. The person has red hair.",
    ]
    assert [row["prompt_before"] for row in rows] == ["A man, a woman", "Anna reads."]
    assert [row["note"] for row in rows] == ["x", ""]
    before, after = load_prompts(folder / "prompts.csv", 3), load_prompts(out, 3)
    for old, new in zip(before, after, strict=True):
        assert (old.digests, old.more_digests) == (new.digests, new.more_digests)


def test_a_row_without_a_description_keeps_its_text_and_is_counted(folder):
    out = folder / "completed.csv"

    def describe(prompts):
        first, second = prompts[0].digests
        return {first: "with red hair", second: ""}

    summary = complete_csv(folder / "prompts.csv", out, describe)
    assert "1 of 2 prompts are completed; 1 keep their text" in summary
    assert "(lines 2)" in summary
    assert [prompt.text for prompt in load_prompts(out, 3)] == [
        "A man, a woman",
        "Anna reads. The person has red hair.",
    ]
    with out.open(newline="") as file:
        assert [row["ref_paths"] for row in csv.DictReader(file)] == ["a.png;b.png", "a.png"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("photo,words\na.png,with red hair\n", "does not describe .*b.png .*line 2.*add a row"),
        ("photo,words\nd.png,bald\n", "line 2: photo .*d.png: no such file"),
        ("photo,words\na.png,\n", "line 2: no words; describe a.png"),
        ("photo,words\na.png,bald\na.png,old\n", "line 3: a.png is described before"),
        ("photo,words\na.png,bald, old\n", "line 2: has more fields than the header"),
        ("photo,text\na.png,bald\n", "needs one column words"),
    ],
)
def test_words_that_cannot_be_used_end_in_one_line_and_write_nothing(
    folder, monkeypatch, capsys, words, told
):
    (folder / "words.csv").write_text(words)
    ended = stopped(
        monkeypatch, capsys, folder, "--words", folder / "words.csv", "--out", folder / "new.csv"
    )
    assert ended.status == 2
    assert re.search(told, ended.err), ended.err
    assert ended.err.count("\n") == 1
    assert not (folder / "new.csv").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--out", "new.csv"], "--describer FOLDER or --words CSV, one of them"),
        (["--out", "new.csv", "--words", "words.csv", "--describer", "."], "one of them"),
        (["--out", "prompts.csv", "--words", "words.csv"], "is the CSV of --prompts"),
        (["--out", "new.csv", "--words", "none.csv"], "none.csv: no such file"),
        (["--out", "new.csv", "--describer", "."], "has no config.json; pass the folder of"),
    ],
)
def test_mistakes_end_in_one_line(folder, monkeypatch, capsys, options, told):
    monkeypatch.chdir(folder)
    before = (folder / "prompts.csv").read_text()
    ended = stopped(monkeypatch, capsys, folder, *options)
    assert ended.status == 2
    assert told in ended.err
    assert ended.err.count("\n") == 1
    assert (folder / "prompts.csv").read_text() == before
    assert not (folder / "new.csv").exists()


def test_completed_prompts_are_not_completed_again(folder, monkeypatch, capsys):
    (folder / "prompts.csv").write_text(
        "ref_paths,prompt,prompt_before\na.png,A man (bald),A man\n"
    )
    ended = stopped(
        monkeypatch, capsys, folder, "--words", folder / "words.csv", "--out", folder / "new.csv"
    )
    assert (ended.status, "has a column prompt_before" in ended.err) == (2, True)
