"""What a film shows of an agent: below the frame its Q-values, beside it its spikes and some membranes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spiking_rl.drawing import Picture, beside, colour_of, stacked
from spiking_rl.errors import UserError
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF
from spiking_rl.raster import SpikeRaster
from spiking_rl.signals import ActionBars, MembraneTraces

MAX_NEURONS = 8
"""Membranes that can be watched at once."""

_DEFAULT_NEURONS = 3
_NARROWEST = 320  # pixels: names, bars and numbers need the room
_RASTER = 340  # pixels that a raster has at least, in height

Neuron = tuple[str, int]
"""Name of a layer, and the index of a neuron in it; a map's channels, rows and columns are counted through."""


def choose_neurons(network: LayeredNetwork, names: Sequence[str] = ()) -> list[Neuron]:
    """Return the neurons whose membranes are shown, each once.

    Args:
        network: a spiking one.
        names: such as ``layer1:3``; none: the three of the last hidden layer with the largest readout weights.

    Raises:
        UserError: a name that is none, an unknown layer or neuron, too many; naming ``neurons``.
    """
    counts = {name: int(np.prod(s)) for name, s in zip(network.layer_names, network.neuron_shapes(), strict=True)}
    if not names:
        return _most_weighted(network, counts)
    allowed = ", ".join(f"{layer}:0 to {layer}:{count - 1}" for layer, count in counts.items())
    chosen: dict[Neuron, None] = {}
    for name in names:
        layer, _, index = name.partition(":")
        if layer not in counts:
            raise UserError("neurons", name, f"names no hidden layer; there are {allowed}")
        if not (index.isascii() and index.isdigit()) or int(index[:9]) >= counts[layer] or len(index) > 9:
            raise UserError("neurons", name, f"names no neuron of {layer}; there are {allowed}")
        chosen[layer, int(index)] = None
    if len(chosen) > MAX_NEURONS:
        raise UserError("neurons", " ".join(names), f"at most {MAX_NEURONS} can be shown")
    return list(chosen)


def _most_weighted(network: LayeredNetwork, counts: dict[str, int]) -> list[Neuron]:
    layer, count = list(counts.items())[-1]
    maps = [m for m in network.readout.modules() if isinstance(m, nn.Linear)]
    if maps and maps[0].in_features == count:
        best = maps[0].weight.detach().norm(dim=0).argsort(descending=True, stable=True)
        return [(layer, int(i)) for i in best[:_DEFAULT_NEURONS]]
    return [(layer, i) for i in range(min(_DEFAULT_NEURONS, count))]


def action_names(env: Any, actions: int) -> list[str]:
    """Return what an environment calls its actions, as Atari games do; else their numbers."""
    meanings = getattr(env.unwrapped, "get_action_meanings", None)
    names = [str(name) for name in meanings()] if callable(meanings) else []
    return names if len(names) == actions else [str(i) for i in range(actions)]


class Panel:
    """Draws frames with Q-values below and, of a spiking network, spikes and membranes at the right.

    It is an observer of the network: :meth:`observe` is to be passed to the forward pass that decides.

    Args:
        network: that decides, one observation at a time.
        actions: their names.
        neurons: whose membranes are shown; see :func:`choose_neurons`. None are shown of a ReLU network.
        frame: a picture of the size that all frames have.
    """

    def __init__(self, network: LayeredNetwork, actions: Sequence[str], neurons: Sequence[Neuron], frame: Picture):
        self._bars = ActionBars(actions, max(_NARROWEST, frame.shape[1]))
        self._raster: SpikeRaster | None = None
        if not network.spiking:
            return
        shapes = zip(network.layer_names, network.neuron_shapes(), strict=True)
        sizes = {} if network.encoder is None else {"input": int(np.prod(network.input_shape))}
        sizes |= {name: int(np.prod(shape)) for name, shape in shapes}
        layers = list(sizes)
        self._traces = MembraneTraces(
            [f"{layer}:{i}" for layer, i in neurons], [colour_of(layers.index(layer)) for layer, _ in neurons]
        )
        height = max(frame.shape[0] + self._bars.height, _RASTER + self._traces.height)
        self._raster = SpikeRaster(sizes, height - self._traces.height)
        self._neurons = list(neurons)
        self._thresholds = _thresholds(network)
        self._spikes: dict[str, NDArray[Any]] = {}
        self._potentials: dict[Neuron, NDArray[Any]] = {}

    def observe(self, layer: str, output: Tensor, potential: Tensor) -> None:
        """Remember what a layer does in one decision; both ``(T, 1, *N)``."""
        if self._raster is None:
            return
        self._spikes[layer] = output[:, 0].flatten(1).numpy(force=True)
        for name, index in self._neurons:
            if name == layer:
                watched = potential[:, 0].flatten(1)[:, index] / self._thresholds[layer][index]
                self._potentials[name, index] = watched.float().numpy(force=True)

    def draw(self, frame: Picture, values: NDArray[Any], action: int, captions: Sequence[str], fresh: bool) -> Picture:
        """Return the frame with all that stands around it.

        Args:
            frame: what the agent saw.
            values: Q-values ``(A,)``.
            action: index of the action taken.
            captions: up to two lines of text.
            fresh: the membranes began at rest in this decision.
        """
        self._bars.push(values, action)
        left = stacked(frame, self._bars.draw(captions))
        if self._raster is None:
            return left
        for layer, spikes in self._spikes.items():
            self._raster.push(layer, spikes)
        potentials = np.stack([self._potentials[neuron] for neuron in self._neurons], axis=1)
        fired = np.stack([self._spikes[layer][:, i] for layer, i in self._neurons], axis=1)
        # Fresh membranes of one timestep have no course of their own: there the line joins the decisions.
        self._traces.push(potentials, fired, fresh=fresh and len(potentials) > 1)
        return beside(left, stacked(self._raster.draw(), self._traces.draw()))


@torch.no_grad()
def _thresholds(network: LayeredNetwork) -> dict[str, Tensor]:
    """Return the threshold of every neuron ``(N,)``, by layer."""
    layers = zip(network.layer_names, network.neurons, network.neuron_shapes(), strict=True)
    return {name: n.threshold.expand(shape).flatten() for name, n, shape in layers if isinstance(n, LIF)}
