"""Score videos on the host, beside the accelerator, in a bounded pool of threads.

A batch is submitted without waiting, so that the next batch is sampled while this one is scored. At
most `in_flight` batches are pending; submitting another waits for the oldest. An exception fails
only its own video: the terms of the video are NaN, and a warning gives its number and the reason.
If the arrays span several processes, each process scores its own rows, and the results are
gathered.
"""

import collections
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeAlias, TypeGuard, TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float

from jax_idgrpo.parallel import sharding
from jax_idgrpo.parallel.hosts import gather_objects, to_host

Terms = Mapping[str, Float[np.ndarray, " B"] | Float[Array, " B"]]
"""Name of a term -> one value per video; "reward" is among them."""

Scored = Mapping[str, float] | Exception
"""The terms of one video, or the reason why it has none."""

Batch: TypeAlias = np.ndarray | Array
"""Rows on the host or on devices."""
HostRow: TypeAlias = np.ndarray | np.generic
Result = TypeVar("Result")


class Pending:
    """Terms that are being computed."""

    def __init__(self, rows: Mapping[int, Future[Mapping[str, float]]], label: str, shared: bool):
        """Collect the futures of a batch.

        Args:
          rows: the future of each video of this process, by the number of the video in the batch.
          label: name of the reward in warnings.
          shared: whether other processes score further videos of the batch.
        """
        self._rows, self._label, self._shared = rows, label, shared

    def done(self) -> bool:
        """Return whether every video of this process is scored or has failed."""
        return all(row.done() for row in self._rows.values())

    def wait(self) -> None:
        """Wait until every video of this process is scored or has failed."""
        wait(self._rows.values())

    def result(self) -> Terms:
        """Return the terms as float32; failed videos and absent terms are NaN.

        Collective for a batch that spans processes; every process gets the terms of all videos.
        """
        found: list[tuple[int, dict[str, float]]] = []
        failed: dict[str, list[int]] = {}
        for number, row in self._rows.items():
            error = row.exception()
            if error is not None:
                reason = (str(error) or type(error).__name__).splitlines()[0][:200]
                failed.setdefault(f"{type(error).__name__}: {reason}", []).append(number)
            found.append(
                (
                    number,
                    {}
                    if error is not None
                    else {name: float(value) for name, value in row.result().items()},
                )
            )
        for reason, numbers in failed.items():
            which = (
                f"video {numbers[0]}"
                if len(numbers) == 1
                else f"videos {', '.join(map(str, numbers))}"
            )
            warnings.warn(
                f"{self._label}: {which} could not be scored ({reason}); the reward is NaN there, and the update leaves it out",
                stacklevel=2,
            )
        if self._shared:
            found = [row for part in gather_objects(found) for row in part]
        videos = [terms for _, terms in sorted(found, key=lambda row: row[0])]
        names = dict.fromkeys(["reward", *(name for terms in videos for name in terms)])
        return {
            name: np.asarray([terms.get(name, np.nan) for terms in videos], np.float32)
            for name in names
        }


def _spans(array: Batch) -> TypeGuard[Array]:
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def _together(batch: Sequence[Batch]) -> Sequence[Batch]:
    """Shard all arrays by rows if any of them spans processes."""
    spanning = [array for array in batch if _spans(array)]
    return (
        sharding.device_put_global(list(batch), sharding.batch_sharding(spanning[0].sharding.mesh))
        if spanning
        else batch
    )


def _parts(array: Batch) -> list[tuple[range, Batch]]:
    """List the rows that this process scores, with their arrays.

    Of an array that spans processes, a process scores the rows whose first replica it holds.
    """
    count = len(array)
    if not _spans(array):
        return [(range(count), array)]
    return [
        (range(*shard.index[0].indices(count)), shard.data)
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]


def _rows(array: Batch) -> dict[int, HostRow]:
    return {
        number: row
        for numbers, part in _parts(array)
        for number, row in zip(numbers, np.asarray(part), strict=True)
    }


