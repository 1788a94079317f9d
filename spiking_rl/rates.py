"""Firing rates in one pass: what LIF neurons fire for a current that lasts, without a loop over timesteps.

A network that learns on them costs what a ReLU network costs, whatever T is, and knows already that a neuron can only
say k / T. What it does not know is when spikes arrive; training on spikes is left with that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FiringRate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, threshold: Tensor, timesteps: int) -> Tensor:
        ctx.save_for_backward(current, threshold)
        ctx.timesteps = timesteps
        # In place: of large batches memory traffic is the cost. A spike needs a potential strictly above threshold.
        counts = (current * (timesteps / threshold)).ceil_().sub_(1).clamp_(0, timesteps)
        return counts.div_(timesteps).to(current.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        current, threshold = ctx.saved_tensors
        grad = grads[0]
        scaled = (current / threshold).to(grad.dtype)
        # Nothing but where it is between the two bounds, in one pass.
        within = torch.ops.aten.hardtanh_backward(grad, scaled, 0.0, 1 + 1 / ctx.timesteps)
        of_threshold = None
        if ctx.needs_input_grad[1]:
            of_threshold = -((within * scaled).sum_to_size(threshold.shape) / threshold)
        return (within / threshold).to(current.dtype), of_threshold, None


def firing_rate(current: Tensor, threshold: Tensor, timesteps: int) -> Tensor:
    """Return the spikes per timestep of LIF neurons with leak 1, from rest, for a current that lasts T timesteps.

    That is ``clip(ceil(T * I / threshold) - 1, 0, T) / T``, but for currents within rounding of where a spike is gained
    (in bfloat16, a hundredth of them): the charge ``T * I`` pays for so many soft resets, and a neuron fires once per
    timestep at most. A current that changes may give fewer, since what arrives late is left in the membrane.

    Args:
        current: I, any shape ``(..., *N)``.
        threshold: positive, broadcasts against ``current``.
        timesteps: T >= 1.

    Returns:
        Rates in {0, 1/T, ..., 1}, shape and dtype of ``current``.

    Gradients: straight through the steps, ``1/threshold`` for currents between 0 and ``(1 + 1/T) * threshold`` and 0
    outside, and ``-I/threshold`` times that for the threshold.

    Source: quantised activations for low-latency conversion (Bu et al. 2022), without their shift by half a step: these
    neurons start from rest.
    """
    rates: Tensor = _FiringRate.apply(current, threshold, timesteps)  # type: ignore[no-untyped-call]
    return rates
