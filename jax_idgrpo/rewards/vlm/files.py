"""Read and write the vision-language reward: the released folder, and its base Qwen2.5-VL folder.

    FOLDER/model_config.json         the scores and how they are computed (`Settings`)
    FOLDER/config.json               sizes of the network, as transformers writes them
    FOLDER/checkpoint-N/             the highest N is read; either
        adapter_model.safetensors      the adapter of the language model, and
        non_lora_state_dict.pth        the other trained tensors: vision tower, token embeddings,
                                       head
      or
        model.pth                      the whole network

Folders written here also hold the tokenizer and the text of the prompt, `prompt.txt`. The first
form needs the weights of the base model.

Source: `alibaba/identity-grpo` and `KwaiVGI/VideoAlign`, `utils.py` and `train_reward.py`.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Key
from numpy.typing import DTypeLike

from checkpoints_convert import qwen_vl as table
from checkpoints_convert import rules, store
from checkpoints_convert.lazy import Tensor
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.layers import Dtypes, LoRAParam
from jax_idgrpo.models.qwen_vl import QwenConfig, QwenReward
from jax_idgrpo.parallel import sharding
from jax_idgrpo.rewards.vlm.settings import Settings
from jax_idgrpo.sampling.tokenizer import ExtensibleTokenizer, read_tokenizer

MODEL_CONFIG, CONFIG, TOKENIZER, PROMPT = (
    "model_config.json",
    "config.json",
    "tokenizer_config.json",
    "prompt.txt",
)
ADAPTER, TRAINED, WHOLE = "adapter_model.safetensors", "non_lora_state_dict.pth", "model.pth"
EMBEDDING = "model.embed_tokens.weight"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A network with its tokenizer and settings.

    Attributes:
      network: the network.
      tokenizer: tokenizer of transformers; None in a plan.
      settings: parsed `model_config.json`.
      described: contents of `model_config.json`, kept for exports.
      sizes: contents of `config.json`, kept for exports.
    """

    network: QwenReward
    tokenizer: Any
    settings: Settings
    described: Mapping[str, Any]
    sizes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Merged:
    """W + (alpha / R) B A in the dtype of W, computed on reading."""

    weight: Tensor
    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.weight.dtype)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        change = np.asarray(self.up, np.float32) @ np.asarray(self.down, np.float32)
        merged = np.asarray(self.weight).astype(np.float32) + np.float32(self.scale) * change
        return np.asarray(merged.astype(self.dtype), dtype=dtype)


# ---- reading -------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, tokens: tuple[str, ...]) -> ExtensibleTokenizer:
    """Load the tokenizer of a folder and add the reward tokens; nothing is downloaded.

    Raises:
      UserError: a file is missing or cannot be read, or the tokenizer is not of a Qwen2.5-VL.
    """
    tokenizer = read_tokenizer(folder)
    known = tokenizer.get_vocab()
    if missing := [token for token in VISION_TOKENS if token not in known]:
        raise UserError(
            f"{folder}: the tokenizer does not know {missing[0]}; use that of a Qwen2.5-VL model"
        )
    tokenizer.add_tokens([token for token in tokens if token not in known], special_tokens=True)
    return tokenizer


def newest(folder: Path) -> Path:
    """Return the checkpoint with the highest number in a reward folder.

    Raises:
      UserError: the folder has no checkpoint.
    """
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    if not found:
        raise UserError(
            f"{folder}: holds no checkpoint-N folder; unpack the whole archive of the reward"
        )
    return found[max(found)]


def named(path: Path) -> dict[str, Tensor]:
    """Open the tensors of a file or folder under the names of transformers 4."""
    return {table.canonical(name): tensor for name, tensor in store.open_tensors(path).items()}


def _named(path: Path) -> dict[str, Tensor]:
    """Open the tensors without the output layer, which a reward with a head does not read."""
    found = named(path)
    found.pop(table.TIED, None)
    return found


def base_folder(base: Path | None, settings: Settings, reason: str) -> Path:
    if base is None:
        raise UserError(
            f"{reason} needs the files of {settings.base}: get that model's folder and name it in reward.vlm_base"
        )
    if not base.is_dir():
        raise UserError(
            f"reward.vlm_base {base}: no such folder; get the folder of {settings.base}"
        )
    return base


