"""The task `adapter`: training a LoRA on clips and on pairs, its cache, and what it exports."""

import csv
import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jax_idgrpo import config as c
from jax_idgrpo import flow, rng
from jax_idgrpo.data.places import parse_places
from jax_idgrpo.data.prompts import load_prompts
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation import commands
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.preferences import adapter_batches, train_adapter
from jax_idgrpo.preferences.adapter_rows import read_options, read_rows_of
from jax_idgrpo.sampling import conditioning, pipeline
from jax_idgrpo.sampling.adapters import saved_step
from jax_idgrpo.training import setup
from jax_idgrpo.training.adapter_task import WINNERS_WORSE, Fixed, Learner
from jax_idgrpo.training.clip_latents import Encoder
from jax_idgrpo.training.finetune import finetune
from jax_idgrpo.training.identity_loss import LIMIT, IdentityLoss, decoded_rows
from tests.helpers.adapter_runs import (
    adapter_config,
    make_checkpoint,
    write_clips,
    write_csv,
    write_pairs,
)
from tests.helpers.tiny_run import adapter, assert_same_adapter
from tests.helpers.tiny_run import rows as metrics_of

KINDS = ("vace", "phantom")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of drawn clips of 7 frames."""
    folder = tmp_path_factory.mktemp("clips") / "clips"
    write_clips(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny pipeline of every kind."""
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: make_checkpoint(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Folder of encoded clips that the tests share."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, clips, checkpoints, cache):
    """Workdirs of undisturbed runs of four steps."""
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(f"whole-{kind}")
        options = {"clips": str(clips), "cache": cache}
        finetune(adapter_config(checkpoints[kind], kind, options, steps=4), found[kind])
    return found


def prepared(checkpoint, kind, options, folder, batch=2):
    """Return pipeline, learner, configuration, options and encoded rows, without training."""
    config = adapter_config(checkpoint, kind, options, batch=batch)
    pipe, given = setup.load(config), read_options(config.finetune.options)
    rows = adapter_batches.prepare_rows(
        pipe, config, given, read_rows_of(given, config.data.max_people), Path(folder)
    )
    return pipe, Learner.make(pipe.transformer, config, 3.0, rows.grey), config, given, rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_a_whole_one_and_trains_the_adapter(
    kind, clips, checkpoints, cache, whole, tmp_path
):
    options = {"clips": str(clips), "cache": cache}
    for steps in (2, 4):
        finetune(adapter_config(checkpoints[kind], kind, options, steps=steps), tmp_path)
    assert_same_adapter(whole[kind], tmp_path)
    last = metrics_of(whole[kind])[-1]
    assert last["held_out_loss"] != last["held_out_loss_base"]
    assert any(tensor.any() for name, tensor in adapter(tmp_path).items() if "lora_B" in name)


def test_the_base_stays_bitwise_and_only_the_adapter_is_in_the_state(
    clips, checkpoints, cache, tmp_path, monkeypatch
):
    config = adapter_config(checkpoints["vace"], "vace", {"clips": str(clips), "cache": cache})
    task = train_adapter.make(config)
    task.prepare(tmp_path)
    network = task.init(jax.random.key(0))
    _, params, frozen, rest = nnx.split(network, task.trained, task.frozen, ...)
    assert not jax.tree.leaves(rest)
    before = jax.tree.map(np.array, frozen)
    monkeypatch.setattr("jax_idgrpo.training.finetune.make_task", lambda config: task)
    finetune(config, tmp_path)
    after = nnx.state(network, nnx.Not(LoRAParam))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, after))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(tensor.size for tensor in adapter(tmp_path).values()) == count


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent_and_an_adapter_of_zeros_is_the_base(
    kind, clips, checkpoints, cache, tmp_path
):
    given = {"clips": str(clips), "split": "all", "text_dropout": 0, "photo_dropout": 0}
    pipe, learner, config, options, rows = prepared(checkpoints[kind], kind, given, cache)
    one, two, three = (
        next(item[0] for item in rows.items if len(item[0].references) == count)
        for count in (1, 2, 3)
    )
    read = lambda video: adapter_batches.read_row(rows, config, options, video, None)  # noqa: E731
    batch = lambda *videos: jax.tree.map(lambda *x: jnp.stack(x), *map(read, videos))  # noqa: E731
    _, lora, base = nnx.split(pipe.transformer, LoRAParam, ...)
    program = jax.jit(learner.flow_rows)
    key = rng.key(0, "augment")
    first, second = (program(lora, base, batch(two, other), key) for other in (one, three))
    np.testing.assert_allclose(first["loss"][0], second["loss"][0], rtol=1e-6)
    assert abs(first["loss"][1] - second["loss"][1]) > 1e-4
    plain = jax.jit(learner.flow_rows)(None, base, batch(two, three), key)
    np.testing.assert_allclose(second["loss"], plain["loss"], rtol=1e-6)


