"""The papers' threshold balancing: a percentile of each layer's current, measured by running the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral

import torch
from torch import Tensor, nn

from spiking_rl.conversion import linear_map, take_weights
from spiking_rl.errors import UserError
from spiking_rl.networks import LayeredNetwork, evaluating
from spiking_rl.neurons import LIF, MIN_THRESHOLD, LIFState, lif_scan

_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


@torch.no_grad()
def balance_thresholds(
    network: LayeredNetwork,
    images: Tensor,
    *,
    percentile: float,
    scale: float = 1.0,
    timesteps: int = 100,
    residual: float | None = None,
) -> list[float]:
    """Set every threshold to a percentile of its layer's current, layer by layer.

    The spiking network itself runs, with the thresholds before the layer already set, and the
    largest of the percentiles at the single timesteps counts. Scaling comes last. The papers balance
    a network that has taken a trained ReLU network's weights (:func:`spiking_rl.take_weights`), with
    leaks of 1:

    - DIET-SNN (Rathi, Roy 2020): ``percentile=99.7, scale=0.2, timesteps=100`` for T = 5 (scale
      0.6 to 0.7 for T = 25);
    - temporal pruning (Chowdhury, Rathi, Roy 2022): ``percentile=90, timesteps=500``;
    - the blocks of ResNets: ``residual=0.4``.

    Inputs are presented directly and neurons fire as often as they can, whatever the network does by itself: for codes
    and single spikes take :func:`spiking_rl.calibrate_thresholds`, which runs the network as it is.

    The percentile is exact, by nearest rank over all images and neurons at once. Spikes of one layer
    are kept over the timesteps, at one bit each; currents are computed again where they are needed.

    Args:
        network: a spiking network; its thresholds are overwritten, all channels of a layer alike.
            Weights, leaks and T stay. It runs in evaluation mode.
        images: scaled as in training, ``(B, *input_shape)``; the papers take 512.
        percentile: in (0, 100].
        scale: multiplies the balanced thresholds at the end, > 0.
        timesteps: T >= 1 to run for; not the network's own.
        residual: threshold of the layers inside residual blocks (behind the source of a shortcut, up
            to the layer where it ends), neither balanced nor scaled; None balances these as well.

    Returns:
        The threshold of each layer. A layer without positive currents gets the smallest one.

    Raises:
        UserError: a network that does not spike, images that are not finite or fewer than 2, or a
            number out of range. Nothing has changed then.
    """
    _check(network, images, percentile, scale, timesteps, residual)
    fixed = {i for end, source in network.sources.items() for i in range(source + 1, end + 1) if residual is not None}
    _balance(network, images, percentile, timesteps, dict.fromkeys(fixed, residual or 0.0))
    return [_scale_threshold(neuron, 1.0 if i in fixed else scale) for i, neuron in enumerate(network.neurons)]


@torch.no_grad()
def convert_balanced(
    relu: LayeredNetwork,
    spiking: LayeredNetwork,
    images: Tensor,
    *,
    percentile: float,
    scale: float = 1.0,
    timesteps: int = 100,
) -> list[float]:
    """Take a ReLU network's weights and balance thresholds so that the outputs stay in its units.

    A spike has amplitude 1 and stands for its layer's threshold. So the current of a layer comes in
    units of the thresholds before it, multiplied up: its biases are divided by that unit, the ways
    that meet behind a shortcut are brought to one unit, and the readout's weights are multiplied by
    theirs. With scale 1 the outputs then approach the ReLU network's as T grows, apart from what the
    percentile cuts off. Other weights stay: without biases and shortcuts this is the papers' method
    up to the size of the outputs. It is the way for networks with batch norm folded away, whose
    biases would otherwise be of another unit than their currents.

    Args:
        relu: trained, without normalisation; it stays as it is.
        spiking: of the same shape; its weights and thresholds are overwritten, its leaks are not.
        images: as for :func:`balance_thresholds`, and so are ``percentile``, ``scale`` and ``timesteps``.
        percentile: in (0, 100].
        scale: > 0.
        timesteps: to balance for.

    Returns:
        The threshold of each layer.

    Raises:
        UserError: as :func:`balance_thresholds`, or the networks do not fit each other, are normalised,
            or hold more than one linear map in a layer. Nothing has changed then.
    """
    _check(spiking, images, percentile, scale, timesteps, None)
    if any(isinstance(m, _NORMALISATIONS) for m in relu.modules()):
        raise UserError("relu", "a normalised network", "cannot be balanced; fold batch norm, or use convert")
    maps = [linear_map(m) for m in [*spiking.maps, spiking.readout]]
    past = {
        i: None if _is_plain(spiking.shortcuts[str(i)]) else linear_map(spiking.shortcuts[str(i)])
        for i in spiking.sources
    }
    take_weights(relu, spiking)
    units: list[float] = []  # of each layer's current, in the ReLU network's

    def of_spike(layer: int) -> float:
        neuron = spiking.neurons[layer]
        assert isinstance(neuron, LIF)
        return units[layer] * float(neuron.threshold.flatten()[0])

    def prepare(layer: int) -> None:
        """Bring a layer's weights and biases to the unit of its inputs, now that this is known."""
        linear = maps[layer]
        unit = of_spike(layer - 1) if layer else 1.0
        if layer in spiking.sources:
            other, shortcut = of_spike(spiking.sources[layer]), past[layer]
            if shortcut is None:  # its spikes arrive as they are: the other way is brought to their unit
                linear.weight.mul_(unit / other)
                unit = other
            else:
                shortcut.weight.mul_(other / unit)
                if shortcut.bias is not None:
                    shortcut.bias.div_(unit)
        if linear.bias is not None:
            linear.bias.div_(unit)
        units.append(unit)

    _balance(spiking, images, percentile, timesteps, {}, prepare)
    maps[-1].weight.mul_(of_spike(len(units) - 1))
    return [_scale_threshold(neuron, scale) for neuron in spiking.neurons]


