"""Compute energy of a spiking network against its ANN, from measured spike rates.

    E_ANN = MACs * 4.6 pJ
    E_SNN = MACs_1 * 4.6 pJ + sum over layers l >= 2 of r_l * MACs_l * 0.9 pJ + normalisation

r_l is the number of spikes per input of layer l, summed over the timesteps of one decision. The
first layer is analog; under direct encoding its current is computed once. Where currents are
normalised the spiking network pays for it at every timestep (once in the first layer), 4.6 pJ for
each of three multiply-accumulates per neuron; the ANN it is compared with pays nothing, as it can
do without. 45 nm, 32-bit float: MAC 4.6 pJ, accumulate 0.9 pJ (Horowitz 2014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spiking_rl.networks import LayeredNetwork

MAC_PJ = 4.6
ACCUMULATE_PJ = 0.9


@torch.no_grad()
def macs_per_layer(network: LayeredNetwork) -> list[int]:
    """Count multiply-accumulates of every linear map for one input, readout last."""
    counts: list[int] = []

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # Each output element costs one product per weight of its row or filter.
        counts[-1] += output[0].numel() * weight[0].numel()

    x = next(network.parameters()).new_zeros(1, *network.input_shape)
    for layer in [*network.maps, network.readout]:
        counts.append(0)
        handles = [m.register_forward_hook(hook) for m in layer.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        x = layer(x)
        for handle in handles:
            handle.remove()
    return counts


@torch.no_grad()
def normalisation_macs(network: LayeredNetwork) -> list[int]:
    """Count the multiply-accumulates that normalising each hidden layer's current takes, per timestep.

    Three per neuron: one each for the mean, the variance, and scale and shift.
    """
    return [
        3 * math.prod(shape) if any(isinstance(m, (nn.LayerNorm, nn.GroupNorm)) for m in layer.modules()) else 0
        for layer, shape in zip(network.maps, network.neuron_shapes(), strict=True)
    ]


def energy_pj(
    macs: Sequence[int],
    rates: Sequence[float] | None,
    timesteps: int,
    normalisation: Sequence[int] | None = None,
) -> float:
    """Return the compute energy of one decision in pJ.

    Args:
        macs: per linear map, readout last (:func:`macs_per_layer`).
        rates: spikes per neuron per timestep of each hidden layer; None for a ReLU network.
        timesteps: T.
        normalisation: per hidden layer and timestep (:func:`normalisation_macs`); None for none.
    """
    if rates is None:
        return sum(macs) * MAC_PJ
    first, *later = normalisation or [0] * len(rates)
    analog = macs[0] + first + timesteps * sum(later)
    spiking = sum(rate * timesteps * count for rate, count in zip(rates, macs[1:], strict=True))
    return analog * MAC_PJ + spiking * ACCUMULATE_PJ


def energy_ratio(
    macs: Sequence[int],
    rates: Sequence[float] | None,
    timesteps: int,
    normalisation: Sequence[int] | None = None,
) -> float:
    """Return E_ANN / E_SNN (1 for a ReLU network): how many times less energy the spikes need."""
    return energy_pj(macs, None, 1) / energy_pj(macs, rates, timesteps, normalisation)


class SpikeCounter:
    """Observer that accumulates spike rates over any number of forward passes.

    Pass the instance as ``observer``; read :attr:`rates`.
    """

    def __init__(self) -> None:
        self._spikes: dict[str, float] = {}
        self._places: dict[str, int] = {}

    def __call__(self, layer: str, output: Tensor, potential: Tensor) -> None:
        """Count non-zero outputs of one layer."""
        self._spikes[layer] = self._spikes.get(layer, 0.0) + float(torch.count_nonzero(output))
        self._places[layer] = self._places.get(layer, 0) + output.numel()

    @property
    def rates(self) -> dict[str, float]:
        """Spikes per neuron per timestep, by layer."""
        return {name: self._spikes[name] / self._places[name] for name in self._spikes}


def odd_layers(rates: dict[str, float], silent: float = 0.005, saturated: float = 0.95) -> list[str]:
    """Return a warning for each layer that has fallen silent or fires all the time."""
    found = []
    for layer, rate in rates.items():
        if rate < silent:
            found.append(f"{layer} has fallen silent ({rate:.4f} spikes per neuron per timestep)")
        elif rate > saturated:
            found.append(f"{layer} is saturated ({rate:.3f} spikes per neuron per timestep)")
    return found
