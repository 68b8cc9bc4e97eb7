"""Every published layout in and out: recognised by its tensors, every bit kept, killed runs continued, bad files refused."""

import dataclasses
import itertools
import json
import math
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert import (
    adapter,
    checkpoint,
    identify,
    lazy,
    lora,
    pth,
    rules,
    store,
    umt5,
    vae,
    wan,
    writing,
)
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling import pipeline
from tests.helpers.convert import (
    ADAPTER,
    PIPELINE,
    PUBLISHED_VAE,
    TENSORS,
    contents,
    run,
    same_bits,
    vae_shapes,
)
from tests.helpers.layouts import TEXT_FILE, VACE, VAE_FILE, WAN, original, recast
from tests.helpers.paths import GOLDEN

TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
BOUND = 1e-5  # the limit asked of parity is 1e-4


def every_tensor(folder: Path) -> dict[str, bytes]:
    """As `contents`, by part and name, for folders whose files are cut otherwise; .pth files too."""
    found = {}
    for file in [file for file in folder.rglob("*") if file.suffix in (".pth", ".safetensors")]:
        for name, tensor in store.open_file(file)[0].items():
            key = f"{file.parent.relative_to(folder)} {name} {tensor.dtype} {tensor.shape}"
            assert key not in found
            found[key] = np.ascontiguousarray(np.asarray(tensor)).tobytes()
    return found


# ---- every layout, every dtype ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("which", ["wan", "vace"])
def test_the_original_folder_goes_in_and_out_with_every_bit(tmp_path, capsys, which, how):
    source = original(tmp_path, which, how)
    assert run("import", source, tmp_path / "store") == 0
    assert run("export", tmp_path / "store", tmp_path / "out", "--format", "original") == 0
    assert sorted(
        path.name for path in (tmp_path / "out").iterdir() if path.name != "README.md"
    ) == sorted(os.listdir(source))
    assert every_tensor(tmp_path / "out") == every_tensor(source)
    assert store.read_json(tmp_path / "out" / "config.json") == store.read_json(
        source / "config.json"
    )
    tokenizer = "google/umt5-xxl/tokenizer.json"
    assert (tmp_path / "out" / tokenizer).read_bytes() == (source / tokenizer).read_bytes()

    # From there to diffusers, cut into many files, and back: still the same.
    found = checkpoint.open_checkpoint(source)
    writing.write_diffusers(found, tmp_path / "diffusers", "card", shard=100_000)
    assert len(list((tmp_path / "diffusers" / "transformer").glob("*.safetensors"))) > 1
    assert run("verify", tmp_path / "diffusers", tmp_path / "store") == 0
    assert run("export", tmp_path / "diffusers", tmp_path / "again", "--format", "original") == 0
    assert every_tensor(tmp_path / "again") == every_tensor(source)
    capsys.readouterr()
    assert run("inspect", source) == 0
    told = capsys.readouterr().out
    assert f"kind: {which}" in told
    assert "transformer: original layout" in told
    assert "complete: every tensor of the 3" in told


