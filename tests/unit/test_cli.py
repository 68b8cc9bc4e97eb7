"""What the user types: what is called, and what a mistake answers (one line, status 2, no traceback, nothing written)."""

import os
import sys
from pathlib import Path

import pytest

from checkpoints_convert.places import LoRASum
from jax_idgrpo import cli, config
from jax_idgrpo.errors import UserError
from jax_idgrpo.planning import plan
from tests.helpers.command import stop_of

CONFIG = """
from jax_idgrpo.config import Config
def get_config():
    return Config()
"""


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def prompts_file(tmp_path) -> Path:
    path = tmp_path / "prompts.csv"
    path.write_text("ref_paths,prompt\na.png,one person waves\n")
    return path


def call(function: str, monkeypatch, arguments: list[str]) -> tuple:
    """The arguments with which `idgrpo arguments` calls `module:name`."""
    module, name = function.split(":")
    calls: list[tuple] = []
    monkeypatch.setitem(sys.modules, module, type(sys)(module))
    setattr(sys.modules[module], name, lambda *given: calls.append(given))
    cli.run(arguments)
    assert len(calls) == 1
    return calls[0]


def test_a_server_listens_on_this_machine_unless_told(monkeypatch, config_file, prompts_file):
    words = ["serve-reward", str(config_file), "--port", "8100"]
    _, *given = call("jax_idgrpo.rewards.serve:serve", monkeypatch, words)
    assert given == ["127.0.0.1", 8100, None]
    words += ["--host", "0.0.0.0", "--prompts", str(prompts_file)]
    _, *given = call("jax_idgrpo.rewards.serve:serve", monkeypatch, words)
    assert given == ["0.0.0.0", 8100, prompts_file]


def test_train_gets_configuration_and_workdir(monkeypatch, config_file, tmp_path):
    given, workdir, profile = call(
        "jax_idgrpo.training.train:train",
        monkeypatch,
        [
            "train",
            "--rollout.group",
            "4",
            str(config_file),
            "--workdir",
            str(tmp_path / "w"),
            "--mesh.data=-1",
            "--run.steps=7",
            "--data.negative_prompt",
            "a=b, c",
            "--profile",
            str(tmp_path / "p"),
        ],
    )
    assert profile == tmp_path / "p"
    assert (given.rollout.group, given.run.steps, given.mesh.data, given.data.negative_prompt) == (
        4,
        7,
        -1,
        "a=b, c",
    )
    assert workdir == tmp_path / "w"
    assert not workdir.exists()
    assert not profile.exists()


def test_train_merges_the_adapters_that_it_is_given(monkeypatch, config_file, tmp_path):
    (tmp_path / "a").mkdir()
    words = ["train", str(config_file), "--workdir", str(tmp_path / "w")]
    words += ["--lora", f"{tmp_path / 'a'}:0.5"]
    given, *_ = call("jax_idgrpo.training.train:train", monkeypatch, words)
    assert given.model.base_loras == {str(tmp_path / "a"): 0.5}
    with pytest.raises(UserError, match="give one of them"):
        cli.run([*words, "--model.base_loras", "{}"])


def test_sample_adds_the_adapters_that_it_is_given(
    monkeypatch, config_file, prompts_file, tmp_path
):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    words = ["sample", str(config_file), "--prompts", str(prompts_file), "--out", str(tmp_path)]
    words += ["--lora", f"{tmp_path / 'a'}:0.5", "--lora", str(tmp_path / "b")]
    words += ["--best-of", "4"]
    *_, lora, best_of = call("jax_idgrpo.evaluation.commands:sample", monkeypatch, words)
    assert best_of == 4
    assert lora == LoRASum(((tmp_path / "a", 0.5), (tmp_path / "b", 1.0)))


