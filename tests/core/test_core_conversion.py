"""Thresholds calibrated on data give the firing rate asked for."""

from __future__ import annotations

import pytest
import torch

from spiking_rl import LIF, LayeredNetwork, SpikeCounter, UserError, build_network, calibrate_thresholds, convert


def network_of(timesteps: int, **options: object) -> LayeredNetwork:
    torch.manual_seed(0)
    return build_network("mlp", (4,), 2, timesteps=timesteps, **({"hidden": (64, 48)} | options))


def thresholds(network: LayeredNetwork) -> list[torch.Tensor]:
    return [n.threshold.detach().clone() for n in network.neurons]


@pytest.mark.parametrize("timesteps", [1, 5])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.35])
@pytest.mark.parametrize("options", [{}, {"leak": 0.5}, {"per_channel": True}], ids=["scalar", "leaky", "per_channel"])
def test_every_layer_reaches_the_rate(timesteps: int, rate: float, options: dict[str, object]) -> None:
    network = network_of(timesteps, **options)
    inputs = torch.randn(500, 4)
    reached = calibrate_thresholds(network, inputs, rate)
    assert reached == pytest.approx([rate, rate], abs=0.01)
    # Counted again by running the network as an agent would.
    counter = SpikeCounter()
    network(inputs.unsqueeze(0), observer=counter)
    assert list(counter.rates.values()) == pytest.approx(reached, abs=1e-3)
    assert network.neurons[0].threshold.requires_grad
    assert all(len(t.unique()) == 1 for t in thresholds(network))


def test_a_network_in_training_is_calibrated_and_converted_as_one_at_rest() -> None:
    def networks() -> tuple[LayeredNetwork, LayeredNetwork]:
        torch.manual_seed(0)
        options = {"width": 1 / 32, "batch_norm": True, "dropout": 0.5}
        made = [build_network("vgg6", (3, 32, 32), 3, neuron=neuron, **options) for neuron in ("relu", "lif")]
        made[0](2 * torch.randn(1, 64, 3, 32, 32))  # statistics that are not those of the inputs below
        return made[0], made[1]

    inputs = torch.randn(64, 3, 32, 32)
    found = []
    for training in (True, False):
        relu, spiking = networks()
        before = {name: tensor.clone() for name, tensor in relu.state_dict().items()}
        reached = convert(relu.train(training), spiking.train(training), inputs)
        assert all(torch.equal(tensor, before[name]) for name, tensor in relu.state_dict().items())
        again = calibrate_thresholds(spiking, inputs, 0.15)
        assert (relu.training, spiking.training, relu.maps[0].training) == (training,) * 3
        found.append((reached, again, spiking.state_dict()))
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(tensor, found[1][2][name]) for name, tensor in found[0][2].items())


def test_a_relu_network_has_nothing_to_calibrate() -> None:
    with pytest.raises(UserError, match="network = 'relu': has no thresholds"):
        calibrate_thresholds(network_of(1, neuron="relu"), torch.randn(8, 4))


def test_calibration_is_repeatable_and_changes_thresholds_alone() -> None:
    network = network_of(3)
    inputs = torch.randn(200, 4)
    before = {k: v.clone() for k, v in network.state_dict().items() if "threshold" not in k}
    calibrate_thresholds(network, inputs, 0.2)
    first = thresholds(network)
    calibrate_thresholds(network, inputs, 0.2)
    torch.testing.assert_close(thresholds(network), first)
    assert all(torch.equal(network.state_dict()[k], v) for k, v in before.items())


def test_forward_never_calibrates() -> None:
    network = network_of(2)
    before = thresholds(network)
    network(torch.randn(3, 200, 4) * 50)
    network(torch.randn(3, 200, 4) * 50, network.initial_state(200))
    assert all(torch.equal(a, b) for a, b in zip(before, thresholds(network), strict=True))


def test_a_layer_that_cannot_fire_says_so() -> None:
    network = network_of(2, layer_norm=False)
    with torch.no_grad():
        network.maps[0].bias.fill_(-100)
    reached = calibrate_thresholds(network, torch.randn(100, 4), 0.2)
    assert reached[0] == 0.0


