"""The scan in two passes over memory, one each way, on a CPU (``lif_scan.c``).

What it takes: currents in 32-bit floats or bfloat16, as spikes and their gradients then are too (membranes, potentials,
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
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from spiking_rl.compiling import built_loops, built_op
from spiking_rl.holders import held_alone
from spiking_rl.watching import is_transforming, is_watched

_BLOCK = 512  # neurons that are scanned together
_GROUPS = 64  # partial sums of parameter gradients: as many with any number of threads
_STORED = (torch.float32, torch.bfloat16)
_SMALL = 1 << 15  # neurons times timesteps that one thread has done before another has woken up


class _Shape(ctypes.Structure):
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
    kept: dict[tuple[int, int, int, bool], _Shape]

    def empty(self, steps: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised ``(steps, B, *N)`` on the device of another tensor."""
        shape, strides = (steps, *self.shape), (self.size, *self.strides)
        return torch.empty_strided(shape, strides, dtype=dtype, device=like.device)

    def dense(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ``(S, B, *N)`` in this layout and type, a copy only where it is otherwise."""
        return _dense(tensor, (self.size, *self.strides), dtype)

    def dense_step(self, tensor: Tensor | None) -> Tensor | None:
        """Return one timestep ``(B, *N)`` in this layout and 32-bit floats; None stays None."""
        return None if tensor is None else _dense(tensor, self.strides, torch.float32)


def _dense(tensor: Tensor, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype and _lies(tensor.shape, tensor.stride(), strides):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=dtype, device=tensor.device).copy_(tensor)


def plan(current: Tensor, leak: Tensor, threshold: Tensor) -> Plan | None:
    """Return how a scan over ``current`` (S, B, *N) goes in one pass on a CPU, or None where it does not."""
    return plan_for(current, leak, threshold) if _takes(current, leak, threshold) else None


def plan_for(current: Tensor, leak: Tensor, threshold: Tensor) -> Plan | None:
    """Return how a scan over ``current`` (S, B, *N) lies in memory, or None where it lies otherwise."""
    if current.dtype not in _STORED or not leak.dtype is threshold.dtype is torch.float32:
        return None
    return _plan(current.shape[1:], current.stride()[1:], leak.shape, threshold.shape)


def _takes(current: Tensor, leak: Tensor, threshold: Tensor) -> bool:
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
def _plan(shape: torch.Size, strides: tuple[int, ...], leak: torch.Size, threshold: torch.Size) -> Plan | None:
    neurons = math.prod(shape[1:])
    if not shape or not neurons or not shape[0] or max(len(leak), len(threshold)) >= len(shape):
        return None
    leaks, thresholds = leak.numel(), threshold.numel()
    per_channel = (*shape[1:2], *[1] * (len(shape) - 2))
    if any(p.numel() != 1 and p != per_channel for p in (leak, threshold)):
        return None
    channels = max(leaks, thresholds)
    found, last = _plain(shape), False
    if len(shape) == 4 and not _lies(shape, strides, found):
        channels_last = (neurons, 1, shape[1] * shape[3], shape[1])
        last = _lies(shape, strides, channels_last)
        found = channels_last if last else found
    own = channels > 1 and (last or channels == neurons)
    if own:
        piece = channels * max(1, min(_BLOCK, neurons) // channels)
    else:
        piece = neurons // channels if channels > 1 else 4 * _BLOCK
    return Plan(tuple(shape), found, shape[0] * neurons, neurons, channels, leaks, thresholds, own, piece, {})


def _lies(shape: Sequence[int], own: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Tell whether a tensor has these strides; those of axes of size 1 mean nothing."""
    return own == strides or all(n == 1 or a == b for n, a, b in zip(shape, own, strides, strict=True))


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def _sizes(plan: Plan, steps: int, repeat: int, threads: int, once: bool = False) -> int:
    """Return the address of what the loops need to know of shapes; it is good for as long as the plan lives."""
    kept = plan.kept.get((steps, repeat, threads, once))
    if kept is None:
        groups = min(plan.shape[0] * -(-plan.neurons // plan.piece), _GROUPS)
        sizes = (steps, repeat, plan.shape[0], plan.neurons, plan.piece, plan.channels, plan.own)
        useful = 1 if steps * plan.size < _SMALL else threads
        made = _Shape(*sizes, plan.leaks, plan.thresholds, once, groups, useful)
        # Of threads that come here together one is first: what the others made does not outlive this call.
        kept = plan.kept.setdefault((steps, repeat, threads, once), made)
    return ctypes.addressof(kept)


def _run(loop: Callable[..., int], sizes: int, leak: Tensor, threshold: Tensor, *arguments: Any) -> None:
    if not (leak.is_contiguous() and threshold.is_contiguous()):
        # The copies live until the loop has ended, which is what their addresses are good for.
        leak, threshold = leak.contiguous(), threshold.contiguous()
    if not loop(sizes, leak.data_ptr(), threshold.data_ptr(), *arguments):
        raise MemoryError("no memory for a scan")


def _loop(name: str, stored: torch.dtype) -> Callable[..., int]:
    """Return the compiled loop ``lif_forward`` or ``lif_backward`` for currents of a type."""
    loop: Callable[..., int] = getattr(built_loops(stored), name)
    return loop


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
    addresses = map(_address, (job.keep, job.current, job.before, *wanted))
    _run(_loop("lif_forward", job.current.dtype), _job_sizes(job), job.leak, job.threshold, *addresses)


def _backward(job: Job, arriving: Arriving, leaving: Leaving) -> tuple[Tensor, Tensor]:
    of_leak, of_threshold = (
        torch.empty_like(parameter, memory_format=torch.contiguous_format) for parameter in (job.leak, job.threshold)
    )
    addresses = map(_address, (job.current, job.before, *arriving, *leaving, of_leak, of_threshold))
    told = _address(job.keep), job.options.gamma
    _run(_loop("lif_backward", job.current.dtype), _job_sizes(job), job.leak, job.threshold, *told, *addresses)
    return of_leak, of_threshold


def _job_sizes(job: Job) -> int:
    return _sizes(job.options.plan, job.steps, job.options.repeat, torch.get_num_threads(), job.options.once)


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
            return *_differentiable(current, before, leak, threshold, keep, *told, grads), None, None, None
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


def _differentiable(
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
    """Return the gradients of current, membrane, leak and threshold, themselves differentiable.

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


def differentiable_fresh(
    current: Tensor, leak: Tensor | None, threshold: Tensor, gamma: float, timesteps: int, repeat: int, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of :func:`fused_fresh`'s current, leak and threshold, themselves differentiable.

    Args:
        current: as there; so are the others.
        leak: None where there is one timestep.
        threshold: one, or one per entry of the first neuron axis.
        gamma: height of the surrogate gradient.
        timesteps: T.
        repeat: timesteps that each current lasts.
        grad: of the spikes, ``(T*B, *N)``.
    """
    steps = current.reshape(timesteps // repeat, len(grad) // timesteps, *current.shape[1:])
    kept = threshold.detach() if leak is None else leak  # of one timestep nothing is kept
    arriving = grad.reshape(timesteps, *steps.shape[1:])
    found = _differentiable(steps, None, kept, threshold, None, gamma, repeat, False, (arriving,))
    of_steps, _, of_leak, of_threshold = found
    return None if of_steps is None else of_steps.reshape(current.shape), of_leak, of_threshold


class Compiled(Protocol):
    """A scan from rest as the operation of ``lif_op.cpp`` knows it."""

    def spikes(
        self,
        current: Tensor,
        leak: Tensor,
        threshold: Tensor,
        timesteps: int,
        repeat: int,
        gamma: float,
        spare: bool,
        /,
    ) -> Tensor | None:
        """Return what :func:`fused_fresh` does; None where this is another case, or not a plain one."""


class Fresh(NamedTuple):
    """How a scan from rest over a flat batch ``(K*B, *N)`` goes: nothing but spikes comes out.

    Attributes:
        plan: of one timestep; it keeps alive what ``sizes`` points at.
        frames: shape of the spikes, ``(T*B, *N)``.
        strides: of the spikes.
        stored: type of the current and of the spikes.
        sizes: address of what the loops need to know of shapes.
        fits: the current lies as the spikes do.
        timesteps: T.
        lasts: each current lasts several timesteps.
        forward: the loops.
        backward: likewise.
        compiled: the same without Python in between; None where there is no such operation.
    """

    plan: Plan
    frames: tuple[int, ...]
    strides: tuple[int, ...]
    stored: torch.dtype
    sizes: int
    fits: bool
    timesteps: int
    lasts: bool
    forward: Callable[..., int]
    backward: Callable[..., int]
    compiled: Compiled | None

    @property
    def alone(self) -> bool:
        """Whether there is one timestep, so that nothing ever leaks."""
        return self.timesteps == 1

    def given(self, leak: Tensor | None, threshold: Tensor) -> Tensor:
        """Return what the loops are given for a leak: of one timestep, which reads none, the threshold."""
        return threshold if self.alone or leak is None else leak

    def dense(self, tensor: Tensor) -> Tensor:
        """Return a flat batch in this layout and type, a copy only where it is otherwise."""
        return _dense(tensor, self.strides, self.stored)


@functools.lru_cache(1024)
def _fresh(
    shape: torch.Size,
    strides: tuple[int, ...],
    stored: torch.dtype,
    leak: torch.Size,
    threshold: torch.Size,
    timesteps: int,
    repeat: int,
    threads: int,
) -> Fresh | None:
    if repeat not in (1, timesteps) or not shape or shape[0] % (timesteps // repeat):
        return None
    if timesteps == 1:  # nothing leaks: the loops are given thresholds in place of leaks
        leak = threshold
    batch = shape[0] * repeat // timesteps
    found = _plan(torch.Size((batch, *shape[1:])), strides, leak, threshold)
    if found is None:
        return None
    sizes = _sizes(found, timesteps, repeat, threads)
    fits = _lies(shape, strides, found.strides)
    frames = (timesteps * batch, *shape[1:])
    both = _loop("lif_forward", stored), _loop("lif_backward", stored)
    compiled: Compiled | None = None
    op = built_op()
    if op is not None and fits:
        layouts = shape, strides, leak, threshold, frames, found.strides
        loops = (ctypes.cast(loop, ctypes.c_void_p).value for loop in both)  # type: ignore[arg-type]
        told = (*map(tuple, layouts), stored is torch.bfloat16, timesteps, repeat, threads)
        compiled = op.Way(*told, ctypes.string_at(sizes, ctypes.sizeof(_Shape)), *loops)
    return Fresh(found, frames, found.strides, stored, sizes, fits, timesteps, repeat > 1, *both, compiled)


class Ways:
    """How a layer's scan from rest went the last time: a call of the same kind looks up next to nothing.

    Between two convolutions whatever Python does has left the caches, and takes three times as long as in a loop of its
    own: with a small network that was most of what spikes cost.
    """

    __slots__ = ("_last", "compiled")

    def __init__(self) -> None:
        # What was asked, and the answer; one object, as several threads may be asking.
        self._last: tuple[tuple[Any, ...], Fresh | None] = ((), None)
        self.compiled: Compiled | None = None
        """The answer as ``lif_op.cpp`` knows it, which is asked first, and sees whether the question is another."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Ways, ()  # a copy begins anew: addresses are good in one process only

    def find(self, current: Tensor, leak: Tensor, threshold: Tensor, timesteps: int, repeat: int) -> Fresh | None:
        """Return how a scan from rest over a flat current ``(T/repeat*B, *N)`` goes, or None where it does not."""
        if torch.compiler.is_compiling() or is_watched():  # in this order: the compiler cannot look through the latter
            return None
        kinds = type(current), current.dtype, leak.dtype, threshold.dtype
        places = current.is_cpu, leak.is_cpu, threshold.is_cpu, current.is_neg()
        shapes = current.shape, current.stride(), leak.shape, threshold.shape
        seen = kinds, places, shapes, timesteps, repeat, torch.get_num_threads()
        last, way = self._last
        if seen != last:
            way = _find(current, leak, threshold, timesteps, repeat)
            self._last = seen, way
            self.compiled = None if way is None else way.compiled
        return way


def _find(current: Tensor, leak: Tensor, threshold: Tensor, timesteps: int, repeat: int) -> Fresh | None:
    if not _takes(current, leak, threshold):
        return None
    shapes = current.shape, current.stride(), current.dtype, leak.shape, threshold.shape
    return _fresh(*shapes, timesteps, repeat, torch.get_num_threads())


def fused_fresh(
    current: Tensor,
    leak: Tensor,
    threshold: Tensor,
    gamma: float,
    timesteps: int,
    repeat: int,
    *,
    spare: bool = False,
    ways: Ways | None = None,
) -> Tensor | None:
    """Return spikes ``(T*B, *N)`` from rest of a flat current ``(T/repeat*B, *N)``, with their gradient.

    Args:
        current: timestep by timestep.
        leak: one, or one per entry of the first neuron axis.
        threshold: likewise.
        gamma: height of the surrogate gradient.
        timesteps: T.
        repeat: timesteps that each current lasts; 1, or T.
        spare: without a gradient, spikes may take the current's place in memory.
        ways: the layer's own.

    Returns:
        None where the loops have to do it.
    """
    given = current, leak, threshold, timesteps, repeat
    compiled = None if ways is None or torch.compiler.is_compiling() else ways.compiled
    if compiled is not None and (spikes := compiled.spikes(*given, gamma, spare)) is not None:
        return spikes
    way = _find(*given) if ways is None else ways.find(*given)
    if way is None:
        return None
    if way.compiled is not compiled and way.compiled is not None:
        spikes = way.compiled.spikes(*given, gamma, spare)
        if spikes is not None:
            return spikes
    if torch.is_grad_enabled():
        return _apply(current, None if way.alone else leak, threshold, gamma, way)
    current = current if way.fits else way.dense(current)
    return _fresh_spikes(current, leak, threshold, way, spare and repeat == 1)


def _fresh_spikes(current: Tensor, leak: Tensor | None, threshold: Tensor, way: Fresh, inside: bool = False) -> Tensor:
    if inside:  # every current is read once, just before its spike is written
        spikes = current
    elif way.alone:
        spikes = torch.empty_like(current)
    else:
        spikes = torch.empty_strided(way.frames, way.strides, dtype=way.stored)
    addresses = None, current.data_ptr(), None, spikes.data_ptr(), None, None
    _run(way.forward, way.sizes, way.given(leak, threshold), threshold, *addresses)
    return spikes


class FreshScan:
    """:func:`fused_fresh` without a gradient, for parameters that stay as they are.

    Args:
        leak: one, or one per entry of the first neuron axis.
        threshold: likewise.
        timesteps: T.
        repeat: timesteps that each current lasts; 1, or T.
    """

    def __init__(self, leak: Tensor, threshold: Tensor, timesteps: int, repeat: int) -> None:
        self.leak, self.threshold = leak.detach().contiguous(), threshold.detach().contiguous()
        self.timesteps, self.repeat = timesteps, repeat
        self._ways = Ways()

    def __call__(self, current: Tensor) -> Tensor | None:
        """Return spikes ``(T*B, *N)`` from rest of a flat current; None where the loops have to do it."""
        given = current, self.leak, self.threshold, self.timesteps, self.repeat
        compiled = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else self._ways.compiled
        if compiled is not None and (spikes := compiled.spikes(*given, 0.0, False)) is not None:
            return spikes  # there is no gradient, so it has no height
        way = self._ways.find(*given)
        if way is None:
            return None
        # Addresses are asked for at every call: a tensor moves when it is shared with another process.
        return _fresh_spikes(current if way.fits else way.dense(current), self.leak, self.threshold, way)


class _FusedFresh(torch.autograd.Function):
    """What most of training is, without what it does not need; of one timestep no leak is given."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, leak: Tensor | None, threshold: Tensor, gamma: float, way: Fresh) -> Tensor:
        ctx.save_for_backward(current, leak, threshold)
        ctx.options = gamma, way
        return _fresh_spikes(current if way.fits else way.dense(current), leak, threshold, way)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # somebody may be going to ask for second derivatives
            gamma, way = ctx.options
            repeat = way.timesteps if way.lasts else 1
            current, leak, threshold = ctx.saved_tensors
            found = differentiable_fresh(current, leak, threshold, gamma, way.timesteps, repeat, grads[0])
            return *found, None, None
        return _fresh_backward(ctx, grads)


def _fresh_backward(ctx: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    inside = held_alone(grads)  # asked before anything here holds it
    current, leak, threshold = ctx.saved_tensors
    gamma, way = ctx.options
    # Hooks may have brought back what was saved in another layout or type.
    current, leak, threshold = way.dense(current), None if leak is None else leak.float(), threshold.float()
    arriving = way.dense(grads[0].resolve_neg())
    inside = not way.lasts and (inside or arriving is not grads[0])
    # Every gradient is read just before the one that leaves is written.
    of_current = arriving if inside else torch.empty_like(current)
    of_threshold = torch.empty_like(threshold, memory_format=torch.contiguous_format)
    of_leak = None if leak is None else torch.empty_like(leak, memory_format=torch.contiguous_format)
    addresses = current.data_ptr(), None, arriving.data_ptr(), None, None
    results = of_current.data_ptr(), None, _address(of_leak), of_threshold.data_ptr()
    _run(way.backward, way.sizes, way.given(leak, threshold), threshold, None, gamma, *addresses, *results)
    return of_current, of_leak, of_threshold, None, None


# Function.apply spends most of its time on functorch's transforms, of which there are none in training.
_applied: Callable[..., Tensor] = super(torch.autograd.Function, _FusedFresh).apply


def _apply(*arguments: Any) -> Tensor:
    if is_transforming():
        return _FusedFresh.apply(*arguments)  # type: ignore[no-untyped-call,no-any-return]
    return _applied(*arguments)
