"""Several adapters at once: their sum, the base that they are merged into, and the options."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert import adapter, lora, rules, store
from checkpoints_convert.__main__ import run as convert
from checkpoints_convert.network import ours
from checkpoints_convert.places import LoRASum, split_scale
from jax_idgrpo.cli import paths
from jax_idgrpo.config import Config, ModelConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import journal
from jax_idgrpo.sampling import adapters, lora_sum, pipeline
from jax_idgrpo.training import checkpoint
from tests.helpers.convert import ADAPTER, PIPELINE


@pytest.fixture(scope="module")
def style(tmp_path_factory) -> Path:
    """Another adapter: on q of the main blocks and on the feed-forward layers, of rank 2."""
    rng = np.random.default_rng(9)
    tensors = {}
    for block in range(4):
        for name, inputs, outputs in (("self_attn.q", 48, 48), ("ffn.0", 48, 96)):
            start = f"diffusion_model.blocks.{block}.{name}"
            tensors[f"{start}.lora_down.weight"] = rng.standard_normal((2, inputs))
            tensors[f"{start}.lora_up.weight"] = rng.standard_normal((outputs, 2))
            tensors[f"{start}.alpha"] = np.float32(3.0).reshape(())
    file = tmp_path_factory.mktemp("style") / "style.safetensors"
    store.write_file(file, {name: value.astype(np.float32) for name, value in tensors.items()})
    return file


def change(path, scale=1.0) -> dict[str, np.ndarray]:
    """What an adapter adds to the kernels: s (alpha / R) A B, by our names."""
    network = adapter.open_adapter(path)
    arrays = {name: np.asarray(tensor, np.float64) for name, tensor in ours(network).items()}
    return {
        layer.name: scale
        * alpha
        / rank
        * arrays[f"{layer.name}.lora_a"]
        @ arrays[f"{layer.name}.lora_b"]
        for layer, (rank, alpha) in network.config.items()
    }


def added(*changes) -> dict[str, np.ndarray]:
    return {
        name: sum(each.get(name, 0) for each in changes) for name in {n for c in changes for n in c}
    }


def test_a_sum_adds_every_adapter_at_its_strength(style):
    config = pipeline.read_architecture(PIPELINE).transformer
    parts = LoRASum(((ADAPTER, 0.5), (style, 2.0)))
    want = added(change(ADAPTER, 0.5), change(style, 2.0))
    summed = adapters.lora_config(parts, config)
    leaves = rules.leaves(adapters.load_lora_state(parts, summed))
    scales = lora.scales_of(summed)
    assert {layer.name for layer in scales} == set(want)
    for layer, (rank, alpha) in scales.items():
        at = () if layer.block is None else (layer.block,)
        a, b = (np.asarray(leaves[f"{layer.leaf}.lora_{part}"][at], np.float64) for part in "ab")
        np.testing.assert_allclose(alpha / rank * a @ b, want[layer.name], rtol=1e-4, atol=1e-4)
    # One adapter at full strength is read as it is, bit for bit.
    alone = adapters.lora_config(ADAPTER, config)
    assert (alone.rank, alone.alpha, alone.lora) == (4, 8.0, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_holds_what_is_merged_into_it(style, dtype):
    base, moved = (pipeline.load_transformer(PIPELINE, dtype) for _ in range(2))
    lora_sum.merge_base([base], ModelConfig())
    model = ModelConfig(base_loras={str(ADAPTER): 0.5, str(style): 1})
    lora_sum.merge_base([moved], model)
    want = added(change(ADAPTER, 0.5), change(style))
    before, after = (rules.leaves(nnx.state(each)) for each in (base, moved))
    changed = {name for name, leaf in before.items() if not np.array_equal(leaf, after[name])}
    by_leaf = {}
    for name, value in want.items():
        stack, block, layer = name.split(".", 2)
        by_leaf.setdefault(f"{stack}.{layer}.kernel", {})[int(block)] = value
    assert changed == set(by_leaf)
    for leaf, blocks in by_leaf.items():
        assert after[leaf].dtype == jnp.dtype(dtype)
        for block, kernel in enumerate(np.asarray(before[leaf], np.float32)):
            exact = kernel + blocks.get(block, 0)
            got = np.asarray(after[leaf][block], np.float32)
            bound = 1e-5 if dtype == "float32" else 2**-8
            np.testing.assert_allclose(got, exact, rtol=bound, atol=bound)


def test_a_run_is_not_continued_on_another_base(tmp_path):
    before = {"a.safetensors": "one"}
    checkpoint.keep_base(tmp_path, {"a.safetensors": "zero"}, resumes=False)
    checkpoint.keep_base(tmp_path, before, resumes=False)  # no step is stored yet
    checkpoint.keep_base(tmp_path, before, resumes=True)
    with pytest.raises(UserError, match=r"the content of a\.safetensors, which is merged into"):
        checkpoint.keep_base(tmp_path, {"a.safetensors": "two"}, resumes=True)
    model = ModelConfig(base_loras={"a.safetensors": 0.5})
    with pytest.raises(UserError, match=r"base_loras"):
        checkpoint.check_resume(Config().to_json(), Config(model=model))


def test_options_name_adapters_and_strengths(tmp_path, style):
    copy = shutil.copytree(ADAPTER, tmp_path / "identity")
    assert paths.adapter_sum([]) is None
    assert paths.adapter_sum([str(copy)]) == copy
    assert paths.adapter_sum([f"{copy}:1"]) == copy
    both = LoRASum(((copy, 0.5), (style, 1.0)))
    assert paths.adapter_sum([f"{copy}:0.5", str(style)]) == both
    assert paths.adapters([f"x={copy}:0.5", f"y={copy}", f"x={style}"]) == {"x": both, "y": copy}
    assert paths.base_loras([f"{copy}:0.5", str(style)]) == {str(copy): 0.5, str(style): 1.0}
    odd = tmp_path / "a:2"
    shutil.copytree(ADAPTER, odd)
    assert split_scale(str(odd), "--lora") == (odd, 1.0)
    for text in (f"{copy}:0", f"{copy}:-1", f"{copy}:nan"):
        with pytest.raises(UserError, match="is no positive number"):
            paths.adapter_sum([text])
    with pytest.raises(UserError, match="given twice"):
        paths.base_loras([str(copy), f"{copy}:0.5"])


def test_a_strength_is_part_of_what_a_video_depends_on(tmp_path, style):
    facts = {json.dumps(journal.lora_facts(LoRASum(((style, scale),)))) for scale in (0.5, 1.0)}
    assert len(facts | {json.dumps(journal.lora_facts(style)), '""'}) == 4
    assert journal.lora_facts(None) == ""


def test_a_sum_is_written_as_one_adapter_of_peft(style, tmp_path, capsys):
    place = str(tmp_path / "both")
    assert convert(["add", place, f"{ADAPTER}:0.5", f"{style}:2"]) == 0
    assert convert(["add", str(tmp_path / "turned"), f"{style}:2", f"{ADAPTER}:0.5"]) == 0
    want = added(change(ADAPTER, 0.5), change(style, 2.0))
    for folder in (tmp_path / "both", tmp_path / "turned"):
        got = change(folder)
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-4)
    assert convert(["export", place, str(tmp_path / "c"), "--format", "comfyui"]) == 0
    assert convert(["verify", place, str(tmp_path / "c")]) == 0


def test_adapters_of_different_models_are_not_added(style, tmp_path):
    wide = {name: np.asarray(value) for name, value in store.open_weights(style)[0].items()}
    name = "diffusion_model.blocks.0.self_attn.q.lora_down.weight"
    wide[name] = np.concatenate([wide[name], wide[name]], axis=1)
    store.write_file(tmp_path / "wide.safetensors", wide)
    with pytest.raises(UserError, match=r"lora_a is 96 wide, that of .* 48; add adapters of one"):
        convert(["add", str(tmp_path / "out"), str(style), str(tmp_path / "wide.safetensors")])
    assert not (tmp_path / "out").exists()
