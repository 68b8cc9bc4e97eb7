"""LoRA files of every program mean what their writers mean, and go out in the forms they load."""

import json
import math
import re

import numpy as np
import pytest

from checkpoints_convert import adapter, checkpoint, lora, lora_names, rules, store, wan
from checkpoints_convert.lora import Scale
from checkpoints_convert.lora_names import DIFFUSERS, ORIGINAL, OURS
from checkpoints_convert.network import ours
from jax_idgrpo.errors import UserError
from jax_idgrpo.sampling import adapters
from tests.helpers.convert import ADAPTER, PIPELINE, run, same_bits

CONFIG = checkpoint.open_part(PIPELINE, "transformer").config


def random_lora(choose=lambda layer: True, seed=0):
    """A, B in torch's layout and alpha for chosen linear layers, of ranks 1 to 4."""
    rng = np.random.default_rng(seed)
    made = {}
    for number, layer in enumerate(filter(choose, lora_names.layers(CONFIG))):
        inputs, outputs = lora_names.shape(layer, CONFIG)
        rank = 1 + number % 4
        a, b = rng.standard_normal((rank, inputs)), rng.standard_normal((outputs, rank))
        made[layer] = a.astype(np.float32), b.astype(np.float32), float(1 + number % 5)
    return made


def scales_of(made, alpha=lambda rank, alpha: alpha):
    return {layer: Scale(len(a), alpha(len(a), value)) for layer, (a, _, value) in made.items()}


def named(made, prefix, column, a=".lora_A.weight", b=".lora_B.weight", alpha="", flat=False):
    """The tensors of a file; `flat` writes dots of layers as `_`, "half" only those of the stack."""
    tensors = {}
    for layer, (down, up, value) in made.items():
        name = layer.spelled(column)
        if flat == "half":
            name = name.replace(".", "_", 1)
        elif flat:
            name = name.replace(".", "_")
        tensors |= {f"{prefix}{name}{a}": down, f"{prefix}{name}{b}": up}
        if alpha:
            tensors[f"{prefix}{name}{alpha}"] = np.float32(value).reshape(())
    return tensors


def peft_config(made, **changes):
    """The config that peft writes for mixed ranks and alphas."""
    spelled = {layer.spelled(DIFFUSERS): value for layer, value in made.items()}
    exact = {name if "." in name else f"^{name}": value for name, value in spelled.items()}
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {name: len(a) for name, (a, _, _) in exact.items() if len(a) != 2},
        "alpha_pattern": {name: value for name, (_, _, value) in exact.items() if value != 3},
        "target_modules": list(spelled),
        **changes,
    }


