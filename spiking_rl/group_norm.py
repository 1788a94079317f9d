"""Group normalisation of images that lie channels last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spiking_rl.watching import is_transforming


class _Together(torch.autograd.Function):
    """The inputs as they are, to which the parameters' gradients lead as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*grads, *[None] * ctx.parameters)


class GroupNorm(nn.GroupNorm):
    """An ``nn.GroupNorm`` whose parameters may be asked for their gradients alone.

    Of inputs that lie channels last torch crashes on a CPU (2.13, a segmentation fault) where the gradient of weight or
    bias is asked for and that of the inputs is not: the layers before it are frozen, or somebody goes through a network
    parameter by parameter, as TRPO does. Here the inputs' gradient is computed whenever a parameter's is.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(B, C, *N)`` normalised."""
        if torch.is_grad_enabled() and input.is_cpu and not torch.compiler.is_compiling() and not is_transforming():
            parameters = [p for p in (self.weight, self.bias) if p is not None and p.requires_grad]
            if parameters:
                input = _Together.apply(input, *parameters)  # type: ignore[no-untyped-call]
        return super().forward(input)
