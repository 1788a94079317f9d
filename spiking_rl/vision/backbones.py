"""Convolutional networks for images, registered by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from spiking_rl.errors import UserError
from spiking_rl.group_norm import GroupNorm
from spiking_rl.initialisation import (
    check_time_constants,
    scale_channels,
    spread_time_constants,
    unit_gain,
    zero_readout,
)
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF
from spiking_rl.registry import register_network
from spiking_rl.surrogate import DEFAULT_GAMMA

_NATURE_CONVOLUTIONS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride
_NATURE_MINIMUM = 36  # side at which the last convolution still has one place to look from


@register_network("nature_cnn")
def nature_cnn(
    input_shape: Sequence[int],
    outputs: int,
    *,
    timesteps: int = 5,
    neuron: str = "lif",
    features: int = 512,
    layer_norm: bool = True,
    per_channel: bool = True,
    threshold: float = 0.5,
    leak: float = 1.0,
    time_constants: Sequence[float] | None = None,
    gamma: float = DEFAULT_GAMMA,
) -> LayeredNetwork:
    """Build the convolutional Q-network of Mnih et al. (Nature 2015) with spiking neurons.

    Three convolutions (32 filters 8x8 stride 4, 64 filters 4x4 stride 2, 64 filters 3x3 stride 1),
    one fully connected layer, and a readout.

    Args:
        input_shape: ``(C, H, W)``, H and W at least 36.
        outputs: size of the readout, which starts at zero so that no action is preferred.
        timesteps: T per decision.
        neuron: ``"lif"``, or ``"relu"`` for the control.
        features: width of the fully connected layer.
        layer_norm: normalise the current of every layer over the whole sample, with a scale and a
            shift per channel (Ba et al. 2016; for convolutions a group normalisation with one
            group). Without it spikes do not learn Pong.
        per_channel: one threshold and leak per channel (per neuron in the fully connected layer)
            instead of per layer.
        threshold: initial threshold (calibrate on data to do better).
        leak: initial leak.
        time_constants: shortest and longest time constant of the membranes, in decisions, spread
            logarithmically over the channels of each layer, as in ``mlp``. Every channel starts with
            unit gain for a constant current (its current is scaled by ``1 - leak``): else slow ones
            sum a picture's constant background up to constant firing. None: ``leak`` everywhere.
        gamma: height of the surrogate gradient.

    Raises:
        UserError: an image that is too small or has no three axes, or an option out of range.
    """
    if time_constants is not None:
        check_time_constants(time_constants)
        per_channel = True
    if neuron not in ("lif", "relu"):
        raise UserError("neuron", neuron, "must be 'lif' or 'relu'")
    if isinstance(features, bool) or not isinstance(features, int) or features < 1:
        raise UserError("features", features, "must be a whole number of at least 1")
    if len(input_shape) != 3 or min(input_shape[1:]) < _NATURE_MINIMUM:
        raise UserError(
            "input_shape",
            tuple(input_shape),
            f"nature_cnn takes images (channels, height, width) of at least {_NATURE_MINIMUM} x {_NATURE_MINIMUM} "
            "pixels; enlarge them, or use the network 'mlp'",
        )
    channels = [input_shape[0], *(c for c, _, _ in _NATURE_CONVOLUTIONS)]
    places = math.prod(_sides_after_convolutions(side) for side in input_shape[1:])
    maps: list[nn.Module] = []
    for (before, after), (_, kernel, stride) in zip(pairwise(channels), _NATURE_CONVOLUTIONS, strict=True):
        # The shift of the normalisation does what a bias would.
        convolution = unit_gain(nn.Conv2d(before, after, kernel, stride, bias=not layer_norm))
        maps.append(nn.Sequential(convolution, GroupNorm(1, after)) if layer_norm else convolution)
    dense = unit_gain(nn.Linear(channels[-1] * places, features, bias=not layer_norm))
    maps.append(nn.Sequential(nn.Flatten(), dense, *([nn.LayerNorm(features)] if layer_norm else [])))
    neurons: list[nn.Module] = [
        LIF(width if per_channel else None, axes, threshold=threshold, leak=leak, gamma=gamma)
        if neuron == "lif"
        else nn.ReLU()
        for width, axes in [*((c, 2) for c in channels[1:]), (features, 0)]
    ]
    if time_constants is not None and neuron == "lif":
        for layer, lif in zip(maps, neurons, strict=True):
            assert isinstance(lif, LIF)
            spread_time_constants(lif, time_constants, timesteps)
            scale_channels(layer, 1 - lif.leak.detach().flatten())
    readout = zero_readout(features, outputs)
    network = LayeredNetwork(maps, neurons, readout, input_shape=input_shape, timesteps=timesteps)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # faster


def _sides_after_convolutions(side: int) -> int:
    for _, kernel, stride in _NATURE_CONVOLUTIONS:
        side = (side - kernel) // stride + 1
    return side
