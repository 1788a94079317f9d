"""What the VGGs and ResNets are made of: convolutions with their pool, neurons, and the checks of their options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from spiking_rl.errors import UserError
from spiking_rl.neurons import LIF
from spiking_rl.small_maps import SmallMapConv2d

_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)


def check_options(name: str, input_shape: Sequence[int], neuron: str, width: float, smallest: int) -> None:
    """Refuse what no VGG or ResNet can be built of.

    Raises:
        UserError: an image that is too small or has no three axes, an unknown neuron, a width that is
            no positive number.
    """
    if len(input_shape) != 3 or min(input_shape) < 1 or min(input_shape[1:]) < smallest:
        raise UserError(
            "input_shape",
            tuple(input_shape),
            f"{name} takes images (channels, height, width) of at least {smallest} x {smallest} pixels; enlarge them",
        )
    if neuron not in ("lif", "relu"):
        raise UserError("neuron", neuron, "must be 'lif' or 'relu'")
    if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < math.inf:
        raise UserError("width", width, "must be a positive number, 1 for the papers' network")


def check_dropout(field: str, probability: float) -> None:
    """Refuse what is no probability below 1.

    Raises:
        UserError: naming ``field``.
    """
    if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability < 1:
        raise UserError(field, probability, "a probability must lie in [0, 1)")


def scaled(channels: int, width: float) -> int:
    """Return a number of channels times ``width``, rounded, at least 1."""
    return max(1, round(channels * width))


@torch.no_grad()
def he_normal(layer: _Layer, gain: float = 1.0) -> _Layer:
    """Initialise for ReLU: as much mean square out as in, times ``gain**2`` (He et al. 2015)."""
    layer.weight.normal_(0, gain * math.sqrt(2 / layer.weight[0].numel()))
    if layer.bias is not None:
        layer.bias.zero_()
    return layer


def convolution(
    before: int,
    after: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    pool: bool = False,
    batch_norm: bool = False,
    bias: bool = False,
    gain: float = 1.0,
) -> nn.Sequential:
    """Return a convolution, behind the average pool of the layer before and ahead of its batch norm.

    The pool belongs to the map behind it, so that a network stays a chain of map and neuron.
    """
    layers: list[nn.Module] = [nn.AvgPool2d(2)] if pool else []
    layers.append(he_normal(SmallMapConv2d(before, after, kernel, stride, kernel // 2, bias=bias), gain))
    if batch_norm:
        layers.append(nn.BatchNorm2d(after))
    return nn.Sequential(*layers)


def neurons(
    kind: str, shapes: Sequence[tuple[int, int]], *, per_channel: bool, threshold: float, leak: float, gamma: float
) -> list[nn.Module]:
    """Return one layer of LIF neurons, or ReLU, for each (channels, spatial axes)."""
    return [
        LIF(channels if per_channel else None, axes, threshold=threshold, leak=leak, gamma=gamma)
        if kind == "lif"
        else nn.ReLU()
        for channels, axes in shapes
    ]
