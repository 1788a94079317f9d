"""A network made ready for use: at one timestep thresholds folded away and no membrane; silent inputs skipped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spiking_rl.encoding import HybridEncoder, scan_starts
from spiking_rl.errors import UserError
from spiking_rl.event_layers import is_plain
from spiking_rl.events import EventMap, runs_on_events
from spiking_rl.folding import fold_batch_norm
from spiking_rl.fused_fresh import FreshScan
from spiking_rl.networks import LayeredNetwork, NetworkState
from spiking_rl.neurons import LIF, LIFState
from spiking_rl.surrogate import fire

_EVENTS_FROM = {2: 2**17, 4: 2**13}  # weights of a linear map, of a convolution, from which adding up events wins
_GATHER_FROM = 2**18  # weights of a linear layer from which reading only the active inputs' rows wins
_GATHER_DENSITY = 0.5  # part of the inputs that may be active for it, those of all timesteps counted
_TRANSPOSED_UP_TO = 1024  # outputs up to which, at several timesteps, the product with transposed weights wins

_Module = Callable[[Tensor], Tensor]


class Step(nn.Module):
    """Neurons at one fresh timestep, whose threshold is folded into their layer: they fire where the current is > 0.

    Args:
        threshold: where it could not be folded away.
    """

    threshold: Tensor | None

    def __init__(self, threshold: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)

    def forward(self, current: Tensor) -> Tensor:
        """Return spikes, written over the current where the threshold is folded."""
        return _step(current) if self.threshold is None else fire(current, self.threshold)


def _step(current: Tensor) -> Tensor:
    return current.gt_(0)


def check_plain(network: LayeredNetwork) -> None:
    """Refuse codes and scores that only the network itself can compute.

    Raises:
        UserError: naming what stands in the way.
    """
    if network.on_rates:
        raise UserError("rates", True, "only spikes can be deployed; set_rates(False) first")
    if any(isinstance(neuron, LIF) and not neuron.is_own() for neuron in network.neurons):
        raise UserError(
            "neurons", "LIF", "somebody listens to them, or they scan otherwise; only our own can be deployed"
        )
    if network.encoder is not None and not (isinstance(network.encoder, HybridEncoder) and network.timesteps == 1):
        # Of a hybrid code one timestep is the analog input alone.
        raise UserError("encoding", network.encoder.name, "only direct encoding can be deployed")
    if network.single_spike and network.timesteps > 1:
        raise UserError("single_spike", True, "neurons that fire once can be deployed at one timestep only; prune it")
    if network.spike_time is not None:
        raise UserError("kappa", network.spike_time.kappa, "outputs scored by spike times cannot be deployed; use 0")


def check_waits(network: LayeredNetwork) -> None:
    """Refuse decisions that may be made before all of several timesteps.

    Raises:
        UserError: an exit margin is set.
    """
    if network.exit_margin is not None:
        raise UserError("exit_margin", network.exit_margin, "early decisions cannot be deployed; set it to None")


def _check_spiking(network: LayeredNetwork) -> None:
    if not network.spiking:
        raise UserError("network", "relu", "has no spiking neurons; it is fast as it is")


@torch.no_grad()
def fold_thresholds(network: LayeredNetwork) -> LayeredNetwork:
    """Return an equal network of :class:`Step` neurons, for one timestep with fresh membranes.

    ``I > threshold`` is ``I - threshold > 0``: the threshold goes into the bias of the layer's convolution or linear
    map, or into the shift of the normalisation behind it. Batch norm, at rest, is folded before. A layer that ends
    with neither keeps its threshold.

    Args:
        network: at T=1, used without a state; it stays as it is.

    Returns:
        The network in evaluation mode. Spikes differ where a current comes within rounding of its threshold.

    Raises:
        UserError: the network is more than thresholds in one pass.
    """
    _check_spiking(network)
    if network.timesteps != 1:
        raise UserError("timesteps", network.timesteps, "only at one timestep can thresholds be folded; prune it")
    check_plain(network)
    folded = fold_batch_norm(network).eval().requires_grad_(False)
    for i, neuron in enumerate(folded.neurons):
        assert isinstance(neuron, LIF)
        shifted = _shift(folded, i, -neuron.threshold)
        folded.neurons[i] = Step(None if shifted else neuron.threshold.detach())
    folded.spiking = False  # to the network these are plain functions, as ReLU
    return folded


def _closing(layer: nn.Module) -> nn.Module | None:
    """Return the module of a plain chain that makes what the chain gives; None of a module of somebody's own.

    What such a one, or somebody who listens, does behind its last layer is not known.
    """
    while type(layer) is nn.Sequential and len(layer) and is_plain(layer):
        layer = layer[-1]
    ours = type(layer).__module__.partition(".")[0] == "spiking_rl"
    known = ours or type(layer) in (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)
    return layer if known and is_plain(layer) else None


def _shift(network: LayeredNetwork, layer: int, by: Tensor) -> bool:
    """Add ``by``, one number or one per channel, to what a map gives; False where nothing in it can take that."""
    last = _closing(network.maps[layer])
    if sum(module is last for _, module in network.named_modules(remove_duplicate=False)) > 1:
        return False  # it is used twice
    if by.numel() > 1 and isinstance(last, (nn.Linear, nn.LayerNorm)) and len(network.neuron_shapes()[layer]) > 1:
        return False  # these have a bias per entry of the last axis, thresholds are of the first
    if isinstance(last, (nn.Conv2d, nn.Linear)):
        channels = last.weight.shape[0]
    elif isinstance(last, nn.GroupNorm) or (isinstance(last, nn.LayerNorm) and len(last.normalized_shape) == 1):
        channels = last.num_channels if isinstance(last, nn.GroupNorm) else last.normalized_shape[0]
    else:
        return False
    shift = by.flatten().expand(channels)
    last.bias = nn.Parameter(shift.clone() if last.bias is None else last.bias + shift, requires_grad=False)
    return True


def _fold_timesteps(network: LayeredNetwork) -> LayeredNetwork:
    """Return an equal network in evaluation mode and without batch norm, whose neurons stay what they are."""
    _check_spiking(network)
    check_plain(network)
    return fold_batch_norm(network).eval()


def _freeze(network: LayeredNetwork) -> LayeredNetwork:
    """Make plain attributes of parameters: modules look them up in Python, which a small layer notices."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, parameter.detach())
    return network


