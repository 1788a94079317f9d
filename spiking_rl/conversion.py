"""Thresholds set from data, layer by layer; a trained ReLU network turned into a spiking one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from spiking_rl.encoding import scan_starts
from spiking_rl.errors import UserError
from spiking_rl.initialisation import scale_channels
from spiking_rl.layerwise import bisect, layer_by_layer
from spiking_rl.networks import LayeredNetwork, evaluating
from spiking_rl.neurons import LIF, MIN_THRESHOLD, SpikeTimeScore, lif_scan

_RATES = (0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3)
"""Firing rates that a conversion tries."""
_LEAST_GAIN = 0.01  # of a membrane that hardly leaks
_OF_POSSIBLE = 0.75  # of the spikes that the lowest threshold would give: the most to ask for
_HALVINGS = 24  # halves the bracket to 1e-7 of its width, below float32 resolution


@torch.no_grad()
def calibrate_thresholds(
    network: LayeredNetwork, inputs: Tensor, rate: float = 0.2, starts: Tensor | None = None
) -> list[float]:
    """Set every threshold so that its layer fires at ``rate`` spikes per neuron per timestep.

    Layer by layer on data, as the papers initialise theirs: the spiking network itself runs with
    the earlier layers' thresholds already set. Where the papers take a percentile of the current,
    the firing rate is measured here by running the neurons, which holds for any T and leak.

    Args:
        network: a spiking network; its thresholds are overwritten. All channels of a layer get the
            same one, slow neurons too: they sum up more, so they fire on the sign of what they
            remember and are little disturbed by their own resets. (Thresholds in proportion to each
            membrane's spread make every neuron fire alike and hide velocity in the resets.)
        inputs: at least 2 inputs scaled as in training: ``(B, *input_shape)`` of independent
            decisions, or with ``starts`` the sequences ``(L, B, *input_shape)`` of a stateful agent.
        rate: target in (0, 1).
        starts: bool ``(L, B)``, true where a decision opens an episode.

    Returns:
        The rate reached, per layer. Where a layer's current is rarely positive it is lower than asked: at most
        three quarters of the spikes that the lowest threshold would give.

    Raises:
        UserError: a ReLU network, rate outside (0, 1), fewer than 2 inputs, or inputs that are not finite.
    """
    with _at_rest(network):
        return _calibrate(network, inputs, rate, starts)


@torch.no_grad()
def convert(
    relu: LayeredNetwork,
    spiking: LayeredNetwork,
    inputs: Tensor,
    rate: float | None = None,
    starts: Tensor | None = None,
) -> list[float]:
    """Give a spiking network the weights of a trained ReLU network of the same shape.

    A threshold balanced on data, layer by layer, makes a firing rate of the ReLU's output: over
    enough timesteps ``threshold * rate`` is that output, cut off at the threshold. Spikes have
    amplitude 1, so the weights behind a layer are multiplied by its threshold, and the outputs stay
    in the ReLU network's units: Q-values keep their scale. The lower ``rate``, the less is cut off and
    the more timesteps it takes to tell values apart. Where currents are normalised, every timestep is
    normalised for itself: the approximation keeps an error then, whatever T, and is a place to train on from.

    With a ``rate`` the spiking network may see single frames where the ReLU network sees several stacked, the
    oldest first: its first kernels are the sums over the frames, which answer alike to what stands still. What
    moves it has to learn. The currents of a stateful network's channels (``starts``) are scaled by ``1 - leak``,
    so that membranes that sum up a constant current come to as much.

    Args:
        relu: trained, neuron ``"relu"``; it stays as it is.
        spiking: its weights and thresholds are overwritten, its leaks are not (with a leak of 1, where
            they start, the approximation of a stateless network is best).
        inputs: at least 2 inputs as in training, ``(B, *input_shape)`` of the spiking network, or with
            ``starts`` the sequences ``(L, B, *input_shape)``.
        rate: spikes per neuron and timestep to balance the thresholds for, in (0, 1); None tries some and
            takes the one whose outputs are closest to the ReLU network's, by the mean square.
        starts: bool ``(L, B)``, true where a decision opens an episode; needs a rate.

    Returns:
        The rate reached, per layer.

    Raises:
        UserError: the networks do not fit each other, a layer holds more than one linear map, or as
            :func:`calibrate_thresholds`. Nothing has changed then.

    Source: DIET-SNN (Rathi, Roy 2020), which balances thresholds likewise and leaves the weights.
    """
    if relu.spiking or not spiking.spiking:
        raise UserError("relu", "the two networks", "must be a ReLU network and a spiking one, in this order")
    weights = _weights(spiking)
    source = relu.state_dict()
    if starts is not None and rate is None:
        raise UserError("rate", rate, "must be given to convert a stateful network")
    if rate is not None:
        _sum_frames(source, weights)
    _check_same_layers(source, weights)
    if spiking.sources:
        raise UserError("spiking", "a network with shortcuts", "is converted by convert_balanced")
    _check(spiking, inputs, _RATES[0] if rate is None else rate, starts)
    behind = [linear_map(follower).weight for follower in [*list(spiking.maps)[1:], spiking.readout]]

    def balance(at: float) -> list[float]:
        spiking.load_state_dict(source, strict=False)
        if starts is not None:
            for layer, neuron in zip(spiking.maps, spiking.neurons, strict=True):
                assert isinstance(neuron, LIF)
                gain = (1 - neuron.leak).clamp(min=_LEAST_GAIN).flatten()
                scale_channels(layer, gain)
        return _calibrate(spiking, inputs, at, starts, fold)

    def fold(layer: int) -> None:
        neuron = spiking.neurons[layer]
        assert isinstance(neuron, LIF)
        behind[layer].mul_(neuron.threshold.flatten()[0])  # calibration gives all channels the same

    with _at_rest(relu), _at_rest(spiking):
        if rate is None:
            wanted = relu(inputs.unsqueeze(0))[0]
            errors = {}
            for candidate in _RATES:
                balance(candidate)
                errors[candidate] = float((spiking(inputs.unsqueeze(0))[0] - wanted).square().mean())
            rate = min(errors, key=lambda candidate: errors[candidate])
        return balance(rate)


def _at_rest(network: LayeredNetwork) -> AbstractContextManager[None]:
    """Put a network that is in training into evaluation mode; one that is not may be measuring its batch norm."""
    return evaluating(network) if network.training else nullcontext()


@torch.no_grad()
def take_weights(relu: LayeredNetwork, spiking: LayeredNetwork) -> None:
    """Copy the weights of a trained ReLU network into a spiking one of the same shape, as they are.

    Thresholds and leaks stay. Fold batch norm first (:func:`spiking_rl.fold_batch_norm`).

    Raises:
        UserError: the networks do not fit each other. Nothing has changed then.
    """
    if relu.spiking or not spiking.spiking:
        raise UserError("relu", "the two networks", "must be a ReLU network and a spiking one, in this order")
    source = relu.state_dict()
    _check_same_layers(source, _weights(spiking))
    spiking.load_state_dict(source, strict=False)


def _weights(spiking: LayeredNetwork) -> dict[str, Tensor]:
    """Return what a ReLU network of the same shape has too."""
    return {n: t for n, t in spiking.state_dict().items() if not n.startswith(("neurons.", "spike_time."))}


def _check_same_layers(source: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in source.items()}:
        raise UserError(
            "relu",
            "its layers",
            "are not those of the spiking network; build both with the same options "
            "(bias=True where batch norm was folded away)",
        )


def _sum_frames(source: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Replace kernels over stacked frames by their sums over the frames, where the other network's are that small."""
    for name, tensor in source.items():
        other = weights.get(name)
        if other is not None and tensor.dim() == other.dim() == 4 and tensor.shape != other.shape:
            frames = tensor.shape[1] // other.shape[1]
            if tensor.shape == (other.shape[0], frames * other.shape[1], *other.shape[2:]):
                source[name] = tensor.reshape(len(other), frames, *other.shape[1:]).sum(1)


def linear_map(module: nn.Module) -> nn.Linear | nn.Conv2d:
    """Return the one linear map in a module: the thresholds before it may scale its weights.

    Raises:
        UserError: there is none, or more than one.
    """
    found = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if len(found) != 1 or sum(p.dim() > 1 for p in module.parameters()) != 1:
        raise UserError(
            "spiking", type(module).__name__, "must hold exactly one nn.Linear or nn.Conv2d to be converted"
        )
    return found[0]


def _calibrate(
    network: LayeredNetwork,
    inputs: Tensor,
    rate: float,
    starts: Tensor | None,
    calibrated: Callable[[int], None] | None = None,
) -> list[float]:
    """Calibrate every layer; ``calibrated(i)`` is called when layer i is, before the next one runs."""
    if not network.spiking:
        raise UserError("network", "relu", "has no thresholds; build it with spiking neurons")
    _check(network, inputs, rate, starts)
    opens = scan_starts(starts, network.timesteps)
    reached = []

    def balance(_: int, neuron: LIF, current: Tensor) -> None:
        # The search is no finer than that, and the compiled scans take no 64 bits.
        current, leak = (t.float() if t.dtype is torch.float64 else t for t in (current, neuron.leak))

        def fires(threshold: float) -> float:
            now = torch.tensor(max(threshold, MIN_THRESHOLD), dtype=leak.dtype, device=leak.device)
            once = network.single_spike
            return float(lif_scan(current, None, leak, now, opens, single_spike=once, carry=False).spikes.mean())

        # Where few currents are ever positive, a higher rate would leave the threshold at its floor, far below all of
        # them: whatever fires would then always fire, and no surrogate gradient would pass.
        wanted = min(rate, _OF_POSSIBLE * fires(MIN_THRESHOLD))

        def too_low(threshold: float) -> bool:
            return fires(threshold) > wanted

        highest = max(MIN_THRESHOLD, float(current.clamp(min=0).sum(0).max())) + MIN_THRESHOLD
        neuron.threshold.fill_(max(bisect(too_low, 0.0, highest, _HALVINGS), MIN_THRESHOLD))

    def done(layer: int, rate_reached: float) -> None:
        reached.append(rate_reached)
        if calibrated is not None:
            calibrated(layer)

    spikes = layer_by_layer(network, inputs, balance, done=done, starts=starts)
    if network.spike_time is not None:
        _set_spike_time(network.spike_time, network.readout(spikes.flatten(0, 1)).reshape(*spikes.shape[:2], -1))
    return reached


@torch.no_grad()
def calibrate_spike_time(network: LayeredNetwork, inputs: Tensor) -> None:
    """Set the threshold of the outputs' spike times alone, as :func:`calibrate_thresholds` does.

    Args:
        network: scores spike times (``kappa`` above 0).
        inputs: ``(B, *input_shape)``, scaled as in training.
    """
    assert network.spike_time is not None
    with evaluating(network):
        _set_spike_time(network.spike_time, network.currents(inputs.unsqueeze(0)))


def _set_spike_time(score: SpikeTimeScore, current: Tensor) -> None:
    """Let the winner of a current ``(T, B, n)`` fire about halfway: at half of what it sums up."""
    score.threshold.fill_(max(MIN_THRESHOLD, float(current.sum(0).amax(1).mean()) / 2))


def _check(network: LayeredNetwork, inputs: Tensor, rate: float, starts: Tensor | None = None) -> None:
    if not 0 < rate < 1:
        raise UserError("rate", rate, "the target firing rate must lie strictly between 0 and 1")
    require_inputs(network, inputs, ("B",) if starts is None else ("L", "B"))
    batch = inputs.shape[:2]
    if starts is not None and (starts.shape != batch or starts.dtype != torch.bool):
        raise UserError(
            "starts", f"{starts.dtype} {tuple(starts.shape)}", f"must be torch.bool of shape {tuple(batch)}"
        )
    if starts is not None and not network.takes_state():
        raise UserError("starts", tuple(starts.shape), "membranes are carried under direct encoding only; leave it out")


def require_inputs(network: LayeredNetwork, inputs: Tensor, axes: Sequence[str] = ("B",)) -> None:
    """Refuse what is no batch ``(*axes, *input_shape)`` to measure a network on.

    Raises:
        UserError: another shape or dtype, fewer than 2, or not finite.
    """
    if tuple(inputs.shape[len(axes) :]) != tuple(network.input_shape):
        shape = ", ".join([*axes, *map(str, network.input_shape)])
        raise UserError("inputs", tuple(inputs.shape), f"must be of shape ({shape}), as the network's are")
    dtype = next(network.parameters()).dtype
    if inputs.dtype != dtype:
        raise UserError("inputs", inputs.dtype, f"must be {dtype}, as the network's parameters; .to({dtype})")
    count = math.prod(inputs.shape[: len(axes)])
    if count < 2:
        raise UserError("inputs", count, "calibration needs at least 2 inputs, better 1,000")
    if not bool(torch.isfinite(inputs).all()):
        raise UserError("inputs", "NaN or infinity", "calibration needs finite inputs")
