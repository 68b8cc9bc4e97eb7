"""TFDS builder of preference pairs; `tfds_source` reads its data sets.

It requires `tensorflow-datasets` but not TensorFlow. An example contains the unchanged bytes of
its files. Pairs keep the order of the CSV, in shards of at most `SHARD` bytes; a shard is in memory
while it is written. `metadata.json` repeats the labels and sources of all pairs, one letter each,
so that they can be read without the videos.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import importlib_resources  # noqa: F401    TFDS needs it and does not declare it; fail early
import numpy as np
import tensorflow_datasets as tfds

from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences.csv_source import LABELS, Pair

NAME, VERSION, SPLIT = "identity_pairs", "1.0.0", "pairs"
SOURCES = ("trusted", "automatic")
SHARD = 2**28


def features(dimensions: Sequence[str]) -> tfds.features.FeaturesDict:
    """Return the features of an example."""
    file = tfds.features.Tensor(shape=(), dtype=np.object_)
    sides = {
        "video": file,
        "fps": tfds.features.Tensor(shape=(), dtype=np.float64, encoding="bytes"),
        "num_frames": np.int64,
    }
    return tfds.features.FeaturesDict(
        {
            "prompt": tfds.features.Text(),
            "references": tfds.features.Sequence(file),
            "labels": {name: tfds.features.ClassLabel(names=list(LABELS)) for name in dimensions},
            "source": tfds.features.ClassLabel(names=list(SOURCES)),
            **{f"{name}_{side}": kind for name, kind in sides.items() for side in "AB"},
        }
    )


def label_name(value: int) -> str:
    """Return the name of a label's value."""
    return next(name for name, known in LABELS.items() if known == value)


def shards(sizes: Sequence[int], most: int) -> list[range]:
    """Split pairs into consecutive shards of at most `most` bytes; a larger pair is a shard."""
    starts, filled = [0], 0
    for number, size in enumerate(sizes):
        if filled and filled + size > most:
            starts.append(number)
            filled = 0
        filled += size
    return [range(*bounds) for bounds in zip(starts, [*starts[1:], len(sizes)], strict=True)]


class IdentityPairs(tfds.core.ShardBasedBuilder):
    """Preference pairs of identity-preserving videos, with the reference photos of their people."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        *,
        pairs: Sequence[Pair],
        dimensions: Sequence[str],
        update: Callable[[int], None],
        data_dir: Path,
    ):
        """Prepare the builder.

        Args:
          pairs: pairs to write.
          dimensions: names of the labels.
          update: progress callback, called with the number of written pairs.
          data_dir: folder of the data set.
        """
        self._pairs, self._dimensions, self._update = pairs, tuple(dimensions), update
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        labels = {
            name: "".join(label_name(pair.labels[n])[0] for pair in self._pairs)
            for n, name in enumerate(self._dimensions)
        }
        index = {"labels": labels, "sources": "".join(pair.source[0] for pair in self._pairs)}
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=features(self._dimensions),
            metadata=tfds.core.MetadataDict(index),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[int, dict]]]]]:
        sizes = [
            sum(Path(str(file)).stat().st_size for file in (*pair.references, *pair.videos))
            for pair in self._pairs
        ]
        return {
            SPLIT: [functools.partial(self._examples, numbers) for numbers in shards(sizes, SHARD)]
        }

    def _examples(self, numbers: range) -> Iterator[tuple[int, dict]]:
        for number in numbers:
            yield number, example(self._pairs[number], self._dimensions)
            self._update(number + 1)


def example(pair: Pair, dimensions: Sequence[str]) -> dict[str, object]:
    """Convert a pair to an example with the bytes of its files.

    Raises:
      UserError: a file cannot be read.
    """
    row = pair.row.read()
    a_b = {
        "video": [_bytes(file) for file in row.videos],
        "fps": row.fps,
        "num_frames": row.num_frames,
    }
    return {
        "prompt": row.prompt,
        "references": [_bytes(file) for file in row.references],
        "labels": {
            name: label_name(label) for name, label in zip(dimensions, pair.labels, strict=True)
        },
        "source": pair.source,
        **{
            f"{name}_{side}": values[n]
            for name, values in a_b.items()
            for n, side in enumerate("AB")
        },
    }


def _bytes(file: File) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); check its permissions"
        ) from None
