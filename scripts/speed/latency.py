"""Latency of one decision of the CartPole network, at every T and as ReLU network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from spiking_rl.agents.policies import SpikingMlpPolicy
from spiking_rl.conversion import calibrate_thresholds
from spiking_rl.scripts.speed.timing import interleave, median_ratio, times_of

_DECISIONS = 100  # per timing
_WARM_UP = 5


def latency_rows(timesteps: Sequence[int], *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return a row for ``forward`` and for ``predict`` of the ReLU network and at every T, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    variants: dict[tuple[str, int | None], Callable[[], object]] = {}
    for t in (None, *timesteps):
        policy = _policy(t)
        observation = np.array([0.1, -0.2, 0.05, 0.3], dtype=np.float32)
        variants["forward", t] = partial(_forward, policy.q_net, torch.as_tensor(observation)[None])
        variants["predict", t] = partial(policy.predict, observation, deterministic=True)
    times = interleave(variants, rounds=rounds, seconds=seconds, warm_up=_WARM_UP, passes=_DECISIONS)
    torch.set_num_threads(threads)
    return [
        {
            "case": "latency-cartpole",
            "network": "mlp 4-256-256-2",
            "pass": what,
            "library": "spiking-rl",
            "timesteps": t,
            "batch": 1,
            "ratio_to_relu": median_ratio(values, times[what, None]),
            "ratio_to_limit": None,
            "extra_mb": None,
            "differing_spikes": None,
            "threads": 1,
            **times_of(values),
        }
        for (what, t), values in times.items()
    ]


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
