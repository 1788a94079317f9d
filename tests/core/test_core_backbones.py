"""VGGs and ResNets: their size, their dropout, and their equations written out a second time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spiking_rl import LIF, LayeredNetwork, UserError, build_network, calibrate_thresholds, macs_per_layer

NAMES = ["vgg6", "vgg9", "vgg11", "vgg16", "resnet12", "resnet20", "resnet34"]


def sized(name: str, side: int, outputs: int) -> LayeredNetwork:
    """Build at full size without memory."""
    with torch.device("meta"):
        return build_network(name, (3, side, side), outputs)


def small(name: str, side: int = 16, **options: Any) -> LayeredNetwork:
    torch.manual_seed(0)
    network = build_network(name, (2, side, side), 3, **({"width": 1 / 16} | options))
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize(
    ("name", "side", "outputs", "millions"),
    [("vgg16", 32, 10, 338.4), ("vgg6", 32, 10, 108.8), ("resnet20", 32, 10, 215.7), ("vgg16", 224, 1000, 15470)],
)
def test_operations_are_the_papers(name: str, side: int, outputs: int, millions: float) -> None:
    macs = macs_per_layer(sized(name, side, outputs))
    assert sum(macs) / 1e6 == pytest.approx(millions, abs=0.05 if millions < 1000 else 5)


def test_layers_are_the_papers() -> None:
    macs = macs_per_layer(sized("vgg16", 32, 10))
    assert len(macs) == 16
    assert macs[0] == 3 * 64 * 9 * 32 * 32
    assert macs[0] / sum(macs) == pytest.approx(0.0052, abs=5e-5)
    assert macs[-3:] == [2048 * 4096, 4096 * 4096, 40960]
    assert macs_per_layer(sized("vgg16", 224, 1000))[-3] == 25088 * 4096
    assert macs_per_layer(sized("vgg6", 32, 10))[-3] == 8192 * 4096
    residual = macs_per_layer(sized("resnet20", 32, 10))
    assert residual[-1] == 20480
    # The second layer of the second stage: its own convolution, and the shortcut's from 64 channels.
    assert residual[8] == 128 * 128 * 9 * 64 + 64 * 128 * 64
    assert residual[4] == 64 * 64 * 9 * 256, "shortcuts of the first stage have no weights"


@pytest.mark.parametrize(
    ("name", "layers"),
    [("vgg6", 6), ("vgg9", 10), ("vgg11", 11), ("vgg16", 16), ("resnet12", 12), ("resnet20", 20), ("resnet34", 34)],
)
def test_names_count_layers(name: str, layers: int) -> None:
    assert len(macs_per_layer(sized(name, 32, 10))) == layers


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
@pytest.mark.parametrize("side", [32, 84, 224])
def test_images_of_any_size(name: str, side: int) -> None:
    with torch.device("meta"):
        network = build_network(name, (3, side, side + 3), 7, timesteps=2)
        assert network(torch.zeros(1, 2, 3, side, side + 3))[0].shape == (1, 2, 7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("neuron", ["lif", "relu"])
def test_parameters(name: str, neuron: str) -> None:
    network = small(name, neuron=neuron)
    assert not any(n.endswith("bias") for n in network.state_dict() if n != "readout.bias")
    assert all(n.threshold.dim() == 0 for n in network.neurons if isinstance(n, LIF))
    spiking = small(name, per_channel=True)
    assert all(n.threshold.shape[0] == s[0] for n, s in zip(spiking.neurons, spiking.neuron_shapes(), strict=True))


@pytest.mark.parametrize("name", ["vgg6", "resnet12", "resnet34"])
def test_he_initialisation_keeps_the_size_of_currents(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, (3, 32, 32), 10, neuron="relu", width=0.5)
    spread = []
    network(torch.randn(1, 8, 3, 32, 32), observer=lambda _, __, u: spread.append(u.std().item()))
    assert all(0.2 < s < 4 for s in spread), spread


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "option",
    [
        {"width": 0},
        {"width": -1.0},
        {"width": math.nan},
        {"width": "wide"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": "a"},
        {"threshold": 0.0},
        {"leak": 1.5},
        {"neuron": "tanh"},
        {"timesteps": 0},
        {"no_such_option": 1},
    ],
    ids=str,
)
def test_bad_options_are_refused(name: str, option: dict[str, Any]) -> None:
    ((field, _),) = option.items()
    with pytest.raises(UserError) as caught:
        build_network(name, (3, 16, 16), 3, **({"width": 1 / 16} | option))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("shape", "outputs", "field"),
    [
        ((4,), 0, "outputs"),
        ((4,), 2.5, "outputs"),
        ((4,), True, "outputs"),
        ((-4,), 2, "input_shape"),
        ((4.5,), 2, "input_shape"),
        ((), 2, "input_shape"),
    ],
)
def test_sizes_that_no_network_has_are_refused(shape: tuple[Any, ...], outputs: Any, field: str) -> None:
    with pytest.raises(UserError, match="must be whole numbers of at least 1") as caught:
        build_network("mlp", shape, outputs)
    assert caught.value.field == field
    assert build_network("mlp", (np.int64(4),), np.int64(2)).input_shape == (4,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 3, 32), (3, 32, 3), (32, 32), (3,), (0, 32, 32), (1, 3, 32, 32)], ids=str)
def test_bad_images_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="at least") as caught:
        build_network(name, shape, 3, width=1 / 16)
    assert caught.value.field == "input_shape"


def test_a_bad_dropout_of_the_dense_layers_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        build_network("vgg6", (3, 16, 16), 3, dense_dropout=1)
    assert caught.value.field == "dense_dropout"


class Inputs:
    """Keeps what each map was given, ``(T*B, *N)``: spikes behind dropout and before pools."""

    def __init__(self, network: LayeredNetwork) -> None:
        self.seen: dict[int, Tensor] = {}
        for i, layer in enumerate([*network.maps, network.readout]):
            layer.register_forward_hook(lambda _, args, __, i=i: self.seen.update({i: args[0].detach()}))


@pytest.mark.parametrize("name", ["vgg6", "resnet12"])
@pytest.mark.parametrize("stateful", [False, True])
def test_one_dropout_mask_for_all_timesteps(name: str, stateful: bool) -> None:
    """With thresholds that everything passes, what is missing is what was dropped."""
    network = small(name, timesteps=4, dropout=0.5, threshold=0.001)
    with torch.no_grad():
        for layer in [*network.maps, *network.shortcuts.values()]:
            for weight in layer.parameters():
                weight.fill_(1.0)
    inputs = Inputs(network)
    images, state = torch.ones(1, 6, 2, 16, 16), network.initial_state(6) if stateful else None
    torch.manual_seed(1)
    network.train()(images, state)
    second = inputs.seen[1].reshape(4, 6, -1)
    if network.dropout[0]:
        assert set(second.unique().tolist()) == {0.0, 2.0}, "what is left is scaled up"
        assert (second[0] == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    for i, p in enumerate(network.dropout):
        dropped = inputs.seen[i + 1].reshape(4, 6, -1) == 0
        assert bool(dropped.any()) == (p > 0)
        assert bool((dropped == dropped[0]).all()), "the same at every timestep"
        assert p == 0 or bool((dropped[0, 0] != dropped[0, 1]).any()), "another mask for every sample"
    dropped_at = network.dropout.index(0.5) + 1
    network(images, state)
    another = inputs.seen[dropped_at]
    torch.manual_seed(1)
    network(images, state)
    again = inputs.seen[dropped_at]
    assert not torch.equal(another, again), "another mask in every pass"
    torch.manual_seed(1)
    network.set_timesteps(2)
    network(images, state)
    assert torch.equal(inputs.seen[dropped_at], again[: 2 * 6]), "drawn from torch's own generator, once whatever T"
    network.set_timesteps(4)
    network.eval()(images, state)
    assert all(bool((inputs.seen[i + 1] == 1).all()) for i in range(len(network.maps)))


def test_where_dropout_is() -> None:
    """As in the papers' code: not before a pool, and never on what a shortcut takes."""
    assert small("vgg6", 32, dropout=0.2, dense_dropout=0.5).dropout == [0, 0.2, 0, 0.5, 0.5]
    assert small("vgg9", 32, dropout=0.2).dropout == [0, 0.2, 0, 0.2, 0, 0, 0.2, 0, 0]
    residual = small("resnet12", dropout=0.2)
    assert residual.dropout == [0.2, 0.2, 0, *[0.2, 0] * 4]
    assert not any(residual.dropout[source] for source in residual.sources.values())


