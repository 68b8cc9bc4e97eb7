"""Small Qwen2.5-VL folders, written by the original libraries: a base model with its tokenizer, and a reward as it was released."""

import functools
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ROWS = 272  # of the base model's table, more than its tokenizer knows
TEMPLATE = (  # the part of the processor's template that a reward meets, written from its description
    "{% set count = namespace(image=0, video=0) %}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set count.image = count.image + 1 %}"
    "{% if add_vision_id %}Picture {{ count.image }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}{% set count.video = count.video + 1 %}{% if add_vision_id %}Video {{ count.video }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the special tokens of the original."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=TEMPLATE
    )


class TorchReward(Qwen2_5_VLForConditionalGeneration):
    """The original network with the head of the reward."""

    def __init__(self, config, outputs: int = 1):
        super().__init__(config)
        self.rm_head = torch.nn.Linear(config.text_config.hidden_size, outputs, bias=False)


def config(rows: int = ROWS) -> Qwen2_5_VLConfig:
    ids = tokenizer().convert_tokens_to_ids(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )
    text = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=rows,
        rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=1e6),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    vision = dict(
        depth=4,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=64,
        fullatt_block_indexes=[1, 3],
        window_size=112,
        patch_size=14,
        tokens_per_second=2,
    )
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
        tie_word_embeddings=True,
        attn_implementation="eager",
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter drawn, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                noise
                + (1.0 if ("norm" in name or "ln_q" in name) and name.endswith("weight") else 0.0)
            )


def write_base(folder: Path, dtype: torch.dtype = torch.float32) -> TorchReward:
    """A base model's folder; -> the network, with a random head that is not in it."""
    model = TorchReward(config())
    randomise(model, 0)
    model = model.to(dtype).eval()
    plain = Qwen2_5_VLForConditionalGeneration(config()).to(dtype)
    plain.load_state_dict(
        {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith("rm_head")
        }
    )
    plain.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def write_instruct(folder: Path, tied: bool) -> Qwen2_5_VLForConditionalGeneration:
    """A published model's folder, whose tokenizer has a token for yes and for no; -> the network."""
    words = tokenizer()
    words.add_tokens(["Yes", "yes", "No", " no"])
    sizes = config()
    sizes.tie_word_embeddings = sizes.text_config.tie_word_embeddings = tied
    model = Qwen2_5_VLForConditionalGeneration(sizes)
    randomise(model, 3)
    model.eval().save_pretrained(folder)
    words.save_pretrained(folder)
    return model


def old_name(name: str) -> str:
    """As transformers 4 wrote it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def described(
    outputs: tuple[str, ...] = ("SA",),
    pooling: str = "special",
    rank: int = 4,
    dtype: str = "float32",
    **inference,
) -> dict:
    """`model_config.json` as the release has it, the fields that no reader needs among them."""
    return {
        "data_config": {
            "meta_data": "train.csv",
            "data_dir": "DATA",
            "meta_data_test": None,
            "max_frame_pixels": 399360,
            "num_frames": 5.0,
            "fps": None,
            "p_shuffle_frames": 0.0,
            "p_color_jitter": 0.0,
            "eval_dim": list(outputs),
            "prompt_template_type": "subject_alignment_special",
            "add_noise": False,
            "sample_type": "uniform",
            "use_tied_data": True,
        },
        "training_args": {"learning_rate": 2e-06, "seed": 42},
        "model_config": {
            "model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct",
            "output_dim": len(outputs),
            "use_special_tokens": pooling == "special",
            "torch_dtype": dtype,
            "reward_token": pooling,
            "loss_type": "btt",
        },
        "peft_lora_config": {
            "lora_enable": rank > 0,
            "vision_lora": False,
            "lora_r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.05,
            "use_rslora": False,
        },
        **({"inference_config": inference} if inference else {}),
    }


def write_released(
    base: Path,
    folder: Path,
    whole: bool = False,
    outputs: tuple[str, ...] = ("SA",),
    rename=old_name,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """A reward's folder as the release writes it, every part random; -> the network that it holds."""
    model = TorchReward(config(), len(outputs))
    randomise(model, 0)
    words = tokenizer()
    words.add_tokens([f"<|{name}_reward|>" for name in outputs], special_tokens=True)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model" in name
    ]
    torch.manual_seed(2)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=targets, bias="none")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "visual" in name or "rm_head" in name or "embed_tokens" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped = wrapped.to(dtype).eval()
    checkpoint = folder / "checkpoint-21"
    checkpoint.mkdir(parents=True)
    (folder / "checkpoint-7").mkdir()
    if whole:
        torch.save(
            {rename(name): value for name, value in wrapped.state_dict().items()},
            checkpoint / "model.pth",
        )
    else:
        adapter = {
            rename(name): value.contiguous()
            for name, value in get_peft_model_state_dict(wrapped).items()
            if "lora_" in name
        }
        save_file(adapter, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
        trained = {
            rename(name): value.detach()
            for name, value in wrapped.named_parameters()
            if "visual" in name or "rm_head" in name or "embed_tokens" in name
        }
        torch.save(trained, checkpoint / "non_lora_state_dict.pth")
    (folder / "model_config.json").write_text(
        json.dumps(described(outputs, dtype=str(dtype).removeprefix("torch.")))
    )
    sizes = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(sizes | {"text_config": sizes["text_config"] | {"vocab_size": len(words)}})
    )
    return wrapped


@functools.cache
def ids_of(text: str) -> tuple[int, ...]:
    """Tokens of a text."""
    return tuple(tokenizer()(text)["input_ids"])
