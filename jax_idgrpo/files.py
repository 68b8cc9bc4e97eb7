"""What a picture or a video is read from: a file on disk, or one that a data set holds."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class File(Protocol):
    """Bytes with a name: `str` says where they are. A `pathlib.Path` is one."""

    def __hash__(self) -> int: ...

    def read_bytes(self) -> bytes:
        """All of them.

        Raises:
          OSError: they cannot be read.
        """
