"""Which scans the compiled loops of ``lif_scan.c`` do on a CPU, and what they are told of memory.

They take currents in 32-bit floats or bfloat16, as spikes and their gradients then are too (membranes, potentials,
parameters and all that is added up are in 32-bit floats with both); neurons that lie densely in memory, plain or
channels-last; and parameters of which there is one for the layer, or one per entry of the first neuron axis. Everything
else is left to the loops of :mod:`spiking_rl.neurons`.

A decision with a batch of one is all overhead: what follows from shapes alone is worked out once, in a :class:`Plan`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spiking_rl.compiling import built_loops
from spiking_rl.watching import is_watched

_BLOCK = 512  # neurons that are scanned together
_GROUPS = 64  # partial sums of parameter gradients: as many with any number of threads
_STORED = (torch.float32, torch.bfloat16)
_SMALL = 1 << 15  # neurons times timesteps that one thread has done before another has woken up


class Shape(ctypes.Structure):
    """What the loops need to know of shapes, as ``lif_scan.c`` has it."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("timesteps", "repeat", "batch", "neurons", "piece", "channels", "own"),
            *("leaks", "thresholds", "once", "groups", "threads"),
        )
    ]


@dataclass(frozen=True, eq=False)  # there is one per case, so its identity is enough to look things up by
class Plan:
    """How neurons and parameters lie in memory.

    Attributes:
        shape: of one timestep, ``(B, *N)``.
        strides: of one timestep, densely packed: plain, or channels-last for pictures.
        size: entries of one timestep.
        neurons: how many ``N`` is.
        channels: parameters of the layer; 1, or the size of the first neuron axis.
        leaks: how many leaks are given, 1 or ``channels``.
        thresholds: likewise.
        own: whether neighbouring neurons have parameters of their own.
        piece: neurons after which parameters repeat, or up to which one holds.
        kept: what the loops were told, by timesteps, ``repeat``, threads and ``once``.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int
    neurons: int
    channels: int
    leaks: int
    thresholds: int
    own: bool
    piece: int
    kept: dict[tuple[int, int, int, bool], Shape]

    def empty(self, steps: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised ``(steps, B, *N)`` on the device of another tensor."""
        shape, strides = (steps, *self.shape), (self.size, *self.strides)
        return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)

    def dense(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``(S, B, *N)`` in this layout and type, a copy only where it is otherwise."""
        return dense(tensor, (self.size, *self.strides), dtype)

    def dense_step(self, tensor: Tensor | None) -> Tensor | None:
        """Return one timestep ``(B, *N)`` in this layout and 32-bit floats; None stays None."""
        return None if tensor is None else dense(tensor, self.strides, torch.float32)


def dense(tensor: Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor in this layout and type, a copy only where it is otherwise."""
    if tensor.dtype == dtype and lies(tensor.shape, tensor.stride(), strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=dtype, device=tensor.device).copy_(tensor)


def plan(current: Tensor, leak: Tensor, threshold: Tensor) -> Plan | None:
    """Return how a scan over ``current`` (S, B, *N) goes in one pass on a CPU, or None where it does not."""
    return plan_for(current, leak, threshold) if takes(current, leak, threshold) else None


def plan_for(current: Tensor, leak: Tensor, threshold: Tensor) -> Plan | None:
    """Return how a scan over ``current`` (S, B, *N) lies in memory, or None where it lies otherwise."""
    if current.dtype not in _STORED or not leak.dtype is threshold.dtype is torch.float32:
        return None
    return plan_of(current.shape[1:], current.stride()[1:], leak.shape, threshold.shape)


def takes(current: Tensor, leak: Tensor, threshold: Tensor) -> bool:
    """Tell whether the compiled loops are for these tensors, however they lie in memory."""
    return (
        type(current) is Tensor
        and not torch.compiler.is_compiling()  # before anything that the compiler cannot look through
        and not is_watched()
        and current.dtype in _STORED
        and leak.dtype is threshold.dtype is torch.float32
        and current.is_cpu
        and not current.is_neg()
        and leak.is_cpu
        and threshold.is_cpu
        and built_loops(current.dtype) is not None
    )


@functools.lru_cache(1024)
def plan_of(shape: torch.Size, strides: tuple[int, ...], leak: torch.Size, threshold: torch.Size) -> Plan | None:
    """Return the plan for one timestep ``(B, *N)`` and parameters of these shapes, or None where there is none."""
    neurons = math.prod(shape[1:])
    if not shape or not neurons or not shape[0] or max(len(leak), len(threshold)) >= len(shape):
        return None
    leaks, thresholds = leak.numel(), threshold.numel()
    per_channel = (*shape[1:2], *[1] * (len(shape) - 2))
    if any(p.numel() != 1 and p != per_channel for p in (leak, threshold)):
        return None
    channels = max(leaks, thresholds)
    found, last = _plain(shape), False
    if len(shape) == 4 and not lies(shape, strides, found):
        channels_last = (neurons, 1, shape[1] * shape[3], shape[1])
        last = lies(shape, strides, channels_last)
        found = channels_last if last else found
    own = channels > 1 and (last or channels == neurons)
    if own:
        piece = channels * max(1, min(_BLOCK, neurons) // channels)
    else:
        piece = neurons // channels if channels > 1 else 4 * _BLOCK
    return Plan(tuple(shape), found, shape[0] * neurons, neurons, channels, leaks, thresholds, own, piece, {})


def lies(shape: Sequence[int], own: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether a tensor has these strides; those of axes of size 1 mean nothing."""
    return own == strides or all(n == 1 or a == b for n, a, b in zip(shape, own, strides, strict=True))


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def sizes_of(plan: Plan, steps: int, repeat: int, threads: int, once: bool = False) -> int:
    """Return the address of what the loops need to know of shapes; it is good for as long as the plan lives."""
    kept = plan.kept.get((steps, repeat, threads, once))
    if kept is None:
        groups = min(plan.shape[0] * -(-plan.neurons // plan.piece), _GROUPS)
        sizes = (steps, repeat, plan.shape[0], plan.neurons, plan.piece, plan.channels, plan.own)
        useful = 1 if steps * plan.size < _SMALL else threads
        made = Shape(*sizes, plan.leaks, plan.thresholds, once, groups, useful)
        # Of threads that come here together one is first: what the others made does not outlive this call.
        kept = plan.kept.setdefault((steps, repeat, threads, once), made)
    return ctypes.addressof(kept)


def run_loop(loop: Callable[..., int], sizes: int, leak: Tensor, threshold: Tensor, *arguments: Any) -> None:
    """Run a compiled loop over memory: tensors are given by their addresses.

    Raises:
        MemoryError: there is none left.
    """
    if not (leak.is_contiguous() and threshold.is_contiguous()):
        # The copies live until the loop has ended, which is what their addresses are good for.
        leak, threshold = leak.contiguous(), threshold.contiguous()
    if not loop(sizes, leak.data_ptr(), threshold.data_ptr(), *arguments):
        raise MemoryError("no memory for a scan")


def loop_of(name: str, stored: torch.dtype) -> Callable[..., int]:
    """Return the compiled loop ``lif_forward`` or ``lif_backward`` for currents of a type."""
    loop: Callable[..., int] = getattr(built_loops(stored), name)
    return loop


def address_of(tensor: Tensor | None) -> int | None:
    """Return where a tensor's numbers begin; None stays None."""
    return None if tensor is None else tensor.data_ptr()
