"""The plan: what is counted is what runs, and what cannot be planned says why."""

import dataclasses
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo import config
from jax_idgrpo.cli import run
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.monitor import Watch
from jax_idgrpo.parallel import sharding
from jax_idgrpo.planning import cost_model, hardware, plan, programs
from jax_idgrpo.rewards.planned import HostReward, planned_judge
from jax_idgrpo.rewards.recognition import judge_program
from jax_idgrpo.rewards.vlm.settings import Settings
from jax_idgrpo.training import setup
from tests.helpers.paths import CONFIGS
from tests.helpers.tiny_run import tiny


def loop(x, weights):
    """12 x 3 products of [8,16] by [16,16]; the weights of a turn are sliced from an array of all of them."""

    def turn(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ w), x), None

    return jax.lax.scan(turn, x, weights)[0]


SHAPES = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((12, 16, 16), jnp.float32)


def test_arithmetic_counts_loops_as_often_as_they_run():
    one = 2 * 8 * 16 * 16
    assert cost_model.flops(jax.make_jaxpr(loop)(*SHAPES)) == 36 * one
    gradient = jax.grad(
        lambda x, w: jnp.sum(jax.checkpoint(lambda x: x @ w[0])(x) @ w[1]), argnums=0
    )
    assert cost_model.flops(jax.make_jaxpr(gradient)(*SHAPES)) <= 5 * one
    convolution = jax.make_jaxpr(lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"))(
        jnp.zeros((2, 3, 5, 5)), jnp.zeros((7, 3, 3, 3))
    )
    assert cost_model.flops(convolution) == 2 * (2 * 7 * 5 * 5) * 27
    choice = jax.make_jaxpr(
        lambda p, x, w: jax.lax.cond(p, lambda: x @ w[0], lambda: x @ w[0] @ w[1])
    )(True, *SHAPES)
    assert cost_model.flops(choice) == 2 * one


def test_arithmetic_that_nothing_needs_is_not_counted():
    """As is the gradient of frozen weights, which a traced backward pass holds."""
    twice = jax.make_jaxpr(
        lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), x @ (w + 1)), x, w)
    )
    needed = jax.make_jaxpr(
        lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), x @ (w + 1)), x, w)[0]
    )
    assert (
        cost_model.flops(twice(*SHAPES))
        == 2 * cost_model.flops(needed(*SHAPES))
        == 24 * 2 * 8 * 16 * 16
    )


def test_traffic_counts_loops_as_often_as_they_run_and_slices_as_slices():
    """At least every turn's weights and the state, read and written; far less than reading all weights in every turn."""
    text = jax.jit(loop).lower(*SHAPES).compile().as_text()
    moved = cost_model.traffic(text).moved
    weights, state = 4 * 16 * 16, 4 * 8 * 16
    assert 12 * 3 * (weights + 2 * state) <= moved <= 4 * 12 * 3 * (weights + 2 * state)


def test_collectives_of_a_compiled_line():
    text = """
ENTRY %main.1 (p.0: f32[4,8]) -> f32[4,8] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %all-reduce.1 = f32[4,8]{1,0} all-reduce(%p.0), replica_groups={{0,1}}, to_apply=%add
  %copy.2 = f32[4,8]{1,0:S(1)} copy(%all-reduce.1)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%copy.2), replica_groups={{0,1}}, dimensions={0}
}
"""
    found = cost_model.traffic(text)
    assert found.received == 2 * 128 + 256
    assert found.moved == 2 * 128 + 128 + 2 * 256  # the copy lands outside the main memory


