"""Firing rates in one pass: what spikes give for a current that lasts, and a network that answers with them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiking_rl import UserError, build_network
from spiking_rl.energy import SpikeCost, SpikeCounter
from spiking_rl.networks import LayeredNetwork
from spiking_rl.rates import firing_rate


def spikes_of(current: float, threshold: float, timesteps: int) -> int:
    """Count the spikes of one neuron with leak 1, from rest, one timestep after another."""
    membrane, spikes = 0.0, 0
    for _ in range(timesteps):
        membrane += current
        if membrane > threshold:
            spikes, membrane = spikes + 1, membrane - threshold
    return spikes


@settings(max_examples=300, deadline=None)
@given(st.floats(-2, 3), st.floats(0.05, 4), st.integers(1, 9))
def test_a_rate_is_that_of_the_spikes(current: float, threshold: float, timesteps: int) -> None:
    paid = timesteps * current / threshold
    if abs(paid - round(paid)) < 1e-9:
        return  # rounding decides
    found = firing_rate(torch.tensor(current).double(), torch.tensor(threshold).double(), timesteps)
    assert float(found) == pytest.approx(spikes_of(current, threshold, timesteps) / timesteps, abs=1e-12)


def test_a_neuron_at_its_threshold_stays_silent() -> None:
    assert float(firing_rate(torch.tensor(0.5), torch.tensor(0.5), 1)) == 0
    assert float(firing_rate(torch.tensor(0.5), torch.tensor(0.5), 4)) == 0.75, "the first spike is late"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_go_straight_through_the_steps(dtype: torch.dtype) -> None:
    current = torch.tensor([[-0.5, 0.25, 1.0], [2.25, 2.75, 0.5]], dtype=dtype, requires_grad=True)
    threshold = torch.tensor([[1.0], [2.0]], requires_grad=True)
    rates = firing_rate(current, threshold, 4)
    assert rates.dtype == dtype
    assert rates.tolist() == [[0, 0, 0.75], [1, 1, 0]]
    grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    rates.backward(grad.to(dtype))
    assert current.grad is not None
    assert threshold.grad is not None
    assert current.grad.tolist() == [[0, 2, 3], [2, 0, 3]], "none below 0 nor above (1 + 1/T) thresholds"
    expected = [-(2 * 0.25 + 3 * 1.0) / 1.0, -(2 * 2.25 + 3 * 0.5) / 2.0]
    assert threshold.grad.flatten().tolist() == pytest.approx(expected, rel=1e-2 if dtype is torch.bfloat16 else 1e-6)


def small(name: str = "vgg6", **options: object) -> LayeredNetwork:
    torch.manual_seed(0)
    network = build_network(name, (3, 16, 16), 4, width=1 / 16, timesteps=4, batch_norm=True, threshold=0.3, **options)
    torch.nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]  # else it answers 0
    return network.eval()


@pytest.mark.parametrize("name", ["vgg6", "resnet12"])
def test_a_network_on_rates_is_its_layers_one_by_one(name: str) -> None:
    network = small(name)
    inputs = torch.randn(1, 5, 3, 16, 16)
    network.set_rates(True)
    with torch.no_grad():
        outputs, state = network(inputs)
        x, held = inputs[0], {}
        for i, neuron in enumerate(network.neurons):
            current = network.maps[i](x)
            if i in network.sources:
                current = current + network.shortcuts[str(i)](held[network.sources[i]])
            held[i] = x = firing_rate(current, neuron.threshold, 4)  # type: ignore[arg-type]
        expected = network.readout(x)
    assert state is None
    assert x.mean().item() > 0, "a silent network says nothing"
    torch.testing.assert_close(outputs[0], expected)


def test_the_first_layer_fires_at_its_rate() -> None:
    """Its current lasts, so that nothing is lost there; and without rates the network is as it was."""
    network = small()
    inputs = torch.randn(1, 5, 3, 16, 16)
    seen: dict[str, list[torch.Tensor]] = {}

    def observe(layer: str, output: torch.Tensor, potential: torch.Tensor) -> None:
        seen.setdefault(layer, []).append(output)

    before = network(inputs)[0].detach()
    network(inputs, observer=observe)
    network.set_rates(True)
    network(inputs, observer=observe)
    network.set_rates(False)
    spikes, rates = seen["layer1"]
    assert spikes.shape[0] == 4
    assert rates.shape[0] == 1
    assert torch.equal(spikes.mean(0), rates[0])
    assert 0 < rates.mean().item() < 1
    assert torch.equal(network(inputs)[0], before)


def test_rates_cost_what_their_spikes_would() -> None:
    network = small()
    network.set_rates(True)
    cost, counter = SpikeCost(network), SpikeCounter(graded=True)
    means: dict[str, float] = {}

    def observe(layer: str, output: torch.Tensor, potential: torch.Tensor) -> None:
        cost(layer, output, potential)
        counter(layer, output, potential)
        means[layer] = output.mean().item()

    network(torch.randn(1, 5, 3, 16, 16), observer=observe)
    assert counter.rates == pytest.approx(means)
    assert counter.timesteps(network, 5) == 1
    on_spikes = SpikeCost(network)
    for layer, mean in means.items():
        on_spikes(layer, torch.full((4, 1, 1), mean), torch.empty(0))
    assert cost.total.item() == pytest.approx(on_spikes.total.item(), rel=1e-5)  # type: ignore[union-attr]


def test_dropout_and_gradients_work_on_rates() -> None:
    network = small(dropout=0.5, dense_dropout=0.5)
    network.set_rates(True)
    network.train()
    inputs = torch.randn(1, 8, 3, 16, 16)
    torch.manual_seed(1)
    first = network(inputs)[0]
    assert not torch.equal(network(inputs)[0], first), "another mask"
    first.square().sum().backward()
    trained = {n for n, p in network.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert {f"neurons.{i}.threshold" for i in range(len(network.neurons))} < trained
    assert not any(name.endswith("leak") for name in trained), "on rates nothing leaks"


@pytest.mark.parametrize("coding", [{"encoding": "hybrid"}, {"single_spike": True}, {"kappa": 0.5}])
def test_what_rates_cannot_say_is_refused(coding: dict[str, object]) -> None:
    network = small()
    network.set_coding(**coding)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="rates"):
        network.set_rates(True)
    assert not network.on_rates


def test_rates_carry_no_membranes_and_relu_has_none() -> None:
    network = small()
    network.set_rates(True)
    with pytest.raises(ValueError, match="spikes"):
        network(torch.randn(1, 2, 3, 16, 16), network.initial_state(2))
    relu = small(neuron="relu")
    before = copy.deepcopy(relu)
    relu.set_rates(True)
    inputs = torch.randn(1, 2, 3, 16, 16)
    assert torch.equal(relu(inputs)[0], before(inputs)[0])
