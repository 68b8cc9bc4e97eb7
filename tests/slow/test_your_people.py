"""The way from films to an adapter of docs/your-people.md, executed end to end on drawn films."""

import json
import subprocess
import sys

from tests.helpers.paths import ROOT


def test_films_become_a_tuned_adapter(tmp_path):
    sizes = {"films": 12, "pairs": 24, "labels": 12, "adapter-steps": 4, "grpo-steps": 1}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.chain", "--folder", str(tmp_path), *words]
    subprocess.run([*command, "--held-out-films", "6"], check=True, cwd=ROOT)
    stages = [*map(json.loads, (tmp_path / "seconds.jsonl").read_text().splitlines())]
    assert {name for stage in stages for name in stage} >= {
        "ingest",
        "annotate --page",
        "train-reward",
        "finetune",
        "train",
        "evaluate",
    }
    measured = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert {"adapter", "grpo"} <= set(json.dumps(measured).split('"'))
    adapter = tmp_path / "tuned" / "export" / "adapter_model.safetensors"
    assert (
        adapter.read_bytes()
        != (tmp_path / "adapter" / "export" / "adapter_model.safetensors").read_bytes()
    )
    # The command continues: nothing that is complete is repeated.
    subprocess.run([*command, "--held-out-films", "6"], check=True, cwd=ROOT)
    assert len((tmp_path / "seconds.jsonl").read_text().splitlines()) == len(stages)