class Scan:
    """Neurons over the timesteps of fresh decisions, on a flat batch.

    Args:
        neuron: the layer, as it shall stay.
        timesteps: T.
        repeat: timesteps that each current lasts: 1, or T.
    """

    def __init__(self, neuron: LIF, timesteps: int, repeat: int) -> None:
        self.neuron, self.timesteps, self.repeat = neuron, timesteps, repeat
        self.fused = FreshScan(neuron.leak, neuron.threshold, timesteps, repeat)

    def __call__(self, current: Tensor) -> Tensor:
        """Return spikes ``(T * B, *N)`` of a current ``(T / repeat * B, *N)``, timestep by timestep."""
        spikes = self.fused(current)
        return self.neuron.fresh(current, self.timesteps, self.repeat) if spikes is None else spikes


class SparseLinear:
    """A linear map that reads only the weights of active inputs, where there is one decision and few are active.

    A single decision is bound by memory: the 1.6 million weights of the Nature-CNN's linear layer take longer to
    read than to use, and nine inputs in ten are silent. Of several timesteps each reads its own.

    Args:
        layer: the map.
        binary: its inputs are spikes, 0 or 1, and not means of spikes over a pool.
        timesteps: inputs that come with one decision.
    """

    def __init__(self, layer: nn.Linear, binary: bool, timesteps: int = 1) -> None:
        self.rows = layer.weight.detach().t().contiguous()  # (inputs, outputs)
        self.bias = self.rows.new_zeros(self.rows.shape[1]) if layer.bias is None else layer.bias.detach()
        self.binary = binary
        self.timesteps = timesteps
        self.most = int(_GATHER_DENSITY * len(self.rows))
        self.first = torch.arange(timesteps, device=self.rows.device) * len(self.rows)
        wide = timesteps > 1 and self.rows.shape[1] > _TRANSPOSED_UP_TO
        self.dense = layer.weight.detach() if wide else None  # the layer's own weights, where they are faster

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``(B, outputs)`` of ``(B, inputs)``."""
        if len(x) == self.timesteps and (self.timesteps == 1 or self._few(x)):
            flat = x.reshape(-1)
            # Booleans are searched faster, which pays for itself where there are many.
            active = (flat if self.timesteps == 1 else flat.bool()).nonzero().view(-1)
            if len(active) <= self.most:
                amounts = None if self.binary else flat[active].to(self.rows.dtype)  # autocast rounds them
                first = self.first
                if self.timesteps > 1:
                    first = torch.searchsorted(active, first)
                    active.remainder_(len(self.rows))
                summed: Tensor = torch.embedding_bag(self.rows, active, first, False, 0, False, amounts)[0]
                return summed.add_(self.bias)
        if self.dense is not None:
            return nn.functional.linear(x, self.dense, self.bias)
        return torch.addmm(self.bias, x, self.rows)

    def _few(self, x: Tensor) -> bool:
        """Tell whether few inputs of all timesteps are active; to count them costs less than to find them."""
        return bool((x.sum() if self.binary else x.count_nonzero()) <= self.most)


class _Layers:
    """The maps of a network, ready to run.

    Attributes:
        input_shape: shape of one input.
    """

    def __init__(self, folded: LayeredNetwork) -> None:
        self.input_shape = folded.input_shape
        self._timesteps = timesteps = folded.timesteps
        # Layers as flat lists of bound methods: at a batch of one, calling modules costs as much as a small layer.
        self._maps = [_flat(layer, spikes=i > 0, timesteps=timesteps) for i, layer in enumerate(folded.maps)]
        self._sources = dict(folded.sources)
        self._shortcuts = {int(i): _flat(module, spikes=True) for i, module in folded.shortcuts.items()}
        self._feeds = frozenset(folded.sources.values())
        self._readout = _flat(folded.readout, spikes=True, binary=timesteps == 1)

    def _check(self, inputs: Tensor) -> None:
        if tuple(inputs.shape[1:]) != self.input_shape:
            raise UserError("inputs", tuple(inputs.shape), f"must have the shape (batch, *{self.input_shape})")

    def _current(self, layer: int, x: Tensor, held: dict[int, Tensor]) -> Tensor:
        """Return the current of a layer, as :meth:`LayeredNetwork.current` does."""
        current = _run(self._maps[layer], x)
        if layer in self._sources:
            current = current + _run(self._shortcuts[layer], held.pop(self._sources[layer]))
        return current

    def _read_out(self, x: Tensor, batch: int) -> Tensor:
        """Return outputs of spikes ``(T * B, *N)``: the readout is linear, so the mean may be taken before it."""
        if self._timesteps > 1:
            x = x.view(self._timesteps, batch, *x.shape[1:]).mean(0)
        return _run(self._readout, x)


class DeployedNetwork(_Layers):
    """A network as a function, without autograd; see :func:`deploy`.

    Attributes:
        input_shape: shape of one input.
    """

    def __init__(self, folded: LayeredNetwork) -> None:
        super().__init__(folded)
        self._neurons = [self._ready(i, neuron) for i, neuron in enumerate(folded.neurons)]

    def _ready(self, layer: int, neuron: nn.Module) -> _Module:
        """Return a layer of neurons as the quickest function there is: small networks are all overhead."""
        if isinstance(neuron, LIF):
            # Direct encoding: the first layer's current lasts for all timesteps.
            return Scan(neuron, self._timesteps, 1 if layer else self._timesteps)
        return _step if isinstance(neuron, Step) and neuron.threshold is None else neuron.forward

    @torch.inference_mode()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Return outputs ``(B, n)`` of independent inputs ``(B, *input_shape)``.

        Raises:
            UserError: the inputs have another shape.
        """
        self._check(inputs)
        held: dict[int, Tensor] = {}
        x = inputs
        if not self._sources:
            for layer, neuron in zip(self._maps, self._neurons, strict=True):
                for part in layer:
                    x = part(x)
                x = neuron(x)
            return self._read_out(x, len(inputs))
        for i, neuron in enumerate(self._neurons):
            x = neuron(self._current(i, x, held))
            if i in self._feeds:
                held[i] = x
        return self._read_out(x, len(inputs))


