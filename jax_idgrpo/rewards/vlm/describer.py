"""Describe the face of a photo in a phrase, with a published Qwen2.5-VL.

    <system> <user> [photo] INSTRUCTION <assistant> with short grey hair, a beard and glasses

Decoding is greedy. The tokens that end an answer and the repetition penalty are those of the
folder's `generation_config.json`, which transformers reads too.

Source: TPIGE, arXiv 2509.01362; the instruction is this project's own.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from checkpoints_convert import qwen_vl as table
from checkpoints_convert import store
from jax_idgrpo.data.prompts import Prompt
from jax_idgrpo.errors import UserError
from jax_idgrpo.metrics import progress
from jax_idgrpo.models.qwen_decoding import UNWRITTEN, decode_greedily
from jax_idgrpo.models.qwen_vl import QwenReward, VisionConfig, layout
from jax_idgrpo.rewards.base import Photo
from jax_idgrpo.rewards.vlm import files, inputs
from jax_idgrpo.rewards.vlm.inputs import Asked, Picture, Question
from jax_idgrpo.rewards.vlm.settings import Settings
from jax_idgrpo.sampling.tokenizer import ExtensibleTokenizer

INSTRUCTION = (
    "Describe the face of the person in this picture, so that others can recognise it. Mention the "
    "age, the hair, and, where there are any, beard, glasses and striking features. Leave out "
    "clothes, background and mood. Answer with one phrase that begins with the word 'with', such as: "
    "with short grey hair, a full beard and round glasses."
)
GENERATION, END = "generation_config.json", "<|im_end|>"
STEPS = 128  # most tokens of an answer
_QUOTES = " \"'`\u2018\u2019\u201c\u201d"
ROWS = 8  # photos that are described at once


def phrase(answer: str, finished: bool) -> str:
    """Return the phrase of an answer, in one line; "" if it has none.

    Only the first sentence is used. An unfinished answer is cut behind its last comma.

    Args:
      answer: decoded text.
      finished: whether the answer ends with an end token.
    """
    text = " ".join(answer.replace("*", " ").split()).strip(_QUOTES)
    sentence, *rest = re.split(r"[.!?](?:\s|$)", text, maxsplit=1)
    if not (finished or rest):
        sentence = sentence.rpartition(",")[0]
    sentence = sentence.strip(f"{_QUOTES},;:")
    return sentence if re.search(r"\w", sentence) else ""


def question(
    picture: Picture, tokenizer: ExtensibleTokenizer, instruction: str, config: VisionConfig
) -> Question:
    """Build the sequence that asks about one photo.

    Args:
      picture: the photo.
      tokenizer: the model's tokenizer.
      instruction: text behind the photo.
      config: sizes of the patches.
    """
    words = f"{inputs.SYSTEM}{inputs.BLOCK.format(kind='image')}{instruction}{inputs.BEHIND}"
    ids = np.asarray(tokenizer(words, add_special_tokens=False)["input_ids"])
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).astype(int)
    height, width = picture.grid.tolist()
    repeats = np.where(kinds > 0, height * width // config.merge**2, 1)
    ids, kinds = np.repeat(ids, repeats), np.repeat(kinds, repeats)
    position, order = layout(ids, kinds, [(1, height, width)], 1.0, config.merge)
    return Question(ids, position, order, np.array([len(ids) - 1]), np.zeros(3, int))


class Describer:
    """Describe photos.

    Attributes:
      stop: tokens that end an answer.
      penalty: repetition penalty of the decoding.
    """

    def __init__(
        self,
        network: QwenReward,
        head: Float[Array, "vocabulary D"] | None,
        tokenizer: ExtensibleTokenizer,
        *,
        stop: tuple[int, ...],
        penalty: float = 1.0,
        steps: int = STEPS,
    ):
        """Set up the decoding program.

        Args:
          network: vision tower and language model.
          head: output layer of the language model; None for the token embedding.
          tokenizer: the model's tokenizer.
          stop: tokens that end an answer.
          penalty: repetition penalty of the decoding.
          steps: most tokens of an answer.
        """
        graph, self._state = nnx.split(network)
        self._head, self._tokenizer, self._vision = head, tokenizer, network.config.vision
        self.stop, self.penalty = stop, penalty

        @jax.jit
        def write(state: nnx.State, head: Array | None, asked: Asked) -> Array:
            network = nnx.merge(graph, state)
            vision = network.features(asked.pictures(), asked.ids.shape[0])
            return decode_greedily(
                network,
                network.embed_tokens[...] if head is None else head,
                asked.sequences(),
                vision,
                stop=stop,
                steps=steps,
                penalty=penalty,
            )

        self._write = functools.partial(write, self._state, head)

    def picture(self, photo: Photo) -> Picture:
        """Cut a photo into patches; its pixels are not kept.

        Raises:
          UserError: the photo cannot be read, or one side is more than 200 times the other.
        """
        try:
            return inputs.picture(photo.open(), self._vision, Settings().pixels)
        except UserError as error:
            start = "" if str(error).startswith("image") else f"{photo.name}: "
            raise UserError(f"{start}{error}") from None
        finally:
            photo.close()

    def ask(self, pictures: Sequence[Picture]) -> Asked:
        """Build the inputs of several photos, one per row."""
        asked = [question(shown, self._tokenizer, INSTRUCTION, self._vision) for shown in pictures]
        return inputs.ask([[shown] for shown in pictures], asked, self._vision)

    def tokens(self, asked: Asked) -> list[list[int]]:
        """Write the answers; an answer that is finished ends with one of `stop`."""
        written = np.asarray(self._write(asked))
        return [row[row != UNWRITTEN].tolist() for row in written]

    def describe(self, photos: Sequence[Photo]) -> list[str]:
        """Describe every photo by a phrase, "" where the answer has none; shows progress.

        Raises:
          UserError: a photo cannot be read.
        """
        found: list[str] = []
        rows = min(ROWS, len(photos))
        with progress("describing photos", len(photos)) as update:
            for first in range(0, len(photos), rows):
                pictures = [self.picture(photo) for photo in photos[first : first + rows]]
                # The last rows are repeated, so that one program serves all batches.
                filled = pictures + pictures[-1:] * (rows - len(pictures))
                answers = self.tokens(self.ask(filled))[: len(pictures)]
                found += [self._phrase(answer) for answer in answers]
                update(len(found), {})
        return found

    def _phrase(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return phrase(text, bool(tokens) and tokens[-1] in self.stop)


def load_describer(folder: Path, dtype: str = "bfloat16", steps: int = STEPS) -> Describer:
    """Read a published Qwen2.5-VL with its output layer.

    Args:
      folder: the model's folder.
      dtype: dtype of the weights.
      steps: most tokens of an answer.

    Raises:
      UserError: a file is missing or damaged, or does not fit the others.
    """
    if not (folder / files.CONFIG).is_file():
        raise UserError(
            f"--describer {folder}: has no {files.CONFIG}; pass the folder of a published Qwen2.5-VL"
        )
    sizes = store.read_json(folder / files.CONFIG)
    tokenizer = files.load_tokenizer(folder, ())
    stop, penalty = _generation(folder, tokenizer)
    tensors = files.named(folder)
    head, tied = table.pop_language_head(tensors, sizes, folder)
    tensors[table.HEAD] = np.zeros((1, head.shape[1]), np.float32)  # its score is not read
    settings = Settings(pooling="last", rank=0, alpha=0.0, base=folder.name, dtype=dtype)
    network = files.fill(sizes, settings, tensors, tokenizer, dtype, True, None, str(folder))
    output = None if tied else jnp.asarray(np.asarray(head)).astype(network.dtypes.parameters)
    return Describer(network, output, tokenizer, stop=stop, penalty=penalty, steps=steps)


def _generation(folder: Path, tokenizer: ExtensibleTokenizer) -> tuple[tuple[int, ...], float]:
    """Return the tokens that end a text, and the repetition penalty.

    Raises:
      UserError: the file is damaged, or neither it nor the tokenizer has an end token.
    """
    path = folder / GENERATION
    values = store.read_json(path) if path.is_file() else {}
    ends, penalty = values.get("eos_token_id"), values.get("repetition_penalty") or 1.0
    if ends is None:
        ends = tokenizer.get_vocab().get(END)
    if isinstance(ends, int):
        ends = [ends]
    if not (isinstance(ends, list) and ends and all(isinstance(end, int) for end in ends)):
        raise UserError(
            f"{path}: has no eos_token_id, and the tokenizer no {END}; get the folder again"
        )
    if not (isinstance(penalty, int | float) and penalty > 0):
        raise UserError(f"{path}: repetition_penalty is {penalty!r}; get the folder again")
    return tuple(ends), float(penalty)


def describe_prompts(folder: Path, prompts: Sequence[Prompt]) -> Mapping[str, str]:
    """Describe the photos of prompts, each once however many prompts have it.

    Args:
      folder: folder of a published Qwen2.5-VL.
      prompts: the prompts.

    Returns:
      The phrases by the SHA-256 of the photos; "" where an answer has none.

    Raises:
      UserError: a file of the model or a photo is missing or damaged.
    """
    photos = {
        digest: Photo(file, prompt.where)
        for prompt in prompts
        for file, digest in zip(prompt.references, prompt.digests, strict=True)
    }
    phrases = load_describer(folder).describe(list(photos.values()))
    return dict(zip(photos, phrases, strict=True))