@pytest.mark.parametrize("timesteps", [1, 5])
def test_where_few_currents_are_positive_the_threshold_is_among_them(timesteps: int) -> None:
    network = network_of(timesteps, layer_norm=False)
    inputs = torch.randn(500, 4)
    with torch.no_grad():
        network.maps[0].bias.copy_(-torch.quantile(network.maps[0](inputs), 0.95, dim=0))
    rare = network.maps[0](inputs).relu().detach()
    positive = float((rare > 0).float().mean())
    assert positive < 0.1
    reached = calibrate_thresholds(network, inputs, 0.2)[0]
    # A quarter of the spikes that they could give are not given: a surrogate gradient has both sides to see.
    assert reached == pytest.approx(0.75 * positive, rel=0.05)
    assert float(thresholds(network)[0]) > 0.1 * float(rare[rare > 0].mean())


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan")])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    network = network_of(2)
    before = thresholds(network)
    with pytest.raises(UserError, match="between 0 and 1") as caught:
        calibrate_thresholds(network, torch.randn(10, 4), rate)
    assert caught.value.field == "rate"
    assert thresholds(network) == before


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.zeros(0, 4), "at least 2"),
        (torch.zeros(1, 4), "at least 2"),
        (torch.tensor([[0.0, 1, 2, 3], [0, 1, float("nan"), 3]]), "finite"),
        (torch.tensor([[0.0, 1, 2, 3], [0, 1, float("inf"), 3]]), "finite"),
    ],
    ids=["none", "one", "nan", "infinity"],
)
def test_useless_inputs_are_refused(inputs: torch.Tensor, words: str) -> None:
    network = network_of(2)
    before = thresholds(network)
    with pytest.raises(UserError, match=words) as caught:
        calibrate_thresholds(network, inputs)
    assert caught.value.field == "inputs"
    assert thresholds(network) == before


@pytest.mark.parametrize(("layer_norm", "rate", "limit"), [(False, 0.05, 0.05), (True, 0.2, 0.4)])
def test_a_converted_network_approaches_the_relu_network_as_t_grows(
    layer_norm: bool, rate: float, limit: float
) -> None:
    torch.manual_seed(1)
    shape = {"hidden": (64, 48), "layer_norm": layer_norm}
    relu = build_network("mlp", (4,), 3, neuron="relu", **shape)
    torch.nn.init.normal_(relu.readout.weight)
    torch.nn.init.normal_(relu.readout.bias)
    inputs = torch.randn(500, 4)
    wanted = relu(inputs.unsqueeze(0))[0]
    errors = []
    for timesteps in (1, 16, 256):
        spiking = build_network("mlp", (4,), 3, timesteps=timesteps, **shape)
        convert(relu, spiking, inputs, rate)
        got = spiking(inputs.unsqueeze(0))[0]
        errors.append(((got - wanted).std() / wanted.std()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < limit
    assert torch.equal(relu(inputs.unsqueeze(0))[0], wanted)  # the source stays


@pytest.mark.parametrize("timesteps", [1, 5])
def test_conversion_finds_a_rate_by_itself(timesteps: int) -> None:
    torch.manual_seed(1)
    relu = build_network("mlp", (4,), 3, neuron="relu", hidden=(64, 48))
    torch.nn.init.normal_(relu.readout.weight)
    inputs = torch.randn(500, 4)
    wanted = relu(inputs.unsqueeze(0))[0]

    def error(rate: float | None) -> float:
        spiking = build_network("mlp", (4,), 3, timesteps=timesteps, hidden=(64, 48))
        convert(relu, spiking, inputs, rate)
        return (spiking(inputs.unsqueeze(0))[0] - wanted).square().mean().item()

    chosen, fixed = error(None), [error(rate) for rate in (0.04, 0.12, 0.2, 0.3)]
    assert chosen <= min(fixed) < max(fixed)


def test_conversion_refuses_networks_that_do_not_fit() -> None:
    relu = build_network("mlp", (4,), 2, neuron="relu", hidden=(8,))
    spiking = network_of(2)
    before = {k: v.clone() for k, v in spiking.state_dict().items()}
    with pytest.raises(UserError, match="same options"):
        convert(relu, spiking, torch.randn(10, 4))
    with pytest.raises(UserError, match="in this order"):
        convert(spiking, relu, torch.randn(10, 4))
    fitting = build_network("mlp", (4,), 2, neuron="relu", hidden=(64, 48))
    with pytest.raises(UserError, match="finite"):
        convert(fitting, spiking, torch.full((10, 4), float("nan")))
    with pytest.raises(UserError, match="between 0 and 1"):
        convert(fitting, spiking, torch.randn(10, 4), rate=2)
    assert all(torch.equal(before[k], v) for k, v in spiking.state_dict().items())


def test_a_layer_of_two_linear_maps_cannot_be_converted() -> None:
    class Dueling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.advantage = torch.nn.Linear(8, 1), torch.nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.value(x) + self.advantage(x)

    relu, spiking = (
        LayeredNetwork([torch.nn.Linear(4, 8)], [neuron], Dueling(), input_shape=(4,))
        for neuron in (torch.nn.ReLU(), LIF())
    )
    with pytest.raises(UserError, match="exactly one"):
        convert(relu, spiking, torch.randn(10, 4))
