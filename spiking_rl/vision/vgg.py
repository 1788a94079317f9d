"""VGG networks with spiking or ReLU neurons: chains of 3x3 convolutions, then two dense layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from spiking_rl.initialisation import zero_readout
from spiking_rl.networks import LayeredNetwork
from spiking_rl.registry import register_network
from spiking_rl.surrogate import DEFAULT_GAMMA
from spiking_rl.vision.layers import check_dropout, check_options, convolution, he_normal, neurons, scaled

POOL = 0
VGG_PLANS: dict[str, tuple[int, ...]] = {
    "vgg6": (64, POOL, 128, 128, POOL),
    "vgg9": (64, POOL, 128, 256, POOL, 256, 512, POOL, 512, POOL, 512),
    "vgg11": (64, POOL, 128, 256, POOL, 512, 512, POOL, 512, POOL, 512, 512),
    "vgg16": (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512),
}
"""Channels of the convolutions and the pools between them, as in the papers' published code.

vgg6 is called VGG5 in some of it. All have two dense layers and the readout behind them. Their vgg9 has seven
convolutions, and so ten layers in all.
"""
_DENSE = 4096
_LARGEST_READ = 8  # pixels a side that the dense layers read: 8 in vgg6 at 32 x 32, 7 in vgg16 at 224 x 224


def vgg(
    plan: Sequence[int],
    input_shape: Sequence[int],
    outputs: int,
    *,
    timesteps: int = 5,
    neuron: str = "lif",
    width: float = 1.0,
    batch_norm: bool = False,
    bias: bool = False,
    dropout: float = 0.0,
    dense_dropout: float = 0.0,
    per_channel: bool = False,
    threshold: float = 0.5,
    leak: float = 1.0,
    gamma: float = DEFAULT_GAMMA,
) -> LayeredNetwork:
    """Build a VGG: 3x3 convolutions and 2x2 average pools, two dense layers of 4096, a readout.

    Images of 32 x 32 pixels give the papers' networks for CIFAR. Where the last feature maps have
    more than 8 pixels a side they are pooled once more, by 2 at 224 x 224: the papers' VGG16 for
    ImageNet, with its fifth pool and 25088 inputs to the dense layers.

    Args:
        plan: channels of each convolution in order, 0 for a pool (:data:`VGG_PLANS`).
        input_shape: ``(C, H, W)``, H and W at least 2 to the power of the number of pools.
        outputs: size of the readout, which starts at zero so that no class is preferred.
        timesteps: T per decision.
        neuron: ``"lif"``, or ``"relu"`` for the ANN of the same shape.
        width: multiplies the channels and the dense layers' size; 0.25 costs about a sixteenth.
        batch_norm: normalise the currents of the convolutions over batch and place (and timesteps).
            Meant for training the ANN; :func:`spiking_rl.fold_batch_norm` then removes it.
        bias: give the convolutions a bias, as a folded network has. The papers have none.
        dropout: probability behind convolutions, except where a pool follows; the papers' 0.2.
        dense_dropout: probability behind the dense layers; the papers' 0.5.
        per_channel: one threshold and leak per channel (per neuron in the dense layers) instead of
            the papers' one per layer.
        threshold: initial threshold (:func:`spiking_rl.balance_thresholds` finds better ones).
        leak: initial leak in [0, 1]; 1 is where the papers start.
        gamma: height of the surrogate gradient.

    Raises:
        UserError: an image that is too small or has no three axes, or an option out of range.

    Source: Simonyan, Zisserman 2015; in this form DIET-SNN (Rathi, Roy 2020).
    """
    check_options("this VGG", input_shape, neuron, width, 2 ** list(plan).count(POOL))
    check_dropout("dropout", dropout)
    check_dropout("dense_dropout", dense_dropout)
    channels, height, columns = input_shape
    maps: list[nn.Module] = []
    drop: list[float] = []
    shapes: list[tuple[int, int]] = []
    pool = False
    for step in plan:
        if step == POOL:
            height, columns, pool = height // 2, columns // 2, True
            drop[-1] = 0.0  # the papers' code: a pool takes the place of the dropout
            continue
        after = scaled(step, width)
        maps.append(convolution(channels, after, pool=pool, batch_norm=batch_norm, bias=bias))
        drop.append(dropout)
        shapes.append((after, 2))
        channels, pool = after, False
    window = 2 if pool else 1
    while max(height, columns) > _LARGEST_READ:
        if window == 1:
            drop[-1] = 0.0
        height, columns, window = height // 2, columns // 2, window * 2
    dense = scaled(_DENSE, width)
    first = he_normal(nn.Linear(channels * height * columns, dense, bias=False))
    maps.append(nn.Sequential(*([nn.AvgPool2d(window)] if window > 1 else []), nn.Flatten(), first))
    maps.append(nn.Sequential(he_normal(nn.Linear(dense, dense, bias=False))))
    network = LayeredNetwork(
        maps,
        neurons(
            neuron,
            [*shapes, (dense, 0), (dense, 0)],
            per_channel=per_channel,
            threshold=threshold,
            leak=leak,
            gamma=gamma,
        ),
        zero_readout(dense, outputs),
        input_shape=input_shape,
        timesteps=timesteps,
        dropout=[*drop, dense_dropout, dense_dropout],
    )
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # faster


for _name, _plan in VGG_PLANS.items():
    register_network(_name)(partial(vgg, _plan))
