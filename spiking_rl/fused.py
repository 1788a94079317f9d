"""The scan in two passes over memory, one each way, for 32-bit floats on a CPU (``lif_scan.c``).

What it takes: neurons that lie densely in memory, plain or channels-last, and parameters of which there is one for the
layer, or one per entry of the first neuron axis. Everything else is left to the loops of :mod:`spiking_rl.neurons`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spiking_rl.compiling import library

_BLOCK = 512  # neurons that are scanned together
_GROUPS = 64  # partial sums of parameter gradients: as many with any number of threads
_SMALL = 1 << 15  # neurons times timesteps that one thread has done before another has woken up


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("timesteps", "repeat", "batch", "neurons", "piece", "channels", "own", "groups", "threads")
    ]


class _Parameters(ctypes.Structure):
    _fields_ = [
        ("leak", ctypes.c_void_p),
        ("threshold", ctypes.c_void_p),
        ("leaks", ctypes.c_int64),
        ("thresholds", ctypes.c_int64),
        ("keep", ctypes.c_void_p),
    ]


class Plan(NamedTuple):
    """How neurons and parameters lie in memory.

    Attributes:
        strides: of one timestep ``(B, *N)``, densely packed: plain, or channels-last for pictures.
        neurons: how many ``N`` is.
        channels: parameters of the layer; 1, or the size of the first neuron axis.
        own: whether neighbouring neurons have parameters of their own.
        piece: neurons after which parameters repeat, or up to which one holds.
    """

    strides: tuple[int, ...]
    neurons: int
    channels: int
    own: bool
    piece: int

    def empty(self, steps: int, like: Tensor) -> Tensor:
        """Return an uninitialised ``(steps, B, *N)``, B and N as in ``like`` ``(S, B, *N)``."""
        shape = like.shape[1:]
        return torch.empty_strided((steps, *shape), (shape[0] * self.neurons, *self.strides), dtype=torch.float32)

    def dense(self, tensor: Tensor) -> Tensor:
        """Return ``(S, B, *N)`` in this layout and 32-bit floats, a copy only where it is otherwise."""
        if tensor.dtype == torch.float32 and _lies(
            tensor.shape, tensor.stride(), (tensor.shape[1] * self.neurons, *self.strides)
        ):
            return tensor
        return self.empty(len(tensor), tensor).copy_(tensor)


def plan(current: Tensor, leak: Tensor, threshold: Tensor) -> Plan | None:
    """Return how a scan over ``current`` (S, B, *N) goes in one pass, or None where it does not."""
    if type(current) is not Tensor or current.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if not current.dtype == leak.dtype == threshold.dtype == torch.float32 or library() is None:
        return None
    return _plan(current.shape[1:], current.stride()[1:], leak.shape, threshold.shape)


@functools.lru_cache(1024)  # the same at every step, and acting with a batch of one is all overhead
def _plan(shape: torch.Size, strides: tuple[int, ...], leak: torch.Size, threshold: torch.Size) -> Plan | None:
    """Return the plan for currents ``(B, *N)`` and their parameters."""
    channels = max(leak.numel(), threshold.numel())
    if channels > 1:
        per_channel = (shape[1], *[1] * (len(shape) - 2))
        if any(p.numel() > 1 and p != per_channel for p in (leak, threshold)):
            return None
    neurons = math.prod(shape[1:])
    if not neurons or not shape[0]:
        return None
    found, last = _plain(shape), False
    if len(shape) == 4 and not _lies(shape, strides, found):
        channels_last = (neurons, 1, shape[1] * shape[3], shape[1])
        last = _lies(shape, strides, channels_last)
        found = channels_last if last else found
    if channels == 1:
        return Plan(found, neurons, 1, False, _BLOCK)
    if last or channels == neurons:
        return Plan(found, neurons, channels, True, channels * max(1, min(_BLOCK, neurons) // channels))
    return Plan(found, neurons, channels, False, neurons // channels)


def _lies(shape: Sequence[int], own: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether a tensor has these strides; those of axes of size 1 mean nothing."""
    return own == strides or all(n == 1 or a == b for n, a, b in zip(shape, own, strides, strict=True))


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _addresses(*tensors: Tensor | None) -> Any:
    return (ctypes.c_void_p * len(tensors))(*map(_address, tensors))


def _run(name: str, shape: _Shape, leak: Tensor, threshold: Tensor, keep: Tensor | None, *arguments: Any) -> None:
    compiled = library()
    assert compiled is not None, "a plan says that there is one"
    flat = leak.contiguous(), threshold.contiguous()
    parameters = _Parameters(*map(_address, flat), leak.numel(), threshold.numel(), _address(keep))
    if not getattr(compiled, name)(ctypes.byref(shape), ctypes.byref(parameters), *arguments):
        raise MemoryError("no memory for a scan")


