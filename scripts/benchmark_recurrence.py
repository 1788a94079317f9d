"""What memory costs: a stateful training pass against the stateless one and an LSTM, in the same run.

python -m spiking_rl.scripts.benchmark_recurrence --output results/recurrence.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spiking_rl.agents.policies import TIME_CONSTANTS
from spiking_rl.conversion import calibrate_thresholds
from spiking_rl.registry import build_network
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import write_results

DESCRIPTION = """Time forward and backward over a sequence of environment steps, T=1: stateless, stateful, LSTM.

Example: python -m spiking_rl.scripts.benchmark_recurrence --output results/recurrence.json"""


@dataclass(kw_only=True)
class Options:
    """How to measure."""

    length: int = 64
    """Environment steps of a sequence."""
    batch: int = 16
    """Sequences side by side."""
    width: int = 256
    """Neurons per layer."""
    rounds: int = 30
    """Rounds; each times every variant once, so that a slow moment meets all of them."""
    threads: int = 1
    """Torch threads."""
    output: Path | None = None
    """Results as JSON."""


class LSTMNetwork(nn.Module):
    """A layer of ReLU and one LSTM of the same width, whole sequences at once and without resets."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.memory = nn.LSTM(width, width)
        self.readout = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return Q-values ``(L, B, A)`` of ``(L, B, inputs)``."""
        values: Tensor = self.readout(self.memory(torch.relu(self.first(x)))[0])
        return values


def main() -> None:
    """Measure, print, write."""
    options = parse(Options, "benchmark_recurrence", sys.argv[1:], DESCRIPTION)
    torch.set_num_threads(options.threads)
    times: dict[str, list[float]] = {}
    passes = _passes(options)
    for number in range(options.rounds + 5):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if number >= 5:  # warm-up
                times.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
    base = float(np.median(times["stateless"]))
    rows: list[dict[str, Any]] = []
    for name, values in times.items():
        low, median, high = (float(q) for q in np.percentile(values, [25, 50, 75]))
        rows.append(
            {
                "network": f"mlp 4-{options.width}-{options.width}-2",
                "pass": "forward+backward",
                "library": "torch" if name == "lstm" else "spiking-rl",
                "variant": name,
                "timesteps": None if name == "lstm" else 1,
                "length": options.length,
                "batch": options.batch,
                "ratio_to_stateless": round(median / base, 3),
                "ms": round(median, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
        )
        print(f"{name:9} {median:8.3f} ms  {median / base:.2f} x stateless")
    if options.output is not None:
        write_results(options.output, "benchmark_recurrence", rows)


def _passes(options: Options) -> dict[str, Callable[[], None]]:
    """Return one training pass of every variant, without the optimiser."""
    torch.manual_seed(0)
    x = torch.randn(options.length, options.batch, 4)
    starts = torch.rand(options.length, options.batch) < 0.01
    hidden = [options.width, options.width]
    stateless = build_network("mlp", (4,), 2, timesteps=1, hidden=hidden)
    stateful = build_network("mlp", (4,), 2, timesteps=1, hidden=hidden, time_constants=TIME_CONSTANTS)
    calibrate_thresholds(stateless, x.flatten(0, 1))
    calibrate_thresholds(stateful, x, starts=starts)
    for network in (stateless, stateful):
        assert isinstance(network.readout, nn.Linear)
        nn.init.normal_(network.readout.weight)  # at zero nothing would flow back
    state = stateful.initial_state(options.batch)
    lstm = LSTMNetwork(4, options.width, 2)

    def trained(module: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            module.zero_grad()
            forward().square().mean().backward()  # type: ignore[no-untyped-call]

        return run

    return {
        "stateless": trained(stateless, lambda: stateless(x)[0]),
        "stateful": trained(stateful, lambda: stateful(x, state, starts)[0]),
        "lstm": trained(lstm, lambda: lstm(x)),
    }


if __name__ == "__main__":
    script(main)
