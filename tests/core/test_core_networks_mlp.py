"""The registered perceptron, the registry, and networks put together by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spiking_rl import LIF, NETWORKS, LayeredNetwork, build_network, register_network


def test_registering_makes_a_network_buildable_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spiking_rl.registry.NETWORKS", dict(NETWORKS))
    from spiking_rl import registry

    @register_network("tiny")
    def tiny(input_shape: tuple[int, ...], outputs: int, *, timesteps: int, neuron: str) -> LayeredNetwork:
        return build_network("mlp", input_shape, outputs, timesteps=timesteps, neuron=neuron, hidden=(2,))

    made = build_network("tiny", [4], 3, timesteps=2, neuron="lif")
    assert made.input_shape == (4,)
    assert made.neuron_shapes() == [(2,)]
    with pytest.raises(ValueError, match="'tiny' is registered already"):
        register_network("tiny")(tiny)
    assert registry.NETWORKS["tiny"] is tiny


@pytest.mark.parametrize(("per_channel", "shapes"), [(False, [(), ()]), (True, [(8,), (5,)])])
def test_one_threshold_per_layer_or_per_neuron(per_channel: bool, shapes: list[tuple[int, ...]]) -> None:
    network = build_network("mlp", (4,), 2, hidden=(8, 5), per_channel=per_channel, threshold=0.7, leak=0.2)
    assert [n.threshold.shape for n in network.neurons] == shapes
    assert all(bool((n.threshold == 0.7).all() and (n.leak == 0.2).all()) for n in network.neurons)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_unit_variance_inputs_give_unit_variance_currents(layer_norm: bool) -> None:
    torch.manual_seed(0)
    network = build_network("mlp", (64,), 2, hidden=(512,), layer_norm=layer_norm)
    current = network.maps[0](torch.randn(2000, 64))
    assert current.std().item() == pytest.approx(1, abs=0.05)


def test_layer_norm_keeps_currents_at_unit_variance_however_large_the_weights() -> None:
    torch.manual_seed(0)
    for layer_norm, spread in ((True, 1.0), (False, 1000.0)):
        network = build_network("mlp", (64,), 2, hidden=(512,), layer_norm=layer_norm)
        with torch.no_grad():
            next(network.maps[0].parameters()).mul_(1000)
        rows = network.maps[0](torch.randn(20, 64)).std(1)
        assert rows.median().item() == pytest.approx(spread, rel=0.1)


def test_the_first_layer_can_keep_the_size_of_its_inputs() -> None:
    torch.manual_seed(0)
    small = torch.tensor([[3.0, 1.0]])
    for normalised in (True, False):
        network = build_network("mlp", (2,), 2, hidden=(64, 32), first_layer_norm=normalised)
        with torch.no_grad():
            for bias in (m.bias for m in network.maps[0].modules() if isinstance(m, nn.Linear)):
                bias.zero_()
        # With nothing but a direction left, one input cannot be told from its double.
        assert torch.allclose(network.maps[0](small), network.maps[0](2 * small), atol=1e-4) == normalised
        second = network.maps[1](torch.randn(20, 64) * 100)
        assert second.std(1, correction=0).mean().item() == pytest.approx(1, abs=0.01)


def test_an_input_of_any_shape_is_flattened() -> None:
    torch.manual_seed(0)
    network = build_network("mlp", (2, 3, 4), 2, hidden=(8,), timesteps=3)
    assert network(torch.randn(2, 5, 2, 3, 4))[0].shape == (2, 5, 2)
    assert network(torch.randn(2, 5, 2, 3, 4), network.initial_state(5))[0].shape == (2, 5, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_runs_in_another_precision(dtype: torch.dtype) -> None:
    network = build_network("mlp", (4,), 2, hidden=(8,), timesteps=3).to(dtype)
    output, after = network(torch.randn(2, 5, 4, dtype=dtype), network.initial_state(5))
    assert output.dtype == dtype
    assert after[0].membrane.dtype == torch.promote_types(dtype, torch.float32), "halves are added up in 32 bits"


def test_maps_and_neurons_must_pair_up() -> None:
    with pytest.raises(ValueError, match="2 maps and 1 neuron"):
        LayeredNetwork([nn.Linear(4, 4), nn.Linear(4, 4)], [LIF()], nn.Linear(4, 2), input_shape=(4,))
    with pytest.raises(ValueError, match="0 maps"):
        LayeredNetwork([], [], nn.Linear(4, 2), input_shape=(4,))


@pytest.mark.parametrize("neurons", [(LIF, nn.ReLU), (nn.ReLU, LIF)])
def test_kinds_of_neurons_do_not_mix(neurons: tuple[type[nn.Module], ...]) -> None:
    with pytest.raises(ValueError, match="mixes"):
        LayeredNetwork([nn.Linear(4, 4), nn.Linear(4, 4)], [n() for n in neurons], nn.Linear(4, 2), input_shape=(4,))


def test_a_convolutional_network_runs_stateless_and_stateful() -> None:
    torch.manual_seed(0)
    maps = [
        nn.Conv2d(1, 3, 3),
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 5, 2)),
        nn.Sequential(nn.Flatten(), nn.Linear(20, 6)),
    ]
    neurons = [LIF(3, 2), LIF(5, 2), LIF(6)]
    network = LayeredNetwork(maps, neurons, nn.Linear(6, 2), input_shape=(1, 8, 8), timesteps=3)
    assert network.neuron_shapes() == [(3, 6, 6), (5, 2, 2), (6,)]
    inputs = torch.randn(4, 2, 1, 8, 8)
    stateless, _ = network(inputs)
    stateful, after = network(inputs, network.initial_state(2), torch.ones(4, 2, dtype=torch.bool))
    # A reset at every decision is what stateless means.
    torch.testing.assert_close(stateful, stateless)
    assert [tuple(s.membrane.shape) for s in after] == [(2, 3, 6, 6), (2, 5, 2, 2), (2, 6)]
