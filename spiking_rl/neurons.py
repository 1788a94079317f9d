"""The leaky integrate-and-fire neuron: one scan over time with explicit state.

    u[t] = leak * u'[t-1] + I[t]        integrate
    s[t] = 1 if u[t] > threshold        fire (strictly above, amplitude 1)
    u'[t] = u[t] - threshold * s[t]     soft reset, in the same step

Nothing here remembers anything between calls: the membrane is passed in and returned.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spiking_rl.errors import UserError
from spiking_rl.surrogate import DEFAULT_GAMMA, fire, surrogate_derivative

MIN_THRESHOLD = 1e-3
"""Floor of a trained threshold; at 0 the surrogate gradient is undefined."""


class LIFState(NamedTuple):
    """What a layer of neurons carries from one call to the next.

    Attributes:
        membrane: potential after reset, shape ``(B, *N)``, in units of the input current.
    """

    membrane: Tensor


class LIFScan(NamedTuple):
    """Result of a scan.

    Attributes:
        spikes: in {0, 1}, shape ``(S, B, *N)``.
        state: membranes after the last timestep.
        potential: membrane potential before reset, ``(S, B, *N)``; None unless traced.
    """

    spikes: Tensor
    state: LIFState
    potential: Tensor | None = None


def _fits(shape: torch.Size, neurons: torch.Size) -> bool:
    """Tell whether a parameter broadcasts against the neurons without enlarging them."""
    if len(shape) > len(neurons):
        return False
    return all(s in (1, n) for s, n in zip(reversed(shape), reversed(neurons), strict=False))


def _check(current: Tensor, state: LIFState | None, leak: Tensor, threshold: Tensor, starts: Tensor | None) -> None:
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
    if starts is not None and (starts.shape != current.shape[:2] or starts.dtype != torch.bool):
        raise ValueError(
            f"starts is {starts.dtype} of shape {tuple(starts.shape)}; it must be torch.bool of shape "
            f"{tuple(current.shape[:2])} (timesteps, batch)"
        )


def _keep_mask(starts: Tensor | None, like: Tensor) -> Tensor | None:
    """Return 0 where an episode starts and 1 elsewhere, shaped to multiply ``(S, B, *N)``."""
    if starts is None:
        return None
    return (~starts).to(like.dtype).reshape(*starts.shape, *([1] * (like.dim() - 2)))


def lif_scan_reference(
    current: Tensor,
    state: LIFState | None,
    leak: Tensor,
    threshold: Tensor,
    starts: Tensor | None = None,
    *,
    gamma: float = DEFAULT_GAMMA,
    trace: bool = False,
) -> LIFScan:
    """Scan LIF neurons over time: the plain loop that defines what :func:`lif_scan` must compute.

    Arguments, result and errors are those of :func:`lif_scan`; autograd differentiates the loop.
    """
    _check(current, state, leak, threshold, starts)
    keep = _keep_mask(starts, current)
    membrane = torch.zeros_like(current[0]) if state is None else state.membrane
    spikes, potentials = [], []
    for t in range(current.shape[0]):
        if keep is not None:
            membrane = membrane * keep[t]
        potential = leak * membrane + current[t]
        spike = fire(potential, threshold, gamma)
        # The reset reaches the threshold and the potential, not the step function (the papers' code).
        membrane = potential - threshold * spike.detach()
        spikes.append(spike)
        potentials.append(potential)
    return LIFScan(torch.stack(spikes), LIFState(membrane), torch.stack(potentials) if trace else None)


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


class _FusedScan(torch.autograd.Function):
    """The same scan with one hand-written backward pass; saves the potentials beside its output."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        membrane: Tensor | None,
        leak: Tensor,
        threshold: Tensor,
        starts: Tensor | None,
        gamma: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        keep = _keep_mask(starts, current)
        potentials = _empty_timesteps(current)
        spikes = torch.empty_like(potentials)
        # Long scans over few neurons are all overhead: one view per timestep, three operations each.
        kept = itertools.repeat(leak) if keep is None else (keep * leak).unbind()
        after = None if membrane is None else torch.empty_like(potentials[0]).copy_(membrane)
        steps = zip(current.unbind(), potentials.unbind(), spikes.unbind(), kept, strict=False)
        for now, potential, spike, retained in steps:
            if after is None:
                potential.copy_(now)
                after = torch.empty_like(potential)
            else:
                torch.addcmul(now, after, retained, out=potential)
            torch.gt(potential, threshold, out=spike)
            torch.addcmul(potential, spike, threshold, value=-1, out=after)
        assert after is not None
        ctx.save_for_backward(potentials, spikes, membrane, leak, threshold, keep)
        ctx.gamma = gamma
        ctx.set_materialize_grads(False)
        return spikes, after, potentials

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_spikes, grad_after, grad_trace = grads
        potentials, spikes, membrane, leak, threshold, keep = ctx.saved_tensors
        # Through firing, all timesteps at once ...
        if grad_spikes is None:
            through_fire = torch.zeros_like(potentials)
        else:
            through_fire = surrogate_derivative(potentials, threshold, ctx.gamma).mul_(grad_spikes)
        # Sums over time, batch and the neurons that share a parameter come first: what is left is small.
        # All at once, too: summing channels-last tensors over time and batch alone is 20 times slower.
        shared = torch.broadcast_shapes(leak.shape, threshold.shape)  # type: ignore[no-untyped-call]
        grad_threshold = -(through_fire * potentials).sum_to_size(shared) / threshold
        grad_potential = through_fire if grad_trace is None else through_fire.add_(grad_trace)
        # ... and backwards through the membrane, the only recurrence.
        carried = grad_after
        if grad_after is not None:
            grad_threshold = grad_threshold - (grad_after * spikes[-1]).sum_to_size(shared)
        retained = None if keep is None else (keep * leak).unbind()
        steps = grad_potential.unbind()
        for t in range(len(steps) - 1, -1, -1):
            if carried is not None:
                steps[t].add_(carried)
            carried = steps[t] * (leak if retained is None else retained[t])
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
        )


