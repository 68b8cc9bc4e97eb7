"""Task "transformer": flow matching of a VACE or Phantom transformer on synthetic clips of 1 to 3 people.

    x_sigma = (1 - sigma) x0 + sigma noise
    loss    = weighted mean of |v(x_sigma, t, text, control) - (noise - x0)|^2

As in the published models, x0 of VACE is `[references, video]` in normalised latents: reference
slots are denoised like any other frame, and the control branch supplies the clean photos. x0 of
Phantom is the video, and the clean photos follow it.
sigma = shift u / (1 + (shift - 1) u) with stratified u, and t = trunc(1000 sigma), as in the
sampler's schedule. A share of the prompts is replaced by the negative prompt, so that the model
learns the unconditional branch of guidance. All clips of a batch have the same number of people, so
there is no padding. A share of the batches has no photos: text to video, which is the weakened branch
of photo guidance (`evaluate.weakened`). VACE then has no slots for them, and Phantom zeros.

With `video.frames` 1 the clips are pictures, which cost a third and teach faces before motion.

Clips and photos are rendered and encoded once into a pool, a pure function of (seed, index); steps
sample from the pool.

`config.model.path` is the pipeline folder that supplies VAE, text encoder and tokenizer; they are
saved with the transformer. `config.video` and `config.data` supply the size of the videos, the text
length and the negative prompt, and `config.rollout.shift` the shift.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int, PyTree
from PIL import Image

from jax_idgrpo import flow, rng
from jax_idgrpo.config import Config, require_seed
from jax_idgrpo.data.video import to_uint8
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.vae import PIXELS_PER_LATENT
from jax_idgrpo.models.wan import VaceConfig, WanConfig, WanTransformer
from jax_idgrpo.sampling import conditioning, rollout
from jax_idgrpo.sampling.pipeline import (
    Pipeline,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    save_pipeline,
    save_transformer,
)
from jax_idgrpo.sampling.policy import Policy, PolicyInputs
from jax_idgrpo.sampling.tokenizer import Tokenizer
from jax_idgrpo.synthetic import captions, scenes
from jax_idgrpo.synthetic.training.text import tokenize
from jax_idgrpo.training.task import Loss, Task

CHUNK = 64  # clips that are rendered and encoded at once
# Loss weight of a reference slot. It is low because the control branch contains the clean photo.
REFERENCE_WEIGHT = 0.25


@dataclasses.dataclass(frozen=True)
class Options:
    """`finetune.options` of this task.

    Attributes:
      num_layers, num_heads, head_dim, ffn_dim, freq_dim: sizes of the transformer.
      pool: number of clips in the pool.
      vace_layers: blocks that receive VACE's control; empty for Phantom.
      pool_seed: seed of the pool.
      pool_file: file that stores the pool between runs; "" for none.
      face_weight: loss weight of latent cells inside faces; other cells have 1.
      text_dropout: share of prompts that are replaced by the negative prompt.
      photo_dropout: share of batches without photos.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    freq_dim: int
    pool: int
    vace_layers: Sequence[int] = ()
    pool_seed: int = 42
    pool_file: str = ""
    face_weight: float = 1.0
    text_dropout: float = 0.1
    photo_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.pool < CHUNK or self.pool % CHUNK:
            raise UserError(f"finetune.options: pool is {self.pool}; use a multiple of {CHUNK}")
        require_seed("finetune.options: pool_seed", self.pool_seed)
        object.__setattr__(self, "vace_layers", tuple(self.vace_layers))


class Pool(NamedTuple):
    """Encoded clips in float16.

    Attributes:
      video, photos: latents.
      text: text embeddings.
      weight: loss weight of the video's latent cells.
      people: number of people in each clip, int32.
      grey: latents of a grey video.
      negative: embedding of the negative prompt.
    """

    video: Float[np.ndarray, "n T h w C"]
    photos: Float[np.ndarray, "n M h w C"]
    text: Float[np.ndarray, "n L D"]
    weight: Float[np.ndarray, "n T h w"]
    people: Int[np.ndarray, " n"]
    grey: Float[np.ndarray, "T h w C"]
    negative: Float[np.ndarray, "L D"]


