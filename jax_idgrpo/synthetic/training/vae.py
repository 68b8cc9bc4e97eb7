"""Train a small Wan VAE on synthetic people: first on single pictures, then also on clips.

    d    = colours (y - x),  where y is the reconstruction of x
    loss = sum over groups of share * (|d| + edges * |grad d|), pixel weights 1 or `face_weight`
           + kl * (mean of the Kullback-Leibler divergence per latent value)

A group is a set of videos of one length. A step without clips has frames of clips and portraits on
white. From step `clips_from`, every `clips_every`-th step has `finetune.batch` clips and additional
pictures. The convolutions are initialised to ignore earlier frames (`WanVAE`), so the training on
pictures carries over to clips. Windows of `crop` pixels around a face give more faces per second
than whole pictures. Training the decoder only leaves the latents unchanged.

`config.video` supplies the size of the pictures. `finetune.options`:
    base_dim, dim_mult, num_res_blocks  sizes of the network (`VAEConfig`)
    train                               "all", or "decoder": decode the posterior's mean, and keep
                                        the latents' statistics
    pictures, pictures_beside_clips     [frames of clips, portraits] in steps without and with clips
    clips_from, clips_every, frames     steps with clips, and the length of clips, 1 + 4n
    crop                                height and width of a window; 0 for the whole picture
    face_weight, edges, kl, colours     parameters of the loss; colours is a 3x3 matrix on RGB
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key
from PIL import Image

from jax_idgrpo import rng
from jax_idgrpo.config import Config
from jax_idgrpo.models.vae import VAEConfig, WanVAE
from jax_idgrpo.sampling import pipeline
from jax_idgrpo.synthetic import renderer, scenes
from jax_idgrpo.synthetic.people import Identity, identity
from jax_idgrpo.training.task import Loss, Task

TEMPORAL_DOWNSAMPLE = (False, True, True)
Z_DIM = 16
# Batches and rows (of clips, and of portraits) for the mean and spread of the latents.
STATISTICS_BATCHES, STATISTICS_ROWS = 8, 16
PREVIEW_ROWS = 6


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("video", "weight"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Group:
    """Videos of one length, and the loss weight of each pixel."""

    video: Float[Array, "*B F H W 3"]
    weight: Float[Array, "*B F H W"]


def make(config: Config) -> Task:
    """Make the task; the module's docstring lists its options."""
    options = config.finetune.options
    size = config.video.size
    decoder_only = {"all": False, "decoder": True}[options["train"]]

    def init(key: Key[Array, ""]) -> WanVAE:
        if config.finetune.start:
            return pipeline.load_vae(config.finetune.start)
        sizes = VAEConfig(
            base_dim=options["base_dim"],
            dim_mult=tuple(options["dim_mult"]),
            num_res_blocks=options["num_res_blocks"],
            temporal_downsample=TEMPORAL_DOWNSAMPLE,
            latents_mean=(0.0,) * Z_DIM,
            latents_std=(1.0,) * Z_DIM,
            z_dim=Z_DIM,
        )
        return nnx.jit(lambda key: WanVAE(sizes, rngs=nnx.Rngs(params=key)))(key)

    def batch(seed: int, step: int) -> tuple[Group, ...]:
        key, view = (
            rng.fold(rng.key(seed, "data"), step),
            View("train", size, options["face_weight"], options["crop"]),
        )
        if step < options["clips_from"] or (step + 1) % options["clips_every"]:
            return (_draw_pictures(key, *options["pictures"], view),)
        beside = options["pictures_beside_clips"]
        return _draw_mixed(key, config.finetune.batch, options["frames"], *beside, view)

    def loss(network: WanVAE, batch: tuple[Group, ...], key: Key[Array, ""]) -> Loss:
        weights = LossWeights(
            options["edges"], options["kl"], jnp.asarray(options["colours"], jnp.float32)
        )
        return reconstruction_loss(network, batch, key, weights, decoder_only=decoder_only)

    def save(network: WanVAE, folder: Path) -> None:
        if not decoder_only:
            network = with_statistics(network, config.run.seed, options["frames"], size)
        pipeline.save_vae(network, folder)

    def preview(network: WanVAE, folder: Path) -> None:
        key = rng.key(config.run.seed, "evaluate")
        groups = _draw_mixed(
            key,
            PREVIEW_ROWS,
            options["frames"],
            PREVIEW_ROWS // 2,
            PREVIEW_ROWS // 2,
            View("eval", size),
        )
        for name, group in zip(("clips", "pictures"), groups, strict=True):
            strips = np.concatenate(
                [np.asarray(group.video), np.asarray(_round_trip(network, group.video))], axis=2
            )
            rows = strips.swapaxes(1, 2).reshape(-1, strips.shape[1] * strips.shape[3], 3)
            Image.fromarray(np.uint8(np.round((rows + 1) * 127.5))).save(folder / f"{name}.png")

    return Task(init=init, batch=batch, loss=loss, save=save, preview=preview)


