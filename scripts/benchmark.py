"""Latency of a decision against the ReLU network's, in the same run on the same machine.

python -m spiking_rl.scripts.benchmark --output results/latency.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from spiking_rl.agents.policies import SpikingMlpPolicy
from spiking_rl.conversion import calibrate_thresholds
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import write_results

DESCRIPTION = """Time one decision of the CartPole network (4-256-256-2, batch 1) at each T and as ReLU network.

Example: python -m spiking_rl.scripts.benchmark --output results/latency.json"""


@dataclass(kw_only=True)
class Options:
    """How to measure."""

    timesteps: tuple[int, ...] = (5, 4, 3, 2, 1)
    """Timesteps T to time."""
    rounds: int = 60
    """Rounds; each times every variant once, so that a slow moment meets all of them."""
    decisions: int = 100
    """Decisions per timing."""
    threads: int = 1
    """Torch threads."""
    output: Path | None = None
    """Results as JSON."""


def main() -> None:
    """Measure, print, write."""
    options = parse(Options, "benchmark", sys.argv[1:], DESCRIPTION)
    torch.set_num_threads(options.threads)
    variants: dict[tuple[str, int | None], Callable[[], object]] = {}
    for timesteps in (None, *options.timesteps):
        policy = _policy(timesteps)
        observation = np.array([0.1, -0.2, 0.05, 0.3], dtype=np.float32)
        batch = torch.as_tensor(observation)[None]
        variants["forward", timesteps] = partial(_forward, policy.q_net, batch)
        variants["predict", timesteps] = partial(policy.predict, observation, deterministic=True)
    times: dict[tuple[str, int | None], list[float]] = {key: [] for key in variants}
    for number in range(options.rounds + 5):
        for key, decide in variants.items():
            start = time.perf_counter()
            for _ in range(options.decisions):
                decide()
            if number >= 5:  # warm-up
                times[key].append((time.perf_counter() - start) / options.decisions * 1e3)
    rows = [_row(what, timesteps, values, times[what, None]) for (what, timesteps), values in times.items()]
    for row in rows:
        name = "ReLU" if row["timesteps"] is None else f"T={row['timesteps']}"
        print(f"{row['pass']:8} {name:5} {row['ms']:.4f} ms  {row['ratio_to_relu']:.2f} x ReLU")
    if options.output is not None:
        write_results(options.output, "benchmark", rows)


def _policy(timesteps: int | None) -> SpikingMlpPolicy:
    """Build the CartPole policy; None gives the ReLU network."""
    torch.manual_seed(0)
    observations = spaces.Box(-1, 1, (4,), np.float32)
    # The control is the plain ReLU network: it can do without the normalisation that spikes need.
    network = {"neuron": "relu", "layer_norm": False} if timesteps is None else {"neuron": "lif"}
    policy = SpikingMlpPolicy(
        observations, spaces.Discrete(2), lambda _: 1e-3, timesteps=timesteps or 1, network_kwargs=network
    )
    policy.set_training_mode(False)
    if timesteps is not None:
        calibrate_thresholds(policy.q_net.network, torch.randn(1000, 4))
    return policy


def _forward(q_net: Any, batch: torch.Tensor) -> object:
    with torch.no_grad():
        return q_net(batch)


def _row(what: str, timesteps: int | None, values: list[float], relu: list[float]) -> dict[str, Any]:
    low, median, high = np.percentile(values, [25, 50, 75])
    return {
        "network": "mlp 4-256-256-2",
        "pass": what,
        "library": "spiking-rl",
        "timesteps": timesteps,
        "batch": 1,
        "ratio_to_relu": round(float(median / np.median(relu)), 3),
        "extra_mb": None,
        "ms": round(float(median), 5),
        "quartiles": [round(float(low), 5), round(float(high), 5)],
    }


if __name__ == "__main__":
    script(main)
