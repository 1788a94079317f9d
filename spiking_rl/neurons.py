"""The leaky integrate-and-fire neuron: one scan over time with explicit state.

    u[t] = leak * u'[t-1] + I[t]        integrate
    s[t] = 1 if u[t] > threshold        fire (strictly above, amplitude 1)
    u'[t] = u[t] - threshold * s[t]     soft reset, in the same step

Nothing here remembers anything between calls: the membrane is passed in and returned.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spiking_rl.encoding import direct
from spiking_rl.errors import UserError
from spiking_rl.event_layers import is_plain
from spiking_rl.fused import COMPILED, FusedScan, Loops, Options, fused_scan
from spiking_rl.fused_fresh import Ways, fused_fresh
from spiking_rl.fused_plan import Plan, plan
from spiking_rl.surrogate import DEFAULT_GAMMA, fire, fire_reference, surrogate_derivative
from spiking_rl.watching import is_exporting, is_watched

MIN_THRESHOLD = 1e-3
"""Floor of a trained threshold; at 0 the surrogate gradient is undefined."""


class LIFState(NamedTuple):
    """What a layer of neurons carries from one call to the next.

    Attributes:
        membrane: potential after reset, shape ``(B, *N)``, in units of the input current.
        fired: 1 where a neuron has spent the one spike of its decision, else 0; None but for neurons that fire at
            most once.
    """

    membrane: Tensor
    fired: Tensor | None = None


class LIFScan(NamedTuple):
    """Result of a scan.

    Attributes:
        spikes: in {0, 1}, shape ``(S, B, *N)``.
        state: membranes after the last timestep; None if they were not to be carried on.
        potential: membrane potential before reset, ``(S, B, *N)``; None unless traced.
    """

    spikes: Tensor
    state: LIFState | None
    potential: Tensor | None = None


def _fits(shape: torch.Size, neurons: torch.Size) -> bool:
    """Tell whether a parameter broadcasts against the neurons without enlarging them."""
    if len(shape) > len(neurons):
        return False
    return all(s in (1, n) for s, n in zip(reversed(shape), reversed(neurons), strict=False))


def _check(
    current: Tensor, state: LIFState | None, leak: Tensor, threshold: Tensor, starts: Tensor | None, repeat: int
) -> None:
    if not current.is_floating_point():
        raise ValueError(f"current is {current.dtype}; membranes are real numbers, so make it floating point: .float()")
    if current.dim() < 2 or current.shape[0] < 1:
        raise ValueError(f"current has shape {tuple(current.shape)}; lif_scan takes (S, B, *N) with S >= 1 timesteps")
    for name, parameter in (("leak", leak), ("threshold", threshold)):
        if parameter.dim() and not _fits(parameter.shape, current.shape[2:]):
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}, but current of shape {tuple(current.shape)} "
                f"has neurons of shape {tuple(current.shape[2:])}; it must broadcast against those"
            )
    if state is not None and state.membrane.shape != current.shape[1:]:
        raise ValueError(
            f"state.membrane has shape {tuple(state.membrane.shape)}, but current of shape "
            f"{tuple(current.shape)} needs {tuple(current.shape[1:])}"
        )
    for name, tensor in (("state.membrane", None if state is None else state.membrane), ("starts", starts)):
        if tensor is not None and tensor.device != current.device:
            raise ValueError(f"{name} is on {tensor.device}, current on {current.device}; move one to the other's")
    if repeat < 1:
        raise ValueError(f"repeat is {repeat}; each current lasts at least one timestep")
    steps = (len(current) * repeat, current.shape[1])
    if starts is not None and (starts.shape != steps or starts.dtype != torch.bool):
        raise ValueError(
            f"starts is {starts.dtype} of shape {tuple(starts.shape)}; it must be torch.bool of shape "
            f"{steps} (timesteps, batch)"
        )


def _keep_mask(starts: Tensor | None, like: Tensor) -> Tensor | None:
    """Return 0 where an episode starts and 1 elsewhere, shaped to multiply ``(S, B, *N)``."""
    if starts is None:
        return None
    return (~starts).to(like.dtype).reshape(*starts.shape, *([1] * (like.dim() - 2)))


def lif_scan_reference(
    current: Tensor,
    state: LIFState | None,
    leak: Tensor | float,
    threshold: Tensor | float,
    starts: Tensor | None = None,
    *,
    gamma: float = DEFAULT_GAMMA,
    repeat: int = 1,
    carry: bool = True,
    trace: bool = False,
    single_spike: bool = False,
) -> LIFScan:
    """Scan LIF neurons over time: the plain loop that defines what :func:`lif_scan` must compute.

    Arguments, result and errors are those of :func:`lif_scan`; autograd differentiates the loop.
    """
    leak, threshold = _as_tensor("leak", leak, current), _as_tensor("threshold", threshold, current)
    _check(current, state, leak, threshold, starts, repeat)
    stored = current.dtype
    current, state = direct(at_least_float32(current), repeat), _wide_state(state)
    keep = _keep_mask(starts, current)
    membrane = torch.zeros_like(current[0]) if state is None else state.membrane
    fired = torch.zeros_like(current[0]) if state is None or state.fired is None else state.fired
    spikes, potentials = [], []
    for t in range(current.shape[0]):
        if keep is not None:
            membrane = membrane * keep[t]
            fired = fired * keep[t]
        potential = leak * membrane + current[t]
        spike = fire_reference(potential, threshold, gamma)
        if single_spike:
            spike = spike * (1 - fired)
            fired = fired + spike.detach()
        # The reset reaches the threshold and the potential, not the step function (the papers' code).
        membrane = potential - threshold * spike.detach()
        spikes.append(spike)
        potentials.append(potential)
    after = LIFState(membrane, fired if single_spike else None)
    return LIFScan(torch.stack(spikes).to(stored), after if carry else None, torch.stack(potentials) if trace else None)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return halves in 32 bits: sums over time, as membranes are, are kept in as many, whoever adds up."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _as_tensor(name: str, parameter: Tensor | float, current: Tensor) -> Tensor:
    """Return a leak or threshold as what a network would have: no half, where the currents are halves."""
    if isinstance(parameter, Tensor):  # whose values are not looked at: on a GPU that would wait for it
        return parameter
    if name == "leak" and not 0 <= parameter <= 1:
        raise UserError(name, parameter, "must lie in [0, 1]")
    if name == "threshold" and not parameter > 0:
        raise UserError(name, parameter, "must be greater than 0")
    wide = torch.promote_types(current.dtype, torch.float32)
    return torch.tensor(parameter, dtype=wide, device=current.device)


def _wide_state(state: LIFState | None) -> LIFState | None:
    if state is None:
        return None
    return LIFState(at_least_float32(state.membrane), None if state.fired is None else at_least_float32(state.fired))


def _empty_timesteps(current: Tensor) -> Tensor:
    """Return an empty tensor shaped as ``current``, every timestep in the memory format of the first.

    ``current`` may be one timestep repeated as a view. Channels last must survive that: the next
    convolution would convert each time.
    """
    if torch.compiler.is_compiling():  # which writes into nothing but plain layouts
        return torch.empty(current.shape, dtype=current.dtype, device=current.device)
    first = torch.empty_like(current[0])
    strides = (first.numel(), *first.stride())
    return torch.empty_strided(current.shape, strides, dtype=first.dtype, device=first.device)


class _LoopedScan(torch.autograd.Function):
    """The same scan with one hand-written backward pass, where :mod:`spiking_rl.fused` cannot do it."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        membrane: Tensor | None,
        leak: Tensor,
        threshold: Tensor,
        starts: Tensor | None,
        gamma: float,
        fired: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Scan; ``fired`` is the mask of neurons that fire at most once, None for those that may fire again."""
        keep = _keep_mask(starts, current)
        potentials = _empty_timesteps(current)
        spikes = torch.empty_like(potentials)
        # Long scans over few neurons are all overhead: one view per timestep, three operations each.
        kept = itertools.repeat(leak) if keep is None else (keep * leak).unbind()
        after = None if membrane is None else torch.empty_like(potentials[0]).copy_(membrane)
        spent = None if fired is None else torch.empty_like(potentials[0]).copy_(fired)
        free: list[Tensor] = []  # per timestep, 1 where a neuron has not fired yet
        steps = zip(current.unbind(), potentials.unbind(), spikes.unbind(), kept, strict=False)
        for now, potential, spike, retained in steps:
            if after is None:
                potential.copy_(now)
                after = torch.empty_like(potential)
            else:
                torch.addcmul(now, after, retained, out=potential)
            torch.gt(potential, threshold, out=spike)
            if spent is not None:
                if keep is not None:
                    spent.mul_(keep[len(free)])
                free.append(1 - spent)
                spike.mul_(free[-1])
                spent.add_(spike)
            torch.addcmul(potential, spike, threshold, value=-1, out=after)
        assert after is not None
        may_fire = torch.stack(free) if free else None
        ctx.save_for_backward(potentials, spikes, membrane, leak, threshold, keep, may_fire)
        ctx.gamma = gamma
        ctx.set_materialize_grads(False)
        if spent is not None:
            ctx.mark_non_differentiable(spent)
        return spikes, after, potentials, spent

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_spikes, grad_after, grad_trace, _ = grads
        potentials, spikes, membrane, leak, threshold, keep, may_fire = ctx.saved_tensors
        spikes = spikes.detach()  # no gradient passes through the step function of a reset, nor does a second one
        # Through firing, all timesteps at once ...
        if grad_spikes is None:
            through_fire = torch.zeros_like(potentials)
        else:
            through_fire = surrogate_derivative(potentials, threshold, ctx.gamma).mul_(grad_spikes)
            if may_fire is not None:
                through_fire.mul_(may_fire)
        # Sums over time, batch and the neurons that share a parameter come first: what is left is small.
        # All at once, too: summing channels-last tensors over time and batch alone is 20 times slower.
        shared = torch.broadcast_shapes(leak.shape, threshold.shape)  # type: ignore[no-untyped-call]
        grad_threshold = -(through_fire * potentials).sum_to_size(shared) / threshold
        differentiable = torch.is_grad_enabled()  # what is written over cannot be differentiated once more
        grad_potential = through_fire
        if grad_trace is not None:
            grad_potential = through_fire + grad_trace if differentiable else through_fire.add_(grad_trace)
        # ... and backwards through the membrane, the only recurrence.
        carried = grad_after
        if grad_after is not None:
            grad_threshold = grad_threshold - (grad_after * spikes[-1]).sum_to_size(shared)
        retained = None if keep is None else (keep * leak).unbind()
        steps = list(grad_potential.unbind())
        for t in range(len(steps) - 1, -1, -1):
            if carried is not None:
                steps[t] = steps[t] + carried if differentiable else steps[t].add_(carried)
            carried = steps[t] * (leak if retained is None else retained[t])
        if differentiable:
            grad_potential = torch.stack(steps)
        # u[t] = leak * (u[t-1] - threshold * s[t-1]) + I[t]
        later = grad_potential[1:] if keep is None else grad_potential[1:] * keep[1:]
        by_spike = (later * spikes[:-1]).sum_to_size(shared)
        grad_leak = (later * potentials[:-1]).sum_to_size(shared) - threshold * by_spike
        grad_threshold = grad_threshold - leak * by_spike
        grad_membrane = None
        if membrane is not None:
            first = grad_potential[0] if keep is None else grad_potential[0] * keep[0]
            grad_leak = grad_leak + (first * membrane).sum_to_size(shared)
            grad_membrane = carried
        return (
            grad_potential,
            grad_membrane,
            grad_leak.sum_to_size(leak.shape),
            grad_threshold.sum_to_size(threshold.shape),
            None,
            None,
            None,
        )


def _on_gpu(current: Tensor, leak: Tensor, threshold: Tensor) -> tuple[Plan | None, Loops]:
    """Return how the scan goes in one kernel on a GPU, None where it does not, and the kernels."""
    from spiking_rl.gpu import KERNELS, triton_plan  # what CPUs need not load

    return triton_plan(current, leak, threshold), KERNELS


def lif_scan(
    current: Tensor,
    state: LIFState | None,
    leak: Tensor | float,
    threshold: Tensor | float,
    starts: Tensor | None = None,
    *,
    gamma: float = DEFAULT_GAMMA,
    repeat: int = 1,
    carry: bool = True,
    trace: bool = False,
    single_spike: bool = False,
) -> LIFScan:
    """Scan leaky integrate-and-fire neurons over time (module docstring for the equations).

    Args:
        current: input current ``I = W s + b``, shape ``(S / repeat, B, *N)``, S = environment steps times
            timesteps, the timestep being the faster axis.
        state: membranes before the first timestep, ``(B, *N)``; None means at rest (zero).
        leak: membrane retained per timestep, in [0, 1] (1 = no leak); a number, or broadcasts against ``N``.
        threshold: firing threshold, > 0, in units of the current; likewise.
        starts: bool ``(S, B)``, true at the first timestep of an episode: the membrane is zeroed
            before the leak. None means that no episode starts inside.
        gamma: height of the surrogate gradient at threshold.
        repeat: timesteps that each current lasts: T in the first layer under direct encoding
            (:func:`spiking_rl.encoding.direct`), whose current is the same at every timestep of a decision.
        carry: return the membranes after the last timestep; they cost a little, and fresh decisions drop them.
        trace: also return the potential before reset.
        single_spike: let every neuron fire at most once in this call, or not at all where ``state.fired`` says that
            it has; a start clears that. The mask is a constant to the gradient: a neuron that has fired gets none
            through firing.

    Returns:
        ``LIFScan(spikes, state, potential)``; the state has ``fired`` with ``single_spike``.

    Raises:
        ValueError: shapes, or the dtype of ``starts``, do not fit; the message names both sides.
        UserError: a leak or threshold out of range that is given as a number; of tensors the values are not looked at.

    Gradients: ``ds/du`` is the surrogate of :func:`spiking_rl.surrogate.fire`; the reset passes its
    gradient to the threshold and to the potential, not through the step function; full
    back-propagation through time; the compiled loops take a gradient below 1e-30 for 0. With one
    timestep and no state the gradient of the leak is zero.

    Source: DIET-SNN (Rathi, Roy 2020); temporal pruning (Chowdhury, Rathi, Roy 2022); firing once: our reading of
    Datta, Kundu, Beerel 2021.
    """
    leak, threshold = _as_tensor("leak", leak, current), _as_tensor("threshold", threshold, current)
    membrane = None if state is None else state.membrane
    way: Plan | None = None
    loops: Loops = COMPILED
    if current.dim() > 1 and len(current) and not (single_spike and (state is not None or starts is not None)):
        way = plan(current, leak, threshold)
        if way is None and not current.is_cpu:
            way, loops = _on_gpu(current, leak, threshold)
    if way is None or repeat != 1 or state is not None or starts is not None:  # else the plan has found that all fits
        _check(current, state, leak, threshold, starts, repeat)
    if way is not None:
        keep = None if starts is None else (~starts).float().contiguous()
        options = Options(way, gamma, repeat, carry, trace, single_spike)
        if torch.is_grad_enabled():
            found = FusedScan.apply(current, membrane, leak, threshold, keep, options, loops)  # type: ignore[no-untyped-call]
        else:
            found = fused_scan(current, membrane, leak, threshold, keep, options, loops)
        spikes, after, potentials = found
        fired = spikes.detach().sum(0) if carry and single_spike else None
        return LIFScan(spikes, LIFState(after, fired) if carry else None, potentials)
    # What an export writes down must not be written over; the compiler cannot look through the other question.
    if is_exporting() if torch.compiler.is_compiling() else is_watched():
        asked: dict[str, Any] = {"repeat": repeat, "carry": carry, "trace": trace, "single_spike": single_spike}
        return lif_scan_reference(current, state, leak, threshold, starts, gamma=gamma, **asked)
    stored = current.dtype
    current, state = direct(at_least_float32(current), repeat), _wide_state(state)
    membrane = None if state is None else state.membrane
    spent = None
    if single_spike:
        spent = torch.zeros_like(current[0]) if state is None or state.fired is None else state.fired
    spikes, after, potentials, fired = _LoopedScan.apply(current, membrane, leak, threshold, starts, gamma, spent)  # type: ignore[no-untyped-call]
    return LIFScan(spikes.to(stored), LIFState(after, fired) if carry else None, potentials if trace else None)


class LIF(nn.Module):
    """A layer of LIF neurons with trainable threshold and leak.

    Learnable parameters: ``threshold`` and ``leak``, one scalar each (the papers' form), or one per
    channel, shaped ``(C, 1, ...)`` to broadcast against ``(B, C, ...)``.

    Args:
        channels: None for one scalar per layer, else the size C of the first neuron axis.
        spatial_dims: axes behind the channel axis (2 for a convolution).
        threshold: initial threshold, > 0.
        leak: initial leak in [0, 1]; 1 is where the papers start.
        gamma: height of the surrogate gradient.

    Raises:
        UserError: threshold, leak or gamma out of range.
    """

    def __init__(
        self,
        channels: int | None = None,
        spatial_dims: int = 0,
        *,
        threshold: float = 0.5,
        leak: float = 1.0,
        gamma: float = DEFAULT_GAMMA,
    ) -> None:
        super().__init__()
        if not threshold >= MIN_THRESHOLD:
            raise UserError("threshold", threshold, f"must be at least {MIN_THRESHOLD}")
        if not 0 <= leak <= 1:
            raise UserError("leak", leak, "must lie in [0, 1]")
        if not 0 < gamma < math.inf:
            raise UserError("gamma", gamma, "must be positive and finite")
        shape = () if channels is None else (channels, *([1] * spatial_dims))
        self.threshold = nn.Parameter(torch.full(shape, float(threshold)))
        self.leak = nn.Parameter(torch.full(shape, float(leak)))
        self.gamma = gamma
        self._ways = Ways()

    def forward(
        self,
        current: Tensor,
        state: LIFState | None = None,
        starts: Tensor | None = None,
        trace: bool = False,
        single_spike: bool = False,
        repeat: int = 1,
        carry: bool = True,
    ) -> LIFScan:
        """Scan this layer over ``current`` (S, B, *N); see :func:`lif_scan`."""
        return lif_scan(
            current,
            state,
            self.leak,
            self.threshold,
            starts,
            gamma=self.gamma,
            repeat=repeat,
            carry=carry,
            trace=trace,
            single_spike=single_spike,
        )

    def is_own(self) -> bool:
        """Tell whether this layer does what :class:`LIF` does: no subclass scans otherwise, and nobody listens."""
        return type(self).forward is LIF.forward and is_plain(self)

    def fresh(self, current: Tensor, timesteps: int, repeat: int = 1, *, spare: bool = False) -> Tensor:
        """Scan this layer from rest over a flat batch, for its spikes alone.

        Args:
            current: ``(T / repeat * B, *N)``, timestep by timestep.
            timesteps: T.
            repeat: timesteps that each current lasts: 1, or T.
            spare: nobody needs the current any more: without a gradient, spikes may take its place in memory.

        Returns:
            Spikes ``(T * B, *N)``: those of :func:`lif_scan`, which this is a shorter way to.

        Raises:
            ValueError: repeat is neither.
        """
        parameters = self._parameters  # asking the module for them takes as long as a small layer
        leak, threshold = parameters.get("leak"), parameters.get("threshold")
        if leak is None or threshold is None:  # somebody computes them
            leak, threshold = self.leak, self.threshold
        if not self.is_own():
            steps = current.reshape(timesteps // repeat, len(current) * repeat // timesteps, *current.shape[1:])
            return self(steps, repeat=repeat, carry=False).spikes.flatten(0, 1)  # type: ignore[no-any-return]
        if timesteps == repeat == 1 and not torch.is_grad_enabled():
            if spare and current.dtype is torch.float32:
                return current.gt_(threshold)  # one decision of a small network is all overhead
            return fire(current, threshold, self.gamma)
        if repeat not in (1, timesteps):
            raise ValueError(f"repeat is {repeat}; each current lasts 1 timestep, or all {timesteps}")
        spikes = fused_fresh(current, leak, threshold, self.gamma, timesteps, repeat, spare=spare, ways=self._ways)
        if spikes is None and timesteps == 1:
            spikes = fire(current, threshold, self.gamma)
        if spikes is None:
            steps = current.reshape(timesteps // repeat, len(current) * repeat // timesteps, *current.shape[1:])
            scan = lif_scan(steps, None, leak, threshold, gamma=self.gamma, repeat=repeat, carry=False)
            spikes = scan.spikes.flatten(0, 1)
        return spikes

    @torch.no_grad()
    def is_in_range(self) -> bool:
        """Tell whether :meth:`clamp_` would change nothing; a parameter that is no number is out of range."""
        leak, threshold = self.leak, self.threshold
        return bool((leak >= 0).all() & (leak <= 1).all() & (threshold >= MIN_THRESHOLD).all())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Put the leak back into [0, 1] and the threshold above its floor."""
        self.leak.clamp_(0, 1)
        self.threshold.clamp_(min=MIN_THRESHOLD)

    def extra_repr(self) -> str:
        """Show what ``print(network)`` should show."""
        return f"shape={tuple(self.threshold.shape)}, gamma={self.gamma}"


class SpikeTimeScore(nn.Module):
    """Score outputs by their membrane potential and by how early it crosses a threshold.

        score_i = (U_i(T) + kappa * (T + 1 - t_i)) / T

    U_i(t) is the sum of the output's current up to timestep t, without reset; t_i is the first t with U_i(t) above
    the threshold, T + 1 where there is none. Divided by T the score keeps its scale when T drops, and with
    kappa = 0 it is the mean current of every other network here. The gradient reaches t_i through the surrogate at
    every timestep at which the output had not fired before.

    Learnable parameter: ``threshold``, one for all outputs. This is our reading of the loss "on spike time and
    membrane potential" of Datta, Kundu, Beerel 2021: cross-entropy of these scores.

    Args:
        kappa: weight of being early, >= 0.
        gamma: height of the surrogate gradient.

    Raises:
        UserError: kappa negative or not finite.
    """

    def __init__(self, kappa: float, gamma: float = DEFAULT_GAMMA) -> None:
        super().__init__()
        if not 0 <= kappa < float("inf"):
            raise UserError("kappa", kappa, "must be 0 or positive, and finite")
        self.kappa = kappa
        self.gamma = gamma
        self.threshold = nn.Parameter(torch.ones(()))

    def first_spikes(self, current: Tensor) -> tuple[Tensor, Tensor]:
        """Return the spikes of outputs that fire once, and the potentials, each ``(T, B, n)``, of a current."""
        potential = current.cumsum(0)
        once = []
        silent = torch.ones_like(current[0])
        for spike in fire(potential, self.threshold, self.gamma).unbind():
            once.append(spike * silent)
            silent = silent * (1 - spike.detach())
        return torch.stack(once), potential

    def times(self, current: Tensor) -> Tensor:
        """Return t_i ``(B, n)`` of a current ``(T, B, n)``: from 1 to T, and T + 1 where an output stays silent."""
        return len(current) + 1 - self._earliness(self.first_spikes(current)[0])

    def forward(self, current: Tensor) -> Tensor:
        """Return scores ``(B, n)`` of the outputs' current ``(T, B, n)``."""
        spikes, potential = self.first_spikes(current)
        return (potential[-1] + self.kappa * self._earliness(spikes)) / len(current)

    @staticmethod
    def _earliness(spikes: Tensor) -> Tensor:
        """Return ``T + 1 - t_i``."""
        left = torch.arange(len(spikes), 0, -1, dtype=spikes.dtype, device=spikes.device)
        return (spikes * left.reshape(-1, *[1] * (spikes.dim() - 1))).sum(0)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Put the threshold above its floor."""
        self.threshold.clamp_(min=MIN_THRESHOLD)


def clamp_after_step(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Keep every threshold and leak of ``module`` in range after each step of ``optimizer``.

    Registered where the optimiser is built, so that it also holds in training loops that this
    package does not own.
    """
    neurons = [m for m in module.modules() if isinstance(m, (LIF, SpikeTimeScore))]

    def hook(*_: object) -> None:
        for neuron in neurons:
            neuron.clamp_()

    optimizer.register_step_post_hook(hook)
