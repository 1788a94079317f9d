"""The scan alone against the limit of memory: a copy of as many bytes on the same device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spiking_rl.neurons import LIF
from spiking_rl.scripts.speed.cases import LEAK
from spiking_rl.scripts.speed.timing import interleave, median_ratio, settler, times_of

_SHAPE = (256, 64, 32, 32)  # batch, channels, height, width: the first maps of VGG16, far larger than caches
_TIMESTEPS = (4, 1)
_FLOAT = 4  # bytes
_WAYS = {"forward": 2, "forward+backward": 5}  # tensors read and written: current, spikes; gradient, current, gradient

Key = tuple[str, int]


def scan_rows(
    *, rounds: int, seconds: float, device: torch.device, shape: tuple[int, ...] = _SHAPE
) -> list[dict[str, Any]]:
    """Return the rows of the scan from rest, forward and both ways, in float32.

    At T=1 the way forward without a gradient is a comparison, torch's own.

    Args:
        rounds: timings of each, at most.
        seconds: no round begins after that many.
        device: where it runs.
        shape: ``(B, *N)`` of a timestep.
    """
    runs: dict[Key, Callable[[], object]] = {}
    for timesteps in _TIMESTEPS:
        current = torch.rand(timesteps * shape[0], *shape[1:]).to(device, memory_format=torch.channels_last)
        neuron = LIF(threshold=0.8, leak=LEAK).to(device)
        runs["copy", timesteps] = _copying(current)
        runs["forward", timesteps] = _forward(neuron, current, timesteps)
        runs["forward+backward", timesteps] = _both_ways(neuron, current, timesteps)
    times = interleave(runs, rounds=rounds, seconds=seconds, settle=settler(device))
    rows = []
    for (way, timesteps), values in times.items():
        if way == "copy":
            continue
        size = _WAYS[way] * _FLOAT * timesteps * torch.Size(shape).numel()
        copied = [ms * _WAYS[way] / 2 for ms in times["copy", timesteps]]
        told = times_of(values)
        row = {
            "case": "scan",
            "network": "x".join(map(str, shape)),
            "pass": way,
            "library": "spiking-rl",
            "timesteps": timesteps,
            "batch": shape[0],
            "ratio_to_copy": median_ratio(values, copied),
            "gb_per_second": round(size / told["ms"] / 1e6, 1),
            "threads": torch.get_num_threads(),
            "device": device.type,
        }
        rows.append(row | told)
    return rows


def _copying(current: Tensor) -> Callable[[], object]:
    target = torch.empty_like(current)
    return lambda: target.copy_(current)


def _forward(neuron: LIF, current: Tensor, timesteps: int) -> Callable[[], object]:
    return torch.no_grad()(lambda: neuron.fresh(current, timesteps))


def _both_ways(neuron: LIF, current: Tensor, timesteps: int) -> Callable[[], object]:
    leaf = current.clone().requires_grad_()
    gradient = torch.rand_like(current)

    def run() -> None:
        leaf.grad = None
        neuron.fresh(leaf, timesteps).backward(gradient)  # type: ignore[no-untyped-call]

    return run
