"""The scan in two Triton kernels, one each way, on a CUDA device; the same loops as ``lif_scan.c`` has for CPUs.

Triton comes with torch's builds for CUDA. Before the kernels are used for the first time they check themselves on the
device at hand against torch's own operations; where they cannot be compiled, or differ, those are used instead.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from spiking_rl.compiling import SWITCH
from spiking_rl.fused import Arriving, FusedScan, Job, Leaving, Loops, Options, Wanted
from spiking_rl.fused_plan import Plan, plan_for
from spiking_rl.neurons import lif_scan_reference

try:
    from spiking_rl import gpu_kernels as kernels
except ImportError:  # torch for CPUs comes without Triton
    kernels = None  # type: ignore[assignment]

_TILE = 1024  # neurons of a program
_TINY = 1e-30  # as in lif_scan.c
_GAMMA = 0.3  # of the surrogate gradient, in the check


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
    if not leak.device == threshold.device == current.device:  # torch takes single numbers from the CPU
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
    """Compare spikes and gradients of both kernels; of one sample too, for which Triton compiles others."""
    with torch.inference_mode(False), torch.enable_grad():  # whatever the first scan is made in
        return all(_agrees_on(device, batch) for batch in (3, 1))


def _agrees_on(device: torch.device, batch: int) -> bool:
    draw = torch.Generator().manual_seed(0)
    current, weights = (torch.rand(4, batch, 40, generator=draw).to(device) for _ in range(2))
    leak, threshold = torch.full((), 0.5, device=device), torch.full((40,), 0.75, device=device)
    plan = plan_for(current, leak, threshold)
    assert plan is not None, "plain layouts always have one"
    found = []
    for own in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (current, leak, threshold)]
        if own:
            options = Options(plan, _GAMMA, 1, False, False)
            spikes = FusedScan.apply(leaves[0], None, *leaves[1:], None, options, KERNELS)[0]  # type: ignore[no-untyped-call]
        else:
            spikes = lif_scan_reference(leaves[0], None, *leaves[1:], gamma=_GAMMA).spikes
        found.append([spikes, *torch.autograd.grad((spikes * weights).sum(), leaves)])
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*found, strict=True))


def _forward(job: Job, wanted: Wanted) -> None:
    grid = _grid(job.options.plan)
    pointers = job.current, job.before, job.keep, job.leak.contiguous(), job.threshold.contiguous()
    there = {"TRACE": wanted[1] is not None, "CARRY": wanted[2] is not None}
    kernels.forward[grid.programs](*pointers, *wanted, *_sizes(job), **_constants(job), **there)


def _backward(job: Job, arriving: Arriving, leaving: Leaving) -> tuple[Tensor, Tensor]:
    plan, grid = job.options.plan, _grid(job.options.plan)
    pointers = job.current, job.before, job.keep, job.leak.contiguous(), job.threshold.contiguous()
    scratch = plan.empty(job.steps, job.current)
    rows = torch.empty(2, grid.programs[0], grid.sizes[0], device=job.current.device)  # of leak and threshold
    there = {name: grad is not None for name, grad in zip(("BY_SPIKES", "BY_TRACE", "BY_AFTER"), arriving, strict=True)}
    outputs = scratch, *leaving, *rows.unbind()
    told = job.options.gamma, *arriving, *outputs, *_sizes(job)
    kernels.backward[grid.programs](*pointers, *told, TINY=_TINY, **_constants(job), **there)
    # A program has left a row of channels for each.
    of_leak, of_threshold = (
        (row.sum(0) if many > 1 else row.sum()).reshape(parameter.shape)
        for row, many, parameter in zip(rows, (plan.leaks, plan.thresholds), (job.leak, job.threshold), strict=True)
    )
    return of_leak, of_threshold


def _sizes(job: Job) -> tuple[int, ...]:
    plan = job.options.plan
    return job.steps, job.options.repeat, plan.shape[0], *_grid(plan).sizes


def _constants(job: Job) -> dict[str, int]:
    """Return what both kernels are compiled for."""
    plan = job.options.plan
    tile_p, tile_c = _grid(plan).tile
    return {
        "LEAKS": int(plan.leaks > 1),
        "THRESHOLDS": int(plan.thresholds > 1),
        "BEFORE": job.before is not None,
        "KEEP": job.keep is not None,
        "ONCE": job.options.once,
        "TILE_P": tile_p,
        "TILE_C": tile_c,
    }


KERNELS = Loops(_forward, _backward)
"""The kernels of :mod:`spiking_rl.gpu_kernels`."""


def triton_fire(potential: Tensor, threshold: Tensor, gamma: float) -> Tensor | None:
    """Return the spikes of potentials ``(B, *N)`` at one fresh timestep; None where it does not go in one kernel."""
    current = potential.unsqueeze(0)
    plan = triton_plan(current, threshold, threshold) if potential.dim() else None
    if plan is None:
        return None
    unused = threshold.detach()  # a membrane at rest leaks nothing
    options = Options(plan, gamma, 1, False, False)
    spikes: Tensor = FusedScan.apply(current, None, unused, threshold, None, options, KERNELS)[0]  # type: ignore[no-untyped-call]
    return spikes.squeeze(0)
