"""The neuron against its equations: an independent loop in plain floats, differentiated forwards."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from spiking_rl.neurons import LIFState, lif_scan, lif_scan_reference
from spiking_rl.surrogate import fire

Array = NDArray[np.float64]
SCANS = pytest.mark.parametrize("scan", [lif_scan, lif_scan_reference])
# A cold import of torch's kernels can exceed hypothesis' 200 ms per example.
FEW = settings(max_examples=60, deadline=None)


@dataclass
class Case:
    """Random input of a scan, and the weights that turn its result into one number."""

    current: Array  # (S, B, *N)
    membrane: Array | None  # (B, *N)
    leak: Array  # broadcasts against N
    threshold: Array
    starts: NDArray[np.bool_] | None  # (S, B)
    gamma: float
    on_spikes: Array | None  # weights of the loss, shaped as what they weigh; None: not in the loss
    on_membrane: Array | None
    on_potential: Array | None
    single_spike: bool = False
    fired: Array | None = None  # (B, *N), of the state


@st.composite
def cases(draw: st.DrawFn) -> Case:
    steps, batch = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    shape = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def parameter(low: float, high: float) -> Array:
        per_channel = bool(shape) and draw(st.booleans())
        return rng.uniform(low, high, (shape[0], *([1] * (len(shape) - 1))) if per_channel else ())

    def maybe(array: Array) -> Array | None:
        return array if draw(st.booleans()) else None

    full, layer = (steps, batch, *shape), (batch, *shape)
    leak = parameter(0, 1)
    return Case(
        current=rng.normal(0.3, 0.8, full),
        membrane=maybe(rng.normal(0, 1, layer)),
        leak=draw(st.sampled_from([leak, np.zeros_like(leak), np.ones_like(leak)])),
        threshold=parameter(0.2, 1.5),
        starts=(rng.random((steps, batch)) < draw(st.sampled_from([0.0, 0.3, 1.0]))) if draw(st.booleans()) else None,
        gamma=draw(st.sampled_from([0.3, 1.0])),
        on_spikes=maybe(rng.normal(0, 1, full)),
        on_membrane=maybe(rng.normal(0, 1, layer)),
        on_potential=maybe(rng.normal(0, 1, full)),
        single_spike=draw(st.booleans()),
        fired=maybe((rng.random(layer) < 0.3).astype(float)),
    )


@dataclass
class Expected:
    """What the equations give."""

    spikes: Array
    membrane: Array
    potential: Array
    gradients: dict[str, Array]
    kink_distance: float


def by_hand(case: Case) -> Expected:
    """Run the equations neuron by neuron, carrying every derivative along (forward mode).

    The tangent of one neuron has a place for each of its currents, then the first membrane, the
    leak and the threshold.
    """
    steps, batch, *shape = case.current.shape
    leaks, thresholds = np.broadcast_to(case.leak, shape), np.broadcast_to(case.threshold, shape)
    spikes, potential = np.zeros_like(case.current), np.zeros_like(case.current)
    after = np.zeros((batch, *shape))
    tangents = np.zeros((steps + 3, batch, *shape))  # d loss / d everything, by neuron
    first, of_leak, of_threshold = steps, steps + 1, steps + 2
    kink = np.inf
    for place in itertools.product(range(batch), *map(range, shape)):
        leak, threshold = float(leaks[place[1:]]), float(thresholds[place[1:]])
        u = 0.0 if case.membrane is None else float(case.membrane[place])
        spent = case.single_spike and case.membrane is not None and case.fired is not None and bool(case.fired[place])
        tangent = np.zeros(steps + 3)
        tangent[first] = 1.0
        loss = np.zeros(steps + 3)
        for t in range(steps):
            if case.starts is not None and case.starts[t, place[0]]:
                u, tangent, spent = 0.0, np.zeros(steps + 3), False
            tangent = leak * tangent
            tangent[of_leak] += u
            tangent[t] += 1.0
            u = leak * u + float(case.current[(t, *place)])
            ratio = u / threshold
            slope = case.gamma / threshold * max(0.0, 1.0 - abs(ratio - 1.0))
            if spent:
                slope = 0.0  # whoever may not fire has nothing to gain from its potential
            spike = 1.0 if u > threshold and not spent else 0.0
            spent = spent or (case.single_spike and spike > 0)
            of_spike = slope * tangent
            of_spike[of_threshold] -= ratio * slope
            kink = min(kink, abs(ratio), abs(ratio - 1), abs(ratio - 2))
            spikes[(t, *place)], potential[(t, *place)] = spike, u
            if case.on_spikes is not None:
                loss += case.on_spikes[(t, *place)] * of_spike
            if case.on_potential is not None:
                loss += case.on_potential[(t, *place)] * tangent
            # The reset: not through the step function.
            tangent = tangent.copy()
            tangent[of_threshold] -= spike
            u -= threshold * spike
        if case.on_membrane is not None:
            loss += case.on_membrane[place] * tangent
        after[place] = u
        tangents[(slice(None), *place)] = loss
    gradients = {
        "current": tangents[:steps],
        "leak": fold(tangents[of_leak].sum(0), case.leak.shape),
        "threshold": fold(tangents[of_threshold].sum(0), case.threshold.shape),
    }
    if case.membrane is not None:
        gradients["membrane"] = tangents[first]
    return Expected(spikes, after, potential, gradients, kink)


def fold(array: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which a parameter of ``shape`` was shared."""
    if not shape:
        return np.asarray(array.sum())
    return array.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True).reshape(shape)