@pytest.mark.parametrize("how", ["float32", "bfloat16", "mixed"])
def test_a_sharded_diffusers_folder_goes_in_and_out_with_every_bit(tmp_path, how):
    source = shutil.copytree(PIPELINE, tmp_path / "source")
    recast(source, how)
    writing.write_diffusers(
        checkpoint.open_checkpoint(source), tmp_path / "sharded", "card", shard=300_000
    )
    assert run("import", tmp_path / "sharded", tmp_path / "store") == 0
    writing.write_diffusers(
        checkpoint.open_checkpoint(tmp_path / "store"), tmp_path / "out", "card", shard=300_000
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "sharded")
    assert every_tensor(tmp_path / "out") == every_tensor(source)
    index = store.read_json(tmp_path / "out" / "transformer" / f"{TRANSFORMER_FILE}.index.json")
    sizes = [lazy.size(tensor) for tensor in store.open_tensors(source / "transformer").values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    for file in {*index["weight_map"].values()}:
        assert (tmp_path / "out" / "transformer" / file).stat().st_size < 300_000 + 30_000


@pytest.mark.parametrize("cut", [False, True], ids=["one .pth", "shards with index"])
@pytest.mark.parametrize("how", ["float32", "bfloat16", "mixed"])
def test_phantom_goes_in_with_the_rest_of_wan_and_out_with_every_bit(tmp_path, capsys, how, cut):
    """One .pth as Phantom 1.3B, with names that no network has, or shards with their index as 14B."""
    base, phantom = original(tmp_path, "wan", how), tmp_path / "phantom"
    phantom.mkdir()
    shutil.copy(
        base / "config.json", phantom
    )  # the tiny model's heads are not 128 wide, which no shape tells
    tensors = {
        name: np.array(tensor)
        for name, tensor in store.open_file(base / TRANSFORMER_FILE)[0].items()
    }
    if cut:
        parts = store.shards(tensors, 100_000)
        files = dict(zip(store.shard_names("Phantom_Wan_14B", len(parts)), parts, strict=True))
        for name, part in files.items():
            store.write_file(phantom / name, part)
        places = {name: file for file, part in files.items() for name in part}
        store.write_json(
            phantom / "Phantom_Wan_14B.safetensors.index.json",
            {"metadata": {}, "weight_map": places},
        )
        file = phantom
    else:
        file = phantom / "Phantom-Wan-1.3B.pth"
        store.write_file(file, tensors | {"ref_proj.weight": np.ones((3, 2), np.float32)})
        with pytest.raises(UserError, match=r"1 unexpected: ref_proj\.weight"):
            run("import", file, tmp_path / "store", "--with", base)
        with pytest.raises(
            UserError, match="has no text_encoder; give the folder that has them with --with"
        ):
            run("import", file, tmp_path / "store", "--as", "phantom", "--with", partial(tmp_path))
    assert run("import", file, tmp_path / "store", "--as", "phantom", "--with", base) == 0
    told = capsys.readouterr().out
    assert ("left out 1 tensors that it does not have: ref_proj.weight" in told) == (not cut)
    assert checkpoint.open_checkpoint(tmp_path / "store").kind == "phantom"
    limit = 100_000 if cut else 10**10
    writing.write_original(
        checkpoint.open_checkpoint(tmp_path / "store"), tmp_path / "out", "card", shard=limit
    )
    again = checkpoint.open_checkpoint(tmp_path / "out", "phantom")
    names = {tensor.file.name for tensor in again.networks["transformer"].tensors.values()}
    assert (
        all(name.startswith("Phantom_Wan_14B-0000") for name in names)
        if cut
        else names == {file.name}
    )
    assert run("verify", tmp_path / "out", tmp_path / "store", "--as", "phantom") == 0
    got = again.networks["transformer"].tensors
    assert set(got) == set(tensors)
    assert all(same_bits(np.asarray(got[name]), tensors[name]) for name in tensors)


def partial(tmp_path: Path) -> Path:
    """The original folder without its text encoder."""
    return shutil.copytree(WAN, tmp_path / "partial", ignore=shutil.ignore_patterns(TEXT_FILE))


@pytest.mark.parametrize("how", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize(
    "prefix", [lora.PEFT_PREFIX, lora.DIFFUSERS_PREFIX, ""], ids=["peft", "diffusers", "bare"]
)
def test_adapters_go_in_and_out_with_every_bit(tmp_path, prefix, how):
    source = tmp_path / "some_lora.safetensors"
    tensors = {
        name.removeprefix(lora.PEFT_PREFIX): np.array(t)
        for name, t in store.open_tensors(ADAPTER).items()
    }
    store.write_file(
        source,
        {prefix + name: tensor for name, tensor in tensors.items()},
        {lora.HEADER: json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})},
    )
    recast_adapter(source, how)
    want = {
        name.removeprefix(prefix): tensor for name, tensor in store.open_file(source)[0].items()
    }
    assert run("import", source, tmp_path / "store") == 0
    for form, start in (("peft", lora.PEFT_PREFIX), ("diffusers-lora", lora.DIFFUSERS_PREFIX)):
        assert run("export", tmp_path / "store", tmp_path / form, "--format", form) == 0
        assert run("verify", source, tmp_path / form) == 0
        got = store.open_tensors(tmp_path / form)
        assert set(got) == {start + name for name in want}
        assert all(
            same_bits(np.asarray(got[start + name]), np.asarray(value))
            for name, value in want.items()
        )
        assert adapter.adapter_scale(tmp_path / form) == (4, 8.0)


