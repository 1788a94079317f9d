"""Muon: against torch's for matrices, for kernels in any memory format, and resumed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spiking_rl.state import pack_optimiser, unpack_optimiser
from spiking_rl.vision.muon import Muon, orthogonalise


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_singular_values_come_out_near_one(rows: int, columns: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(rows * 41 + columns)
    rank = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, rank, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, rank, generator=generator))
    values = torch.rand(rank, generator=generator) * 0.95 + 0.05
    matrix = left @ torch.diag(values) @ right.T
    found = left.T @ orthogonalise(scale * matrix) @ right
    assert float(found.diagonal().min()) > 0.5
    assert float(found.diagonal().max()) < 1.3
    torch.testing.assert_close(found, torch.diag(found.diagonal()), atol=1e-3, rtol=0)  # singular vectors stay


@pytest.mark.parametrize(("rows", "columns"), [(16, 144), (16, 16), (50, 10)])
@pytest.mark.parametrize("least", [-2, -7])
def test_the_iterations_on_the_gram_matrix_are_the_plain_ones(rows: int, columns: int, least: int) -> None:
    torch.manual_seed(0)
    rank = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in (rows, columns))
    matrix = left @ torch.diag(torch.logspace(0, least, rank, dtype=torch.float64)) @ right.T
    plain = orthogonalise(matrix)  # float64 iterates on the matrix itself
    torch.testing.assert_close(orthogonalise(matrix.float()).double(), plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero(dtype: torch.dtype) -> None:
    assert not orthogonalise(torch.zeros(3, 5, dtype=dtype)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (40, 2, 3, 3), (6, 10, 1, 1)])
def test_a_kernel_is_updated_as_torch_updates_a_matrix(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(shape))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    ours = Muon([kernel], [], [], lr=0.1, weight_decay=0.2, arithmetic=torch.bfloat16)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.2, momentum=0.9)
    for _ in range(3):
        kernel.grad = torch.randn(shape)
        matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=5e-3)


def test_the_memory_format_makes_no_difference() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(8, 4, 3, 3), [torch.randn(8, 4, 3, 3) for _ in range(3)]
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        kernel = nn.Parameter(start.clone(memory_format=layout))
        optimizer = Muon([kernel], [], [], lr=0.1)
        for grad in grads:
            kernel.grad = grad.clone(memory_format=layout)
            optimizer.step()
        assert kernel.is_contiguous(memory_format=layout)
        found.append(kernel.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_everything_else_is_adams() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    mine, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    ours = Muon([nn.Parameter(torch.randn(2, 2, 3, 3))], mine[:1], mine[1:], lr=0.3, weight_decay=0.5)
    groups = [{"params": theirs[:1], "weight_decay": 0.5}, {"params": theirs[1:], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    for _ in range(3):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        ours.step()
        adam.step()
    torch.testing.assert_close(mine, theirs)


def test_a_copy_goes_on_as_the_original() -> None:
    torch.manual_seed(0)
    kernel, other = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.randn(5))
    pair = (kernel, other, Muon([kernel], [], [other], lr=0.1, weight_decay=0.3, arithmetic=torch.bfloat16))
    grads = [torch.randn_like(kernel), torch.randn_like(other)]
    found = []
    for mine in (copy.deepcopy(pair), pair):
        for parameter, grad in zip(mine[:2], grads, strict=True):
            parameter.grad = grad.clone()
        mine[2].step()
        found.append([parameter.detach() for parameter in mine[:2]])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    with pytest.raises(ValueError, match="three groups"):
        pair[2].add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="no closure"):
        Muon([nn.Parameter(torch.ones(1, 1, 1, 1))], [], [], lr=0.1).step(lambda: 0.0)


def test_a_restored_state_goes_on_as_the_original() -> None:
    torch.manual_seed(0)

    def parameters() -> list[nn.Parameter]:
        return [nn.Parameter(torch.ones(4, 2, 3, 3)), nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(7))]

    def step(optimizer: Muon, mine: list[nn.Parameter], grads: list[torch.Tensor]) -> None:
        for parameter, grad in zip(mine, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()

    first = parameters()
    ours = Muon(first[:1], first[1:2], first[2:], lr=0.1)
    grads = [[torch.randn_like(p) for p in first] for _ in range(3)]
    step(ours, first, grads[0])
    step(ours, first, grads[1])
    packed, scalars = pack_optimiser(ours)
    tensors = {name: tensor.clone() for name, tensor in packed.items()}  # a file would hold copies
    second = [nn.Parameter(p.detach().clone()) for p in first]
    again = Muon(second[:1], second[1:2], second[2:], lr=0.1)
    unpack_optimiser(again, tensors, scalars)
    step(ours, first, grads[2])
    step(again, second, grads[2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    smaller = nn.Parameter(torch.ones(4, 1, 3, 3))
    with pytest.raises(ValueError, match="not those of the network"):
        unpack_optimiser(Muon([smaller], second[1:2], second[2:], lr=0.1), tensors, scalars)


def test_counts_of_steps_in_other_bits_go_on() -> None:
    """A step over all parameters together would refuse them, in the middle of the training."""
    mine = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.RAdam(mine, foreach=True)
    for parameter in mine:
        parameter.grad = torch.ones(3)
    optimizer.step()
    tensors, scalars = pack_optimiser(optimizer)
    tensors["optimiser.0.step"] = tensors["optimiser.0.step"].half()
    unpack_optimiser(optimizer, tensors, scalars)
    optimizer.step()
    assert torch.equal(*mine)
