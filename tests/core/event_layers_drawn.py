"""Layers and inputs whose sums are exact in 32 bits, in any order: weights are multiples of 1/8, amounts of 1/4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


def exact(layer: Layer) -> Layer:
    """Draw the parameters of a layer."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-16, 17, parameter.shape) / 8)
    return layer


def inputs_of(shape: tuple[int, ...], density: float) -> Tensor:
    """Draw inputs of which a part is active."""
    return (torch.rand(shape) < density) * torch.randint(1, 5, shape) / 4


@st.composite
def convolutions(draw: st.DrawFn, densities: Sequence[float], fewest: int = 0) -> tuple[nn.Conv2d, Tensor]:
    """Draw a convolution of any shape, and inputs of at least ``fewest`` samples."""
    side = st.integers(1, 4)
    kernel, stride = (draw(side), draw(side)), (draw(side), draw(side))
    padding = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    height, width = (k + draw(st.integers(0, 9)) for k in kernel)
    channels, outputs = draw(st.sampled_from([1, 3, 8, 17, 40])), draw(st.sampled_from([1, 5, 8, 24, 33, 128]))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=draw(st.booleans()))
    shape = (draw(st.integers(fewest, 5)), channels, height, width)
    return exact(layer), inputs_of(shape, draw(st.sampled_from(densities)))
