"""Task "adapter": train the video model on your own clips or pairs of videos.

The clips are those of `video_clips`, as `idgrpo ingest` writes them; the pairs those of
`csv_source`. As in reinforcement learning, `model.train` selects what is trained and exported: a
LoRA on the frozen base, as the PEFT adapter that `model.adapter` starts from; or weights, as the
checkpoint that `model.path` starts from. Losses: `training.adapter_task`; encoded clips, photos and
texts: `training.clip_latents`.

The clip, window, photos and dropout of a row are functions of (seed, step, row). A photo of each
person is drawn from the person's photos ("random references"), so that the model cannot learn to
copy expression, light and background of one photo. A photo cut from the clip itself is used only if
there is no other, and is then mirrored and relit.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from jax_idgrpo.config import Config
from jax_idgrpo.data.video import contact_sheet
from jax_idgrpo.errors import UserError
from jax_idgrpo.evaluation.sampler import Model, Row, make_sampler
from jax_idgrpo.models.layers import LoRAParam
from jax_idgrpo.models.wan import WanTransformer
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import to_host
from jax_idgrpo.preferences.adapter_batches import (
    Prepared,
    face_encoder,
    held_out_batches,
    make_batch,
    prepare_rows,
    prompt_of,
)
from jax_idgrpo.preferences.adapter_rows import read_options, read_rows_of
from jax_idgrpo.rewards.base import DifferentiableReward, differentiable
from jax_idgrpo.rewards.factory import make_reward
from jax_idgrpo.sampling.adapters import save_lora
from jax_idgrpo.sampling.exports import save_checkpoint
from jax_idgrpo.sampling.pipeline import Pipeline
from jax_idgrpo.sampling.weights import TrainedWeights, select_weights
from jax_idgrpo.training.adapter_task import (
    WINNERS_WORSE,
    ClipBatch,
    Fixed,
    Learner,
    make_held_out,
    sampling_policy,
)
from jax_idgrpo.training.identity_loss import IdentityLoss
from jax_idgrpo.training.setup import described, load, score_latents
from jax_idgrpo.training.task import Loss, Task

SHOWN = 4  # clips of a preview
KINDS = ("vace", "phantom", "refalign")


def check_config(config: Config) -> None:
    """Refuse settings that the task cannot follow.

    Raises:
      UserError: names the field.
    """
    model = config.model
    if model.kind not in KINDS:
        raise UserError(
            f"model.kind {model.kind}: the task adapter trains {', '.join(KINDS)}; use one of them"
        )
    if config.finetune.start:
        raise UserError(
            f"finetune.start {config.finetune.start}: the task adapter continues an adapter with "
            "--model.adapter, and a checkpoint with --model.path; leave finetune.start out"
        )


def make(config: Config) -> Task:
    """Make the task.

    Raises:
      UserError: an option, the clips or the pairs cannot be used.
    """
    options = read_options(config.finetune.options)
    check_config(config)
    rows = read_rows_of(options, config.data.max_people)
    full = config.model.train == "full"
    placed = next((video for video in rows.all if video.places), None)
    if placed is not None and config.model.kind != "vace":
        raise UserError(
            f"clips {options.clips}: {placed.path.name} has places, which are an input of VACE, and "
            f"model.kind is {config.model.kind}; leave the column places out"
        )
    held: dict[str, Prepared] = {}

    @functools.cache
    def pipe() -> Pipeline:
        made = load(config, sharding.make_mesh(config.mesh))
        if len(made.transformers) > 1:
            raise UserError(
                f"model.path {config.model.path} has two transformers; the task adapter trains one"
            )
        return made

    @functools.cache
    def reward() -> DifferentiableReward:
        return differentiable(make_reward(config, sharding.make_mesh(config.mesh)))

    @functools.cache
    def weights() -> TrainedWeights:
        return select_weights(pipe().transformer, config.model.train_layers)

    @functools.cache
    def learner() -> Learner:
        shift = config.rollout.shift or pipe().shift
        identity = None
        if options.identity_weight:
            scored = functools.partial(score_latents, reward().apply, config.data.max_people)
            identity = IdentityLoss(options.identity_weight, scored)
        chosen = weights() if full else None
        made = pipe().transformer, config, shift, held["rows"].grey
        return Learner.make(*made, chosen, identity)

    def prepare(workdir: Path) -> None:
        folder = Path(options.cache) if options.cache else workdir / "latents"
        found = prepare_rows(pipe(), config, options, rows, folder)
        if options.identity_weight:
            videos = [video for item in found.items for video in item]
            faces = face_encoder(reward(), videos, config.data.max_people)
            found = dataclasses.replace(found, faces=faces)
        held["rows"] = found

    def init(key: Array) -> WanTransformer:
        network = pipe().transformer
        if full:  # else the devices would hold the weights as they were read
            weights()
            pipe().transformer = described(network)
        return network

    def fixed(network: WanTransformer) -> Fixed:
        reference = learner().parts(network)[0] if full and options.loss == "dpo" else None
        scorer = None
        if options.identity_weight:
            scorer = nnx.split(pipe().vae), reward().state
        return Fixed(reference, scorer)

    def batch(seed: int, step: int) -> ClipBatch:
        return make_batch(held["rows"], config, options, seed, step)

    def loss(network: WanTransformer, batch: ClipBatch, key: Array, *fixed: Fixed) -> Loss:
        function = learner().flow_loss if options.loss == "flow" else learner().dpo_loss
        return function(network, batch, key, *fixed)

    def save(network: WanTransformer, folder: Path) -> None:
        training, steps = dataclasses.asdict(config), config.run.steps
        if full:
            save_checkpoint(folder, pipe(), nnx.state(network), training, steps, reuse=False)
        else:
            save_lora(
                folder, to_host(nnx.state(network, LoRAParam)), network.config, training, steps
            )

    def preview(network: WanTransformer, folder: Path) -> None:
        if jax.process_count() > 1:  # the network spans processes, and one of them calls this
            return
        shown = held["rows"].held_out or [item[0] for item in held["rows"].items]
        prompts = [
            dataclasses.replace(prompt_of(video, number), places=video.places)
            for number, video in enumerate(shown[:SHOWN])
        ]
        sampler = make_sampler(config, pipe())
        model = Model(*sampling_policy(network, config, weights() if full else None))
        videos = sampler.videos(model, [Row(prompt, 0) for prompt in prompts])
        contact_sheet(np.asarray(videos)[: len(prompts)]).save(folder / "clips.png")

    evaluate = None
    if rows.held_out:
        evaluate = make_held_out(
            learner,
            functools.cache(lambda: held_out_batches(held["rows"], config, options)),
            config.run.seed,
        )
    return Task(
        init=init,
        batch=batch,
        loss=loss,
        save=save,
        preview=preview,
        trained=LoRAParam,
        frozen=nnx.Not(LoRAParam),
        weights=(lambda network: weights()) if full else None,
        fixed=fixed if options.identity_weight or (full and options.loss == "dpo") else None,
        rows=rows.digests,
        prepare=prepare,
        evaluate=evaluate,
        evaluate_every=options.evaluate_every,
        stop=WINNERS_WORSE if options.loss == "dpo" else None,
    )