def test_plan_of_one_program_on_this_machine(tmp_path, capsys):
    """The quickstart's decode: figures that agree with the shapes, a table, and a record that can be read back."""
    wanted = config.load(CONFIGS / "quickstart.py")
    parts = programs.networks(wanted, None)
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    (program,) = (each for each in programs.programs(wanted, parts, mesh) if each.name == "decode")
    cost = plan.measure(program, hardware.CHIPS["TPU v5"])
    video = (
        4
        * wanted.rows_per_call
        * wanted.video.frames
        * wanted.video.height
        * wanted.video.width
        * 3
    )
    assert cost.peak > video + program.beside
    assert cost.fits
    assert cost.flops > 0
    assert cost.moved > video
    assert 0 < cost.utilisation < 1
    assert cost.seconds * 459e12 >= cost.flops
    assert f"{cost.peak / 1e9:.1f} GB" in plan.row(cost)
    small = dataclasses.replace(hardware.CHIPS["TPU v5"], memory=1e6)
    assert not dataclasses.replace(cost, fits=cost.peak <= 0.9 * small.memory).fits


@pytest.mark.parametrize("name", ["vace_1_3b", "phantom_14b"])
def test_every_published_configuration_has_programs_for_a_pod(name):
    """Shapes alone, on a mesh of 64 devices that do not exist; the face networks need not be here either."""
    wanted = config.load(CONFIGS / f"{name}.py")
    size = "14b" if "14b" in name else "1.3b"
    wanted = config.override(wanted, [("rollout.micro_batch", "32")])
    mesh = jax.sharding.Mesh(np.full((2, 16, 2, 1), jax.devices()[0]), sharding.AXES)
    with pytest.warns(
        UserWarning,
        match="reward.faces faces: no such folder; planned with RetinaFace-R50, ArcFace-R34",
    ):
        found = {
            program.name: program
            for program in programs.programs(wanted, programs.networks(wanted, size), mesh)
        }
    blank, later = (["blank video"], ["evaluation: blank video"]) if "vace" in name else ([], [])
    assert list(found) == [
        "text encoder",
        "photo encoding",
        *blank,
        "reference photo: find",
        "reference photo: embed",
        "rollout",
        "decode",
        "store",
        "reward",
        "update",
        "evaluation: photo encoding",
        *later,
        "evaluation: judge's photo: find",
        "evaluation: judge's photo: embed",
        "evaluation: sample",
        "evaluation: decode",
        "evaluation: reward",
        "evaluation: judge",
    ]
    batch = found["update"].arguments[3]
    assert batch.advantage.size == wanted.trained_rows
    assert found["update"].calls == wanted.grpo.updates
    assert (batch.conditioning.control is None) == ("phantom" in name)
    asked = found["evaluation: sample"].arguments[1].conditioning
    assert asked.frame_mask.shape[1] == 21 + (4 if "vace" in name else 0)
    _, _, video, people, assigner = found["evaluation: judge"].arguments
    assert people.embeddings.shape == assigner.references.shape == (32, 4, 512)
    assert video.shape == (32, 81, 480, 832, 3)
    _, video, people = found["evaluation: reward"].arguments
    assert video.shape == (32, 81, 480, 832, 3)
    assert people.embeddings.shape == (32, 4, 512)