def load(
    folder: str | Path,
    base: str | Path | None = None,
    dtype: str = "bfloat16",
    merge: bool = True,
    mesh: Mesh | None = None,
) -> RewardModel:
    """Read a reward folder.

    Args:
      folder: the reward.
      base: base Qwen2.5-VL folder; supplies weights and tokenizer missing from `folder`.
      dtype: dtype of the weights.
      merge: whether to add the adapter to the weights instead of keeping both.
      mesh: shards the weights by the table of `parallel.sharding`.

    Raises:
      UserError: a file is missing or damaged, or does not fit the others.
    """
    folder, base = Path(folder), Path(base) if base else None
    if not folder.is_dir():
        raise UserError(
            f"reward.vlm {folder}: no such folder; pass the unpacked reward, which holds {MODEL_CONFIG}"
        )
    described = store.read_json(folder / MODEL_CONFIG)
    settings = Settings.from_json(described, folder / MODEL_CONFIG)
    checkpoint = newest(folder)
    if (checkpoint / WHOLE).is_file():
        tensors = _named(checkpoint / WHOLE)
    else:
        tensors = _named(base_folder(base, settings, str(checkpoint / ADAPTER))) | _named(
            checkpoint / TRAINED
        )
        if settings.rank or (checkpoint / ADAPTER).is_file():
            tensors |= _named(checkpoint / ADAPTER)
    holder = (
        folder
        if (folder / TOKENIZER).is_file()
        else base_folder(base, settings, f"{folder}, which has no tokenizer,")
    )
    tokenizer = load_tokenizer(holder, settings.tokens)
    sizes = store.read_json(
        (folder if (folder / CONFIG).is_file() else base_folder(base, settings, str(folder)))
        / CONFIG
    )
    network = fill(sizes, settings, tensors, tokenizer, dtype, merge, mesh, str(checkpoint))
    return RewardModel(network, tokenizer, settings, described, sizes)