def test_evaluate_takes_adapters_in_both_spellings(
    monkeypatch, config_file, prompts_file, tmp_path
):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    arguments = [
        "evaluate",
        str(config_file),
        "--prompts",
        str(prompts_file),
        "--out",
        str(tmp_path / "o"),
        "--lora",
        f"one={tmp_path / 'a'}",
        f"two={tmp_path / 'b'}",
        "--lora",
        f"three={tmp_path / 'c'}",
    ]
    _, prompts, out, loras, checkpoints = call(
        "jax_idgrpo.evaluation.commands:evaluate", monkeypatch, arguments
    )
    assert checkpoints == {}
    assert loras == {"one": tmp_path / "a", "two": tmp_path / "b", "three": tmp_path / "c"}
    assert (prompts, out) == (prompts_file, tmp_path / "o")


def test_sample_and_score(monkeypatch, config_file, prompts_file, tmp_path):
    arguments = [
        "sample",
        str(config_file),
        "--prompts",
        str(prompts_file),
        "--out",
        str(tmp_path / "o"),
    ]
    assert call("jax_idgrpo.evaluation.commands:sample", monkeypatch, arguments)[1:] == (
        prompts_file,
        tmp_path / "o",
        None,
        1,
    )
    with pytest.raises(UserError, match="--best-of is 0; use 1 or more"):
        cli.run([*arguments, "--best-of", "0"])
    arguments = [
        "score",
        str(config_file),
        "--prompts",
        str(prompts_file),
        "--videos",
        str(tmp_path),
        "--out",
        str(tmp_path / "s.jsonl"),
    ]
    assert call("jax_idgrpo.evaluation.commands:score", monkeypatch, arguments)[1:] == (
        tmp_path,
        prompts_file,
        tmp_path / "s.jsonl",
    )
    arguments[-2:] = ["--report", str(tmp_path / "r")]
    assert call("jax_idgrpo.evaluation.commands:score", monkeypatch, arguments)[1:] == (
        tmp_path,
        prompts_file,
        tmp_path / "r" / "scores.jsonl",
        tmp_path / "r",
        False,
    )


MISTAKES = {
    "trian CONFIG --workdir W": "did you mean train?",
    "train": "required: CONFIG, --workdir",
    "train CONFIG": "--workdir",
    "train CONFIG --workdir W --rollout.gruop 4": "did you mean rollout.group?",
    "train CONFIG --workdir W --rollout.group": "needs a value",
    "train CONFIG --workdir W --rollout.group --run.steps 3": "--rollout.group needs a value",
    "train CONFIG --workdir W --rollout.group many": "not a number",
    "train CONFIG --workdir W --rollout.group 1": "rollout.group is 1",
    "train CONFIG --workdir W --rollout.micro_batch 7": "does not divide",
    "train CONFIG --workdri W --workdir W": "did you mean --workdir?",
    "train CONFIG extra --workdir W": "unexpected argument extra",
    "train missing.py --workdir W": "missing.py: no such file",
    "train CONFIG --workdir CONFIG": "is a file, not a folder",
    "train CONFIG --workdir CONFIG/below": "cannot be written",
    "train CONFIG --workdir /proc/none": "cannot be written",
    "sample CONFIG --prompts none.csv --out W": "none.csv: no such file",
    "sample CONFIG --prompts PROMPTS --out W --lora nowhere": "nowhere: no such file",
    "score CONFIG --prompts PROMPTS --videos nowhere --out W": "nowhere: no such file",
    "score CONFIG --videos . --out W": "pass --prompts CSV or --benchmark opens2v FOLDER",
    "score CONFIG --videos . --prompts PROMPTS": "pass --report DIR for a page and tables, or",
    "score CONFIG --videos . --prompts PROMPTS --report CONFIG": "is a file, not a folder",
    "score CONFIG --videos . --benchmark vbench . --report W": "vbench: no such benchmark; use",
    "score CONFIG --videos . --benchmark opens2v . --out W": "pass --report DIR",
    "score CONFIG --videos . --benchmark opens2v nowhere --report W": "nowhere: no such file",
    "evaluate CONFIG --prompts PROMPTS --out W --lora here": "not NAME=PATH",
    "evaluate CONFIG --prompts PROMPTS --out W --lora base=.": "choose another",
    "evaluate CONFIG --prompts PROMPTS --out W --lora t=nowhere": "nowhere: no such file",
    "report nowhere": "nowhere: no such file",
    "report . --run.steps 3": "takes no --run.steps",
}


