"""A stand-in for a device that records CUDA graphs: the CPU, by the operations that torch does on it.

Like the real thing it does nothing while it records, repeats the same operations on the same memory when it replays,
knows nothing of what Python decided in between, and refuses to be waited for. Unlike it, it frees nothing and has one
stream: what goes wrong with memory that is gone, only a device shows.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spiking_rl import fused_plan, graphs, neurons

ATEN = torch.ops.aten
WAITING = {
    ATEN._local_scalar_dense.default,  # item
    ATEN.nonzero.default,  # a mask as index
    ATEN.lift_fresh.default,  # numbers of Python's, copied to the device
    ATEN.is_nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN.bincount.default,
    ATEN._unique2.default,
}


class Tape(TorchDispatchMode):
    """Operations with their tensors, as ``torch.cuda.CUDAGraph``."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was there and has been written over, by its memory
        self.made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in WAITING and not _of_an_optimiser():
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        for argument, given in zip(function._schema.arguments, [*args, *kwargs.values()], strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(given):
                    where = tensor.untyped_storage().data_ptr()
                    if where not in self.made and where not in self.before:
                        self.before[where] = tensor, tensor.clone()
        out = function(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        new = {t.untyped_storage().data_ptr() for t in tree_leaves(out) if isinstance(t, Tensor)} - given
        self.made |= new
        self.operations.append((function, args, kwargs, out))
        return out

    @contextmanager
    def recording(self, stream: object = None) -> Iterator[None]:
        chance = torch.get_rng_state()
        try:
            with self:
                yield
        finally:
            torch.set_rng_state(chance)
            for tensor, saved in self.before.values():
                tensor.data.copy_(saved)

    @torch.no_grad()
    def replay(self) -> None:
        Tape.replays += 1
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for kept, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def _of_an_optimiser() -> bool:
    """Tell whether one of torch's is at work, which counts its steps otherwise on a CPU than on a GPU."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        if Path(frame.f_code.co_filename).parent.name == "optim":
            return True
        frame = frame.f_back
    return False


class Stream:
    """Does nothing."""

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


@pytest.fixture
def recording_device(monkeypatch: pytest.MonkeyPatch, scan_in_python: None) -> None:
    """Let the CPU pass for a device that records; scans are torch's own operations, which can be seen."""
    monkeypatch.setattr(Tape, "replays", 0)
    monkeypatch.setattr(graphs, "_DEVICES", ("cpu",))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", Tape.recording)
    radam = importlib.import_module("torch.optim.radam")  # torch.optim leaves out its name
    monkeypatch.setattr(radam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    monkeypatch.setattr(fused_plan, "built_loops", lambda *_: None)
    monkeypatch.setattr(neurons, "is_watched", lambda: False)  # a device records without a dispatch mode
