"""Balanced thresholds are the percentile of the currents; balanced networks approach their ANN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spiking_rl import (
    LIF,
    LayeredNetwork,
    UserError,
    balance_thresholds,
    build_network,
    convert_balanced,
    fold_batch_norm,
)

SHAPE = (2, 16, 16)


def spiking(name: str, **options: Any) -> LayeredNetwork:
    torch.manual_seed(0)
    return build_network(name, SHAPE, 3, **({"width": 1 / 16} | options))


def images(count: int = 12) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def thresholds(network: LayeredNetwork) -> list[float]:
    return [n.threshold.flatten()[0].item() for n in network.neurons if isinstance(n, LIF)]


def measured(network: LayeredNetwork, inputs: Tensor, percentile: float, timesteps: int) -> list[float]:
    """Return each layer's percentile, from currents recorded by hooks while the finished network runs."""
    network.set_timesteps(timesteps)
    currents: dict[int, Tensor] = {}
    ways: dict[str, Tensor] = {}
    for key, module in network.shortcuts.items():
        module.register_forward_hook(lambda _, __, out, key=key: ways.update({key: out}))
    for i, module in enumerate(network.maps):
        module.register_forward_hook(lambda _, __, out, i=i: currents.update({i: out}))
    network(inputs.unsqueeze(0))
    found = []
    for i, current in currents.items():
        whole = current + ways[str(i)] if str(i) in ways else current
        over_time = whole.detach().reshape(-1, whole.numel() if i == 0 else whole.numel() // timesteps).numpy()
        found.append(float(np.percentile(over_time, percentile, axis=1, method="inverted_cdf").max()))
    return found


@pytest.mark.parametrize("name", ["vgg6", "resnet12"])
@pytest.mark.parametrize(("percentile", "timesteps"), [(90, 11), (99.7, 8), (97, 1)])
def test_thresholds_are_the_percentile_of_the_current(name: str, percentile: float, timesteps: int) -> None:
    network = spiking(name, timesteps=3, dropout=0.3, per_channel=name == "vgg6")
    before = {k: v.clone() for k, v in network.state_dict().items() if not k.endswith("threshold")}
    set_to = balance_thresholds(network, images(), percentile=percentile, timesteps=timesteps)
    assert set_to == thresholds(network)
    assert all(n.threshold.unique().numel() == 1 for n in network.neurons if isinstance(n, LIF))
    assert network.training
    assert network.timesteps == 3
    assert all(torch.equal(before[k], network.state_dict()[k]) for k in before)
    expected = [max(e, 1e-3) for e in measured(network.eval(), images(), percentile, timesteps)]
    assert set_to == pytest.approx(expected, rel=1e-5)
    assert len(set(set_to)) > len(set_to) // 2


def test_scaling_comes_last() -> None:
    whole, scaled = spiking("vgg6"), spiking("vgg6")
    full = balance_thresholds(whole, images(), percentile=99.7, timesteps=10)
    fifth = balance_thresholds(scaled, images(), percentile=99.7, scale=0.2, timesteps=10)
    assert fifth == pytest.approx([max(0.2 * t, 1e-3) for t in full])
    again = balance_thresholds(scaled, images(), percentile=99.7, scale=0.2, timesteps=10)
    assert again == pytest.approx(fifth)


def test_residual_blocks_may_be_fixed() -> None:
    network = spiking("resnet12")
    found = balance_thresholds(network, images(), percentile=99.7, scale=0.2, timesteps=10, residual=0.4)
    assert found[3:] == pytest.approx([0.4] * 8)
    whole = balance_thresholds(spiking("resnet12"), images(), percentile=99.7, timesteps=10)
    assert found[:3] == pytest.approx([0.2 * t for t in whole[:3]])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"percentile": 0}, "at most 100"),
        ({"percentile": 100.1}, "at most 100"),
        ({"percentile": float("nan")}, "at most 100"),
        ({"scale": 0}, "positive"),
        ({"scale": float("inf")}, "positive"),
        ({"residual": -1.0}, "positive"),
        ({"timesteps": 0}, "whole number"),
        ({"timesteps": 2.5}, "whole number"),
        ({"images": torch.zeros(1, *SHAPE)}, "at least 2"),
        ({"images": torch.full((2, *SHAPE), float("nan"))}, "finite"),
        ({"images": torch.zeros(4, 3, 16, 16)}, "must be"),
    ],
    ids=str,
)
def test_useless_arguments_are_refused(option: dict[str, Any], words: str) -> None:
    network = spiking("vgg6")
    before = thresholds(network)
    arguments: dict[str, Any] = {"images": images(), "percentile": 90, "timesteps": 2} | option
    with pytest.raises(UserError, match=words) as caught:
        balance_thresholds(network, arguments.pop("images"), **arguments)
    assert caught.value.field in option
    assert thresholds(network) == before
    with pytest.raises(UserError, match="has no thresholds"):
        balance_thresholds(spiking("vgg6", neuron="relu"), images(), percentile=90)


@pytest.mark.parametrize(("name", "batch_norm"), [("vgg6", False), ("vgg6", True), ("resnet12", True)])
def test_a_balanced_network_approaches_its_ann(name: str, batch_norm: bool) -> None:
    """With biases and shortcuts that is true only if all that meets in a layer is of one unit."""
    relu = spiking(name, neuron="relu", batch_norm=batch_norm, width=1 / 8)
    nn.init.normal_(relu.readout.weight)  # type: ignore[arg-type]
    inputs = images(30)
    for module in relu.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
    for _ in range(20 if batch_norm else 0):
        relu(inputs.unsqueeze(0))
    relu = fold_batch_norm(relu.eval())
    wanted = relu(inputs.unsqueeze(0))[0].detach()
    errors = []
    for timesteps in (8, 64, 400):
        network = spiking(name, timesteps=timesteps, width=1 / 8, bias=batch_norm)
        convert_balanced(relu, network, inputs, percentile=99.9, timesteps=40)
        with torch.no_grad():
            errors.append(((network(inputs.unsqueeze(0))[0] - wanted).std() / wanted.std()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.25
    assert torch.equal(relu(inputs.unsqueeze(0))[0], wanted), "the source stays"


def test_a_normalised_network_is_not_balanced() -> None:
    relu = spiking("vgg6", neuron="relu", batch_norm=True)
    network = spiking("vgg6", bias=True)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(UserError, match="fold batch norm"):
        convert_balanced(relu, network, images(), percentile=90)
    with pytest.raises(UserError, match="bias=True"):
        convert_balanced(fold_batch_norm(relu), spiking("vgg6"), images(), percentile=90)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
