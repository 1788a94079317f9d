"""Layers whose inputs are mostly silent, in training and in use: zeros are left out of their sums, on a CPU.

Of the three products of a convolution's training pass two have its inputs in them: the outputs, and the gradient of the
weights. Both are summed up from the active inputs alone (``events.c``); nothing but the order of the sums changes, and
in bfloat16 (under autocast) that neither weights nor their gradients are rounded to it. The third, the gradient of the
inputs, is computed as ever.

How many inputs are active decides: where they are many the layer computes as it would have. For the gradient of 3x3
convolutions that may be up to half of them, since torch takes up to twice the time of the outputs for it: there many
a ReLU's outputs are few, too.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from spiking_rl.arithmetic import has_bfloat16
from spiking_rl.compiling import built_events
from spiking_rl.events import Map, empty_outputs, is_plain_convolution, sizes_of, takes, threads_of
from spiking_rl.small_maps import gradients
from spiking_rl.watching import is_transforming

_STORED = (torch.float32, torch.bfloat16)
_FEWEST = 2  # frames: for one, weights are read once in any case, and all that is asked about it costs
_CONVOLUTIONS_FROM = 2**13  # weights from which adding up events wins
_PLACES_FROM = 64  # of its outputs, in all samples: for fewer it does not pay to bring its weights into order
_LINEAR_FROM = 2**17
_CLEARLY = 1.1  # times as many inputs as may be active, in a few pixels: no need to count them all
_FRAMES = 8  # of a linear map, up to which reading only the active inputs' weights wins
_MOST_OF_ROWS = {True: 600, False: 400}  # inputs in a thousand that may be active for it in any of few frames, of more
_A_DECISIONS = 4  # frames: its timesteps, one by one; their weights come from afar, and what is not read is saved
# How many inputs may be active, in a thousand, is measured, on two processors (AMD Zen 3 and Zen 4; beside tiles on an
# Intel Emerald Rapids): with 16 lanes torch's own loops gain more than events, which wait for weights.
_SIXTEEN_LANES = torch.backends.cpu.get_cpu_capability() == "AVX512"
_FAST_HALVES = has_bfloat16()
_HAS_TILES = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())  # torch multiplies matrices by them
# Of maps of up to 4, 16 and 64 places, in bfloat16 beside tiles:
_CONVOLVED_BESIDE_TILES = (90, 55, 0)
_WEIGHED_BESIDE_TILES = (170, 110, 50)
_MANY = 128  # outputs, from which a list of events is read often enough to pay for itself
_RELU = 400  # so many must be allowed to be active before ReLU's outputs are worth asking about
_EVERYBODYS = (  # hooks of all modules
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)
# Of gradients, which torch.autograd.grad takes with is_grads_batched.
_is_batch = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", lambda _: False)


class _Strides(ctypes.Structure):
    """How a kernel lies in memory, as events.c has it."""

    _fields_ = [(name, ctypes.c_int64) for name in ("outputs", "channels", "row", "column")]


def through_events(layer: nn.Module, x: Tensor, *, spikes: bool = True) -> Tensor:
    """Return ``layer(x)``, where ``x`` is what spiking neurons or ReLU gave.

    A convolution must see pictures that lie channels last.

    Args:
        layer: a convolution, a linear map, or an ``nn.Sequential`` whose first of these sees ``x`` or means of it.
            Anything else, and any that somebody listens to, is called as it is.
        x: ``(B, *N)``.
        spikes: ``x`` are spikes; of ReLU's outputs too many are active for anything but the gradient of the weights.
    """
    if torch.compiler.is_compiling():  # before the compiler makes conditions of what is asked here
        return layer(x)  # type: ignore[no-any-return]
    if x.shape[0] < _FEWEST or not x.is_cpu or x.dtype not in _STORED or any(_EVERYBODYS):
        return layer(x)  # type: ignore[no-any-return]
    if type(layer) is not nn.Sequential or not is_plain(layer):
        found = _by_events(layer, x, spikes)
        return layer(x) if found is None else found
    sees_events = True
    for part in layer._modules.values():
        found = None
        if sees_events and isinstance(part, (nn.Conv2d, nn.Linear)):
            found, sees_events = _by_events(part, x, spikes), False
        x = part(x) if found is None else found
    return x


def is_plain(layer: nn.Module) -> bool:
    """Tell whether nobody listens to a module or has put a function of theirs in its place."""
    listeners = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not listeners and "forward" not in layer.__dict__


def _by_events(layer: nn.Module, x: Tensor, spikes: bool) -> Tensor | None:
    """Return what a map gives by events; None where it had better compute itself."""
    if type(layer) is nn.Linear:
        return _linear(layer, x) if spikes and not torch.is_grad_enabled() else None
    if not is_plain_convolution(layer):
        return None
    assert isinstance(layer, nn.Conv2d)
    weight = layer._parameters.get("weight")
    if weight is None or weight.numel() < _CONVOLUTIONS_FROM or x.dim() != 4:
        return None
    last = torch.channels_last
    if not (is_plain(layer) and x.is_contiguous(memory_format=last)):
        return None
    if not _may(weight, layer.bias, x) or not (weight.is_contiguous() or weight.is_contiguous(memory_format=last)):
        return None
    sizes = _sizes(x.shape, weight.shape, layer.stride, layer.padding, x.dtype)
    if sizes is None or sizes.batch * sizes.rows * sizes.columns < _PLACES_FROM:
        return None
    training = torch.is_grad_enabled()
    weighed = _most_weighed(sizes, x.dtype) if training else 0  # none without a gradient
    if not spikes and weighed < _RELU:
        return None
    allowed = max(sizes.most if spikes else 0, weighed)
    if not allowed or _sampled(x) > _CLEARLY * allowed:
        return None
    if not training:
        return _convolved(sizes, x, weight, layer.bias)[0]
    return _Convolution.apply(x, weight, layer.bias, sizes, layer, spikes)  # type: ignore[no-any-return, no-untyped-call]


def _may(weight: Tensor, bias: Tensor | None, x: Tensor) -> bool:
    """Tell whether the loops may read inputs and parameters, and nobody asks for more than values and gradients."""
    if bias is not None and not (_is_ordinary(bias) and bias.shape == weight.shape[:1] and bias.is_contiguous()):
        return False
    stored = x.dtype
    if not _is_ordinary(weight) or _arithmetic() is not stored or built_events(stored) is None:
        return False
    return takes(x, stored)


def _arithmetic() -> torch.dtype:
    """Return the type in which torch multiplies by weights of 32-bit floats."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def _is_ordinary(parameter: Tensor) -> bool:
    ours = type(parameter) in (Tensor, nn.Parameter) and parameter.dtype is torch.float32
    return ours and parameter.is_cpu and not parameter.is_neg()


