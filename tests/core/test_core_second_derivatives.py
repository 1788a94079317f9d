"""Gradients can be differentiated once more, whichever way the scan goes: natural gradients (TRPO) ask for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spiking_rl import LIF, LIFState, lif_scan, lif_scan_reference
from spiking_rl.group_norm import GroupNorm

STEPS, BATCH, NEURONS = 3, 4, 5


def drawn(kind: torch.dtype, repeat: int = 1) -> list[Tensor]:
    """Return current, membrane, leak and threshold, with potentials where the surrogate has a slope."""
    draw = torch.Generator().manual_seed(1)
    current = torch.rand(STEPS // repeat, BATCH, NEURONS, generator=draw, dtype=torch.float64)
    membrane = torch.rand(BATCH, NEURONS, generator=draw, dtype=torch.float64)
    leak, threshold = (torch.rand(NEURONS, generator=draw, dtype=torch.float64) / 2 + low for low in (0.3, 0.6))
    return [tensor.to(kind).requires_grad_() for tensor in (current, membrane, leak, threshold)]


def gradients(scan: Callable[..., object], given: list[Tensor], **options: object) -> list[Tensor]:
    """Return the differentiable gradients of a sum of all outputs, each with a weight."""
    current, membrane, leak, threshold = given
    found = scan(current, LIFState(membrane), leak, threshold, trace=True, **options)
    draw = torch.Generator().manual_seed(2)
    loss = torch.zeros((), dtype=current.dtype)
    for output in (found.spikes, found.state.membrane, found.potential):  # type: ignore[attr-defined]
        loss = loss + (output * torch.rand(output.shape, generator=draw)).sum()
    return list(torch.autograd.grad(loss, given, create_graph=True))


def second(found: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    """Return the gradients of a weighted sum of gradients."""
    draw = torch.Generator().manual_seed(3)
    loss = torch.stack([(g * torch.rand(g.shape, generator=draw)).sum() for g in found]).sum()
    return list(torch.autograd.grad(loss, given))


STARTS = torch.zeros(STEPS, BATCH, dtype=torch.bool)
STARTS[1, 2] = True
CASES = [{}, {"starts": STARTS}, {"repeat": STEPS}]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("scan", [lif_scan, lif_scan_reference])
def test_in_double_precision_they_are_differences_of_gradients(
    scan: Callable[..., object], options: dict[str, object]
) -> None:
    given = drawn(torch.float64, int(options.get("repeat", 1)))  # type: ignore[call-overload]
    exact = second(gradients(scan, given, **options), given)
    draw = torch.Generator().manual_seed(3)
    weights = [torch.rand(t.shape, generator=draw) for t in given]
    for tensor, slope in zip(given, exact, strict=True):
        way, step = torch.rand(tensor.shape, generator=draw, dtype=torch.float64), 1e-7
        sides = []
        for sign in (1, -1):
            moved = [(t + sign * step * way if t is tensor else t).detach().requires_grad_() for t in given]
            found = gradients(scan, moved, **options)
            sides.append(sum(float((g * w).sum().detach()) for g, w in zip(found, weights, strict=True)))
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float((slope * way).sum()), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("options", CASES)
def test_the_compiled_scan_has_the_plain_loops(options: dict[str, object]) -> None:
    exact, single = (drawn(kind, int(options.get("repeat", 1))) for kind in (torch.float64, torch.float32))  # type: ignore[call-overload]
    first = gradients(lif_scan, single, **options), gradients(lif_scan_reference, exact, **options)
    for ours, right in zip(*first, strict=True):
        torch.testing.assert_close(ours, right.float(), rtol=1e-4, atol=1e-4)
    for ours, right in zip(second(first[0], single), second(first[1], exact), strict=True):
        torch.testing.assert_close(ours, right.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("scanning")
@pytest.mark.parametrize(("timesteps", "repeat"), [(1, 1), (3, 1), (3, 3)])
def test_so_has_the_scan_from_rest(timesteps: int, repeat: int) -> None:
    """What networks train with, where another way leads to the same weights: it would hide that one is missing."""
    torch.manual_seed(0)
    lif = LIF(6, threshold=0.6, leak=0.7)
    current = torch.rand(timesteps // repeat * 8, 6, requires_grad=True)
    given = [current, lif.threshold, *([lif.leak] if timesteps > 1 else [])]
    for _ in range(2):  # the operation is used from the second call on
        found = lif.fresh(current, timesteps, repeat)

    def gradients_of(spikes: Tensor) -> list[Tensor]:
        loss = (spikes.unflatten(0, (timesteps, -1)) * torch.linspace(0.5, 1.5, 8).unsqueeze(1)).square().sum()
        loss = loss + 0.1 * current.square().sum()
        return list(torch.autograd.grad(loss, given, create_graph=True))

    steps = current.unflatten(0, (timesteps // repeat, -1))
    plain = lif_scan_reference(steps, None, lif.leak, lif.threshold, repeat=repeat, gamma=lif.gamma).spikes.flatten(
        0, 1
    )
    ours, right = gradients_of(found), gradients_of(plain)
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other)
    found_second, right_second = second(ours, given), second(right, given)
    assert all(bool(part.abs().sum() > 0) for part in right_second)
    for one, other in zip(found_second, right_second, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_too() -> None:
    torch.manual_seed(0)
    lif, current = LIF(threshold=0.6), torch.rand(8, 6).to(torch.bfloat16).requires_grad_()
    spikes = lif.fresh(current, 2)
    assert spikes.dtype is torch.bfloat16
    (first,) = torch.autograd.grad(spikes.float().square().sum(), current, create_graph=True)
    assert first.dtype is torch.bfloat16
    (again,) = torch.autograd.grad(first.float().sum(), current)
    assert again.isfinite().all()
    assert again.abs().sum() > 0


CRASHED = """
import torch
from spiking_rl import build_network
network = build_network("nature_cnn", (1, 36, 36), 2, timesteps=int({timesteps}), neuron={neuron!r})
torch.nn.init.normal_(network.readout.weight)
images = torch.rand(1, 4, 1, 36, 36)
for parameter in network.parameters():  # as TRPO asks: of one alone, and once more
    slopes = torch.autograd.grad(network(images)[0].square().sum(), parameter, create_graph=True, allow_unused=True)
    if slopes[0] is not None and slopes[0].requires_grad:
        again = torch.autograd.grad(slopes[0].sum(), parameter, allow_unused=True)[0]
        assert again is None or again.isfinite().all()
network.maps[0][0].weight.requires_grad_(False)  # frozen: what comes in front of a normalisation has no gradient
network(images)[0].square().sum().backward()
assert network.maps[0][1].weight.grad.abs().sum() > 0
print("alive")
"""


@pytest.mark.parametrize(("timesteps", "neuron"), [(1, "lif"), (2, "lif"), (1, "relu")])
def test_the_parameters_of_a_network_of_images_may_be_asked_one_by_one(timesteps: int, neuron: str) -> None:
    """Torch's group normalisation dies of it, and takes the process along."""
    code = CRASHED.format(timesteps=timesteps, neuron=neuron)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "alive\n", (done.returncode, done.stderr[-2000:])


def test_group_normalisation_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs = GroupNorm(1, 6), torch.nn.GroupNorm(1, 6)
    torch.nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 6, 5, 5)
    given = [images.clone().contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2)]
    outputs = ours(given[0]), theirs(given[1])
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(given[0].grad, given[1].grad)  # type: ignore[arg-type]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
