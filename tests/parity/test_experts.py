"""Sampling with two experts against diffusers' WanVACEPipeline: random transformers, a whole run."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanVACEPipeline
from flax import nnx
from PIL import Image

from checkpoints_convert import store
from checkpoints_convert.__main__ import run as convert
from jax_idgrpo import config as c
from jax_idgrpo import flow, rng
from jax_idgrpo.config.video_model import EMBEDDED
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.evaluation.sampler import make_models, make_sampler
from jax_idgrpo.models.experts import NAMES
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.sampling import conditioning, rollout
from jax_idgrpo.sampling.adapters import add_adapter, save_lora
from jax_idgrpo.sampling.pipeline import load_transformer
from jax_idgrpo.sampling.policy import PolicyInputs
from tests.helpers import torch_models
from tests.helpers.comparison import relative_error
from tests.helpers.noise import add_noise
from tests.helpers.torch_models import channels_first

STEPS, SHIFT, BOUNDARY, TEXT = 6, 12.0, 0.875, 32
FRAMES, SIZE = 5, 32
GUIDANCE, GUIDANCE_2 = 5.0, 3.0


class OurSigmas(UniPCMultistepScheduler):
    """UniPC at the noise levels of diffusers 0.33 to 0.36, which later versions changed."""

    def set_timesteps(self, num_inference_steps, device=None):
        unshifted = np.flip(1 - np.linspace(1, 1 / 1000, num_inference_steps + 1))[:-1]
        super().set_timesteps(sigmas=unshifted, device=device)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A pipeline of two random experts, and its folder as diffusers saves it."""
    pipe = WanVACEPipeline.from_pretrained(EMBEDDED / "pipeline")
    high, low = (
        torch_models.vace((0, 2), seed, text_dim=64, num_layers=3, rope_max_seq_len=1024)
        for seed in (1, 2)
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    pipe = WanVACEPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder,
        vae=pipe.vae,
        scheduler=scheduler,
        transformer=high,
        transformer_2=low,
        boundary_ratio=BOUNDARY,
    )
    folder = tmp_path_factory.mktemp("experts") / "pipeline"
    pipe.save_pretrained(folder)
    assert store.read_json(folder / "model_index.json")["boundary_ratio"] == BOUNDARY
    pipe.scheduler = OurSigmas.from_config(scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@pytest.fixture(scope="module")
def adapters(theirs, tmp_path_factory):
    """Random adapters of both experts, and the same as diffusers' LoRA files."""
    folders = [tmp_path_factory.mktemp("adapters") / name for name in ("peft", "diffusers")]
    for name, part in zip(NAMES, ("transformer", "transformer_2"), strict=True):
        network = load_transformer(theirs[1] / part)
        network = add_adapter(network, 2, 4.0, rng.key(len(name), "init"))
        add_noise(network)
        save_lora(folders[0] / name, nnx.state(network, LoRAParam), network.config)
    assert convert(["export", *map(str, folders), "--format", "diffusers-lora"]) == 0
    return folders


def photo(path):
    noise = np.random.default_rng(3).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 50), Image.Resampling.BICUBIC).save(path)
    return path


def test_a_sampling_run_with_two_experts_equals_diffusers(theirs, adapters, tmp_path):
    """With the base, and with an adapter for each expert."""
    pipe, folder = theirs
    file, text = photo(tmp_path / "a.png"), "a person in a red coat"
    config = c.Config(
        model=c.ModelConfig(path=str(folder)),
        data=c.DataConfig(max_people=1, text_length=TEXT, negative_prompt="blurry"),
        video=c.VideoConfig(frames=FRAMES, height=SIZE, width=SIZE),
        rollout=c.RolloutConfig(guidance=GUIDANCE, guidance_2=GUIDANCE_2),
        evaluate=c.EvaluateConfig(steps=STEPS, solver="unipc", batch=1),
    )
    sampler = make_sampler(config)
    assert sampler.pipe.boundary == BOUNDARY
    assert sampler.schedule.counts == (4, 2)
    np.testing.assert_array_equal(sampler.schedule.timestep, flow.timesteps(STEPS, SHIFT))
    models = make_models(sampler, {"tuned": adapters[0]})
    model = models["base"]
    given = conditioning.encode(
        sampler.pipe, [Prompt(0, text, (file,))], config, conditioning.Cache()
    )
    noise = np.random.default_rng(4).standard_normal((1, *given.latent_shape))
    x = jnp.asarray(noise, jnp.float32)

    def run(guidance_2, lora, experts):
        actor = model.policy.with_guidance((GUIDANCE, guidance_2), None)
        inputs = PolicyInputs(lora, experts, given, sampler.negative)
        return np.asarray(rollout.denoise_experts(actor, inputs, sampler.schedule, x))

    def run_theirs():
        with torch.no_grad():
            latents = pipe(
                prompt=text,
                negative_prompt="blurry",
                reference_images=[Image.open(file)],
                height=SIZE,
                width=SIZE,
                num_frames=FRAMES,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                guidance_scale_2=GUIDANCE_2,
                latents=channels_first(np.asarray(x)),
                max_sequence_length=TEXT,
                output_type="latent",
            ).frames
        return np.moveaxis(latents.numpy(), 1, -1)

    want = run_theirs()
    assert relative_error(run(GUIDANCE_2, model.lora, model.base), want) < 1e-3
    # A wrong scale of the second expert, and swapped experts, would be seen.
    assert relative_error(run(GUIDANCE, model.lora, model.base), want) > 1e-2
    swapped = model.base.replace(high_noise=model.base.low_noise, low_noise=model.base.high_noise)
    assert relative_error(run(GUIDANCE_2, model.lora, swapped), want) > 1e-2

    pipe.load_lora_weights(adapters[1] / NAMES[0], adapter_name="high")
    pipe.load_lora_weights(adapters[1] / NAMES[1], adapter_name="low", load_into_transformer_2=True)
    tuned = run_theirs()
    assert relative_error(tuned, want) > 1e-2
    assert relative_error(run(GUIDANCE_2, models["tuned"].lora, model.base), tuned) < 1e-3
