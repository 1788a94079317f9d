"""Fully connected networks for observations that are vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

from torch import nn

from spiking_rl.errors import UserError
from spiking_rl.initialisation import check_time_constants, spread_time_constants, unit_gain, zero_readout
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF
from spiking_rl.registry import register_network
from spiking_rl.surrogate import DEFAULT_GAMMA


@register_network("mlp")
def mlp(
    input_shape: Sequence[int],
    outputs: int,
    *,
    timesteps: int = 5,
    neuron: str = "lif",
    hidden: Sequence[int] = (256, 256),
    layer_norm: bool = True,
    first_layer_norm: bool = True,
    per_channel: bool = False,
    threshold: float = 0.5,
    leak: float = 1.0,
    time_constants: Sequence[float] | None = None,
    gamma: float = DEFAULT_GAMMA,
) -> LayeredNetwork:
    """Build fully connected layers for vector inputs.

    Args:
        input_shape: any shape; it is flattened.
        outputs: size of the readout, which starts at zero so that no action is preferred.
        timesteps: T per decision.
        neuron: ``"lif"``, or ``"relu"`` for the control.
        hidden: width of each hidden layer.
        layer_norm: normalise the current of every layer over its neurons, with a scale and a shift
            per neuron (Ba et al. 2016). Without it Q-learning drives firing rates up with its values
            until a layer says the same about everything; PQN's stability rests on it (Gallici et
            al. 2024).
        first_layer_norm: normalise the first layer too. With few inputs that leaves only their
            direction, not their size, and a stateful agent finds velocities from differences in size.
        per_channel: one threshold and leak per neuron instead of per layer.
        threshold: initial threshold (calibrate on data to do better).
        leak: initial leak.
        time_constants: shortest and longest time constant of the membranes, in decisions. They are
            spread logarithmically over the neurons of each layer, ``leak = exp(-1 / (tau * T))``, one
            threshold and leak per neuron. For stateful use: with one leak per layer every neuron
            filters time alike, and velocity is lost. None: ``leak`` everywhere.
        gamma: height of the surrogate gradient.
    """
    if time_constants is not None:
        check_time_constants(time_constants)
        per_channel = True
    if neuron not in ("lif", "relu"):
        raise UserError("neuron", neuron, "must be 'lif' or 'relu'")
    if hasattr(hidden, "tolist"):  # an array of NumPy, or a tensor
        hidden = hidden.tolist()
    if not isinstance(hidden, Sequence) or not hidden or any(not isinstance(h, Integral) or h < 1 for h in hidden):
        raise UserError("hidden", hidden, "must list at least one layer width, each at least 1")
    hidden = [int(width) for width in hidden]
    sizes = [math.prod(input_shape), *hidden]
    maps: list[nn.Module] = [unit_gain(nn.Linear(a, b)) for a, b in pairwise(sizes)]
    if layer_norm:
        for i in range(0 if first_layer_norm else 1, len(maps)):
            maps[i] = nn.Sequential(maps[i], nn.LayerNorm(sizes[i + 1]))
    if len(input_shape) != 1:
        maps[0] = nn.Sequential(nn.Flatten(), maps[0])
    neurons: list[nn.Module] = [
        LIF(width if per_channel else None, threshold=threshold, leak=leak, gamma=gamma)
        if neuron == "lif"
        else nn.ReLU()
        for width in hidden
    ]
    if time_constants is not None and neuron == "lif":
        for lif in neurons:
            assert isinstance(lif, LIF)
            spread_time_constants(lif, time_constants, timesteps)
    readout = zero_readout(sizes[-1], outputs)
    return LayeredNetwork(maps, neurons, readout, input_shape=input_shape, timesteps=timesteps)
