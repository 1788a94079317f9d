"""T lowered so that a network goes on firing: its thresholds follow, layer by layer on data.

A threshold that is right for five timesteps is too high for one, where nothing adds up any more. Left to training, as
in temporal pruning (Chowdhury, Rathi, Roy 2022), deep layers fall silent first and learn nothing until those before
them have recovered. Here every layer gets a threshold with which it fires about as many spikes per decision as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor, nn

from spiking_rl.conversion import linear_map, require_inputs
from spiking_rl.energy import SpikeCounter
from spiking_rl.errors import UserError
from spiking_rl.layerwise import bisect, fire, layer_by_layer
from spiking_rl.networks import LayeredNetwork, evaluating
from spiking_rl.neurons import LIF

_POWERS = (0.0, 0.5, 1.0)
_HIGHEST = 2.0  # times its threshold: a layer whose inputs have grown may need more than it had
_HALVINGS = 16
_LOOKED_AT = 2**21  # neurons of a layer, in all samples, whose spikes are counted: of images a few are enough
_HELD = 2**28  # values of a layer at all timesteps and for all inputs, at most: a gigabyte
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_NORMS = (*_BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)


@torch.no_grad()
def lower_timesteps(network: LayeredNetwork, timesteps: int, inputs: Tensor) -> list[float]:
    """Set a trained network's T to a lower one and its thresholds so that it answers as before, as far as it can.

    Layer by layer the threshold is multiplied by a number between ``timesteps / T`` and 2 with which the layer fires
    ``(T / timesteps)**p`` times as often per timestep as before: with ``p = 1`` as many spikes per decision, with
    ``p = 0`` as many per timestep. Of a few ``p`` the one is taken whose outputs are closest to those before, by
    the mean square. Weights behind a layer that fires more often are as much smaller, but for shortcuts' and where
    something normalises what they give; the statistics of batch norm are measured anew; the threshold of outputs' spike
    times falls with T. Leaks stay.

    Args:
        network: a spiking network with fresh membranes at every decision; changed in place.
        timesteps: the new T, below the network's.
        inputs: at least 2 inputs as in training, ``(B, *input_shape)``; some hundred images are enough, and
            of large ones not all are looked at.

    Returns:
        What each layer's thresholds were multiplied by.

    Raises:
        UserError: timesteps is not below the network's, inputs too few or not finite. Nothing has changed then, nor
            after any other error.
    """
    before = network.timesteps
    if isinstance(timesteps, bool) or not isinstance(timesteps, Integral) or not 1 <= timesteps < before:
        raise UserError(
            "timesteps", timesteps, f"must be a whole number of at least 1 and below the network's, {before}"
        )
    if network.on_rates:
        raise UserError("network", "rates", "T is lowered by spikes; set_rates(False) first")
    require_inputs(network, inputs)
    largest = before * max(math.prod(shape) for shape in network.neuron_shapes())
    inputs = inputs[: max(2, _HELD // largest)]
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    margin = network.exit_margin
    network.set_exit_margin(None)  # all timesteps count
    try:
        with evaluating(network):
            counter = SpikeCounter()
            wanted, _ = network(inputs.unsqueeze(0), observer=counter)
            rates = list(counter.rates.values())
            network.set_timesteps(timesteps)
            errors = {}
            for power in _POWERS:
                network.load_state_dict(kept)
                _lower(network, before, power, rates, inputs)
                errors[power] = float((network(inputs.unsqueeze(0))[0] - wanted).square().mean())
            network.load_state_dict(kept)
            return _lower(network, before, min(errors, key=lambda power: errors[power]), rates, inputs)
    except BaseException:
        network.load_state_dict(kept)
        network.set_timesteps(before)
        raise
    finally:
        network.set_exit_margin(margin)


def _lower(network: LayeredNetwork, before: int, power: float, rates: list[float], inputs: Tensor) -> list[float]:
    """Do it with one power; ``rates`` are spikes per neuron and timestep at T = ``before``."""
    ratio = network.timesteps / before
    factors = []

    def follow(layer: int, neuron: LIF, current: Tensor) -> None:
        some = current[:, : max(2, _LOOKED_AT // current[0, 0].numel())]

        def too_low(factor: float) -> bool:
            spikes = fire(neuron, some, neuron.threshold * factor, None, network.single_spike)
            return float(spikes.mean()) > rates[layer] / math.pow(ratio, power)

        factors.append(bisect(too_low, ratio, _HIGHEST, _HALVINGS))
        neuron.threshold.mul_(factors[-1])
        neuron.clamp_()

    def done(layer: int, rate: float) -> None:
        behind = network.maps[layer + 1] if layer + 1 < len(network.maps) else network.readout
        _weigh(behind, rates[layer] / max(rate, 1e-9))

    with measuring_norms(network):
        layer_by_layer(network, inputs, follow, done=done)
    if network.spike_time is not None:
        network.spike_time.threshold.mul_(ratio)  # of what outputs sum up over the timesteps
        network.spike_time.clamp_()
    return factors


def _weigh(layer: nn.Module, factor: float) -> None:
    """Multiply a map's weights by less than 1, where nothing normalises what they give and they are one matrix."""
    if not 0 < factor < 1 or any(isinstance(module, _NORMS) for module in layer.modules()):
        return
    try:
        linear_map(layer).weight.mul_(factor)
    except UserError:
        return  # somebody's own layer: its threshold alone has to do


@contextmanager
def measuring_norms(network: nn.Module) -> Iterator[None]:
    """Forget the statistics of batch norm, and measure them on what the network sees meanwhile."""
    norms = [module for module in network.modules() if isinstance(module, _BATCH_NORMS)]
    told = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean of what is seen
        norm.train()
    try:
        yield
    finally:
        for norm, (momentum, training) in zip(norms, told, strict=True):
            norm.momentum = momentum
            norm.train(training)
