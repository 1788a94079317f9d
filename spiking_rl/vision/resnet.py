"""Residual networks with spiking or ReLU neurons: the shortcut is added to the current, before the neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spiking_rl.networks import LayeredNetwork
from spiking_rl.registry import register_network
from spiking_rl.surrogate import DEFAULT_GAMMA
from spiking_rl.vision.layers import check_dropout, check_options, convolution, neurons, scaled

RESNET_BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "resnet12": (1, 1, 1, 1),
    "resnet20": (2, 2, 2, 2),
    "resnet34": (3, 4, 5, 3),
}
"""Basic blocks in each of the four stages, as in the papers' published code.

The layers counted are the stem's three convolutions, two in each block, and the readout: so resnet34 has
one block less in its third stage than the network of that name elsewhere.
"""
_STAGES = (64, 128, 256, 512)
_SMALLEST = 8  # pixels a side that leave one place to look from
_LARGE = 64  # pixels a side above which the stem halves the image at once
_LARGEST_READ = 2  # pixels a side up to which the readout looks at each place


class Head(nn.Linear):
    """A readout of feature maps ``(B, C, H, W)``: of every place, or of means over the places.

    Args:
        channels: C.
        sides: H and W; where one is above 2 the readout sees means.
        outputs: size of the readout, which starts at zero.
    """

    def __init__(self, channels: int, sides: Sequence[int], outputs: int) -> None:
        mean = max(sides) > _LARGEST_READ
        super().__init__(channels * (1 if mean else math.prod(sides)), outputs)
        self.mean = mean
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return ``(B, outputs)`` of ``(B, C, H, W)``."""
        return super().forward(features.mean((2, 3)) if self.mean else features.flatten(1))


def resnet(
    blocks: Sequence[int],
    input_shape: Sequence[int],
    outputs: int,
    *,
    timesteps: int = 5,
    neuron: str = "lif",
    width: float = 1.0,
    batch_norm: bool = False,
    bias: bool = False,
    dropout: float = 0.0,
    per_channel: bool = False,
    threshold: float = 0.5,
    leak: float = 1.0,
    gamma: float = DEFAULT_GAMMA,
) -> LayeredNetwork:
    """Build a wide ResNet: a stem of three 3x3 convolutions, four stages of basic blocks, a readout.

    The stem has 64 channels and an average pool behind it; the stages have 64, 128, 256 and 512 at
    strides 1, 2, 2 and 2. The shortcut of a block is what enters it, through a 1x1 convolution
    without neurons where the shape changes; the neurons come after the sum. Images of more than
    64 pixels a side are halved by the stem's first convolution (112 x 112 places at 224 x 224).
    Last feature maps of more than 2 x 2 places are averaged before the readout.

    Args:
        blocks: basic blocks in each of the four stages (:data:`RESNET_BLOCKS`).
        input_shape: ``(C, H, W)``, H and W at least 8.
        outputs: size of the readout, which starts at zero so that no class is preferred.
        timesteps: T per decision.
        neuron: ``"lif"``, or ``"relu"`` for the ANN of the same shape.
        width: multiplies the channels; 0.25 costs about a sixteenth.
        batch_norm: normalise what each convolution gives over batch and place (and timesteps).
            Meant for training the ANN; :func:`spiking_rl.fold_batch_norm` then removes it.
        bias: give the convolutions a bias, as a folded network has. The papers have none.
        dropout: probability behind the stem's first two layers and inside the blocks, never on what
            a shortcut takes; the papers' 0.2.
        per_channel: one threshold and leak per channel instead of the papers' one per layer.
        threshold: initial threshold (:func:`spiking_rl.balance_thresholds` finds better ones).
        leak: initial leak in [0, 1]; 1 is where the papers start.
        gamma: height of the surrogate gradient.

    Raises:
        UserError: an image that is too small or has no three axes, or an option out of range.

    Source: He et al. 2016; in this form DIET-SNN (Rathi, Roy 2020).
    """
    check_options("this ResNet", input_shape, neuron, width, _SMALLEST)
    check_dropout("dropout", dropout)
    options = {"batch_norm": batch_norm, "bias": bias}
    channels, sides = scaled(_STAGES[0], width), list(input_shape[1:])
    first = 2 if max(sides) > _LARGE else 1
    sides = [math.ceil(side / first) // 2 for side in sides]  # behind the stem and its pool
    maps: list[nn.Module] = [convolution(input_shape[0], channels, stride=first, **options)]
    maps += [convolution(channels, channels, **options) for _ in range(2)]
    drop = [dropout, dropout, 0.0]
    shapes = [(channels, 2)] * 3
    shortcuts: dict[int, tuple[int, nn.Module]] = {}
    # Every block adds its own variance to what passes by; together they at most multiply it by e.
    gain = sum(blocks) ** -0.5
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride, pool = 2 if stage and not block else 1, not stage and not block
            after = scaled(_STAGES[stage], width)
            source = len(maps) - 1
            maps.append(convolution(channels, after, stride=stride, pool=pool, **options))
            maps.append(convolution(after, after, gain=gain, **options))
            drop += [dropout, 0.0]
            shapes += [(after, 2)] * 2
            past: nn.Module = nn.AvgPool2d(2) if pool else nn.Identity()
            if stride > 1 or after != channels:
                past = convolution(channels, after, kernel=1, stride=stride, pool=pool, **options)
            shortcuts[source + 2] = (source, past)
            channels, sides = after, [math.ceil(side / stride) for side in sides]
    network = LayeredNetwork(
        maps,
        neurons(neuron, shapes, per_channel=per_channel, threshold=threshold, leak=leak, gamma=gamma),
        Head(channels, sides, outputs),
        input_shape=input_shape,
        timesteps=timesteps,
        shortcuts=shortcuts,
        dropout=drop,
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # faster


for _name, _blocks in RESNET_BLOCKS.items():
    register_network(_name)(partial(resnet, _blocks))
