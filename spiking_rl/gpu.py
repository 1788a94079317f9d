"""The scan in two Triton kernels, one each way, on a CUDA device; the same loops as ``lif_scan.c`` has for CPUs.

Triton comes with torch's builds for CUDA. Before the kernels are used for the first time they check themselves on the
device at hand against torch's own operations; where they cannot be compiled, or differ, those are used instead.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spiking_rl.compiling import SWITCH
from spiking_rl.fused import Found, Options, Plan, plan_for

try:
    from spiking_rl import gpu_kernels as kernels
except ImportError:  # torch for CPUs comes without Triton
    kernels = None  # type: ignore[assignment]

_TILE = 1024  # neurons of a program
_TINY = 1e-30  # as in lif_scan.c


class _Grid(NamedTuple):
    """How neurons are shared out: tiles of places times channels, and the strides of both."""

    sizes: tuple[int, int, int, int]
    tile: tuple[int, int]
    programs: tuple[int, int]


@functools.lru_cache(1024)
def _grid(plan: Plan) -> _Grid:
    batch, channels = plan.shape[0], plan.shape[1] if len(plan.shape) > 1 else 1
    places = plan.neurons // channels
    last = len(plan.shape) == 4 and plan.strides[1] == 1 and places > 1  # channels-last
    tile_c = min(_power_of_two(channels), _TILE if places == 1 else 32)
    tile_p = min(_power_of_two(places), _TILE // tile_c)
    strides = (1, channels) if last else (places, 1)
    programs = (batch * -(-places // tile_p), -(-channels // tile_c))
    return _Grid((channels, places, *strides), (tile_p, tile_c), programs)


def _power_of_two(least: int) -> int:
    return 1 << math.ceil(math.log2(least))


def triton_plan(current: Tensor, leak: Tensor, threshold: Tensor) -> Plan | None:
    """Return how a scan over ``current`` (S, B, *N) goes in one kernel, or None where it does not."""
    if type(current) is not Tensor or (not _interpreted() and not current.is_cuda) or torch.compiler.is_compiling():
        return None
    return plan_for(current, leak, threshold) if _usable(current.device) else None


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on a CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _usable(device: torch.device) -> bool:
    """Check the kernels once per device, against torch's operations."""
    if kernels is None or os.environ.get(SWITCH) == "0":
        return False
    try:
        return _agrees(device)
    except Exception as error:  # whatever a compiler, a driver or a device can come up with: torch does without
        warnings.warn(f"Triton's kernels cannot be used on {device}, torch's operations are: {error}", stacklevel=2)
        return False


def _agrees(device: torch.device) -> bool:
    draw = torch.Generator().manual_seed(0)
    current = torch.rand(4, 3, 40, generator=draw).to(device)
    leak, threshold = torch.full((), 0.5, device=device), torch.full((40,), 0.75, device=device)
    plan = plan_for(current, leak, threshold)
    assert plan is not None, "plain layouts always have one"
    spikes, _, _ = triton_scan(current, None, leak, threshold, None, Options(plan, 0.3, 1, False, False))
    membrane = torch.zeros_like(current[0])
    for now, spike in zip(current, spikes, strict=True):
        membrane = leak * membrane + now
        clear = (membrane - threshold).abs() > 1e-5
        if not torch.equal((membrane > threshold).float()[clear], spike[clear]):
            return False
        membrane = membrane - threshold * spike
    return True


def triton_scan(
    current: Tensor,
    membrane: Tensor | None,
    leak: Tensor,
    threshold: Tensor,
    keep: Tensor | None,
    options: Options,
) -> Found:
    """Scan without a gradient; arguments and result are those of :func:`spiking_rl.fused.fused_scan`."""
    plan, _, repeat, carry, trace, once = options
    stored, device = current.dtype, current.device
    current = plan.dense(current, stored)
    before = None if membrane is None else plan.dense_step(membrane)
    steps = len(current) * repeat
    spikes = plan.empty(steps, stored, device)
    potentials = plan.empty(steps, device=device) if trace else None
    after = plan.empty(1, device=device).squeeze(0) if carry else None
    grid = _grid(plan)
    kernels.forward[grid.programs](
        current,
        before,
        keep,
        leak.contiguous(),
        threshold.contiguous(),
        spikes,
        potentials,
        after,
        steps,
        repeat,
        plan.shape[0],
        *grid.sizes,
        LEAKS=int(plan.leaks > 1),
        THRESHOLDS=int(plan.thresholds > 1),
        BEFORE=before is not None,
        KEEP=keep is not None,
        TRACE=trace,
        CARRY=carry,
        ONCE=once,
        TILE_P=grid.tile[0],
        TILE_C=grid.tile[1],
    )
    return spikes, after, potentials


class TritonScan(torch.autograd.Function):
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
    ) -> Found:
        """Run :func:`triton_scan`, and keep what the backward pass computes potentials from."""
        current = options.plan.dense(current, current.dtype)
        before = None if membrane is None else options.plan.dense_step(membrane)
        ctx.save_for_backward(current, before, leak, threshold, keep)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return triton_scan(current, before, leak, threshold, keep, options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of current, membrane, leak and threshold."""
        current, before, leak, threshold, keep = ctx.saved_tensors
        plan, gamma, repeat, _, _, once = ctx.options
        device, steps = current.device, len(current) * repeat
        by_spikes, by_after, by_trace = grads
        by_spikes = None if by_spikes is None else plan.dense(by_spikes, current.dtype)
        by_trace = None if by_trace is None else plan.dense(by_trace)
        by_after = None if by_after is None else plan.dense_step(by_after)
        of_current = plan.empty(len(current), current.dtype, device)
        of_before = None if before is None else plan.empty(1, device=device).squeeze(0)
        grid = _grid(plan)
        channels = grid.sizes[0]
        of_leak, of_threshold = torch.empty(2, grid.programs[0], channels, device=device).unbind()  # a row per program
        kernels.backward[grid.programs](
            current,
            before,
            keep,
            leak.contiguous(),
            threshold.contiguous(),
            gamma,
            by_spikes,
            by_trace,
            by_after,
            plan.empty(steps, device=device),
            of_current,
            of_before,
            of_leak,
            of_threshold,
            steps,
            repeat,
            plan.shape[0],
            *grid.sizes,
            TINY=_TINY,
            LEAKS=int(plan.leaks > 1),
            THRESHOLDS=int(plan.thresholds > 1),
            BEFORE=before is not None,
            KEEP=keep is not None,
            BY_SPIKES=by_spikes is not None,
            BY_TRACE=by_trace is not None,
            BY_AFTER=by_after is not None,
            ONCE=once,
            TILE_P=grid.tile[0],
            TILE_C=grid.tile[1],
        )
        sums = [
            (part.sum(0) if many > 1 else part.sum()).reshape(parameter.shape)
            for part, many, parameter in ((of_leak, plan.leaks, leak), (of_threshold, plan.thresholds, threshold))
        ]
        return of_current, of_before, *sums, None, None


def triton_fire(potential: Tensor, threshold: Tensor, gamma: float) -> Tensor | None:
    """Return the spikes of potentials ``(B, *N)`` at one fresh timestep; None where it does not go in one kernel."""
    current = potential.unsqueeze(0)
    plan = triton_plan(current, threshold, threshold) if potential.dim() else None
    if plan is None:
        return None
    unused = threshold.detach()  # a membrane at rest leaks nothing
    options = Options(plan, gamma, 1, False, False)
    spikes: Tensor = TritonScan.apply(current, None, unused, threshold, None, options)[0]  # type: ignore[no-untyped-call]
    return spikes.squeeze(0)