def lif_scan(
    current: Tensor,
    state: LIFState | None,
    leak: Tensor,
    threshold: Tensor,
    starts: Tensor | None = None,
    *,
    gamma: float = DEFAULT_GAMMA,
    trace: bool = False,
) -> LIFScan:
    """Scan leaky integrate-and-fire neurons over time (module docstring for the equations).

    Args:
        current: input current ``I = W s + b``, shape ``(S, B, *N)``, S = environment steps times
            timesteps, the timestep being the faster axis.
        state: membranes before the first timestep, ``(B, *N)``; None means at rest (zero).
        leak: membrane retained per timestep, in [0, 1] (1 = no leak); broadcasts against ``N``.
        threshold: firing threshold, > 0, in units of the current; broadcasts against ``N``.
        starts: bool ``(S, B)``, true at the first timestep of an episode: the membrane is zeroed
            before the leak. None means that no episode starts inside.
        gamma: height of the surrogate gradient at threshold.
        trace: also return the potential before reset.

    Returns:
        ``LIFScan(spikes, state, potential)``.

    Raises:
        ValueError: shapes, or the dtype of ``starts``, do not fit; the message names both sides.

    Gradients: ``ds/du`` is the surrogate of :func:`spiking_rl.surrogate.fire`; the reset passes its
    gradient to the threshold and to the potential, not through the step function; full
    back-propagation through time. With one timestep and no state the gradient of the leak is zero.

    Source: DIET-SNN (Rathi, Roy 2020); temporal pruning (Chowdhury, Rathi, Roy 2022).
    """
    _check(current, state, leak, threshold, starts)
    membrane = None if state is None else state.membrane
    spikes, after, potentials = _FusedScan.apply(current, membrane, leak, threshold, starts, gamma)  # type: ignore[no-untyped-call]
    return LIFScan(spikes, LIFState(after), potentials if trace else None)


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
        UserError: threshold or leak out of range.
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
        shape = () if channels is None else (channels, *([1] * spatial_dims))
        self.threshold = nn.Parameter(torch.full(shape, float(threshold)))
        self.leak = nn.Parameter(torch.full(shape, float(leak)))
        self.gamma = gamma

    def forward(
        self, current: Tensor, state: LIFState | None = None, starts: Tensor | None = None, trace: bool = False
    ) -> LIFScan:
        """Scan this layer over ``current`` (S, B, *N); see :func:`lif_scan`."""
        return lif_scan(current, state, self.leak, self.threshold, starts, gamma=self.gamma, trace=trace)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Put the leak back into [0, 1] and the threshold above its floor."""
        self.leak.clamp_(0, 1)
        self.threshold.clamp_(min=MIN_THRESHOLD)

    def extra_repr(self) -> str:
        """Show what ``print(network)`` should show."""
        return f"shape={tuple(self.threshold.shape)}, gamma={self.gamma}"


def clamp_after_step(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Keep every threshold and leak of ``module`` in range after each step of ``optimizer``.

    Registered where the optimiser is built, so that it also holds in training loops that this
    package does not own.
    """
    neurons = [m for m in module.modules() if isinstance(m, LIF)]

    def hook(*_: object) -> None:
        for neuron in neurons:
            neuron.clamp_()

    optimizer.register_step_post_hook(hook)