def _shape(plan: Plan, current: Tensor, repeat: int) -> _Shape:
    threads = 1 if current.numel() * repeat < _SMALL else torch.get_num_threads()
    return _sizes(plan, len(current) * repeat, repeat, current.shape[1], threads)


@functools.lru_cache(1024)
def _sizes(plan: Plan, steps: int, repeat: int, batch: int, threads: int) -> _Shape:
    groups = min(batch * -(-plan.neurons // plan.piece), _GROUPS)
    return _Shape(steps, repeat, batch, plan.neurons, plan.piece, plan.channels, plan.own, groups, threads)


def fused_scan(
    current: Tensor,
    membrane: Tensor | None,
    leak: Tensor,
    threshold: Tensor,
    keep: Tensor | None,
    repeat: int,
    plan: Plan,
    carry: bool,
    trace: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return spikes, membranes after the last timestep, and potentials, without a gradient.

    Args:
        current: ``(S / repeat, B, *N)``.
        membrane: ``(B, *N)``, None at rest.
        leak: one, or one per entry of the first neuron axis.
        threshold: likewise.
        keep: ``(S, B)``, 0 where an episode starts, 1 elsewhere; None: none starts.
        repeat: timesteps that each current lasts.
        plan: what :func:`plan` says of these tensors.
        carry: return the membranes (else None).
        trace: return the potentials (else None).
    """
    current = plan.dense(current)
    before = None if membrane is None else plan.dense(membrane.unsqueeze(0))
    steps = len(current) * repeat
    spikes = plan.empty(steps, current)
    potentials = plan.empty(steps, current) if trace else None
    after = plan.empty(1, current) if carry else None
    pointers = map(ctypes.c_void_p, map(_address, (current, before, spikes, potentials, after)))
    _run("lif_forward", _shape(plan, current, repeat), leak, threshold, keep, *pointers)
    return spikes, None if after is None else after[0], potentials


class FusedScan(torch.autograd.Function):
    """The same with its gradient; ``gamma`` is the height of the surrogate's."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        membrane: Tensor | None,
        leak: Tensor,
        threshold: Tensor,
        keep: Tensor | None,
        gamma: float,
        repeat: int,
        plan: Plan,
        carry: bool,
        trace: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run :func:`fused_scan`, and keep what the backward pass computes potentials from."""
        current = plan.dense(current)
        before = None if membrane is None else plan.dense(membrane.unsqueeze(0))
        ctx.save_for_backward(current, before, leak, threshold, keep)
        ctx.options = gamma, repeat, plan
        ctx.set_materialize_grads(False)
        at_start = None if before is None else before.squeeze(0)
        return fused_scan(current, at_start, leak, threshold, keep, repeat, plan, carry, trace)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of current, membrane, leak and threshold."""
        current, before, leak, threshold, keep = ctx.saved_tensors
        gamma, repeat, plan = ctx.options
        by_spikes, by_after, by_trace = grads
        grads = (by_spikes, by_trace, None if by_after is None else by_after.unsqueeze(0))
        arriving = [None if grad is None else plan.dense(grad) for grad in grads]
        grad_current = plan.empty(len(current), current)
        grad_before = None if before is None else plan.empty(1, current)
        grad_leak = torch.empty_like(leak, memory_format=torch.contiguous_format) if ctx.needs_input_grad[2] else None
        grad_threshold = torch.empty_like(threshold, memory_format=torch.contiguous_format)
        _run(
            "lif_backward",
            _shape(plan, current, repeat),
            leak,
            threshold,
            keep,
            ctypes.c_float(gamma),
            *map(ctypes.c_void_p, map(_address, (current, before))),
            _addresses(*arriving),
            _addresses(grad_current, grad_before, grad_leak, grad_threshold),
        )
        grad_membrane = None if grad_before is None else grad_before[0]
        return grad_current, grad_membrane, grad_leak, grad_threshold, *[None] * 6


def fused_fire(potential: Tensor, threshold: Tensor, gamma: float) -> Tensor | None:
    """Return the spikes of potentials ``(B, *N)``, None where the loops have to do it."""
    if potential.dim() < 1:
        return None
    current = potential.unsqueeze(0)
    found = plan(current, threshold, threshold)
    if found is None:
        return None
    unused = threshold.detach()  # a membrane at rest leaks nothing
    spikes, _, _ = FusedScan.apply(current, None, unused, threshold, None, gamma, 1, found, False, False)  # type: ignore[no-untyped-call]
    result: Tensor = spikes.squeeze(0)  # indexing would copy the gradient
    return result
