"""The rule tables are bijections, files survive a round trip bit for bit, and what does not fit is refused in one line."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert import __main__ as command
from checkpoints_convert import adapter, checkpoint, lora, rules, store, umt5, vae, wan
from checkpoints_convert.rules import ConversionError, Op, Rule
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.umt5 import UMT5Config, umt5_xxl
from jax_idgrpo.models.wan import VaceConfig, WanConfig, vace_1_3b, vace_14b, wan_1_3b, wan_14b
from tests.helpers.command import stop_of
from tests.helpers.convert import (
    ADAPTER,
    PIPELINE,
    PUBLISHED_VAE,
    TENSORS,
    contents,
    run,
    same_bits,
    text_shapes,
    vae_shapes,
    wan_shapes,
)
from tests.helpers.paths import GOLDEN

OPS = {name: op for name, op in vars(rules).items() if isinstance(op, Op)} | {
    "PATCH": rules.patch((1, 2, 2))
}
TINY = WanConfig(
    num_layers=3,
    num_heads=2,
    head_dim=6,
    ffn_dim=20,
    text_dim=8,
    freq_dim=16,
    vace=VaceConfig((0, 2)),
)
TINY_TEXT = UMT5Config(vocab_size=11, d_model=8, d_kv=3, num_heads=2, d_ff=10, num_layers=2)


def random_torch(
    table: list[Rule], state, seed: int = 0, dtype=np.float32
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        slot.torch: rng.standard_normal(slot.torch_shape).astype(dtype)
        for slot in rules.expand(table, state)
    }


# ---- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_each_op_has_an_exact_inverse(op):
    shape = tuple(size or 2 + axis for axis, size in enumerate(op.sizes))
    tensor = np.random.default_rng(0).standard_normal(shape)
    ours = op.apply(tensor)
    assert op.torch_shape(ours.shape) == shape
    assert same_bits(op.invert(ours), tensor)


def test_an_op_that_cannot_be_inverted_is_refused():
    with pytest.raises(ValueError, match="told apart"):
        Op((0, 1), (2,), (None, None))


@pytest.mark.parametrize(
    ("table", "shapes", "tensors", "parameters"),
    [
        *(
            pytest.param(
                lambda config=config, layout=layout: wan.rules(config, layout),
                lambda config=config: wan_shapes(config, "bfloat16"),
                *totals,
                id=f"{name} {layout}",
            )
            for name, config, totals in (
                ("vace 1.3B", vace_1_3b(), (1264, 2_153_972_032)),
                ("wan 1.3B", wan_1_3b(), (825, 1_418_996_800)),
                ("vace 14B", vace_14b(), (1331, 17_337_592_896)),
                ("wan 14B", wan_14b(), (1095, 14_288_491_584)),
            )
            for layout in ("diffusers", "original")
        ),
        *(
            pytest.param(
                lambda config=config: lora.rules(config),
                lambda config=config: wan_shapes(config, "bfloat16", LoRAParam),
                *totals,
                id=f"lora {name}",
            )
            for name, config, totals in (
                ("vace 1.3B", vace_1_3b(rank=32, alpha=32.0), (720, 35_389_440)),
                ("vace 14B", vace_14b(rank=32, alpha=32.0), (768, 125_829_120)),
                ("wan 1.3B", wan_1_3b(rank=32, alpha=32.0), (480, 23_592_960)),
                ("wan 14B", wan_14b(rank=32, alpha=32.0), (640, 104_857_600)),
            )
        ),
        *(
            pytest.param(
                lambda layout=layout: umt5.rules(umt5_xxl(), layout),
                lambda: text_shapes(umt5_xxl()),
                242,
                5_680_910_336,
                id=f"umt5-xxl {layout}",
            )
            for layout in ("transformers", "original")
        ),
        pytest.param(
            lambda: vae.rules(PUBLISHED_VAE),
            lambda: vae_shapes(PUBLISHED_VAE),
            194,
            126_892_531,
            id="vae diffusers",
        ),
    ],
)
def test_tables_are_bijections_on_the_published_sizes(table, shapes, tensors, parameters):
    """Counts and totals are those of the published files; `expand` raises on anything that is not one to one."""
    slots = rules.expand(table(), shapes())
    assert (
        len(slots)
        == len({slot.torch for slot in slots})
        == len({slot.name for slot in slots})
        == tensors
    )
    assert sum(int(np.prod(slot.torch_shape)) for slot in slots) == parameters


@pytest.mark.parametrize("change", ["drop", "double", "misname"])
def test_a_table_with_a_fault_is_refused(change):
    table, state = wan.rules(TINY), wan_shapes(TINY)
    row = next(rule for rule in table if rule.torch == "blocks.{i}.attn2.to_k.weight")
    changed = {
        "drop": [rule for rule in table if rule is not row],
        "double": [*table, dataclasses.replace(row, torch="blocks.{i}.attn3.to_k.weight")],
        "misname": [
            dataclasses.replace(rule, torch="blocks.{i}.attn2.to_q.weight") if rule is row else rule
            for rule in table
        ],
    }[change]
    with pytest.raises(ValueError, match=r"attn2\.to_[kq]"):
        rules.expand(changed, state)


def test_round_trip_keeps_every_bit_and_puts_layers_in_order():
    table, state = wan.rules(TINY), wan_shapes(TINY)
    tensors = random_torch(table, state)
    filled = rules.to_jax(table, tensors, state)
    back = rules.to_torch(table, filled)
    assert set(back) == set(tensors)
    assert all(same_bits(back[name], tensors[name]) for name in tensors)
    np.testing.assert_array_equal(
        filled["blocks"]["attn1"]["to_q"]["kernel"][2], tensors["blocks.2.attn1.to_q.weight"].T
    )
    np.testing.assert_array_equal(
        filled["vace_proj_in"]["kernel"], tensors["vace_blocks.0.proj_in.weight"].T
    )


def test_values_take_the_dtype_of_the_network():
    """A mixed file into the bfloat16 policy: the sensitive leaves stay float32."""
    table, state = wan.rules(TINY), wan_shapes(TINY, "bfloat16")
    tensors = random_torch(table, state, dtype=ml_dtypes.bfloat16)
    tensors["scale_shift_table"] = tensors["scale_shift_table"].astype(np.float32) + 1e-4
    filled = rules.to_jax(table, tensors, state)
    assert filled["blocks"]["ffn"]["linear_1"]["kernel"][...].dtype == jnp.bfloat16
    assert filled["blocks"]["norm2"]["scale"][...].dtype == jnp.float32
    np.testing.assert_array_equal(filled["scale_shift_table"][...], tensors["scale_shift_table"][0])


def test_leaves_go_where_their_sharding_says():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        wan_shapes(TINY),
    )
    filled = rules.to_jax(wan.rules(TINY), random_torch(wan.rules(TINY), state), state)
    assert {leaf.sharding for leaf in jax.tree.leaves(filled)} == {sharding}


def test_missing_unexpected_and_misshaped_are_listed_in_one_line():
    table, state = wan.rules(TINY), wan_shapes(TINY)
    tensors = random_torch(table, state)
    tensors["blocks.1.attn1.to_q.renamed"] = tensors.pop("blocks.1.attn1.to_q.weight")
    tensors["blocks.0.ffn.net.2.weight"] = tensors["blocks.0.ffn.net.2.weight"].T
    del tensors["proj_out.bias"]
    with pytest.raises(ConversionError) as caught:
        rules.to_jax(table, tensors, state, "some/file")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("some/file")
    assert "2 missing: " in line
    assert "blocks.1.attn1.to_q.weight" in line
    assert "proj_out.bias" in line
    assert "1 unexpected: blocks.1.attn1.to_q.renamed" in line
    assert "1 mis-shaped: blocks.0.ffn.net.2.weight [20, 12] instead of [12, 20]" in line


def test_values_that_are_no_numbers_are_refused():
    table, state = umt5.rules(TINY_TEXT), text_shapes(TINY_TEXT)
    tensors = random_torch(table, state)
    tensors["encoder.final_layer_norm.weight"][3] = np.nan
    with pytest.raises(ConversionError, match=r"encoder\.final_layer_norm\.weight holds NaN"):
        rules.to_jax(table, tensors, state)


def test_a_tied_embedding_is_read_under_either_name_and_written_under_one():
    table, state = umt5.rules(TINY_TEXT), text_shapes(TINY_TEXT)
    tensors = random_torch(table, state)
    expected = tensors["shared.weight"]
    both = tensors | {umt5.TIED: expected}
    alias = {
        name if name != "shared.weight" else umt5.TIED: value for name, value in tensors.items()
    }
    for variant in (tensors, both, alias):
        filled = rules.to_jax(table, variant, state)
        np.testing.assert_array_equal(filled["embedding"][...], expected)
        assert set(rules.to_torch(table, filled)) == set(tensors)


# ---- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, wan_14b(), vace_1_3b()])
def test_transformer_config_survives_json(config):
    assert wan.config_from_json(json.loads(json.dumps(wan.config_to_json(config)))) == config


def test_text_encoder_config_survives_json():
    assert (
        umt5.config_from_json(json.loads(json.dumps(umt5.config_to_json(TINY_TEXT)))) == TINY_TEXT
    )


@pytest.mark.parametrize(
    "change", [{"image_dim": 1280}, {"qk_norm": "layer_norm"}, {"patch_size": [2, 2, 2]}]
)
def test_another_architecture_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        wan.config_from_json(wan.config_to_json(TINY) | change)


def test_files_keep_bits_dtypes_and_metadata_and_the_library_reads_them(tmp_path):
    from safetensors.numpy import load_file

    store.write_file(tmp_path / "x.safetensors", TENSORS, {"note": "hello"})
    tensors, metadata = store.open_file(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt", "note": "hello"}
    library = load_file(tmp_path / "x.safetensors")
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert tensors[name].shape == value.shape
        assert same_bits(np.asarray(tensors[name]), value)
        assert same_bits(library[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_files_of_the_library_are_read(tmp_path):
    from safetensors.numpy import save_file

    values = TENSORS | {"b": np.ascontiguousarray(TENSORS["b"])}
    save_file(values, tmp_path / "y.safetensors")
    tensors = store.open_tensors(tmp_path)
    assert all(same_bits(np.asarray(tensors[name]), value) for name, value in values.items())


def write_shards(folder: Path) -> dict[str, np.ndarray]:
    tensors = {f"t{k}": np.full((k + 1,), k, np.float32) for k in range(5)}
    files = {name: f"m-0000{1 + k // 3}-of-00002.safetensors" for k, name in enumerate(tensors)}
    for file in set(files.values()):
        store.write_file(
            folder / file, {name: tensors[name] for name in tensors if files[name] == file}
        )
    store.write_json(
        folder / "m.safetensors.index.json", {"metadata": {"total_size": 60}, "weight_map": files}
    )
    return tensors


def test_a_sharded_checkpoint_is_read_through_its_index(tmp_path):
    tensors = write_shards(tmp_path)
    read = store.open_tensors(tmp_path)
    assert set(read) == set(tensors)
    assert all(same_bits(np.asarray(read[name]), tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "file", ["../elsewhere.safetensors", "/etc/passwd", "sub/m.safetensors", ".."]
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, file):
    write_shards(tmp_path)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    index["weight_map"]["t0"] = file
    store.write_json(tmp_path / "m.safetensors.index.json", index)
    with pytest.raises(UserError, match="not a file beside it"):
        store.open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("name", "match"),
    [("t9", "tensor t9 is not in m-00001"), (None, "does not list tensor t0 of m-00001")],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, name, match):
    write_shards(tmp_path)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    file = index["weight_map"].pop("t0")
    if name:
        index["weight_map"] |= {"t0": file, name: file}
    store.write_json(tmp_path / "m.safetensors.index.json", index)
    with pytest.raises(UserError, match=match):
        store.open_tensors(tmp_path)


def damaged(kind: str) -> bytes:
    header = {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    data = bytes(16)
    if kind == "data cut short":
        data = data[:-1]
    elif kind == "data too long":
        data += b"x"
    elif kind == "shape against offsets":
        header["w"]["shape"] = [2, 3]
    elif kind == "negative size":
        header["w"]["shape"] = [-2, -2]
    elif kind == "huge size":
        header["w"] |= {"shape": [2**40], "data_offsets": [0, 2**42]}
    elif kind == "overlap":
        header["v"] = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}
    elif kind == "unknown dtype":
        header["w"]["dtype"] = "F7"
    text = json.dumps(header).encode()
    if kind == "header not json":
        text = b"{" * len(text)
    if kind == "header too long":
        return (10**12).to_bytes(8, "little") + text + data
    return b"" if kind == "empty" else len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "data cut short",
        "data too long",
        "shape against offsets",
        "negative size",
        "huge size",
        "overlap",
        "unknown dtype",
        "header not json",
        "header too long",
    ],
)
def test_damaged_files_are_refused_before_anything_is_read(tmp_path, kind):
    (tmp_path / "w.safetensors").write_bytes(damaged(kind))
    with pytest.raises(UserError) as caught:
        store.open_tensors(tmp_path)
    assert str(tmp_path / "w.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)
    if kind in ("data cut short", "shape against offsets", "negative size", "huge size"):
        assert "tensor w" in str(caught.value)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    store.write_file(tmp_path / "x.safetensors", {"a": TENSORS["a.weight"]})
    before = (tmp_path / "x.safetensors").read_bytes()

    class Broken:
        shape, dtype = (2,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        store.write_file(tmp_path / "x.safetensors", {"a": TENSORS["a.weight"], "z": Broken()})
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    with (
        pytest.raises(UserError, match="holds something else"),
        store.atomic_path(tmp_path, "config.json"),
    ):
        pass
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_a_pipeline_goes_into_the_store_and_out_again_with_every_bit(tmp_path, capsys):
    """With mixed dtypes in one stack, which only a store of slices can keep."""
    source = shutil.copytree(PIPELINE, tmp_path / "source")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    mixed = {name: np.array(tensor) for name, tensor in store.open_file(file)[0].items()}
    for name in [name for name in mixed if name.startswith(("vace_blocks", "blocks.2"))]:
        mixed[name] = mixed[name].astype(ml_dtypes.bfloat16)
    store.write_file(file, mixed)

    assert run("import", source, tmp_path / "store") == 0
    assert run("export", tmp_path / "store", tmp_path / "out", "--format", "diffusers") == 0
    assert contents(tmp_path / "out") == contents(source)
    for path in source.rglob("*.json"):
        assert (tmp_path / "out" / path.relative_to(source)).read_bytes() == path.read_bytes()
    stored = store.open_tensors(tmp_path / "store" / "transformer")
    want = mixed["blocks.2.attn2.to_out.0.weight"]
    assert same_bits(np.asarray(stored["blocks.2.attn2.to_out.kernel"]), want)

    for pair in (("source", "store"), ("store", "out"), ("store", "store")):
        assert run("verify", *(tmp_path / name for name in pair)) == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "store") == 0
    told = capsys.readouterr().out
    assert "kind: vace" in told
    assert "transformer: store layout, 185 tensors" in told
    assert "bfloat16" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "store"]


def test_verify_names_the_first_differences(tmp_path, capsys):
    vae_folder = shutil.copytree(PIPELINE / "vae", tmp_path / "vae")
    file = vae_folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in store.open_file(file)[0].items()}
    tensors["decoder.conv_in.bias"][2] += 1e-3
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"].astype(ml_dtypes.bfloat16)
    store.write_file(file, tensors)
    assert run("verify", PIPELINE / "vae", vae_folder) == 1
    told = capsys.readouterr().out
    assert "vae: decoder.conv_in.bias differs in 1 of 16 values" in told
    assert "vae: encoder.conv_in.bias has dtypes float32 and bfloat16" in told
    assert len(told.splitlines()) == 2


def test_adapters_in_every_spelling_become_peft_directories(tmp_path, capsys):
    tensors = store.open_tensors(ADAPTER)
    header = {lora.HEADER: json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    plain = {name.removeprefix(lora.PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    store.write_file(
        file, {f"transformer.{name}": tensor for name, tensor in plain.items()}, header
    )
    assert run("import", file, tmp_path / "a") == 0
    assert run("export", tmp_path / "a", tmp_path / "b", "--format", "peft") == 0
    assert contents(tmp_path / "b") == contents(ADAPTER)
    assert adapter.adapter_scale(tmp_path / "b") == (4, 8.0)
    for path in (tmp_path / "b", file):
        assert run("verify", ADAPTER, path) == 0
    store.write_file(
        file, {f"transformer.{name}": tensor for name, tensor in plain.items()}
    )  # alpha = rank now
    capsys.readouterr()
    assert run("verify", ADAPTER, file) == 1
    assert "rank and alpha are (4, 8) and (4, 4)" in capsys.readouterr().out


def test_phantom_is_said_at_import_and_remembered(tmp_path):
    source = shutil.copytree(PIPELINE, tmp_path / "source")
    values = store.read_json(source / "transformer" / "config.json")
    values |= {"_class_name": "WanTransformer3DModel", "vace_layers": None}
    store.write_json(source / "transformer" / "config.json", values)
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = {
        name: tensor
        for name, tensor in store.open_file(file)[0].items()
        if not name.startswith("vace")
    }
    store.write_file(file, {name: np.array(tensor) for name, tensor in kept.items()})
    assert run("import", source, tmp_path / "store", "--as", "phantom") == 0
    assert [checkpoint.open_checkpoint(path).kind for path in (tmp_path / "store", source)] == [
        "phantom",
        "wan",
    ]
    with pytest.raises(UserError, match=r"no VACE model but plain Wan .* --as phantom"):
        run("import", source, tmp_path / "other", "--as", "vace")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("inspect", "nowhere"), "does not exist"),
        (("inspect", GOLDEN / "umt5_tiny.npz"), "umt5_tiny.npz"),
        (("inspect", GOLDEN), "give a diffusers folder, original folder, adapter or store"),
        (
            ("export", ADAPTER, "{tmp}/x", "--format", "diffusers"),
            "is an adapter; choose peft or diffusers-lora or comfyui or kohya or merged",
        ),
        (
            ("export", PIPELINE, "{tmp}/x", "--format", "peft"),
            "is a pipeline; choose diffusers or original",
        ),
        (
            ("export", PIPELINE, "{tmp}/x", "--format", "merged"),
            "is a pipeline; choose diffusers or original",
        ),
        (("export", PIPELINE, "{tmp}/x", "--format", "gguf"), "invalid choice: 'gguf'"),
        (("export", ADAPTER, "{tmp}/x", "--format", "merged"), "give it with --base"),
        (
            ("export", ADAPTER, "{tmp}/x", "--format", "peft", "--base", PIPELINE),
            "only --format merged needs it",
        ),
        (("import", PIPELINE / "vae", "{tmp}/x", "--as", "phantom"), "holds no transformer"),
        (("import", ADAPTER, "{tmp}/x", "--as", "phantom"), "is an adapter, which needs none"),
        (("import", PIPELINE, "{tmp}"), "holds something else"),
        (("frobnicate",), "invalid choice"),
        (("export", PIPELINE, "{tmp}/x"), "--format"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(tmp_path, words, match):
    (tmp_path / "note").write_text("keep")
    with pytest.raises(UserError, match=match) as caught:
        run(*(str(word).format(tmp=tmp_path) for word in words))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_mistake_is_one_line_on_standard_error_and_status_2(monkeypatch, capsys):
    stop = stop_of(command.main, monkeypatch, capsys, "idgrpo-convert", "inspect", "nowhere")
    assert stop.status == 2
    assert stop.out == ""
    assert stop.err.startswith("idgrpo-convert: nowhere")
    assert stop.err.count("\n") == 1


def test_an_interrupted_command_says_so_in_one_line(monkeypatch, capsys):
    def interrupt(path, *arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "open_checkpoint", interrupt)
    stop = stop_of(command.main, monkeypatch, capsys, "idgrpo-convert", "inspect", "nowhere")
    assert stop.status == 130
    assert stop.err.count("\n") == 1
