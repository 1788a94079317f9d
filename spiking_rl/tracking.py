"""What every layer was like at an evaluation: columns of progress.csv, and what has gone wrong in which layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF, MIN_THRESHOLD

_NEAR = 1.001  # of the floor, in float32
_GROUPS = {"spike_rate": "spikes", "threshold": "threshold", "leak": "leak"}  # of TensorBoard, by column


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


def layer_scalars(columns: Mapping[str, float]) -> dict[str, float]:
    """Return the columns of :func:`layer_columns` by TensorBoard's tags, such as ``spikes/layer1``, ``leak/layer1``."""
    return {
        f"{group}/{column.removeprefix(f'{quantity}_')}": value
        for column, value in columns.items()
        for quantity, group in _GROUPS.items()
        if column.startswith(f"{quantity}_")
    }


def spoiled_layer(network: LayeredNetwork) -> str | None:
    """Return which parameter of which layer is no number any more, such as ``threshold of layer2``; None: all are.

    A last update can spoil a single threshold, behind a loss that was still a number.
    """
    named = list(network.named_parameters())
    sums = torch.stack([parameter.detach().double().sum() for _, parameter in named]).tolist()  # one transfer
    spoiled = [name for (name, _), total in zip(named, sums, strict=True) if not math.isfinite(total)]
    if not spoiled or len(spoiled) == len(named):
        return "weights of every layer" if spoiled else None
    part, *inner = spoiled[0].split(".")
    layer = network.layer_names[int(inner[0])] if part in ("maps", "neurons", "shortcuts") else part
    return f"{inner[-1]} of {layer}"


def odd_thresholds(network: LayeredNetwork, most: float = 1e3) -> list[str]:
    """Return a warning for each layer whose mean threshold is far above any current, or at its floor below all."""
    found = []
    for name, neuron in zip(network.layer_names, network.neurons, strict=True):
        threshold = neuron.threshold.detach().mean().item() if isinstance(neuron, LIF) else 1.0
        if threshold > most:
            found.append(f"{name}'s threshold has exploded ({threshold:.3g})")
        elif threshold < MIN_THRESHOLD * _NEAR:
            found.append(f"{name}'s threshold is at its floor, {MIN_THRESHOLD:g}: all that is positive fires")
    return found