def _is_plain(module: nn.Module) -> bool:
    return not any(True for _ in module.parameters())


def _check(
    network: LayeredNetwork, images: Tensor, percentile: float, scale: float, timesteps: int, residual: float | None
) -> None:
    if not network.spiking:
        raise UserError("network", "a ReLU network", "has no thresholds; build it with neuron='lif'")
    if not 0 < percentile <= 100:
        raise UserError("percentile", percentile, "must lie above 0 and be at most 100")
    for field, value in (("scale", scale), ("residual", 1.0 if residual is None else residual)):
        if not 0 < value < math.inf:
            raise UserError(field, value, "must be a positive number")
    if isinstance(timesteps, bool) or not isinstance(timesteps, Integral) or timesteps < 1:
        raise UserError("timesteps", timesteps, "must be a whole number of at least 1")
    if tuple(images.shape[1:]) != network.input_shape:
        raise UserError("images", tuple(images.shape), f"must be (B, *{network.input_shape})")
    if len(images) < 2:
        raise UserError("images", len(images), "balancing needs at least 2 images; the papers take 512")
    if not bool(torch.isfinite(images).all()):
        raise UserError("images", "NaN or infinity", "balancing needs finite images")


class _SpikeTrain:
    """Spikes of one layer over time at one bit each: 500 timesteps of 512 images must fit into memory."""

    def __init__(self) -> None:
        self._bits: list[Tensor] = []
        self._dtype = torch.float32

    def put(self, t: int, spikes: Tensor) -> None:
        """Keep spikes ``(B, *N)`` of timestep t; t counts up from 0."""
        if t % 8 == 0:
            self._bits.append(torch.zeros_like(spikes, dtype=torch.uint8))
        self._bits[-1] |= spikes.to(torch.uint8) << t % 8
        self._dtype = spikes.dtype

    def at(self, t: int) -> Tensor:
        """Return the spikes of timestep t, ``(B, *N)``."""
        return (self._bits[t // 8] >> t % 8 & 1).to(self._dtype)


def _balance(
    network: LayeredNetwork,
    images: Tensor,
    percentile: float,
    timesteps: int,
    fixed: dict[int, float],
    prepare: Callable[[int], None] | None = None,
) -> None:
    """Set the thresholds in order; ``prepare(i)`` is called before layer i first runs."""
    trains: dict[int, _SpikeTrain] = {}
    with evaluating(network):
        for i, neuron in enumerate(network.neurons):
            assert isinstance(neuron, LIF)
            if prepare is not None:
                prepare(i)
            current = _currents(network, i, images, trains)
            if i in fixed:
                threshold = fixed[i]
            else:
                # The first layer's current does not change over time.
                threshold = max(_percentile(current(t), percentile) for t in range(timesteps if i else 1))
            neuron.threshold.fill_(max(threshold, MIN_THRESHOLD))
            if i + 1 < len(network.neurons):
                trains[i] = _run(neuron, current, timesteps)
            for done in [j for j in trains if j < i and not any(j == s and i < e for e, s in network.sources.items())]:
                del trains[done]


def _currents(
    network: LayeredNetwork, layer: int, images: Tensor, trains: dict[int, _SpikeTrain]
) -> Callable[[int], Tensor]:
    """Return a function that gives the layer's current ``(B, *N)`` at a timestep."""
    if layer == 0:
        first = network.current(0, images, {})
        return lambda t: first
    source = network.sources.get(layer)

    def current(t: int) -> Tensor:
        return network.current(layer, trains[layer - 1].at(t), {} if source is None else {source: trains[source].at(t)})

    return current


def _run(neuron: LIF, current: Callable[[int], Tensor], timesteps: int) -> _SpikeTrain:
    train = _SpikeTrain()
    state: LIFState | None = None
    for t in range(timesteps):
        spikes, state, _ = lif_scan(current(t).unsqueeze(0), state, neuron.leak, neuron.threshold)
        train.put(t, spikes[0])
    return train


def _percentile(values: Tensor, percentile: float) -> float:
    """Return the nearest-rank percentile; ``torch.quantile`` takes 16 million values at most."""
    rank = math.ceil(percentile * values.numel() / 100 - 1e-6)  # less what rounding may add to a whole number
    return float(values.flatten().kthvalue(max(1, rank)).values)


def _scale_threshold(neuron: nn.Module, scale: float) -> float:
    assert isinstance(neuron, LIF)
    neuron.threshold.mul_(scale)
    neuron.clamp_()
    return float(neuron.threshold.flatten()[0])