def cell_weight(
    boxes: Float[Array, "B F M 4"],
    visible: Float[Array, "B F M"],
    size: tuple[int, int],
    face: float,
) -> Array:
    """Compute the loss weight [B,T,h,w] of latent cells.

    The weight is 1 outside faces and `face` where a face covers the cell in all of its frames.

    Args:
      boxes: face boxes in pixels.
      visible: visible share of each face.
      size: (height, width) of the video in pixels.
      face: weight of a fully covered cell.
    """
    height, width = size
    y, x = (jnp.arange(n // PIXELS_PER_LATENT) * PIXELS_PER_LATENT for n in size)
    left, top, right, bottom = jnp.moveaxis(
        jnp.clip(boxes, 0, jnp.array([width, height, width, height])), -1, 0
    )[..., None]

    def overlap(low: Array, high: Array, cell: Array) -> Array:
        return (
            jnp.clip(jnp.minimum(high, cell + PIXELS_PER_LATENT) - jnp.maximum(low, cell), 0)
            / PIXELS_PER_LATENT
        )

    share = (
        overlap(top, bottom, y)[..., :, None] * overlap(left, right, x)[..., None, :]
    )  # [B,F,M,h,w]
    share = jnp.max(share * (visible > 0.2)[..., None, None], axis=2)
    groups = (share.shape[1] - 1) // flow.FRAMES_PER_LATENT
    rest = share[:, 1:].reshape(share.shape[0], groups, flow.FRAMES_PER_LATENT, *share.shape[2:])
    return 1 + (face - 1) * jnp.concatenate([share[:, :1], rest.mean(axis=2)], axis=1)


def build_pool(
    vae: nnx.Module,
    text_encoder: nnx.Module,
    tokenizer: Tokenizer,
    config: Config,
    options: Options,
) -> Pool:
    """Render and encode the pool.

    Args:
      vae: encodes clips and photos.
      text_encoder: encodes prompts.
      tokenizer: tokenizer of the text encoder.
      config: configuration of the run.
      options: options of the task.
    """
    video, length = config.video, config.data.text_length
    size = (video.height, video.width)
    graph, state = nnx.split((vae, text_encoder))

    @jax.jit
    def draw(index: Array) -> tuple[scenes.Batch, Array]:
        batch = scenes.batch(options.pool_seed, index, CHUNK, "train", video.frames, size)
        return batch, cell_weight(batch.boxes, batch.visible, size, options.face_weight)

    @jax.jit
    def encode(state: nnx.State, clips: Array, portraits: Array) -> tuple[Array, Array]:
        vae, _ = nnx.merge(graph, state)
        photos = vae.encode(portraits.reshape(-1, 1, *portraits.shape[2:]))[:, 0]
        return vae.encode(clips).astype(jnp.float16), photos.reshape(
            *portraits.shape[:2], *photos.shape[1:]
        ).astype(jnp.float16)

    @jax.jit
    def read(state: nnx.State, ids: Array, mask: Array) -> Array:
        return nnx.merge(graph, state)[1](ids, mask).astype(jnp.float16)

    def chunk(index: int) -> tuple[np.ndarray, ...]:
        batch, weight = draw(index)
        latents, photos = encode(state, batch.video, batch.portraits)
        text = read(state, *tokenize(tokenizer, captions.prompts(batch), length))
        people = jnp.sum(batch.mask, axis=1).astype(jnp.int32)
        return jax.device_get((latents, photos, text, weight.astype(jnp.float16), people))

    count = options.pool // CHUNK
    chunks = []
    with (
        concurrent.futures.ThreadPoolExecutor(2) as threads,  # rendering uses one CPU core
        progress("rendering and encoding clips", count) as update,
    ):
        for made in threads.map(chunk, range(count)):
            chunks.append(made)
            update(len(chunks))
    grey, _ = encode(state, jnp.zeros((1, video.frames, *size, 3)), jnp.zeros((1, 1, *size, 3)))
    negative = read(
        state, *tokenize(tokenizer, [conditioning.negative_prompt(config.data)], length)
    )
    return Pool(
        *(np.concatenate(parts) for parts in zip(*chunks, strict=True)),
        *jax.device_get((grey[0], negative[0])),
    )


def _fingerprint(config: Config, options: Options, networks: PyTree) -> str:
    """Hash everything that a pool depends on."""
    digest = hashlib.sha256(
        repr(
            (options.pool_seed, config.video, config.data, options.pool, options.face_weight)
        ).encode()
    )
    for leaf in jax.tree.leaves(nnx.state(networks)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def stored_pool(
    vae: nnx.Module,
    text_encoder: nnx.Module,
    tokenizer: Tokenizer,
    config: Config,
    options: Options,
) -> Pool:
    """Load the pool of `options.pool_file` if its fingerprint matches; else build and store it.

    Args: those of `build_pool`.
    """
    if not options.pool_file:
        return build_pool(vae, text_encoder, tokenizer, config, options)
    path, mark = Path(options.pool_file), _fingerprint(config, options, (vae, text_encoder))
    if path.is_file():
        with np.load(path) as stored:
            if str(stored["mark"]) == mark:
                return Pool(*(stored[name] for name in Pool._fields))
    pool = build_pool(vae, text_encoder, tokenizer, config, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part.npz")
    np.savez(partial, mark=mark, **pool._asdict())
    partial.rename(path)
    return pool


def pick(
    pool: Pool,
    rows_of: dict[int, np.ndarray],
    size: int,
    text_dropout: float,
    photo_dropout: float,
    seed: int,
    step: int,
    blank: bool = False,
) -> dict[str, np.ndarray]:
    """Sample a float32 batch of clips with the same number of people.

    Args:
      pool: encoded clips.
      rows_of: indices of the clips by number of people.
      size: clips per batch.
      text_dropout: share of prompts that are replaced by the negative prompt.
      photo_dropout: share of batches without photos.
      seed: seed of the run.
      step: training step.
      blank: whether a batch without photos has zeros in their place.
    """
    rng = np.random.default_rng([seed, step])
    people = int(rng.choice(pool.people))
    rows = rng.choice(rows_of[people], size)
    dropped = rng.random(size) < text_dropout
    photos = pool.photos[rows, :people].astype(np.float32)
    if rng.random() < photo_dropout:
        photos = np.zeros_like(photos) if blank else photos[:, :0]
    return {
        "video": pool.video[rows].astype(np.float32),
        "photos": photos,
        "text": np.where(dropped[:, None, None], pool.negative, pool.text[rows]).astype(np.float32),
        "weight": pool.weight[rows].astype(np.float32),
    }


def loss(
    transformer: Callable[..., Array],
    batch: dict[str, ArrayLike],
    key: Array,
    *,
    grey: Array | None,
    order: str,
    shift: float,
) -> Loss:
    """Compute the flow-matching loss of a batch, and the unweighted error of the video frames.

    Args:
      transformer: velocity network.
      batch: result of `pick`.
      key: key of noise and sigma.
      grey: latents of a grey video for VACE; None for Phantom.
      order: order of VACE's references, `data.reference_order`.
      shift: shift of the schedule.
    """
    video, photos = batch["video"], batch["photos"]
    rows = len(video)
    noise_key, sigma_key = jax.random.split(key)
    if grey is None:
        people, x0 = 0, jnp.asarray(video)

        def velocity_of(x: Array, timestep: Array) -> Array:
            both = jnp.concatenate([x, photos], axis=1)
            return transformer(both, timestep, batch["text"])[:, : x.shape[1]]

    else:
        people = photos.shape[1]
        control = jax.vmap(lambda p: conditioning.control(p, grey, people, order))(photos)
        x0 = jnp.concatenate([control[:, :people, ..., : photos.shape[-1]], video], axis=1)

        def velocity_of(x: Array, timestep: Array) -> Array:
            return transformer(x, timestep, batch["text"], control)

    u = (jnp.arange(rows) + jax.random.uniform(sigma_key, (rows,))) / rows
    sigma = flow.shifted(u, shift)
    noise = jax.random.normal(noise_key, x0.shape)
    wide = sigma[:, None, None, None, None]
    velocity = velocity_of((1 - wide) * x0 + wide * noise, flow.timestep(sigma))
    error = jnp.mean((velocity - (noise - x0)) ** 2, axis=-1)
    weight = jnp.pad(
        batch["weight"], ((0, 0), (people, 0), (0, 0), (0, 0)), constant_values=REFERENCE_WEIGHT
    )
    return jnp.sum(weight * error) / jnp.sum(weight), {"video_error": jnp.mean(error[:, people:])}


def eval_conditioning(
    pipe: Pipeline, batch: scenes.Batch, config: Config
) -> conditioning.Conditioning:
    """Encode the portraits and prompts of clips, padded to `config.data.max_people`.

    Args:
      pipe: pipeline that encodes.
      batch: rendered clips.
      config: configuration of the run.
    """
    encode = nnx.jit(type(pipe.vae).encode)
    grey = encode(pipe.vae, jnp.zeros((1, *batch.video.shape[1:])))[0]
    photos = encode(
        pipe.vae, jnp.asarray(batch.portraits).reshape(-1, 1, *batch.portraits.shape[2:])
    )
    photos = photos.reshape(*batch.portraits.shape[:2], *photos.shape[2:])
    people, most, order = (
        batch.mask.sum(axis=1),
        config.data.max_people,
        config.data.reference_order,
    )
    length = config.data.text_length
    text = [
        conditioning.padded(text, length)
        for text in conditioning.encode_texts(pipe, captions.prompts(batch), length)
    ]
    if pipe.kind != "vace":
        shown = jnp.arange(most) < jnp.asarray(people)[:, None]
        return conditioning.Conditioning(
            text=np.stack(text),
            control=None,
            frame_mask=jnp.ones((len(people), len(grey)), bool),
            references=jnp.asarray(people),
            reference_latents=jnp.where(shown[..., None, None, None], photos[:, :most], 0.0),
        )
    return conditioning.Conditioning(
        text=np.stack(text),
        control=jnp.stack(
            [
                conditioning.control(row[:count], grey, most, order)
                for row, count in zip(photos, people, strict=True)
            ]
        ),
        frame_mask=conditioning.frame_mask(jnp.asarray(people), len(grey), most),
        references=jnp.asarray(people),
    )


def sample_clips(
    pipe: Pipeline, given: conditioning.Conditioning, config: Config
) -> Float[np.ndarray, "n F H W 3"]:
    """Sample one clip per row of the conditioning, deterministically, with guidance.

    Args:
      pipe: pipeline.
      given: conditioning of the clips.
      config: supplies `rollout.steps` and `rollout.guidance`.
    """
    graph, base = nnx.split(pipe.transformer)
    # A model with a branch for the photos is sampled without guidance by them.
    photos = None if config.kind.image_guidance is None else 1.0
    policy = Policy(graph, graph, config.rollout.guidance, photos)
    negative = conditioning.encode_negative(pipe, config.data)
    rows = rng.row_keys(
        rng.key(config.run.seed, "evaluate"),
        jnp.arange(len(given.text)),
        jnp.zeros(len(given.text), jnp.int32),
    )
    x = rollout.generate(
        policy,
        PolicyInputs(None, base, given, negative),
        rollout.Schedule.make(config.rollout.steps, pipe.shift),
        rows,
    )
    latents = conditioning.video_latents(
        x, given.video_start, given.video_frames(config.data.max_people)
    )
    return np.asarray(nnx.jit(type(pipe.vae).decode)(pipe.vae, latents))


def contact_sheet(pipe: Pipeline, config: Config, count: int = 12) -> np.ndarray:
    """Render a uint8 picture with one row per held-out prompt.

    A row has the photos, then every other frame of a sampled clip.

    Args:
      pipe: pipeline.
      config: configuration of the run.
      count: number of prompts.
    """
    size = (config.video.height, config.video.width)
    batch = jax.device_get(
        scenes.batch(config.run.seed, 0, count, "eval", config.video.frames, size)
    )
    clips = sample_clips(pipe, eval_conditioning(pipe, batch, config), config)
    tiles = np.concatenate([batch.portraits, clips[:, ::2]], axis=1)  # [n, tiles, H, W, 3]
    return to_uint8(np.concatenate(np.moveaxis(tiles, 1, 2).reshape(count, size[0], -1, 3)))


def make(config: Config) -> Task:
    """Make the task."""
    try:
        options = Options(**config.finetune.options)
    except TypeError as error:
        raise UserError(
            f"finetune.options of task transformer: {str(error).split('() ')[-1]}"
        ) from None
    folder, shift = config.model.folder(), config.rollout.shift
    if (kind := config.model.kind) not in ("vace", "phantom"):
        raise UserError(
            f"model.kind is {kind}; the task transformer trains vace or phantom; use one of them"
        )
    if bool(options.vace_layers) != (kind == "vace"):
        raise UserError(
            f"finetune.options of task transformer: vace_layers is {list(options.vace_layers)}; name "
            "the blocks with control for vace, and leave it out for phantom"
        )
    if shift <= 0:
        raise UserError(
            "rollout.shift is 0; this task creates the checkpoint, "
            "so set the shift of the training, such as 3.0"
        )
    vae, text_encoder, tokenizer = (
        load_vae(folder),
        load_text_encoder(folder),
        load_tokenizer(folder),
    )
    sizes = {
        name: getattr(options, name)
        for name in ("num_layers", "num_heads", "head_dim", "ffn_dim", "freq_dim")
    }
    shape = WanConfig(
        **sizes,
        vace=VaceConfig(tuple(options.vace_layers)) if kind == "vace" else None,
        text_dim=text_encoder.config.d_model,
        remat=config.model.remat,
        unroll=config.model.unroll,
    )

    @functools.cache
    def pool() -> tuple[Pool, dict[int, np.ndarray]]:
        made = stored_pool(vae, text_encoder, tokenizer, config, options)
        return made, {
            int(count): np.flatnonzero(made.people == count) for count in np.unique(made.people)
        }

    def init(key: Array) -> WanTransformer:
        if config.finetune.start:
            return load_transformer(
                config.finetune.start, config.model.dtype, remat=shape.remat, unroll=shape.unroll
            )
        return WanTransformer(
            shape, dtypes=Dtypes.named(config.model.dtype), rngs=nnx.Rngs(params=key)
        )

    def batch(seed: int, step: int) -> dict[str, np.ndarray]:
        return pick(
            *pool(),
            config.finetune.batch,
            options.text_dropout,
            options.photo_dropout,
            seed,
            step,
            blank=kind == "phantom",
        )

    def flow_loss(transformer: WanTransformer, batch: dict[str, ArrayLike], key: Array) -> Loss:
        grey = jnp.asarray(pool()[0].grey, jnp.float32) if kind == "vace" else None
        return loss(
            transformer, batch, key, grey=grey, order=config.data.reference_order, shift=shift
        )

    def pipe(transformer: WanTransformer, path: Path) -> Pipeline:
        return Pipeline(transformer, vae, text_encoder, tokenizer, shift, kind, path)

    def save(transformer: WanTransformer, path: Path) -> None:
        # The folder contains the other parts already, possibly newer than those in memory.
        if path.resolve() == folder.resolve():
            save_transformer(transformer, path, shift)
        else:
            save_pipeline(pipe(transformer, path), path)

    def preview(transformer: WanTransformer, path: Path) -> None:
        save_pipeline(pipe(transformer, path), path / "pipeline")
        Image.fromarray(contact_sheet(pipe(transformer, path), config)).save(path / "clips.png")

    return Task(init=init, batch=batch, loss=flow_loss, save=save, preview=preview)
