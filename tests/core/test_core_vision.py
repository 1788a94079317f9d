"""The spiking Nature-CNN: its shapes, its normalisation, the images it takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from spiking_rl import LIF, UserError, build_network, energy_ratio, macs_per_layer
from spiking_rl.group_norm import GroupNorm


def test_it_has_the_layers_of_the_nature_paper() -> None:
    network = build_network("nature_cnn", (4, 84, 84), 6)
    assert network.neuron_shapes() == [(32, 20, 20), (64, 9, 9), (64, 7, 7), (512,)]
    # Products per output element: 8*8*4, 4*4*32, 3*3*64, 64*7*7, 512.
    expected = [32 * 400 * 256, 64 * 81 * 512, 64 * 49 * 576, 512 * 3136, 6 * 512]
    assert macs_per_layer(network) == expected
    # The analog first layer is a third of it all, which caps the energy ratio.
    assert energy_ratio(expected, [0.0] * 4, 1) == pytest.approx(2.85, abs=0.01)


@pytest.mark.parametrize(("size", "places"), [((36, 36), 1), ((39, 39), 1), ((44, 44), 4), ((36, 84), 7)])
def test_it_takes_any_image_that_the_strides_leave_something_of(size: tuple[int, int], places: int) -> None:
    network = build_network("nature_cnn", (1, *size), 2, timesteps=2)
    channels, height, width = network.neuron_shapes()[2]
    assert (channels, height * width) == (64, places)
    assert network(torch.rand(1, 3, 1, *size))[0].shape == (1, 3, 2)


@pytest.mark.parametrize("shape", [(1, 35, 84), (1, 84, 35), (4,), (1, 1, 84, 84)])
def test_images_that_are_too_small_are_told_with_the_minimum(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"input_shape.*at least 36 x 36") as caught:
        build_network("nature_cnn", shape, 2)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("options", [{"neuron": "tanh"}, {"features": 0}, {"threshold": 0.0}, {"leak": 2.0}])
def test_a_bad_option_is_told_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        build_network("nature_cnn", (1, 36, 36), 2, **options)


@pytest.mark.parametrize(
    ("per_channel", "shapes"), [(True, [(32, 1, 1), (64, 1, 1), (64, 1, 1), (16,)]), (False, [(), (), (), ()])]
)
def test_one_threshold_and_leak_per_channel_or_per_layer(per_channel: bool, shapes: list[tuple[int, ...]]) -> None:
    network = build_network("nature_cnn", (1, 36, 36), 2, features=16, per_channel=per_channel, threshold=0.7, leak=0.2)
    assert [n.threshold.shape for n in network.neurons] == [n.leak.shape for n in network.neurons] == shapes
    assert all(bool((n.threshold == 0.7).all() and (n.leak == 0.2).all()) for n in network.neurons)


def test_currents_are_normalised_over_the_whole_sample_whatever_the_contrast() -> None:
    torch.manual_seed(0)
    network = build_network("nature_cnn", (4, 84, 84), 2)
    for contrast in (1.0, 0.05):
        current = network.maps[0](contrast * torch.rand(8, 4, 84, 84)).flatten(1)
        torch.testing.assert_close(current.mean(1), torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(current.std(1), torch.ones(8), atol=0.02, rtol=0)
    kinds = [
        [type(m) for m in layer.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))] for layer in network.maps
    ]
    assert kinds == [[GroupNorm]] * 3 + [[nn.LayerNorm]]


def test_without_normalisation_inputs_of_unit_variance_give_currents_of_unit_variance() -> None:
    torch.manual_seed(0)
    network = build_network("nature_cnn", (4, 84, 84), 2, layer_norm=False)
    assert not any(isinstance(m, (nn.GroupNorm, nn.LayerNorm)) for m in network.modules())
    assert network.maps[0](torch.randn(8, 4, 84, 84)).std().item() == pytest.approx(1, abs=0.1)


def test_every_layer_starts_awake_on_an_ordinary_image_and_learns() -> None:
    torch.manual_seed(0)
    network = build_network("nature_cnn", (4, 84, 84), 2, timesteps=2)
    nn.init.normal_(network.readout.weight)
    rates: dict[str, float] = {}
    values, _ = network(torch.rand(1, 4, 4, 84, 84), observer=lambda name, s, _: rates.update({name: s.mean().item()}))
    assert all(0.1 < rate < 0.8 for rate in rates.values()), rates
    values.square().sum().backward()
    for neuron in network.neurons:
        assert isinstance(neuron, LIF)
        assert neuron.threshold.grad is not None
        assert neuron.threshold.grad.any()
        assert neuron.leak.grad is not None
        assert neuron.leak.grad.any()


@pytest.mark.parametrize("layer_norm", [True, False])
def test_time_constants_spread_over_channels_with_unit_gain(layer_norm: bool) -> None:
    """A picture that never changes ends in the same potential whatever the leak, once nothing fires."""
    torch.manual_seed(0)
    options = {"time_constants": (0.5, 4.0), "layer_norm": layer_norm, "timesteps": 1}
    network = build_network("nature_cnn", (1, 44, 44), 2, **options)
    for neuron in network.neurons:
        leaks = neuron.leak.flatten()
        assert leaks[0].item() == pytest.approx(math.exp(-1 / 0.5), rel=1e-4)
        assert leaks[-1].item() == pytest.approx(math.exp(-1 / 4), rel=1e-4)
        assert bool((leaks.diff() > 0).all())
    picture = torch.rand(1, 1, 1, 44, 44).expand(60, 1, 1, 44, 44)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        network.neurons[0].threshold.fill_(1e9)
        network(picture, network.initial_state(1), None, lambda layer, _, u: seen.update({layer: u[-1, 0]}))
        current = network.maps[0](picture[0])[0]  # scaled by 1 - leak
    gain = (1 - network.neurons[0].leak.detach()).reshape(-1, 1, 1)
    assert torch.allclose(seen["layer1"], current / gain, atol=1e-3)
    slow, fast = (seen["layer1"].flatten(1).std(1)[half].mean() for half in (slice(16, 32), slice(16)))
    assert slow < 2 * fast, "slow channels do not sum a picture up to more"


@pytest.mark.filterwarnings("ignore:.*Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
def test_a_compiled_network_is_one_graph_and_computes_the_same() -> None:
    torch.manual_seed(0)
    network = build_network("nature_cnn", (2, 36, 36), 3, timesteps=3, features=16)
    torch.nn.init.normal_(network.readout.weight)
    images = torch.rand(1, 4, 2, 36, 36)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images)[0], network(images)[0])