def test_meshes_that_are_searched_divide_everything():
    parts = programs.networks(config.load(CONFIGS / "vace_1_3b.py"), "1.3b")
    found = list(plan.meshes(16, parts, 128))
    assert found[0] == (config.MeshConfig(data=1, fsdp=16), 16)
    assert len(found) == len(set(found))
    for mesh, rows in found:
        sizes = dataclasses.asdict(mesh)
        assert np.prod(list(sizes.values())) == 16
        assert 12 % mesh.tensor == 0
        assert 128 % rows == 0
        assert rows % (mesh.data * mesh.fsdp) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--topology", "cpu:none"], "--topology cpu:none: cpu takes a number of devices"),
        (
            ["--topology", "h200:eight"],
            "--topology h200:eight: GPUs take a number, or hosts x GPUs of each",
        ),
        (["--topology", "gpu"], "--topology gpu: JAX finds no GPU here"),
        (
            ["--topology", "cpu:1", "--sizes", "7b"],
            "--sizes 7b: unknown for model.kind vace; choose 1.3b or 14b or a14b",
        ),
        (["--topology", "cpu:1"], "pass --sizes 1.3b or 14b"),
        (
            ["--topology", "cpu:1", "--sizes", "1.3b", "--mesh.tensor", "5"],
            "does not use the 1 devices",
        ),
    ],
)
def test_what_cannot_be_planned_says_why(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        run(["plan", str(CONFIGS / "vace_1_3b.py"), "--out", str(tmp_path / "plan"), *options])
    assert not (tmp_path / "plan").exists()


def test_an_unknown_slice_and_a_missing_compiler_say_what_to_do():
    try:
        import libtpu  # noqa: F401

        said = "--topology v9z:4x4: no such slice"
    except ImportError:
        said = "pip install 'jax-idgrpo\\[tpu\\]'"
    with pytest.raises(UserError, match=said):
        hardware.devices("v9z:4x4")


def test_gpus_that_are_not_here(tmp_path, capsys):
    """With the compiler of the cuda extra a plan for GPUs is made; without it one line says what to install."""
    mesh = [
        "--topology",
        "h200:2",
        "--mesh.data",
        "1",
        "--mesh.fsdp",
        "2",
        "--rollout.micro_batch",
        "16",
    ]
    asked = [
        "plan",
        str(CONFIGS / "vace_1_3b.py"),
        "--sizes",
        "1.3b",
        "--programs",
        "rollout",
        "--out",
        str(tmp_path / "plan"),
        *mesh,
    ]
    refusal = ""
    try:
        found = hardware.devices("h200:2")
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert "pip install 'jax-idgrpo[cuda]'" in refusal
        return
    assert [device.device_kind for device in found] == ["NVIDIA H200"] * 2
    run(asked)
    assert "2 x NVIDIA H200, mesh fsdp 2" in capsys.readouterr().out
    cost = json.loads((tmp_path / "plan" / "plan.json").read_text())["programs"][0]
    assert cost["fits"]
    assert cost["received"] > 0


def test_record_is_json(tmp_path):
    cost = plan.Cost(
        "decode",
        1,
        None,
        False,
        1.0,
        float("nan"),
        float("nan"),
        None,
        None,
        1.0,
        10,
        "wants 17G of 16G",
    )
    assert "wants 17G of 16G" in plan.row(cost)
    assert json.loads(json.dumps(dataclasses.asdict(cost)))["program"] == "decode"


def test_a_rollout_that_is_trained_in_part_is_planned_with_its_selection():
    """The selection is given all rows, and the update the trained ones, in one piece however many updates share them."""
    wanted = config.load(
        CONFIGS / "quickstart.py", [("grpo.best", "2"), ("grpo.worst", "2"), ("grpo.updates", "2")]
    )
    parts, mesh = (
        programs.networks(wanted, None),
        sharding.make_mesh(config.MeshConfig(), jax.devices()[:1]),
    )
    found = {each.name: each for each in programs.programs(wanted, parts, mesh)}
    given = {
        name: next(x for x in found[name].arguments if hasattr(x, "trajectory"))
        for name in ("select", "update")
    }
    rows = {name: rollout.start.size for name, rollout in given.items()}
    assert rows == {"select": 32, "update": 16}
    assert found["update"].calls == 2
    assert jax.eval_shape(found["select"].function, *found["select"].arguments).start.shape == (
        2,
        8,
    )


# ---- what is planned is what runs ----------------------------------------------------------------


def planned(wanted):
    """The programs of a configuration of the bundled models on one device, by name."""
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    return {
        each.name: each for each in programs.programs(wanted, programs.networks(wanted, None), mesh)
    }


def compiled_memory(program):
    """Bytes of temporaries of a program."""
    traced = program.function.trace(*program.arguments, **program.options)
    return traced.lower().compile().memory_analysis().temp_size_in_bytes


def test_what_is_resident_is_what_a_run_holds(tmp_path):
    """Every array that is alive once a run is built; a watched run loads its judge as well."""
    wanted, mesh = tiny(2), sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    described = setup.build(wanted, mesh, abstract=True)
    judge = planned_judge(wanted, mesh)
    gc.collect()
    before = jax.live_arrays()
    run = setup.build(wanted, mesh)
    gc.collect()
    known = {id(array) for array in before}
    held = sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)
    assert programs.resident(described, [judge]) == held
    watching = dataclasses.replace(wanted, run=config.RunConfig(watch_every=1, watch_prompts=2))
    watched = dataclasses.replace(described, config=watching)
    watch = Watch.make(watching, run.pipe, run.reward, tmp_path)
    gc.collect()
    held = sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)
    own = programs.chip_bytes(watch.sampler.schedule, watch.sampler.negative)
    few = held - own - programs.resident(watched, [judge])  # constants of the programs of photos
    assert 0 <= few < programs.chip_bytes(run.reward.state) / 4, "the reward is loaded again"