# ---- batches -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
    """What a batch shows.

    Attributes:
      split: split of the people.
      size: (height, width) of the pictures in pixels.
      face_weight: loss weight of pixels in faces.
      crop: height and width of a window around a face; 0 for the whole picture.
    """

    split: str
    size: tuple[int, int] = (64, 64)
    face_weight: float = 1.0
    crop: int = 0


def _people(key: Key[Array, ""], rows: int, split: str) -> tuple[Identity, Bool[Array, "B M"]]:
    id_key, mask_key = jax.random.split(key)
    return identity(scenes.sample_ids(id_key, rows, split)), scenes.sample_mask(mask_key, rows)


def _draw_clips(key: Key[Array, ""], rows: int, frames: int, view: View) -> Group:
    people_key, scene_key, crop_key = jax.random.split(key, 3)
    people, mask = _people(people_key, rows, view.split)
    scene = jax.vmap(lambda k, m: scenes.sample_scene(k, m, size=view.size))(
        jax.random.split(scene_key, rows), mask
    )
    clip = jax.vmap(lambda p, m, s: scenes.render_clip(p, m, s, frames, view.size))(
        people, mask, scene
    )
    return _around_faces(crop_key, clip.video, clip.boxes, view)


def _draw_portraits(key: Key[Array, ""], rows: int, view: View) -> Group:
    people_key, portrait_key, crop_key = jax.random.split(key, 3)
    people = jax.tree.map(lambda leaf: leaf[:, 0], _people(people_key, rows, view.split)[0])
    portrait_keys = jax.random.split(portrait_key, rows)
    video = jax.vmap(lambda p, k: renderer.render_portrait(p, k, view.size))(people, portrait_keys)
    boxes = jax.vmap(lambda p, k: renderer.portrait_truth(p, k, view.size)[0])(
        people, portrait_keys
    )
    return _around_faces(crop_key, video[:, None], boxes[:, None, None], view)


@functools.partial(jax.jit, static_argnames=("frames", "portraits", "view"))
def _draw_pictures(key: Key[Array, ""], frames: int, portraits: int, view: View) -> Group:
    """Render `frames` frames of clips, then `portraits` portraits."""
    clip_key, portrait_key = jax.random.split(key)
    groups = _draw_clips(clip_key, frames, 1, view), _draw_portraits(portrait_key, portraits, view)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *groups)


@functools.partial(jax.jit, static_argnames=("rows", "frames", "beside", "portraits", "view"))
def _draw_mixed(
    key: Key[Array, ""], rows: int, frames: int, beside: int, portraits: int, view: View
) -> tuple[Group, ...]:
    """Render clips and, if requested, pictures.

    Args:
      key: random key.
      rows: number of clips.
      frames: frames per clip.
      beside: single frames of other clips among the pictures.
      portraits: portraits among the pictures.
      view: split, face weight and window.
    """
    clip_key, picture_key = jax.random.split(key)
    clips = _draw_clips(clip_key, rows, frames, view)
    return (
        (clips, _draw_pictures(picture_key, beside, portraits, view))
        if beside + portraits
        else (clips,)
    )


