"""What bfloat16 saves: training passes of the ReLU and the spiking Nature-CNN in both arithmetics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from spiking_rl.scripts.speed.cases import CASES, build_case
from spiking_rl.scripts.speed.plain import ReLUNetwork
from spiking_rl.scripts.speed.timing import interleave, median_ratio, times_of

_CASE = "nature"
_PRECISIONS = ("float32", "bfloat16")

Key = tuple[str, int | None, str]


def half_rows(*, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the rows of the ReLU network and of ours at every T of the case; bfloat16 as a multiple of float32."""
    case = CASES[_CASE]
    runs: dict[Key, Callable[[], None]] = {}
    for precision in _PRECISIONS:
        for timesteps in (None, *case.timesteps):
            runs["spiking-rl" if timesteps else "torch-relu", timesteps, precision] = _pass(timesteps, precision)
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
            "ratio_to_relu": median_ratio(values, times["torch-relu", None, precision]),
            "threads": torch.get_num_threads(),
            **times_of(values),
        }
        for (library, timesteps, precision), values in times.items()
    ]


def _pass(timesteps: int | None, precision: str) -> Callable[[], None]:
    """Return a training pass; no T gives the ReLU network."""
    network, inputs = build_case(CASES[_CASE], timesteps or 1)
    relu = ReLUNetwork(network)
    sequence = inputs.unsqueeze(0)

    def train() -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
            outputs = relu(inputs) if timesteps is None else network(sequence)[0]
        outputs.float().square().mean().backward()

    return train
