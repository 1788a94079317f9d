"""Networks of layers: a linear map, then neurons; run layer by layer over the whole scan time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from spiking_rl.encoding import Encoder, build_encoder, scan_starts
from spiking_rl.errors import UserError
from spiking_rl.event_layers import is_plain, through_events
from spiking_rl.group_norm import GroupNorm
from spiking_rl.neurons import LIF, LIFState, SpikeTimeScore, at_least_float32
from spiking_rl.pruning import MAX_TIMESTEPS
from spiking_rl.rates import firing_rate
from spiking_rl.surrogate import DEFAULT_GAMMA

NetworkState = tuple[LIFState, ...]
"""One state per spiking layer, first layer first."""

Observer = Callable[[str, Tensor, Tensor], None]
"""Called per hidden layer with its name, its output and its membrane potential before reset.

Both are ``(S, B, *N)`` with S = L*T when stateful; stateless decisions all travel in the batch,
``(T, L*B, *N)``. A ReLU layer has S = L and passes its current as the potential.

An observer whose attribute ``potentials`` is False looks at no potentials, and may be given anything in their place: of
several timesteps they are a tensor more per layer.
"""


_GLOBAL_HOOKS = nn.modules.module._global_forward_hooks  # of all modules
_MAKERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, GroupNorm, nn.LayerNorm)


def _is_new(layer: nn.Module) -> bool:
    """Tell whether what a layer returns is a tensor that nobody else holds, neither it nor a hook."""
    while type(layer) is nn.Sequential and layer._modules and is_plain(layer):
        layer = next(reversed(layer._modules.values()))  # what comes last
    return type(layer) in _MAKERS and is_plain(layer) and not _GLOBAL_HOOKS


class LayeredNetwork(nn.Module):
    """Hidden layers of linear map + neurons, and a readout that integrates and does not fire.

    With LIF neurons every decision lasts ``timesteps`` timesteps of direct encoding, and the output
    is the readout's current averaged over them: the scale of logits and Q-values does not change
    when T does (the papers sum; the argmax is the same). With ReLU neurons it is the plain network
    of the same shape, the control.

    A shortcut adds an earlier layer's output to a layer's current, before its neurons:
    ``I_i = maps[i](x_{i-1}) + shortcut(x_j)``.

    Args:
        maps: linear maps of the hidden layers, each module on a flat batch.
        neurons: as many ``LIF`` or ``nn.ReLU`` modules (no mixture).
        readout: the last linear map.
        input_shape: shape of one input.
        timesteps: T >= 1; ignored by a ReLU network.
        shortcuts: by layer index i, the index j < i of the hidden layer whose output it also gets,
            and the module in between (``nn.Identity`` for none). Each layer starts one at most.
        dropout: per hidden layer, the probability in [0, 1) that an output is dropped in training.
            One mask per sample and neuron, the same at all timesteps of a forward pass (DIET-SNN;
            Rathi, Roy 2020): else the spikes of T timesteps would average the dropout away.

    Raises:
        UserError: timesteps or dropout out of range.
        ValueError: maps, neurons and shortcuts do not fit each other.
    """

    def __init__(
        self,
        maps: Sequence[nn.Module],
        neurons: Sequence[nn.Module],
        readout: nn.Module,
        *,
        input_shape: Sequence[int],
        timesteps: int = 1,
        shortcuts: Mapping[int, tuple[int, nn.Module]] | None = None,
        dropout: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not maps or len(maps) != len(neurons):
            raise ValueError(f"{len(maps)} maps and {len(neurons)} neuron layers: one of each per hidden layer")
        self.maps = nn.ModuleList(maps)
        self.neurons = nn.ModuleList(neurons)
        self.readout = readout
        self.input_shape = tuple(input_shape)
        self.spiking = all(isinstance(n, LIF) for n in neurons)
        if not self.spiking and any(isinstance(n, LIF) for n in neurons):
            raise ValueError("neurons mixes LIF and other layers; use one kind")
        self.shortcuts = nn.ModuleDict({str(i): module for i, (_, module) in (shortcuts or {}).items()})
        self.sources = {i: source for i, (source, _) in (shortcuts or {}).items()}
        if any(not 0 <= j < i < len(maps) for i, j in self.sources.items()):
            raise ValueError(f"shortcuts {self.sources} must lead from a hidden layer to a later one")
        self._feeds = frozenset(self.sources.values())
        if len(self._feeds) < len(self.sources):
            raise ValueError(f"shortcuts {self.sources} start twice at one layer")
        self.dropout = [0.0] * len(maps) if dropout is None else [float(p) for p in dropout]
        if len(self.dropout) != len(maps):
            raise ValueError(f"{len(self.dropout)} dropout probabilities for {len(maps)} hidden layers")
        for p in self.dropout:
            if not 0 <= p < 1:
                raise UserError("dropout", p, "a probability must lie in [0, 1)")
        self.encoder: Encoder | None = None
        self.single_spike = False
        self.spike_time: SpikeTimeScore | None = None
        self.exit_margin: float | None = None
        self.on_rates = False
        self._shapes: list[tuple[int, ...]] | None = None
        self._timesteps = 1
        self.set_timesteps(timesteps)

    @property
    def timesteps(self) -> int:
        """Timesteps T per decision (1 for a ReLU network)."""
        return self._timesteps if self.spiking else 1

    def set_timesteps(self, timesteps: int) -> None:
        """Change T; weights, thresholds and leaks stay.

        Raises:
            UserError: timesteps is not a whole number from 1 to :data:`spiking_rl.pruning.MAX_TIMESTEPS`.
        """
        if isinstance(timesteps, bool) or not isinstance(timesteps, Integral) or timesteps < 1:
            raise UserError("timesteps", timesteps, "must be a whole number of at least 1")
        if timesteps > MAX_TIMESTEPS:
            raise UserError("timesteps", timesteps, f"must be at most {MAX_TIMESTEPS}")
        self._timesteps = int(timesteps)

    def set_coding(
        self,
        encoding: str = "direct",
        *,
        single_spike: bool = False,
        kappa: float = 0.0,
        input_zero: float | Sequence[float] = 0.0,
        input_span: float | Sequence[float] = 1.0,
        gamma: float = DEFAULT_GAMMA,
    ) -> None:
        """Choose how inputs are presented, how often neurons fire, and how outputs are scored.

        A ReLU network, which has no timesteps, is left as it is. All but the defaults are for fresh membranes.

        Args:
            encoding: ``direct``, ``hybrid`` or ``poisson`` (:mod:`spiking_rl.encoding`).
            single_spike: let every hidden neuron fire at most once per decision.
            kappa: weight of the outputs' first-spike times in their scores
                (:class:`spiking_rl.neurons.SpikeTimeScore`); 0 leaves them out.
            input_zero: input that the code takes as 0, per channel or for all.
            input_span: distance from it that the code takes as 1, likewise.
            gamma: height of the surrogate gradient of the outputs.

        Raises:
            UserError: an unknown encoding, or a number out of range.
        """
        encoder = build_encoder(encoding, input_zero, input_span)
        score = SpikeTimeScore(kappa, gamma) if kappa else None
        if self.on_rates and (encoder is not None or single_spike or score is not None):
            raise UserError("encoding", encoding, "firing rates know no time; set_rates(False) first")
        for name in ("zero", "span") if encoder is not None else ():
            count = getattr(encoder, name).numel()
            if count not in (1, self.input_shape[0]):
                raise UserError(
                    f"input_{name}", count, f"numbers for {self.input_shape[0]} channels; give one for each"
                )
        if self.spiking:
            self.encoder, self.single_spike, self.spike_time = encoder, single_spike, score
            self.to(next(self.parameters()).device)

    def set_exit_margin(self, margin: float | None) -> None:
        """Decide as soon as the readout is confident, instead of after all T timesteps.

        In evaluation mode and with fresh membranes every decision then stops at the first timestep t at which
        its highest output, as if T were t, is ``margin`` or more above the second highest. An observer sees at
        each timestep the decisions that are still open, ``(1, open, *N)``.

        Args:
            margin: in the units of the outputs, >= 0; None waits for all T timesteps.

        Raises:
            UserError: margin negative or NaN.
        """
        if margin is not None and not margin >= 0:
            raise UserError("margin", margin, "must be 0 or positive")
        self.exit_margin = margin

    def set_rates(self, on: bool) -> None:
        """Let hidden neurons give firing rates in one pass, instead of spikes at every timestep, or spikes again.

        A way to train at a ReLU network's cost (:mod:`spiking_rl.rates`): neurons answer the mean of their current
        with ``k / T``, as if leaks were 1. Observers see rates as one timestep. Batch norm then learns the statistics
        of mean currents; those of spikes vary more and are measured anew by
        :func:`spiking_rl.lowering.measuring_norms`. A ReLU network is left as it is.

        Raises:
            UserError: inputs are coded, neurons fire once, or spike times score: rates know no time.
        """
        if on and not self._plain():
            raise UserError(
                "rates", on, "need direct encoding, neurons that may fire again and kappa 0; see set_coding"
            )
        self.on_rates = on and self.spiking

    @property
    def layer_names(self) -> list[str]:
        """Names of the hidden layers, as observers and tables use them."""
        return [f"layer{i + 1}" for i in range(len(self.maps))]

    @torch.no_grad()
    def neuron_shapes(self) -> list[tuple[int, ...]]:
        """Return the shape ``N`` of each hidden layer, found once by a forward pass on zeros."""
        if self._shapes is not None:
            return self._shapes
        shapes = []
        x = next(self.parameters()).new_zeros(1, *self.input_shape)
        with evaluating(self):
            for layer in self.maps:
                x = layer(x)
                shapes.append(tuple(x.shape[1:]))
        self._shapes = shapes
        return shapes

    def initial_state(self, batch: int) -> NetworkState:
        """Return membranes at rest for a batch, to start a stateful run with."""
        like = next(self.parameters())
        return tuple(
            LIFState(torch.zeros(batch, *shape, dtype=like.dtype, device=like.device))
            for shape in (self.neuron_shapes() if self.spiking else [])
        )

    def forward(
        self,
        inputs: Tensor,
        state: NetworkState | None = None,
        starts: Tensor | None = None,
        observer: Observer | None = None,
    ) -> tuple[Tensor, NetworkState | None]:
        """Run L decisions of a batch.

        Args:
            inputs: ``(L, B, *input_shape)``.
            state: membranes before the first decision, carried through all L decisions (stateful);
                None gives every decision fresh membranes (stateless).
            starts: bool ``(L, B)``, true where a decision opens an episode; only with a state.
            observer: sees every hidden layer's output and potential.

        Returns:
            Outputs ``(L, B, n)`` averaged over the timesteps, and the membranes after the last
            decision (None when stateless).

        Raises:
            ValueError: inputs of another number of axes or without environment steps, or a state that nobody takes.
        """
        if inputs.dim() != len(self.input_shape) + 2:
            raise ValueError(f"inputs have {inputs.dim()} axes; a network takes (L, B, {self._axes()})")
        length = inputs.shape[0]  # asked with len, tensors take as long as a small layer
        if type(length) is int and length == 0:
            raise ValueError("inputs hold no environment steps (L = 0)")
        flat = inputs.squeeze(0) if _is_one(length) else inputs.flatten(0, 1)
        if state is not None and not self.takes_state():
            raise ValueError("a state is carried by spikes under direct encoding only, by neurons that may fire again")
        if self.on_rates:
            return self._flat(flat, length, observer), None
        if self.timesteps == 1 and (state is None or not self.spiking):
            return self._flat(flat, length, observer), state
        if state is None and self.exit_margin is not None and not self.training:
            return _unfold(self._early(flat, self.exit_margin, observer), length), None
        if state is None:
            # Fresh membranes make the decisions independent: they all travel in the batch.
            if self._plain() and not getattr(observer, "potentials", observer is not None):
                return self._flat(flat, length, observer), None
            outputs, _ = self._scan(flat.unsqueeze(0), None, None, observer)
            return _unfold(outputs.squeeze(0), length), None
        return self._scan(inputs, state, starts, observer)

    def takes_state(self) -> bool:
        """Tell whether membranes can be carried from one decision to the next."""
        return not self.on_rates and self._plain()

    def _axes(self) -> str:
        return ", ".join(map(str, self.input_shape))

    def _plain(self) -> bool:
        """Tell whether inputs are presented directly, neurons may fire again, and outputs are mean currents."""
        return self.encoder is None and not self.single_spike and self.spike_time is None

    def _has_events(self) -> bool:
        """Tell whether few outputs of hidden layers are active: spikes, and in training, where more may be, ReLU's."""
        return not torch.compiler.is_compiling() and (self._fires() or torch.is_grad_enabled())

    def _fires(self) -> bool:
        """Tell whether hidden layers give spikes, and no graded outputs."""
        return self.spiking and not self.on_rates

    def current(self, layer: int, x: Tensor, held: dict[int, Tensor]) -> Tensor:
        """Return the current of one hidden layer: its map's, and its shortcut's where it has one.

        Args:
            layer: index i of the layer.
            x: output of the layer before (for i = 0 the input), a flat batch ``(B, *N)``.
            held: flat outputs of the layers that start shortcuts, by index; the one that ends here
                is taken out, so that it can be freed.

        Returns:
            ``(B, *N)`` of this layer.
        """
        through = self.maps[layer]
        has_events = layer and self._has_events()
        current: Tensor = through_events(through, x, spikes=self._fires()) if has_events else through(x)
        if layer in self.sources:
            current = current + self.shortcuts[str(layer)](held.pop(self.sources[layer]))
        return current

    def _drop(self, layer: int, x: Tensor) -> Tensor:
        """Drop outputs ``(S, B, *N)`` in training, the same ones at all timesteps."""
        p = self.dropout[layer]
        if p == 0 or not self.training:
            return x
        return x * nn.functional.dropout(torch.ones_like(x[0]), p)

    def _flat(self, x: Tensor, length: int, observer: Observer | None) -> Tensor:
        """Run decisions with nothing to remember on flat batches: a ReLU network, or fresh membranes.

        The same as :meth:`_scan` without a state; views of every layer, and membranes that nobody asks for, cost as
        much as a small layer.

        Args:
            x: inputs of all decisions, ``(L*B, *input_shape)``.
            length: L.
            observer: of potentials for ReLU and one timestep only, as is every code but direct encoding.
        """
        timesteps, spiking = self.timesteps, self.spiking
        repeat = timesteps  # direct encoding: the first current lasts
        if self.encoder is not None:
            x = self._encode(x, observer)[0]
        if self.on_rates:
            x, timesteps = self._flat_layers(x, length, observer), 1
        elif observer is None and not self.sources and not (self.training and any(self.dropout)):
            # Acting with a batch of one is all overhead: a plain chain of layers is asked nothing on the way, and is
            # looked up where modules keep it.
            acting = spiking and not torch.is_grad_enabled()
            has_events = self._has_events() and x.shape[0] * timesteps > 1  # one frame saves nothing
            sees_events = False
            modules: Any = self._modules
            maps, neurons = modules["maps"], modules["neurons"]
            for layer, neuron in zip(maps._modules.values(), neurons._modules.values(), strict=True):
                x = through_events(layer, x, spikes=spiking) if sees_events else layer(x)
                sees_events = has_events
                if acting and type(neuron) is LIF and _is_new(layer):
                    x = neuron.fresh(x, timesteps, repeat, spare=True)
                else:
                    x = neuron.fresh(x, timesteps, repeat) if spiking else neuron(x)
                repeat = 1
        else:
            x = self._flat_layers(x, length, observer)
        # The readout is linear, so the mean over timesteps may be taken before it: one pass, not T.
        out: Tensor = self.readout(x if timesteps == 1 else _unfold(x, timesteps).mean(0))
        if self.spike_time is not None:
            out = self.spike_time(at_least_float32(out.unsqueeze(0)))
        return _unfold(out, length)

    def _flat_layers(self, x: Tensor, length: int, observer: Observer | None) -> Tensor:
        """Run the hidden layers of :meth:`_flat` with shortcuts, dropout, rates, and an observer."""
        timesteps = repeat = 1 if self.on_rates else self.timesteps
        held: dict[int, Tensor] = {}
        for i, neuron in enumerate(self.neurons):
            current = self.current(i, x, held)
            if not isinstance(neuron, LIF):
                x = neuron(current)
            elif self.on_rates:
                x = firing_rate(current, neuron.threshold, self._timesteps)
            else:
                x = neuron.fresh(current, timesteps, repeat)
            repeat = 1
            if observer is not None:
                # Timesteps of all decisions for spikes, one step per decision for ReLU.
                output = _unfold(x, timesteps if self.spiking else length)
                observer(f"layer{i + 1}", output, current.reshape(output.shape) if timesteps == 1 else output)
            x = self._drop(i, _unfold(x, timesteps)).flatten(0, 1)
            if i in self._feeds:
                held[i] = x
        return x

    def _encode(self, inputs: Tensor, observer: Observer | None) -> Tensor:
        """Return the coded inputs ``(T, B, *I)``; an observer sees their spikes as a layer named ``input``."""
        assert self.encoder is not None
        coded: Tensor = self.encoder(inputs, self._timesteps)
        if observer is not None:
            self._show_input(coded, 0, observer)
        return coded

    def _show_input(self, coded: Tensor, t: int, observer: Observer) -> None:
        """Show the spikes of coded inputs ``(S, B, *I)`` from timestep ``t`` on; analog values are none."""
        assert self.encoder is not None
        spikes = coded.clone()
        spikes[: max(0, self.encoder.analog - t)] = 0
        observer("input", spikes, spikes)

    def spike_times(self, inputs: Tensor) -> Tensor:
        """Return when each output first crosses its threshold, ``(L, B, n)``: 1 to T, or T + 1 for never.

        Args:
            inputs: ``(L, B, *input_shape)``; membranes are fresh.

        Raises:
            ValueError: the network scores no spike times (``kappa`` is 0).
        """
        if self.spike_time is None:
            raise ValueError("only a network with kappa above 0 has output spikes; see set_coding")
        return _unfold(self.spike_time.times(self.currents(inputs)), len(inputs))

    def currents(self, inputs: Tensor) -> Tensor:
        """Return the outputs' currents at each timestep, ``(T, L * B, n)``, of inputs ``(L, B, *input_shape)``.

        Raises:
            ValueError: a ReLU network, which has no timesteps.
        """
        if not self.spiking:
            raise ValueError("only a spiking network has currents at each timestep")
        spikes, _ = self._layers(inputs.flatten(0, 1).unsqueeze(0), None, None, None)
        return at_least_float32(_unfold(self.readout(spikes.flatten(0, 1)), len(spikes)))

    def _early(self, inputs: Tensor, margin: float, observer: Observer | None) -> Tensor:
        """Return outputs ``(B, n)``, each as of the first timestep at which it is clear."""
        coded = None if self.encoder is None else self._encode(inputs, None)
        first = self.current(0, inputs, {}) if coded is None else None
        state: list[LIFState | None] = [None] * len(self.neurons)
        rows = torch.arange(len(inputs), device=inputs.device)  # of the decisions that are still open
        outputs: Tensor | None = None
        currents: list[Tensor] = []
        for t in range(self._timesteps):
            held: dict[int, Tensor] = {}
            x = inputs if coded is None else coded[t][rows]
            if coded is not None and observer is not None:
                self._show_input(x.unsqueeze(0), t, observer)
            for i, neuron in enumerate(self.neurons):
                current = first if i == 0 and first is not None else self.current(i, x, held)
                scan = neuron(current.unsqueeze(0), state[i], None, observer is not None, self.single_spike)
                x, state[i] = scan.spikes[0], scan.state
                if observer is not None:
                    observer(f"layer{i + 1}", scan.spikes, scan.potential)
                if i in self._feeds:
                    held[i] = x
            currents.append(self.readout(x))
            now = torch.stack(currents)
            score = now.mean(0) if self.spike_time is None else self.spike_time(at_least_float32(now))
            outputs = score.new_zeros(len(inputs), score.shape[1]) if outputs is None else outputs
            outputs[rows] = score
            if score.shape[1] < 2:
                continue
            best = score.topk(2, dim=1).values
            unclear = best[:, 0] - best[:, 1] < margin
            rows = rows[unclear]
            if not len(rows):
                break
            currents = [c[unclear] for c in currents]
            first = _rows(first, unclear)
            state = [s if s is None else LIFState(s.membrane[unclear], _rows(s.fired, unclear)) for s in state]
        assert outputs is not None
        return outputs

    def _scan(
        self, inputs: Tensor, state: NetworkState | None, starts: Tensor | None, observer: Observer | None
    ) -> tuple[Tensor, NetworkState | None]:
        length = len(inputs)
        x, after = self._layers(inputs, state, starts, observer)
        if self.spike_time is not None:
            current = _unfold(self.readout(x.flatten(0, 1)), len(x))
            return self.spike_time(at_least_float32(current)).unsqueeze(0), None
        # The readout is linear, so the mean over timesteps may be taken before it: one pass, not T.
        mean = x if self._timesteps == 1 else _unfold(x, length).mean(1)
        out = _unfold(self.readout(mean.flatten(0, 1)), length)
        return out, None if state is None else tuple(after)

    def _layers(
        self, inputs: Tensor, state: NetworkState | None, starts: Tensor | None, observer: Observer | None
    ) -> tuple[Tensor, list[LIFState]]:
        """Return the last hidden layer's spikes ``(S, B, *N)``, and every layer's state."""
        timesteps = self._timesteps
        batch = inputs.shape[1]
        opens = scan_starts(starts, timesteps)
        x = inputs if self.encoder is None else self._encode(inputs.flatten(0, 1), observer)
        after: list[LIFState] = []
        held: dict[int, Tensor] = {}
        for i, neuron in enumerate(self.neurons):
            current = self.current(i, x.flatten(0, 1), held)
            current = current.reshape(len(x), batch, *current.shape[1:])  # (S, B, *N); (L, B, *N) in layer 1
            x, layer_state, potential = neuron(
                current,
                None if state is None else state[i],
                opens,
                trace=observer is not None,
                single_spike=self.single_spike,
                repeat=timesteps if i == 0 and self.encoder is None else 1,  # direct encoding
                carry=state is not None,
            )
            if layer_state is not None:
                after.append(layer_state)
            if observer is not None:
                observer(f"layer{i + 1}", x, potential)
            x = self._drop(i, x)
            if i in self._feeds:
                held[i] = x.flatten(0, 1)
        return x, after


def _rows(tensor: Tensor | None, chosen: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[chosen]


def _is_one(length: int) -> bool:
    """Tell whether there is one; a length that is traced, and so no number, may become another."""
    return type(length) is int and length == 1


def _unfold(folded: Tensor, length: int) -> Tensor:
    """Split the first axis: ``(L*K, ...)`` becomes ``(L, K, ...)``."""
    if _is_one(length):
        return folded.unsqueeze(0)
    return folded.reshape(length, folded.shape[0] // length, *folded.shape[1:])


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode (no dropout, batch norm at rest), and every module back afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def rescale_leaks(network: LayeredNetwork, ratio: float) -> None:
    """Raise every leak to the power ``1 / ratio``: memory lasts as many decisions at ``ratio`` times T.

    A membrane keeps ``leak**T`` of its potential per decision, and ``(leak**(T/T'))**T' = leak**T``.

    Args:
        network: its leaks are changed in place.
        ratio: new T over old T, > 0.
    """
    for neuron in network.neurons:
        if isinstance(neuron, LIF):
            neuron.leak.pow_(1 / ratio)