def recast_adapter(file: Path, how: str) -> None:
    tensors, metadata = store.open_file(file)
    values = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        half = how == "bfloat16" or (how == "mixed" and index % 3 == 1)
        values[name] = np.asarray(tensor).astype(ml_dtypes.bfloat16 if half else np.float32)
    store.write_file(file, values, metadata)


def test_single_files_are_recognised_by_their_tensors_whatever_they_are_called(tmp_path, capsys):
    for name, part in ((VAE_FILE, "vae"), (TEXT_FILE, "text_encoder")):
        file = shutil.copy(WAN / name, tmp_path / f"{part}.bin")
        assert run("inspect", file) == 0
        assert f"{part}: original layout" in capsys.readouterr().out
        assert run("import", file, tmp_path / part) == 0
        assert run("export", tmp_path / part, tmp_path / f"{part}-out", "--format", "original") == 0
        assert run("verify", tmp_path / f"{part}-out", WAN / name) == 0
        assert (
            run("export", tmp_path / part, tmp_path / f"{part}-diffusers", "--format", "diffusers")
            == 0
        )
        assert run("verify", tmp_path / f"{part}-diffusers", WAN / name) == 0
    published = {f"moved/{n}": t for n, t in store.open_file(WAN / VAE_FILE)[0].items()}
    store.write_file(tmp_path / "other.safetensors", published)
    with pytest.raises(UserError, match=r"other\.safetensors: its tensors .* are of no network"):
        run("inspect", tmp_path / "other.safetensors")


def test_the_whole_encoder_and_decoder_of_umt5_serves_as_text_encoder(tmp_path, capsys):
    folder = shutil.copytree(PIPELINE / "text_encoder", tmp_path / "umt5")
    file = folder / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in store.open_file(file)[0].items()}
    half = {
        "decoder.final_layer_norm.weight": np.ones(32, np.float32),
        "lm_head.weight": np.ones((64, 32), np.float32),
    }
    store.write_file(file, tensors | half)
    values = store.read_json(folder / "config.json") | {
        "architectures": ["UMT5ForConditionalGeneration"]
    }
    store.write_json(folder / "config.json", values)
    assert run("inspect", folder) == 0
    assert (
        "text_encoder: 2 extra: decoder.final_layer_norm.weight, lm_head.weight"
        in capsys.readouterr().out
    )
    assert run("import", folder, tmp_path / "store") == 0
    assert run("export", tmp_path / "store", tmp_path / "out", "--format", "diffusers") == 0
    assert run("verify", tmp_path / "out", PIPELINE / "text_encoder") == 0
    assert store.read_json(tmp_path / "out" / "config.json")["architectures"] == [
        "UMT5EncoderModel"
    ]


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_vae_table_of_the_original_is_a_bijection(blocks):
    config = dataclasses.replace(PUBLISHED_VAE, num_res_blocks=blocks)
    slots = rules.expand(vae.rules(config, "original"), vae_shapes(config))
    assert len(slots) == len({slot.torch for slot in slots}) == {1: 146, 2: 194}[blocks]
    if blocks == 2:
        assert sum(math.prod(slot.torch_shape) for slot in slots) == 126_892_531
        theirs = {slot.torch for slot in slots}
        diffusers = {slot.torch for slot in rules.expand(vae.rules(config), vae_shapes(config))}
        assert "decoder.upsamples.7.time_conv.weight" in theirs
        assert "decoder.up_blocks.1.upsamplers.0.time_conv.weight" in diffusers
        assert not {name for name in theirs & diffusers if "conv1" not in name}


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_sizes_come_back_from_shapes_alone(layout):
    """On the published sizes, whose files state no sizes: Phantom, the VAE, the text encoder."""

    def shapes(table, state):
        return {
            slot.torch: jax.ShapeDtypeStruct(slot.torch_shape, np.float32)
            for slot in rules.expand(table, state)
        }

    from jax_idgrpo.models.umt5 import umt5_xxl
    from jax_idgrpo.models.wan import vace_1_3b, vace_14b, wan_1_3b, wan_14b
    from tests.helpers.convert import text_shapes, wan_shapes

    for config in (wan_1_3b(), wan_14b(), vace_1_3b(), vace_14b()):
        tensors = shapes(wan.rules(config, layout), wan_shapes(config))
        assert wan.config_from_shapes(tensors, layout) == config
        assert identify.identify(tensors) == ("transformer", layout)
    config = dataclasses.replace(
        PUBLISHED_VAE, latents_mean=vae.LATENTS_MEAN, latents_std=vae.LATENTS_STD
    )
    tensors = shapes(vae.rules(config, layout), vae_shapes(config))
    assert vae.config_from_shapes(tensors, layout) == config
    assert identify.identify(tensors) == (
        "vae",
        layout,
    )
    named = "transformers" if layout == "diffusers" else layout
    tensors = shapes(umt5.rules(umt5_xxl(), named), text_shapes(umt5_xxl()))
    assert umt5.config_from_shapes(tensors, named) == umt5_xxl()
    assert identify.identify(tensors) == (
        "text_encoder",
        named,
    )


