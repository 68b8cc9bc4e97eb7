r"""Rehearse all commands at the shapes of VACE-1.3B, with random weights and your photos.

    python benchmarks/rehearsal.py --folder DIR --photos anna.jpg ben.jpg --faces FACES \
        [--layers 30]

Diffusers writes a random pipeline with the widths of Wan2.1-VACE-1.3B, the published VAE and a
small text encoder. `idgrpo plan`, `train` (two steps of one group of two), `evaluate` and `report`
then run on it as on a real checkpoint, with 17 frames of 240 x 416. The table compares peak memory
with the plan. Requires the `test` extra. With `--layers 30` (the published depth) it takes about an
hour on two cores; the time is proportional to the layers.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmarks.convert import run_measured

OPTIONS = """
    --video.frames 17 --data.max_people 2 --data.text_length 64
    --rollout.prompts 1 --rollout.group 2 --rollout.micro_batch 2 --rollout.steps 2
    --rollout.guidance 1 --rollout.window all --grpo.updates 1
    --run.steps 2 --run.save_every 1 --run.sample_every 0
    --evaluate.videos 1 --evaluate.batch 1 --evaluate.steps 2 --evaluate.frames 17
    --evaluate.height 240 --evaluate.width 416 --evaluate.bootstrap 100
""".split()  # noqa: SIM905


def write_pipeline(folder: Path, layers: int) -> None:
    """Write a random diffusers pipeline in bfloat16; the VAE is float32, as published."""
    import torch
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanVACEPipeline,
        WanVACETransformer3DModel,
    )
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    from jax_idgrpo.config import EMBEDDED

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "pipeline" / "tokenizer")
    text = UMT5Config(
        d_model=4096,
        d_kv=64,
        num_heads=8,
        d_ff=1024,
        num_layers=2,
        vocab_size=len(tokenizer),
        feed_forward_proj="gated-gelu",
    )
    torch.set_default_dtype(torch.bfloat16)
    transformer = WanVACETransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=128,
        ffn_dim=8960,
        num_layers=layers,
        text_dim=4096,
        vace_layers=list(range(0, layers, 2)),
        vace_in_channels=96,
    )
    encoder = UMT5EncoderModel(text)
    torch.set_default_dtype(torch.float32)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=3.0,
    )
    WanVACEPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKLWan(),
        scheduler=scheduler,
        transformer=transformer,
    ).save_pretrained(folder)


def write_prompts(folder: Path, photos: list[Path]) -> Path:
    """Write a prompts CSV with one row and copies of the photos."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        shutil.copy(photo, folder / f"person-{number}{photo.suffix}")
        for number, photo in enumerate(photos)
    ]
    listed = ";".join(Path(name).name for name in names)
    path = folder / "prompts.csv"
    path.write_text(f'ref_paths,prompt\n{listed},"Two people walk along the beach, talking."\n')
    return path


def main() -> None:
    """Run the rehearsal and print its table."""
    parser = argparse.ArgumentParser(
        description="Run the whole job at the shapes of VACE-1.3B with random weights."
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="folder for the pipeline (6 GB at full depth) and the run",
    )
    parser.add_argument(
        "--photos", type=Path, nargs="+", required=True, help="one photo per person"
    )
    parser.add_argument("--faces", default="photographs", help="face networks, as reward.faces")
    parser.add_argument(
        "--layers",
        type=int,
        default=30,
        help="blocks of the transformer (default 30, as published)",
    )
    given = parser.parse_args()
    folder = given.folder.absolute()
    if not (folder / "pipeline" / "model_index.json").exists():
        write_pipeline(folder / "pipeline", given.layers)
    prompts = write_prompts(folder / "prompts", given.photos)
    shared = [
        "vace_1_3b", "--model.path", str(folder / "pipeline"),
        "--data.prompts", str(prompts), "--evaluate.prompts", str(prompts),
        "--reward.faces", given.faces, *OPTIONS,
    ]  # fmt: skip
    program = (sys.executable, "-m", "jax_idgrpo")
    run, lora = folder / "run", f"tuned={folder / 'run' / 'export'}"
    run_measured(
        "plan", *program, "plan", *shared, "--topology", "cpu:1", "--out", str(folder / "plan")
    )
    _, peak = run_measured("train, 2 steps", *program, "train", *shared, "--workdir", str(run))
    run_measured(
        "evaluate", *program, "evaluate", *shared, "--out", str(run / "evaluation"), "--lora", lora
    )
    run_measured("report", *program, "report", str(run))
    planned = json.loads((folder / "plan" / "plan.json").read_text())
    largest = max(
        program["peak"] for program in planned["programs"] if "evaluation" not in program["program"]
    )
    print(
        f"training: planned {largest / 1e9:.1f} GB, measured {peak:.1f} GB "
        f"({peak / (largest / 1e9):.2f})"
    )


if __name__ == "__main__":
    main()