def run(scan: object, case: Case, dtype: torch.dtype) -> Expected:
    """Run an implementation on a case and differentiate it."""
    inputs = {
        name: torch.tensor(value, dtype=dtype, requires_grad=True)
        for name in ("current", "membrane", "leak", "threshold")
        if (value := getattr(case, name)) is not None
    }
    fired = None if case.fired is None or not case.single_spike else torch.tensor(case.fired, dtype=dtype)
    state = LIFState(inputs["membrane"], fired) if "membrane" in inputs else None
    starts = None if case.starts is None else torch.tensor(case.starts)
    result = scan(  # type: ignore[operator]
        inputs["current"],
        state,
        inputs["leak"],
        inputs["threshold"],
        starts,
        gamma=case.gamma,
        trace=True,
        single_spike=case.single_spike,
    )
    loss = sum(
        (torch.tensor(weights, dtype=dtype) * value).sum()
        for weights, value in (
            (case.on_spikes, result.spikes),
            (case.on_membrane, result.state.membrane),
            (case.on_potential, result.potential),
        )
        if weights is not None
    )
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    values = [t.detach().numpy() for t in (result.spikes, result.state.membrane, result.potential)]
    return Expected(*values, {n: g.detach().numpy() for n, g in zip(inputs, gradients, strict=True)}, 0.0)


def assert_same(found: Expected, expected: Expected, tolerance: float) -> None:
    assert np.array_equal(found.spikes, expected.spikes)
    for name in ("membrane", "potential"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), tolerance, tolerance, err_msg=name)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert found.gradients[name].shape == gradient.shape
        np.testing.assert_allclose(found.gradients[name], gradient, tolerance, tolerance, err_msg=f"gradient of {name}")


def in_a_loss(case: Case) -> bool:
    return any(w is not None for w in (case.on_spikes, case.on_membrane, case.on_potential))


@SCANS
@FEW
@given(case=cases())
def test_values_and_gradients_follow_the_equations(scan: object, case: Case) -> None:
    expected = by_hand(case)
    assume(expected.kink_distance > 1e-6 and in_a_loss(case))
    assert_same(run(scan, case, torch.float64), expected, 1e-9)


@FEW
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_two_implementations_agree(case: Case, dtype: torch.dtype) -> None:
    # In single precision the two may round a potential to either side of a kink.
    assume(by_hand(case).kink_distance > (1e-4 if dtype == torch.float32 else 1e-9) and in_a_loss(case))
    found, expected = (run(scan, case, dtype) for scan in (lif_scan, lif_scan_reference))
    assert found.spikes.dtype == found.membrane.dtype == expected.spikes.dtype
    assert_same(found, expected, 2e-4 if dtype == torch.float32 else 1e-11)


