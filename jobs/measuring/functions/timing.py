"""Seconds of a call, and how many digits of a measurement are shown."""

import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start_time = time.perf_counter()
    work()
    return time.perf_counter() - start_time


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")
