"""What bfloat16 saves: training passes of ReLU and spiking networks in both arithmetics."""

from __future__ import annotations

from typing import Any

import torch

from spiking_rl.scripts.speed.cases import CASES, RATE, build_case
from spiking_rl.scripts.speed.timing import interleave, median_ratio, times_of
from spiking_rl.scripts.speed.variants import OURS, RELU, Pass, build_pass

_PRECISIONS = ("float32", "bfloat16")
RATES: dict[str, tuple[float, ...]] = {"nature": (RATE,), "vgg16": (0.02, 0.1)}
"""Spikes per neuron and timestep that every layer is calibrated to, by case."""

Key = tuple[str, int | None, float | None, str]


def half_rows(name: str, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the rows of a case: ReLU, and ours at every T and rate; bfloat16 as a multiple of float32.

    Args:
        name: of the case, one of :data:`RATES`.
        rounds: timings of every variant, at most.
        seconds: no round begins after that many.
    """
    case = CASES[name]
    variants = [(OURS, timesteps, rate) for timesteps in case.timesteps for rate in RATES[name]]
    runs: dict[Key, Pass] = {}
    for library, timesteps, rate in ((RELU, None, None), *variants):
        built = build_case(case, timesteps or 1, rate=rate or RATE)
        for precision in _PRECISIONS:
            runs[library, timesteps, rate, precision] = build_pass(library, case, *built, precision)
    times = interleave(runs, rounds=rounds, seconds=seconds)
    return [
        {
            "case": f"half-{name}",
            "network": case.network,
            "pass": case.kind,
            "library": library,
            "precision": precision,
            "timesteps": timesteps,
            "rate": rate,
            "batch": case.batch,
            "ratio_to_float32": median_ratio(values, times[library, timesteps, rate, "float32"]),
            "ratio_to_relu": median_ratio(values, times[RELU, None, None, precision]),
            "threads": torch.get_num_threads(),
            **times_of(values),
        }
        for (library, timesteps, rate, precision), values in times.items()
    ]
