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
POOLINGS = ("special", "last", "mean")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Contents of `model_config.json`, without the sizes.

    Attributes:
      dimensions: names of the scores, such as SA, or VQ, MQ and TA.
      pooling: position of the scored state, "special", "last" or "mean".
      frames: frames to sample (0: by `fps`).
      fps: frames per second to sample (0: by `frames`).
      pixels: maximum pixels of a picture or frame.
      template: name of the prompt.
      base: name of the base model.
      dtype: dtype of the stored tensors.
      mean: mean of each dimension, for normalisation (0 if the file has none).
      deviation: standard deviation of each dimension (1 if the file has none).
      rank: rank of the adapter on the language model; 0 means no adapter.
      alpha: LoRA alpha of the adapter.
    """

    dimensions: tuple[str, ...] = ("SA",)
    pooling: str = "special"
    frames: float = 5.0
    fps: float = 0.0
    pixels: int = 399_360
    template: str = "subject_alignment_special"
    base: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    dtype: str = "bfloat16"
    mean: tuple[float, ...] = (0.0,)
    deviation: tuple[float, ...] = (1.0,)
    rank: int = 64
    alpha: float = 128.0

    @property
    def tokens(self) -> tuple[str, ...]:
        """Tokens at which the scores are read, one per dimension; empty for other poolings."""
        return (
            tuple(f"<|{name}_reward|>" for name in self.dimensions)
            if self.pooling == "special"
            else ()
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: Path) -> "Settings":
        """Parse the object in `model_config.json`.

        Raises:
          UserError: an entry is missing or cannot be used.
        """
        try:
            data, model, peft = (
                values["data_config"],
                values["model_config"],
                values["peft_lora_config"],
            )
            names = tuple(
                [data["eval_dim"]] if isinstance(data["eval_dim"], str) else data["eval_dim"]
            )
            pooling = "special" if model["use_special_tokens"] else model["reward_token"]
            normal = values.get("inference_config") or {}
            found = cls(
                dimensions=names,
                pooling=pooling,
                frames=float(data["num_frames"] or 0),
                fps=float(data["fps"] or 0),
                pixels=int(data["max_frame_pixels"]),
                template=data["prompt_template_type"],
                base=model["model_name_or_path"],
                dtype=model["torch_dtype"],
                mean=tuple(float(normal.get(f"{name}_mean", 0)) for name in names),
                deviation=tuple(float(normal.get(f"{name}_std", 1)) for name in names),
                rank=int(peft["lora_r"]) if peft["lora_enable"] else 0,
                alpha=float(peft["lora_alpha"]) if peft["lora_enable"] else 0.0,
            )
            outputs, other = (
                int(model["output_dim"]),
                bool(peft["use_rslora"] or peft["vision_lora"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{source}: does not describe a reward ({type(error).__name__}: {error}); get the file again"
            ) from None
        if pooling not in POOLINGS:
            raise UserError(
                f"{source}: reward_token is {pooling!r}; {', '.join(POOLINGS)} are supported"
            )
        if outputs != len(names):
            raise UserError(
                f"{source}: output_dim is {outputs}, but eval_dim names {len(names)} scores ({', '.join(names)})"
            )
        if other:
            raise UserError(
                f"{source}: use_rslora or vision_lora is true; only plain LoRA on the language model is supported"
            )
        if min(found.deviation) <= 0:
            raise UserError(
                f"{source}: a standard deviation of inference_config is not positive; get the file again"
            )
        return found

    def to_json(self) -> dict[str, object]:
        """Return the object that `from_json` and the published code read."""
        normal = {
            f"{name}_mean": value for name, value in zip(self.dimensions, self.mean, strict=True)
        }
        normal |= {
            f"{name}_std": value
            for name, value in zip(self.dimensions, self.deviation, strict=True)
        }
        plain = set(self.mean) == {0.0} and set(self.deviation) == {1.0}
        return {
            "data_config": {
                "meta_data": "",
                "data_dir": "",
                "eval_dim": list(self.dimensions),
                "max_frame_pixels": self.pixels,
                "num_frames": self.frames or None,
                "fps": self.fps or None,
                "prompt_template_type": self.template,
                "sample_type": "uniform",
            },
            "model_config": {
                "model_name_or_path": self.base,
                "output_dim": len(self.dimensions),
                "use_special_tokens": self.pooling == "special",
                "reward_token": self.pooling,
                "torch_dtype": self.dtype,
                "loss_type": "btt",
            },
            "peft_lora_config": {
                "lora_enable": self.rank > 0,
                "vision_lora": False,
                "lora_r": self.rank,
                "lora_alpha": self.alpha,
                "lora_namespan_exclude": ["lm_head", "rm_head", "embed_tokens", "visual"],
                "use_rslora": False,
            },
            **({} if plain else {"inference_config": normal}),
        }


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


def _named(path: Path) -> dict[str, Tensor]:
    """Open the tensors of a file or folder under the names of transformers 4.

    The tied output layer is omitted, because no reward reads it.
    """
    found: dict[str, Tensor] = {
        table.canonical(name): tensor for name, tensor in store.open_tensors(path).items()
    }
    found.pop(table.TIED, None)
    return found


def _base(base: Path | None, settings: Settings, reason: str) -> Path:
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
        tensors = _named(_base(base, settings, str(checkpoint / ADAPTER))) | _named(
            checkpoint / TRAINED
        )
        if settings.rank or (checkpoint / ADAPTER).is_file():
            tensors |= _named(checkpoint / ADAPTER)
    holder = (
        folder
        if (folder / TOKENIZER).is_file()
        else _base(base, settings, f"{folder}, which has no tokenizer,")
    )
    tokenizer = load_tokenizer(holder, settings.tokens)
    sizes = store.read_json(
        (folder if (folder / CONFIG).is_file() else _base(base, settings, str(folder))) / CONFIG
    )
    network = _fill(sizes, settings, tensors, tokenizer, dtype, merge, mesh, str(checkpoint))
    return RewardModel(network, tokenizer, settings, described, sizes)


def describe(
    folder: str | Path,
    base: str | Path | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
) -> RewardModel:
    """Describe a reward folder for a plan, without tokenizer and without reading a tensor.

    The network is that of `load`, as shapes. If the configuration files are not on this machine,
    the published sizes are used, with a warning.

    Args:
      folder: the reward.
      base: base Qwen2.5-VL folder.
      dtype: dtype of the weights.
      mesh: shards the weights by the table of `parallel.sharding`.

    Raises:
      UserError: a file on this machine cannot be used.
    """
    holders = [Path(place) for place in (folder, base) if place]
    stated = Path(folder) / MODEL_CONFIG
    described = store.read_json(stated) if stated.is_file() else Settings().to_json()
    settings = Settings.from_json(described, stated)
    source = next((holder / CONFIG for holder in holders if (holder / CONFIG).is_file()), None)
    sizes = table.config_to_json(QwenConfig()) if source is None else store.read_json(source)
    if source is None or not stated.is_file():
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
    base = _base(Path(base), settings, "training")
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
    network = _fill(sizes, settings, tensors, tokenizer, dtype, False, mesh, str(base))
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


def _fill(
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
