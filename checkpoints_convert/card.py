"""Write the model card of an export: fields for hubs, base model, and training configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

FILE = "README.md"
LICENSE = "apache-2.0"  # of Wan 2.1, Phantom and this project
FACE = "original face network"  # a format whose weights have licences of their own
OTHER_LICENSE = "other"
LIBRARIES = {
    "peft": "peft",
    "diffusers-lora": "diffusers",
    "comfyui": "comfyui",
    "kohya": "comfyui",
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
    training: Mapping[str, object] | None,
    scale: tuple[int, float] | None = None,
    pipeline: str = "WanVACEPipeline",
    notes: Sequence[str] = (),
) -> str:
    """Return the text of a model card.

    Args:
      form: format of the export.
      what: title, one line.
      base: name or path of the base model.
      license: licence of the weights.
      training: configuration of the run; None when these weights were not trained here.
      scale: rank and alpha of an adapter.
      pipeline: class of diffusers that loads the export.
      notes: what was chosen, left out or dequantized on the way.
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
    lines += [f"- {note}" for note in notes]
    if form in LOADING:
        lines += ["", "```python", LOADING[form].format(pipeline=pipeline), "```"]
    lines += ["", "## Training configuration", ""]
    if training is None:
        lines.append(
            "Unknown: these weights were not trained here, or the configuration of the run was not "
            "beside them."
        )
    else:
        lines += [
            "```json",
            json.dumps(training, indent=2, sort_keys=True, ensure_ascii=False),
            "```",
        ]
    return "\n".join([*lines, ""])
