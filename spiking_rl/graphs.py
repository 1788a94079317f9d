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
_MOST = 8  # recordings of a function, each with memory of its own


class _Recording(NamedTuple):
    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]


class GraphedFunction:
    """A function of tensors, recorded for every combination of shapes at the fourth call with it.

    The calls before are plain ones, and do their work. What the function decides in Python is decided in the fourth
    call for all that follow, and what it reads or changes besides its arguments, such as weights, must stay where it is
    in memory: make another one where either changes. Waiting for the device inside it (``item``, a mask as index)
    cannot be recorded: there is a warning then, and this and all later calls are plain ones.

    Source: Nguyen et al. 2021, "Accelerating PyTorch with CUDA Graphs".

    Args:
        function: takes tensors of one device and returns a tuple of such.
    """

    def __init__(self, function: Callable[..., Tensors]) -> None:
        self._function = function
        self._calls: dict[Any, int] = {}
        self._recordings: dict[Any, _Recording] = {}
        self._failed = False

    def __call__(self, *inputs: Tensor) -> Tensors:
        """Return the function's results, which no later call changes."""
        device = inputs[0].device
        if self._failed or not can_be_recorded(device):
            return self._function(*inputs)
        with torch.cuda.device(device):
            return self._launch(inputs)

    def _launch(self, inputs: Tensors) -> Tensors:
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        recording = self._recordings.get(shapes)
        if recording is None:
            calls = self._calls[shapes] = self._calls.get(shapes, 0) + 1
            if calls <= _WARM_UP or len(self._recordings) == _MOST:
                return self._aside(inputs)
            recording = self._record(inputs)
            if recording is None:
                return self._function(*inputs)
            self._recordings[shapes] = recording
        for kept, given in zip(recording.inputs, inputs, strict=True):
            kept.copy_(given)
        recording.replay()
        return tuple(output.clone() for output in recording.outputs)

    def _aside(self, inputs: Tensors) -> Tensors:
        """Call the function on a stream of its own, as a recording will be made on one."""
        here, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            outputs = self._function(*inputs)
        here.wait_stream(stream)
        return outputs

    def _record(self, inputs: Tensors) -> _Recording | None:
        """Record the function, which does nothing yet; None where that is not possible."""
        kept = tuple(x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                outputs = self._function(*kept)
        except RuntimeError as error:  # what CUDA refuses to record is known to CUDA alone
            self._failed = True
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"no CUDA graph can be made, kernels are started one by one: {reason}", stacklevel=4)
            return None
        return _Recording(kept, outputs, graph.replay)


def can_be_recorded(device: torch.device) -> bool:
    """Tell whether functions on a device are recorded there."""
    return device.type in _DEVICES and os.environ.get(SWITCH) != "0"
