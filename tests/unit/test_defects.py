"""What the published training code gets wrong, and the test that shows it is right here.

The numbers are those of the list of defects that users of that code meet (averages stepped too often, prompts repeated, groups pooled by
caption, resume that restores nothing, ...). Most are properties that some other file tests; they are named here, and must exist. Two belong
to the published recipe and are options: the noise of the last step (10) and the weights of the steps (12).
"""

import ast
import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from jax_idgrpo import config as c
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.rewards import factory
from jax_idgrpo.sampling import policy
from jax_idgrpo.training import selection, setup, train, update
from tests.helpers.paths import ROOT

ELSEWHERE = {
    1: "test_optimizer.py::test_published_average",
    2: "test_prompts.py::test_order_is_a_permutation_per_pass_and_resumes_by_step",
    3: "test_train.py::test_a_prompt_that_comes_twice_gets_other_noise",
    5: "test_update.py::test_a_row_does_not_depend_on_its_neighbours_or_on_its_padding",
    6: "test_train.py::test_resume_equals_never_having_stopped",
    10: "test_update.py::test_rows_outside_their_window_take_euler_steps",
    12: "test_grpo.py::test_time_weights_reproduce_the_released_table",
    13: "test_train.py::test_what_is_trained_is_decided_on_all_groups",
    15: "test_evaluate.py::test_a_video_does_not_depend_on_its_batch",
    16: "test_evaluate.py::test_a_video_does_not_depend_on_its_batch",
    17: "test_conditioning.py::test_each_prompt_is_encoded_once_and_each_photo_decoded_once",
    19: "test_grpo.py::test_loss_and_gradient_equal_the_published_code",
    21: "test_prompts.py::test_every_mode_becomes_rgb",
    22: "test_train.py::test_a_step_logs_more_than_its_mean_reward",
    23: "test_identity.py::test_a_frozen_video_and_extra_faces_cost",
}
HERE = {4, 7, 8, 9, 11, 14, 18, 20}


def test_every_defect_has_its_test():
    assert set(ELSEWHERE) | HERE == set(range(1, 24))
    here = Path(__file__).read_text()
    assert all(re.search(rf"^def test_(\d+_and_)?{number}_", here, re.MULTILINE) for number in HERE)
    for place in ELSEWHERE.values():
        file, name = place.split("::")
        tiers = (ROOT / "tests").glob(f"*/{file}")
        assert any(f"def {name}(" in path.read_text() for path in tiers), place


def test_4_one_caption_with_other_photos_is_another_group():
    rewards = np.array(
        [[0.1, 0.2], [0.8, 0.9]], np.float32
    )  # two prompts of one text: the first photos are the harder ones
    advantage, _, _ = selection.choose(c.GrpoConfig(), rewards, {}, {})
    np.testing.assert_allclose(advantage[0], advantage[1], atol=1e-3)
    assert advantage[0, 0] < 0 < advantage[0, 1]  # pooled, the whole first group would be negative


def test_7_videos_go_to_the_reward_as_they_are_and_files_have_the_frame_rate(tmp_path):
    import av

    config = c.Config(
        video=c.VideoConfig(frames=5, height=16, width=16, fps=16),
        rollout=c.RolloutConfig(prompts=1, group=2),
    )
    videos = np.zeros((2, 5, 16, 16, 3), np.float32)
    train.write_samples(tmp_path / "s", videos, [Prompt(3, "a", ())], config)
    with av.open(str(tmp_path / "s" / "0003-1.mp4")) as container:
        assert container.streams.video[0].average_rate == 16
    loads = {
        node.func.id
        for node in ast.walk(ast.parse(Path(train.__file__).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "read_video" not in loads  # nothing that training scores was ever a file


def test_8_rewards_are_float32_whatever_the_videos_are():
    reward = factory.make_face_reward(c.RewardConfig(frames=1))
    videos = jax.ShapeDtypeStruct((2, 5, 64, 64, 3), jnp.bfloat16)
    terms = jax.eval_shape(reward.apply, reward.state, videos, reward.shapes(2, 1))
    assert {term.dtype for term in terms.values()} == {jnp.dtype("float32")}


def test_9_and_14_only_the_adapter_is_trained_and_it_starts_at_the_base():
    pipe = setup.load(c.Config(model=c.ModelConfig(rank=2, alpha=2.0)))
    _, lora, _ = policy.split(pipe.transformer, 1.0)
    leaves = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(lora)
    }
    assert leaves
    assert all("lora_" in name for name in leaves)
    assert not any(np.any(leaf) for name, leaf in leaves.items() if "lora_b" in name)


def test_11_one_update_per_rollout_and_shares_of_whole_groups():
    assert c.GrpoConfig().on_policy
    prompts, group = 4, 2
    of_row = np.repeat(np.arange(prompts), group).reshape(4, group)
    shares = [of_row[update.share(number, len(of_row), 2)].ravel().tolist() for number in (0, 1, 2)]
    assert shares == [
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [0, 0, 1, 1],
    ]  # the third is the first of the second epoch


def test_18_states_are_stored_once():
    from jax_idgrpo.sampling.rollout import Trajectory

    states = {field.name for field in dataclasses.fields(Trajectory)}
    assert states == {
        "latents",
        "x",
        "velocity",
        "log_prob",
    }  # x [K+1]: a step's end is the next one's start; no control


def test_20_every_option_is_read_somewhere():
    read = set()
    for path in (ROOT / "jax_idgrpo").rglob("*.py"):
        tree = ast.parse(path.read_text())
        checks = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
            for inner in ast.walk(node)
        }
        read |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node not in checks
        }
        read |= {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    unread = [
        f"{section}.{field.name}"
        for section, schema in get_type_hints(c.Config).items()
        for field in dataclasses.fields(schema)
        if field.name not in read
    ]
    assert not unread, f"dead options: {unread}"