def test_the_judge_is_planned_with_the_embedder_that_assigns_faces():
    """It is the reward's own, or is loaded beside a reward that has none."""
    wanted = tiny(2)
    shared = planned(wanted)
    function = dataclasses.replace(wanted, reward=config.RewardConfig(custom="nowhere:score"))
    loaded = planned(function)
    weights = [programs.chip_bytes(shared["reward"].arguments[0])]
    for found in (shared, loaded):
        judge = found["evaluation: judge"]
        _, state, video, _, assigner = judge.arguments
        assert assigner.references.shape[:2] == (video.shape[0], 3)
        weights.append(programs.chip_bytes(assigner.state))
        assert judge.function is judge_program
        assert plan.measure(judge, None).flops > 0
        sampled = found["evaluation: sample"]
        own = programs.chip_bytes(sampled.arguments[1].lora, sampled.arguments[1].base)
        everything = sampled.beside + own
        assert judge.beside + programs.chip_bytes(state, video, assigner.state) == everything
    assert weights[0] == weights[1] == weights[2] > 0
    assert {name for name in loaded if name not in shared} == {
        "evaluation: assigner's photo: find",
        "evaluation: assigner's photo: embed",
    }


def test_no_program_leaves_out_what_stays_on_the_device():
    """Arguments and what lies beside them are at least all networks, whatever runs; the step's videos are there while it is sampled."""
    wanted = tiny(2, prompts=4)
    found = planned(wanted)
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    least = programs.resident(setup.build(wanted, mesh, abstract=True))
    sizes = {}
    for name, each in found.items():
        arrays = [leaf for leaf in jax.tree.leaves(each.arguments) if hasattr(leaf, "sharding")]
        sizes[name] = programs.chip_bytes(arrays) + each.beside
    assert all(size >= least for size in sizes.values())
    stored = programs.chip_bytes(found["store"].arguments[0])
    for name in ("rollout", "decode", "store", "reward", "update"):
        assert sizes[name] >= least + stored, name


def test_memory_of_the_judge_does_not_grow_with_the_frames():
    sizes = {}
    for frames in (9, 81):
        wanted = dataclasses.replace(
            tiny(2), evaluate=config.EvaluateConfig(batch=1, frames=frames, height=64, width=64)
        )
        sizes[frames] = compiled_memory(planned(wanted)["evaluation: judge"])
    assert 0 < sizes[81] < 2 * sizes[9]


def test_objectives_that_replay_nothing_are_planned():
    """The gradient of the reward with the decode and the reward inside the update; others with the adapter that sampled."""
    through = dict(objective="reward_gradient", gradient_steps=1, kl_units="velocity")
    contrasted = config.RewardConfig(frames=2, penalties={"unrecognised": 1.0})
    wanted = dataclasses.replace(tiny(2, grpo=through, window="none"), reward=contrasted)
    found = planned(wanted)
    networks = found["update"].arguments[2]
    assert networks.scorer is not None
    assert found["update"].arguments[3].people is not None
    assert (
        plan.measure(found["update"], None).flops
        > found["decode"].calls * plan.measure(found["decode"], None).flops
    )
    wanted = tiny(2, grpo=dict(objective="nft", kl_units="velocity", updates=2), window="none")
    assert planned(wanted)["update"].arguments[2].old is not None


