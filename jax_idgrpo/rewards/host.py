"""Rewards that run on the host, beside the accelerator: a bounded pool of threads, one video at a time.

A batch is handed over without waiting, so that the next one samples while this one is scored; at most `in_flight` batches are held, and
handing over another waits for the oldest. A video whose scoring raises costs that video only: its terms are no numbers, and a warning says
which video and why.
"""

import collections
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jax_idgrpo.distributed import to_host

Terms = Mapping[str, Float[np.ndarray, "B"] | Float[Array, "B"]]
"""Name of a term -> one value per video; "reward" is among them."""


class Pending:
    """Terms that are being computed."""

    def __init__(self, rows: Sequence[Future[Mapping[str, float]]], label: str):
        self._rows, self._label = rows, label

    def done(self) -> bool:
        """Whether every video is scored, or has failed."""
        return all(row.done() for row in self._rows)

    def wait(self) -> None:
        """Until every video is scored, or has failed."""
        wait(self._rows)

    def result(self) -> Terms:
        """The terms, float32; those of a video that could not be scored are NaN, and so is a term that a video has not."""
        found: list[Mapping[str, float]] = []
        for number, row in enumerate(self._rows):
            error = row.exception()
            if error is not None:
                reason = (str(error) or type(error).__name__).splitlines()[0][:200]
                warnings.warn(f"{self._label}: video {number} could not be scored ({type(error).__name__}: {reason}); it counts in nothing",
                              stacklevel=2)
            found.append({} if error is not None else row.result())
        names = dict.fromkeys(["reward", *(name for terms in found for name in terms)])
        return {name: np.asarray([terms.get(name, np.nan) for terms in found], np.float32) for name in names}


class HostPool:
    """Threads that score videos, and how many batches may wait for them."""

    def __init__(self, workers: int = 2, in_flight: int = 2):
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        self._in_flight = in_flight
        self._held: collections.deque[Pending] = collections.deque()

    def submit(self, function: Callable[..., Mapping[str, float]], batch: Sequence[Any], label: str = "reward") -> Pending:
        """Score every row of `batch` (arrays with the batch first, of the host or of a device) by `function(*row)`; does not wait for it.

        The copy from the device is made by the first thread that needs it, which waits for the device in the place of the caller.
        """
        while len(self._held) >= self._in_flight:
            self._held.popleft().wait()
        copied = self._threads.submit(lambda: [np.asarray(array) for array in batch])

        def score(number: int) -> Mapping[str, float]:
            return function(*(array[number] for array in copied.result()))

        rows = [self._threads.submit(score, number) for number in range(len(batch[0]))]
        pending = Pending(rows, label)
        self._held.append(pending)
        return pending


def collect(scored: Terms | Pending) -> dict[str, Float[np.ndarray, "B"]]:
    """The terms on the host, once they are there."""
    terms = scored.result() if isinstance(scored, Pending) else scored
    return to_host(dict(terms))
