"""Thresholds set from data, layer by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from spiking_rl.encoding import direct
from spiking_rl.errors import UserError
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF, MIN_THRESHOLD

_BISECTIONS = 24  # halves the bracket to 1e-7 of its width, below float32 resolution


@torch.no_grad()
def calibrate_thresholds(network: LayeredNetwork, inputs: Tensor, rate: float = 0.2) -> list[float]:
    """Set every threshold so that its layer fires at ``rate`` spikes per neuron per timestep.

    Layer by layer on data, as the papers initialise theirs: the spiking network itself runs with
    the earlier layers' thresholds already set. Where the papers take a percentile of the current,
    the firing rate is measured here by running the neurons, which holds for any T and leak.

    Args:
        network: a spiking network; its thresholds are overwritten (all channels of a layer alike).
        inputs: a batch of at least 2 inputs, ``(B, *input_shape)``, scaled as in training.
        rate: target in (0, 1).

    Returns:
        The rate reached, per layer: lower than asked where a layer's current is rarely positive.

    Raises:
        UserError: rate outside (0, 1), fewer than 2 inputs, or inputs that are not finite.
    """
    if not 0 < rate < 1:
        raise UserError("rate", rate, "the target firing rate must lie strictly between 0 and 1")
    if len(inputs) < 2:
        raise UserError("inputs", len(inputs), "calibration needs at least 2 inputs, better 1,000")
    if not bool(torch.isfinite(inputs).all()):
        raise UserError("inputs", "NaN or infinity", "calibration needs finite inputs")
    reached = []
    neurons = [n for n in network.neurons if isinstance(n, LIF)]
    for i, neuron in enumerate(neurons):
        current = _current_of_layer(network, inputs, i)
        low, high = MIN_THRESHOLD, max(MIN_THRESHOLD, float(current.clamp(min=0).sum(0).max())) + MIN_THRESHOLD
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            neuron.threshold.fill_(middle)
            if float(neuron(current).spikes.mean()) > rate:
                low = middle
            else:
                high = middle
        neuron.threshold.fill_(high)
        reached.append(float(neuron(current).spikes.mean()))
    return reached


def _current_of_layer(network: LayeredNetwork, inputs: Tensor, layer: int) -> Tensor:
    """Return the current ``(T, B, *N)`` that reaches one layer of a stateless network."""
    current = direct(network.maps[0](inputs).unsqueeze(0), network.timesteps)
    for i in range(layer):
        spikes = network.neurons[i](current).spikes
        flat = network.maps[i + 1](spikes.flatten(0, 1))
        current = flat.unflatten(0, (network.timesteps, len(inputs)))
    return current