# ---- the pipeline reads all of it ------------------------------------------------------------------------------------


def test_the_original_folder_runs_as_the_public_code_does(tmp_path):
    arrays = dict(np.load(GOLDEN / "wan_original_tiny.npz"))
    pipe = pipeline.load_pipeline(WAN)
    assert pipe.kind == "wan"
    assert pipe.shift == 3.0
    got = nnx.jit(lambda model, *inputs: model(*inputs))(
        pipe.transformer, arrays["latents"], arrays["timesteps"], arrays["text"]
    )
    want = arrays["velocity"].reshape(np.shape(got))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < BOUND
    assert (
        pipe.tokenizer("a man smiles")["input_ids"]
        == pipeline.load_tokenizer(PIPELINE)("a man smiles")["input_ids"]
    )
    assert pipeline.load_pipeline(WAN, kind="phantom").shift == 5.0

    published = rules.leaves(nnx.state(pipeline.load_vae(PIPELINE)))
    for name, leaf in rules.leaves(nnx.state(pipe.vae)).items():
        np.testing.assert_array_equal(leaf, published[name])


# ---- the mesh --------------------------------------------------------------------------------------------------------


def test_a_slice_of_a_leaf_reads_that_slice_alone(tmp_path):
    """Two tensors of 4 GB each, holes in the file but for the slice asked for, and NaN beside it."""
    table = rules.linear("blocks.{i}.q", "blocks.{i}.q", bias=False)
    leaf = jax.ShapeDtypeStruct((2, 20_000, 50_000), np.float32)
    header = {
        f"blocks.{i}.q.weight": {
            "dtype": "F32",
            "shape": [50_000, 20_000],
            "data_offsets": [i * 4 * 10**9, (i + 1) * 4 * 10**9],
        }
        for i in range(2)
    }
    text = json.dumps(header).encode()
    file = tmp_path / "holes.safetensors"
    row = np.random.default_rng(0).standard_normal((1, 20_000)).astype(np.float32)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for index, values in ((7, row), (8, row + 1), (9, row * np.nan)):
            target.seek(8 + len(text) + 4 * 10**9 + index * row.nbytes)
            target.write(values.tobytes())
        target.truncate(8 + len(text) + 8 * 10**9)
    slots = rules.expand(table, {"blocks": {"q": {"kernel": leaf}}})
    place = rules.slices(slots, store.open_tensors(file), leaf, "file")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):  # a device with a copy asks again
        got = place((slice(1, 2), slice(None), slice(7, 9)))
    np.testing.assert_array_equal(got[0], np.concatenate([row, row + 1]).T)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    with pytest.raises(rules.ConversionError, match=r"file: tensor blocks\.1\.q\.weight holds NaN"):
        place((slice(1, 2), slice(None), slice(8, 10)))


