"""A scan in pieces, what it refuses, and the module around it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spiking_rl import UserError
from spiking_rl.neurons import LIF, MIN_THRESHOLD, LIFState, clamp_after_step, lif_scan, lif_scan_reference

SCANS = pytest.mark.parametrize("scan", [lif_scan, lif_scan_reference])


@SCANS
@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(2, 6), cut=st.integers(1, 5), seed=st.integers(0, 2**31), fresh=st.booleans(), reset=st.booleans()
)
def test_two_calls_equal_one(scan: object, steps: int, cut: int, seed: int, fresh: bool, reset: bool) -> None:
    cut = min(cut, steps - 1)
    draw = torch.Generator().manual_seed(seed)
    current = torch.randn(steps, 2, 3, generator=draw, dtype=torch.float64)
    leak = torch.rand(3, generator=draw, dtype=torch.float64).requires_grad_()
    threshold = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    state = None if fresh else LIFState(torch.randn(2, 3, generator=draw, dtype=torch.float64))
    starts = torch.rand(steps, 2, generator=draw) < 0.3 if reset else None

    whole = scan(current, state, leak, threshold, starts, trace=True)  # type: ignore[operator]
    head, tail = (None, None) if starts is None else (starts[:cut], starts[cut:])
    first = scan(current[:cut], state, leak, threshold, head, trace=True)  # type: ignore[operator]
    second = scan(current[cut:], first.state, leak, threshold, tail, trace=True)  # type: ignore[operator]

    assert torch.equal(torch.cat([first.spikes, second.spikes]), whole.spikes)
    assert torch.equal(torch.cat([first.potential, second.potential]), whole.potential)
    assert torch.equal(second.state.membrane, whole.state.membrane)
    # The state carries the gradient too: back-propagation reaches across the cut.
    weights = torch.randn(2, 3, generator=draw, dtype=torch.float64)
    expected = torch.autograd.grad((whole.state.membrane * weights).sum(), [leak, threshold])
    found = torch.autograd.grad((second.state.membrane * weights).sum(), [leak, threshold])
    torch.testing.assert_close(found, expected)


@SCANS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_leak_and_threshold_may_be_numbers(scan: object, dtype: torch.dtype) -> None:
    current = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = scan(current, None, torch.tensor(0.9, dtype=wide), torch.tensor(0.7, dtype=wide))  # type: ignore[operator]
    numbers = scan(current, None, 0.9, 0.7)  # type: ignore[operator]
    assert 0 < numbers.spikes.mean() < 1
    assert torch.equal(numbers.spikes, tensors.spikes)
    assert torch.equal(numbers.state.membrane, tensors.state.membrane)


@SCANS
def test_below_threshold_two_membranes_approach_by_the_leak(scan: object) -> None:
    leak = torch.tensor([0.0, 0.5, 0.9, 1.0], dtype=torch.float64)
    current = torch.randn(7, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    membranes = torch.tensor([[1.0] * 4, [-2.0] * 4], dtype=torch.float64)
    found = scan(current.expand(7, 2, 4), LIFState(membranes), leak, torch.tensor(100.0), trace=True)  # type: ignore[operator]
    difference = found.potential[:, 0] - found.potential[:, 1]
    expected = torch.stack([3.0 * leak**n for n in range(1, 8)])
    torch.testing.assert_close(difference, expected, rtol=1e-12, atol=1e-12)
    assert found.spikes.sum() == 0


@SCANS
def test_a_scan_leaves_its_inputs_alone(scan: object) -> None:
    current, membrane = torch.randn(3, 2, 4), torch.randn(2, 4)
    kept = current.clone(), membrane.clone()
    scan(current, LIFState(membrane), torch.tensor(0.9), torch.tensor(0.5))  # type: ignore[operator]
    assert torch.equal(current, kept[0])
    assert torch.equal(membrane, kept[1])


@SCANS
def test_the_potential_is_returned_only_when_asked_for(scan: object) -> None:
    found = scan(torch.randn(3, 2, 4), None, torch.tensor(0.9), torch.tensor(0.5))  # type: ignore[operator]
    assert found.potential is None


@SCANS
@pytest.mark.parametrize(
    ("change", "sides"),
    [
        ({"current": torch.zeros(3)}, ["(3,)", "(S, B, *N)"]),
        ({"current": torch.zeros(0, 2, 4)}, ["(0, 2, 4)", "(S, B, *N)"]),
        ({"current": torch.zeros(3, 2, 4, dtype=torch.int64)}, ["torch.int64", ".float()"]),
        ({"current": torch.zeros(3, 2, 4, dtype=torch.bool)}, ["torch.bool", ".float()"]),
        ({"state": LIFState(torch.zeros(2, 5))}, ["(2, 5)", "(2, 4)"]),
        ({"state": LIFState(torch.zeros(3, 4))}, ["(3, 4)", "(2, 4)"]),
        ({"state": LIFState(torch.zeros(4))}, ["(4,)", "(2, 4)"]),
        ({"starts": torch.zeros(2, 3, dtype=torch.bool)}, ["(2, 3)", "(3, 2)"]),
        ({"starts": torch.zeros(3, 2, 4, dtype=torch.bool)}, ["(3, 2, 4)", "(3, 2)"]),
        ({"starts": torch.zeros(3, 2)}, ["torch.float32", "torch.bool"]),
        ({"threshold": torch.ones(5)}, ["(5,)", "(4,)"]),
        ({"leak": torch.ones(5)}, ["(5,)", "(4,)"]),
        # Broadcasts against (B, N), but parameters have no batch axis.
        ({"threshold": torch.ones(2, 4)}, ["(2, 4)", "(4,)"]),
        ({"leak": torch.ones(2, 4)}, ["(2, 4)", "(4,)"]),
        ({"current": torch.zeros(3, 2, 1), "threshold": torch.ones(4)}, ["(4,)", "(1,)"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_wrong_shapes_are_refused_with_both_sides(scan: object, change: dict[str, object], sides: list[str]) -> None:
    arguments = {
        "current": torch.zeros(3, 2, 4),
        "state": None,
        "leak": torch.tensor(1.0),
        "threshold": torch.tensor(1.0),
        "starts": None,
    }
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is checked below)
        scan(**(arguments | change))  # type: ignore[operator]
    assert all(side in str(caught.value) for side in sides), str(caught.value)


def test_threshold_and_leak_are_parameters() -> None:
    layer = LIF(6, 2, threshold=0.7, leak=0.3)
    assert dict(layer.named_parameters()).keys() == {"threshold", "leak"}
    assert not dict(layer.named_buffers())
    assert layer.threshold.shape == layer.leak.shape == (6, 1, 1)
    assert LIF().threshold.shape == ()
    found = layer(torch.randn(2, 3, 6, 4, 5))
    assert found.spikes.shape == (2, 3, 6, 4, 5)
    found.state.membrane.sum().backward()
    assert layer.leak.grad is not None
    assert layer.leak.grad.shape == (6, 1, 1)


def test_the_module_is_the_function_with_its_own_parameters() -> None:
    layer = LIF(4, threshold=0.4, leak=0.8, gamma=0.6)
    current, state = torch.randn(3, 2, 4), LIFState(torch.randn(2, 4))
    starts = torch.tensor([[False, True], [True, False], [False, False]])
    expected = lif_scan(current, state, layer.leak, layer.threshold, starts, gamma=0.6, trace=True)
    found = layer(current, state, starts, trace=True)
    assert torch.equal(found.spikes, expected.spikes)
    assert torch.equal(found.state.membrane, expected.state.membrane)
    of = [torch.autograd.grad(s.spikes.sum(), layer.threshold)[0] for s in (found, expected)]
    assert torch.equal(*of), "gamma must reach the surrogate"


@pytest.mark.parametrize(
    ("name", "value"),
    [*[("threshold", v) for v in (0.0, -1.0, float("nan"))], *[("leak", v) for v in (-0.1, 1.01, float("nan"))]],
)
def test_impossible_initial_values_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} = {value}"):
        LIF(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"{name} = {value}"):
        lif_scan(torch.ones(1, 1, 1), None, **{"leak": 0.5, "threshold": 0.5, name: value})


def step_with(optimizer: torch.optim.Optimizer, parameters: list[Tensor], gradient: float) -> None:
    for p in parameters:
        p.grad = torch.full_like(p, gradient)
    optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RAdam])
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("gradient", [1.0, -1.0])
def test_no_step_is_too_large_for_the_clamp(make: type[torch.optim.Optimizer], channels: int, gradient: float) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Sequential(LIF(channels, leak=0.5)))
    optimizer = make(network.parameters(), lr=1e6)  # type: ignore[call-arg]
    clamp_after_step(optimizer, network)
    weight = copy.deepcopy(network[0].weight)
    neuron = network[1][0]
    for _ in range(2):
        step_with(optimizer, list(network.parameters()), gradient)
        assert bool((neuron.leak == (0.0 if gradient > 0 else 1.0)).all())
        assert bool((neuron.threshold >= MIN_THRESHOLD).all())
    assert gradient > 0 or bool((neuron.threshold > 1e3).all()), "thresholds have no ceiling"
    assert bool(((network[0].weight - weight).abs() > 1e3).all()), "weights are not clamped"


def test_values_in_range_are_not_clamped() -> None:
    layer = LIF(leak=0.5, threshold=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    clamp_after_step(optimizer, layer)
    step_with(optimizer, [layer.leak, layer.threshold], 1.0)
    torch.testing.assert_close(torch.stack([layer.leak, layer.threshold]).detach(), torch.tensor([0.4, 0.4]))