def test_inputs_are_those_of_sampling(clips, checkpoints, cache):
    """The control and photos of a row equal those that `conditioning.encode` makes of its prompt."""
    for kind in KINDS:
        given = {"clips": str(clips), "split": "all"}
        pipe, learner, config, options, rows = prepared(checkpoints[kind], kind, given, cache)
        prompts = load_prompts(clips / "clips.csv", 3)[:3]
        wanted = conditioning.encode(pipe, prompts, config, conditioning.Cache())
        videos = [item[0] for item in rows.items[:3]]
        read = [adapter_batches.read_row(rows, config, options, video, None) for video in videos]
        _, weight, found = learner.inputs(jax.tree.map(lambda *x: jnp.stack(x), *read))
        # The cache is float16.
        for name in ("text", "control", "frame_mask", "references", "reference_latents"):
            want, have = getattr(wanted, name), getattr(found, name)
            assert (want is None) == (have is None)
            if want is not None:
                np.testing.assert_allclose(np.asarray(have, np.float32), want, atol=6e-3)
        assert (np.asarray(weight) == 0).any() == (kind == "vace")  # the padding has none


def test_boxes_of_people_are_the_control_of_sampling(clips, checkpoints, cache, tmp_path):
    """Rows with places have the control of sampling; the other rows are those of a run without."""
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    with (clips / "clips.csv").open() as file:
        listed = list(csv.DictReader(file))
    count = listed[1]["ref_paths"].count(";") + 1
    still, moving = (";".join([box] * count) for box in ("0 0 .5 1", "0 0 .5 1 > .5 0 1 1"))
    write_csv(
        folder,
        [[*row.values(), still if n == 1 else ""] for n, row in enumerate(listed)],
        (*listed[0], "places"),
    )
    given = {"clips": str(folder), "split": "all"}
    pipe, learner, config, options, rows = prepared(checkpoints["vace"], "vace", given, cache)
    prompts = load_prompts(folder / "clips.csv", 3)[:2]
    wanted = conditioning.encode(pipe, prompts, config, conditioning.Cache()).control
    videos = [item[0] for item in rows.items[:2]]
    read = [adapter_batches.read_row(rows, config, options, video, None) for video in videos]
    _, _, found = learner.inputs(jax.tree.map(lambda *x: jnp.stack(x), *read))
    np.testing.assert_allclose(found.control, wanted, atol=6e-3)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    encoder, video = Encoder.make(pipe, config), folder / "1.mp4"
    windows = [
        encoder.places(video, parse_places({"places": text}, count)).make()
        for text in (still, moving)
    ]
    assert windows[0].shape == windows[1].shape
    np.testing.assert_array_equal(windows[0][0], windows[0][-1])
    assert np.abs(windows[1][0] - windows[1][-1]).max() > 0.1  # a window sees its part of the move

    before = read_rows_of(read_options({"clips": str(clips), "split": "all"}), 3).digests
    after = read_rows_of(options, 3).digests
    assert [a == b for a, b in zip(before, after, strict=True)] == [
        n != 1 for n in range(len(after))
    ]
    phantom = adapter_config(checkpoints["phantom"], "phantom", given)
    with pytest.raises(UserError, match="1.mp4 has places, which are an input of VACE"):
        train_adapter.make(phantom)


