"""Convolutions of feature maps of a few pixels a side, fast on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_NARROW = {torch.bfloat16: 8, torch.float32: 4}  # maps of at most so many columns gain from it
_FEW_CHANNELS = 8
_WIDE = 40  # columns that are enough


class SmallMapConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` that lays narrow maps side by side before it convolves them on a CPU.

    The CPU's kernels work on the columns of a map, 16 and more at once. The last layers of a VGG have four or two,
    and leave most of the arithmetic idle. Several images of a batch in a row, a column of zeros between them (two,
    where a stride of 2 wants an even number), are one wide map with the same 3x3 convolution: what padding would
    have added to every image, that column adds. On maps of two columns, 128 images a batch, it is three (float32) to
    nine times (bfloat16) as fast. Parameters, shapes and results are those of ``nn.Conv2d``, up to rounding.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kind = _arithmetic(input)
        together, place = self._layout(input, kind)
        if not together:
            return self._convolve(input, weight, bias)
        wide = self._convolve(_side_by_side(input.to(kind), together, place), weight, bias)
        return _apart(wide, together, math.ceil(input.shape[3] / self.stride[1]))

    def _convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.kernel_size == (1, 1) and max(self.stride) > 1 and input.is_cpu and self.in_channels < _FEW_CHANNELS:
            # Of fewer than eight channels torch 2.13 writes beyond its memory (float32, channels last).
            if self.padding_mode != "zeros" or isinstance(self.padding, str):
                return super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return]
            down, across = self.padding
            input = functional.pad(input, (across, across, down, down)) if any(self.padding) else input
            input = input[..., :: self.stride[0], :: self.stride[1]].contiguous(memory_format=torch.channels_last)
            return functional.conv2d(input, weight, bias, 1, 0, self.dilation, self.groups)
        return super()._conv_forward(input, weight, bias)  # type: ignore[no-any-return]

    def _layout(self, input: Tensor, kind: torch.dtype) -> tuple[int, int]:
        """Return how many images to lay side by side, 0 for none, and the columns that each takes."""
        plain = self.kernel_size == (3, 3) and self.stride in ((1, 1), (2, 2)) and self.padding == (1, 1)
        if not plain or self.dilation != (1, 1) or self.groups != 1 or self.padding_mode != "zeros":
            return 0, 0
        if input.device.type != "cpu" or input.dim() != 4:
            return 0, 0
        if torch.compiler.is_compiling():
            return 0, 0  # what is exported shall take batches of any size
        images, columns = input.shape[0], input.shape[3]
        if not images or columns > _NARROW.get(kind, 0):
            return 0, 0
        stride = self.stride[1]
        place = stride * (columns // stride + 1)  # a multiple of the stride: the next image begins on a step
        together = next(n for n in range(_WIDE // place, 0, -1) if images % n == 0)
        # A single column at stride 2 is made wider even alone: torch 2.13 leaves gradients unwritten (bfloat16).
        return (together, place) if together > 1 or columns < stride else (0, 0)


def gradients(
    layer: nn.Conv2d, gradient: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of a convolution's inputs, weights and bias, narrow maps side by side.

    Args:
        layer: without groups and dilation.
        gradient: of its outputs.
        input: what they were made of.
        weight: of the layer, of the same type as the others.
        wanted: which of the three.
    """
    together, place = layer._layout(input, input.dtype) if isinstance(layer, SmallMapConv2d) else (0, 0)
    columns = input.shape[3]
    if together:
        gradient = _side_by_side(gradient, together, place // layer.stride[1])
        input = _side_by_side(input, together, place)
    found = torch.ops.aten.convolution_backward(
        gradient, input, weight, weight.shape[:1], layer.stride, layer.padding, (1, 1), False, (0, 0), 1, wanted
    )
    of_input, of_weight, of_bias = found
    return (_apart(of_input, together, columns) if together and wanted[0] else of_input), of_weight, of_bias


def _arithmetic(input: Tensor) -> torch.dtype:
    """Return the type in which a CPU convolves: autocast's, which leaves doubles alone."""
    cast = torch.is_autocast_enabled("cpu") and input.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if cast else input.dtype


def _side_by_side(maps: Tensor, together: int, place: int) -> Tensor:
    """Return ``(B / n, C, H, n * place)`` of ``(B, C, H, W)``, channels last, zeros behind the W columns of each."""
    images, channels, rows, columns = maps.shape
    pixels = maps.permute(0, 2, 3, 1).reshape(images // together, together, rows, columns, channels).transpose(1, 2)
    wide = functional.pad(pixels, (0, 0, 0, place - columns))
    return wide.reshape(images // together, rows, together * place, channels).permute(0, 3, 1, 2)


def _apart(wide: Tensor, together: int, columns: int) -> Tensor:
    """Undo :func:`_side_by_side`, with what stands behind each image's columns left out."""
    rows_of_images, channels, rows, across = wide.shape
    pixels = wide.permute(0, 2, 3, 1).reshape(rows_of_images, rows, together, across // together, channels)
    apart = pixels[..., :columns, :].transpose(1, 2).reshape(rows_of_images * together, rows, columns, channels)
    return apart.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)  # a copy for one row of images only