@functools.lru_cache(maxsize=4096)
def _sizes(
    shape: torch.Size, kernel: torch.Size, stride: tuple[int, int], padding: tuple[int, int], stored: torch.dtype
) -> Map | None:
    found = sizes_of(shape, kernel, stride, padding)
    if found is not None:
        found.most = _most_convolved(found, stored)
    return found


def _sampled(x: Tensor) -> int:
    """Return how many in a thousand of ``(B, C, H, W)``, channels last, are active where a few pixels are looked at."""
    batch, channels, rows, columns = x.shape
    return built_events(x.dtype).events_sample(x.data_ptr(), batch * rows * columns, channels)  # type: ignore[union-attr, no-any-return]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor | None:
    """Return what a linear map gives of a few frames; None where many inputs are active."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.numel() < _LINEAR_FROM or x.shape[0] > _FRAMES or not weight.is_contiguous():
        return None
    if x.dtype is not torch.float32:
        return None
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or not (is_plain(layer) and _may(weight, layer.bias, x)):
        return None
    loops, x, bias = built_events(), x.contiguous(), layer.bias
    outputs = x.new_empty(len(x), len(weight))
    sizes = (*x.shape, len(weight), _MOST_OF_ROWS[x.shape[0] <= _A_DECISIONS], torch.get_num_threads())
    addresses = (weight.data_ptr(), None if bias is None else bias.data_ptr(), outputs.data_ptr())
    return outputs if loops.events_rows(*sizes, x.data_ptr(), *addresses) else None  # type: ignore[union-attr]


def _convolved(sizes: Map, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, int]:
    """Return a convolution's outputs, None where many inputs are active, and how many in a thousand are."""
    loops, outputs = built_events(x.dtype), empty_outputs(sizes, x.dtype)
    scratch, own = _scratch(sizes), _Strides(*weight.stride())
    density = ctypes.c_int64(1000)
    told = (ctypes.addressof(sizes), threads_of(sizes), x.data_ptr(), ctypes.addressof(own), weight.data_ptr())
    addresses = (scratch.data_ptr(), None if bias is None else bias.data_ptr(), outputs.data_ptr())
    found = loops.events_run(*told, *addresses, ctypes.addressof(density))  # type: ignore[union-attr]
    return outputs if found else None, density.value


