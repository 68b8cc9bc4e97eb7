"""Read the SentencePiece tokenizer inside ComfyUI's text encoders, and write it for transformers.

ComfyUI stores `spiece.model`, a protobuf message, as the bytes of the tensor `spiece_model`. UMT5's
is a Unigram model: pieces with scores, and a table of character normalisation. A token sequence
ends with `</s>`. Sources: SentencePiece `sentencepiece_model.proto`; transformers
`tokenization_t5.py`.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TENSOR = "spiece_model"
LIMIT = 1 << 28  # bytes; UMT5's has 4.5 million
UNIGRAM = 1  # of TrainerSpec.model_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # of SentencePiece.type
END, PAD = "</s>", "<pad>"
SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class Model:
    """A Unigram model.

    Attributes:
      pieces: (text, score, type) of every id.
      normalisation: table of character normalisation; empty for none.
      model_type: algorithm, `UNIGRAM` or another.
    """

    pieces: list[tuple[str, float, int]]
    normalisation: bytes
    model_type: int


def parse(data: bytes) -> Model:
    """Parse a `spiece.model`.

    Raises:
      ValueError: the bytes are no Unigram model that ends sequences with `</s>`.
    """
    pieces: list[tuple[str, float, int]] = []
    normalisation, model_type = b"", UNIGRAM
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            for inner, found in _fields(_message(value)):
                if inner == 3 and isinstance(found, int):
                    model_type = found
        elif number == 3:
            for inner, found in _fields(_message(value)):
                if inner == 2 and isinstance(found, bytes):
                    normalisation = found
    texts = [text for text, _, _ in pieces]
    if model_type != UNIGRAM:
        raise ValueError("it is no Unigram model")
    if not {END, PAD} <= set(texts):
        raise ValueError(f"it has no {END} or no {PAD}")
    if sum(kind == UNKNOWN for _, _, kind in pieces) != 1 or len(set(texts)) != len(texts):
        raise ValueError("its pieces are not those of one vocabulary")
    return Model(pieces, normalisation, model_type)


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _message(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _message(value))
        elif number == 3 and isinstance(value, int):
            kind = value
    return text, score, kind


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a message should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) of the fields of a protobuf message; fixed widths are bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("it ends inside a number")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        width = {1: 8, 2: None, 5: 4}.get(key & 7, -1)
        count = varint() if width is None else width
        if count < 0 or at + count > len(data):
            raise ValueError("it is no complete protobuf message")
        yield key >> 3, data[at : at + count]
        at += count


def files(model: Model) -> dict[str, str]:
    """Make the files of the tokenizer for transformers, by name.

    Raises:
      ValueError: the library refuses the model.
    """
    vocabulary = [(text, score) for text, score, _ in model.pieces]
    unknown = next(index for index, piece in enumerate(model.pieces) if piece[2] == UNKNOWN)
    has_bytes = any(kind == BYTE for _, _, kind in model.pieces)
    try:
        made = Tokenizer(models.Unigram(vocabulary, unknown, byte_fallback=has_bytes))
        if model.normalisation:
            made.normalizer = normalizers.Precompiled(model.normalisation)
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(str(error)) from error
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
        ]
    )
    made.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    end = next(index for index, piece in enumerate(model.pieces) if piece[0] == END)
    made.post_processor = processors.TemplateProcessing(
        single=["$A", END], pair=["$A", END, "$B", END], special_tokens=[(END, end)]
    )
    special = [text for text, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)]
    made.add_special_tokens(special)
    made.add_tokens([text for text, _, kind in model.pieces if kind == USER_DEFINED])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": model.pieces[unknown][0],
        "model_max_length": 512,
    }
    return {
        "tokenizer.json": made.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
    }
