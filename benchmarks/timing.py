"""Time alternating calls in one process."""

import statistics
import time
from collections.abc import Callable


def medians(rounds: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Measure the median seconds of each call; calls alternate, and the first round is excluded."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}
