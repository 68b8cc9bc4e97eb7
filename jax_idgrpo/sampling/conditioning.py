"""Encode prompts and reference photos to the conditioning of the transformer.

VACE's control for generation from references only has 96 channels per latent frame,
`inactive 16 | reactive 16 | mask 64`:

    reference frames   latents of one photo | zeros | zeros   one latent frame per photo
    video frames       g | g | ones                           g = latents of a mid-grey video

diffusers puts the last photo first; g is the same for every prompt. Rows with fewer people than
`max_people` are padded after the video, `[M references, T video, max_people - M padding]`. The
other frames keep the rotary positions that they have without padding, and the padding is masked, so
a row does not depend on the other rows of its batch.

The other kinds have no control. The clean latents of the photos, one frame each, follow the video,
`[T video, M references, max_people - M padding]`. They are inputs of the transformer only; the
video is denoised. `config.model_kinds` lists whether the padding is masked, and whether photos
attend to the text.

Sources: diffusers, `pipeline_wan_vace.py` (`preprocess_conditions`, `prepare_video_latents`,
`prepare_masks`); for the other kinds those of `config.model_kinds`.
"""

import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx, struct
from jaxtyping import Array, ArrayLike, Bool, Float, Int
from PIL import Image

from jax_idgrpo import flow, rng
from jax_idgrpo.config import Config, DataConfig
from jax_idgrpo.data.controls import read_control
from jax_idgrpo.data.photos import load_reference, on_white
from jax_idgrpo.data.places import draw_places
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import to_host
from jax_idgrpo.sampling.cache import Cache
from jax_idgrpo.sampling.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MASK_CHANNELS = 64  # one per pixel of an 8x8 cell
CUT_SHOWN = 10  # prompts longer than the text length that get a separate warning each

Values: TypeAlias = Array | np.ndarray


@runtime_checkable
class Pipeline(Protocol):
    """The attributes of `jax_idgrpo.sampling.pipeline.Pipeline` that this module uses."""

    vae: Any
    text_encoder: Any
    tokenizer: Any