def test_a_network_on_a_mesh_of_several_devices_equals_one_on_a_single_device(tmp_path):
    script = """
import sys, jax, numpy as np
from flax import nnx
from checkpoints_convert import checkpoint, rules
from checkpoints_convert.network import fill
from jax_idgrpo.config import MeshConfig
from jax_idgrpo.parallel.sharding import make_mesh, state_shardings
network = checkpoint.open_part(sys.argv[1], "transformer")
mesh = make_mesh(MeshConfig(data=2, fsdp=2))
abstract = network.shapes
shardings = state_shardings(mesh, abstract)
target = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings)
filled, plain = fill(network, target), fill(network, abstract)
split = 0
for (path, one), other, sharding in zip(jax.tree_util.tree_leaves_with_path(filled), jax.tree.leaves(plain), jax.tree.leaves(shardings)):
    assert one.sharding == sharding and not other.committed, path
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    split += one.addressable_shards[0].data.size < one.size
assert split > 10
print("same")
"""
    environment = os.environ | {
        "PYTHONPATH": os.getcwd(),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(VACE)], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "same\n", done.stderr


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["float32", "bfloat16"])
def test_merged_weights_are_the_sum_in_float32_stored_as_the_base_is(tmp_path, how):
    base = shutil.copytree(PIPELINE, tmp_path / "base")
    recast(base, how)
    assert (
        run(
            "export",
            ADAPTER,
            tmp_path / "out",
            "--format",
            "merged",
            "--base",
            base,
            "--base-model",
            "me/base",
        )
        == 0
    )
    before, after = (
        store.open_tensors(folder / "transformer") for folder in (base, tmp_path / "out")
    )
    adapter = store.open_tensors(ADAPTER)
    changed = 0
    for name, tensor in before.items():
        low = f"{lora.PEFT_PREFIX}{name.removesuffix('.weight')}.lora_"
        want = np.asarray(tensor)
        if f"{low}A.weight" in adapter:
            a, b = (np.asarray(adapter[f"{low}{part}.weight"]) for part in "AB")
            exact = want.astype(np.float64) + 2.0 * (
                b.astype(np.float64) @ a.astype(np.float64)
            )  # alpha / rank = 8 / 4
            spacing = np.spacing(exact.astype(np.float32)) * (1 if how == "float32" else 2**16)
            assert (
                np.abs(np.asarray(after[name]).astype(np.float64) - exact)
                <= 4 * np.abs(spacing) + 1e-6
            ).all(), name
            changed += 1
        else:
            assert same_bits(np.asarray(after[name]), want), name
        assert after[name].dtype == tensor.dtype
    assert changed == len(adapter) // 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "me/base"' in card
    assert "rank 4, alpha 8, merged in float32" in card
    assert "license:" in card


def test_another_models_adapter_is_not_merged(tmp_path):
    base = original(tmp_path, "wan")
    with pytest.raises(
        UserError,
        match=r"adapter_model\.safetensors on .*: made for a VACE model, this one has no VACE blocks",
    ):
        run("export", ADAPTER, tmp_path / "out", "--format", "merged", "--base", base)
    assert not (tmp_path / "out").exists()


# ---- cards -----------------------------------------------------------------------------------------------------------


def test_the_card_holds_the_runs_configuration_base_and_licence(tmp_path):
    work = tmp_path / "run"
    work.mkdir()
    shutil.copytree(ADAPTER, work / "export")
    configuration = {"model": {"path": str(PIPELINE)}, "rollout": {"group": 7}, "grpo": {"kl": 0.5}}
    store.write_json(work / "config.json", configuration)
    for form in ("peft", "diffusers-lora", "merged"):  # merged finds its base in the configuration
        assert run("export", work, tmp_path / form, "--format", form, "--license", "cc-by-4.0") == 0
        text = (tmp_path / form / "README.md").read_text()
        head = dict(line.split(": ", 1) for line in text.split("---")[1].strip().splitlines())
        assert json.loads(head["license"]) == "cc-by-4.0"
        assert json.loads(head["base_model"]) == str(PIPELINE)
        assert json.loads(text.split("```json\n")[1].split("```")[0]) == configuration
    assert store.read_json(tmp_path / "peft" / "adapter_config.json")[
        "base_model_name_or_path"
    ] == str(PIPELINE)


# ---- .pth files ------------------------------------------------------------------------------------------------------


def test_pth_files_keep_bits_dtypes_and_order(tmp_path):
    store.write_file(tmp_path / "x.pth", TENSORS)
    tensors, _ = store.open_file(tmp_path / "x.pth")
    assert list(tensors) == list(TENSORS)
    assert all(same_bits(np.asarray(tensors[name]), value) for name, value in TENSORS.items())
    assert all(tensor.offset % pth.ALIGNMENT == 0 for tensor in tensors.values())


def archive(path: Path, data: bytes, storages: dict[str, bytes], compress: bool = False) -> Path:
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    ) as file:
        file.writestr("w/data.pkl", data)
        for key, value in storages.items():
            file.writestr(f"w/data/{key}", value)
    return path


