"""Operations and energy, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spiking_rl import (
    FLOAT32,
    INT32,
    LIF,
    LayeredNetwork,
    SpikeCounter,
    build_network,
    energy_ratio,
    macs_per_layer,
    membrane_traffic,
    normalisation_macs,
    spikes_per_input,
)
from spiking_rl.conversion import calibrate_thresholds
from spiking_rl.energy import Energy, SpikeCost, accumulate_weights, energy_pj, measured_energy, odd_layers
from spiking_rl.errors import UserError


@pytest.mark.parametrize("neuron", ["lif", "relu"])
def test_operations_of_the_cartpole_network(neuron: str) -> None:
    network = build_network("mlp", (4,), 2, hidden=(256, 256), timesteps=5, neuron=neuron)
    assert macs_per_layer(network) == [4 * 256, 256 * 256, 256 * 2]
    assert macs_per_layer(network) == [1024, 65536, 512], "counting twice counts the same"


def test_operations_of_convolutions() -> None:
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),  # 8x8 places, 4 filters of 1x3x3
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 6, 3, stride=1)),  # 4x4 -> 2x2 places, 6 of 4x3x3
        nn.Conv2d(6, 6, 2, groups=3),  # 1x1 place, 6 of 2x2x2
        nn.Sequential(nn.Flatten(), nn.Linear(6, 5)),
    ]
    neurons = [LIF(4, 2), LIF(6, 2), LIF(6, 2), LIF(5)]
    network = LayeredNetwork(layers, neurons, nn.Linear(5, 3), input_shape=(1, 8, 8), timesteps=4)
    assert macs_per_layer(network) == [8 * 8 * 4 * 9, 2 * 2 * 6 * 36, 6 * 8, 30, 15]


def test_energy_worked_by_hand() -> None:
    macs, rates = [10, 20, 30], [0.5, 0.1]
    # analog layer 10 * 4.6 = 46; spikes per input 2 * 0.5 and 2 * 0.1: (20 * 1 + 30 * 0.2) * 0.9 = 23.4
    assert energy_pj(macs, rates, 2) == pytest.approx(69.4)
    assert energy_pj(macs, None, 1) == pytest.approx(276.0)
    assert energy_ratio(macs, rates, 2) == pytest.approx(276.0 / 69.4)


def test_normalisation_is_paid_by_the_spiking_network_alone() -> None:
    macs, rates = [10, 20, 30], [0.5, 0.1]
    # 69.4 as above; 3 normalising operations once in layer 1 and 6 per timestep in layer 2.
    assert energy_pj(macs, rates, 2, [3, 6]) == pytest.approx(69.4 + (3 + 2 * 6) * 4.6)
    assert energy_pj(macs, None, 1, [3, 6]) == energy_pj(macs, None, 1)
    assert energy_ratio(macs, rates, 2, [3, 6]) == pytest.approx(276.0 / 138.4)
    assert normalisation_macs(build_network("mlp", (4,), 2, hidden=(8, 5))) == [24, 15]
    assert normalisation_macs(build_network("mlp", (4,), 2, hidden=(8, 5), layer_norm=False)) == [0, 0]


def test_the_analog_layer_caps_the_ratio() -> None:
    assert energy_ratio([10, 20, 30], [0.0, 0.0], 1) == pytest.approx(6.0)
    assert energy_ratio([10, 20, 30], None, 5) == 1.0


def test_energy_wants_a_rate_for_every_spiking_layer() -> None:
    with pytest.raises(ValueError, match="zip"):
        energy_pj([10, 20, 30], [0.5], 2)


def test_spikes_are_counted_over_several_passes() -> None:
    counter = SpikeCounter()
    assert counter.rates == {}
    ones, zeros = torch.ones(2, 3, 4), torch.zeros(1, 2, 4)
    counter("layer1", ones, ones)  # 24 of 24 places
    counter("layer1", zeros, zeros)  # 0 of 8
    counter("layer2", zeros, zeros)
    assert counter.rates == {"layer1": 0.75, "layer2": 0.0}


def test_the_counter_reads_a_network() -> None:
    network = build_network("mlp", (1,), 2, hidden=(2,), layer_norm=False, timesteps=4, threshold=1.0)
    with torch.no_grad():
        network.maps[0].weight.copy_(torch.tensor([[1.0], [0.0]]))
        network.maps[0].bias.zero_()
    counter = SpikeCounter()
    # Input 0.5, no leak: the potential is 0.5, 1, 1.5, 1 and fires in one of four timesteps, and the
    # other neuron never; an input of 2 fires in all four.
    network(torch.tensor([[[0.5], [2.0]]]), observer=counter)
    assert counter.rates == {"layer1": (1 + 4) / 16}


def test_a_counter_that_saw_nothing_of_a_network_is_told() -> None:
    network = build_network("mlp", (4,), 2, hidden=(8, 8))
    with pytest.raises(
        UserError, match=r"counter = 'nothing': has not seen layer1, layer2; pass it on as the observer"
    ):
        measured_energy(network, SpikeCounter())


def test_odd_layers_are_named() -> None:
    warnings = odd_layers({"layer1": 0.0049, "layer2": 0.2, "layer3": 0.951, "layer4": 0.005, "layer5": 0.95})
    assert len(warnings) == 2
    assert warnings[0].startswith("layer1 has fallen silent")
    assert warnings[1].startswith("layer3 is saturated")
    assert odd_layers({"layer1": 0.2}, silent=0.3) != []
    assert odd_layers({"layer1": 0.2}, saturated=0.1) != []
    assert odd_layers({}) == []


def residual() -> LayeredNetwork:
    """Two channels of 4x4; a pooled layer with a shortcut through a pool, and one through a convolution."""
    maps = [
        nn.Conv2d(1, 2, 1),
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 2, 3, padding=1)),
        nn.Conv2d(2, 2, 3, padding=1),
        nn.Conv2d(2, 4, 1),
        nn.Conv2d(4, 4, 1),
    ]
    shortcuts = {2: (0, nn.AvgPool2d(2)), 4: (2, nn.Conv2d(2, 4, 1))}
    readout = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    return LayeredNetwork(maps, [LIF() for _ in maps], readout, input_shape=(1, 4, 4), timesteps=3, shortcuts=shortcuts)


def test_operations_of_pools_and_shortcuts() -> None:
    # 2 x 2 places behind the pool; the last hidden layer has 4 * 4 products of its own, 2 * 4 of the shortcut.
    assert macs_per_layer(residual()) == [2 * 16, 4 * 36, 4 * 36, 4 * 8, 4 * 16 + 4 * 8, 12]


def test_spikes_per_input_of_pools_and_shortcuts() -> None:
    rates = {"layer1": 0.1, "layer2": 0.2, "layer3": 0.3, "layer4": 0.4, "layer5": 0.5}
    # Layer 2: 4 neurons share an input. Layer 3: those of layer 2, and 32 * 0.1 spikes added as they are.
    # Layer 5: 64 operations at 0.4 and 32 at 0.3. Readout: 4 neurons an input.
    expected = [0.4, 0.2 + 32 * 0.1 / 144, 0.3, (64 * 0.4 + 32 * 0.3) / 96, 2.0]
    assert spikes_per_input(residual(), rates) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "shape"), [("mlp", (4,)), ("nature_cnn", (2, 36, 36))])
def test_a_plain_network_has_the_rates_of_its_layers_exactly(name: str, shape: tuple[int, ...]) -> None:
    network = build_network(name, shape, 2)
    rates = {layer: 0.1 / (i + 3) for i, layer in enumerate(network.layer_names)}
    assert spikes_per_input(network, rates) == list(rates.values())


def test_accumulates_are_the_spikes_that_arrive() -> None:
    """Counted by brute force: every spike of layer 1 goes through a pool into a 1x1 convolution of 5 filters."""
    torch.manual_seed(0)
    maps = [nn.Conv2d(1, 3, 1), nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 5, 1))]
    network = LayeredNetwork(maps, [LIF(), LIF()], nn.Flatten(), input_shape=(1, 8, 8), timesteps=4)
    counter, total = SpikeCounter(), 0.0

    def count(layer: str, spikes: torch.Tensor, potential: torch.Tensor) -> None:
        nonlocal total
        counter(layer, spikes, potential)
        total += float(spikes.detach().sum()) * 5 if layer == "layer1" else 0

    network(torch.randn(1, 6, 1, 8, 8), observer=count)
    maps_only = LayeredNetwork(maps, [LIF(), LIF()], nn.Linear(80, 2), input_shape=(1, 8, 8))
    maps_only.readout = nn.Sequential(nn.Flatten(), nn.Linear(80, 2))
    per_input = spikes_per_input(maps_only, counter.rates)[0]
    assert per_input * macs_per_layer(maps_only)[1] * 4 * 6 == pytest.approx(total)
    assert total > 0


def test_the_energy_of_counted_spikes_worked_by_hand() -> None:
    torch.manual_seed(0)
    network, counter, inputs = residual(), SpikeCounter(), torch.randn(20, 1, 4, 4)
    calibrate_thresholds(network, inputs, 0.3)
    network(inputs.unsqueeze(0), observer=counter)
    r1, r2, r3, r4, r5 = (counter.rates[name] for name in network.layer_names)
    assert min(r1, r2, r3, r4, r5) > 0
    # The operations of the test above; three timesteps.
    added = 3 * (144 * 4 * r1 + 144 * r2 + 32 * r1 + 32 * r3 + 64 * r4 + 32 * r3 + 12 * 4 * r5)
    papers = 3 * (144 * r1 + 144 * r2 + 32 * r3 + 96 * r4 + 12 * r5)  # blind to pools and shortcuts
    ann = 460 * 4.6
    found = measured_energy(network, counter)
    assert found.ratio == pytest.approx(ann / (32 * 4.6 + added * 0.9))
    assert found.ratio_int32 == pytest.approx(460 * 3.2 / (32 * 3.2 + added * 0.1))
    assert found.accumulates_per_mac == pytest.approx(added / 428)
    assert found.ratio_of_rates == pytest.approx(ann / (32 * 4.6 + papers * 0.9))
    early = measured_energy(network, counter, 1.5)
    assert early.accumulates_per_mac == pytest.approx(added / 428 / 2)
    assert early.ratio == pytest.approx(ann / (32 * 4.6 + added / 2 * 0.9))
    relu = build_network("mlp", (4,), 2, neuron="relu")
    assert measured_energy(relu, SpikeCounter()) == Energy(1.0, 1.0, None, 1.0)


def test_integers_and_floats() -> None:
    macs, rates = [10, 20, 30], [0.5, 0.1]
    assert (FLOAT32, INT32) == ((4.6, 0.9), (3.2, 0.1))
    assert energy_pj(macs, rates, 2, arithmetic=INT32) == pytest.approx(10 * 3.2 + 26 * 0.1)
    assert energy_ratio(macs, rates, 2, arithmetic=INT32) == pytest.approx(60 * 3.2 / 34.6)
    assert energy_ratio(macs, rates, 2) == pytest.approx(276.0 / 69.4)


def test_membrane_traffic() -> None:
    network = build_network("mlp", (4,), 2, hidden=(8, 5), timesteps=3)
    assert membrane_traffic(network) == membrane_traffic(network, stateful=True) == 2 * 3 * 13
    network.set_timesteps(1)
    assert membrane_traffic(network) == 0
    assert membrane_traffic(network, stateful=True) == 2 * 13
    assert membrane_traffic(build_network("mlp", (4,), 2, neuron="relu")) == 0


def test_a_spike_behind_a_mean_over_places_costs_an_addition_per_output() -> None:
    network = build_network("resnet12", (3, 96, 96), 10, timesteps=1, width=1 / 16)
    assert network.neuron_shapes()[-1] == (32, 3, 3)
    rates = dict.fromkeys(network.layer_names, 0.1)
    *_, readout = spikes_per_input(network, rates)
    assert readout == pytest.approx(9 * 0.1)
    assert macs_per_layer(network)[-1] == 32 * 10


def test_a_linear_map_of_the_last_axis_alone() -> None:
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    readout = nn.Sequential(nn.Flatten(), nn.Linear(40, 2))
    network = LayeredNetwork(layers, [LIF(5, 1), LIF(5, 1)], readout, input_shape=(5, 8), timesteps=1)
    assert macs_per_layer(network) == [5 * 64, 5 * 64, 80]
    assert spikes_per_input(network, {"layer1": 0.2, "layer2": 0.1}) == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize("name", ["vgg9", "resnet12", "nature_cnn"])
def test_a_spike_costs_what_the_count_says(name: str) -> None:
    shape = (4, 84, 84) if name == "nature_cnn" else (3, 32, 32)
    torch.manual_seed(0)
    network = build_network(name, shape, 10, timesteps=2, **({} if name == "nature_cnn" else {"width": 1 / 16}))
    weights = accumulate_weights(network)
    rates = {layer: float(rate) for layer, rate in zip(weights, torch.rand(len(weights)), strict=True)}
    macs = macs_per_layer(network)[1:]
    counted = sum(r * m for r, m in zip(spikes_per_input(network, rates), macs, strict=True)) / sum(macs)
    assert sum(weights[layer] * rate for layer, rate in rates.items()) == pytest.approx(counted)


def test_the_cost_of_a_pass_is_that_of_its_counted_spikes_and_has_a_gradient() -> None:
    torch.manual_seed(0)
    network = build_network("vgg6", (3, 32, 32), 10, timesteps=3, width=1 / 16)
    calibrate_thresholds(network, torch.rand(8, 3, 32, 32), 0.2)
    inputs = torch.rand(1, 4, 3, 32, 32)
    counter, cost = SpikeCounter(), SpikeCost(network)
    network(inputs, observer=counter)
    network(inputs, observer=cost)
    weights = accumulate_weights(network)
    counted = 3 * sum(weights[layer] * rate for layer, rate in counter.rates.items())
    assert isinstance(cost.total, torch.Tensor)
    assert float(cost.total.detach()) == pytest.approx(counted, rel=1e-5)
    cost.total.backward()
    thresholds = [neuron.threshold for neuron in network.neurons]
    assert all(t.grad is not None and float(t.grad) < 0 for t in thresholds[-1:]), "a higher one saves spikes"
    cost.clear()
    assert cost.total == 0
