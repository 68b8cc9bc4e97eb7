"""Task "text": train a small UMT5 on synthetic prompts, and build its word tokenizer.

From the mean of the encoder's output tokens, a linear head predicts every attribute of every person
(hair, hat, clothes, action, ...) and of the place. The mean discards the order of the tokens, so
each token must encode which person its word describes: "red" becomes "the red shirt of the second
person". Cross-attention in the transformer requires this. The head is discarded after training.

`finetune.options`: d_model, d_kv, num_heads, d_ff, num_layers of the encoder. The task writes
`text_encoder/` and `tokenizer/` in the published layout, and keeps the folder's other parts.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import transformers
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from jax_idgrpo.config import Config
from jax_idgrpo.models.layers import Dtypes
from jax_idgrpo.models.umt5 import UMT5Config, UMT5Encoder
from jax_idgrpo.sampling.conditioning import negative_prompt
from jax_idgrpo.sampling.pipeline import save_text_encoder
from jax_idgrpo.sampling.tokenizer import Tokenizer
from jax_idgrpo.synthetic import captions, scenes
from jax_idgrpo.synthetic.people import Identity
from jax_idgrpo.training.task import Loss, Task

SPECIAL = ("<pad>", "</s>", "<unk>")
PUNCTUATION = r"[,.:;!?]"
CLASSES = 16  # upper bound of the number of values of an attribute


def build_tokenizer(words: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Build a tokenizer of lower-case words without punctuation.

    It appends an end-of-text token. Ids: pad 0, eos 1, unk 2, then the sorted words.

    Raises:
      ValueError: a word is empty, or the tokenizer would split or change it.
    """
    words = sorted(set(words))
    odd = [word for word in words if re.sub(PUNCTUATION, "", word.lower()).split() != [word]]
    if odd:
        raise ValueError(f"not single lower-case words: {odd[:5]}")
    core = tokenizers.Tokenizer(
        models.WordLevel({word: k for k, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>")
    )
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PUNCTUATION), "removed"), pre_tokenizers.WhitespaceSplit()]
    )
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        truncation_side="right",
    )


def vocabulary(negative: str) -> list[str]:
    """Return the words of synthetic prompts and of the negative prompt."""
    text = " ".join([*captions.vocabulary(), negative]).lower()
    return sorted(set(re.sub(PUNCTUATION, " ", text).split()))


def tokenize(
    tokenizer: Tokenizer, texts: list[str], length: int
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
    """Tokenize texts; returns ids and mask.

    Args:
      tokenizer: result of `build_tokenizer`.
      texts: B texts.
      length: number of tokens, to which texts are cut or padded.
    """
    tokens = tokenizer(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="np"
    )
    ids, mask = (np.asarray(tokens[name], np.int32) for name in ("input_ids", "attention_mask"))
    return ids, mask


class ClipContent(NamedTuple):
    """The people and scenes that prompts describe."""

    scene: scenes.Scene
    people: Identity
    mask: Bool[Array, "B M"]


@functools.partial(jax.jit, static_argnames="size")
def _draw(seed: int | Array, step: int | Array, size: int) -> ClipContent:
    """Sample a batch without its pictures; the compiler removes their rendering."""
    batch = scenes.batch(seed, step, size, "train")
    return ClipContent(batch.scene, batch.people, batch.mask)


def attributes(content: ClipContent) -> Int[np.ndarray, "B A"]:
    """Encode the content of prompts as class numbers.

    The numbers are every person's labels and action (-1 for absent people), then the place.
    """
    person = np.concatenate([content.people.labels, content.scene.action[..., None]], axis=-1)
    person = np.where(content.mask[..., None], person, -1).reshape(len(content.mask), -1)
    place = np.stack([content.scene.background, content.scene.light_kind], axis=-1)
    return np.concatenate([person, place, content.scene.colours], axis=-1).astype(np.int32)


class Reader(nnx.Module):
    """The encoder with a head: `CLASSES` logits for each of `count` attributes."""

    def __init__(self, config: UMT5Config, count: int, *, rngs: nnx.Rngs):
        self.encoder = UMT5Encoder(config, dtypes=Dtypes.named("float32"), rngs=rngs)
        self.head = nnx.Linear(config.d_model, count * CLASSES, rngs=rngs)

    def __call__(
        self, ids: Int[ArrayLike, "B L"], mask: Int[ArrayLike, "B L"]
    ) -> Float[Array, "B A classes"]:
        ids, mask = jnp.asarray(ids), jnp.asarray(mask)
        mean = jnp.sum(self.encoder(ids, mask), axis=1) / jnp.sum(mask, axis=1, keepdims=True)
        return self.head(mean).reshape(len(ids), -1, CLASSES)


def loss(reader: Reader, batch: dict[str, ArrayLike], key: Array) -> Loss:
    """Compute the mean cross-entropy over the attributes of present people, and the accuracy.

    Args:
      reader: encoder with its head.
      batch: ids, mask and attributes.
      key: unused.
    """
    del key
    logits, target = reader(batch["ids"], batch["mask"]), batch["attributes"]
    there, target = target >= 0, jnp.maximum(target, 0)
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    right = jnp.argmax(logits, axis=-1) == target
    return jnp.mean(entropy, where=there), {"accuracy": jnp.mean(right, where=there)}


def make(config: Config) -> Task:
    """Make the task; `config.data` supplies the text length and the negative prompt."""
    tokenizer = build_tokenizer(vocabulary(negative_prompt(config.data)))
    shape = UMT5Config(vocab_size=len(tokenizer), **config.finetune.options)
    draw = functools.partial(_draw, size=config.finetune.batch)

    def init(key: Array) -> Reader:
        return Reader(
            shape, attributes(jax.device_get(draw(0, 0))).shape[1], rngs=nnx.Rngs(params=key)
        )

    def batch(seed: int, step: int) -> dict[str, np.ndarray]:
        content = jax.device_get(draw(seed, step))
        ids, mask = tokenize(
            tokenizer,
            captions.describe(content.scene, content.people, content.mask),
            config.data.text_length,
        )
        return {"ids": ids, "mask": mask, "attributes": attributes(content)}

    def save(reader: Reader, path: Path) -> None:
        save_text_encoder(reader.encoder, tokenizer, path)

    return Task(init=init, batch=batch, loss=loss, save=save)
