"""What carrying membranes costs: a stateful pass over environment steps against the stateless one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spiking_rl.agents.policies import TIME_CONSTANTS
from spiking_rl.conversion import calibrate_thresholds
from spiking_rl.registry import build_network
from spiking_rl.scripts.speed.timing import interleave, median_ratio, times_of

LENGTH = 64
"""Environment steps of a sequence."""
_EPISODE_STARTS = 0.01  # of all environment steps

_NETWORKS: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "mlp": ((4,), 64, {}),
    "nature_cnn": ((1, 84, 84), 4, {"layer_norm": False}),
}
"""Input shape (one frame: the membranes remember), sequences side by side, options."""


def stateful_rows(*, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the rows of training passes at T=1, stateless and stateful, of the MLP and the Nature-CNN."""
    rows = []
    for name, (shape, batch, options) in _NETWORKS.items():
        inputs = torch.rand(LENGTH, batch, *shape)
        times = interleave(_passes(name, inputs, options), rounds=rounds, seconds=seconds / len(_NETWORKS))
        for variant, values in times.items():
            row = {
                "case": f"stateful-{name}",
                "network": name,
                "pass": "forward+backward",
                "library": "spiking-rl",
                "variant": variant,
                "timesteps": 1,
                "length": LENGTH,
                "batch": batch,
                "ratio_to_stateless": median_ratio(values, times["stateless"]),
                "threads": torch.get_num_threads(),
            }
            rows.append(row | times_of(values))
    return rows


def _passes(name: str, inputs: Tensor, options: Mapping[str, Any]) -> dict[str, Callable[[], None]]:
    """Return a training pass over the same sequences with fresh membranes and with carried ones."""
    torch.manual_seed(0)
    starts = torch.rand(inputs.shape[:2]) < _EPISODE_STARTS
    network = build_network(name, inputs.shape[2:], 6, timesteps=1, time_constants=TIME_CONSTANTS, **options)
    calibrate_thresholds(network, inputs, starts=starts)
    assert isinstance(network.readout, nn.Linear)
    nn.init.normal_(network.readout.weight)  # at zero nothing would flow back
    state = network.initial_state(inputs.shape[1])

    def trained(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            network.zero_grad(set_to_none=True)
            forward().square().mean().backward()  # type: ignore[no-untyped-call]

        return run

    return {
        "stateless": trained(lambda: network(inputs)[0]),
        "stateful": trained(lambda: network(inputs, state, starts)[0]),
    }