@pytest.mark.parametrize(("line", "answer"), MISTAKES.items())
def test_mistake_is_one_line(
    monkeypatch, capsys, config_file, prompts_file, tmp_path, line, answer
):
    before = set(tmp_path.rglob("*"))
    words = {
        "CONFIG": str(config_file),
        "PROMPTS": str(prompts_file),
        "W": str(tmp_path / "w"),
        "CONFIG/below": f"{config_file}/below",
    }
    given = [words.get(word, word) for word in line.split()]
    stop = stop_of(cli.main, monkeypatch, capsys, "idgrpo", *given)
    assert stop.status == 2
    assert stop.out == ""
    assert stop.err.startswith("idgrpo: ")
    assert stop.err.count("\n") == 1
    assert answer in stop.err
    assert set(tmp_path.rglob("*")) == before


def broken_config(text: str, config_file: Path, tmp_path: Path) -> str:
    config_file.write_text(text)
    with pytest.raises(UserError) as error:
        cli.run(["train", str(config_file), "--workdir", str(tmp_path / "w")])
    return str(error.value)


def test_broken_configuration_file(config_file, tmp_path):
    assert "SyntaxError" in broken_config("def get_config(:", config_file, tmp_path)
    assert "get_config" in broken_config("x = 1", config_file, tmp_path)
    assert "int" in broken_config("def get_config(): return 3", config_file, tmp_path)


@pytest.mark.parametrize(
    ("raised", "status"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device", "/full"), 2),
        (UserError("two\nlines"), 2),
    ],
)
def test_exit_status(monkeypatch, capsys, raised, status):
    def fail(arguments):
        raise raised

    monkeypatch.setattr(cli, "run", fail)
    stop = stop_of(cli.main, monkeypatch, capsys, "idgrpo", "train")
    assert stop.status == status
    assert "Traceback" not in stop.err


def test_a_defect_is_not_hidden(monkeypatch):
    def fail(arguments):
        raise ValueError("a defect of ours")

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(ValueError, match="a defect of ours"):
        cli.main()


def test_every_field_of_the_schema_is_an_option(capsys):
    with pytest.raises(SystemExit):
        cli.run(["train", "--help"])
    printed = capsys.readouterr().out
    for section, values in vars(config.Config()).items():
        for name in vars(values):
            assert f"--{section}.{name} " in printed


def test_programs_are_kept_in_the_users_cache_or_nowhere(tmp_path):
    assert (
        cli.programs_folder({"HOME": str(tmp_path)})
        == tmp_path / ".cache" / "jax-idgrpo" / "programs"
    )
    assert (
        cli.programs_folder({"HOME": "/x", "XDG_CACHE_HOME": str(tmp_path)})
        == tmp_path / "jax-idgrpo" / "programs"
    )
    (tmp_path / "file").touch()
    for environment in ({}, {"HOME": ""}, {"HOME": str(tmp_path / "file")}):
        assert cli.programs_folder(environment) is None


@pytest.mark.parametrize(("command", "kept"), [("train", True), ("plan", False)])
def test_what_a_command_asks_of_jax(command, kept, tmp_path, monkeypatch):
    """As much of a GPU as a plan counts on; and a plan's programs, which only the planned machine could read, are not kept."""
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    monkeypatch.setattr("sys.argv", ["idgrpo", command])
    monkeypatch.setattr(cli, "run", lambda arguments: None)
    cli.main()
    assert float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == pytest.approx(1 - plan.SPARE)
    assert ("JAX_COMPILATION_CACHE_DIR" in os.environ) == kept