def _scratch(sizes: Map) -> Tensor:
    """Return room for weights in the order in which events meet them."""
    steps = -(-sizes.wide // sizes.across)
    shape = (sizes.channels, sizes.tall, sizes.across, steps, sizes.outputs)
    make = torch.empty if sizes.wide % sizes.across == 0 else torch.zeros  # steps behind the kernel's end stay 0
    return make(shape, dtype=torch.float32, device="cpu")


class _Convolution(torch.autograd.Function):
    """A convolution with its gradient, each by events or not."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Map, layer: nn.Conv2d, spikes: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        outputs = None
        if spikes and sizes.most:
            outputs, density = _convolved(sizes, x, weight, bias)
        else:
            density = built_events(x.dtype).events_density(x.data_ptr(), x.numel(), threads_of(sizes))  # type: ignore[union-attr]
        ctx.sizes, ctx.layer, ctx.few = sizes, layer, density <= _most_weighed(sizes, x.dtype)
        if outputs is None:
            # Rounded here, not by autocast: torch 2.8 keeps for others, too, what it rounds without gradients.
            small = None if bias is None else bias.to(x.dtype)
            outputs = layer._conv_forward(x, weight.to(x.dtype), small)
            outputs = outputs.clone() if outputs._is_view() else outputs  # views made here must not be written to
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        kernel = weight.to(x.dtype)  # what torch multiplies by, too
        # Torch's own operations have second derivatives, and can be vectorised.
        if torch.is_grad_enabled() or is_transforming() or _is_batch(gradient) or not ctx.few:
            found = gradients(ctx.layer, gradient, x, kernel, (of_x, of_weight, of_bias))
            asked = zip(found, ctx.needs_input_grad[:3], (x.dtype, *[weight.dtype] * 2), strict=True)
            return *(g.to(dtype) if g is not None and needed else None for g, needed, dtype in asked), *_REST
        gradient = gradient.contiguous(memory_format=torch.channels_last).resolve_neg()
        pixels = gradient.permute(0, 2, 3, 1).reshape(-1, ctx.sizes.outputs)
        return (
            gradients(ctx.layer, gradient, x, kernel, (True, False, False))[0] if of_x else None,
            _weighed(ctx.sizes, x, gradient, weight) if of_weight else None,
            pixels.sum(0, dtype=torch.float32) if of_bias else None,
            *_REST,
        )


_REST = (None, None, None)  # of what has no gradient


def _weighed(sizes: Map, x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the weights."""
    x = x.contiguous(memory_format=torch.channels_last)  # hooks may have stored it otherwise
    loops, scratch, found = built_events(x.dtype), _scratch(sizes), torch.empty_like(weight)
    own = _Strides(*found.stride())
    told = (ctypes.addressof(sizes), threads_of(sizes), x.data_ptr(), gradient.data_ptr())
    if not loops.events_weigh(*told, ctypes.addressof(own), found.data_ptr(), scratch.data_ptr()):  # type: ignore[union-attr]
        raise MemoryError("no memory for the gradient of a convolution")
    return found


def _most_convolved(sizes: Map, stored: torch.dtype = torch.float32) -> int:
    """Return how many inputs in a thousand may be active for the outputs: fewer than where loops draw level."""
    few, places = sizes.batch <= _A_DECISIONS, sizes.rows * sizes.columns
    strides = sizes.down > 1 or sizes.across > 1
    if stored is torch.bfloat16 and _FAST_HALVES:
        return _most_of_halves(sizes, _CONVOLVED_BESIDE_TILES)
    if _SIXTEEN_LANES and few:
        return 120
    if strides:
        return 70 if _SIXTEEN_LANES else 250 if few else 120
    if few:
        return 350 if places <= 64 else 200
    if _SIXTEEN_LANES and sizes.outputs < _MANY:
        return 90
    if places <= 16:
        return 220 if _SIXTEEN_LANES else 300
    return 200 if places <= 64 else 150


def _most_weighed(sizes: Map, stored: torch.dtype = torch.float32) -> int:
    """Return how many inputs in a thousand may be active for the gradient of the weights.

    Torch takes twice as long for it as for the outputs where a map is small and its channels are many.
    """
    places = sizes.rows * sizes.columns
    if stored is torch.bfloat16 and _FAST_HALVES:
        return _most_of_halves(sizes, _WEIGHED_BESIDE_TILES)
    if (sizes.tall, sizes.wide, sizes.down, sizes.across) != (3, 3, 1, 1):
        return 80 if _SIXTEEN_LANES else 150
    many = sizes.outputs >= _MANY
    if not _SIXTEEN_LANES:
        return 500 if many and places <= 256 else 300
    if not many:
        return 90
    return 400 if places <= 16 else 250 if places <= 64 else 200


def _most_of_halves(sizes: Map, beside_tiles: tuple[int, int, int]) -> int:
    """Return the same for either, of bfloat16 where the processor multiplies it.

    Args:
        sizes: of the map.
        beside_tiles: what it is of maps of up to 4, 16 and 64 places, on a processor with tiles.
    """
    if (sizes.tall, sizes.wide, sizes.down, sizes.across) != (3, 3, 1, 1):
        return 0
    places = sizes.rows * sizes.columns
    if _HAS_TILES:
        if places > 64 or sizes.outputs < _MANY:
            return 0
        return beside_tiles[0 if places <= 4 else 1 if places <= 16 else 2]
    if sizes.outputs < _MANY:
        return 70
    return 180 if places <= 16 else 140 if places <= 64 else 90
