"""Hybrid and Poisson encoding, neurons that fire at most once, spike-time scores, and early exit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_rl import UserError, build_network
from spiking_rl.conversion import calibrate_thresholds
from spiking_rl.encoding import HybridEncoder, PoissonEncoder, build_encoder
from spiking_rl.energy import CodedInput, SpikeCounter, energy_pj, energy_ratio, macs_per_layer, spikes_per_input
from spiking_rl.neurons import LIFState, SpikeTimeScore, lif_scan, lif_scan_reference

FEW = settings(max_examples=40, deadline=None)


def network_of(timesteps: int = 5, **coding: object):  # type: ignore[no-untyped-def]
    """Return a small calibrated network with a readout that is not zero, and inputs."""
    torch.manual_seed(0)
    made = build_network("mlp", (6,), 3, timesteps=timesteps, hidden=[16, 12], leak=0.9, **coding)
    torch.nn.init.normal_(made.readout.weight)
    inputs = torch.randn(64, 6)
    calibrate_thresholds(made, inputs, 0.1)
    return made.eval().requires_grad_(False), inputs


# -- encoders ----------------------------------------------------------------------------------


@FEW
@given(timesteps=st.integers(2, 9), seed=st.integers(0, 2**31), signed=st.booleans())
def test_inputs_fire_once_in_order_of_intensity(timesteps: int, seed: int, signed: bool) -> None:
    draw = np.random.default_rng(seed)
    levels = draw.uniform(-1 if signed else 0, 1, 40)
    zero, span = 0.3, 2.5
    inputs = torch.tensor(zero + span * levels, dtype=torch.float32).unsqueeze(0)
    coded = HybridEncoder(zero, span)(inputs, timesteps)[:, 0]
    assert torch.equal(coded[0], inputs[0]), "the analog input comes first"
    spikes = coded[1:].abs()
    assert set(spikes.unique().tolist()) <= {0.0, 1.0}
    assert spikes.sum(0).max() <= 1, "no input fires twice"
    for k, level in enumerate(levels):
        # By the definition: the first t in 2..T with |x| > 1 - (t-1)/T.
        times = [t for t in range(2, timesteps + 1) if abs(level) > 1 - (t - 1) / timesteps + 1e-6]
        near = any(abs(abs(level) - (1 - (t - 1) / timesteps)) < 2e-6 for t in range(2, timesteps + 1))
        if near:
            continue
        expected = torch.zeros(timesteps - 1)
        if times:
            expected[times[0] - 2] = math.copysign(1, level)
        assert torch.equal(coded[1:, k], expected)


def test_black_never_fires_and_one_timestep_has_no_temporal_part() -> None:
    encoder = HybridEncoder(-1.0, 2.0)
    assert torch.equal(encoder(torch.full((1, 3), -1.0), 5)[1:], torch.zeros(4, 1, 3))
    inputs = torch.randn(4, 3)
    assert torch.equal(encoder(inputs, 1), inputs.unsqueeze(0))


def test_levels_are_per_channel() -> None:
    images = torch.tensor([0.0, 10.0])[None, :, None, None].expand(1, 2, 2, 2)
    coded = HybridEncoder([0.0, 9.0], [1.0, 1.0])(images, 4)
    assert torch.equal(coded[1, 0, 0], torch.zeros(2, 2))
    assert torch.equal(coded[1, 0, 1], torch.ones(2, 2)), "as far above its zero as can be: fires first"


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 5, 6)])
def test_levels_per_channel_of_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    inputs = torch.rand(4, *shape)  # as many as channels
    spans = [0.5, 1.0, 2.0, 4.0]
    for code in (HybridEncoder, PoissonEncoder):
        torch.manual_seed(0)
        coded = code([0.0] * 4, spans)(inputs, 3)
        assert coded.shape == (3, *inputs.shape)
        for channel, span in enumerate(spans):
            torch.manual_seed(0)
            alone = code(0.0, span)(inputs, 3)
            assert torch.equal(coded[:, :, channel], alone[:, :, channel])


def test_a_poisson_code_from_another_zero_is_refused() -> None:
    for zero in (0.5, [0.0, 0.5]):
        with pytest.raises(UserError, match=r"input_zero = .*must be 0 for poisson"):
            build_encoder("poisson", zero, 1.0)


def test_a_poisson_code_means_the_analog_input() -> None:
    inputs = torch.tensor([[-1.5, -0.2, 0.0, 0.7, 5.0]])
    coded = PoissonEncoder(0.0, 2.0)(inputs, 20_000)
    assert set(coded.unique().tolist()) <= {-2.0, 0.0, 2.0}
    torch.testing.assert_close(coded.mean(0), torch.tensor([[-1.5, -0.2, 0.0, 0.7, 2.0]]), rtol=0, atol=0.05)


def test_codes_that_cannot_be_are_refused() -> None:
    for bad in ({"encoding": "morse"}, {"encoding": "hybrid", "input_span": 0.0}, {"kappa": -1.0}):
        with pytest.raises(UserError, match=next(reversed(bad))):
            build_network("mlp", (4,), 2, **bad)
    with pytest.raises(UserError, match="input_zero"):
        build_network("mlp", (4,), 2, encoding="hybrid", input_zero=math.nan)


# -- fire at most once -------------------------------------------------------------------------


@FEW
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 8), cut=st.integers(0, 7))
def test_no_neuron_ever_fires_twice_in_one_call_or_two(seed: int, steps: int, cut: int) -> None:
    current = torch.randn(steps, 2, 5, generator=torch.Generator().manual_seed(seed)) + 1
    cut = min(cut, steps - 1)
    for scan in (lif_scan, lif_scan_reference):
        whole = scan(current, None, torch.tensor(0.9), torch.tensor(0.5), single_spike=True)
        assert whole.spikes.sum(0).max() <= 1
        assert whole.state.fired is not None
        assert torch.equal(whole.state.fired, whole.spikes.sum(0))
        free = scan(current, None, torch.tensor(0.9), torch.tensor(0.5))
        assert torch.equal(whole.spikes.sum(0), free.spikes.amax(0)), "the first spike is the same"
        if cut:
            head = scan(current[:cut], None, torch.tensor(0.9), torch.tensor(0.5), single_spike=True)
            tail = scan(current[cut:], head.state, torch.tensor(0.9), torch.tensor(0.5), single_spike=True)
            assert torch.equal(torch.cat([head.spikes, tail.spikes]), whole.spikes)


def test_in_a_network_no_hidden_neuron_fires_twice() -> None:
    for timesteps in (1, 2, 5):
        network, inputs = network_of(timesteps, encoding="hybrid", single_spike=True, input_span=2.0)
        fired: dict[str, Tensor] = {}
        network(inputs.unsqueeze(0), observer=lambda layer, spikes, _, into=fired: into.update({layer: spikes}))
        assert fired.keys() == {"input", "layer1", "layer2"}
        for spikes in fired.values():
            assert spikes.shape[0] == timesteps
            assert spikes.abs().sum(0).max() <= 1
        assert fired["layer2"].sum() > 0
        assert fired["input"][0].abs().sum() == 0, "the analog timestep spikes nothing"


def test_a_state_and_codes_do_not_go_together() -> None:
    for coding in ({"encoding": "hybrid"}, {"single_spike": True}, {"kappa": 0.5}):
        network, inputs = network_of(3, **coding)
        with pytest.raises(ValueError, match="a state is carried"):
            network(inputs.unsqueeze(0), network.initial_state(len(inputs)))


# -- scores from spike times -------------------------------------------------------------------


@FEW
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 6), kappa=st.sampled_from([0.0, 0.3, 2.0]))
def test_scores_and_gradients_follow_their_definition(seed: int, steps: int, kappa: float) -> None:
    draw = np.random.default_rng(seed)
    values, theta = draw.normal(0.3, 0.8, (steps, 2, 3)), draw.uniform(0.3, 1.5)
    weights = draw.normal(0, 1, (2, 3))
    score = SpikeTimeScore(kappa, gamma=0.7).double()
    with torch.no_grad():
        score.threshold.fill_(theta)
    current = torch.tensor(values, requires_grad=True)
    found = score(current)
    (found * torch.tensor(weights)).sum().backward()
    of_theta = 0.0
    for b, i in np.ndindex(2, 3):
        potentials = np.cumsum(values[:, b, i])
        first = next((t for t in range(1, steps + 1) if potentials[t - 1] > theta), steps + 1)
        assert score.times(current)[b, i] == first
        assert float(found[b, i].detach()) == pytest.approx((potentials[-1] + kappa * (steps + 1 - first)) / steps)
        slopes = [
            0.7 / theta * max(0.0, 1 - abs(u / theta - 1)) * kappa * (steps + 1 - t) if t <= first else 0.0
            for t, u in enumerate(potentials, start=1)
        ]
        of_theta -= weights[b, i] * sum(s * u / theta for s, u in zip(slopes, potentials, strict=True)) / steps
        for t in range(steps):
            assert current.grad is not None
            expected = weights[b, i] * (1 + sum(slopes[t:])) / steps
            assert float(current.grad[t, b, i]) == pytest.approx(expected, abs=1e-9)
    if kappa:
        assert score.threshold.grad is not None
        assert float(score.threshold.grad) == pytest.approx(of_theta, abs=1e-9)


def test_without_weight_on_time_the_score_is_the_mean_current() -> None:
    network, inputs = network_of(4, single_spike=True)
    plain = network(inputs.unsqueeze(0))[0]
    network.spike_time = SpikeTimeScore(0.0)
    torch.testing.assert_close(network(inputs.unsqueeze(0))[0], plain)
    with pytest.raises(ValueError, match="kappa"):
        network_of(4)[0].spike_times(inputs.unsqueeze(0))


def test_first_spike_times_of_the_outputs() -> None:
    network, inputs = network_of(5, encoding="hybrid", kappa=1.0)
    times = network.spike_times(inputs.reshape(4, 16, 6))
    assert times.shape == (4, 16, 3)
    assert set(times.unique().tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}
    assert len(times.unique()) > 2
    # Earlier means a higher score than the same potentials would give.
    late = network(inputs.unsqueeze(0))[0].flatten(0, 1)
    network.spike_time.kappa = 0.0
    early = network(inputs.unsqueeze(0))[0].flatten(0, 1)
    torch.testing.assert_close(late - early, (6 - times.flatten(0, 1)) / 5, rtol=1e-4, atol=1e-5)


# -- early exit --------------------------------------------------------------------------------


@pytest.mark.parametrize("single_spike", [False, True])
def test_every_decision_stops_at_the_first_clear_timestep(single_spike: bool) -> None:
    network, inputs = network_of(5, single_spike=single_spike)
    prefixes = []
    for t in range(1, 6):
        network.set_timesteps(t)
        prefixes.append(network(inputs.unsqueeze(0))[0][0])
    ranked = torch.stack(prefixes).sort(dim=-1, descending=True).values
    gaps = ranked[..., 0] - ranked[..., 1]  # (T, B)
    margin = float(gaps.median())
    clear = gaps >= margin
    clear[-1] = True
    stop = clear.int().argmax(0)
    assert 0 < float(stop.float().mean()) < 4, "else this tests nothing"
    network.set_exit_margin(margin)
    counter = SpikeCounter()
    found = network(inputs.unsqueeze(0), observer=counter)[0][0]
    expected = torch.stack(prefixes)[stop, torch.arange(len(inputs))]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counter.timesteps(network, len(inputs)) == pytest.approx(float(stop.float().mean()) + 1)
    network.set_exit_margin(math.inf)
    torch.testing.assert_close(network(inputs.unsqueeze(0))[0][0], prefixes[-1], rtol=1e-5, atol=1e-5)
    network.set_exit_margin(margin)
    network.train()
    torch.testing.assert_close(network(inputs.unsqueeze(0))[0][0], prefixes[-1])  # training waits


def test_coded_inputs_exit_early_too() -> None:
    network, inputs = network_of(5, encoding="hybrid", single_spike=True, kappa=0.5)
    whole = network(inputs.unsqueeze(0))[0]
    network.set_exit_margin(math.inf)
    torch.testing.assert_close(network(inputs.unsqueeze(0))[0], whole, rtol=1e-5, atol=1e-5)
    network.set_exit_margin(0.0)
    counter = SpikeCounter()
    macs = macs_per_layer(network)
    network(inputs.unsqueeze(0), observer=counter)
    assert counter.timesteps(network, len(inputs)) == 1
    assert counter.coded_input(network) == CodedInput(1, 0.0), "the spikes of later timesteps were not needed"
    network.set_exit_margin(None)
    assert macs == macs_per_layer(network), "what a timestep costs does not depend on the margin"
    with pytest.raises(UserError, match="margin"):
        network.set_exit_margin(-1.0)


# -- energy ------------------------------------------------------------------------------------


def test_the_first_layer_adds_up_spikes_after_the_first_timestep() -> None:
    network, inputs = network_of(5, encoding="hybrid", single_spike=True, layer_norm=False)
    counter = SpikeCounter()
    network(inputs.unsqueeze(0), observer=counter)
    coded = counter.coded_input(network)
    assert coded is not None
    assert coded.analog == 1
    # Every input whose size is above 1/5 fires exactly once.
    assert coded.rate * 5 == pytest.approx(float((inputs.abs() > 1 / 5).float().mean()))
    macs, rates = macs_per_layer(network), spikes_per_input(network, counter.rates)
    expected = 6 * 16 * 4.6 + 6 * 16 * coded.rate * 5 * 0.9
    expected += sum(rate * 5 * count * 0.9 for rate, count in zip(rates, macs[1:], strict=True))
    assert energy_pj(macs, rates, 5, coded=coded) == pytest.approx(expected)
    assert energy_ratio(macs, rates, 5, coded=coded) == pytest.approx(sum(macs) * 4.6 / expected)


def test_a_poisson_code_never_multiplies() -> None:
    assert energy_pj([100, 10], [0.0], 4, coded=CodedInput(0, 0.25)) == pytest.approx(100 * 0.25 * 4 * 0.9)
    assert energy_pj([100, 10], [0.0], 4) == pytest.approx(100 * 4.6)


def test_the_mask_is_a_constant_to_the_gradient() -> None:
    current = torch.full((3, 1, 1), 0.6, dtype=torch.float64, requires_grad=True)
    scan = lif_scan(current, LIFState(torch.zeros(1, 1, dtype=torch.float64)), torch.tensor(1.0), torch.tensor(1.0),
                    single_spike=True)  # fmt: skip
    assert scan.spikes.flatten().tolist() == [0, 1, 0]
    grads = torch.autograd.grad(scan.spikes[2].sum(), current)[0]
    assert torch.equal(grads, torch.zeros_like(grads)), "a neuron that has fired cannot fire, whatever its current"
