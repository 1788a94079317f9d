"""Timings that can be compared: every round times every variant once, and ratios are taken within rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

Key = TypeVar("Key", bound=Hashable)

FEWEST_ROUNDS = 3  # however long they take: below that there are no quartiles


def interleave(
    variants: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    warm_up: int = 1,
    passes: int = 1,
    settle: Callable[[], object] = lambda: None,
) -> dict[Key, list[float]]:
    """Time variants in turns, so that a slow moment of the machine meets all of them.

    A turn begins with a call that does not count.

    Args:
        variants: what to time.
        rounds: each times every variant once.
        seconds: no round begins after that many, once :data:`FEWEST_ROUNDS` are done.
        warm_up: rounds ahead of them that do not count.
        passes: calls per timing, for variants that take less than some milliseconds.
        settle: waits until what was called is done, where calls return before (:func:`settler`).

    Returns:
        Milliseconds per call, a list of rounds per variant.
    """
    times: dict[Key, list[float]] = {key: [] for key in variants}
    begin = time.perf_counter()
    for number in range(-warm_up, rounds):
        if number >= FEWEST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for key, run in variants.items():
            run()  # does not count: a training loop finds its own data in the caches, not another network's
            settle()
            start = time.perf_counter()
            for _ in range(passes):
                run()
            settle()
            if number >= 0:
                times[key].append((time.perf_counter() - start) / passes * 1e3)
    return times


def settler(device: torch.device) -> Callable[[], object]:
    """Return what waits for a device to finish its work."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Return the median over rounds of ``values / base``."""
    return round(float(np.median(np.asarray(values) / np.asarray(base))), 3)


def ratio_quartiles(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the quartiles over rounds of ``values / base``."""
    return [round(float(q), 3) for q in np.percentile(np.asarray(values) / np.asarray(base), [25, 75])]


def times_of(values: Sequence[float]) -> dict[str, Any]:
    """Return the fields of a row that tell a variant's time: ``ms``, the median, and its ``quartiles``."""
    low, median, high = (round(float(q), 5) for q in np.percentile(values, [25, 50, 75]))
    return {"ms": median, "quartiles": [low, high], "rounds": len(values)}
