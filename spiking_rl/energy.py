"""Compute energy of a spiking network against its ANN, from measured spike rates.

    E_ANN = MACs * 4.6 pJ
    E_SNN = MACs_1 * 4.6 pJ + sum over layers l >= 2 of r_l * MACs_l * 0.9 pJ + normalisation

r_l is the number of spikes per input of layer l, summed over the timesteps of one decision
(:func:`spikes_per_input`: after pooling, and with shortcuts). The first layer is analog; under
direct encoding its current is computed once. Where currents are normalised the spiking network pays
for it at every timestep (once in the first layer), 4.6 pJ for each of three multiply-accumulates per
neuron; the ANN it is compared with pays nothing, as it can do without. Batch norm folds into the
weights and is free. 45 nm, 32-bit float: MAC 4.6 pJ, accumulate 0.9 pJ (Horowitz 2014); 32-bit
integers: 3.2 and 0.1 pJ. Membranes cost memory traffic, which is counted apart
(:func:`membrane_traffic`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from spiking_rl.errors import UserError
from spiking_rl.networks import LayeredNetwork, evaluating


class Arithmetic(NamedTuple):
    """Energy of one operation in pJ, at 45 nm (Horowitz 2014).

    Attributes:
        mac: a multiplication and an addition.
        accumulate: an addition.
    """

    mac: float
    accumulate: float


FLOAT32 = Arithmetic(4.6, 0.9)
"""32-bit floating point: 3.7 + 0.9 pJ and 0.9 pJ."""
INT32 = Arithmetic(3.2, 0.1)
"""32-bit integers: 3.1 + 0.1 pJ and 0.1 pJ. Ratios are larger here; say so beside them."""


class CodedInput(NamedTuple):
    """What an encoder presents to the first layer (:mod:`spiking_rl.encoding`).

    Attributes:
        analog: timesteps of a decision with analog input: 1 for hybrid, 0 for Poisson encoding.
        rate: spikes per input and timestep, over all timesteps.
    """

    analog: int
    rate: float


class _Operations(NamedTuple):
    macs: int
    inputs: int


class _Work(NamedTuple):
    """What one layer does for one input: its linear maps in the order in which they run, and entries normalised."""

    own: list[_Operations]
    shortcut: list[_Operations]
    normalised: int

    @property
    def macs(self) -> int:
        return sum(o.macs for o in [*self.own, *self.shortcut])

    @property
    def of_sums(self) -> int:
        """MACs of maps behind the first one: what these see are sums, and no spikes."""
        return sum(o.macs for o in [*self.own[1:], *self.shortcut[1:]])


def _operations(module: nn.Module, given: Tensor, output: Tensor) -> _Operations:
    """Return what one call of a linear map takes, for one input."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    inputs = given[0].numel()
    if isinstance(module, _ConvTransposeNd):  # every input is spread over a kernel
        return _Operations(inputs * weight[0].numel(), inputs)
    if isinstance(module, nn.Linear):  # which may take means over places by itself
        inputs = output[0].numel() // module.out_features * module.in_features
    # Each output element costs one product per weight of its row or filter.
    return _Operations(output[0].numel() * weight[0].numel(), inputs)