@pytest.mark.parametrize("vlm_devices", [0, 1])
def test_a_vision_language_reward_is_planned_with_published_sizes(vlm_devices, tmp_path):
    """Its folder is not here: 3.75 billion parameters in bfloat16 lie beside the video model, or on devices of their own."""
    reward = config.RewardConfig(faces="", vlm=str(tmp_path / "absent"), vlm_devices=vlm_devices)
    wanted = dataclasses.replace(tiny(2), reward=reward)
    with pytest.warns(UserWarning, match="reward.vlm .*absent: has no config.json on this machine"):
        found = planned(wanted)
    state, video, asked = found["reward"].arguments
    weights = programs.chip_bytes(state)
    assert 7.4e9 < weights < 7.7e9
    assert (found["update"].beside > weights) == (vlm_devices == 0)
    assert asked.ids.shape[0] == video.shape[0]
    assert asked.patches.shape[1] == 3
    assert "evaluation: judge" not in found
    assert "evaluation: reward" in found
    assert jax.eval_shape(found["reward"].function, state, video, asked)["reward"].shape == (
        video.shape[0],
    )


QWEN = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"mrope_section": [2, 3, 3]},
    "vision_config": {
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "fullatt_block_indexes": [1, 3],
        "window_size": 112,
    },
}


def test_a_vision_language_reward_is_planned_from_its_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    (tmp_path / "model_config.json").write_text(json.dumps(Settings(pixels=4 * 28**2).to_json()))
    wanted = dataclasses.replace(tiny(2), reward=config.RewardConfig(vlm=str(tmp_path)))
    found = planned(wanted)
    assert programs.chip_bytes(found["reward"].arguments[0]) < 1e6
    assert "evaluation: judge" in found
    cost = plan.measure(found["reward"], None)
    assert cost.peak > found["reward"].beside
    assert cost.flops > 0


def test_a_checklist_is_planned_with_one_sequence_per_question(tmp_path):
    """A language model's pass per question, and one of the vision tower per video."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(QWEN))
    rows = [{"question": f"Is it {n}?", "dimension": f"d{n}"} for n in range(4)]

    def found(count):
        (tmp_path / "checklist.json").write_text(json.dumps(rows[:count]))
        reward = config.RewardConfig(vlm=str(tmp_path), vlm_base=str(base))
        return planned(dataclasses.replace(tiny(2), reward=reward))["reward"]

    one, four = found(1), found(4)
    state, video, asked = four.arguments
    assert asked.ids.shape[:2] == (video.shape[0], 4)
    assert asked.patches.shape == one.arguments[2].patches.shape
    terms = jax.eval_shape(four.function, state, video, asked)
    assert {"reward", "d0", "d3"} <= set(terms)
    costs = [plan.measure(program, None).flops for program in (one, four)]
    assert 1.5 < costs[1] / costs[0] < 4


@pytest.mark.parametrize(
    "options", [{"custom": "nowhere:score"}, {"backend": "deepface:retinaface/ArcFace"}]
)
def test_a_reward_on_the_host_has_no_program_and_the_plan_says_so(options, tmp_path):
    wanted = dataclasses.replace(tiny(2), reward=config.RewardConfig(faces="", **options))
    found = planned(wanted)
    assert not {"reward", "evaluation: reward", "evaluation: judge"} & set(found)
    assert {
        "decode",
        "update",
    } <= set(found)
    name, value = next(iter(options.items()))
    assert f"reward.{name} {value}, runs on the host" in plan.summary(wanted, [], None)[0]
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    assert isinstance(setup.build(wanted, mesh, abstract=True).reward, HostReward)
