"""Gradients that leave the scan take the memory of those that arrive, unless somebody else holds these."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spiking_rl import LIF, compiling, fused_fresh, holders

needs_compiler = pytest.mark.skipif(compiling.built_loops() is None, reason="no C compiler here")


def spikes_and_score(timesteps: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return a current, its spikes, and a scalar of them; the same at every call."""
    torch.manual_seed(0)
    current = torch.randn(8, 16, requires_grad=True)
    spikes = LIF().fresh(current, timesteps)
    return current, spikes, nn.Linear(16, 3)(spikes).square().sum()


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return the list of what each backward pass of a scan will have found."""
    found: list[bool] = []

    def spy(grads: tuple[Tensor, ...]) -> bool:
        # One function more stands in between, with no name of its own for what it hands on.
        found.append(holders._holders(grads) == holders._fewest())
        return found[-1]

    monkeypatch.setattr(fused_fresh, "held_alone", spy)
    return found


@needs_compiler
@pytest.mark.usefixtures("scan_in_python")
@pytest.mark.parametrize("timesteps", [1, 2])
def test_it_makes_no_difference(timesteps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for answer in (True, False):
        monkeypatch.setattr(fused_fresh, "held_alone", lambda _, answer=answer: answer)
        current, _, score = spikes_and_score(timesteps)
        score.backward()
        found.append(current.grad)
    assert found[0] is not None
    assert bool(found[0].any())
    assert torch.equal(found[0], found[1])  # type: ignore[arg-type]


@needs_compiler
@pytest.mark.usefixtures("scan_in_python")
@pytest.mark.skipif(
    not hasattr(torch.ones(1), "_use_count") or torch.__version__.startswith("2.8."),
    reason="this torch does not count holders",
)
def test_a_gradient_of_its_own_is_written_over(inside: list[bool]) -> None:
    spikes_and_score()[2].backward()
    assert inside == [True]


def by_hook(spikes: Tensor, score: Tensor) -> Tensor:
    kept: list[Tensor] = []
    spikes.register_hook(kept.append)
    score.backward()
    return kept[0]


def by_asking(spikes: Tensor, score: Tensor) -> Tensor:
    return torch.autograd.grad(score, [spikes, _current(spikes)])[0]


def by_handing_it_in(spikes: Tensor, score: Tensor) -> Tensor:
    grad = torch.autograd.grad(score, spikes, retain_graph=True)[0]
    spikes.backward(grad)
    return grad


def by_a_view(spikes: Tensor, score: Tensor) -> Tensor:
    kept: list[Tensor] = []
    spikes.register_hook(lambda grad: kept.append(grad[:]))
    score.backward()
    return kept[0]


def by_a_sum(spikes: Tensor, score: Tensor) -> Tensor:
    """The gradient of a sum goes to both of its parts: the one that comes last needs what the first was given."""
    current = _current(spikes)
    twin = current.detach().clone().requires_grad_()
    (LIF().fresh(twin, 2) + spikes).mul(_grad_of(spikes)).sum().backward()
    assert twin.grad is not None
    assert current.grad is not None
    torch.testing.assert_close(twin.grad, current.grad, rtol=0, atol=0)
    return _grad_of(spikes)


def from_an_array(spikes: Tensor, score: Tensor) -> Tensor:
    """The memory is numpy's, which torch does not count."""
    array = _grad_of(spikes).numpy()
    spikes.register_hook(lambda grad: torch.from_numpy(array))
    score.backward()
    return torch.from_numpy(array)


def by_its_memory(spikes: Tensor, score: Tensor) -> Tensor:
    kept: list[torch.UntypedStorage] = []
    spikes.register_hook(lambda grad: kept.append(grad.untyped_storage()))
    score.backward()
    return torch.empty(0).set_(kept[0], 0, spikes.shape)


def by_calling_the_function(spikes: Tensor, score: Tensor) -> Tensor:
    grad = _grad_of(spikes)
    with torch.no_grad():
        assert spikes.grad_fn is not None
        getattr(spikes.grad_fn, "apply", spikes.grad_fn)(grad)  # type: ignore[operator]
    return grad


def _grad_of(spikes: Tensor) -> Tensor:
    _, again, score = spikes_and_score()
    assert torch.equal(spikes, again)
    return torch.autograd.grad(score, again)[0]


def _current(spikes: Tensor) -> Tensor:
    assert spikes.grad_fn is not None
    leaves = [f.variable for f, _ in spikes.grad_fn.next_functions if hasattr(f, "variable")]
    (current,) = (leaf for leaf in leaves if leaf.shape == spikes.shape)
    return current


KEEPERS = [
    by_hook,
    by_asking,
    by_handing_it_in,
    by_a_view,
    by_a_sum,
    from_an_array,
    by_its_memory,
    by_calling_the_function,
]


@needs_compiler
@pytest.mark.usefixtures("scanning")
@pytest.mark.parametrize("keep", KEEPERS)
def test_whoever_holds_a_gradient_keeps_it(keep: Callable[[Tensor, Tensor], Tensor]) -> None:
    _, spikes, score = spikes_and_score()
    assert torch.equal(keep(spikes, score), _grad_of(spikes))


@needs_compiler
@pytest.mark.usefixtures("scan_in_python")
def test_where_torch_does_not_count_holders_everything_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "_holders", lambda grads: None)
    holders._fewest.cache_clear()
    try:
        _, spikes, score = spikes_and_score()
        assert torch.equal(by_hook(spikes, score), _grad_of(spikes))
        assert not holders.held_alone((torch.ones(1),))
    finally:
        holders._fewest.cache_clear()
