"""Whether a gradient that arrives in a backward pass is held by nobody else, so that its memory may be written over."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def held_alone(grads: tuple[Tensor, ...]) -> bool:
    """Tell whether nobody but the backward pass that is asking holds the first gradient, or its memory.

    To be asked first of all by the ``backward(ctx, *grads)`` of a function that is differentiable once: holders are
    counted, and compared with what that counts in a graph where there are no others.
    """
    return _holders(grads) == _fewest()


def _holders(grads: tuple[Tensor, ...]) -> tuple[int, int, int] | None:
    """Count who holds a gradient: in Python, among torch's own, and its memory; None where torch does not tell."""
    try:
        memory = torch._C._storage_Use_Count(grads[0].untyped_storage()._cdata)
        return sys.getrefcount(grads[0]), grads[0]._use_count(), memory  # type: ignore[attr-defined]
    except AttributeError:
        return None


def _asked(grads: tuple[Tensor, ...]) -> tuple[int, int, int] | None:
    """Stand where :func:`held_alone` does."""
    return _holders(grads)


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counted: list[tuple[int, int, int] | None]) -> Tensor:
        ctx.counted = counted
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.counted.append(_asked(grads))
        return grads[0], None


@functools.cache
def _fewest() -> tuple[int, int, int] | bool:
    """Return what counting gives where there are no other holders; False, which equals nothing, where it cannot be."""
    counted: list[tuple[int, int, int] | None] = []
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(2, requires_grad=True)
        (_Count.apply(x, counted) * 2).sum().backward()  # type: ignore[no-untyped-call]
    return counted[0] or False