class HostPool:
    """Score videos in threads, with a limit on pending batches."""

    def __init__(self, workers: int = 2, in_flight: int = 2):
        """Start the threads.

        Args:
          workers: number of threads.
          in_flight: number of pending batches from which on a submission waits for the oldest.
        """
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._in_flight = in_flight
        self._held: collections.deque[Pending] = collections.deque()

    def submit(
        self,
        function: Callable[..., Mapping[str, float]],
        batch: Sequence[Batch],
        label: str = "reward",
    ) -> Pending:
        """Score every row of `batch` by `function(*row)` without waiting.

        The first thread that needs the rows copies them from the device, so that the caller does
        not wait for the device. Arrays that span processes use a mesh with the axes of
        `parallel.sharding`, and all processes submit the same batches.

        Args:
          function: scores one video and returns its terms.
          batch: arrays on the host or on devices, with the batch axis first.
          label: name of the reward in warnings.
        """
        numbers, copied, shared = self._hand_over(batch)

        def score(number: int) -> Mapping[str, float]:
            return function(*(array[number] for array in copied.result()))

        return self._hold(
            Pending(
                {number: self._threads.submit(score, number) for number in numbers}, label, shared
            )
        )

    def submit_together(
        self,
        function: Callable[..., Sequence[Scored]],
        batch: Sequence[Batch],
        label: str = "reward",
    ) -> Pending:
        """Score all rows of this process by one call `function(*arrays)` without waiting.

        Args:
          function: scores all videos; for each it returns terms or an exception.
          batch: as for `submit`.
          label: name of the reward in warnings.
        """
        numbers, copied, shared = self._hand_over(batch)
        rows: dict[int, Future[Mapping[str, float]]] = {number: Future() for number in numbers}

        def score() -> None:
            try:
                scored = function(
                    *(np.stack([array[number] for number in numbers]) for array in copied.result())
                )
            except Exception as error:
                scored = [error] * len(numbers)
            for number, terms in zip(numbers, scored, strict=True):
                if isinstance(terms, Exception):
                    rows[number].set_exception(terms)
                else:
                    rows[number].set_result(terms)

        self._threads.submit(score)
        return self._hold(Pending(rows, label, shared))

    def _hand_over(
        self, batch: Sequence[Batch]
    ) -> tuple[list[int], Future[list[dict[int, HostRow]]], bool]:
        """Wait for a free slot, then start copying the rows to the host.

        Returns:
          The numbers of the rows of this process, the rows on the host, and whether processes share
            the batch.
        """
        while len(self._held) >= self._in_flight:
            self._held.popleft().wait()
        arrays = _together(batch)
        copied = self._threads.submit(lambda: [_rows(array) for array in arrays])
        return (
            [number for part, _ in _parts(arrays[0]) for number in part],
            copied,
            _spans(arrays[0]),
        )

    def _hold(self, pending: Pending) -> Pending:
        self._held.append(pending)
        return pending


def collect(scored: Terms | Pending) -> dict[str, Float[np.ndarray, " B"]]:
    """Wait for the terms and copy them to the host."""
    terms = scored.result() if isinstance(scored, Pending) else scored
    return to_host(dict(terms))


def in_time(function: Callable[[], Result], seconds: float, name: str) -> Result:
    """Call a function in a daemon thread of its own.

    Args:
      function: the function; after a timeout its thread continues, and its result is discarded.
      seconds: longest time to wait for the result.
      name: name of the thread.

    Raises:
      TimeoutError: the function has not returned within `seconds`.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # SystemExit would end only this thread
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    done, _ = wait([future], seconds)
    if not done:
        raise TimeoutError(f"no answer in {seconds:g} seconds")
    error = future.exception()
    if error is not None:
        raise error if isinstance(error, Exception) else RuntimeError(repr(error))
    return future.result()