def test_dropping_photos_leaves_text_alone(clips, checkpoints, cache):
    for kind in KINDS:
        given = {"clips": str(clips), "split": "all", "photo_dropout": 0.999, "text_dropout": 0}
        _, learner, config, options, rows = prepared(checkpoints[kind], kind, given, cache)
        batch = adapter_batches.make_batch(rows, config, options, 1, 0)
        assert not batch.photos.any()
        assert (batch.people == 0).all() == (kind == "vace")
        _, weight, condition = learner.inputs(jax.tree.map(jnp.asarray, batch))
        if kind == "vace":
            assert (np.asarray(condition.frame_mask).sum(axis=1) == batch.video.shape[1]).all()
            assert (np.asarray(weight[:, : batch.video.shape[1]]) == 1).all()


def test_batches_are_pure_and_draw_photos_and_windows(clips, checkpoints, cache):
    given = {"clips": str(clips), "split": "all"}
    _, _, config, options, rows = prepared(checkpoints["vace"], "vace", given, cache, batch=8)
    batches = [adapter_batches.make_batch(rows, config, options, 3, step) for step in (0, 1, 0)]
    jax.tree.map(np.testing.assert_array_equal, batches[0], batches[2])
    assert not np.array_equal(batches[0].video, batches[1].video)
    video = next(item[0] for item in rows.items if len(item[0].references) == 1)
    seen = {
        tuple(part.tobytes() for part in (row.video, row.photos))
        for n in range(24)
        for row in [
            adapter_batches.read_row(
                rows, config, dataclasses.replace(options, photo_dropout=0.0), video,
                np.random.default_rng(n),
            )
        ]
    }  # fmt: skip
    assert len(seen) == 6  # three windows of a clip with two frames more, two photos


def test_the_cache_is_reused_and_follows_the_content(clips, checkpoints, tmp_path, monkeypatch):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    made = []
    real = Encoder._encode
    monkeypatch.setattr(
        Encoder, "_encode", lambda self, video: made.append(video.shape[1]) or real(self, video)
    )
    given, kept = {"clips": str(folder), "split": "all"}, tmp_path / "latents"

    def run():
        made.clear()
        return prepared(checkpoints["vace"], "vace", given, kept)[4]

    run()
    assert made.count(5) == 8 * 3 + 1  # three windows of each clip, and the grey video
    run()
    assert made == [5]  # the grey video
    shutil.copy(folder / "1.mp4", folder / "0.mp4")
    rows = run()
    assert made == [5]  # the content is known under another name
    names = [rows.names[item[0]].clip for item in rows.items]
    assert names[0] == names[1] != names[2]
    (folder / "0.mp4").write_bytes((folder / "1.mp4").read_bytes() + b"\0")
    rows = run()
    assert made.count(5) == 4
    damaged = kept / f"{rows.names[rows.items[3][0]].clip}.npy"
    damaged.write_bytes(damaged.read_bytes()[:100])
    run()
    assert made.count(5) == 4