class StatefulNetwork(_Layers):
    """A network as a function that takes and returns its membranes, without autograd; see :func:`deploy_stateful`.

    Attributes:
        input_shape: shape of one input.
    """

    def __init__(self, folded: LayeredNetwork, rest: NetworkState) -> None:
        super().__init__(folded)
        self._neurons = list(folded.neurons)
        self._rest = rest

    def initial_state(self, batch: int) -> NetworkState:
        """Return membranes at rest for a batch, to start with."""
        return tuple(LIFState(rest.membrane.repeat_interleave(batch, 0)) for rest in self._rest)

    @torch.no_grad()  # membranes are the caller's, to change them too
    def __call__(
        self, inputs: Tensor, state: NetworkState, starts: Tensor | None = None
    ) -> tuple[Tensor, NetworkState]:
        """Decide once.

        Args:
            inputs: ``(B, *input_shape)``.
            state: membranes before the decision.
            starts: bool ``(B,)``, true where an episode begins: its membranes start at rest.

        Returns:
            Outputs ``(B, n)``, and the membranes after the decision.

        Raises:
            UserError: the inputs have another shape.
        """
        self._check(inputs)
        timesteps, batch = self._timesteps, len(inputs)
        opens = scan_starts(None if starts is None else starts.unsqueeze(0), timesteps)
        held: dict[int, Tensor] = {}
        after: list[LIFState] = []
        x = inputs
        for i, neuron in enumerate(self._neurons):
            current = self._current(i, x, held)
            current = current.reshape(timesteps if i else 1, batch, *current.shape[1:])
            spikes, membrane, _ = neuron(current, state[i], opens, repeat=1 if i else timesteps)
            after.append(membrane)
            x = spikes.flatten(0, 1)
            if i in self._feeds:
                held[i] = x
        return self._read_out(x, batch), tuple(after)


