"""Functions of tensors that are launched whole on a CUDA device: recorded once as a CUDA graph, replayed from then on.

A kernel of a small network runs for microseconds on a GPU, less than starting it from Python takes. A graph starts all
of them at once. Elsewhere, and where recording fails, a function is just called.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

SWITCH = "SPIKING_RL_GRAPHS"
"""Environment variable; 0 records nothing."""

Tensors = tuple[Tensor, ...]

_DEVICES = ("cuda",)  # whose work can be recorded
_WARM_UP = 3  # calls before the recording: kernels are compiled and chosen in them, moments and gradients made
_MOST = 8  # recordings of a recorder, each with memory of its own


class _Recording(NamedTuple):
    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]


class Recorder:
    """Calls functions of tensors, and records each at the fourth call with the same shapes.

    The calls before are plain ones, and do their work. What a function decides in Python is decided in the fourth call
    for all that follow, and what it reads or changes besides its arguments, such as weights, must stay where it is in
    memory: :meth:`forget` where either changes. Waiting for the device inside a function (``item``, a mask as index)
    cannot be recorded: there is a warning then, and this and all later calls are plain ones.

    Everything happens on one stream of its own: matrix products keep their scratch memory per stream, and a recording
    that is dropped takes it along. A copy has recorded nothing.

    Source: Nguyen et al. 2021, "Accelerating PyTorch with CUDA Graphs".
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self.forget()

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        return type(self), ()

    def forget(self) -> None:
        """Drop all recordings."""
        self._calls: dict[Any, int] = {}
        self._recordings: dict[Any, _Recording] = {}
        self._failed = False

    @property
    def names(self) -> set[str]:
        """Names of what has been recorded."""
        return {name for name, _ in self._recordings}

    def __call__(self, name: str, function: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
        """Return a function's results, which no later call changes.

        Args:
            name: of the function; it is not kept, so another one of this name must do the same.
            function: takes tensors and returns a tuple of such.
            inputs: its arguments, at least one, all on one device.
        """
        device = inputs[0].device
        if self._failed or not can_be_recorded(device):
            return function(*inputs)
        key = name, tuple((x.shape, x.dtype) for x in inputs)
        recording = self._recordings.get(key)
        if recording is None and len(self._recordings) == _MOST:
            return function(*inputs)
        with torch.cuda.device(device):
            if recording is None:
                if self._stream is None:
                    self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                calls = self._calls[key] = self._calls.get(key, 0) + 1
                if calls <= _WARM_UP:
                    return self._aside(function, inputs)
                recording = self._record(function, inputs)
                if recording is None:
                    return function(*inputs)
                self._recordings[key] = recording
            for kept, given in zip(recording.inputs, inputs, strict=True):
                kept.copy_(given)
            recording.replay()
            return tuple(output.clone() for output in recording.outputs)

    def _aside(self, function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        """Call a function on the stream that its recording will be made on."""
        assert self._stream is not None
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            outputs = function(*inputs)
        here.wait_stream(self._stream)
        return outputs

    def _record(self, function: Callable[..., Tensors], inputs: Tensors) -> _Recording | None:
        """Record a function, which does nothing yet; None where that is not possible."""
        kept = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context leaves the stream also where the inner one fails to.
            with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream):
                outputs = function(*kept)
        except RuntimeError as error:  # what CUDA refuses to record is known to CUDA alone
            self._failed = True
            reason = " ".join(str(error.__context__ or error).split())[:200]
            warnings.warn(f"no CUDA graph can be made, kernels are started one by one: {reason}", stacklevel=3)
            return None
        return _Recording(kept, outputs, graph.replay)


def can_be_recorded(device: torch.device) -> bool:
    """Tell whether functions on a device are recorded there."""
    return device.type in _DEVICES and os.environ.get(SWITCH) != "0"
