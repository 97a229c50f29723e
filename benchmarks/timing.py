"""Interleaved timing: contenders take turns, so a slow minute of the machine hits them all alike.

Every figure is the median over rounds with its minimum, interquartile range and n. A ratio is taken
inside each round, between neighbours in time, and then summarised: never between two medians.
"""

import statistics
import time
from collections.abc import Callable


def once(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(
    functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function in each round; odd rounds go backwards, so no one is always first.

    Args:
        functions: name -> callable timed whole.
        rounds: samples of each, >= 1.
        warmup: untimed calls of each beforehand.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for r in range(rounds):
        names = list(functions) if r % 2 == 0 else list(reversed(functions))
        for name in names:
            samples[name].append(once(functions[name]))
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """``median``, ``min``, ``iqr`` and ``n`` of samples (seconds, ratios, anything)."""
    if not samples:
        raise ValueError("no samples")
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "iqr": quartiles[2] - quartiles[0],
        "n": len(samples),
    }


def ratios(numerator: list[float], denominator: list[float]) -> list[float]:
    """Round by round quotients of two interleaved series."""
    if len(numerator) != len(denominator):
        raise ValueError(f"series of {len(numerator)} and {len(denominator)} rounds")
    return [a / b for a, b in zip(numerator, denominator, strict=True)]
