"""Write text with Qwen2.5-VL: greedy decoding with a key/value cache.

Every step feeds one token per row. Keys and values of the prompt and of the tokens before it are in
the cache. Prompts are padded on the right; the keys of written tokens follow the longest prompt, and
a mask hides the padding between. The next token is the first with the largest logit,

    logit_v = head_v . h    h: state of the last token after the last norm

after the repetition penalty p: logits of tokens of the prompt or of the text are divided by p if they
are positive and multiplied by p otherwise.

Source: transformers' `generate` with `do_sample=False`.
"""

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int

from jax_idgrpo.models.layers import precision
from jax_idgrpo.models.qwen_vl import QwenReward, Sequences, attend, causal, text_rotary

UNWRITTEN = -1
"""Fills the places behind the end of a text."""


@struct.dataclass
class KeyValues:
    """Keys and values of all layers; slots hold the prompts with padding, then written tokens."""

    keys: Float[Array, "layers B slots groups d"]
    values: Float[Array, "layers B slots groups d"]


def read_prompt(
    network: QwenReward, sequences: Sequences, vision: Float[Array, "B cells D"], room: int
) -> tuple[Float[Array, "B D"], KeyValues]:
    """Compute the state of every prompt's last token, and the cache.

    Args:
      network: vision tower and language model.
      sequences: the prompts.
      vision: the features that `sequences.vision` numbers.
      room: slots of the cache for tokens behind the prompts.

    Returns:
      The states after the last norm, float32, and keys and values of the prompts.
    """
    rotary = text_rotary(sequences.position, network.config)
    graph, parameters = nnx.split(network.layers)

    def layer(x: Array, block_state: nnx.State) -> tuple[Array, tuple[Array, Array]]:
        block = nnx.merge(graph, block_state)
        q, k, v = block.project(x, rotary)
        return block.finish(x, causal(q, k, v)), (k, v)

    x, kept = jax.lax.scan(layer, network.embed(sequences, vision), parameters)
    last = jnp.sum(sequences.mask, axis=1) - 1
    state = jnp.take_along_axis(network.norm(x), last[:, None, None], axis=1)[:, 0]
    padding = ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))
    return state, KeyValues(*(jnp.pad(part, padding) for part in kept))


def read_token(
    network: QwenReward,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    slot: Int[Array, ""],
    visible: Bool[Array, "B slots"],
    cache: KeyValues,
) -> tuple[Float[Array, "B D"], KeyValues]:
    """Compute the state of one more token per row, and add it to the cache.

    Args:
      network: vision tower and language model.
      token: ids of the tokens.
      position: rotary position of the tokens, the same for time, row and column.
      slot: where their keys and values are put.
      visible: slots that the tokens attend to, with their own.
      cache: keys and values of the tokens before.
    """
    x = jnp.take(network.embed_tokens[...], token, axis=0)[:, None]
    rotary = text_rotary(jnp.broadcast_to(position[:, None], (3, len(token), 1)), network.config)
    graph, parameters = nnx.split(network.layers)

    def layer(
        carry: tuple[Array, KeyValues], entry: tuple[Array, nnx.State]
    ) -> tuple[tuple[Array, KeyValues], None]:
        (x, cache), (number, block_state) = carry, entry
        block = nnx.merge(graph, block_state)
        q, k, v = block.project(x, rotary)

        def put(kept: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(kept, new[None], (number, 0, slot, 0, 0))

        cache = KeyValues(put(cache.keys, k), put(cache.values, v))
        attended = attend(q, cache.keys[number], cache.values[number], visible[:, None])
        return (block.finish(x, attended), cache), None

    start = x.astype(network.dtypes.residual), cache
    entries = jnp.arange(network.config.layers), parameters
    (x, cache), _ = jax.lax.scan(layer, start, entries)
    return network.norm(x)[:, 0], cache


def decode_greedily(
    network: QwenReward,
    head: Float[Array, "vocabulary D"],
    sequences: Sequences,
    vision: Float[Array, "B cells D"],
    *,
    stop: tuple[int, ...],
    steps: int,
    penalty: float = 1.0,
) -> Int[Array, "B steps"]:
    """Write the text that continues every prompt.

    Args:
      network: vision tower and language model.
      head: output layer of the language model.
      sequences: the prompts.
      vision: the features that `sequences.vision` numbers.
      stop: tokens that end a text.
      steps: most tokens of a text, with the token that ends it.
      penalty: repetition penalty; 1 is none.

    Returns:
      The tokens with the one that ends the text, then `UNWRITTEN`.
    """
    rows, length = sequences.ids.shape
    state, cache = read_prompt(network, sequences, vision, steps)
    position = jnp.max(jnp.where(sequences.mask, sequences.position, 0), axis=(0, 2)) + 1
    slots = jnp.arange(length + steps)
    prompt = jnp.pad(sequences.mask, ((0, 0), (0, steps)))
    each = jnp.arange(rows)
    seen = jnp.zeros((rows, head.shape[0]), bool)
    seen = seen.at[each[:, None], sequences.ids].max(sequences.mask)

    def choose(state: Array, seen: Array) -> Array:
        logits = jnp.einsum(
            "bd,vd->bv",
            state.astype(head.dtype),
            head,
            precision=precision(head),
            preferred_element_type=jnp.float32,
        )
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.argmax(jnp.where(seen, penalised, logits), axis=-1)

    def unfinished(carry: tuple) -> Array:
        step, _, done, *_ = carry
        return (step < steps) & ~jnp.all(done)

    def write(carry: tuple) -> tuple:
        step, token, done, text, seen, cache = carry
        text = text.at[:, step].set(jnp.where(done, UNWRITTEN, token))
        done = done | jnp.isin(token, jnp.asarray(stop))
        seen = seen.at[each, token].set(True)
        visible = prompt | ((slots >= length) & (slots <= length + step))
        state, cache = read_token(network, token, position + step, length + step, visible, cache)
        return step + 1, choose(state, seen), done, text, seen, cache

    text = jnp.full((rows, steps), UNWRITTEN, jnp.int32)
    start = (jnp.asarray(0), choose(state, seen), jnp.zeros(rows, bool), text, seen, cache)
    return jax.lax.while_loop(unfinished, write, start)[3]