@struct.dataclass
class Conditioning:
    """Conditioning of P prompts.

    Each row denoises `frames` latent frames: max_people + T for VACE, `[references, video,
    padding]`, and T for the other kinds, `[video]`.

    Attributes:
      text: text embeddings, zero after the prompt's end.
      control: VACE's control, zero in the padding; None for the other kinds.
      frame_mask: False in the padding.
      references: number of people, per row.
      reference_latents: clean latents of the photos, zero in the padding; None for VACE.
      padding_attended: whether the padding after the photos is attended to (SkyReels-V3).
      photos_read_text: whether the tokens of the photos attend to the text (all but RefAlign).
    """

    text: Float[Values, "P L D"]
    control: Float[Values, "P frames H W 96"] | None
    frame_mask: Bool[Values, "P frames"]
    references: Int[Values, " P"]
    reference_latents: Float[Values, "P M H W C"] | None = None
    padding_attended: bool = struct.field(pytree_node=False, default=False)
    photos_read_text: bool = struct.field(pytree_node=False, default=True)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape [frames, H, W, 16] of the latents that one row denoises."""
        if self.reference_latents is not None:
            return (self.frame_mask.shape[1], *self.reference_latents.shape[2:])
        assert self.control is not None
        return (*self.control.shape[1:4], (self.control.shape[-1] - MASK_CHANNELS) // 2)

    @property
    def reference_mask(self) -> Bool[Values, "P M"]:
        """True on the photos, False in the padding after them; not for VACE."""
        assert self.reference_latents is not None
        return jnp.arange(self.reference_latents.shape[1]) < self.references[:, None]

    @property
    def video_start(self) -> Int[Values, " P"]:
        """Index of the first video frame, per row."""
        # The difference makes zeros on the devices; a constant would be transferred from the host.
        return (
            self.references if self.reference_latents is None else self.references - self.references
        )

    def video_frames(self, max_people: int) -> int:
        """Return T, the latent frames of the video."""
        return self.frame_mask.shape[1] - (max_people if self.reference_latents is None else 0)


def select(conditioning: Conditioning, rows: Int[ArrayLike, " B"]) -> Conditioning:
    """Select rows, which may repeat: `np.repeat(np.arange(P), G)` makes groups of G."""
    return jax.tree.map(lambda leaf: leaf[rows], conditioning)


def video_latents(
    x: Float[Array, "B frames H W C"], start: Int[Array, " B"], frames: int
) -> Float[Array, "B T H W C"]:
    """Slice the latent frames of the video out of each row.

    Args:
      x: latents with photos before or after the video.
      start: first frame of the video, per row.
      frames: number T of frames to take.
    """
    return jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=frames, axis=0))(x, start)


def frame_mask(
    references: Int[Values, " B"], frames: int, max_people: int
) -> Bool[Array, "B frames"]:
    """Return True on the references and the video of each row, False on the padding after them.

    Args:
      references: number of people, per row.
      frames: T, latent frames of the video.
      max_people: people per row with padding; the result has max_people + T frames.
    """
    return jnp.arange(max_people + frames) < references[:, None] + frames


def canvas(image: Image.Image, height: int, width: int) -> Float[np.ndarray, "height width 3"]:
    """Scale the image to fit and centre it on white; float32 in [-1, 1].

    Args:
      image: of any mode and size.
      height: of the canvas, pixels.
      width: of the canvas, pixels.
    """
    image = on_white(image)
    image = image.resize([max(size // 8, 1) * 8 for size in image.size], Image.Resampling.LANCZOS)
    pixels = np.array(image, np.float32)
    for operation, number in ((np.divide, 255), (np.multiply, 2), (np.subtract, 1)):
        operation(pixels, np.float32(number), out=pixels)  # a large photo is not copied
    scale = min(height / pixels.shape[0], width / pixels.shape[1])
    rows, columns = (max(int(size * scale), 1) for size in pixels.shape[:2])
    out = np.ones((height, width, 3), np.float32)
    top, left = (height - rows) // 2, (width - columns) // 2
    out[top : top + rows, left : left + columns] = _bilinear(_bilinear(pixels, rows, 0), columns, 1)
    return out


def whole_canvas(
    image: Image.Image, height: int, width: int
) -> Float[np.ndarray, "height width 3"]:
    """Scale the image as `canvas` does, with one Lanczos resize: all kinds but VACE.

    Args:
      image: of any mode and size.
      height: of the canvas, pixels.
      width: of the canvas, pixels.
    """
    image = on_white(image)
    ratio = image.width / image.height
    size = (width, int(width / ratio)) if ratio > width / height else (int(height * ratio), height)
    columns, rows = (max(side, 1) for side in size)
    out = np.full((height, width, 3), 255, np.float32)
    top, left = (height - rows) // 2, (width - columns) // 2
    out[top : top + rows, left : left + columns] = np.asarray(
        image.resize((columns, rows), Image.Resampling.LANCZOS), np.float32
    )
    return out / np.float32(127.5) - 1


def _bilinear(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Interpolate linearly along one axis: centres aligned, edges repeated, no antialiasing."""
    old = x.shape[axis]
    position = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
    low = np.floor(position).astype(int)
    weight = np.expand_dims(
        (position - low).astype(np.float32), [a for a in range(x.ndim) if a != axis]
    )
    high = np.minimum(low + 1, old - 1)
    return np.take(x, low, axis) * (1 - weight) + np.take(x, high, axis) * weight


def control(
    references: Float[Values, "M H W C"],
    grey: Float[Values, "T H W C"],
    max_people: int,
    order: str = "diffusers",
    video: Float[Values, "T H W control"] | None = None,
) -> Float[Array, "frames H W control"]:
    """Build VACE's control of one row, with 2 C + 64 channels.

    Args:
      references: latents of the row's photos, in the order of the prompt.
      grey: latents of a mid-grey video.
      max_people: people per row with padding; the result has max_people + T frames.
      order: "diffusers" puts the last photo first, "original" keeps the order.
      video: control of the video's frames, from `video_control`; None generates all of a grey video.
    """
    if order == "diffusers":
        references = references[::-1]
    if video is None:
        mask = jnp.ones((*grey.shape[:-1], MASK_CHANNELS), jnp.float32)
        video = jnp.concatenate([grey, grey, mask], axis=-1)
    people = jnp.pad(
        references, ((0, 0), (0, 0), (0, 0), (0, video.shape[-1] - references.shape[-1]))
    )
    padding = ((0, max_people - references.shape[0]), (0, 0), (0, 0), (0, 0))
    return jnp.pad(jnp.concatenate([people, video]), padding)


