"""The pipeline against golden arrays of the public code, its folder written and read again, and what bad folders get."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jax_idgrpo as idg
from checkpoints_convert import rules, store
from jax_idgrpo import rng
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.sampling import adapters, pipeline
from tests.helpers.comparison import relative_error
from tests.helpers.paths import GOLDEN

TINY = GOLDEN / "tiny_vace"
ADAPTER = GOLDEN / "lora_peft_tiny"
BOUND = 1e-5  # the limit asked of parity is 1e-4


@pytest.fixture(scope="module")
def pipe() -> pipeline.Pipeline:
    return idg.load_pipeline(TINY)


def golden(name: str) -> dict[str, jax.Array]:
    return {key: jnp.asarray(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()}


@nnx.jit
def velocity(model, latents, timesteps, text, control, control_scale) -> jax.Array:
    return model(latents, timesteps, text, control=control, control_scale=control_scale)


def run(model, arrays, control_scale: float = 1.0) -> np.ndarray:
    inputs = (arrays[name] for name in ("latents", "timesteps", "text", "control"))
    return np.asarray(velocity(model, *inputs, jnp.float32(control_scale)))


def same(a, b) -> bool:
    a, b = rules.leaves(nnx.state(a)), rules.leaves(nnx.state(b))
    return set(a) == set(b) and all(
        a[name].dtype == b[name].dtype and np.array_equal(np.asarray(a[name]), np.asarray(b[name]))
        for name in a
    )


# ---- golden ----------------------------------------------------------------------------------------------------------


def test_transformer(pipe):
    arrays = golden("vace_original_tiny")
    for scale, want in zip(arrays["control_scales"], arrays["velocity"], strict=True):
        assert relative_error(run(pipe.transformer, arrays, float(scale)), want) < BOUND
    assert relative_error(run(pipe.transformer, arrays, 0.0), arrays["velocity"][0]) > 1e-2


def test_text_encoder_and_tokenizer(pipe):
    arrays = golden("umt5_tiny")
    encode = nnx.jit(lambda model, ids, mask: model(ids, mask))
    for suffix in ("", "_long"):
        got = encode(pipe.text_encoder, arrays[f"ids{suffix}"], arrays[f"mask{suffix}"])
        assert relative_error(got, arrays[f"hidden{suffix}"]) < BOUND
    prompts = [
        "a man and a woman smile",
        "two people walking in the street, the woman in red smiles at the man",
        "",
    ]
    tokens = pipe.tokenizer(
        prompts, padding="max_length", max_length=16, truncation=True, return_tensors="np"
    )
    np.testing.assert_array_equal(tokens["input_ids"], arrays["ids"])
    np.testing.assert_array_equal(tokens["attention_mask"], arrays["mask"])
    assert (
        pipe.tokenizer(prompts[1], max_length=6, truncation=True)["input_ids"][-1] == 1
    )  # the eos survives


def test_vae(pipe):
    encode = nnx.jit(lambda model, video: model.encode(video))
    decode = nnx.jit(lambda model, latents: model.decode(latents))
    arrays = golden("vae_tiny_encode")
    assert relative_error(encode(pipe.vae, arrays["video_f5"]), arrays["latents_f5"]) < BOUND
    arrays = golden("vae_tiny_decode")
    assert relative_error(decode(pipe.vae, arrays["latents_t2"]), arrays["video_t2"]) < BOUND


def test_shift_and_kind(pipe):
    assert pipe.shift == 3.0
    assert pipe.kind == "vace"


# ---- adapters --------------------------------------------------------------------------------------------------------


def renamed(folder: Path, prefix: str, metadata: dict[str, str] | None = None) -> Path:
    """The golden adapter as one file whose names start with `prefix`."""
    tensors = store.open_tensors(ADAPTER)
    file = folder / "some_lora.safetensors"
    names = {name: prefix + name.removeprefix("base_model.model.") for name in tensors}
    store.write_file(file, {names[name]: value for name, value in tensors.items()}, metadata)
    return file


def test_an_adapter_moves_the_output_as_peft_says(pipe, tmp_path):
    base, arrays = pipe.transformer, golden("lora_peft_tiny")
    pipe = dataclasses.replace(pipe)  # the shared one keeps its base
    assert relative_error(run(pipe.transformer, arrays), arrays["velocity_without_adapter"]) < BOUND
    pipe.load_lora(ADAPTER)
    got = run(pipe.transformer, arrays)
    assert relative_error(got, arrays["velocity_with_adapter"]) < BOUND
    assert relative_error(got, arrays["velocity_without_adapter"]) > 0.1

    # Written and read again, in PEFT's form and as single files, it is the same adapter.
    config, state = pipe.transformer.config, nnx.state(pipe.transformer, LoRAParam)
    adapters.save_lora(
        tmp_path / "adapter", state, config, {"model": {"path": "some/base"}, "run": {"seed": 3}}
    )
    told = (tmp_path / "adapter" / "README.md").read_text()
    assert 'license: "apache-2.0"' in told
    assert 'base_model: "some/base"' in told
    assert '"seed": 3' in told
    assert "rank 4, alpha 8" in told
    header = {
        "lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})
    }
    for path in (
        tmp_path / "adapter",
        tmp_path / "adapter" / "adapter_model.safetensors",
        renamed(tmp_path, "transformer.", header),
    ):
        again = dataclasses.replace(pipe, transformer=base)
        again.load_lora(path)
        assert again.transformer.config == config
        assert same(again.transformer, pipe.transformer)


def test_a_file_that_names_no_alpha_has_alpha_equal_to_rank(tmp_path):
    for prefix in ("", "transformer."):
        assert adapters.lora_scale(renamed(tmp_path, prefix)) == (4, 4.0)
    with pytest.raises(
        UserError, match="its alpha is not known, since no adapter_config.json is beside it"
    ):
        adapters.lora_scale(renamed(tmp_path, "base_model.model."))  # PEFT always writes one
    assert adapters.lora_scale(ADAPTER) == (4, 8.0)


def test_a_fresh_adapter_changes_nothing_and_shares_the_base(pipe):
    arrays = golden("lora_peft_tiny")
    adapted = adapters.add_adapter(pipe.transformer, 3, 6.0, rng.key(5, "init"))
    np.testing.assert_array_equal(run(adapted, arrays), run(pipe.transformer, arrays))
    other = adapters.add_adapter(pipe.transformer, 3, 6.0, jax.random.key(1))
    a, b = (rules.leaves(nnx.state(model, LoRAParam)) for model in (adapted, other))
    assert len(a) == 2 * 2 * 8
    assert all(leaf.dtype == jnp.float32 for leaf in a.values())
    for name, leaf in a.items():
        if name.endswith("lora_b"):
            assert not leaf.any()
        else:
            assert 0.2 < np.std(leaf) < 0.5
            assert not np.array_equal(leaf, b[name])
    base = rules.leaves(nnx.state(pipe.transformer))
    assert all(
        base[name] is leaf for name, leaf in rules.leaves(nnx.state(other)).items() if name in base
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lora_bias": True}, "lora_bias is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"alpha_pattern": {"(": 3}}, "is no regular expression"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": None}, "adapter_config.json: "),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path, change, match):
    shutil.copytree(ADAPTER, tmp_path / "a")
    values = store.read_json(tmp_path / "a" / "adapter_config.json")
    store.write_json(tmp_path / "a" / "adapter_config.json", values | change)
    with pytest.raises(UserError, match=match):
        adapters.lora_scale(tmp_path / "a")


def test_adapters_of_another_model_are_refused(pipe, tmp_path):
    config = dataclasses.replace(pipe.transformer.config, rank=4, alpha=8.0)
    with pytest.raises(UserError, match="made for 4 blocks, this model has 3"):
        adapters.load_lora_state(ADAPTER, dataclasses.replace(config, num_layers=3))
    with pytest.raises(UserError, match="made for width 48, this model has 32"):
        adapters.load_lora_state(ADAPTER, dataclasses.replace(config, num_heads=2))
    with pytest.raises(UserError, match="rank 4, alpha 8 where 8, 8 are set"):
        adapters.load_lora_state(ADAPTER, dataclasses.replace(config, rank=8))
    with pytest.raises(UserError, match="does not exist"):
        adapters.lora_scale(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no tensor named \*\.lora_A"):
        adapters.lora_scale(TINY / "transformer")


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_the_folder_survives_a_round_trip_with_every_bit(pipe, tmp_path):
    pipeline.save_pipeline(pipe, tmp_path / "copy")
    for part in ("transformer", "vae", "text_encoder"):
        before, after = (
            store.open_tensors(TINY / part),
            store.open_tensors(tmp_path / "copy" / part),
        )
        assert set(before) == set(after)
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            assert np.asarray(tensor).tobytes() == np.asarray(after[name]).tobytes(), name
    again = idg.load_pipeline(tmp_path / "copy")
    assert all(
        same(getattr(again, part), getattr(pipe, part))
        for part in ("transformer", "vae", "text_encoder")
    )
    assert again.shift == pipe.shift
    assert again.transformer.config == pipe.transformer.config
    assert (
        again.tokenizer("a man smiles")["input_ids"] == pipe.tokenizer("a man smiles")["input_ids"]
    )
    pipeline.save_pipeline(
        dataclasses.replace(pipe, shift=5.0), tmp_path / "copy"
    )  # a pipeline may be replaced
    assert idg.load_pipeline(tmp_path / "copy").shift == 5.0
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_parts_can_be_written_one_by_one(pipe, tmp_path):
    for save in (
        lambda: pipeline.save_text_encoder(pipe.text_encoder, pipe.tokenizer, tmp_path),
        lambda: pipeline.save_vae(pipe.vae, tmp_path),
        lambda: pipeline.save_transformer(pipe.transformer, tmp_path, 3.0),
    ):
        with pytest.raises(UserError):
            idg.load_pipeline(tmp_path)
        save()
    assert same(idg.load_pipeline(tmp_path).vae, pipe.vae)
    assert same(pipeline.load_transformer(tmp_path, unroll=True), pipe.transformer)
    published, ours = (store.read_json(folder / "model_index.json") for folder in (TINY, tmp_path))
    assert (
        published | {"tokenizer": ours["tokenizer"]} == ours
    )  # the tokenizer's class has two names


def test_a_folder_of_something_else_is_not_replaced(pipe, tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        pipeline.save_pipeline(pipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_bfloat16_rounds_the_weights_but_not_the_sensitive_ones(pipe):
    half = idg.load_pipeline(TINY, dtype="bfloat16", rank=2, alpha=2.0)
    exact = rules.leaves(nnx.state(pipe.transformer))
    for name, leaf in rules.leaves(nnx.state(half.transformer)).items():
        sensitive = ("time_", "scale_shift_table", "norm", "lora_")
        wide = any(part in name for part in sensitive) or name.startswith("proj_out")
        assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), name
        if name in exact:
            np.testing.assert_array_equal(leaf, np.asarray(exact[name]).astype(leaf.dtype))
    assert {leaf.dtype for leaf in rules.leaves(nnx.state(half.vae)).values()} == {
        np.dtype(np.float32)
    }
    arrays = golden("vace_original_tiny")
    error = relative_error(run(half.transformer, arrays), run(pipe.transformer, arrays))
    assert 1e-4 < error < 3e-2


def test_weights_stored_in_bfloat16_are_read_into_float32(pipe, tmp_path):
    shutil.copytree(TINY / "text_encoder", tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = {
        name: np.asarray(tensor).astype(ml_dtypes.bfloat16)
        for name, tensor in store.open_tensors(file).items()
    }
    store.write_file(file, tensors)
    assert same(
        pipeline.load_text_encoder(tmp_path), pipe.text_encoder
    )  # the golden weights are exact in bfloat16


# ---- the package -----------------------------------------------------------------------------------------------------


def test_the_public_names_are_there():
    assert set(idg.__all__) <= set(dir(idg))
    assert idg.flow.sigmas(4, 3.0).shape == (5,)
    assert callable(idg.flow.sde_step)
    assert callable(idg.flow.timesteps)
    assert callable(idg.grpo.advantages)
    assert callable(idg.rewards.preference.btt_loss)
    with pytest.raises(AttributeError, match="no attribute 'rewrads'"):
        idg.rewrads  # noqa: B018


# ---- bad folders -----------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edit(part: str, **changes):
    def change(folder: Path) -> None:
        file = folder / part
        store.write_json(file, store.read_json(file) | changes)

    return change


def tensors(part: str, change):
    def rewrite(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        values = {name: np.array(tensor) for name, tensor in store.open_file(file)[0].items()}
        change(values)
        store.write_file(file, values)

    return rewrite


def remove(part: str):
    def change(folder: Path) -> None:
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


@pytest.mark.parametrize(
    ("spoil", "where", "what"),
    [
        (truncate, "transformer/diffusion_pytorch_model.safetensors", "tensor "),
        (tensors("vae", lambda t: t.pop("quant_conv.bias")), "vae", "1 missing: quant_conv.bias"),
        (tensors("vae", lambda t: t.update(extra=np.ones(2))), "vae", "1 unexpected: extra"),
        (
            tensors("transformer", lambda t: t["blocks.3.norm2.bias"].fill(np.inf)),
            "transformer",
            "tensor blocks.3.norm2.bias holds NaN",
        ),
        (edit("transformer/config.json", num_layers=3), "transformer", "unexpected: blocks.3"),
        (edit("transformer/config.json", ffn_dim=64), "transformer", "[96] instead of [64]"),
        (
            edit("transformer/config.json", image_dim=1280),
            "transformer/config.json",
            "image_dim is 1280",
        ),
        (
            edit("transformer/config.json", vace_layers=[0, 9]),
            "transformer/config.json",
            "vace_layers",
        ),
        (edit("transformer/config.json", num_layers=0), "transformer/config.json", "num_layers"),
        (
            edit("text_encoder/config.json", model_type="t5"),
            "text_encoder/config.json",
            "model_type is 't5'",
        ),
        (
            edit("scheduler/scheduler_config.json", flow_shift=None),
            "scheduler/scheduler_config.json",
            "flow_shift is None",
        ),
        (remove("transformer/config.json"), "transformer/config.json", "cannot be read"),
        (remove("vae/diffusion_pytorch_model.safetensors"), "vae", "holds none"),
        (remove("tokenizer/tokenizer.json"), "tokenizer/tokenizer.json", "cannot be read"),
        (remove("model_index.json"), "", "no model_index.json"),
        (remove("scheduler"), "", "no folder scheduler/"),
    ],
)
def test_a_bad_folder_gets_one_line_that_names_the_file(tmp_path, spoil, where, what):
    folder = shutil.copytree(TINY, tmp_path / "pipe")
    spoil(folder)
    loaders = {  # load_pipeline calls these
        "transformer": pipeline.load_transformer,
        "vae": pipeline.load_vae,
        "text_encoder": pipeline.load_text_encoder,
        "tokenizer": pipeline.load_tokenizer,
    }
    with pytest.raises(UserError) as caught:
        loaders.get(where.partition("/")[0], idg.load_pipeline)(folder)
    line = str(caught.value)
    assert "\n" not in line
    assert str(folder / where) in line
    assert what in line


def test_what_was_asked_for_must_fit(tmp_path):
    with pytest.raises(UserError, match="kind 'phantom' was given"):
        idg.load_pipeline(TINY, kind="phantom")
    with pytest.raises(UserError, match="no such folder"):
        idg.load_pipeline(tmp_path / "nowhere")
    with pytest.raises(UserError, match="float16"):
        idg.load_pipeline(TINY, dtype="float16")