def describe(
    folder: str | Path,
    base: str | Path | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    settings: Settings | None = None,
) -> RewardModel:
    """Describe a reward folder for a plan, without tokenizer and without reading a tensor.

    The network is that of `load`, as shapes. If the configuration files are not on this machine,
    the published sizes are used, with a warning.

    Args:
      folder: the reward.
      base: base Qwen2.5-VL folder.
      dtype: dtype of the weights.
      mesh: shards the weights by the table of `parallel.sharding`.
      settings: settings of a model without a reward's own file; None reads that file.

    Raises:
      UserError: a file on this machine cannot be used.
    """
    holders = [Path(place) for place in (folder, base) if place]
    stated = Path(folder) / MODEL_CONFIG
    described: dict[str, Any] = {}
    complete = settings is not None or stated.is_file()
    if settings is None:
        described = store.read_json(stated) if complete else Settings().to_json()
        settings = Settings.from_json(described, stated)
    source = next((holder / CONFIG for holder in holders if (holder / CONFIG).is_file()), None)
    sizes = table.config_to_json(QwenConfig()) if source is None else store.read_json(source)
    if source is None or not complete:
        lacking = MODEL_CONFIG if source else CONFIG
        warnings.warn(
            f"reward.vlm {folder}: has no {lacking} on this machine; planned with the published one",
            stacklevel=2,
        )
    config = _config(
        sizes, settings, sizes.get("text_config", sizes)["vocab_size"], True, source or stated
    )
    network = nnx.eval_shape(
        lambda: QwenReward(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(network)
    return RewardModel(
        nnx.merge(graph, state if mesh is None else _placed(state, mesh)),
        None,
        settings,
        described,
        sizes,
    )


def start(
    base: str | Path,
    settings: Settings,
    key: Key[Array, ""],
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
) -> RewardModel:
    """Create a reward before training: the base model, a fresh adapter, and a random head.

    The embedding table is cut to the tokenizer's vocabulary, with the reward tokens last.

    Args:
      base: base Qwen2.5-VL folder.
      settings: settings of the reward.
      key: random key of adapter and head.
      dtype: dtype of the weights.
      mesh: shards the weights by the table of `parallel.sharding`.

    Raises:
      UserError: a file is missing or damaged, or is of another model.
    """
    base = base_folder(Path(base), settings, "training")
    tokenizer = load_tokenizer(base, settings.tokens)
    sizes = store.read_json(base / CONFIG)
    tensors = _named(base)
    if EMBEDDING in tensors and tensors[EMBEDDING].shape[0] > len(tokenizer):
        tensors[EMBEDDING] = np.asarray(tensors[EMBEDDING])[: len(tokenizer)]
    config = _config(sizes, settings, len(tokenizer), False, base / CONFIG)

    # Compiled, so that unused parts of the network are not computed.
    @jax.jit
    def fresh() -> tuple[nnx.State, nnx.State]:
        drawn = QwenReward(config, dtypes=Dtypes.named(dtype), rngs=nnx.Rngs(key))
        return nnx.state(drawn.rm_head), nnx.state(drawn, LoRAParam)

    head, adapter = fresh()
    tensors[table.HEAD] = np.asarray(head["kernel"][...]).T
    if settings.rank:
        tensors |= rules.to_torch(table.lora_rules("model."), adapter)
    described = settings.to_json()
    network = fill(sizes, settings, tensors, tokenizer, dtype, False, mesh, str(base))
    return RewardModel(
        network, tokenizer, settings, described, sizes | {"vocab_size": len(tokenizer)}
    )


def _config(
    sizes: Mapping[str, Any], settings: Settings, vocabulary: int, merge: bool, source: Path
) -> QwenConfig:
    try:
        config = table.config_from_json(dict(sizes))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: does not describe a Qwen2.5-VL ({type(error).__name__}: {error}); get the file again"
        ) from None
    rank, alpha = (0, 0.0) if merge else (settings.rank, settings.alpha)
    count = len(settings.dimensions)
    return dataclasses.replace(config, vocabulary=vocabulary, outputs=count, rank=rank, alpha=alpha)


def fill(
    sizes: Mapping[str, Any],
    settings: Settings,
    tensors: dict[str, Tensor],
    tokenizer: ExtensibleTokenizer,
    dtype: str,
    merge: bool,
    mesh: Mesh | None,
    source: str,
) -> QwenReward:
    """Build the network from the tensors, and check that the tokenizer fits the embedding table."""
    if EMBEDDING not in tensors:
        raise UserError(f"{source}: the tensors do not fit the network; 1 missing: {EMBEDDING}")
    vocabulary = int(tensors[EMBEDDING].shape[0])
    ids = [tokenizer.convert_tokens_to_ids(token) for token in settings.tokens]
    if settings.tokens and (
        len(tokenizer) != vocabulary or ids != list(range(vocabulary - len(ids), vocabulary))
    ):
        raise UserError(
            f"{source}: the embedding table has {vocabulary} rows, {', '.join(settings.tokens)} last, but the tokenizer knows "
            f"{len(tokenizer)} tokens with {', '.join(settings.tokens)} at {', '.join(map(str, ids))}; use the tokenizer of {settings.base}"
        )
    config = _config(sizes, settings, vocabulary, merge, Path(source))
    if merge and settings.rank:
        tensors = merged(tensors, settings.alpha / settings.rank)
    adapter = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    rest = {name: tensor for name, tensor in tensors.items() if ".lora_" not in name}
    dtypes = Dtypes.named(dtype)
    network = nnx.eval_shape(lambda: QwenReward(config, dtypes=dtypes, rngs=nnx.Rngs(0)))
    graph, lora, weights = nnx.split(network, LoRAParam, ...)
    if mesh is not None:
        lora, weights = (_placed(state, mesh) for state in (lora, weights))
    filled = [rules.to_jax(table.rules(config), rest, weights, source)]
    if config.rank:
        filled.append(rules.to_jax(table.lora_rules("model."), adapter, lora, source))
    elif adapter:
        raise UserError(
            f"{source}: holds the adapter tensor {next(iter(adapter))}, but {MODEL_CONFIG} says lora_enable false"
        )
    return nnx.merge(graph, *filled)


def _placed(state: nnx.State, mesh: Mesh) -> nnx.State:
    """Attach the shardings of the table to shapes."""
    shardings = sharding.state_shardings(mesh, state)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        shardings,
    )


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Add every adapter to its weight; names are those of transformers 4.

    An incomplete adapter is left as it is, so that the table reports it.
    """
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        up, weight = f"{layer}.lora_B.weight", f"{layer}.weight"
        if up in found and weight in found:
            found[weight] = Merged(found[weight], found.pop(name), found.pop(up), scale)
    return found


# ---- writing -------------------------------------------------------------------------------------


def save(model: RewardModel, folder: str | Path, number: int = 1, text: str = "") -> None:
    """Write a reward folder with one checkpoint.

    The checkpoint has the form of the network: adapter and other trained tensors, or the whole.
    Tensors are stored in the dtype of the settings if that is lossless, and in float32 otherwise.
    The tokenizer is stored too. An existing folder is replaced if it is a reward or empty.

    Args:
      model: the reward.
      folder: destination.
      number: number of the checkpoint.
      text: text of the prompt; stored if not empty.

    Raises:
      UserError: the destination is something else, or cannot be written.
    """
    config = model.network.config
    _, lora, rest = nnx.split(model.network, LoRAParam, ...)
    weights = _narrowed(rules.to_torch(table.rules(config), rest), model.settings.dtype)
    described = {
        **model.described,
        "peft_lora_config": {**model.described["peft_lora_config"], "lora_enable": config.rank > 0},
    }
    with store.atomic_path(folder, MODEL_CONFIG) as new:
        checkpoint = new / f"checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        if config.rank:
            trained = {
                name: tensor
                for name, tensor in weights.items()
                if not name.startswith(("model.layers.", "model.norm."))
            }
            store.write_file(
                checkpoint / TRAINED,
                {table.PEFT_PREFIX + name: tensor for name, tensor in trained.items()},
            )
            store.write_file(
                checkpoint / ADAPTER,
                _narrowed(rules.to_torch(table.lora_rules(), lora), model.settings.dtype),
            )
        else:
            store.write_file(checkpoint / WHOLE, weights | {table.TIED: weights[EMBEDDING]})
        model.tokenizer.save_pretrained(new)
        if text:
            (new / PROMPT).write_text(text, "utf-8")
        store.write_json(new / CONFIG, {**model.sizes, "vocab_size": config.vocabulary})
        store.write_json(new / MODEL_CONFIG, described)


def _narrowed(tensors: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Cast each tensor to `dtype` if that is lossless, to float32 otherwise."""
    wanted = np.dtype(jax.numpy.dtype(dtype))

    def one(tensor: np.ndarray) -> np.ndarray:
        narrow = tensor.astype(wanted)
        return (
            narrow
            if np.array_equal(narrow.astype(np.float32), tensor.astype(np.float32))
            else tensor.astype(np.float32)
        )

    return {name: one(tensor) for name, tensor in tensors.items()}