def test_the_export_starts_reinforcement_learning_and_sampling(clips, checkpoints, whole, tmp_path):
    export = whole["vace"] / "export"
    config = adapter_config(checkpoints["vace"], "vace", {})
    model = dataclasses.replace(config.model, adapter=str(export))
    pipe = setup.load(dataclasses.replace(config, model=model))
    stored = pipeline.load_pipeline(checkpoints["vace"])
    stored.load_lora(export)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(pipe.transformer, LoRAParam),
        nnx.state(stored.transformer, LoRAParam),
    )
    prompts = tmp_path / "clips" / "clips.csv"
    shutil.copytree(clips, prompts.parent)
    rows = prompts.read_text().splitlines()
    prompts.write_text("\n".join(rows[:2]))
    commands.sample(config, prompts, tmp_path / "base", None)
    commands.sample(config, prompts, tmp_path / "tuned", export)
    videos = [(tmp_path / name / "0000-0.mp4").read_bytes() for name in ("base", "tuned")]
    assert videos[0] != videos[1]


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_starts_at_log_2_and_logs_both_errors(kind, clips, checkpoints, cache, tmp_path):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    pairs = write_pairs(folder, ["A", "same", "B", "invalid"])
    options = {"clips": "", "pairs": str(pairs), "loss": "dpo", "cache": cache}
    config = adapter_config(checkpoints[kind], kind, options)
    grpo = dataclasses.replace(config.grpo, dpo_beta=20.0)
    finetune(dataclasses.replace(config, grpo=grpo), tmp_path / "run")
    first, last = metrics_of(tmp_path / "run")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["winner_error"] == pytest.approx(first["winner_error_base"], rel=1e-6)
    assert last["winner_error"] != last["winner_error_base"]
    assert last["loser_error"] != last["winner_error"]
    given = read_options(config.finetune.options)
    rows = read_rows_of(given, 3)
    assert [[video.path.name for video in pair] for pair in rows.pairs] == [
        ["0.mp4", "1.mp4"],
        ["3.mp4", "2.mp4"],
    ]


# ---- weights in place of an adapter --------------------------------------------------------------


LAYERS = {"vace": "blocks.1,vace_blocks,attn2", "phantom": ""}