def _run(parts: list[_Module], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x


def _flat(layer: nn.Module, *, spikes: bool, binary: bool = True, timesteps: int = 1) -> list[_Module]:
    """Return the parts of a map in order, its large linear ones reading only active inputs.

    Args:
        layer: the map.
        spikes: it sees the spikes of another layer.
        binary: as they are, and not their means; until a part turns them into something else.
        timesteps: inputs that come with one decision.
    """
    parts = list(layer) if type(layer) is nn.Sequential and is_plain(layer) else [layer]
    flat: list[_Module] = []
    for part in parts:
        run: _Module = part.forward if is_plain(part) else part
        if isinstance(part, (nn.Conv2d, nn.Linear)) and is_plain(part):
            rows = None
            if type(part) is nn.Linear and spikes and part.weight.numel() >= _GATHER_FROM:
                run = sparse = SparseLinear(part, binary, timesteps)
                rows = sparse.rows
            if spikes and part.weight.numel() >= _EVENTS_FROM[part.weight.dim()] and runs_on_events(part):
                run = EventMap(part, run, rows)
            spikes = False
        flat.append(run)
        binary = binary and isinstance(part, nn.Flatten)
    return flat


def deploy(network: LayeredNetwork) -> DeployedNetwork:
    """Return a network as a function ``(B, *input_shape) -> (B, n)``, faster and with equal outputs.

    At T=1 thresholds are folded into the layers (:func:`fold_thresholds`), and no membrane is kept. At any T batch
    norm is folded, nothing for a gradient is kept, and silent inputs of convolutions and large linear layers are
    skipped.

    The outputs are those of ``network`` with fresh membranes, to rounding; where a potential comes within rounding of
    its threshold a spike may differ, and with it what depends on it.

    Args:
        network: any registered network of spiking neurons; it stays as it is, and later changes to it do not reach
            the deployed one.

    Raises:
        UserError: the network has ReLU neurons, a code, or scores spike times; or, at more than one timestep, neurons
            that fire once or an exit margin.
    """
    if network.timesteps == 1:
        return DeployedNetwork(_freeze(fold_thresholds(network)))
    folded = _fold_timesteps(network)
    check_waits(network)
    return DeployedNetwork(_freeze(folded))


def deploy_stateful(network: LayeredNetwork) -> StatefulNetwork:
    """Return a network as a function ``(inputs, state, starts) -> (outputs, state)`` that carries its membranes.

    As :func:`deploy`, for agents that remember: batch norm is folded, nothing for a gradient is kept, and silent inputs
    are skipped; thresholds and leaks stay with their neurons.

    Args:
        network: any registered network of spiking neurons; it stays as it is, and later changes to it do not reach
            the deployed one.

    Raises:
        UserError: the network has ReLU neurons, a code, scores spike times, or has neurons that fire once.
    """
    if network.single_spike:
        raise UserError("single_spike", True, "neurons that fire once carry no membrane from one decision to the next")
    folded = _fold_timesteps(network)
    rest = folded.initial_state(1)
    return StatefulNetwork(_freeze(folded), rest)
