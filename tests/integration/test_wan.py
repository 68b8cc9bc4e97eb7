"""The transformer by itself: sizes, scanned against written out, rematerialisation, dtypes, masks, adapters, refusals."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.wan import (
    VaceConfig,
    WanConfig,
    WanTransformer,
    group_sizes,
    unstack_blocks,
    vace_1_3b,
    vace_14b,
    wan_1_3b,
    wan_14b,
)
from jax_idgrpo.planning.cost_model import flops
from tests.helpers.comparison import relative_error
from tests.helpers.wan import (
    SCALE,
    TINY,
    abstract,
    assert_agrees_with_scan,
    inputs,
    random_state,
)


def model(
    config: WanConfig, state: nnx.State | None = None, dtype: str = "float32"
) -> WanTransformer:
    state = random_state(config, dtype) if state is None else state
    return nnx.merge(nnx.graphdef(abstract(config, dtype)), state)


# ---- published sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors", "adapted", "adapter"),
    [
        (wan_1_3b, None, 825, 240, 23_592_960),
        (vace_1_3b, 2_153_972_032, 1264, 360, 35_389_440),
        (wan_14b, None, 1095, 320, 104_857_600),
        (vace_14b, None, None, 384, 125_829_120),
    ],
)
def test_published_sizes(preset, parameters, tensors, adapted, adapter):
    """A stacked leaf counts once per layer."""
    config = preset(rank=32, alpha=64.0)
    adapters, base = nnx.state(abstract(config, "bfloat16"), LoRAParam, ...)
    flat = nnx.to_flat_state(base)
    stacked = {"blocks": config.num_layers, "vace_blocks": len(config.vace_layers)}
    if parameters is not None:
        assert sum(leaf.get_value().size for _, leaf in flat) == parameters
    if tensors is not None:
        assert sum(stacked.get(path[0], 1) for path, _ in flat) == tensors
    flat = nnx.to_flat_state(adapters)
    assert sum(leaf.get_value().size for _, leaf in flat) == adapter
    assert sum(stacked[path[0]] for path, _ in flat) == 2 * adapted


def test_groups():
    assert group_sizes(vace_1_3b()) == [2] * 15
    assert group_sizes(vace_14b()) == [5] * 8
    assert group_sizes(TINY) == [2, 2, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": (1, 2)}, "first hint belongs to block 0"),
        ({"layers": (0, 5)}, "reaches block 5"),
        ({"layers": (0, 2, 2)}, "must rise"),
        ({"layers": ()}, "empty"),
        ({"in_channels": 0}, "vace_in_channels"),
        ({"num_layers": 0, "vace": None}, "num_layers"),
        ({"head_dim": 13}, "even"),
        ({"head_dim": 4}, "at least 6"),
        ({"freq_dim": 15}, "even"),
        ({"eps": 0.0}, "eps"),
        ({"rank": -1}, "rank"),
        ({"rank": 4}, "alpha"),
        ({"remat": "some"}, "remat"),
    ],
)
def test_impossible_configurations_say_why(change, reason):
    with pytest.raises(UserError, match=reason):
        replaced(change)


def replaced(change):
    """Change fields of TINY; `layers` and `in_channels` belong to its VACE blocks."""
    if change.keys() <= {"layers", "in_channels"}:
        change = {"vace": dataclasses.replace(TINY.vace, **change)}
    return dataclasses.replace(TINY, **change)


def test_scan_and_remat_agree():
    assert_agrees_with_scan({"remat": "full"})


def test_rematerialisation_keeps_what_it_says():
    """ "attention" runs the linear layers again, "dots" the attentions, and "full" both."""

    def again(remat):
        return work(remat) - work("none")

    def work(remat):
        graph, state = nnx.split(abstract(dataclasses.replace(TINY, remat=remat)))
        loss = jax.value_and_grad(lambda state: jnp.sum(nnx.merge(graph, state)(*inputs(), SCALE)))
        return flops(jax.make_jaxpr(loss)(state))

    attentions = (
        4 * 2 * TINY.width * (TINY.num_layers + 3) * 18 * (18 + 5)
    )  # of 18 tokens with themselves and with the text's 5
    assert again("dots") == attentions
    assert again("full") == again("dots") + again("attention") > 2 * attentions


def test_an_unrolled_policy_holds_its_blocks_apart_and_copies_no_weight():
    """The velocity of a stack, to the bit; no program cuts a kernel out of a stack."""
    config = dataclasses.replace(TINY, unroll=True, rank=2, alpha=2.0)
    graph, lora, stacked = nnx.split(model(config), LoRAParam, ...)
    apart = unstack_blocks(stacked)
    given = inputs()

    def velocity(base):
        return nnx.merge(graph, base, lora)(*given)

    np.testing.assert_array_equal(jax.jit(velocity)(apart), jax.jit(velocity)(stacked))
    cut = [
        max(np.prod(v.aval.shape) for v in e.outvars)
        for e in equations(jax.make_jaxpr(velocity)(apart).jaxpr)
        if e.primitive.name in ("split", "slice", "dynamic_slice")
    ]
    assert max(cut, default=0) < config.width**2
    assert len(jax.tree.leaves(apart)) > len(jax.tree.leaves(stacked))


def test_the_gradient_of_an_adapter_keeps_little_of_each_block():
    """In arrays of the stream's size: 29 of a block whose feed-forward layer is four times as wide. With gelu's tanh, the norms' centred
    inputs and the zeros before attention's gradients it was 36."""

    def needed(layers):
        config = WanConfig(
            num_layers=layers,
            num_heads=4,
            head_dim=16,
            ffn_dim=256,
            text_dim=16,
            freq_dim=16,
            rank=2,
            alpha=2.0,
            unroll=True,
        )
        graph, lora, base = nnx.split(abstract(config), LoRAParam, ...)
        given = jnp.ones((8, 2, 16, 16, 16)), jnp.arange(8), jnp.ones((8, 4, 16))
        gradient = jax.jit(
            jax.grad(lambda lora, base: jnp.sum(nnx.merge(graph, base, lora)(*given) ** 2))
        )
        return (
            gradient.lower(lora, jax.eval_shape(unstack_blocks, base))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    stream = 4 * 8 * 128 * 64
    assert (needed(6) - needed(2)) / 4 < 31 * stream


def equations(jaxpr):
    """All equations of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params):
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from equations(value.jaxpr)
            elif isinstance(value, jax.extend.core.Jaxpr):
                yield from equations(value)


def program(config: WanConfig, dtype: str = "float32") -> list:
    graph, state = nnx.split(abstract(config, dtype))
    return list(
        equations(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(*inputs()))(state).jaxpr)
    )


def test_program_does_not_grow_with_depth():
    """Even groups are one scan; more layers are more rows of its operands."""
    sizes = {
        depth: len(
            program(
                dataclasses.replace(
                    TINY, num_layers=depth, vace=VaceConfig(tuple(range(0, depth, 2)))
                )
            )
        )
        for depth in (4, 12)
    }
    assert sizes[4] == sizes[12]


def test_batch_of_three_is_three_batches_of_one():
    arrays = inputs(batch=3)
    velocity = jax.jit(model(TINY))
    together = velocity(*arrays, SCALE)
    apart = [velocity(*(a[i : i + 1] for a in arrays), SCALE)[0] for i in range(3)]
    assert relative_error(np.stack(apart), together) < 1e-5


def test_masked_frames_change_nothing():
    """Row 0 has 2 real frames, row 1 has 3: each equals its run alone, whatever stands in the padding."""
    latents, timesteps, text, control = inputs(frames=3)
    mask = jnp.array([[True, True, False], [True, True, True]])
    velocity = jax.jit(model(TINY))
    got = velocity(latents, timesteps, text, control, SCALE, mask)
    alone = velocity(latents[:1, :2], timesteps[:1], text[:1], control[:1, :2], SCALE)
    assert relative_error(got[0, :2], alone[0]) < 1e-5
    other = latents.at[0, 2].set(50.0)
    assert (
        relative_error(velocity(other, timesteps, text, control, SCALE, mask)[0, :2], alone[0])
        < 1e-5
    )
    assert relative_error(got[1], velocity(latents, timesteps, text, control, SCALE)[1]) < 1e-5
    unmasked = velocity(latents, timesteps, text, control, SCALE, jnp.ones_like(mask))
    assert relative_error(unmasked[0, :2], alone[0]) > 1e-2


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def test_bfloat16_is_close_to_float32():
    exact = random_state(TINY)
    kinds = nnx.state(abstract(TINY, "bfloat16"))
    rounded = jax.tree.map(lambda value, kind: value.astype(kind.dtype), exact, kinds)
    want = jax.jit(model(TINY, exact))(*inputs(), SCALE)
    got = jax.jit(model(TINY, rounded, "bfloat16"))(*inputs(), SCALE)
    assert got.dtype == jnp.float32
    assert 1e-5 < relative_error(got, want) < 3e-2


def test_leaf_dtypes():
    float32 = ("norm", "scale_shift_table", "time_embedder", "time_proj", "lora")
    config = dataclasses.replace(TINY, rank=2, alpha=2.0)
    for path, leaf in nnx.to_flat_state(nnx.state(abstract(config, "bfloat16"))):
        name = ".".join(path)
        small = name.startswith("proj_out") or any(part in name for part in float32)
        assert leaf.get_value().dtype == (jnp.float32 if small else jnp.bfloat16), name


@pytest.mark.parametrize("rank", [0, 2])
def test_matrix_products_take_bfloat16_operands(rank):
    """All but the timestep's three layers and the head; none of the streams is promoted, scale or no scale."""
    products = [
        e
        for e in program(dataclasses.replace(TINY, rank=rank, alpha=2.0), "bfloat16")
        if e.primitive.name == "dot_general"
    ]
    assert sum(wide(e) for e in products) == 4
    assert all(e.outvars[0].aval.dtype == jnp.float32 for e in products)
    carries = [
        v.aval.dtype
        for e in program(TINY, "bfloat16")
        if e.primitive.name == "scan"
        for v in e.outvars
    ]
    assert set(carries) == {jnp.dtype("bfloat16")}


def wide(product) -> bool:
    return any(operand.aval.dtype == jnp.float32 for operand in product.invars)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_means_float32_on_every_machine(dtype):
    """A TPU rounds the operands of a float32 product to bfloat16, and a GPU to TF32, unless all their bits are asked for."""
    config = dataclasses.replace(TINY, rank=2, alpha=2.0)
    graph = nnx.graphdef(abstract(config, dtype))
    gradient = jax.make_jaxpr(
        jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(*inputs(), SCALE)))
    )
    found = [
        e
        for e in equations(gradient(random_state(config, dtype)).jaxpr)
        if e.primitive.name == "dot_general" and wide(e)
    ]
    assert len(found) > 8
    assert all(e.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for e in found)


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_adapter_on_and_off():
    """B = 0 is bit-equal to rank 0 on the same base; the base fits the graph of rank 0; a trained adapter is seen."""
    config = dataclasses.replace(TINY, rank=2, alpha=4.0)
    state = random_state(config)
    adapters, base = state.split(LoRAParam, ...)
    plain = jax.jit(model(TINY, base))(*inputs(), SCALE)
    assert np.array_equal(plain, jax.jit(model(TINY))(*inputs(), SCALE))
    velocity = jax.jit(model(config))
    assert relative_error(velocity(*inputs(), SCALE), plain) > 1e-2
    fresh = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if "lora_b" in jax.tree_util.keystr(path) else leaf, adapters
    )
    off = jax.jit(model(config, nnx.merge_state(fresh, base)))(*inputs(), SCALE)
    assert np.array_equal(off, plain)


