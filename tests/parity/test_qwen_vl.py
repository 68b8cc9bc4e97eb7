"""Qwen2.5-VL against transformers: tower, positions, windows, language model and the hidden state at the token, random everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from checkpoints_convert import qwen_vl as table
from checkpoints_convert import rules
from jax_idgrpo.models import qwen_vl
from jax_idgrpo.models.layers import Dtypes, LoRAParam
from tests.helpers.comparison import relative_error

BOUND = 1e-5
IMAGE, VIDEO, START, END = 500, 501, 502, 503
VISION = qwen_vl.VisionConfig(depth=4, width=32, heads=2, ffn=48, full_blocks=(1, 3), patch=14)
CONFIG = qwen_vl.QwenConfig(
    vision=VISION,
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    ffn=96,
    vocabulary=512,
    sections=(2, 3, 3),
    eps=1e-3,
)
SHAPES = [(1, 4, 6), (2, 18, 30), (1, 16, 16)]


@functools.cache
def original():
    """The torch model, every parameter drawn, norms and biases too."""
    text = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e6),
        max_position_embeddings=4096,
        rms_norm_eps=1e-3,
    )
    vision = dict(
        depth=4,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=64,
        fullatt_block_indexes=[1, 3],
        window_size=112,
        patch_size=14,
        tokens_per_second=2,
    )
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.15
                + (1.0 if "norm" in name or "ln_q" in name else 0.0)
            )
    return model


@functools.cache
def ours():
    """Our model with the same weights, through the real table, and a drawn head."""
    graph, abstract = nnx.split(
        nnx.eval_shape(
            lambda: qwen_vl.QwenReward(CONFIG, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
        )
    )
    tensors = {
        f"model.{name}": value.detach().numpy() for name, value in original().state_dict().items()
    }
    tensors["rm_head.weight"] = np.random.default_rng(5).normal(size=(1, 64)).astype(np.float32)
    assert table.spelling(tensors) == "transformers5"
    return nnx.merge(graph, rules.to_jax(table.rules(CONFIG, "transformers5"), tensors, abstract))


def pixels(shape, seed):
    """Random patches [t h w, 1176] of a grid."""
    return (
        np.random.default_rng(seed)
        .normal(size=(np.prod(shape), VISION.features))
        .astype(np.float32)
    )


def grids(shapes, patches, capacity=600, count=32):
    """Every temporal grid of the shapes as one row."""
    rows = []
    for (t, h, w), values in zip(shapes, patches, strict=True):
        for part in np.split(values, t):
            tables = qwen_vl.grid_tables(h, w, VISION, capacity, count)
            rows.append(
                tables
                | {
                    "patches": np.pad(
                        part, ((0, capacity - len(part)), (0, 0)), constant_values=7.0
                    )
                }
            )
    return qwen_vl.Grids(
        **{name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_order_of_patches_and_windows_is_the_originals(shape):
    _, h, w = shape
    want = get_vision_position_ids(torch.tensor([[1, h, w]]), 2).numpy()
    np.testing.assert_array_equal(qwen_vl.merge_order(h, w, 2), want)
    index, lengths = get_vision_window_index(torch.tensor([[1, h, w]]), 2, 112, 14)
    found = qwen_vl.windows(h, w, VISION)
    np.testing.assert_array_equal(np.concatenate(found), index.numpy())
    np.testing.assert_array_equal(
        np.cumsum([4 * len(cells) for cells in found]), lengths.numpy()[1:]
    )


def test_the_tower_equals_transformers_for_grids_of_all_shapes_in_one_program():
    patches = [pixels(shape, seed) for seed, shape in enumerate(SHAPES)]
    with torch.no_grad():
        want = (
            original()
            .visual(torch.from_numpy(np.concatenate(patches)), torch.tensor(SHAPES))
            .pooler_output.numpy()
        )
    got = jax.jit(lambda visual, grids: visual(grids))(ours().visual, grids(SHAPES, patches))
    sizes = [h * w // 4 for t, h, w in SHAPES for _ in range(t)]
    got = np.concatenate([np.asarray(row[:size]) for row, size in zip(got, sizes, strict=True)])
    assert relative_error(got, want) < BOUND
    swapped = [patches[0][::-1].copy(), *patches[1:]]
    other = jax.jit(lambda visual, grids: visual(grids))(ours().visual, grids(SHAPES, swapped))
    assert np.abs(other[0] - got[: sizes[0]][0]).max() > 1e-2  # the comparison can fail


def sequence(reference_shapes, video_shape, words, seed):
    """Ids, what kind each is, and the features that stand at vision tokens, of one prompt of pictures, a video and words."""
    rng = np.random.default_rng(seed)
    ids, kinds = list(rng.integers(10, 400, 3)), [0] * 3
    for shape, token, kind in [
        *((shape, IMAGE, 1) for shape in reference_shapes),
        (video_shape, VIDEO, 2),
    ]:
        count = int(np.prod(shape)) // 4
        ids += [START, *[token] * count, END]
        kinds += [0, *[kind] * count, 0]
    ids += list(rng.integers(10, 400, words))
    return np.array(ids), np.array(kinds + [0] * words)


@functools.cache
def mixed_batch():
    """Two rows: two pictures of other sizes and one; a video each; padded on the right."""
    references = [[(1, 4, 6), (1, 16, 16)], [(1, 8, 4)]]
    videos = [(2, 18, 30), (2, 18, 30)]
    rows = [sequence(references[row], videos[row], words, row) for row, words in enumerate((9, 4))]
    return references, videos, rows


def test_positions_and_the_state_at_the_token_equal_transformers_in_a_padded_mixed_batch():
    references, videos, rows = mixed_batch()
    length = max(len(ids) for ids, _ in rows) + 3
    ids, kinds, mask = (np.zeros((2, length), np.int64) for _ in range(3))
    for row, (values, kind) in enumerate(rows):
        ids[row, : len(values)], kinds[row, : len(values)], mask[row, : len(values)] = (
            values,
            kind,
            1,
        )
    pictures = [
        pixels(shape, 10 + n)
        for n, shape in enumerate(shape for row in references for shape in row)
    ]
    frames = [pixels(shape, 20 + n) for n, shape in enumerate(videos)]
    model, given = original(), dict(second_per_grid_ts=torch.tensor([1.65, 1.65]))
    image_grid, video_grid = (
        torch.tensor([shape for row in references for shape in row]),
        torch.tensor(videos),
    )
    with torch.no_grad():
        text = torch.from_numpy(ids), torch.from_numpy(kinds).int()
        positions, _ = model.get_rope_index(
            *text, image_grid, video_grid, given["second_per_grid_ts"], torch.from_numpy(mask)
        )
        want = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            mm_token_type_ids=torch.from_numpy(kinds).int(),
            pixel_values=torch.from_numpy(np.concatenate(pictures)),
            pixel_values_videos=torch.from_numpy(np.concatenate(frames)),
            image_grid_thw=image_grid,
            video_grid_thw=video_grid,
            **given,
        ).last_hidden_state.numpy()
    made = [
        qwen_vl.layout(values, kind, [*shapes, video], step=1.65 * 2, merge=2)
        for (values, kind), shapes, video in zip(rows, references, videos, strict=True)
    ]
    for row, (position, _) in enumerate(made):
        np.testing.assert_array_equal(position, positions.numpy()[:, row, : position.shape[1]])

    # Two pictures of capacity 256 and two grids of frames of capacity 600 per row; the second row's second picture is padding.
    both = grids(
        [*references[0], references[1][0], (1, 4, 6)], [*pictures, pixels((1, 4, 6), 99)], 256, 16
    )
    places = np.full((2, length), -1)
    position = np.zeros((3, 2, length), np.int64)
    for row, (found, order) in enumerate(made):
        position[:, row, : found.shape[1]] = found
        starts = np.concatenate(
            [
                np.arange(picture * 64, picture * 64 + int(np.prod(shape)) // 4)
                for picture, shape in enumerate(references[row])
            ]
        )
        video = np.concatenate([128 + 150 * t + np.arange(135) for t in range(2)])
        places[row, np.flatnonzero(order >= 0)] = np.concatenate([starts, video])
    sequences = qwen_vl.Sequences(
        ids=jnp.asarray(ids),
        vision=jnp.asarray(places),
        position=jnp.asarray(position),
        mask=jnp.asarray(mask > 0),
        token=jnp.asarray([[len(values) - 2] for values, _ in rows]),
    )
    got, score = jax.jit(run)(ours(), sequences, both, grids(videos, frames))
    for row, (values, _) in enumerate(rows):
        assert relative_error(got[row, : len(values)], want[row, : len(values)]) < BOUND
        at_token = want[row, len(values) - 2] @ np.asarray(ours().rm_head.kernel[...])
        np.testing.assert_allclose(score[row, 0], at_token, rtol=1e-3)
    later = sequences.replace(
        ids=sequences.ids.at[:, -3:].set(17).at[0, len(rows[0][0]) - 1].set(3)
    )
    np.testing.assert_allclose(
        jax.jit(run)(ours(), later, both, grids(videos, frames))[1], score, atol=1e-6
    )


def run(model, sequences, pictures, frames):
    vision = jnp.concatenate([model.features(pictures, 2), model.features(frames, 2)], axis=1)
    return model.hidden(sequences, vision), model(sequences, pictures, frames)


def test_long_sequences_are_worked_through_in_chunks():
    rng = np.random.default_rng(3)
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, 1100, heads, 8)), jnp.float32) for heads in (4, 2, 2)
    )
    want = qwen_vl.attend(q, k, v, jnp.tril(jnp.ones((1100, 1100), bool)))
    np.testing.assert_allclose(jax.jit(qwen_vl.causal)(q, k, v), want, atol=1e-5)


def test_published_totals():
    config = qwen_vl.QwenConfig()
    state = nnx.state(
        nnx.eval_shape(
            lambda: qwen_vl.QwenReward(config, dtypes=Dtypes.named("bfloat16"), rngs=nnx.Rngs(0))
        )
    )

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert size(state) - config.width == 3_754_622_976
    assert size(state["visual"]) == 668_684_288
    assert size(state["layers"]) + size(state["norm"]) == 2_774_773_760
    assert len(rules.expand(table.rules(config), state)) == 825
    adapted = qwen_vl.QwenConfig(rank=64, alpha=128.0)
    model = nnx.eval_shape(
        lambda: qwen_vl.QwenReward(adapted, dtypes=Dtypes.named("bfloat16"), rngs=nnx.Rngs(0))
    )
    state = nnx.state(model, LoRAParam)
    assert size(state) == 119_734_272
    assert len(rules.expand(table.lora_rules(), state)) == 2 * 252
