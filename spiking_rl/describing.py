"""What a network is made of, layer by layer: shapes, parameters, MACs, thresholds and leaks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spiking_rl.energy import macs_per_layer
from spiking_rl.group_norm import GroupNorm
from spiking_rl.networks import LayeredNetwork, evaluating
from spiking_rl.neurons import LIF

_NAMES: dict[type[nn.Module], str] = {
    nn.AvgPool2d: "pool",
    nn.MaxPool2d: "max pool",
    nn.LayerNorm: "layer norm",
    nn.GroupNorm: "group norm",
    GroupNorm: "group norm",
    nn.BatchNorm1d: "batch norm",
    nn.BatchNorm2d: "batch norm",
}


@dataclass(frozen=True)
class Spread:
    """Values of one parameter of a layer.

    Attributes:
        mean: over the channels.
        min: the smallest.
        max: the largest.
        count: how many there are: 1, or one per channel.
    """

    mean: float
    min: float
    max: float
    count: int


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a network.

    Attributes:
        name: as observers and tables use it; the last one is ``readout``.
        kind: its linear map and what stands around it, such as ``pool, conv 3x3, batch norm``.
        neuron: ``lif`` or ``relu``; None for the readout, which does not fire.
        output_shape: of one output.
        parameters: trainable numbers, thresholds and leaks included.
        macs: multiply-accumulates for one input.
        threshold: in units of the layer's current; None without LIF neurons.
        leak: in [0, 1], 1 keeps everything; likewise.
    """

    name: str
    kind: str
    neuron: str | None
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    threshold: Spread | None
    leak: Spread | None


def describe(network: LayeredNetwork) -> list[LayerFacts]:
    """Return the facts of every layer, readout last.

    A layer's parameters and MACs include those of the shortcut that ends there; the readout's parameters the
    threshold of output neurons that are scored by their spike times. All together are the network's.
    """
    macs = macs_per_layer(network)
    facts = []
    counted: set[int] = set()  # a map that serves two layers is the first one's
    for i, (name, shape) in enumerate(zip(network.layer_names, network.neuron_shapes(), strict=True)):
        layer, neuron = network.maps[i], network.neurons[i]
        kind, own = _kind(layer), [layer, neuron]
        if i in network.sources:
            shortcut = network.shortcuts[str(i)]
            own.append(shortcut)
            kind += f" + shortcut of layer{network.sources[i] + 1}"
        spiking = isinstance(neuron, LIF)
        facts.append(
            LayerFacts(
                name,
                kind,
                "lif" if spiking else "relu",
                shape,
                sum(_count(module, counted) for module in own),
                macs[i],
                _spread(neuron.threshold) if isinstance(neuron, LIF) else None,
                _spread(neuron.leak) if isinstance(neuron, LIF) else None,
            )
        )
    return [*facts, _readout(network, macs[-1], counted)]


def _readout(network: LayeredNetwork, macs: int, counted: set[int]) -> LayerFacts:
    score = network.spike_time
    with torch.no_grad(), evaluating(network):
        outputs, _ = network(next(network.parameters()).new_zeros(1, 1, *network.input_shape))
    return LayerFacts(
        "readout",
        _kind(network.readout),
        None,
        tuple(outputs.shape[2:]),
        _count(network.readout, counted) + (_count(score, counted) if score is not None else 0),
        macs,
        _spread(score.threshold) if score is not None else None,
        None,
    )


def _count(module: nn.Module, counted: set[int]) -> int:
    """Count the parameters that nothing before has had."""
    new = [p for p in module.parameters() if id(p) not in counted]
    counted.update(map(id, new))
    return sum(math.prod(p.shape) for p in new)


def _spread(values: Tensor) -> Spread:
    found = values.detach().double()
    return Spread(found.mean().item(), found.min().item(), found.max().item(), found.numel())


def _kind(layer: nn.Module) -> str:
    return ", ".join(name for name in map(_name, layer.modules()) if name)


def _name(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        kernel = "x".join(map(str, module.kernel_size))
        return f"conv {kernel}" + (f"/{module.stride[0]}" if module.stride[0] > 1 else "")
    if isinstance(module, nn.Linear):
        return "linear"
    return _NAMES.get(type(module), "")
