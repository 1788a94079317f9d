"""Firing, and the surrogate gradient that stands in for its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spiking_rl.fused_fresh import fused_fresh
from spiking_rl.watching import is_transforming

DEFAULT_GAMMA = 0.3
"""Height of the surrogate gradient at threshold, as in all three papers."""


def surrogate_derivative(potential: Tensor, threshold: Tensor, gamma: float) -> Tensor:
    """Return the stand-in for ds/du: ``gamma/threshold * max(0, 1 - |u/threshold - 1|)``.

    Args:
        potential: membrane potential before reset, any shape ``(..., *N)``.
        threshold: positive, broadcasts against ``potential``.
        gamma: height of the triangle at threshold, > 0.

    Returns:
        A tensor shaped as ``potential``.

    Source: Bellec et al. 2018; used by DIET-SNN (Rathi, Roy 2020) and temporal pruning
    (Chowdhury, Rathi, Roy 2022).
    """
    # In place: these tensors hold all timesteps, and memory traffic is the cost.
    triangle = (potential / threshold).sub_(1).abs_().neg_().add_(1).clamp_min_(0)
    return triangle.mul_(gamma / threshold)


class _Fire(torch.autograd.Function):
    """Made of torch's operations, there and back: it can be differentiated twice, and transformed by ``torch.func``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(potential: Tensor, threshold: Tensor, gamma: float) -> Tensor:
        return (potential > threshold).to(potential.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        potential, threshold, ctx.gamma = inputs
        ctx.save_for_backward(potential, threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        potential, threshold = ctx.saved_tensors
        grad_potential = grads[0] * surrogate_derivative(potential, threshold, ctx.gamma)
        grad_threshold = None
        if ctx.needs_input_grad[1]:
            # z = u/theta - 1, so ds/dtheta = -(u/theta) ds/du.
            grad_threshold = -(grad_potential * potential / threshold).sum_to_size(threshold.shape)
        return grad_potential, grad_threshold, None


def fire(potential: Tensor, threshold: Tensor, gamma: float = DEFAULT_GAMMA) -> Tensor:
    """Return spikes: 1 where the potential is strictly above threshold, else 0.

    Backward uses ``ds/du = gamma/threshold * max(0, 1 - |z|)`` with ``z = u/threshold - 1``, and
    ``ds/dthreshold = -(u/threshold) ds/du``.

    Args:
        potential: membrane potential before reset, any shape ``(..., *N)``.
        threshold: positive; its shape broadcasts against ``potential``.
        gamma: height of the surrogate gradient at threshold, > 0.

    Returns:
        Spikes in {0, 1}, shape and dtype of ``potential``.
    """
    learning = torch.is_grad_enabled() and (potential.requires_grad or threshold.requires_grad)
    # Acting with a batch of one is all overhead: skip the autograd machinery, and booleans on the way. Transforms know
    # no results in place, and the compiler cannot look through the question.
    if not learning and potential.dtype is torch.float32 and (torch.compiler.is_compiling() or not is_transforming()):
        return torch.gt(potential, threshold, out=torch.empty_like(potential))
    spikes = fused_fresh(potential, threshold, threshold, gamma, 1, 1)  # as many spikes with a gradient as without
    if spikes is None and not potential.is_cpu:
        from spiking_rl.gpu import triton_fire  # what CPUs need not load

        spikes = triton_fire(potential, threshold, gamma)
    return fire_reference(potential, threshold, gamma) if spikes is None else spikes


def fire_reference(potential: Tensor, threshold: Tensor, gamma: float = DEFAULT_GAMMA) -> Tensor:
    """Return what :func:`fire` does, in torch's own operations."""
    # A threshold that is one number would be rounded to the potential's halves, and one of many numbers not.
    wide = torch.promote_types(potential.dtype, threshold.dtype)
    spikes: Tensor = _Fire.apply(potential.to(wide), threshold, gamma)  # type: ignore[no-untyped-call]
    return spikes.to(potential.dtype)
