"""Batch norm folded away changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spiking_rl import LIF, LayeredNetwork, UserError, build_network, fold_batch_norm, take_weights

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d)


def trained(name: str, neuron: str) -> LayeredNetwork:
    """Build a network whose batch norms have seen data and whose scales and shifts are no longer 1 and 0."""
    torch.manual_seed(0)
    network = build_network(name, (2, 16, 16), 3, neuron=neuron, width=1 / 16, batch_norm=True, timesteps=3).double()
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    for module in network.modules():
        if isinstance(module, BATCH_NORM):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    for _ in range(5):
        network(3 + torch.randn(1, 20, 2, 16, 16, dtype=torch.float64))
    return network


@pytest.mark.parametrize("name", ["vgg6", "vgg9", "resnet12"])
@pytest.mark.parametrize("neuron", ["relu", "lif"])
def test_a_folded_network_is_equal(name: str, neuron: str) -> None:
    network = trained(name, neuron).eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    images = torch.randn(1, 8, 2, 16, 16, dtype=torch.float64)
    folded = fold_batch_norm(network)
    assert not any(isinstance(m, BATCH_NORM) for m in folded.modules())
    assert not any(folded.buffers())
    torch.testing.assert_close(folded(images)[0], network(images)[0], rtol=1e-9, atol=1e-9)
    assert len(folded(images)[0][0].unique(dim=0)) > 2
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items()), "the source stays"
    assert not any(m.training for m in folded.modules())
    again = fold_batch_norm(folded)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in folded.state_dict().items())


@pytest.mark.parametrize("name", ["vgg6", "resnet12"])
def test_a_folded_network_has_the_parameters_of_one_with_biases(name: str) -> None:
    folded = fold_batch_norm(trained(name, "relu"))
    assert folded.training, "as given"
    spiking = build_network(name, (2, 16, 16), 3, width=1 / 16, bias=True).double()
    take_weights(folded, spiking)
    assert all(torch.equal(p, spiking.state_dict()[n]) for n, p in folded.state_dict().items())
    with pytest.raises(UserError, match="bias=True"):
        take_weights(folded, build_network(name, (2, 16, 16), 3, width=1 / 16))
    with pytest.raises(UserError, match="in this order"):
        take_weights(spiking, folded)


def test_asking_for_shapes_leaves_the_statistics_alone() -> None:
    network = build_network("vgg6", (2, 16, 16), 3, width=1 / 16, batch_norm=True)
    before = [b.clone() for b in network.buffers()]
    network.neuron_shapes()
    assert all(torch.equal(a, b) for a, b in zip(before, network.buffers(), strict=True))
    assert all(m.training for m in network.modules())


def test_linear_layers_fold_too_and_a_lone_batch_norm_is_refused() -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    network = LayeredNetwork([chain], [nn.ReLU()], nn.Linear(5, 2), input_shape=(4,))
    network(torch.randn(1, 50, 4))
    inputs = torch.randn(1, 6, 4)
    network.eval()
    torch.testing.assert_close(fold_batch_norm(network)(inputs)[0], network(inputs)[0])
    lone = LayeredNetwork(
        [nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5))], [LIF()], nn.Linear(5, 2), input_shape=(4,)
    )
    with pytest.raises(UserError, match="directly behind"):
        fold_batch_norm(lone)