@nnx.jit
def encode_video(
    vae: nnx.Module, video: Float[Values, "B F H W 3"], noise: Values | None = None
) -> Float[Array, "B T h w C"]:
    """Encode videos in [-1, 1] to normalised latents.

    Args:
      vae: the video autoencoder.
      video: B videos.
      noise: standard normal noise that draws from the posterior; None returns its mean.
    """
    _, frames, height, width, _ = video.shape
    return vae.encode(video, vae.chunk(flow.latent_frames(frames), height // 8, width // 8), noise)


@nnx.jit
def _encode_tokens(
    text_encoder: nnx.Module, ids: Int[Values, "B L"], mask: Int[Values, "B L"]
) -> Float[Array, "B L D"]:
    return text_encoder(ids, mask).astype(jnp.float32)


def encode_texts(
    pipe: Pipeline, texts: Sequence[str], length: int
) -> list[Float[np.ndarray, "n D"]]:
    """Encode prompts, each truncated to `length` tokens.

    A text encoder in host memory is copied to the devices for the duration of the call.

    Args:
      pipe: supplies tokenizer and text encoder.
      texts: the prompts.
      length: largest number of tokens.

    Returns:
      float32 embeddings without padding, on the host.
    """
    encoder, embeddings = sharding.on_devices(pipe.text_encoder) if texts else None, []
    for text in texts:
        tokens = pipe.tokenizer(
            text, padding="max_length", max_length=length, truncation=True, return_tensors="np"
        )
        ids, mask = (np.asarray(tokens[name], np.int32) for name in ("input_ids", "attention_mask"))
        embeddings.append(to_host(_encode_tokens(encoder, ids, mask))[0, : mask.sum()])
    return embeddings


def _cut_off(tokenizer: Tokenizer, text: str, length: int) -> str:
    """Describe the part of a text that `encode_texts` truncates; "" if none."""
    ids = tokenizer(text)["input_ids"]
    if len(ids) <= length:
        return ""
    # The last of the `length` tokens is the end-of-sequence token.
    lost = tokenizer.decode(ids[length - 1 :], skip_special_tokens=True)
    shown = lost if len(lost) <= 200 else f"{lost[:200]}..."
    return (
        f"{len(ids)} tokens, and data.text_length keeps {length}; shorten it or raise "
        f"data.text_length; cut off: {shown}"
    )


def warn_of_cut(tokenizer: Tokenizer, prompts: Sequence[Prompt], length: int) -> None:
    """Warn of each prompt with more than `length` tokens: its line and the text that is lost.

    Args:
      tokenizer: of the pipeline.
      prompts: the prompts of the run.
      length: `data.text_length`.
    """
    described = [(prompt, _cut_off(tokenizer, prompt.text, length)) for prompt in prompts]
    cut = [(prompt, problem) for prompt, problem in described if problem]
    for prompt, problem in cut[:CUT_SHOWN]:
        where = prompt.where or f"prompt {prompt.id}"
        warnings.warn(f"{where}: the prompt has {problem}", stacklevel=2)
    if len(cut) > CUT_SHOWN:
        more = len(cut) - CUT_SHOWN
        warnings.warn(f"{more} more prompts are cut to data.text_length {length}", stacklevel=2)


def warn_of_padding(prompts: Sequence[Prompt], max_people: int) -> None:
    """Warn if no prompt has `max_people` people: every row is padded to that number."""
    most = max(prompt.people for prompt in prompts)
    if most < max_people:
        warnings.warn(
            f"no prompt has more people than {most}, and all are padded to data.max_people "
            f"{max_people}; --data.max_people {most} needs less memory and time",
            stacklevel=2,
        )


def padded(text: Float[np.ndarray, "n D"], length: int) -> Float[np.ndarray, "{length} D"]:
    """Pad a text embedding with zeros to `length` tokens, as the transformer requires."""
    return np.pad(text, ((0, length - len(text)), (0, 0)))


def negative_prompt(config: DataConfig) -> str:
    """Return the text of the unguided branch; "@FILE" reads the file and logs its hash.

    Raises:
      UserError: the file is missing or is not UTF-8 text.
    """
    if not config.negative_prompt.startswith("@"):
        return config.negative_prompt
    path = Path(config.negative_prompt[1:])
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.negative_prompt: cannot read {path} ({error}); name a UTF-8 text file"
        ) from None
    log.info("negative prompt from %s, SHA-256 %s", path, hashlib.sha256(text.encode()).hexdigest())
    return text


def encode_negative(pipe: Pipeline, config: DataConfig) -> Float[np.ndarray, "L D"]:
    """Encode the text of the unguided branch; warn if it is truncated."""
    text = negative_prompt(config)
    if problem := _cut_off(pipe.tokenizer, text, config.text_length):
        warnings.warn(f"data.negative_prompt: has {problem}", stacklevel=2)
    return padded(encode_texts(pipe, [text], config.text_length)[0], config.text_length)


def encode(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    config: Config,
    cache: Cache,
) -> Conditioning:
    """Encode `prompts` for videos of size `config.video` and the model `config.model.kind`.

    Args:
      pipe: supplies VAE, text encoder and tokenizer.
      prompts: the prompts, one row each.
      config: of the run.
      cache: one per run. A prompt or photo is encoded once; if the cache is full, at every call.

    Returns:
      The conditioning, on the host.

    Raises:
      UserError: a photo is missing or broken, or a prompt has more people than
        `config.data.max_people`.
    """
    data, video = config.data, config.video
    different = {prompt.id: prompt for prompt in prompts}
    photos = {
        number: _encode_photos(pipe, config, cache, prompt) for number, prompt in different.items()
    }
    new = [number for number in different if number not in cache]
    texts = dict(
        zip(
            new,
            encode_texts(pipe, [different[number].text for number in new], data.text_length),
            strict=True,
        )
    )
    for number, encoded in texts.items():
        cache.keep(number, encoded)
    texts |= {number: cache[number] for number in different if number not in texts}
    references = np.asarray([len(prompt.references) for prompt in prompts], np.int32)
    text = np.stack([padded(texts[prompt.id], data.text_length) for prompt in prompts])
    frames = flow.latent_frames(video.frames)
    if config.model.kind == "vace":
        if ("grey", video) not in cache:
            blank = np.zeros((1, video.frames, video.height, video.width, 3), np.float32)
            cache["grey", video] = to_host(encode_video(pipe.vae, blank))[0]
        grey, order = cache["grey", video], data.reference_order
        controls = [
            np.asarray(
                control(
                    photos[prompt.id],
                    grey,
                    data.max_people,
                    order,
                    _encode_control(pipe, config, cache, prompt),
                )
            )
            for prompt in prompts
        ]
        mask = np.asarray(frame_mask(references, frames, data.max_people))
        return Conditioning(
            text=text, control=np.stack(controls), frame_mask=mask, references=references
        )
    reference_latents = [
        np.pad(
            photos[prompt.id],
            ((0, config.reference_frames - prompt.people), (0, 0), (0, 0), (0, 0)),
        )
        for prompt in prompts
    ]
    mask = np.ones((len(prompts), frames), bool)
    return Conditioning(
        text=text,
        control=None,
        frame_mask=mask,
        references=references,
        reference_latents=np.stack(reference_latents),
        padding_attended=config.kind.slots > 0,
        photos_read_text=config.kind.photos_read_text,
    )


def refuse_controls(prompts: Sequence[Prompt], kind: str) -> None:
    """Raise a UserError if a prompt has a control video or places, and the model is not VACE."""
    for prompt in prompts:
        name = "control" if prompt.control is not None else "places" if prompt.places else ""
        if name and kind != "vace":
            columns = "columns control and mask" if name == "control" else "column places"
            raise UserError(
                f"{prompt.where or f'prompt {prompt.id}'}: {name} is an input of VACE, and model.kind "
                f"is {kind}; leave the {columns} out"
            )


def mask_channels(mask: Float[np.ndarray, "F H W"], frames: int) -> Float[np.ndarray, "T h w 64"]:
    """Cut a mask into cells of 8 x 8 pixels, which become channels, at the nearest latent frames.

    Args:
      mask: values in [0, 1].
      frames: T, latent frames.
    """
    chosen = mask[((np.arange(frames) + 0.5) * (len(mask) / frames)).astype(int)]
    return rearrange(chosen, "t (h p) (w q) -> t h w (p q)", p=8, q=8)


def _encode_control(
    pipe: Pipeline, config: Config, cache: Cache, prompt: Prompt
) -> Float[np.ndarray, "T h w control"] | None:
    """Return VACE's control of the frames of a prompt with a control video or boxes.

    It is taken from the cache or made.

    The part that is kept and the part that is generated are encoded apart, each with mid-grey in
    place of the other.
    """
    places, video = prompt.places, config.video
    size, coloured = (video.height, video.width), config.data.places_colours == "person"
    name: tuple[object, ...]
    if prompt.control is not None:
        name = ("control", prompt.control, prompt.mask, video)
    elif places is not None and places.boxes:
        name = ("places", places, coloured, video)
    else:
        return None
    if name in cache.photos:
        return cache.photos[name]
    if prompt.control is not None:
        pixels, mask = read_control(prompt.control, prompt.mask, video.frames, size, video.fps)
    else:
        assert places is not None
        pixels = draw_places(places, video.frames, size, coloured)
        mask = np.ones(pixels.shape[:-1], np.float32)
    made = np.where(mask > 0.5, 1.0, 0.0).astype(np.float32)[..., None]
    kept, generated = (
        to_host(encode_video(pipe.vae, (pixels * part)[None]))[0] for part in (1 - made, made)
    )
    cells = mask_channels(mask, len(kept))
    whole = np.concatenate([kept, generated, cells], axis=-1, dtype=np.float32)
    cache.photos.keep(name, whole)
    return whole


def _encode_photos(
    pipe: Pipeline, config: Config, cache: Cache, prompt: Prompt
) -> Float[np.ndarray, "M H W C"]:
    """Encode a prompt's photos, one latent frame each."""
    if not 1 <= prompt.people <= config.data.max_people:
        raise UserError(
            f"prompt {prompt.id}: has {prompt.people} reference photos; "
            f"data.max_people allows 1 to {config.data.max_people}"
        )
    return np.concatenate(
        [_encode_photo(pipe, config, cache, prompt, number) for number in range(prompt.people)]
    )


def _encode_photo(
    pipe: Pipeline,
    config: Config,
    cache: Cache,
    prompt: Prompt,
    number: int,
    image: Image.Image | None = None,
) -> Float[np.ndarray, "1 H W C"]:
    """Return the latent frame of a prompt's photo from the cache, or make it.

    Args:
      pipe: supplies the VAE.
      config: of the run.
      cache: of the run.
      prompt: the prompt.
      number: of the photo in the prompt.
      image: the photo, upright RGB; None decodes the file.
    """
    video, file = config.video, prompt.references[number]
    sampled = config.kind.photos_sampled
    name = (file, video, prompt.id, number) if sampled else (file, video)
    if name in cache.photos:
        return cache.photos[name]
    fit = canvas if config.model.kind == "vace" else whole_canvas
    # The canvas depends on the photo's own size: it is not made from a smaller copy.
    pixels = fit(load_reference(file) if image is None else image, video.height, video.width)
    noise = None
    if sampled:
        key = rng.fold(rng.fold(rng.key(config.run.seed, "photo"), prompt.id), number)
        shape = (1, 1, video.height // 8, video.width // 8, pipe.vae.config.z_dim)
        noise = to_host(jax.random.normal(key, shape, jnp.float32))
    latents = to_host(encode_video(pipe.vae, pixels[None, None], noise))[0]
    cache.photos.keep(name, latents)
    return latents


def photo_encoder(
    pipe: Pipeline, config: Config, cache: Cache, prompts: Sequence[Prompt]
) -> Callable[[File, Image.Image], None]:
    """Return a function that encodes a decoded photo for the prompts that show it.

    Photos of other prompts are left out, and so are further photos once the cache is full.

    Args:
      pipe: supplies the VAE.
      config: of the run.
      cache: of the run.
      prompts: the prompts that will be encoded.
    """
    uses: dict[File, list[tuple[Prompt, int]]] = {}
    for prompt in prompts:
        for number, file in enumerate(prompt.references):
            uses.setdefault(file, []).append((prompt, number))

    def encode(file: File, image: Image.Image) -> None:
        for prompt, number in uses.get(file, []):
            if not cache.photos.full:
                _encode_photo(pipe, config, cache, prompt, number, image)

    return encode