def _around_faces(
    key: Key[Array, ""],
    video: Float[Array, "B F H W 3"],
    boxes: Float[Array, "B F M 4"],
    view: View,
) -> Group:
    """Crop the same window from all frames of a video.

    The window surrounds a random face of the middle frame, displaced by up to a quarter window.
    """
    height, width = video.shape[2:4]
    weight = face_weights(boxes, (height, width), view.face_weight)
    if not view.crop:
        return Group(video, weight)

    def window(key, video, weight, boxes):
        which, where = jax.random.split(key)
        middle = boxes[boxes.shape[0] // 2]
        chosen = jnp.argmax(
            jax.random.uniform(which, middle.shape[:1]) + (middle[:, 2] > middle[:, 0])
        )
        x0, y0, x1, y1 = middle[chosen]
        off = jax.random.uniform(where, (2,), jnp.float32, -view.crop / 4, view.crop / 4)
        corner = jnp.round(jnp.stack([y0 + y1, x0 + x1]) / 2 - view.crop / 2 + off).astype(
            jnp.int32
        )
        y, x = jnp.clip(corner, 0, jnp.array([height - view.crop, width - view.crop]))

        def cut(a):
            rows = jax.lax.dynamic_slice_in_dim(a, y, view.crop, 1)
            return jax.lax.dynamic_slice_in_dim(rows, x, view.crop, 2)

        return Group(cut(video), cut(weight))

    return jax.vmap(window)(jax.random.split(key, video.shape[0]), video, weight, boxes)


def face_weights(
    boxes: Float[Array, "B F M 4"], size: tuple[int, int], face_weight: float
) -> Float[Array, "B F H W"]:
    """Compute pixel weights: `face_weight` on pixels whose centre is in a face box, 1 elsewhere.

    Args:
      boxes: x0, y0, x1, y1 in pixels; a zero box contains no pixel.
      size: (height, width) in pixels.
      face_weight: weight inside faces.
    """
    x, y = jnp.arange(size[1]) + 0.5, (jnp.arange(size[0]) + 0.5)[:, None]
    x0, y0, x1, y1 = (boxes[..., k, None, None] for k in range(4))
    inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    return jnp.where(jnp.any(inside, axis=2), face_weight, 1.0)


# ---- loss and statistics -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of edges and divergence, and colour axes of the differences (columns: R, G, B)."""

    edges: float
    kl: float
    colours: Float[Array, "3 3"]


def reconstruction_loss(
    network: WanVAE,
    groups: tuple[Group, ...],
    key: Key[Array, ""],
    weights: LossWeights,
    decoder_only: bool,
) -> Loss:
    """Compute the loss of the module's docstring and its parts.

    Args:
      network: autoencoder.
      groups: groups of videos, weighted by their number of pixels.
      key: key of the latents' noise.
      weights: weights of the parts.
      decoder_only: decode the posterior's mean, without gradients to the encoder.
    """
    pixels = sum(group.weight.size for group in groups)
    parts = {"absolute": jnp.float32(0.0), "edges": jnp.float32(0.0), "kl": jnp.float32(0.0)}
    for number, group in enumerate(groups):
        mean, logvar = network.posterior(group.video)
        if decoder_only:
            latents = jax.lax.stop_gradient(mean)
        else:
            noise = jax.random.normal(rng.fold(key, number), mean.shape, jnp.float32)
            latents = mean + jnp.exp(0.5 * logvar) * noise
        difference = (network.pixels(latents) - group.video) @ weights.colours.T
        weight = group.weight[..., None] / jnp.mean(group.weight)
        across = jnp.abs(jnp.diff(difference, axis=3)) * weight[:, :, :, 1:]
        down = jnp.abs(jnp.diff(difference, axis=2)) * weight[:, :, 1:]
        share = group.weight.size / pixels
        parts["absolute"] += share * jnp.mean(jnp.abs(difference) * weight)
        parts["edges"] += share * (jnp.mean(across) + jnp.mean(down))
        parts["kl"] += share * 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
    kl = 0.0 if decoder_only else weights.kl * parts["kl"]
    return parts["absolute"] + weights.edges * parts["edges"] + kl, parts


@nnx.jit
def _round_trip(network: WanVAE, video: Float[Array, "B F H W 3"]) -> Float[Array, "B F H W 3"]:
    return network.decode(network.encode(video))


def with_statistics(network: WanVAE, seed: int, frames: int, size: tuple[int, int]) -> WanVAE:
    """Return the network with the statistics of its latents in its configuration.

    The mean and standard deviation per channel are measured over clips and portraits, with equal
    weight for every latent frame. Normalised latents then have mean 0 and standard deviation 1.

    Args:
      network: autoencoder.
      seed: seed of the clips.
      frames: frames per clip.
      size: (height, width) of the pictures.
    """
    view = View("train", size)

    @nnx.jit
    def moments(network: WanVAE, key: Key[Array, ""]) -> Float[Array, "2 z"]:
        clip_key, portrait_key = jax.random.split(key)
        videos = (
            _draw_clips(clip_key, STATISTICS_ROWS, frames, view).video,
            _draw_portraits(portrait_key, STATISTICS_ROWS, view).video,
        )
        values = jnp.concatenate(
            [network.posterior(video)[0].reshape(-1, Z_DIM) for video in videos]
        )
        return jnp.stack([jnp.mean(values, axis=0), jnp.mean(values**2, axis=0)])

    root = rng.key(seed, "evaluate")
    rows = [
        np.asarray(moments(network, rng.fold(root, number)), np.float64)
        for number in range(STATISTICS_BATCHES)
    ]
    mean, square = np.mean(rows, axis=0)
    spread = np.sqrt(square - mean**2)
    graphdef, state = nnx.split(network)
    copy = nnx.merge(graphdef, state)
    copy.config = dataclasses.replace(
        network.config,
        latents_mean=tuple(float(np.float32(value)) for value in mean),
        latents_std=tuple(float(np.float32(value)) for value in spread),
    )
    return copy
