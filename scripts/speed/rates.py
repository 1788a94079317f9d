"""What silent neurons save: training passes at several firing rates, against ReLU and the limit of dense kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spiking_rl.networks import LayeredNetwork
from spiking_rl.scripts.speed.cases import CASES, build_case
from spiking_rl.scripts.speed.timing import interleave, median_ratio, times_of
from spiking_rl.scripts.speed.variants import LIMIT, OURS, RELU, Pass, build_pass

RATES = (0.02, 0.05, 0.1, 0.2)
"""Spikes per neuron and timestep that every layer is calibrated to."""

Key = tuple[str, int | None, float | None]


def rates_rows(name: str, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the rows of a case: ReLU, then at every T the limit, and ours at every rate.

    Args:
        name: of the case.
        rounds: timings of every variant, at most.
        seconds: no round begins after that many.
    """
    case = CASES[name]
    runs: dict[Key, Pass] = {}
    fired: dict[Key, float] = {}
    for timesteps in case.timesteps:
        for rate in RATES:
            network, inputs = build_case(case, timesteps, rate=rate)
            if not runs:
                runs[RELU, None, None] = build_pass(RELU, case, network, inputs)
            if rate == RATES[0]:
                runs[LIMIT, timesteps, None] = build_pass(LIMIT, case, network, inputs)
            runs[OURS, timesteps, rate] = build_pass(OURS, case, network, inputs)
            fired[OURS, timesteps, rate] = _fired(network, inputs)
    times = interleave(runs, rounds=rounds, seconds=seconds)
    return [
        {
            "case": f"rates-{name}",
            "network": case.network,
            "pass": case.kind,
            "library": library,
            "timesteps": timesteps,
            "rate": rate,
            "fired": fired.get((library, timesteps, rate)),
            "batch": case.batch,
            "ratio_to_relu": median_ratio(values, times[RELU, None, None]),
            "ratio_to_limit": None if timesteps is None else median_ratio(values, times[LIMIT, timesteps, None]),
            "threads": torch.get_num_threads(),
            **times_of(values),
        }
        for (library, timesteps, rate), values in times.items()
    ]


@torch.no_grad()
def _fired(network: LayeredNetwork, inputs: Tensor) -> float:
    """Return the spikes per neuron and timestep of a batch, over all hidden layers."""
    seen: list[Tensor] = []
    network(inputs.unsqueeze(0), observer=lambda _, spikes, __: seen.append(spikes))
    return round(sum(float(spikes.sum()) for spikes in seen) / sum(spikes.numel() for spikes in seen), 4)
