"""The counter-based random numbers of data and weights: a hash of integers, no state.

A draw is a pure function of its counters (seed, epoch, sample id, purpose, ...), whatever the rank, worker or library
release. docs/contracts.md, Randomness, has the purposes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_U = np.uint64


def mix(z: Any) -> Keys:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), elementwise on uint64."""
    with np.errstate(over="ignore"):  # NumPy warns of wrapping scalars, not of wrapping arrays
        z = (z ^ (z >> _U(30))) * _MULTIPLIERS[0]
        z = (z ^ (z >> _U(27))) * _MULTIPLIERS[1]
        return z ^ (z >> _U(31))


def key(*values: Any) -> Keys:
    """Fold integers in 0 .. 2^64-1 (numbers or arrays that broadcast) into one uint64 each."""
    h: Any = _U(0)
    with np.errstate(over="ignore"):
        for value in values:
            h = mix(h + (_GOLDEN + np.asarray(value, dtype=np.uint64)))
    return h


def uniform(keys: Any) -> NDArray[np.float64]:
    """Numbers in [0, 1), elementwise: the top 53 bits of each key / 2^53."""
    return (keys >> _U(11)).astype(np.float64) * 2.0**-53