def trains_weights(config, layers):
    """The configuration with weights trained."""
    model = dataclasses.replace(config.model, train="full", train_layers=layers)
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_resume_bitwise_and_their_export_is_a_start(
    kind, clips, checkpoints, cache, tmp_path
):
    options = {"clips": str(clips), "cache": cache}
    for folder, lengths in (("whole", [4]), ("resumed", [2, 4])):
        for steps in lengths:
            config = adapter_config(checkpoints[kind], kind, options, steps=steps)
            finetune(trains_weights(config, LAYERS[kind]), tmp_path / folder)
    exports = [tmp_path / folder / "export" for folder in ("whole", "resumed")]
    start, whole, resumed = map(transformer_of, (checkpoints[kind], *exports))
    moved = {name for name, value in whole.items() if not np.array_equal(value, start[name])}
    assert moved == set(
        start
        if kind == "phantom"
        else [
            name
            for name in start
            if name.startswith(("blocks.1.", "vace_blocks.")) or ".attn2." in name
        ]
    )
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    rows = [metrics_of(tmp_path / folder) for folder in ("whole", "resumed")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    assert rows[0][-1]["held_out_loss_base"] == rows[1][-1]["held_out_loss_base"]
    assert rows[0][-1]["held_out_loss"] != rows[0][-1]["held_out_loss_base"]
    model = dataclasses.replace(config.model, path=str(exports[0]))
    tuned = setup.load(dataclasses.replace(config, model=model)).transformer
    base = setup.load(config).transformer
    same = [np.array_equal(*leaves) for leaves in zip(*map(weights_of, (tuned, base)), strict=True)]
    assert not all(same)
    assert saved_step(exports[0]) == 4


def transformer_of(folder):
    """Return the tensors of a checkpoint's transformer."""
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def weights_of(transformer):
    """Return the arrays of a transformer without its adapter."""
    return jax.tree.leaves(nnx.state(transformer, nnx.Not(LoRAParam)))


def test_dpo_of_weights_compares_with_the_weights_before_training(
    clips, checkpoints, cache, tmp_path
):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    pairs = write_pairs(folder, ["A", "B", "A", "B"])
    options = {"clips": "", "pairs": str(pairs), "loss": "dpo", "cache": cache}
    plain = adapter_config(checkpoints["phantom"], "phantom", options)
    plain = dataclasses.replace(plain, grpo=dataclasses.replace(plain.grpo, dpo_beta=20.0))
    config = trains_weights(plain, "")
    finetune(config, tmp_path / "run")
    first, last = metrics_of(tmp_path / "run")
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert last["winner_error"] != pytest.approx(last["winner_error_base"], rel=1e-3)
    # An adapter of zeros has the errors of the base on the same rows and noise.
    task = train_adapter.make(plain)
    task.prepare(tmp_path)
    key = rng.fold(rng.key(plain.run.seed, "augment"), 1)
    network = task.init(rng.key(0, "init"))
    _, scalars = nnx.jit(task.loss)(network, task.batch(plain.run.seed, 1), key)
    for name in ("winner_error_base", "loser_error_base"):
        np.testing.assert_allclose(last[name], scalars[name], rtol=1e-5)


def test_a_run_whose_winners_get_worse_is_ended_with_a_checkpoint(
    clips, checkpoints, cache, tmp_path, monkeypatch
):
    folder = tmp_path / "clips"
    shutil.copytree(clips, folder)
    options = {"clips": "", "pairs": str(write_pairs(folder, ["A"])), "loss": "dpo", "cache": cache}
    config = adapter_config(checkpoints["phantom"], "phantom", options, steps=9)
    run = dataclasses.replace(config.run, save_every=9)
    log = dataclasses.replace(config.finetune, log_every=2)
    config = dataclasses.replace(config, run=run, finetune=log)
    rule = dataclasses.replace(
        WINNERS_WORSE, worse=lambda row: row["winner_error"] != row["winner_error_base"], steps=3
    )
    monkeypatch.setattr(train_adapter, "WINNERS_WORSE", rule)
    with pytest.raises(
        UserError, match=r"in 3 steps in a row, by step 4, the error of the winners"
    ):
        finetune(config, tmp_path / "run")
    assert metrics_of(tmp_path / "run")[-1]["step"] == 3
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()
    assert not (tmp_path / "run" / "export").exists()


def test_winners_count_as_worse_from_a_tenth_above_the_base_for_20_steps():
    def row(ratio):
        return {"winner_error": ratio * 0.3, "winner_error_base": 0.3}

    worse, fine = row(1.11), row(1.09)
    assert WINNERS_WORSE.count([worse] * 19) == 19
    assert WINNERS_WORSE.count([worse] * 19 + [fine, worse]) == 1
    assert WINNERS_WORSE.count([worse], before=19) == 20
    assert WINNERS_WORSE.count([worse, fine, fine], before=19) == 20


# ---- the identity loss ---------------------------------------------------------------------------


def test_the_identity_loss_reaches_the_adapter_and_each_row_alone(clips, checkpoints, cache):
    """Of rows below the limit with photos. The reward here is a function of the latents."""
    given = {"clips": str(clips), "split": "all", "photo_dropout": 0, "text_dropout": 0}
    pipe, learner, config, options, rows = prepared(
        checkpoints["vace"], "vace", given, cache, batch=4
    )

    def score(scale, latents, condition, people):
        assert condition.text.shape[0] == latents.shape[0] == 2  # row 0, and one that may be below
        return 1 - scale * jnp.mean(latents**2, axis=(1, 2, 3, 4))

    learner = dataclasses.replace(learner, shift=1.0, identity=IdentityLoss(2.0, score))

    def batch(*numbers):
        read = [
            adapter_batches.read_row(rows, config, options, rows.items[n][0], None) for n in numbers
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *read)

    _, lora, base = nnx.split(pipe.transformer, LoRAParam, ...)
    program = jax.jit(learner.flow_rows)
    key = next(key for key in map(jax.random.key, range(99)) if second_sigma(key) > LIMIT)
    one, other = (
        program(lora, base, batch(*numbers), key, 3.0) for numbers in ((0, 1, 2, 3), (0, 5, 4, 6))
    )
    assert one["identity_rows"].tolist() == [1, 0, 0, 0]
    assert one["identity_loss"][0] > 0
    assert one["identity_loss"][1:].tolist() == [0, 0, 0]
    np.testing.assert_allclose(one["identity_loss"], other["identity_loss"], rtol=1e-5)
    blank = batch(0, 1, 2, 3)
    blank = dataclasses.replace(blank, photos=jnp.zeros_like(blank.photos))
    assert not program(lora, base, blank, key, 3.0)["identity_rows"].any()

    def loss(lora):
        network = nnx.merge(nnx.graphdef(pipe.transformer), lora, base)
        return learner.flow_loss(network, batch(0, 1, 2, 3), key, Fixed(scorer=3.0))

    (value, means), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(lora)
    alone = jax.jit(jax.grad(lambda lora: loss(lora)[1]["identity_loss"]))(lora)
    assert 0 < float(optax.global_norm(alone)) < float(optax.global_norm(gradient)) * 100
    want = jnp.mean(one["loss"]) + 2 * jnp.mean(one["identity_loss"])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(means["identity_rows"], 0.25)


def second_sigma(key):
    """Noise level of row 1 of 4 at shift 1."""
    return (1 + float(jax.random.uniform(rng.fold(key, 4), (4,))[1])) / 4


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("rows", [1, 2, 7, 16])
def test_all_rows_below_the_limit_are_decoded_and_few_others(rows, shift):
    u = (np.arange(rows) + np.random.default_rng(rows).uniform(size=(200, 1))) / rows
    below = np.asarray(flow.shifted(u, shift)) < LIMIT
    count = decoded_rows(rows, shift)
    assert not below[:, count:].any()
    assert below.sum(axis=1).max() >= count - 1


def test_an_identity_weight_of_0_decodes_nothing(clips, checkpoints, cache, whole, tmp_path):
    options = {"clips": str(clips), "cache": cache, "identity_weight": 0}
    task = train_adapter.make(adapter_config(checkpoints["vace"], "vace", options))
    task.prepare(tmp_path)
    assert task.fixed is None
    assert task.batch(0, 0).faces is None
    assert "identity_loss" not in metrics_of(whole["vace"])[0]


def test_short_clips_are_left_out_and_a_folder_of_them_is_refused(
    clips, checkpoints, cache, tmp_path, capsys
):
    folder = tmp_path / "clips"
    rows = write_clips(folder, count=3, frames=4, seed=9)
    given = {"clips": str(folder), "split": "all", "cache": cache}
    with pytest.raises(
        UserError, match=r"3 of 3 rows have a clip with fewer frames than video\.fr"
    ):
        prepared(checkpoints["vace"], "vace", given, tmp_path / "latents")
    shutil.copy(clips / "0.mp4", folder / "0.mp4")
    write_csv(folder, rows)
    found = prepared(checkpoints["vace"], "vace", given, tmp_path / "latents")[4]
    assert [item[0].path.name for item in found.items] == ["0.mp4"]
    assert "2 of 3 rows" in capsys.readouterr().out


def test_two_experts_are_refused(clips, checkpoints, tmp_path, monkeypatch):
    real = setup.load
    monkeypatch.setattr(
        train_adapter,
        "load",
        lambda *given: (lambda p: dataclasses.replace(p, transformer_2=p.transformer))(
            real(given[0])
        ),
    )
    config = adapter_config(checkpoints["vace"], "vace", {"clips": str(clips)})
    with pytest.raises(UserError, match="has two transformers; the task adapter trains one"):
        finetune(config, tmp_path)


def test_recipe_is_for_the_task():
    config = c.load("adapter", [])
    assert config.finetune.task == "adapter"
    assert read_options(config.finetune.options).loss == "flow"
