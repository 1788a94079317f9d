"""What is measured: networks, shapes, batches and timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spiking_rl.conversion import calibrate_thresholds
from spiking_rl.networks import LayeredNetwork
from spiking_rl.registry import build_network

LEAK = 0.5  # an exact power of two: every library's way to write the decay rounds alike, so spikes can be compared
_CALIBRATED_ON = 8  # inputs
RATE = 0.2
"""Spikes per neuron and timestep, where nothing else is asked for."""


@dataclass(frozen=True)
class Case:
    """One network at one batch size, at several T."""

    network: str
    """Registered name."""
    input_shape: tuple[int, ...]
    outputs: int
    batch: int
    timesteps: tuple[int, ...]
    backward: bool
    """Time forward and backward; else forward alone, without gradients."""
    options: tuple[tuple[str, Any], ...] = ()
    """For the network's builder."""

    @property
    def kind(self) -> str:
        """What a pass is."""
        return "forward+backward" if self.backward else "forward"


_PLAIN = (("layer_norm", False), ("per_channel", False))  # what every library has

CASES = {
    "nature": Case("nature_cnn", (4, 84, 84), 6, 32, (4, 1), True, _PLAIN),
    "vgg16": Case("vgg16", (3, 32, 32), 10, 64, (5, 1), True),
    "latency-nature": Case("nature_cnn", (4, 84, 84), 6, 1, (4, 1), False, _PLAIN),
}
"""The cases that every library runs."""


def build_case(
    case: Case,
    timesteps: int,
    *,
    channels_last: bool = True,
    calibrated: bool = True,
    rate: float = RATE,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[LayeredNetwork, Tensor]:
    """Return the spiking network of a case and a batch.

    Both are the same for the same seed, in any process.

    Args:
        case: what to build.
        timesteps: T.
        channels_last: memory format of weights and inputs; else contiguous.
        calibrated: set the thresholds so that every layer fires.
        rate: so often, in spikes per neuron and timestep.
        seed: of weights and inputs.
        device: where they are put.

    Returns:
        The network, and inputs ``(B, *input_shape)``.
    """
    torch.manual_seed(seed)
    network = build_network(
        case.network, case.input_shape, case.outputs, timesteps=timesteps, leak=LEAK, **dict(case.options)
    )
    assert isinstance(network.readout, nn.Linear)
    nn.init.normal_(network.readout.weight, std=network.readout.in_features**-0.5)  # at zero nothing would flow back
    inputs = torch.rand(case.batch, *case.input_shape)
    if calibrated:
        calibrate_thresholds(network, torch.rand(_CALIBRATED_ON, *case.input_shape), rate)
    images = len(case.input_shape) == 3  # (C, H, W)
    layout = torch.channels_last if channels_last and images else torch.contiguous_format
    network.to(memory_format=layout)  # type: ignore[call-overload]
    return network.to(device), inputs.to(device, memory_format=layout)
