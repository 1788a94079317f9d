"""The scan in two passes over memory, one each way, where :mod:`spiking_rl.fused_plan` says that it can be done.

Most of training is less than that, and has a way of its own: :mod:`spiking_rl.fused_fresh`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spiking_rl.fused_plan import Plan, address_of, loop_of, run_loop, sizes_of


class Options(NamedTuple):
    """What a scan is told beside its tensors.

    Attributes:
        plan: what :func:`plan` says of the tensors.
        gamma: height of the surrogate gradient.
        repeat: timesteps that each current lasts.
        carry: return the membranes after the last timestep (else None).
        trace: return the potentials (else None).
        once: neurons fire at most once; from rest and without episode starts only.
    """

    plan: Plan
    gamma: float
    repeat: int
    carry: bool
    trace: bool
    once: bool = False


class Job(NamedTuple):
    """A scan that is to be done; all tensors lie as the plan says.

    Attributes:
        options: what is asked for.
        steps: S.
        leak: one, or one per entry of the first neuron axis.
        threshold: likewise.
        keep: ``(S, B)``, 0 where an episode starts, 1 elsewhere; None: none starts.
        current: ``(S / repeat, B, *N)``.
        before: membranes ``(B, *N)``, None at rest.
    """

    options: Options
    steps: int
    leak: Tensor
    threshold: Tensor
    keep: Tensor | None
    current: Tensor
    before: Tensor | None


Wanted = tuple[Tensor, Tensor | None, Tensor | None]
"""To be filled by the forward pass: spikes, potentials, membranes afterwards."""

Arriving = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Their gradients."""

Leaving = tuple[Tensor, Tensor | None]
"""To be filled by the backward pass: the gradients of the current and of the membranes before."""


class Loops(NamedTuple):
    """Who does a scan: compiled loops on a CPU, or kernels on a GPU.

    Attributes:
        forward: fills what is wanted.
        backward: fills what leaves, and returns the gradients of leak and threshold.
    """

    forward: Callable[[Job, Wanted], None]
    backward: Callable[[Job, Arriving, Leaving], tuple[Tensor, Tensor]]


def _forward(job: Job, wanted: Wanted) -> None:
    addresses = map(address_of, (job.keep, job.current, job.before, *wanted))
    run_loop(loop_of("lif_forward", job.current.dtype), _job_sizes(job), job.leak, job.threshold, *addresses)


def _backward(job: Job, arriving: Arriving, leaving: Leaving) -> tuple[Tensor, Tensor]:
    of_leak, of_threshold = (
        torch.empty_like(parameter, memory_format=torch.contiguous_format) for parameter in (job.leak, job.threshold)
    )
    addresses = map(address_of, (job.current, job.before, *arriving, *leaving, of_leak, of_threshold))
    told = address_of(job.keep), job.options.gamma
    run_loop(loop_of("lif_backward", job.current.dtype), _job_sizes(job), job.leak, job.threshold, *told, *addresses)
    return of_leak, of_threshold


def _job_sizes(job: Job) -> int:
    return sizes_of(job.options.plan, job.steps, job.options.repeat, torch.get_num_threads(), job.options.once)


COMPILED = Loops(_forward, _backward)
"""The loops of ``lif_scan.c``."""

Found = tuple[Tensor, Tensor | None, Tensor | None]
"""Spikes ``(S, B, *N)``, membranes after the last timestep ``(B, *N)``, and potentials ``(S, B, *N)``."""


def fused_scan(
    current: Tensor,
    membrane: Tensor | None,
    leak: Tensor,
    threshold: Tensor,
    keep: Tensor | None,
    options: Options,
    loops: Loops = COMPILED,
) -> Found:
    """Scan without a gradient.

    Args:
        current: ``(S / repeat, B, *N)``.
        membrane: ``(B, *N)``, None at rest.
        leak: one, or one per entry of the first neuron axis.
        threshold: likewise.
        keep: ``(S, B)``, 0 where an episode starts, 1 elsewhere; None: none starts.
        options: the rest.
        loops: who does it.
    """
    plan, stored = options.plan, current.dtype
    current, before = plan.dense(current, stored), plan.dense_step(membrane)
    steps = len(current) * options.repeat
    spikes = plan.empty(steps, current, stored)
    potentials = plan.empty(steps, current) if options.trace else None
    after = plan.empty(1, current).squeeze(0) if options.carry else None
    loops.forward(Job(options, steps, leak, threshold, keep, current, before), (spikes, potentials, after))
    return spikes, after, potentials


class FusedScan(torch.autograd.Function):
    """The same with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        membrane: Tensor | None,
        leak: Tensor,
        threshold: Tensor,
        keep: Tensor | None,
        options: Options,
        loops: Loops = COMPILED,
    ) -> Found:
        """Run :func:`fused_scan`, and keep what the backward pass computes potentials from."""
        ctx.save_for_backward(current, membrane, leak, threshold, keep)
        ctx.options = options, loops, current.dtype
        ctx.set_materialize_grads(False)
        return fused_scan(current, membrane, leak, threshold, keep, options, loops)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of current, membrane, leak and threshold."""
        current, before, leak, threshold, keep = ctx.saved_tensors
        options, loops, stored = ctx.options
        if torch.is_grad_enabled():
            told = options.gamma, options.repeat, options.once
            return *differentiable(current, before, leak, threshold, keep, *told, grads), None, None, None
        plan = options.plan
        # Hooks may have brought back what was saved in another layout or type.
        current, before = plan.dense(current, stored), plan.dense_step(before)
        leak, threshold = leak.float(), threshold.float()
        by_spikes, by_after, by_trace = grads
        arriving = (
            None if by_spikes is None else plan.dense(by_spikes.resolve_neg(), current.dtype),
            None if by_trace is None else plan.dense(by_trace.resolve_neg()),
            plan.dense_step(None if by_after is None else by_after.resolve_neg()),
        )
        of_current = plan.empty(len(current), current, current.dtype)
        of_before = None if before is None else plan.empty(1, current).squeeze(0)
        job = Job(options, len(current) * options.repeat, leak, threshold, keep, current, before)
        sums = loops.backward(job, arriving, (of_current, of_before))
        return of_current, of_before, *sums, None, None, None


def differentiable(
    current: Tensor,
    membrane: Tensor | None,
    leak: Tensor,
    threshold: Tensor,
    keep: Tensor | None,
    gamma: float,
    repeat: int,
    once: bool,
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of :func:`fused_scan`'s current, membrane, leak and threshold, themselves differentiable.

    The loops give numbers without a graph: taken for constants, they would make second derivatives wrong. So the plain
    scan is differentiated, which takes its time.
    """
    from spiking_rl.neurons import LIFState, lif_scan_reference  # which is built on this

    given = (current, membrane, leak, threshold)
    state = None if membrane is None else LIFState(membrane.float())
    starts = None if keep is None else keep == 0
    values = current.float(), state, leak.float(), threshold.float(), starts
    scan = lif_scan_reference(*values, gamma=gamma, repeat=repeat, trace=True, single_spike=once)
    assert scan.state is not None
    outputs = zip((scan.spikes, scan.state.membrane, scan.potential), grads, strict=False)
    asked_of = [(out, grad.float()) for out, grad in outputs if grad is not None]
    if not asked_of:  # nothing arrived
        return tuple(None for _ in given)
    reached, arriving = zip(*asked_of, strict=True)
    asked = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    found = iter(torch.autograd.grad(reached, asked, arriving, create_graph=True, allow_unused=True))
    return tuple(None if tensor is None or not tensor.requires_grad else next(found) for tensor in given)