class Runs:
    """Pickled, it asks for a command to be run."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["value", "bare pickle", "nested"])
def test_code_in_a_pickle_does_not_run(tmp_path, where):
    evil = Runs(f"touch {tmp_path}/ran")
    data = pickle.dumps(
        {"w": evil, "more": [evil]} if where == "nested" else {"w": evil}, protocol=2
    )
    file = tmp_path / "w.pth"
    if where == "bare pickle":
        file.write_bytes(data)
    else:
        archive(file, data, {})
    with pytest.raises(
        UserError, match=r"w\.pth: its pickle asks for (posix|nt)\.system, which no weights need"
    ) as caught:
        run("inspect", file)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def described(
    shape: bytes, offset: int = 0, storage: bytes = b"FloatStorage", after: bytes = b""
) -> bytes:
    """The pickle of one tensor w in storage 0. shape: opcodes of shape and strides. after: opcodes on the tensor."""
    pid = (
        b"(X\x07\x00\x00\x00storagectorch\n"
        + storage
        + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    )
    number = b"J" + struct.pack("<i", offset)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + number + shape + b"\x89}tR" + after
    return b"\x80\x02}(X\x01\x00\x00\x00w" + tensor + b"u."


FOUR = b"(K\x04t(K\x01t"  # shape (4,), strides (1,)


def test_the_forged_pickles_below_would_be_fine_without_what_is_forged(tmp_path):
    values = np.arange(4, dtype=np.float32)
    tensors, _ = store.open_file(
        archive(tmp_path / "w.pth", described(FOUR), {"0": values.tobytes()})
    )
    np.testing.assert_array_equal(np.asarray(tensors["w"]), values)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (described(b"(K\x05t(K\x01t"), r"tensor w of shape \[5\] ends at byte"),
        (described(b"(K\x04t(K\xfft"), r"tensor w of shape \[4\] ends at byte"),
        (described(FOUR, offset=1), "tensor w of shape"),
        (described(FOUR, offset=-1), "tensor w is not described by plain numbers"),
        (
            described(b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft(J\xff\xff\xff\x7fK\x01t"),
            "ends at byte",
        ),
        (described(b"(K\x04t(K\x01K\x01t"), "not described by plain numbers"),
        (described(b"(\x88t(K\x01t"), "not described by plain numbers"),
        (described(FOUR, storage=b"QuantizedStorage"), r"asks for torch\.QuantizedStorage"),
        (
            described(FOUR, after=b"}X\x06\x00\x00\x00offsetX\x01\x00\x00\x00xsb"),
            "not described by plain numbers",
        ),
        (
            b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
            None,
        ),  # attributes of the mapping do nothing
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
            "no readable pickle",
        ),
        (b"\x80\x02]K\x01a.", "holds a list, not a mapping"),
        (b"\x80\x02}X\x01\x00\x00\x00wK\x01s.", "its entry 'w' is a int, not a tensor"),
        (b"\x80\x02}X\x01\x00\x00\x00w", "no readable pickle"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", r"asks for builtins\.eval"),
        (b"\x80\x02X\x09\x00\x00\x00somewhereQ.", "asks for the object 'somewhere'"),
    ],
)
def test_forged_pickles_are_refused(tmp_path, data, match):
    file = archive(tmp_path / "w.pth", data, {"0": np.arange(4, dtype=np.float32).tobytes()})
    if match is None:
        assert store.open_file(file) == ({}, {})
        return
    with pytest.raises(UserError, match=match) as caught:
        store.open_file(file)
    assert "w.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_archives_are_refused(tmp_path):
    whole = (WAN / TEXT_FILE).read_bytes()
    for name, data in {
        "cut": whole[: len(whole) // 2],
        "short": whole[:3],
        "none": b"",
        "zeros": bytes(1000),
    }.items():
        (tmp_path / f"{name}.pth").write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}\.pth"):
            store.open_file(tmp_path / f"{name}.pth")
    compressed = archive(
        tmp_path / "deflated.pth", described(FOUR), {"0": bytes(16)}, compress=True
    )
    with pytest.raises(UserError, match="data/0 is compressed"):
        store.open_file(compressed)
    with pytest.raises(UserError, match="has no entry data/0"):
        store.open_file(archive(tmp_path / "absent.pth", described(FOUR), {}))


# ---- bad input to the command ----------------------------------------------------------------------------------------


def change(file: str, edit):
    def spoil(folder: Path) -> None:
        tensors = {
            name: np.array(tensor) for name, tensor in store.open_file(folder / file)[0].items()
        }
        edit(tensors)
        store.write_file(folder / file, tensors)

    return spoil


def cut(folder: Path) -> None:
    file = folder / VAE_FILE
    file.write_bytes(file.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (cut, r"Wan2\.1_VAE\.pth"),
        (
            change(VAE_FILE, lambda t: t.pop("conv1.bias")),
            r"Wan2\.1_VAE\.pth: .* 1 missing: conv1\.bias",
        ),
        (
            change(TRANSFORMER_FILE, lambda t: t.update(odd=np.ones(1))),
            r"safetensors: .* 1 unexpected: odd",
        ),
        (
            change(TRANSFORMER_FILE, lambda t: t.update({"head.head.bias": np.ones(3)})),
            r"mis-shaped: head\.head\.bias \[3\] instead of \[64\]",
        ),
        (
            change(
                TRANSFORMER_FILE,
                lambda t: t["blocks.1.self_attn.q.weight"].__setitem__((3, 2), np.nan),
            ),
            r"diffusion_pytorch_model\.safetensors: tensor blocks\.1\.self_attn\.q\.weight holds NaN",
        ),
        (
            change(TEXT_FILE, lambda t: t["token_embedding.weight"].__setitem__((63, 31), -np.inf)),
            r"enc-bf16\.pth: tensor token_embedding\.weight holds NaN or infinite",
        ),
        (
            lambda folder: shutil.copy(folder / VAE_FILE, folder / "copy.pth"),
            r"holds two of vae, Wan2\.1_VAE\.pth and copy\.pth",
        ),
        (lambda folder: shutil.rmtree(folder / "google"), "has no tokenizer"),
        (
            lambda folder: (folder / VAE_FILE).unlink(),
            "has no vae; give the folder that has them with --with",
        ),
        (
            lambda folder: store.write_json(folder / "config.json", {"dim": 48}),
            r"config\.json: has no 'num_layers'",
        ),
        (lambda folder: store.write_json(folder / "config.json", {"dim": 96}), r"config\.json"),
        (
            lambda folder: (folder / "config.json").unlink(),
            r"width 48 is no multiple of 128; put the config\.json",
        ),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, spoil, match):
    source = shutil.copytree(WAN, tmp_path / "source")
    spoil(source)
    with pytest.raises(UserError, match=match) as caught:
        run("import", source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "source", [WAN, WAN / VAE_FILE, PIPELINE], ids=["original", "one network", "diffusers"]
)
@pytest.mark.parametrize("form", ["original", "diffusers"])
def test_a_folder_that_is_no_checkpoint_is_not_replaced_by_one(tmp_path, source, form):
    """A project or the workdir of a run: it has a README.md and a config.json too."""
    for name in ("README.md", "config.json", "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="holds something else"):
        run("export", source, tmp_path, "--format", form)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "metrics.jsonl",
    ]
    assert run("export", source, tmp_path / "out", "--format", form) == 0
    assert run("export", source, tmp_path / "out", "--format", form) == 0  # but a checkpoint is
    assert run("verify", source, tmp_path / "out") == 0


def test_no_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    with pytest.raises(
        UserError,
        match=r"out: needs [\d,]+ bytes, 500,000 are free, not enough for vae/parameters\.safetensors",
    ):
        run("import", WAN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_one_line_that_names_tensor_and_file(tmp_path):
    """A limit on the size of files stands for a full disk: the write fails in the middle."""
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "sys.argv[1:] = ['import', sys.argv[1], sys.argv[2]]\n"
        "from checkpoints_convert.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(WAN), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "parameters.safetensors: cannot be written after tensor " in done.stderr
    assert "free space" in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- killed ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from checkpoints_convert import checkpoint, compare, lazy, store, writing

source, destination = Path(sys.argv[1]), Path(sys.argv[2])
original = os.fsync, Path.rename, Path.replace
checkpoint.open_checkpoint(source)  # shapes are kept for the children


def convert(moment):
    '''One conversion in a child that is killed at its `moment`-th step (None: never); -> whether it was.'''
    child = os.fork()
    if child == 0:
        steps = 0

        def step():
            nonlocal steps
            if steps == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            steps += 1

        def counted(function):
            def call(*arguments, **keywords):
                step()
                result = function(*arguments, **keywords)
                step()
                return result
            return call

        os.fsync, Path.rename, Path.replace = (counted(function) for function in original)
        chunks = lazy.iter_chunks
        lazy.iter_chunks = lambda *arguments: (counted(lambda chunk: chunk)(chunk) for chunk in chunks(*arguments))
        status = 1
        try:
            writing.write_diffusers(checkpoint.open_checkpoint(source), destination, "card", shard=200_000)
            (source / "steps").write_text(str(steps))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


def whole():
    return not list(compare.differences(checkpoint.open_checkpoint(source).networks, checkpoint.open_checkpoint(destination).networks))


assert not convert(None) and whole()
steps = int((source / "steps").read_text())
moments = sorted({0, 1, *range(2, steps, steps // 7), *range(steps - 4, steps)})  # the last ones are around the final rename
for moment in moments:
    assert convert(moment), moment
    if destination.exists():
        assert whole(), moment
    assert not convert(None) and whole(), moment
    left = sorted(path.name for path in destination.parent.iterdir())
    assert left == [destination.name], left
    if moment % 2:  # every other one replaces what is there
        shutil.rmtree(destination)
print("killed", len(moments))
"""


