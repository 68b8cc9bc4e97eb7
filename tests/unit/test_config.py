"""Configurations: every stored one loads, names mean what the mathematics calls them, and what cannot work is refused with the reason."""

import dataclasses
import warnings
from typing import get_type_hints

import pytest

from jax_idgrpo import config as schema
from jax_idgrpo import flow, grpo
from jax_idgrpo.config import (
    Config,
    EvaluateConfig,
    GrpoConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    VideoConfig,
    load,
    override,
)
from jax_idgrpo.errors import UserError
from jax_idgrpo.synthetic import captions
from jax_idgrpo.synthetic.training import transformer
from tests.helpers import paths

CONFIGS = sorted(paths.CONFIGS.glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_stored_configurations_load(path):
    if path.stem != "__init__":
        assert isinstance(load(path), Config)


def test_names_are_those_of_the_mathematics():
    for sampler in flow.SAMPLERS:
        RolloutConfig(sampler=sampler)
    for solver in flow.SOLVERS:
        EvaluateConfig(solver=solver)
    for weighting in grpo.AWM_WEIGHTINGS:
        GrpoConfig(awm_weighting=weighting)


def transformer_options(**values):
    sizes = dict.fromkeys(("num_layers", "num_heads", "head_dim", "ffn_dim", "freq_dim"), 1)
    return transformer.Options(**sizes, vace_layers=(0,), pool=transformer.CHUNK, **values)


def build(rollout=None, **values):
    return Config(rollout=RolloutConfig(**(rollout or {})), grpo=GrpoConfig(**values))


LATENTS = dict(rollout=dict(window="none"), kl_units="velocity")

WRONG = {
    "is not inside the first 24 steps": lambda: build(
        dict(window="fixed", window_start=20, window_size=8)
    ),
    "a random window needs 1 to 12 of 25 steps": lambda: build(
        dict(window="per_prompt", window_size=13)
    ),
    "window_every is 0": lambda: build(dict(window="progressive", window_size=4, window_every=0)),
    "window is 'late'; use all, fixed": lambda: build(dict(window="late")),
    "cps has log-probabilities without std": lambda: build(dict(sampler="cps")),
    "cps does not have": lambda: build(dict(sampler="cps"), objective="guard", kl=0.0),
    "cps takes at most 1": lambda: build(dict(sampler="cps", noise_level=1.2), kl=0.0),
    "sampler is 'euler'": lambda: build(dict(sampler="euler")),
    "stores no trajectory; set rollout.window none": lambda: build(
        objective="nft", kl_units="velocity"
    ),
    "clip replays stochastic steps": lambda: build(dict(window="none")),
    "makes all videos of a group equal": lambda: build(
        **LATENTS | dict(objective="awm", rollout=dict(window="none", start_noise="shared"))
    ),
    "adds noise, which rollout.window none excludes": lambda: build(
        dict(window="none", final_step="sde"), objective="sft"
    ),
    "'awm' does not; use velocity": lambda: build(dict(window="none"), objective="awm"),
    "group is 1; a group needs 2": lambda: build(dict(group=1)),
    "dpo trains pairs": lambda: build(**LATENTS, objective="dpo"),
    "would split the two videos of a pair": lambda: build(
        **LATENTS | dict(rollout=dict(window="none", prompts=3, micro_batch=3)),
        objective="dpo",
        best=1,
        worst=1,
    ),
    "trains on the best videos only": lambda: build(**LATENTS, objective="sft", best=1, worst=1),
    "use fewer than the 4 of rollout.steps": lambda: build(
        **LATENTS | dict(rollout=dict(window="none", steps=4)), objective="reward_gradient"
    ),
    "kl_weights sigma weighs the steps of reward_gradient": lambda: build(kl_weights="sigma"),
    "is on-policy": lambda: build(**LATENTS, objective="reward_gradient", epochs=2),
    "more than the 8 videos of a group": lambda: build(best=5, worst=4),
    "time_weights has no effect with objective 'guard'": lambda: build(
        objective="guard", time_weights=True
    ),
    "does not divide the 16 prompts": lambda: build(updates=3),
    "or the 64 rows of one of 1 updates": lambda: build(dict(micro_batch=128), best=2, worst=2),
    "penalties has no 'swap'; did you mean swapped": lambda: RewardConfig(penalties={"swap": 1.0}),
    "swapped is 'much'; use a number": lambda: RewardConfig(penalties={"swapped": "much"}),
    "reward.mixture: mimr is 'much'; use a number": lambda: RewardConfig(mixture={"mimr": "much"}),
    "person_similarity needs a network of whole people": lambda: RewardConfig(
        mixture={"person_similarity": 0.5}
    ),
    "person_similarity_min without the reward teaches clothes alone": lambda: RewardConfig(
        people="dino", mixture={"reward": 0, "person_similarity_min": 1, "motion": 1}
    ),
    "grpo.pair_terms: person_similarity without the reward": lambda: Config(
        rollout=RolloutConfig(window="none"),
        grpo=GrpoConfig(
            objective="dpo",
            kl_units="velocity",
            pairs="dominance",
            pair_terms={"person_similarity": 1.0},
            best=1,
            worst=1,
        ),
        reward=RewardConfig(people="dino"),
    ),
    "reward.people extends the face reward in JAX": lambda: RewardConfig(
        people="dino", backend="deepface:opencv/ArcFace"
    ),
    "reward.mixture weights advantages": lambda: Config(
        rollout=RolloutConfig(window="none"),
        grpo=GrpoConfig(objective="reward_gradient", kl_units="velocity"),
        reward=RewardConfig(mixture={"mimr": 1.0}),
    ),
    "train_layers blocks.1 selects weights, and model.train lora trains none": lambda: ModelConfig(
        train_layers="blocks.1"
    ),
    "model.adapter runs/a has no place with model.train full": lambda: ModelConfig(
        train="full", adapter="runs/a"
    ),
    "--model.rank: model.train full trains no adapter; leave it out": lambda: override(
        Config(), [("model.train", "full"), ("model.rank", "4")]
    ),
    "model.train is 'all'; use lora or full": lambda: ModelConfig(train="all"),
    "solver is 'heun'": lambda: EvaluateConfig(solver="heun"),
    "config: evaluate.frames is 10; use 4n+1, such as 33 or 81, or 0 for video's": lambda: (
        EvaluateConfig(frames=10)
    ),
    "evaluate.frames is -3": lambda: EvaluateConfig(frames=-3),
    "evaluate.height is 500; use a multiple of 16": lambda: EvaluateConfig(height=500),
    "evaluate.width is 8; use a multiple of 16": lambda: EvaluateConfig(width=8),
    "video.frames is 0; use 4n+1": lambda: VideoConfig(frames=0),
    "video.height is 0; use a multiple of 16": lambda: VideoConfig(height=0),
    "config: run.seed is 4294967296; use 0 to 4294967295": lambda: RunConfig(seed=2**32),
    "run.seed is -1": lambda: RunConfig(seed=-1),
    "run.seed is 607539957654043": lambda: override(Config(), [("run.seed", "607539957654043")]),
    "finetune.options: pool_seed is 18446744073709551616": lambda: transformer_options(
        pool_seed=2**64
    ),
    "--seed is 4294967296": lambda: captions.check_request("rl", 1, 2**32),
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_combinations_are_refused_with_the_reason(reason):
    with pytest.raises(UserError) as refused:
        WRONG[reason]()
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_right_combinations():
    fast = build(
        dict(window="per_prompt", window_size=1, steps=20, guidance=1.0), time_weights=True, kl=0.0
    )
    assert fast.rollout.trained_steps == 1
    assert fast.grpo.replays
    assert fast.grpo.on_policy
    pairs = build(**LATENTS, objective="dpo", best=1, worst=1, updates=4, epochs=2)
    assert (pairs.trained_rows, pairs.rows_per_call, pairs.grpo.optimizer_steps) == (32, 8, 8)
    assert build(dict(sampler="cps"), kl_units="velocity").rollout.trained_steps == 24
    changed = override(
        fast,
        [
            ("grpo.objective", "divergence"),
            ("rollout.sampler", "flow"),
            ("rollout.noise_level", "0.5"),
        ],
    )
    assert changed.grpo.objective == "divergence"
    assert changed.rollout.noise_level == 0.5


def test_every_seed_of_32_bits_is_taken():
    assert [RunConfig(seed=seed).seed for seed in (0, 2**32 - 1)] == [0, 2**32 - 1]
    assert transformer_options(pool_seed=2**32 - 1).pool_seed == 2**32 - 1


def test_upright_videos_are_evaluated_upright():
    """Options that turn the training videos turn a recipe's fixed size of evaluation; sizes that are given are kept."""
    wide = Config(evaluate=EvaluateConfig(frames=81, height=480, width=832))

    def size(*options):
        found = override(wide, list(options)).evaluate
        return found.height, found.width

    tall = (("video.height", "832"), ("video.width", "480"))
    with pytest.warns(
        UserWarning,
        match="evaluate.height is 832 and evaluate.width 480, turned as video.height 832",
    ):
        assert size(*tall) == (832, 480)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert size(*tall, ("evaluate.width", "832")) == (480, 832)
        assert size(("video.height", "480"), ("video.width", "832")) == (480, 832)
        assert size(("video.height", "416"), ("video.width", "416")) == (480, 832)
        assert override(Config(), list(tall)).evaluate.height == 0
        assert size(("run.seed", "1")) == (480, 832)


def test_cosines_may_be_left_to_the_networks():
    assert RewardConfig().missing is None
    changed = override(
        Config(),
        [
            ("reward.missing", "0.2"),
            ("reward.similarity_low", "none"),
            ("reward.similarity_high", "0.75"),
        ],
    )
    assert (
        changed.reward.missing,
        changed.reward.similarity_low,
        changed.reward.similarity_high,
    ) == (0.2, None, 0.75)
    with pytest.raises(UserError, match="--reward.missing: 'much' is not a number"):
        override(Config(), [("reward.missing", "much")])
    with pytest.raises(
        UserError, match=r"reward.similarity_low 0.9 is not below similarity_high 0.3"
    ):
        RewardConfig(similarity_low=0.9, similarity_high=0.3)


def test_every_field_is_described_for_help():
    text = "\n".join(schema.describe())
    for name in schema.field_names():
        assert f"--{name} " in text
    for section in get_type_hints(Config).values():
        for field in dataclasses.fields(section):
            assert len(field.metadata["help"]) > 10, (
                f"{section.__name__}.{field.name} has no description"
            )


def test_recipes_are_named_without_a_path():
    assert load("quickstart") == load(CONFIGS[0].parent / "quickstart.py")
    with pytest.raises(
        UserError, match=r"quikstart: no such file or recipe; did you mean quickstart"
    ):
        load("quikstart")
