"""A spiking network run one layer after another, so that thresholds can be set on what really arrives at them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from spiking_rl.encoding import direct, scan_starts
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF, lif_scan


def layer_by_layer(
    network: LayeredNetwork,
    inputs: Tensor,
    set_threshold: Callable[[int, LIF, Tensor], None],
    *,
    done: Callable[[int, float], None],
    starts: Tensor | None = None,
) -> Tensor:
    """Run every layer over all timesteps before the next one, each with a threshold set for its current.

    Args:
        network: a spiking network.
        inputs: ``(B, *input_shape)`` of independent decisions, or with ``starts`` ``(L, B, *input_shape)``.
        set_threshold: called as ``set_threshold(i, neuron, current)`` before layer i fires; its current
            is ``(S, B, *N)``, with ``S = T`` or ``L * T``.
        done: called as ``done(i, rate)`` when it has fired, with its spikes per neuron and timestep;
            what it changes of the layers behind counts.
        starts: bool ``(L, B)``, true where a decision opens an episode.

    Returns:
        The last layer's spikes, ``(S, B, *N)``.
    """
    x = inputs.unsqueeze(0) if starts is None else inputs
    opens = scan_starts(starts, network.timesteps)
    if network.encoder is not None:
        x = network.encoder(inputs, network.timesteps)
    held: dict[int, Tensor] = {}
    for i, neuron in enumerate(network.neurons):
        assert isinstance(neuron, LIF)
        current = network.current(i, x.flatten(0, 1), held)
        current = current.reshape(*x.shape[:2], *current.shape[1:])
        if i == 0 and network.encoder is None:
            current = direct(current, network.timesteps)
        set_threshold(i, neuron, current)
        x = fire(neuron, current, neuron.threshold, opens, network.single_spike)
        if i in network.sources.values():
            held[i] = x.flatten(0, 1)
        done(i, float(x.mean()))
    return x


def fire(neuron: LIF, current: Tensor, threshold: Tensor, starts: Tensor | None, single_spike: bool) -> Tensor:
    """Return the spikes ``(S, B, *N)`` that a neuron at rest gives for a current, with its leak and that threshold."""
    return lif_scan(current, None, neuron.leak, threshold, starts, single_spike=single_spike).spikes


def bisect(too_low: Callable[[float], bool], low: float, high: float, halvings: int) -> float:
    """Return the least number between two that is not too low, to ``2**-halvings`` of their distance, from above."""
    for _ in range(halvings):
        middle = (low + high) / 2
        if too_low(middle):
            low = middle
        else:
            high = middle
    return high