def test_killed_at_any_moment_the_destination_is_absent_or_whole_and_a_second_run_completes_it(
    tmp_path,
):
    """Real processes, killed with SIGKILL around every flush and rename and in the middle of files."""
    source = shutil.copytree(PIPELINE, tmp_path / "source")
    (tmp_path / "place").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(tmp_path / "place" / "out")],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("killed 1"), (done.stdout, done.stderr)


def test_a_second_run_keeps_the_files_that_the_first_had_finished(tmp_path, monkeypatch):
    found = checkpoint.open_checkpoint(PIPELINE)
    write_file, written = store.write_file, []

    def stop(path, *arguments, **keywords):
        if len(written) == 4:
            raise KeyboardInterrupt
        write_file(path, *arguments, **keywords)
        written.append(f"{path.parent.name}/{path.name}")

    monkeypatch.setattr(store, "write_file", stop)
    with pytest.raises(KeyboardInterrupt):
        writing.write_diffusers(found, tmp_path / "out", "card", shard=200_000)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    first, watched = list(written), []
    written.append("go on")

    def watch(total, done):
        watched.append((total, done))
        return writing.no_bar(total, done)

    def note(path, *arguments, **keywords):
        written.append(f"{path.parent.name}/{path.name}")
        write_file(path, *arguments, **keywords)

    monkeypatch.setattr(store, "write_file", note)
    writing.write_diffusers(found, tmp_path / "out", "card", watch, shard=200_000)
    assert not set(first) & set(written[5:])
    assert 0 < watched[0][1] < watched[0][0]
    assert every_tensor(tmp_path / "out") == every_tensor(PIPELINE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_the_same_place(tmp_path):
    with store.resumable(tmp_path / "out", "x", {}) as new:
        with (
            pytest.raises(UserError, match="another process is writing it"),
            store.resumable(tmp_path / "out", "x", {}),
        ):
            pass
        (new / "x").write_text("first")
    assert (tmp_path / "out" / "x").read_text() == "first"


def test_the_progress_bar_counts_every_byte(tmp_path):
    counts = []

    def watch(total, done):
        counts.append(total)
        return writing.nullcontext(lambda name, count: counts.append(-count))

    writing.write_store(checkpoint.open_checkpoint(WAN), tmp_path / "out", watch)
    assert counts[0] > 0
    assert sum(counts) == 0


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (300, 700), (3, 5, 7, 2), (1, 4)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_pieces_are_the_values_in_row_major_order(monkeypatch, shape, dtype):
    monkeypatch.setattr(lazy, "CHUNK", 1 << 15)
    values = np.asarray(np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
    for array in (values, np.asarray(values.T)):
        parts = list(lazy.iter_chunks(array))
        assert b"".join(part.tobytes() for part in parts) == array.tobytes()
        assert all(part.flags.c_contiguous for part in parts)
    assert values.size < 1000 or len(parts) > 1


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_value_that_is_no_number_is_found(dtype):
    values = np.asarray(
        [
            0.0,
            -0.0,
            1.0,
            -2.5,
            *np.asarray([float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).tiny)]),
        ],
        dtype,
    )
    assert lazy.finite(values)
    assert lazy.finite(np.arange(3))
    assert lazy.finite(values[:0])
    for bad, index in itertools.product((np.nan, np.inf, -np.inf), range(len(values))):
        spoilt = values.copy()
        spoilt[index] = bad
        assert not lazy.finite(spoilt)
