"""The model card of an export: a `README.md` with the fields that hubs read, the base model and the training configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FILE = "README.md"
LICENSE = "apache-2.0"  # of Wan 2.1, Phantom and this project
FACE = "original face network"  # of the formats; its weights carry a licence of their own
OTHER_LICENSE = "other"
LIBRARIES = {
    "peft": "peft",
    "diffusers-lora": "diffusers",
    "diffusers": "diffusers",
    "merged": "diffusers",
    "original": "wan2.1",
    FACE: "pytorch",
}
LOADING = {
    "peft": "PeftModel.from_pretrained(transformer, FOLDER)",
    "diffusers-lora": "pipe.load_lora_weights(FOLDER)",
    "diffusers": "{pipeline}.from_pretrained(FOLDER)",
    "merged": "{pipeline}.from_pretrained(FOLDER)",
}


def render(
    form: str,
    what: str,
    base: str | None,
    license: str,
    training: Mapping[str, Any] | None,
    scale: tuple[int, float] | None = None,
    pipeline: str = "WanVACEPipeline",
) -> str:
    """The text. form: the format of the export. what: one line of the contents. base: name or path of the base model.

    training: the configuration of the run; None when these weights were not trained here. scale: rank and alpha of an adapter.
    """
    fields = {
        "license": license,
        "library_name": LIBRARIES[form],
        "tags": ["jax-idgrpo", "face" if form == FACE else "video"],
    }
    if form != FACE:
        fields["pipeline_tag"] = "text-to-video"
    if base is not None:
        fields["base_model"] = base
    if scale is not None:
        fields["base_model_relation"] = "finetune" if form == "merged" else "adapter"
    lines = [
        "---",
        *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()),
        "---",
        "",
    ]
    lines += [f"# {what}", "", f"Written by jax-idgrpo in the format {form}.", ""]
    lines += [f"- Base model: {base or 'not stated'}", f"- Licence: {license}"]
    if scale is not None:
        lines.append(
            f"- LoRA: rank {scale[0]}, alpha {scale[1]:g}"
            + (", merged in float32" if form == "merged" else "")
        )
    if form in LOADING:
        lines += ["", "```python", LOADING[form].format(pipeline=pipeline), "```"]
    lines += ["", "## Training configuration", ""]
    if training is None:
        lines.append(
            "None is known: these weights were not trained here, or the configuration of the run was not beside them."
        )
    else:
        lines += [
            "```json",
            json.dumps(training, indent=2, sort_keys=True, ensure_ascii=False),
            "```",
        ]
    return "\n".join([*lines, ""])