def write(folder, tensors, config=None, header=None, name="some_lora.safetensors"):
    """Write a file, and the folder's adapter_config.json; return what a user passes."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".bin"):
        store.write_file(folder / "w.pth", tensors)
        (folder / "w.pth").rename(folder / name)
    else:
        store.write_file(folder / name, tensors, header)
    if config is not None:
        store.write_json(folder / "adapter_config.json", config)
    return folder if config is not None else folder / name


PEFT, KOHYA = "base_model.model.", dict(a=".lora_down.weight", b=".lora_up.weight", alpha=".alpha")
HEADER = "lora_adapter_metadata"


def rank_of(rank, _):
    return float(rank)


def with_text_encoder(made):
    te = {f"text_encoder.q_proj.lora_{part}.weight": np.ones((2, 2), np.float32) for part in "AB"}
    return named(made, "transformer.", DIFFUSERS) | te


# How a program writes a LoRA: folder, LoRA -> what the user has; and what alpha it then has.
WRITERS = {
    "peft with patterns": (
        lambda f, m: write(
            f, named(m, PEFT, DIFFUSERS), peft_config(m), name="adapter_model.safetensors"
        ),
        lambda rank, alpha: alpha,
    ),
    "peft with rsLoRA": (
        lambda f, m: write(f, named(m, PEFT, DIFFUSERS), peft_config(m, use_rslora=True)),
        lambda rank, alpha: alpha * math.sqrt(rank),
    ),
    "older peft": (
        lambda f, m: write(f, named(m, PEFT, DIFFUSERS), peft_config(m), name="adapter_model.bin"),
        lambda rank, alpha: alpha,
    ),
    "peft with an adapter's name": (
        lambda f, m: write(
            f,
            named(m, PEFT, DIFFUSERS, ".lora_A.style.weight", ".lora_B.style.weight"),
            peft_config(m),
        ),
        lambda rank, alpha: alpha,
    ),
    "diffusers": (
        lambda f, m: write(
            f,
            named(m, "transformer.", DIFFUSERS),
            header={HEADER: json.dumps({f"transformer.{k}": v for k, v in peft_config(m).items()})},
        ),
        lambda rank, alpha: alpha,
    ),
    "diffusers without alpha": (
        lambda f, m: write(f, named(m, "transformer.", DIFFUSERS)),
        rank_of,
    ),
    "diffusers with alpha tensors": (
        lambda f, m: write(f, named(m, "transformer.", DIFFUSERS, alpha=".alpha")),
        lambda rank, alpha: alpha,
    ),
    "diffusers with a text encoder": (lambda f, m: write(f, with_text_encoder(m)), rank_of),
    "ComfyUI with A and B": (
        lambda f, m: write(f, named(m, "diffusion_model.", ORIGINAL)),
        rank_of,
    ),
    "ComfyUI with down, up and alpha": (
        lambda f, m: write(f, named(m, "diffusion_model.", ORIGINAL, **KOHYA)),
        lambda rank, alpha: alpha,
    ),
    "musubi-tuner": (
        lambda f, m: write(
            f,
            named(m, "lora_unet_", ORIGINAL, flat=True, **KOHYA),
            header={"ss_network_alpha": "7.0", "ss_network_dim": "Dynamic"},
        ),
        lambda rank, alpha: alpha,
    ),
    "half dotted": (
        lambda f, m: write(f, named(m, "lora_unet_", ORIGINAL, flat="half", **KOHYA)),
        lambda rank, alpha: alpha,
    ),
    "kohya without alpha": (
        lambda f, m: write(
            f, named(m, "lora_unet_", ORIGINAL, flat=True, **(KOHYA | {"alpha": ""}))
        ),
        rank_of,
    ),
    "VideoX-Fun": (
        lambda f, m: write(f, named(m, "lora_unet__", ORIGINAL, flat=True, **KOHYA)),
        lambda rank, alpha: alpha,
    ),
    "DiffSynth-Studio": (
        lambda f, m: write(
            f, named(m, "", ORIGINAL, ".lora_A.default.weight", ".lora_B.default.weight")
        ),
        rank_of,
    ),
    "DiffSynth-Studio without a name": (lambda f, m: write(f, named(m, "", ORIGINAL)), rank_of),
    "our names": (lambda f, m: write(f, named(m, "", OURS)), rank_of),
}
SUBSETS = {
    "all linear layers": lambda layer: True,
    "q, k and v": lambda layer: layer.leaf.endswith(("to_q", "to_k", "to_v")),
    "main blocks": lambda layer: layer.leaf.startswith("blocks.") and "attn" in layer.leaf,
}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("writer", WRITERS)
def test_every_dialect_is_read_with_every_bit_and_every_alpha(tmp_path, writer, subset):
    made, (program, alpha) = random_lora(SUBSETS[subset]), WRITERS[writer]
    source = program(tmp_path / "x", made)
    assert run("import", source, tmp_path / "peft") == 0
    for place in (source, tmp_path / "peft"):
        network = adapter.open_adapter(place)
        found = network.config
        assert found.keys() == made.keys()
        for layer, scale in scales_of(made, alpha).items():
            assert found[layer].rank == scale.rank
            assert found[layer].alpha == pytest.approx(scale.alpha, rel=1e-15)
        arrays = ours(network)
        for layer, (a, b, _) in made.items():
            assert same_bits(np.asarray(arrays[f"{layer.name}.lora_a"]), a.T)
            assert same_bits(np.asarray(arrays[f"{layer.name}.lora_b"]), b.T)


@pytest.mark.parametrize("form", ["peft", "diffusers-lora", "comfyui", "kohya"])
def test_every_format_goes_round_with_every_bit(tmp_path, form):
    source = WRITERS["peft with patterns"][0](tmp_path / "x", random_lora())
    assert run("export", source, tmp_path / form, "--format", form) == 0
    assert run("verify", source, tmp_path / form) == 0
    assert run("export", tmp_path / form, tmp_path / "back", "--format", "peft") == 0
    assert run("verify", source, tmp_path / "back") == 0
    assert run("export", ADAPTER, tmp_path / "uniform", "--format", form) == 0
    assert run("verify", ADAPTER, tmp_path / "uniform") == 0


# ---- ComfyUI -----------------------------------------------------------------------------------------

# Written from comfy/lora.py and comfy/weight_adapter/lora.py: the keys of a weight W of the model
# `diffusion_model.W.weight`, the pairs (up, down) that are looked for, and the scale.
COMFYUI_KEYS = (
    lambda name: f"diffusion_model.{name}",
    lambda name: f"lora_unet_{name.replace('.', '_')}",
)
COMFYUI_PAIRS = (
    ("{}.lora_up.weight", "{}.lora_down.weight"),
    ("{}_lora.up.weight", "{}_lora.down.weight"),
    ("{}.lora_B.weight", "{}.lora_A.weight"),
    ("{}.lora.up.weight", "{}.lora.down.weight"),
    ("{}.lora_B", "{}.lora_A"),
    ("{}.lora_linear_layer.up.weight", "{}.lora_linear_layer.down.weight"),
    ("{}.lora_B.default.weight", "{}.lora_A.default.weight"),
)


def loaded_by_comfyui(tensors, weights):
    """The changes of the model's weights by name, and the keys that are not loaded."""
    changes, used = {}, set()
    for weight in weights:
        for key in (spell(weight) for spell in COMFYUI_KEYS):
            alpha = tensors.get(f"{key}.alpha")
            used |= {f"{key}.alpha"} & tensors.keys()
            for up, down in ((u.format(key), d.format(key)) for u, d in COMFYUI_PAIRS):
                if up in tensors:
                    b, a = tensors[up], tensors[down]
                    scale = 1.0 if alpha is None else float(alpha) / len(a)
                    changes[weight] = scale * (b @ a)
                    used |= {up, down}
                    break
    return changes, set(tensors) - used


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_comfyui_loads_the_exports_wholly(tmp_path, form):
    made = random_lora()
    source = WRITERS["peft with patterns"][0](tmp_path / "x", made)
    assert run("export", source, tmp_path / "anna", "--format", form) == 0
    file = tmp_path / "anna" / "anna.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in store.open_tensors(file).items()}
    weights = {rule.torch for rule in wan.rules(CONFIG, "original") if rule.jax.endswith("kernel")}
    names = {
        name.replace("{i}", str(i)).removesuffix(".weight")
        for name in weights
        for i in range(CONFIG.num_layers)
    }
    changes, unloaded = loaded_by_comfyui(tensors, names)
    assert not unloaded
    assert any(name.startswith("vace_blocks.1.") for name in changes)
    assert changes.keys() == {layer.spelled(ORIGINAL) for layer in made}
    for layer, (a, b, alpha) in made.items():
        np.testing.assert_allclose(
            changes[layer.spelled(ORIGINAL)], alpha / len(a) * (b @ a), rtol=1e-6, atol=1e-6
        )


