"""ArcFace-R34 against the reference arrays and deepface's PyTorch class, on random weights and batch statistics."""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from checkpoints_convert import arcface as arcface_names
from checkpoints_convert import faces, rules
from jax_idgrpo.models.faces import arcface
from tests.helpers.comparison import largest_relative_error
from tests.helpers.paths import GOLDEN


def abstract(config):
    """The network's shapes, without memory."""
    return nnx.split(nnx.eval_shape(lambda: arcface.ArcFace(config, rngs=nnx.Rngs(0))))


def parameters(config):
    return sum(
        math.prod(leaf.shape)
        for leaf in jax.tree.leaves(nnx.state(nnx.merge(*abstract(config)), nnx.Param))
    )


def load(tensors):
    graph, state = abstract(arcface.ARCFACE_R34)
    return nnx.merge(
        graph,
        rules.to_jax(
            arcface_names.names(arcface.ARCFACE_R34), faces.without_counters(tensors), state
        ),
    )


@pytest.fixture(scope="module")
def deepface_model():
    os.environ["DEEPFACE_BACKEND_ENGINE"] = "pytorch"
    from deepface.models.facial_recognition.pytorch.ArcFace import ArcFaceModel

    return ArcFaceModel().eval()


def recipe(model, seed=1122):
    """The weights behind the reference arrays: uniform numbers in the order of the state dict."""
    rng = np.random.RandomState(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        u, shape = rng.random_sample(tuple(tensor.shape)), tuple(tensor.shape)
        if name.endswith(("running_mean", "bias")):
            value = 0.4 * u - 0.2
        elif name.endswith("running_var"):
            value = 0.5 + u
        elif len(shape) == 1:
            value = 0.1 + 0.3 * u if "prelu" in name else 0.5 + u
        else:
            value = (2 * u - 1) * np.sqrt(3 / np.prod(shape[1:]))
        state[name] = value.astype(np.float32)
    return state


def test_equals_deepface_and_the_reference_arrays(deepface_model):
    import torch

    state = recipe(deepface_model)
    deepface_model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in state.items()}, strict=False
    )
    network = load(deepface_model.state_dict())
    golden = np.load(GOLDEN / "faces_arcface.npz")
    images = golden["images"].astype(np.float32) / 255
    with torch.no_grad():
        theirs = deepface_model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    ours = nnx.jit(lambda m, x: m(x))(network, jnp.asarray(images[..., ::-1] * 2 - 1))
    assert largest_relative_error(ours, theirs) < 1e-4
    assert largest_relative_error(ours, golden["embeddings"]) < 1e-4
    back = rules.to_torch(arcface_names.names(arcface.ARCFACE_R34), nnx.state(network))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (arcface.ARCFACE_R34, 34_139_328),
        (arcface.IRESNET_34, 34_139_328 - 512),
        (arcface.IRESNET_50, 43_590_848 - 512),
        (arcface.IRESNET_100, 65_156_160 - 512),
        (arcface.IR_101, 65_150_912),
    ],
)
def test_parameter_counts(config, expected):
    """Published totals; the fixed scale of the last norm of IResNet is not a parameter of ours."""
    assert parameters(config) == expected