@torch.no_grad()
def _work(network: LayeredNetwork) -> list[_Work]:
    """Return what every layer does, readout last, found by one pass of zeros through the maps alone."""
    calls: list[_Operations] = []
    normalised: list[int] = []

    def linear(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append(_operations(module, args[0], output))

    def norm(module: nn.Module, args: Any, output: Tensor) -> None:
        normalised.append(output[0].numel())

    def taken() -> list[_Operations]:
        found = calls.copy()
        calls.clear()
        return found

    modules = list(network.modules())
    handles = [m.register_forward_hook(linear) for m in modules if isinstance(m, (nn.Linear, _ConvNd))]
    handles += [m.register_forward_hook(norm) for m in modules if isinstance(m, (nn.LayerNorm, nn.GroupNorm))]
    outputs: list[Tensor] = []
    work = []
    x = next(network.parameters()).new_zeros(1, *network.input_shape)
    try:
        with evaluating(network):
            for i, layer in enumerate([*network.maps, network.readout]):
                normalised.clear()
                x = layer(x)
                own, entries = taken(), sum(normalised)
                if i in network.sources:
                    network.shortcuts[str(i)](outputs[network.sources[i]])
                work.append(_Work(own, taken(), entries))
                outputs.append(x)
    finally:
        for handle in handles:
            handle.remove()
    return work


def macs_per_layer(network: LayeredNetwork) -> list[int]:
    """Count multiply-accumulates of every layer for one input, readout last.

    Those of torch's linear maps and convolutions are counted. A layer's count includes the convolution of the shortcut
    that ends there. Pools, the addition of a shortcut and batch norm (which folds) count nothing, in the ANN as in the
    papers.
    """
    return [layer.macs for layer in _work(network)]


def spikes_per_input(network: LayeredNetwork, rates: Mapping[str, float]) -> list[float]:
    """Return the spikes per input and timestep of every layer behind the first, readout last.

    Times MACs and timesteps this is the number of accumulates, what :func:`energy_ratio` takes as
    ``rates``. Without pools and shortcuts it is the rate of the layer before.

    Average pooling makes inputs that are multiples of 1/4. We count the spikes that arrive, not the
    inputs that are not zero: a spike then costs an addition of a quarter of a weight, which is
    stored so; no multiplication is needed, and an input of 3/4 costs three additions. So at equal
    rates a pooled layer has four times the accumulates per input. Counting inputs that are not zero
    would give less and need a multiplication or a shift for each; the papers do not say what they
    count. Spikes of a border that a pool leaves out are counted too; windows of a pool are taken not to overlap, and a
    maximum as a mean.

    Of several maps in one layer the first sees the spikes; what the others take is in :func:`normalisation_macs`.

    A shortcut's convolution accumulates the spikes of its own source; one without weights adds 1 to
    the current of a neuron for every spike.

    Args:
        network: a spiking network.
        rates: spikes per neuron per timestep of every hidden layer, by name (:class:`SpikeCounter`).

    Raises:
        UserError: a layer without a linear map.
    """
    spikes = [
        rates[name] * math.prod(shape) for name, shape in zip(network.layer_names, network.neuron_shapes(), strict=True)
    ]
    per_input = []
    for i, layer in enumerate(_work(network)[1:], start=1):
        ways = [(i - 1, layer.own)]
        alone = 0.0  # accumulates of a shortcut without weights
        if i in network.sources:
            source = network.sources[i]
            if layer.shortcut:
                ways.append((source, layer.shortcut))
            else:
                alone = spikes[source]
        if not layer.macs and i == len(network.maps):
            per_input.append(0.0)  # a readout that only passes on, as in front of somebody else's layers
            continue
        if not all(way for _, way in ways):
            name = [*network.layer_names, "readout"][i]
            raise UserError("network", name, "holds no linear map or convolution of torch's to count the additions of")
        found = 0.0
        for source, way in ways:
            share = way[0].macs / layer.macs
            neurons = math.prod(network.neuron_shapes()[source])
            # In this order the factors of a plain layer are exactly 1.
            found += share * (neurons / way[0].inputs) * rates[network.layer_names[source]]
        per_input.append(found + alone / layer.macs)
    return per_input


def normalisation_macs(network: LayeredNetwork) -> list[int]:
    """Count the multiply-accumulates that each hidden layer takes beside its first map, per timestep.

    Normalising a current takes three per entry: one each for the mean, the variance, and scale and shift. Batch norm
    counts nothing: it folds into the weights. A map behind the first of a layer sees sums instead of spikes, and takes
    all of its multiply-accumulates (those in the readout are the last hidden layer's); layer 1 is analog, and
    :func:`macs_per_layer` has all of its own.
    """
    *hidden, readout = _work(network)
    macs = [3 * layer.normalised + (layer.of_sums if i else 0) for i, layer in enumerate(hidden)]
    macs[-1] += readout.of_sums
    return macs


def energy_pj(
    macs: Sequence[int],
    rates: Sequence[float] | None,
    timesteps: float,
    normalisation: Sequence[int] | None = None,
    arithmetic: Arithmetic = FLOAT32,
    coded: CodedInput | None = None,
) -> float:
    """Return the compute energy of one decision in pJ.

    Args:
        macs: per linear map, readout last (:func:`macs_per_layer`).
        rates: spikes per input and timestep of each layer behind the first (:func:`spikes_per_input`);
            without pools and shortcuts those are the hidden layers' spikes per neuron. None for a
            ReLU network.
        timesteps: T, or its mean where decisions exit early.
        normalisation: per hidden layer and timestep (:func:`normalisation_macs`); None for none.
        arithmetic: energy of an operation.
        coded: the input's own spikes, where it is not presented by direct encoding.
    """
    if rates is None:
        return sum(macs) * arithmetic.mac
    first, *later = normalisation or [0] * len(rates)
    analog = macs[0] + first + timesteps * sum(later)
    spiking = sum(rate * timesteps * count for rate, count in zip(rates, macs[1:], strict=True))
    if coded is not None:
        # Its current changes from timestep to timestep, and is normalised at each.
        analog += (coded.analog - 1) * macs[0] + (timesteps - 1) * first
        spiking += coded.rate * timesteps * macs[0]
    return analog * arithmetic.mac + spiking * arithmetic.accumulate


def energy_ratio(
    macs: Sequence[int],
    rates: Sequence[float] | None,
    timesteps: float,
    normalisation: Sequence[int] | None = None,
    arithmetic: Arithmetic = FLOAT32,
    coded: CodedInput | None = None,
) -> float:
    """Return E_ANN / E_SNN (1 for a ReLU network): how many times less energy the spikes need.

    Arguments are those of :func:`energy_pj`; both energies are of the same arithmetic.
    """
    own = energy_pj(macs, rates, timesteps, normalisation, arithmetic, coded)
    return energy_pj(macs, None, 1, None, arithmetic) / own


def membrane_traffic(network: LayeredNetwork, *, stateful: bool = False) -> int:
    """Count the reads and writes of membrane potentials that one decision takes.

    Two per neuron and timestep. None for a ReLU network, and none for one timestep with fresh
    membranes: its neurons are plain thresholds and store nothing.

    Args:
        network: its T and its hidden layers count.
        stateful: membranes are carried from decision to decision.
    """
    if not network.spiking or (network.timesteps == 1 and not stateful):
        return 0
    return 2 * network.timesteps * sum(math.prod(shape) for shape in network.neuron_shapes())


def accumulate_weights(network: LayeredNetwork) -> dict[str, float]:
    """Return what a spike per neuron and timestep of each hidden layer would cost, by name.

    Weighted so, the layers' spikes per neuron and decision add up to accumulates per multiply-accumulate behind the
    first layer: what :func:`spikes_per_input` gives, weighted by MACs.

    Args:
        network: a spiking network.
    """
    macs = macs_per_layer(network)[1:]
    weights = {}
    for name in network.layer_names:
        alone = {other: float(other == name) for other in network.layer_names}
        arriving = spikes_per_input(network, alone)
        weights[name] = sum(r * m for r, m in zip(arriving, macs, strict=True)) / sum(macs)
    return weights


class _Mean(torch.autograd.Function):
    """The mean in 32-bit floats, whose gradient is one number for all; torch's own writes that out for every entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.like = x.shape, x.dtype
        # Of bfloat16 the sum alone is rounded to that: asked for in 32 bits it would take ten times as long.
        return x.sum().float() / x.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        shape, dtype = ctx.like
        share: Tensor = (grads[0] / math.prod(shape)).to(dtype)
        return share.expand(shape)


class SpikeCost:
    """Observer that adds up what the spikes of a forward pass cost, with its gradient, for use in a loss.

    Pass the instance as ``observer``, and read :attr:`total` afterwards.

    Args:
        network: a spiking network.
    """

    potentials = False

    def __init__(self, network: LayeredNetwork) -> None:
        self._weights = accumulate_weights(network)
        self._network = network  # its T may fall
        self.total: Tensor | float = 0.0
        """Accumulates per multiply-accumulate behind the first layer, over all timesteps; see `clear`."""

    def __call__(self, layer: str, output: Tensor, potential: Tensor) -> None:
        """Add one layer's spikes ``(S, B, *N)``."""
        if layer in self._weights:  # a coded input is no layer
            mean: Tensor = _Mean.apply(output)  # type: ignore[no-untyped-call]
            self.total = self.total + self._weights[layer] * self._network.timesteps * mean

    def clear(self) -> None:
        """Begin again, for another forward pass."""
        self.total = 0.0


class SpikeCounter:
    """Observer that accumulates spike rates over any number of forward passes.

    Pass the instance as ``observer``; read :attr:`rates`.

    Args:
        graded: add up what outputs are instead of counting those that are not zero: of a network on rates
            (:meth:`spiking_rl.networks.LayeredNetwork.set_rates`).
    """

    potentials = False

    def __init__(self, *, graded: bool = False) -> None:
        self._graded = graded
        self._spikes: dict[str, float] = {}
        self._places: dict[str, int] = {}

    def __call__(self, layer: str, output: Tensor, potential: Tensor) -> None:
        """Count non-zero outputs of one layer."""
        spikes = output.detach().float().sum() if self._graded else torch.count_nonzero(output)
        self._spikes[layer] = self._spikes.get(layer, 0.0) + float(spikes)
        self._places[layer] = self._places.get(layer, 0) + output.numel()

    @property
    def rates(self) -> dict[str, float]:
        """Spikes per neuron per timestep, by hidden layer."""
        return {name: self._spikes[name] / self._places[name] for name in self._spikes if name != "input"}

    def coded_input(self, network: LayeredNetwork) -> CodedInput | None:
        """Return what the network's encoder presented, None for direct encoding."""
        if network.encoder is None:
            return None
        return CodedInput(network.encoder.analog, self._spikes["input"] / self._places["input"])

    def timesteps(self, network: LayeredNetwork, decisions: int) -> float:
        """Return the mean number of timesteps that decisions took: fewer than T where they exit early."""
        return self._places["layer1"] / math.prod(network.neuron_shapes()[0]) / decisions


class Energy(NamedTuple):
    """What decisions took, by the spikes counted in them (:func:`measured_energy`).

    Attributes:
        ratio: E_ANN / E_SNN in 32-bit floats; 1 for a ReLU network.
        ratio_int32: the same in 32-bit integers.
        accumulates_per_mac: additions behind the first layer over all timesteps, per multiply-accumulate of the
            ReLU network there; None for a ReLU network.
        ratio_of_rates: the first as the papers count: spikes per neuron of the layer before times the
            multiply-accumulates, as if no pool or shortcut lay between. Behind an average pool of 2x2 that leaves
            out three quarters of the additions; for comparison with published figures only.
    """

    ratio: float
    ratio_int32: float
    accumulates_per_mac: float | None
    ratio_of_rates: float


def measured_energy(network: LayeredNetwork, counter: SpikeCounter, timesteps: float | None = None) -> Energy:
    """Return the energy of the decisions that a counter has watched.

    Args:
        network: that made them.
        counter: its observer.
        timesteps: their mean where they exit early; None: T.

    Raises:
        UserError: the counter has watched no decision of this network.
    """
    if not network.spiking:
        return Energy(1.0, 1.0, None, 1.0)
    if not counter.rates.keys() >= set(network.layer_names):
        seen = ", ".join(counter.rates) or "nothing"
        raise UserError("counter", seen, f"has not seen {', '.join(network.layer_names)}; pass it on as the observer")
    macs, norms, coded = macs_per_layer(network), normalisation_macs(network), counter.coded_input(network)
    taken = network.timesteps if timesteps is None else timesteps
    spikes = spikes_per_input(network, counter.rates)
    plain = [counter.rates[name] for name in network.layer_names]
    accumulates = taken * sum(r * m for r, m in zip(spikes, macs[1:], strict=True))
    return Energy(
        energy_ratio(macs, spikes, taken, norms, coded=coded),
        energy_ratio(macs, spikes, taken, norms, INT32, coded),
        accumulates / sum(macs[1:]),
        energy_ratio(macs, plain, taken, norms, coded=coded),
    )


def odd_layers(rates: dict[str, float], silent: float = 0.005, saturated: float = 0.95) -> list[str]:
    """Return a warning for each layer that has fallen silent or fires all the time."""
    found = []
    for layer, rate in rates.items():
        if rate < silent:
            found.append(f"{layer} has fallen silent ({rate:.4f} spikes per neuron per timestep)")
        elif rate > saturated:
            found.append(f"{layer} is saturated ({rate:.3f} spikes per neuron per timestep)")
    return found
