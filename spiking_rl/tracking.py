"""What every layer was like at an evaluation: columns of progress.csv."""

from __future__ import annotations

from collections.abc import Mapping

from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF


def layer_columns(network: LayeredNetwork, rates: Mapping[str, float] | None) -> dict[str, float]:
    """Return spike rate, mean threshold and mean leak of every spiking layer.

    Args:
        network: its present thresholds and leaks count; a ReLU network has none.
        rates: spikes per neuron per timestep by layer name, where they were measured.

    Returns:
        ``spike_rate_layer1`` (spikes per neuron per timestep), ``threshold_layer1`` (in units of the layer's
        current), ``leak_layer1`` (1 = no leak), and so on.
    """
    found: dict[str, float] = {}
    for name, neuron in zip(network.layer_names, network.neurons, strict=True):
        if not isinstance(neuron, LIF):
            continue
        if rates:
            found[f"spike_rate_{name}"] = rates[name]
        found[f"threshold_{name}"] = neuron.threshold.detach().mean().item()
        found[f"leak_{name}"] = neuron.leak.detach().mean().item()
    return found
