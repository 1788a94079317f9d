"""What bfloat16 saves: training passes of the ReLU and the spiking Nature-CNN in both arithmetics."""

from __future__ import annotations

from typing import Any

import torch

from spiking_rl.scripts.speed.cases import CASES, build_case
from spiking_rl.scripts.speed.timing import interleave, median_ratio, times_of
from spiking_rl.scripts.speed.variants import OURS, RELU, Pass, build_pass

_CASE = "nature"
_PRECISIONS = ("float32", "bfloat16")

Key = tuple[str, int | None, str]


def half_rows(*, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the rows of the ReLU network and of ours at every T of the case; bfloat16 as a multiple of float32."""
    case = CASES[_CASE]
    runs: dict[Key, Pass] = {}
    for precision in _PRECISIONS:
        for timesteps in (None, *case.timesteps):
            library = OURS if timesteps else RELU
            built = build_case(case, timesteps or 1)
            runs[library, timesteps, precision] = build_pass(library, case, *built, precision)
    times = interleave(runs, rounds=rounds, seconds=seconds)
    return [
        {
            "case": f"half-{_CASE}",
            "network": case.network,
            "pass": case.kind,
            "library": library,
            "precision": precision,
            "timesteps": timesteps,
            "batch": case.batch,
            "ratio_to_float32": median_ratio(values, times[library, timesteps, "float32"]),
            "ratio_to_relu": median_ratio(values, times[RELU, None, precision]),
            "threads": torch.get_num_threads(),
            **times_of(values),
        }
        for (library, timesteps, precision), values in times.items()
    ]
