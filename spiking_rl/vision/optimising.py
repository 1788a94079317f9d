"""How a stage's weights are trained: its optimiser, learning rate and arithmetic."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch

from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF, SpikeTimeScore
from spiking_rl.vision.config import ClassifyConfig
from spiking_rl.vision.muon import Muon

_WARM_UP = 0.25  # part of one cycle in which the learning rate rises
_FIRST_RATE = 0.1  # of the highest learning rate, at the beginning of a cycle


def rate_factor(progress: float, milestones: tuple[float, ...]) -> float:
    """Return what multiplies the learning rate after a part ``progress`` of a stage.

    With milestones it is divided by 5 at each of them (the papers'); without, one cycle: a linear rise over
    the first quarter, then half a cosine down to 0 (Smith, Topin 2018).
    """
    if milestones:
        return 0.2 ** sum(progress >= part for part in milestones)
    if progress < _WARM_UP:
        return _FIRST_RATE + (1 - _FIRST_RATE) * progress / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def _in_bfloat16(device: torch.device, precision: str) -> bool:
    """Tell whether to train in bfloat16."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def autocast(device: torch.device, precision: str) -> Any:
    """Return the context of a forward pass in training."""
    return torch.autocast(device.type, torch.bfloat16) if _in_bfloat16(device, precision) else nullcontext()


def optimiser_of(
    network: LayeredNetwork, config: ClassifyConfig, device: torch.device, *, spikes: bool
) -> tuple[torch.optim.Optimizer, float]:
    """Return a fresh optimiser of what is trained in a network, and its highest learning rate.

    Args:
        network: its parameters that have no gradient are left out.
        config: the settings.
        device: where the network is.
        spikes: take the settings of the spiking stages, not those of the ReLU network.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    neurons = [m for m in network.modules() if isinstance(m, (LIF, SpikeTimeScore))]
    own = {id(p) for neuron in neurons for p in neuron.parameters()}  # one per channel has axes, and decays no more
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in own]
    others = [p for p in trained if p.dim() <= 1 or id(p) in own]
    name, rate, decay = (
        (config.optimizer, config.learning_rate, config.weight_decay)
        if spikes
        else (config.ann_optimizer, config.ann_learning_rate, config.ann_weight_decay)
    )
    if name == "muon":
        kernels, matrices = [p for p in decayed if p.dim() == 4], [p for p in decayed if p.dim() != 4]
        arithmetic = torch.bfloat16 if _in_bfloat16(device, config.precision) else torch.float32
        return Muon(kernels, matrices, others, rate, decay, arithmetic), rate
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True), rate
    return torch.optim.Adam(groups, lr=rate, amsgrad=True, fused=True), rate
