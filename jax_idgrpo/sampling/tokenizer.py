"""Read tokenizers, and name the methods of transformers' tokenizers that the package calls."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from checkpoints_convert import checkpoint, store
from jax_idgrpo.errors import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """Map texts to token ids and back."""

    def __call__(self, text: str | Sequence[str], **options: object) -> Mapping[str, Sequence[int]]:
        """Return "input_ids" and "attention_mask"."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""


@runtime_checkable
class ExtensibleTokenizer(Tokenizer, Protocol):
    """A tokenizer to which tokens can be added and that can be written."""

    def __len__(self) -> int:
        """Return the number of tokens."""

    def get_vocab(self) -> Mapping[str, int]:
        """Return the id of every token."""

    def add_tokens(self, tokens: Sequence[str], *, special_tokens: bool) -> int:
        """Add tokens at the end of the vocabulary."""

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the id of a token."""

    def save_pretrained(self, folder: str | Path) -> Collection[str]:
        """Write the files of the tokenizer."""


def load_tokenizer(path: str | Path) -> ExtensibleTokenizer:
    """Read the tokenizer of a folder of any layout, without network access."""
    folder = checkpoint.tokenizer_folder(Path(path))
    if folder is None:
        raise UserError(f"{path}: has no tokenizer; get the whole pipeline")
    return read_tokenizer(folder)


def read_tokenizer(folder: Path) -> ExtensibleTokenizer:
    """Read the tokenizer files of `folder`, without network access."""
    from transformers import AutoTokenizer  # seconds to import

    # Both must exist: without tokenizer.json the library may construct another tokenizer.
    for file in ("tokenizer_config.json", "tokenizer.json"):
        store.read_json(folder / file)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library passes on any exception of its parsers
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: transformers cannot read this tokenizer ({reason}); get the folder again"
        ) from error
