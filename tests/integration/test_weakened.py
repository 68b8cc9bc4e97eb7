"""The weakened branch of guidance: what it sees, how it is combined, and that ratios stay 1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_idgrpo import config as c
from jax_idgrpo.config.weakened import weak_branch
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes, layer_norm
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.sampling import policy
from jax_idgrpo.sampling.conditioning import video_latents
from jax_idgrpo.sampling.policy import PolicyInputs, Weakening
from tests.helpers import phantom
from tests.helpers.noise import add_noise
from tests.helpers.update import (
    ADVANTAGE,
    CONFIG,
    FRAMES,
    NEGATIVE,
    ROWS,
    STEPS,
    asked,
    chunked,
    gradients,
    model,
    objective,
    sampled,
)

TIME = jnp.full(ROWS, 800)
X = jnp.asarray(np.random.default_rng(5).normal(size=(ROWS, *asked().latent_shape)), jnp.float32)


def weakening(**values):
    return Weakening.make(weak_branch("weakened", values), STEPS, 3.0)


def with_branch(parts, **values):
    """A policy with a weakened branch, and its arrays."""
    actor, lora, base = parts
    return actor.weakened(weakening(**values)), lora, base


def velocity(parts, given=None, x=X, time=TIME):
    actor, lora, base = parts
    inputs = PolicyInputs(lora, base, given or asked(), NEGATIVE)
    return jax.jit(actor.velocity)(inputs, x, time)


def weak_velocity(guidance=1.0, **values):
    """The velocity of the weakened branch alone: v_weak = v_prompt - (v - v_guided) / scale."""
    plain = velocity(model(guidance=guidance))
    given = {"scale": 0.5, "from": "prompt"} | values
    changed = velocity(with_branch(model(guidance=guidance), **given))
    prompt = velocity(model(guidance=1.0))
    return prompt - (changed - plain) / given["scale"]


def on_video(x):
    return video_latents(x, asked().video_start, FRAMES)


def transformer():
    """The network of `model`, with its adapter."""
    made = WanTransformer(CONFIG, dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0))
    add_noise(made)
    return made


def test_without_settings_the_policy_is_the_same_program():
    actor = model(guidance=4.5)[0]
    config = c.Config(model=c.ModelConfig(path="embedded"))
    assert actor.configured(config, 3.0) == actor
    assert actor.configured(config, 3.0, evaluation=True) == actor


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_photos_the_branch_is_text_to_video(guidance):
    given = asked()
    alone = transformer()(
        on_video(X),
        TIME,
        given.text,
        control=video_latents(given.control, given.references, FRAMES),
    )
    got = on_video(weak_velocity(guidance, photos="none"))
    np.testing.assert_allclose(got, alone, rtol=1e-4, atol=1e-4)
    # The photos' slots move as without the branch.
    plain, changed = velocity(model()), velocity(with_branch(model(), scale=2.0, photos="none"))
    slots = np.arange(X.shape[1]) < np.asarray(given.references)[:, None]
    np.testing.assert_allclose(changed[slots], plain[slots], rtol=1e-5, atol=1e-5)
    assert np.abs(on_video(changed - plain)).max() > 1e-3


def test_blank_photos_have_no_control():
    given = asked()
    slots = jnp.arange(X.shape[1]) < given.references[:, None]
    blank = dataclasses.replace(
        given, control=jnp.where(slots[..., None, None, None], 0, given.control)
    )
    got, want = weak_velocity(photos="blank"), velocity(model(guidance=1.0), blank)
    np.testing.assert_allclose(on_video(got), on_video(want), rtol=1e-4, atol=1e-4)


def test_without_blocks_a_network_is_its_first_and_last_layer():
    network = transformer()
    x = network.patch_embedding(network._shard_patches(X))
    time, _ = network.condition_embedder(TIME)
    shift, scale = (network.scale_shift_table[...] + time[:, None, :])[:, :, None].swapaxes(0, 1)
    tokens = network.proj_out(layer_norm(x, CONFIG.eps) * (1 + scale) + shift)
    frames, height, width = X.shape[1:4]
    want = tokens.reshape(ROWS, frames, height // 2, width // 2, 2, 2, -1)
    want = want.transpose(0, 1, 2, 4, 3, 5, 6).reshape(X.shape)
    got = weak_velocity(blocks=[0, 1])
    np.testing.assert_allclose(on_video(got), on_video(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [[0], [1]])
def test_blocks_are_skipped_alike_in_a_loop_and_unrolled(blocks):
    """The hint of a skipped block is dropped with it."""
    rolled = WanTransformer(
        dataclasses.replace(CONFIG, unroll=False), dtypes=Dtypes.named("float32"), rngs=nnx.Rngs(0)
    )
    add_noise(rolled)
    given = dict(scale=0.5, blocks=blocks)
    loop = velocity(with_branch(policy.split(rolled, 3.0), **given))
    np.testing.assert_allclose(
        on_video(loop), on_video(velocity(with_branch(model(), **given))), rtol=1e-4, atol=1e-4
    )
    assert np.abs(on_video(loop - velocity(model()))).max() > 1e-3


def test_the_negative_branch_can_skip_blocks():
    actor, lora, base = with_branch(model(), **{"from": "negative", "blocks": [1]})
    assert actor.branches == 2
    negative = dataclasses.replace(asked(), text=jnp.broadcast_to(NEGATIVE, asked().text.shape))
    alone = model(guidance=1.0)
    weak = with_branch(alone, **{"from": "prompt", "blocks": [1], "scale": 1.0})
    kept = velocity(alone, negative)
    skipped = 2 * kept - velocity(weak, negative)
    want = skipped + 3.0 * (velocity(alone) - skipped)
    got = velocity((actor, lora, base))
    np.testing.assert_allclose(on_video(got), on_video(want), rtol=1e-3, atol=1e-3)


def test_it_acts_on_the_steps_that_are_asked():
    parts = with_branch(model(), steps=[0.3, 0.5], scale=0.5, photos="none")
    times = [999, 856]
    assert parts[0].weakening.timesteps == (856, 856)  # the second of three steps
    plain = [velocity(model(), time=jnp.full(ROWS, time)) for time in times]
    changed = [velocity(parts, time=jnp.full(ROWS, time)) for time in times]
    np.testing.assert_allclose(changed[0], plain[0], rtol=1e-5, atol=1e-5)
    assert np.abs(changed[1] - plain[1]).max() > 1e-3
    with pytest.raises(UserError, match=r"none of the 3 denoising steps is in \[0.4, 0.5\]"):
        weakening(steps=[0.4, 0.5], scale=0.5, photos="none")


def test_a_row_does_not_depend_on_rows_with_other_numbers_of_photos():
    parts = with_branch(model(), scale=0.5, photos="none", blocks=[1])
    both = velocity(parts)
    for row in range(ROWS):
        one = slice(row, row + 1)
        given = jax.tree.map(lambda leaf, one=one: leaf[one], asked())
        alone = velocity(parts, given, X[one], TIME[one])
        np.testing.assert_allclose(alone[0], both[row], rtol=1e-4, atol=1e-4)


MODES = [
    {"scale": 0.5, "photos": "none"},
    {"scale": 0.5, "photos": "blank", "from": "prompt"},
    {"scale": 1.0, "blocks": [1], "steps": [0.3, 1.0]},
    {"from": "negative", "blocks": [1]},
]


@pytest.mark.parametrize("values", MODES, ids=lambda values: "-".join(map(str, values)))
def test_the_ratio_of_a_fresh_rollout_is_one(values):
    parts = with_branch(model(remat="full"), **values)
    actor, lora, base = parts
    gradient, rows = gradients(
        objective(actor, kl=0.1), lora, base, chunked([sampled(parts)], ADVANTAGE)
    )
    np.testing.assert_array_equal(rows["ratio"], 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("photos", ["blank", "none"])
def test_other_kinds_see_zeros_in_place_of_photos(photos):
    given = phantom.asked()
    x = X[:, : phantom.FRAMES, :4, :6]

    def moved(guidance, photo_guidance, given=given, **values):
        actor, lora, base = phantom.model(guidance, photo_guidance)
        actor = actor.weakened(weakening(**values) if values else None)
        inputs = PolicyInputs(lora, base, given, phantom.NEGATIVE)
        return jax.jit(actor.velocity)(inputs, x, TIME)

    plain = moved(7.5, 5.0)
    changed = moved(7.5, 5.0, scale=0.5, photos=photos, **{"from": "prompt"})
    blank = dataclasses.replace(given, reference_latents=jnp.zeros_like(given.reference_latents))
    want = plain + 0.5 * (moved(1.0, 1.0) - moved(1.0, 1.0, blank))
    np.testing.assert_allclose(changed, want, rtol=1e-3, atol=1e-3)


def test_control_scale_is_that_of_the_network():
    actor, lora, base = model(guidance=1.0)
    scaled = velocity((actor.weakened(None, 0.5), lora, base))
    given = asked()
    want = transformer()(
        X, TIME, given.text, control=given.control, control_scale=0.5, frame_mask=given.frame_mask
    )
    np.testing.assert_allclose(on_video(scaled), on_video(want), rtol=1e-4, atol=1e-4)


def test_a_block_that_the_transformer_lacks_is_refused():
    with pytest.raises(UserError, match=r"blocks \[9\] are to be skipped, .* has blocks 0 to 1"):
        velocity(with_branch(model(), scale=0.5, blocks=[9]))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"scale": 0.5}, "nothing is weakened"),
        ({"photos": "none"}, "scale is 0.0; use a positive number"),
        ({"scale": -1, "photos": "none"}, "scale is -1"),
        ({"scale": True, "photos": "none"}, "scale is True"),
        ({"strength": 1}, "has no 'strength'; use scale, blocks"),
        ({"scale": 1, "blocks": 9}, "blocks is 9; use a list"),
        ({"scale": 1, "blocks": [1, 1]}, r"blocks is \[1, 1\]"),
        ({"scale": 1, "photos": "half"}, "photos is 'half'"),
        ({"scale": 1, "blocks": [1], "from": "text"}, "from is 'text'"),
        ({"scale": 1, "blocks": [1], "steps": [0.9, 0.1]}, "steps is .* use two shares"),
        ({"from": "negative", "blocks": [1], "scale": 1}, "leave out scale"),
        ({"from": "negative"}, "needs blocks"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_settings_that_mean_nothing_are_refused(values, reason):
    for section in (c.RolloutConfig, c.EvaluateConfig):
        with pytest.raises(UserError, match=reason):
            section(weakened=values)


def test_settings_that_the_model_cannot_have_are_refused():
    negative = {"from": "negative", "blocks": [1]}
    with pytest.raises(UserError, match="needs a negative branch, and the guidance is 1"):
        c.Config(
            model=c.ModelConfig(path="embedded"),
            rollout=c.RolloutConfig(guidance=1.0, weakened=negative),
        )
    with pytest.raises(
        UserError, match="from negative is for VACE; model.kind phantom has a branch"
    ):
        c.Config(
            model=c.ModelConfig(path="x", kind="phantom"),
            evaluate=c.EvaluateConfig(weakened=negative),
            reward=c.RewardConfig(faces="faces"),
        )
    with pytest.raises(UserError, match="rollout.control_scale 0.5 is of VACE's hints"):
        c.Config(
            model=c.ModelConfig(path="x", kind="phantom"),
            rollout=c.RolloutConfig(control_scale=0.5),
            reward=c.RewardConfig(faces="faces"),
        )
