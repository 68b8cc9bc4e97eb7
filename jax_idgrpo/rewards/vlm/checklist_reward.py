"""Score videos by the answers of a Qwen2.5-VL, as published, to a checklist; nothing is decoded.

Every question is one turn of the chat: photos, video, question. With h the state of its last token
after the last norm, and w the rows of the language model's output layer (of the token embeddings if
the two are tied),

    l = logsumexp over spellings of yes (w . h) - logsumexp over spellings of no (w . h)
    answer = 2 sigmoid(l) - 1

A question counts if its gate, and the gate's gate, are answered with yes (l > 0). A score is the
weighted mean of the answers that count: over the questions of a dimension, and over all for the
reward. It is 0 if no question counts.

The vision tower runs once per video, the language model once per question.

Source: VisionReward, arXiv 2412.21059, which decodes the answers of CogVLM2.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float

from checkpoints_convert import qwen_vl as table
from checkpoints_convert import store
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.qwen_vl import Grids, QwenReward, Sequences
from jax_idgrpo.rewards.base import Terms
from jax_idgrpo.rewards.vlm import files, inputs
from jax_idgrpo.rewards.vlm.checklist import (
    CHECKLIST,
    Checklist,
    dimensions_of,
    read_checklist,
)
from jax_idgrpo.rewards.vlm.files import RewardModel
from jax_idgrpo.rewards.vlm.inputs import Asked, Picture, Prompting, Question
from jax_idgrpo.rewards.vlm.reward import VlmReward, common_terms, scored_frames
from jax_idgrpo.rewards.vlm.settings import Settings
from jax_idgrpo.sampling.tokenizer import ExtensibleTokenizer

SPELLINGS = (("Yes", "yes", "YES", " Yes", " yes"), ("No", "no", "NO", " No", " no"))
"""Spellings of yes and of no; those that the tokenizer splits are ignored."""
ASKING = "Answer yes or no."


def load_checklist(
    config: RewardConfig, video: tuple[int, int, int] | None = None, mesh: Mesh | None = None
) -> "ChecklistReward":
    """Load the checklist in the folder `config.vlm` and its Qwen2.5-VL.

    The network is in the same folder or in `config.vlm_base`.

    Args:
      config: configuration of the reward.
      video: frames, height and width of the videos to prepare for.
      mesh: devices of the weights and the computation.

    Raises:
      UserError: a file is missing or damaged, or does not fit the others.
    """
    if config.vlm_prompt:
        raise UserError(
            f"reward.vlm_prompt {config.vlm_prompt}: the questions of the checklist in "
            f"{config.vlm} are the prompt; leave it out"
        )
    folder = Path(config.vlm)
    checklist = read_checklist(folder / CHECKLIST)
    if not (folder / files.CONFIG).is_file():
        base = Path(config.vlm_base) if config.vlm_base else None
        folder = files.base_folder(base, Settings(), str(folder / CHECKLIST))
    model, yes = load_answering(folder, config.vlm_dtype, mesh)
    return ChecklistReward(
        model, checklist, yes, fps=config.vlm_fps, video=video, rows=config.vlm_rows, mesh=mesh
    )


def load_answering(
    folder: Path, dtype: str = "bfloat16", mesh: Mesh | None = None
) -> tuple[RewardModel, int]:
    """Read a published Qwen2.5-VL whose outputs are the logits of the spellings of yes and of no.

    Args:
      folder: the model's folder.
      dtype: dtype of the weights; the rows of the outputs are float32.
      mesh: shards the weights by the table of `parallel.sharding`.

    Returns:
      The model, and the number of spellings of yes, which are the first outputs.

    Raises:
      UserError: a file is missing or damaged, or the tokenizer has no token for yes or for no.
    """
    sizes = store.read_json(folder / files.CONFIG)
    tokenizer = files.load_tokenizer(folder, ())
    yes, no = (_spelled(tokenizer, words, folder) for words in SPELLINGS)
    tensors = files.named(folder)
    head, _ = table.pop_language_head(tensors, sizes, folder)
    ids = [*yes.values(), *no.values()]
    rows = np.asarray(head)
    if max(ids) >= len(rows):
        raise UserError(
            f"{folder}: the tokenizer numbers a word {max(ids)}, but the model has {len(rows)} "
            "tokens; get both from the same folder"
        )
    tensors[table.HEAD] = rows[ids].astype(np.float32)
    settings = answering(folder, dtype, (*yes, *no))
    network = files.fill(sizes, settings, tensors, tokenizer, dtype, True, mesh, str(folder))
    return RewardModel(network, tokenizer, settings, {}, sizes), len(yes)


def answering(folder: Path, dtype: str, words: Sequence[str]) -> Settings:
    """Return the settings of a network whose outputs are the logits of words.

    Args:
      folder: the model's folder.
      dtype: dtype of the weights.
      words: the words.
    """
    return Settings(
        dimensions=tuple(words), pooling="last", rank=0, alpha=0.0, base=folder.name, dtype=dtype
    )


def describe_checklist(
    config: RewardConfig, video: tuple[int, int, int], mesh: Mesh | None = None
) -> "ChecklistReward":
    """Describe the reward of `load_checklist` for a plan, without reading a tensor.

    Every spelling counts as a token, as in the published tokenizer.

    Args:
      config: configuration of the reward.
      video: frames, height and width of the videos to prepare for.
      mesh: devices of the weights and the computation.

    Raises:
      UserError: a file on this machine cannot be used.
    """
    folder = Path(config.vlm)
    words = [word for spellings in SPELLINGS for word in spellings]
    settings = answering(folder, config.vlm_dtype, words)
    model = files.describe(folder, config.vlm_base or None, config.vlm_dtype, mesh, settings)
    checklist, yes = read_checklist(folder / CHECKLIST), len(SPELLINGS[0])
    return ChecklistReward(
        model, checklist, yes, fps=config.vlm_fps, video=video, rows=config.vlm_rows, mesh=mesh
    )


def _spelled(tokenizer: ExtensibleTokenizer, words: Sequence[str], folder: Path) -> dict[str, int]:
    """Return the ids of the spellings that are one token.

    Args:
      tokenizer: the tokenizer.
      words: the spellings.
      folder: for the message.

    Raises:
      UserError: no spelling is one token.
    """
    split = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in words}
    found = {word: int(ids[0]) for word, ids in split.items() if len(ids) == 1}
    if not found:
        raise UserError(
            f"{folder}: the tokenizer has no token for {words[0]!r}; use that of a Qwen2.5-VL model"
        )
    return found


def log_odds(network: QwenReward, asked: Asked, frames: Grids, yes: int) -> Float[Array, "B Q"]:
    """Compute the log-odds of yes against no of every question.

    Args:
      network: its outputs are the logits of spellings, those of yes first.
      asked: inputs of B rows with Q sequences each, from `inputs.ask_each`.
      frames: grids of the videos, those of a row adjacent.
      yes: number of spellings of yes.
    """
    rows = asked.ids.shape[0]
    parts = [network.features(grids, rows) for grids in (asked.pictures(), frames)]
    vision = jnp.concatenate(parts, axis=1)

    def answer(sequences: Sequences) -> Float[Array, " B"]:
        hidden = network.hidden(sequences, vision)
        last = jnp.take_along_axis(hidden, sequences.token[..., None], axis=1)
        logits = network.rm_head(last)[:, 0]
        positive, negative = jnp.split(logits, [yes], axis=-1)
        return jax.nn.logsumexp(positive, -1) - jax.nn.logsumexp(negative, -1)

    sequences = Sequences(
        ids=jnp.moveaxis(asked.ids, 1, 0),
        vision=jnp.moveaxis(asked.vision, 1, 0),
        position=jnp.transpose(jnp.asarray(asked.position), (1, 2, 0, 3)),
        token=jnp.moveaxis(asked.token, 1, 0),
        mask=jnp.moveaxis(asked.tokens, 1, 0),
    )
    return jax.lax.map(answer, sequences).T


def counted(logits: Float[Array, "B Q"], checklist: Checklist) -> Float[Array, "B Q"]:
    """Return 1 for every question that counts, and 0 where a gate is not answered with yes."""
    found: list[Array] = []
    for asked in checklist:
        open_ = jnp.ones(logits.shape[0], jnp.float32)
        if asked.gate is not None:
            gate = asked.gate - 1
            open_ = found[gate] * (logits[:, gate] > 0)
        found.append(open_)
    return jnp.stack(found, axis=1)


def counted_answers(logits: Float[Array, "B Q"], checklist: Checklist) -> Float[Array, "B Q"]:
    """Return the answers in [-1, 1], and 0 for questions that do not count."""
    return counted(logits, checklist) * (2 * jax.nn.sigmoid(logits) - 1)


def checklist_terms(logits: Float[Array, "B Q"], checklist: Checklist) -> Terms:
    """Compute the reward and one term per dimension, in [-1, 1].

    Args:
      logits: log-odds of yes of every question.
      checklist: the questions.
    """
    answers = counted_answers(logits, checklist)
    weights = counted(logits, checklist) * jnp.asarray([asked.weight for asked in checklist])

    def mean(columns: Sequence[int]) -> Array:
        part = np.asarray(columns)
        total = jnp.sum(weights[:, part], axis=1)
        summed = jnp.sum((weights * answers)[:, part], axis=1)
        return jnp.where(total > 0, summed / jnp.where(total > 0, total, 1.0), 0.0)

    return {"reward": mean(range(len(checklist)))} | {
        name: mean([n for n, asked in enumerate(checklist) if asked.dimension == name])
        for name in dimensions_of(checklist)
    }


class ChecklistReward(VlmReward):
    """Score videos by a checklist.

    The terms are the reward, every dimension, and the motion of the video.
    """

    def __init__(
        self,
        model: RewardModel,
        checklist: Checklist,
        yes: int,
        *,
        fps: float = 10.0,
        video: tuple[int, int, int] | None = None,
        rows: int = 0,
        mesh: Mesh | None = None,
    ):
        """Set up the scoring program.

        Args:
          model: network of `load_answering`, with its tokenizer and settings.
          checklist: the questions.
          yes: number of outputs that are spellings of yes.
          fps: as for `VlmReward`.
          video: as for `VlmReward`.
          rows: as for `VlmReward`.
          mesh: as for `VlmReward`.
        """
        super().__init__(model, "", fps=fps, video=video, rows=rows, mesh=mesh)
        self.checklist = checklist
        graph = nnx.graphdef(model.network)

        def answers(state: nnx.State, videos: Array, asked: Asked) -> Float[Array, "B Q"]:
            frames = scored_frames(videos, self.settings, self.vision, fps)
            return log_odds(nnx.merge(graph, state), asked, frames, yes)

        def terms(state: nnx.State, videos: Array, asked: Asked) -> Terms:
            found = checklist_terms(answers(state, videos, asked), checklist)
            return common_terms(found, videos, asked)

        self._answers = jax.jit(answers)
        self._ask_for(
            dimensions_of(checklist),
            [Prompting(model.tokenizer, f"\n{asked.question} {ASKING}", ()) for asked in checklist],
            terms,
        )

    def padded(
        self, photos: Sequence[Sequence[Picture]], questions: Sequence[Sequence[Question]]
    ) -> Asked:
        """Pad the inputs of the rows; every row has all questions."""
        return inputs.ask_each(photos, questions, self.vision)

    def log_odds(
        self, videos: Float[ArrayLike, "B T H W 3"], encoded: Asked
    ) -> Float[Array, "B Q"]:
        """Compute the log-odds of yes of every question, without gates."""
        count, placed = self._placed((videos, encoded))
        return self._answers(self.state, *placed)[:count]