@SCANS
def test_a_worked_example(scan: object) -> None:
    current = torch.tensor([0.75, 0.75, 1.0, 0.25, 1.0]).reshape(5, 1, 1)
    found = scan(current, None, torch.tensor(0.5), torch.tensor(1.0), trace=True)  # type: ignore[operator]
    assert found.potential.flatten().tolist() == [0.75, 1.125, 1.0625, 0.28125, 1.140625]
    assert found.spikes.flatten().tolist() == [0, 1, 1, 0, 1]
    assert found.state.membrane.tolist() == [[0.140625]]


@SCANS
def test_a_start_zeroes_the_membrane_before_the_leak(scan: object) -> None:
    current = torch.full((3, 2, 1), 0.25)
    starts = torch.tensor([[False, False], [True, False], [False, False]])
    state = LIFState(torch.tensor([[0.5], [0.5]]))
    found = scan(current, state, torch.tensor(0.5), torch.tensor(1.0), starts, trace=True)  # type: ignore[operator]
    assert found.potential[..., 0].T.tolist() == [[0.5, 0.25, 0.375], [0.5, 0.5, 0.5]]


@SCANS
def test_a_neuron_fires_strictly_above_its_threshold(scan: object) -> None:
    at = torch.tensor(0.7)
    current = torch.stack([at, torch.nextafter(at, torch.tensor(1.0))]).reshape(1, 1, 2)
    found = scan(current, None, torch.tensor(1.0), at)  # type: ignore[operator]
    assert found.spikes.flatten().tolist() == [0, 1]
    assert found.state.membrane[0, 0] == at, "a neuron that did not fire keeps its potential"


@SCANS
def test_one_fresh_timestep_gives_the_leak_no_gradient(scan: object) -> None:
    leak = torch.tensor(0.9, requires_grad=True)
    threshold = torch.tensor(1.0, requires_grad=True)
    found = scan(torch.full((1, 2, 3), 1.2), None, leak, threshold, trace=True)  # type: ignore[operator]
    loss = found.spikes.sum() + found.state.membrane.sum() + found.potential.sum()
    of_leak, of_threshold = torch.autograd.grad(loss, [leak, threshold])
    assert of_leak.item() == 0.0
    assert of_threshold.item() != 0.0


def test_gradients_of_fire_worked_by_hand() -> None:
    # u/threshold: 1.5 | 0.5 | 3 (outside the triangle); threshold 2, gamma 0.3, slope 0.15 * (1 - 0.5)
    potential = torch.tensor([3.0, 1.0, 6.0], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    spikes = fire(potential, threshold, 0.3)
    of_potential, of_threshold = torch.autograd.grad(spikes.sum(), [potential, threshold])
    assert spikes.tolist() == [1, 0, 1]
    torch.testing.assert_close(of_potential, torch.tensor([0.075, 0.075, 0.0], dtype=torch.float64))
    torch.testing.assert_close(of_threshold, torch.tensor(-0.15, dtype=torch.float64))


def test_fire_without_gradients_gives_the_same_spikes() -> None:
    potential, threshold = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.tensor(0.1)
    with_gradient: Tensor = fire(potential.clone().requires_grad_(), threshold)
    assert torch.equal(fire(potential, threshold), with_gradient)
    assert fire(potential, threshold).dtype == potential.dtype


@pytest.mark.parametrize("scan", [lif_scan, lif_scan_reference])
def test_below_threshold_two_starts_grow_alike_as_powers_of_the_leak(scan: object) -> None:
    torch.manual_seed(0)
    current = torch.rand(30, 4, 5, dtype=torch.float64) * 0.01
    leak = torch.rand(5, dtype=torch.float64)
    starts = [torch.rand(4, 5, dtype=torch.float64) for _ in range(2)]
    high = torch.tensor(100.0, dtype=torch.float64)
    a, b = (scan(current, LIFState(s), leak, high, trace=True).potential for s in starts)  # type: ignore[operator]
    powers = leak ** torch.arange(1, 31, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(a - b, powers * (starts[0] - starts[1]), rtol=1e-12, atol=1e-15)
