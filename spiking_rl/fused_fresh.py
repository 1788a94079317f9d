"""The scan from rest of which nothing but spikes comes out, which is most of training, without what it does not need.

Between two convolutions every operation of Python counts, so a layer remembers how its scan went (:class:`Ways`), and
where ``lif_op.cpp`` could be built there is no Python in between.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from spiking_rl.compiling import built_op
from spiking_rl.fused import differentiable
from spiking_rl.fused_plan import Plan, Shape, address_of, dense, lies, loop_of, plan_of, run_loop, sizes_of, takes
from spiking_rl.holders import held_alone
from spiking_rl.watching import is_transforming, is_watched


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
    found = differentiable(steps, None, kept, threshold, None, gamma, repeat, False, (arriving,))
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
        return dense(tensor, self.strides, self.stored)


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
    found = plan_of(torch.Size((batch, *shape[1:])), strides, leak, threshold)
    if found is None:
        return None
    sizes = sizes_of(found, timesteps, repeat, threads)
    fits = lies(shape, strides, found.strides)
    frames = (timesteps * batch, *shape[1:])
    both = loop_of("lif_forward", stored), loop_of("lif_backward", stored)
    compiled: Compiled | None = None
    op = built_op()
    if op is not None and fits:
        layouts = shape, strides, leak, threshold, frames, found.strides
        loops = (ctypes.cast(loop, ctypes.c_void_p).value for loop in both)  # type: ignore[arg-type]
        told = (*map(tuple, layouts), stored is torch.bfloat16, timesteps, repeat, threads)
        compiled = op.Way(*told, ctypes.string_at(sizes, ctypes.sizeof(Shape)), *loops)
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
    if not takes(current, leak, threshold):
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
    run_loop(way.forward, way.sizes, way.given(leak, threshold), threshold, *addresses)
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
    results = of_current.data_ptr(), None, address_of(of_leak), of_threshold.data_ptr()
    run_loop(way.backward, way.sizes, way.given(leak, threshold), threshold, None, gamma, *addresses, *results)
    return of_current, of_leak, of_threshold, None, None


# Function.apply spends most of its time on functorch's transforms, of which there are none in training.
_applied: Callable[..., Tensor] = super(torch.autograd.Function, _FusedFresh).apply


def _apply(*arguments: Any) -> Tensor:
    if is_transforming():
        return _FusedFresh.apply(*arguments)  # type: ignore[no-untyped-call,no-any-return]
    return _applied(*arguments)
