"""Define `Settings`, the contents of a vision-language reward's `model_config.json`.

Source: `alibaba/identity-grpo` and `KwaiVGI/VideoAlign`, `train_reward.py`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_idgrpo.errors import UserError

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