def test_adapters_sit_on_every_attention_projection_and_nowhere_else():
    adapters = nnx.state(abstract(dataclasses.replace(TINY, rank=2, alpha=4.0)), LoRAParam)
    want = {
        (stack, attention, f"to_{name}", leaf)
        for stack in ("blocks", "vace_blocks")
        for attention in ("attn1", "attn2")
        for name in ("q", "k", "v", "out")
        for leaf in ("lora_a", "lora_b")
    }
    assert {path for path, _ in nnx.to_flat_state(adapters)} == want


# ---- control scale and refusals --------------------------------------------------------------------------------------


def test_control_scale_forms():
    velocity = jax.jit(model(TINY))
    one = velocity(*inputs())
    assert np.array_equal(one, velocity(*inputs(), 1.0))
    assert np.array_equal(one, velocity(*inputs(), np.ones(3, np.float32)))
    assert relative_error(velocity(*inputs(), 0.0), one) > 1e-2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latents": np.zeros((2, 3, 4, 6, 15), np.float32)}, "latents"),
        ({"latents": np.zeros((2, 3, 5, 6, 16), np.float32)}, "even"),
        ({"latents": np.zeros((2, 1025, 2, 2, 16), np.float32)}, "rope_max_seq_len"),
        ({"timesteps": np.zeros(3, np.int32)}, "timesteps"),
        ({"timesteps": np.zeros(2, np.float32)}, "integers"),
        ({"text": np.zeros((2, 5, 9), np.float32)}, "text"),
        ({"control": None}, "give control"),
        ({"control": np.zeros((2, 2, 4, 6, 96), np.float32)}, "control"),
        ({"control_scale": np.ones(2, np.float32)}, "control_scale"),
        ({"frame_mask": np.ones((2, 2), bool)}, "frame_mask"),
    ],
)
def test_inputs_that_do_not_fit_say_why(change, reason):
    graph, state = nnx.split(abstract(TINY))
    arguments = dict(
        zip(("latents", "timesteps", "text", "control"), inputs(), strict=True)
    ) | jax.tree.map(jnp.asarray, change)
    with pytest.raises(UserError, match=reason):
        jax.eval_shape(lambda state: nnx.merge(graph, state)(**arguments), state)


def test_plain_wan_refuses_control():
    plain = dataclasses.replace(TINY, vace=None)
    graph, state = nnx.split(abstract(plain))
    with pytest.raises(UserError, match="no VACE blocks"):
        jax.eval_shape(lambda state: nnx.merge(graph, state)(*inputs()), state)
