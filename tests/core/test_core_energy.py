"""Operations and energy, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spiking_rl import (
    LIF,
    LayeredNetwork,
    SpikeCounter,
    build_network,
    energy_ratio,
    macs_per_layer,
    normalisation_macs,
)
from spiking_rl.energy import energy_pj, odd_layers


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


def test_odd_layers_are_named() -> None:
    warnings = odd_layers({"layer1": 0.0049, "layer2": 0.2, "layer3": 0.951, "layer4": 0.005, "layer5": 0.95})
    assert len(warnings) == 2
    assert warnings[0].startswith("layer1 has fallen silent")
    assert warnings[1].startswith("layer3 is saturated")
    assert odd_layers({"layer1": 0.2}, silent=0.3) != []
    assert odd_layers({"layer1": 0.2}, saturated=0.1) != []
    assert odd_layers({}) == []
