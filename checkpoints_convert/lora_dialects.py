"""Define the dialects of LoRA files: the names that each program gives to A, B and alpha.

A name is a prefix, the layer, and an ending that says what the tensor is. Layers are found by
`lora_names.find` in the names of any layout, with dots, underscores or both.

Sources: peft `save_and_load.py`; diffusers `lora_conversion_utils.py`; Comfy-Org/ComfyUI
`comfy/lora.py`, `comfy/weight_adapter/lora.py`; kohya-ss/musubi-tuner `networks/lora.py`,
`convert_lora.py`; modelscope/DiffSynth-Studio `utils/lora/general.py`; aigc-apps/VideoX-Fun
`utils/lora_utils.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal

from checkpoints_convert.lora_names import DIFFUSERS, ORIGINAL, Layer

Kind = Literal["a", "b", "alpha", "bias", "magnitude", "diff", "diff_b", "diff_m"]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one program names the tensors of a LoRA.

    Attributes:
      name: of the dialect, as `inspect` shows it.
      prefix: of every name.
      column: layout of the layers' names when a file is written.
      separator: between the parts of a layer's name when a file is written.
      a: ending of A when a file is written.
      b: ending of B.
      alphas: whether a file that is written has an alpha for every layer.
      unstated: whether a file without an alpha has scale 1, so that alpha is the rank, in the
        program that defines the dialect. Without it alpha must be stated elsewhere.
    """

    name: str
    prefix: str
    column: int
    separator: str = "."
    a: str = "lora_A.weight"
    b: str = "lora_B.weight"
    alphas: bool = False
    unstated: bool = True

    def spelled(self, layer: Layer, ending: str) -> str:
        """Return the name of a tensor."""
        return f"{self.prefix}{layer.spelled(self.column).replace('.', self.separator)}.{ending}"


PEFT = Dialect("peft", "base_model.model.", DIFFUSERS, unstated=False)
DIFFUSERS_LORA = Dialect("diffusers-lora", "transformer.", DIFFUSERS)
COMFYUI = Dialect("comfyui", "diffusion_model.", ORIGINAL, alphas=True)
KOHYA = Dialect("kohya", "lora_unet_", ORIGINAL, "_", "lora_down.weight", "lora_up.weight", True)
VIDEOX_FUN = dataclasses.replace(KOHYA, name="videox-fun", prefix="lora_unet__")
BARE = Dialect("bare", "", DIFFUSERS)  # DiffSynth-Studio writes original names without a prefix
DIALECTS = (PEFT, DIFFUSERS_LORA, COMFYUI, VIDEOX_FUN, KOHYA, BARE)  # the first prefix counts
PREFIXES = tuple(dialect.prefix for dialect in DIALECTS)

# The ending of a name, and what the tensor is. An adapter's name may be in the ending, such as
# `.lora_A.default.weight`, as peft has it in memory and DiffSynth-Studio in files.
ENDINGS: tuple[tuple[str, Kind], ...] = (
    (r"\.lora_(A|down)(\.(?!bias$)[^.]+)??(\.weight)?", "a"),
    (r"\.lora_(B|up)(\.(?!bias$)[^.]+)??(\.weight)?", "b"),
    (r"\.lora\.down\.weight", "a"),
    (r"\.lora\.up\.weight", "b"),
    (r"\.lora_(B|up)(\.[^.]+)?\.bias", "bias"),
    (r"\.alpha", "alpha"),
    (r"\.lora_magnitude_vector(\.[^.]+)??(\.weight)?|\.dora_scale", "magnitude"),
    (r"\.diff", "diff"),
    (r"\.diff_b", "diff_b"),
    (r"\.diff_m", "diff_m"),
)
_NAME = re.compile(r"(?P<module>.*?)(?:" + "|".join(f"({end})" for end, _ in ENDINGS) + ")$")
TEXT_ENCODER = r"text_encoders?(_\d)?\.|lora_te\d?_"


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The tensors of a LoRA file, sorted.

    Attributes:
      dialect: of the names.
      modules: name of each module without the prefix -> what each of its tensors is -> its name.
      text: names of tensors of a text encoder.
      others: names that are of no LoRA.
      twice: two names of one tensor of a module, if there are such.
    """

    dialect: Dialect
    modules: dict[str, dict[Kind, str]]
    text: list[str]
    others: list[str]
    twice: tuple[str, str] | None = None


def dialect_of(names: Iterable[str]) -> Dialect:
    """Return the dialect of the names, judged by the first tensor of the transformer."""
    for name in names:
        if _kind(name) is not None and not re.match(TEXT_ENCODER, name):
            return next(each for each in DIALECTS if name.startswith(each.prefix))
    return BARE


def _kind(name: str) -> tuple[str, Kind] | None:
    """Split a name into module and ending; None for a tensor of no LoRA."""
    if (match := _NAME.fullmatch(name)) is None:
        return None
    for ending, kind in ENDINGS:
        if re.fullmatch(ending, name.removeprefix(match["module"])):
            return match["module"], kind
    return None


def parse(names: Iterable[str]) -> Parsed:
    """Sort the names of a LoRA file."""
    names = list(names)
    dialect = dialect_of(names)
    parsed = Parsed(dialect, {}, [], [])
    twice = None
    for name in names:
        if re.match(TEXT_ENCODER, name):
            parsed.text.append(name)
            continue
        found = _kind(name) if name.startswith(dialect.prefix) else None
        if found is None:
            parsed.others.append(name)
            continue
        module, kind = found[0].removeprefix(dialect.prefix), found[1]
        first = parsed.modules.setdefault(module, {}).setdefault(kind, name)
        twice = twice or ((first, name) if first != name else None)
    return dataclasses.replace(parsed, twice=twice)
