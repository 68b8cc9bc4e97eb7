"""How far two arrays are apart."""

import numpy as np


def relative_error(got, want) -> float:
    """Return ||got - want|| / ||want||."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def largest_relative_error(got, want) -> float:
    """Return the largest absolute difference, over the largest absolute value of `want`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())
