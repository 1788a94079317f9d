"""What is told of a network whose parameters are no numbers any more."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spiking_rl import LIF, LayeredNetwork
from spiking_rl.tracking import spoiled_layer


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("maps.0.weight", "weight of layer1"),
        ("maps.1.1.bias", "bias of layer2"),
        ("neurons.1.threshold", "threshold of layer2"),
        ("readout.1.weight", "weight of readout"),
        (None, None),
    ],
)
def test_the_layer_with_a_parameter_that_is_no_number_is_named(name: str | None, told: str | None) -> None:
    maps = [nn.Linear(4, 4), nn.Sequential(nn.Flatten(), nn.Linear(4, 4))]
    readout = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    network = LayeredNetwork(maps, [LIF(4), LIF(4)], readout, input_shape=(4,))
    if name is not None:
        with torch.no_grad():
            network.get_parameter(name).view(-1)[-1] = float("nan")
    assert spoiled_layer(network) == told
