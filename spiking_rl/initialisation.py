"""How layers begin: the gain of maps, readouts at zero, and leaks spread over a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spiking_rl.errors import UserError
from spiking_rl.neurons import LIF


def unit_gain(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    """Initialise so that inputs of unit variance give currents of unit variance."""
    bound = math.sqrt(3 / layer.weight[0].numel())
    nn.init.uniform_(layer.weight, -bound, bound)
    return layer


def zero_readout(inputs: int, outputs: int) -> nn.Linear:
    """Return a readout that starts at zero, so that no action is preferred."""
    readout = nn.Linear(inputs, outputs)
    nn.init.zeros_(readout.weight)
    nn.init.zeros_(readout.bias)
    return readout


def check_time_constants(time_constants: Sequence[float]) -> None:
    """Refuse what is no pair of a shortest and a longest time constant.

    Raises:
        UserError: naming ``time_constants``.
    """
    numbers = all(isinstance(t, (int, float)) and not isinstance(t, bool) for t in time_constants)
    if len(time_constants) != 2 or not numbers or not 0 < time_constants[0] <= time_constants[1] < math.inf:
        raise UserError("time_constants", time_constants, "must be two positive numbers, the shorter one first")


@torch.no_grad()
def spread_time_constants(lif: LIF, limits: Sequence[float], timesteps: int) -> None:
    """Give every channel of a layer its own leak, time constants spread logarithmically in decisions."""
    spread = torch.logspace(math.log10(limits[0]), math.log10(limits[1]), lif.leak.shape[0])
    lif.leak.copy_(torch.exp(-1 / (spread * timesteps)).reshape(lif.leak.shape))


@torch.no_grad()
def scale_channels(layer: nn.Module, gain: Tensor) -> None:
    """Scale the current of each channel of a map by ``gain`` (C,), in its normalisation where it has one."""
    norms = (nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)
    last = [m for m in layer.modules() if isinstance(m, (nn.Conv2d, nn.Linear, *norms))][-1]
    if last.weight is None:
        raise UserError("network", type(last).__name__, "has no scale of its own to put a channel's gain into")
    last.weight.mul_(gain.reshape(-1, *[1] * (last.weight.dim() - 1)))
    if last.bias is not None:
        last.bias.mul_(gain)