# ---- merging -----------------------------------------------------------------------------------------


def kernels(path):
    """The transformer's parameters by our names, in torch's layout."""
    network = checkpoint.open_checkpoint(path).networks["transformer"]
    return {
        slot.name: slot.op.invert(slot.op.apply(np.array(tensor)))
        for slot, tensor in network.matched()
    }


def test_merges_add_every_kind_of_change_at_its_strength(tmp_path):
    made = random_lora()
    lora_file = WRITERS["musubi-tuner"][0](tmp_path / "x", made)
    some = list(made)[3:7]
    rng = np.random.default_rng(5)

    def noise(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    base = kernels(PIPELINE)
    diffs = {
        "diffusion_model.blocks.0.norm3.diff": noise(48),
        "diffusion_model.blocks.0.self_attn.q.diff_b": noise(48),
        "diffusion_model.blocks.1.diff_m": noise(1, 6, 48),
        "diffusion_model.patch_embedding.diff": noise(*base["patch_embedding.kernel"].shape),
        "diffusion_model.vace_blocks.1.after_proj.diff": noise(48, 48),
    } | named({layer: made[layer] for layer in some}, "diffusion_model.", ORIGINAL)
    distilled = write(tmp_path / "d", diffs)
    words = ("--merge", f"{lora_file}:0.5", "--merge", distilled)
    assert run("import", PIPELINE, tmp_path / "store", *words) == 0
    want = {name: value.astype(np.float64) for name, value in base.items()}
    for layer, (a, b, alpha) in made.items():
        want[f"{layer.name}.kernel"] += 0.5 * alpha / len(a) * (b @ a)
    for layer in some:
        want[f"{layer.name}.kernel"] += made[layer][1] @ made[layer][0]
    for name, key in (
        ("blocks.0.norm2.scale", "blocks.0.norm3.diff"),
        ("blocks.0.attn1.to_q.bias", "blocks.0.self_attn.q.diff_b"),
        ("blocks.1.scale_shift_table", "blocks.1.diff_m"),
        ("patch_embedding.kernel", "patch_embedding.diff"),
        ("vace_blocks.1.proj_out.kernel", "vace_blocks.1.after_proj.diff"),
    ):
        want[name] += diffs[f"diffusion_model.{key}"]
    got = kernels(tmp_path / "store")
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        changed = not np.array_equal(got[name], base[name])
        touched = not np.array_equal(value, base[name])
        assert changed == touched, name
    record = store.read_json(tmp_path / "store" / "store.json")["merged"]
    assert [line["scale"] for line in record] == [0.5, 1.0]


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("spelling", ["peft", "kohya"])
def test_dora_and_biases_are_merged(tmp_path, spelling, scale):
    made = random_lora(lambda layer: layer.leaf.endswith("attn1.to_q"))
    rng = np.random.default_rng(6)
    magnitudes = {
        layer: (1 + rng.random(len(b))).astype(np.float32) for layer, (_, b, _) in made.items()
    }
    bias = rng.standard_normal(48).astype(np.float32)
    first = next(iter(made))
    if spelling == "peft":
        tensors = named(made, PEFT, DIFFUSERS)
        for layer, m in magnitudes.items():
            tensors[f"{PEFT}{layer.spelled(DIFFUSERS)}.lora_magnitude_vector"] = m
        tensors[f"{PEFT}{first.spelled(DIFFUSERS)}.lora_B.bias"] = bias
        config = peft_config(made, use_dora=True, lora_bias=True)
        source = write(tmp_path / "x", tensors, config)
    else:
        tensors = named(made, "lora_unet_", ORIGINAL, flat=True, **KOHYA)
        for layer, m in magnitudes.items():
            flat = layer.spelled(ORIGINAL).replace(".", "_")
            tensors[f"lora_unet_{flat}.dora_scale"] = m[:, None]
        source = write(tmp_path / "x", tensors)
    with pytest.raises(UserError, match="is a DoRA adapter|use_dora is True") as caught:
        run("import", source, tmp_path / "peft")
    assert "--merge FILE" in str(caught.value)
    assert run("import", PIPELINE, tmp_path / "store", "--merge", f"{source}:{scale}") == 0
    base, got = kernels(PIPELINE), kernels(tmp_path / "store")
    for layer, (a, b, alpha) in made.items():
        w = base[f"{layer.name}.kernel"]
        v = w + alpha / len(a) * (b @ a)
        directed = magnitudes[layer][:, None] * v / np.linalg.norm(v, axis=1, keepdims=True)
        np.testing.assert_allclose(
            got[f"{layer.name}.kernel"], w + scale * (directed - w), rtol=1e-4, atol=1e-5
        )
    if spelling == "peft":
        a, _, alpha = made[first]
        want = base[f"{first.name}.bias"] + scale * alpha / len(a) * bias
        np.testing.assert_allclose(got[f"{first.name}.bias"], want, rtol=1e-5, atol=1e-6)


# ---- bad files ---------------------------------------------------------------------------------------

FIRST = next(iter(random_lora()))
BAD = ("peft with patterns", "diffusers", "ComfyUI with down, up and alpha", "musubi-tuner")
BAD += ("VideoX-Fun", "DiffSynth-Studio")


def spoiled(kind):
    """A LoRA with one fault in its first layer."""
    made = random_lora()
    a, b, alpha = made[FIRST]
    made[FIRST] = {
        "ranks": (np.concatenate([a, a]), b, alpha),
        "nan": (a, np.where(np.arange(b.size).reshape(b.shape) == 5, np.nan, b), alpha),
        "width": (np.concatenate([a, a], axis=1), b, alpha),
        "alpha": (a, b, 0.0),
        "missing": (a, b, alpha),
    }[kind]
    return made


@pytest.mark.parametrize("kind", ["ranks", "nan", "width", "alpha", "missing"])
@pytest.mark.parametrize("writer", BAD)
def test_a_bad_file_is_refused_in_one_line_that_names_the_tensor(tmp_path, writer, kind):
    if kind == "alpha" and WRITERS[writer][1] is rank_of:
        return  # the dialect has no alpha
    source = WRITERS[writer][0](tmp_path / "x", spoiled(kind))
    file = store.weights_file(source)
    tensors = {name: np.array(tensor) for name, tensor in store.open_tensors(file).items()}
    first = r"(^|[._])blocks[._]0[._](attn1\.to_q|self_attn[._]q)\.lora_(A|down)"
    down = next(name for name in tensors if re.search(first, name) and "vace" not in name)
    up = down.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    if kind == "missing":
        header = store.open_weights(file)[1]
        store.write_file(file, {n: v for n, v in tensors.items() if n != up}, header)
    name = {"nan": up}.get(kind, down)
    base = ("--format", "merged", "--base", PIPELINE)
    with pytest.raises(UserError) as caught:
        run("export", source, tmp_path / "out", *base)
    line = str(caught.value)
    assert name in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError) as caught:
        adapters.load_lora_state(source, adapters.lora_config(source, CONFIG))
    assert name in str(caught.value)


def test_the_network_holds_every_block_with_its_rank(tmp_path):
    made = random_lora()
    source = WRITERS["VideoX-Fun"][0](tmp_path / "x", made)
    config = adapters.lora_config(source, CONFIG)
    leaves = rules.leaves(adapters.load_lora_state(source, config))
    assert lora.scales_of(config) == scales_of(made)
    for layer, (a, b, _) in made.items():
        at = () if layer.block is None else (layer.block,)
        left, right = (np.asarray(leaves[f"{layer.leaf}.lora_{part}"][at]) for part in "ab")
        np.testing.assert_array_equal(left[:, : len(a)], a.T)
        np.testing.assert_array_equal(right[: len(a)], b.T)
        assert not left[:, len(a) :].any()
        assert not right[len(a) :].any()
