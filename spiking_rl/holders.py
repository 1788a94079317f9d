"""Whether a gradient that arrives in a backward pass is held by nobody else, so that its memory may be written over."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_task: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)
_NO_TASK = -1


def held_alone(grads: tuple[Tensor, ...]) -> bool:
    """Tell whether nobody but the backward pass that is asking holds the first gradient, or its memory.

    To be asked first of all by the ``backward(ctx, *grads)`` of a function: holders are counted, and compared with what
    that counts in a graph where there are no others. Memory that is not torch's own (an array's) is never held alone,
    nor is a gradient that somebody hands to the function themselves.
    """
    return _holders(grads) == _fewest()


def _holders(grads: tuple[Tensor, ...]) -> tuple[int, int] | None:
    """Count who holds a gradient in Python, and its memory; None where there are others, or torch does not tell."""
    try:
        memory = grads[0].untyped_storage()
        held = grads[0]._use_count(), torch._C._storage_Use_Count(memory._cdata)  # type: ignore[attr-defined]
    except AttributeError:
        return None
    # One tensor; its memory is held by that and by the object just asked for.
    if held != (1, 2) or not memory.resizable() or _task is None or _task() == _NO_TASK:
        return None
    return sys.getrefcount(grads[0]), sys.getrefcount(memory)


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counted: list[tuple[int, int] | None]) -> Tensor:
        ctx.counted = counted
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.counted.append(_holders(grads))
        return grads[0], None


@functools.cache
def _fewest() -> tuple[int, int] | bool:
    """Return what counting gives where there are no other holders; False, which equals nothing, where it cannot be."""
    counted: list[tuple[int, int] | None] = []

    def count() -> None:
        x = torch.ones(2, requires_grad=True)
        (_Count.apply(x, counted) * 2).sum().backward()  # type: ignore[no-untyped-call]

    # In a thread of its own: modes that look at tensors, and may keep them, belong to the thread that is in them.
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    return (counted or [None])[0] or False
