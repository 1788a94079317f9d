"""Event-driven convolutions and linear maps on a CPU: time goes with the spikes, and silent inputs cost nothing."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from spiking_rl.compiling import built_events
from spiking_rl.small_maps import SmallMapConv2d
from spiking_rl.watching import is_watched

_FEW = 8  # frames up to which a map is bound by reading its weights, and dense kernels are at their worst
_LONGEST = 2**16 - 1  # side of a picture that the loops can count
_THREADS_FROM = 2**20  # multiply-accumulates of the dense map from which more than one thread pays


class Map(ctypes.Structure):
    """Sizes of a map, as events.c has them."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "height", "width", "channels", "rows", "columns", "outputs"),
            *("tall", "wide", "down", "across", "above", "left", "most", "threads"),
        )
    ]


def runs_on_events(layer: nn.Module) -> bool:
    """Tell whether a map can be computed from active inputs alone: a plain one, in 32-bit floats on a CPU."""
    if type(layer) is not nn.Linear and not is_plain_convolution(layer):
        return False
    weight = layer.weight
    plain = weight.dtype is torch.float32 and weight.is_cpu and weight.numel() > 0 and "forward" not in layer.__dict__
    return plain and built_events() is not None


def is_plain_convolution(layer: nn.Module) -> bool:
    """Tell whether a layer is a convolution of one group, without dilation, padded with a given number of zeros."""
    if type(layer) not in (nn.Conv2d, SmallMapConv2d):
        return False
    assert isinstance(layer, nn.Conv2d)
    if layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
        return False
    return type(layer.stride) is tuple and type(layer.padding) is tuple  # set by hand they may be anything


class EventMap:
    """A convolution or linear map of spikes that touches the weights of active inputs only.

    What each active input, a spike or a mean of spikes, gives is added to the outputs that it reaches. The sums are
    those of the layer in another order. Where many inputs are active, from a seventh on in a large batch to half of
    them in a small map, the layer itself computes.

    Args:
        layer: for which :func:`runs_on_events` holds; later changes to its weights do not arrive here.
        otherwise: what computes where many inputs are active, what the loops cannot take (another type, shape or
            device), and where a gradient or a record of the operations is wanted.
        rows: the weights of a linear map as ``(inputs, outputs)``, contiguous, where somebody holds them so.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, otherwise: Callable[[Tensor], Tensor], rows: Tensor | None = None
    ) -> None:
        self.otherwise = otherwise
        weight = layer.weight.detach()
        self.linear = isinstance(layer, nn.Linear)
        self.stride, self.padding = (1, 1), (0, 0)
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            (down, across), (above, left) = layer.stride, layer.padding
            self.stride, self.padding = (down, across), (above, left)
        kernel = weight[..., None, None] if self.linear else weight
        self.outputs, self.channels, *self.kernel = kernel.shape
        self.weights = _as_events_read(kernel, self.stride[1]) if rows is None else rows[:, None, None, None]
        self.bias = weight.new_zeros(self.outputs) if layer.bias is None else layer.bias.detach().clone()
        self.last: tuple[torch.Size, Map | None] = (torch.Size(), None)

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the layer gives: of ``(B, channels, H, W)`` or ``(B, channels)``, channels last."""
        loops = built_events()  # none where this came from another machine
        if loops is None or not takes(x) or (x.requires_grad and torch.is_grad_enabled()):
            return self.otherwise(x)
        shape, sizes = self.last
        if x.shape != shape:
            shape, sizes = self.last = x.shape, self._sizes(x.shape)
        if sizes is None:
            return self.otherwise(x)
        if self.linear:
            x = x.contiguous()
            outputs = x.new_empty(shape[0], self.outputs)
        else:
            x = x.contiguous(memory_format=torch.channels_last)
            outputs = empty_outputs(sizes)
        addresses = (None, None, self.weights.data_ptr(), self.bias.data_ptr(), outputs.data_ptr())
        found = loops.events_run(ctypes.addressof(sizes), threads_of(sizes), x.data_ptr(), *addresses, None)
        return outputs if found else self.otherwise(x)

    def _sizes(self, shape: torch.Size) -> Map | None:
        """Return what the loops need to know of inputs of a shape; None where they cannot take it."""
        if len(shape) != (2 if self.linear else 4) or shape[1] != self.channels:
            return None
        sides = (1, 1) if self.linear else shape[2:]
        kernel = (self.outputs, self.channels, *self.kernel)
        found = sizes_of((*shape[:2], *sides), kernel, self.stride, self.padding)
        if found is not None:
            found.most = _most(found.batch, found.rows * found.columns, self.linear)
        return found


def sizes_of(shape: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Map | None:
    """Return what the loops need to know of inputs ``(B, channels, H, W)``; None where they cannot take them.

    How many inputs may be active, ``most``, is left to whoever asks.

    Args:
        shape: of the inputs.
        kernel: shape of the weights, ``(outputs, channels, rows, columns)``.
        stride: downwards and across.
        padding: above and to the left, and as much below and to the right.
    """
    batch, channels, *sides = shape
    axes = zip(sides, padding, kernel[2:], stride, strict=True)
    rows, columns = ((side + 2 * pad - long) // step + 1 for side, pad, long, step in axes)
    if channels != kernel[1] or min(*sides, rows, columns) < 1 or max(sides) > _LONGEST:
        return None
    useful = batch * rows * columns * math.prod(kernel) >= _THREADS_FROM
    outputs = (rows, columns, kernel[0])
    return Map(batch, *sides, channels, *outputs, *kernel[2:], *stride, *padding, threads=useful)


def threads_of(sizes: Map) -> int:
    """Return the threads that a map is worth."""
    return torch.get_num_threads() if sizes.threads else 1


def empty_outputs(sizes: Map, stored: torch.dtype = torch.float32) -> Tensor:
    """Return what a convolution's outputs are written to, ``(B, outputs, rows, columns)``, channels last."""
    shape = (sizes.batch, sizes.outputs, sizes.rows, sizes.columns)
    return torch.empty(shape, dtype=stored, device="cpu", memory_format=torch.channels_last)


def takes(x: Tensor, stored: torch.dtype = torch.float32) -> bool:
    """Tell whether the loops for a type can read a tensor, and nobody records what is done to it."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()  # before anything that the compiler cannot look through
        and not is_watched()
        and x.dtype is stored
        and x.is_cpu
        and not x.is_neg()
    )


def _most(batch: int, pixels: int, linear: bool) -> int:
    """Return how many inputs in a thousand may be active: about where the dense kernels draw level.

    These are poor at maps of few pixels, and everything is where each weight that is read is used a few times only.
    """
    if linear:
        return 500 if batch <= _FEW else 200
    most = 450 if pixels <= 16 else 350 if pixels <= 64 else 250
    return most if batch <= _FEW else most - 100


def _as_events_read(kernel: Tensor, across: int) -> Tensor:
    """Return weights ``(channels, rows, phases, steps, outputs)`` of a kernel ``(outputs, channels, rows, columns)``.

    A column of the inputs reaches every ``across``-th column of the kernel, in the opposite order to the outputs.
    """
    outputs, channels, rows, columns = kernel.shape
    steps = -(-columns // across)
    found = kernel.new_zeros(channels, rows, across, steps, outputs)
    for column in range(columns):
        found[:, :, column % across, steps - 1 - column // across] = kernel[..., column].permute(1, 2, 0)
    return found
