"""Muon for convolutions, whose updates have singular values of about 1 (Jordan et al. 2024); Adam for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spiking_rl.state import ADAM, MOMENTUM

_MOMENTUM = 0.9
_BETAS = (0.9, 0.99)
_OTHERS = 1 / 30  # Adam's learning rate as a part of Muon's
_STEPS = 5
_QUINTIC = (3.4445, -4.775, 2.0315)  # Jordan's: takes singular values from above 0.01 to about 1 in five steps
_TINY = 1e-7
_GROUPS = 3


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return a matrix ``(m, n)`` with its singular values brought to about 1 by Newton-Schulz iterations.

    Those of at least a hundredth of the matrix' norm come out between 0.6 and 1.2, smaller ones below. In the
    arithmetic of the matrix; bfloat16 will do.
    """
    wide = len(matrix) <= matrix.shape[1]
    x = matrix if wide else matrix.mT
    x = x / x.norm().clamp(min=_TINY)  # then no singular value is above 1
    x = _by_gram(x) if x.dtype == torch.float32 else _plainly(x)
    return x if wide else x.mT


def _plainly(x: Tensor) -> Tensor:
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor) -> Tensor:
    """Do the same with ``G = x x^T`` alone: every iteration multiplies x by a polynomial of it, and G by its square.

    Kernels have several times as many columns as rows, and only two products see them. Small eigenvalues of G are
    squares of small singular values, for which bfloat16 has no digits.
    """
    a, b, c = _QUINTIC
    gram, product = x @ x.mT, None
    for step in range(_STEPS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step < _STEPS - 1:
            gram = factor @ gram @ factor
    assert product is not None
    return product @ x


class Muon(torch.optim.Optimizer):
    """Train kernels of convolutions by Muon, and everything else by Adam at a thirtieth of the learning rate.

    A kernel ``(C_out, C_in, h, w)`` is a matrix of ``C_out`` rows. ``lr`` of the first group holds for all.
    :class:`torch.optim.Muon` does the same to matrices alone.

    Args:
        kernels: four-dimensional.
        matrices: other parameters whose weights decay.
        others: parameters that do not decay.
        lr: learning rate; an update of a kernel has a spectral norm of about that, more where there are more rows
            than columns.
        weight_decay: of kernels and matrices, taken off as a part ``lr * weight_decay`` per update; as a part
            ``lr / 30 * weight_decay`` of matrices.
        arithmetic: in which updates are orthogonalised.
    """

    def __init__(
        self,
        kernels: Iterable[nn.Parameter],
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        arithmetic: torch.dtype = torch.float32,
    ) -> None:
        first = {"params": list(kernels), "weight_decay": weight_decay, "moments": MOMENTUM}
        rest = [
            {"params": list(parameters), "weight_decay": decay, "moments": ADAM, "fused": True}
            for parameters, decay in ((matrices, weight_decay), (others, 0.0))
        ]
        super().__init__([first, *rest], {"lr": lr, "arithmetic": arithmetic})
        self._adam = self._new_adam()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state, of a copy or of a file."""
        super().__setstate__(state)
        self._adam = self._new_adam()

    def _new_adam(self) -> torch.optim.AdamW:
        groups = [{"params": group["params"], "fused": True} for group in self.param_groups[1:]]
        return torch.optim.AdamW(groups, betas=_BETAS)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse more groups than there are.

        Raises:
            ValueError: after construction.
        """
        if len(self.param_groups) == _GROUPS:
            raise ValueError("has its three groups; make another optimiser for more parameters")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make one update; a parameter without a gradient stays as it is.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("takes no closure; run the backward pass before")
        kernels = self.param_groups[0]
        for kernel in kernels["params"]:
            if kernel.grad is not None:
                self._update(kernel, kernels)
        self._adam.state = self.state  # one state, saved and restored as one
        for own, group in zip(self.param_groups[1:], self._adam.param_groups, strict=True):
            group["lr"], group["weight_decay"] = kernels["lr"] * _OTHERS, own["weight_decay"]
        self._adam.step()

    def _update(self, kernel: nn.Parameter, group: dict[str, Any]) -> None:
        assert kernel.grad is not None
        rate, decay = group["lr"], group["weight_decay"]
        slots = self.state[kernel]
        if not slots:
            slots["momentum_buffer"] = torch.zeros_like(kernel)
        momentum = slots["momentum_buffer"].lerp_(kernel.grad, 1 - _MOMENTUM)
        ahead = kernel.grad.lerp(momentum, _MOMENTUM)  # Nesterov's
        # In the order in which channels-last kernels lie in memory; that of the columns does not matter.
        pixels = ahead.permute(0, 2, 3, 1)
        update = orthogonalise(pixels.reshape(len(ahead), -1).to(group["arithmetic"]))
        update = update.reshape(pixels.shape).permute(0, 3, 1, 2)
        rows, columns = len(kernel), kernel[0].numel()
        kernel.mul_(1 - rate * decay).add_(update.to(kernel.dtype), alpha=-rate * math.sqrt(max(1.0, rows / columns)))