def test_shortcuts_must_fit() -> None:
    maps, neurons = [nn.Linear(4, 4) for _ in range(3)], [LIF() for _ in range(3)]

    def network(**options: Any) -> LayeredNetwork:
        return LayeredNetwork(maps, neurons, nn.Linear(4, 2), input_shape=(4,), **options)

    for wrong in ({1: (1, nn.Identity())}, {0: (-1, nn.Identity())}, {3: (0, nn.Identity())}):
        with pytest.raises(ValueError, match="later one"):
            network(shortcuts=wrong)
    with pytest.raises(ValueError, match="twice"):
        network(shortcuts={1: (0, nn.Identity()), 2: (0, nn.Identity())})
    with pytest.raises(ValueError, match="2 dropout"):
        network(dropout=[0, 0])
    with pytest.raises(UserError, match="dropout"):
        network(dropout=[0, 0, 1])


class _Step(torch.autograd.Function):
    """The papers' step function with its triangular surrogate, of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grads[0] * 0.3 * torch.clamp(1 - z.abs(), min=0)


def published(name: str, p: dict[str, Tensor], images: Tensor, timesteps: int) -> Tensor:
    """Run vgg6 or resnet12 timestep by timestep with the equations as published.

    Of the network under test only the parameters are used, in their order of definition.
    """
    weights = [w for n, w in p.items() if n.startswith("maps.")]
    extra = [w for n, w in p.items() if n.startswith("shortcuts.")]
    count = len(weights)
    membranes: list[Tensor | None] = [None] * count
    total = torch.zeros(())

    def fire(layer: int, current: Tensor) -> Tensor:
        theta, leak = p[f"neurons.{layer}.threshold"], p[f"neurons.{layer}.leak"]
        before = membranes[layer]
        u = current if before is None else leak * before + current
        spikes = _Step.apply(u / theta - 1)  # type: ignore[no-untyped-call]
        membranes[layer] = u - theta * spikes.detach()
        return spikes  # type: ignore[no-any-return]

    def conv(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    for _ in range(timesteps):
        x = fire(0, conv(images, weights[0]))
        if name == "vgg6":
            x = fire(1, conv(F.avg_pool2d(x, 2), weights[1]))
            x = fire(2, conv(x, weights[2]))
            x = fire(3, F.avg_pool2d(x, 2).flatten(1) @ weights[3].T)
            x = fire(4, x @ weights[4].T)
        else:
            x = fire(1, conv(x, weights[1]))
            x = F.avg_pool2d(fire(2, conv(x, weights[2])), 2)
            for block in range(4):
                i = 3 + 2 * block
                past = conv(x, extra[block - 1], 2) if block else x
                inner = fire(i, conv(x, weights[i], 2 if block else 1))
                x = fire(i + 1, conv(inner, weights[i + 1]) + past)
            x = x.flatten(1)
        total = total + x @ p["readout.weight"].T + p["readout.bias"]
    return total / timesteps


@pytest.mark.parametrize("name", ["vgg6", "resnet12"])
@pytest.mark.parametrize("timesteps", [1, 2, 3, 4, 5])
def test_values_and_gradients_are_the_published_equations(name: str, timesteps: int) -> None:
    network = small(name, timesteps=timesteps, width=1 / 8).double()
    images = torch.randn(4, 2, 16, 16, dtype=torch.float64)
    calibrate_thresholds(network, images, 0.3)
    with torch.no_grad():
        for i, neuron in enumerate(network.neurons):
            assert isinstance(neuron, LIF)
            neuron.leak.fill_(0.95 - 0.03 * i)
        nn.init.normal_(network.readout.bias)  # type: ignore[arg-type]
    copies = {n: p.detach().clone().requires_grad_() for n, p in network.named_parameters()}
    there = images.clone().requires_grad_()
    here = images.clone().requires_grad_()
    expected = published(name, copies, there, timesteps)
    found = network(here.unsqueeze(0))[0][0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert len(found.unique(dim=0)) == 4, "outputs that are all alike would prove nothing"
    aim = torch.randn(4, 3, dtype=torch.float64)
    (found * aim).sum().backward()
    (expected * aim).sum().backward()
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-8, atol=1e-10)
    for n, parameter in network.named_parameters():
        if timesteps == 1 and n.endswith("leak"):
            continue
        assert parameter.grad is not None, n
        assert parameter.grad.any(), n
        torch.testing.assert_close(parameter.grad, copies[n].grad, rtol=1e-8, atol=1e-10, msg=n)
