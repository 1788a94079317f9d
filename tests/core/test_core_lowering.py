"""T lowered with thresholds that follow: the network goes on firing, and answers about as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spiking_rl import (
    LIF,
    LayeredNetwork,
    SpikeCounter,
    UserError,
    build_network,
    calibrate_thresholds,
    layerwise,
    lif_scan,
    lowering,
)
from spiking_rl.lowering import lower_timesteps, measuring_norms


def network_of(name: str, shape: tuple[int, ...], timesteps: int, **options: object) -> LayeredNetwork:
    """Return a network with calibrated thresholds and an output that is not zero."""
    torch.manual_seed(0)
    network = build_network(name, shape, 3, timesteps=timesteps, neuron="lif", **options)
    nn.init.normal_(network.readout.weight, std=0.1)
    network.eval()
    with measuring_norms(network):
        calibrate_thresholds(network, inputs_of(network), 0.15)
    return network


def inputs_of(network: LayeredNetwork, count: int = 48) -> torch.Tensor:
    return torch.randn(count, *network.input_shape, generator=torch.Generator().manual_seed(1))


def answers(network: LayeredNetwork) -> tuple[torch.Tensor, list[float]]:
    """Return outputs, and spikes per neuron and decision of each layer."""
    counter = SpikeCounter()
    with torch.no_grad():
        outputs, _ = network(inputs_of(network).unsqueeze(0), observer=counter)
    return outputs[0], [rate * network.timesteps for rate in counter.rates.values()]


CASES = {
    "vgg, batch norm": ("vgg6", (3, 32, 32), {"width": 1 / 16, "batch_norm": True}),
    "vgg, folded": ("vgg6", (3, 32, 32), {"width": 1 / 16, "bias": True}),
    "resnet": ("resnet12", (3, 32, 32), {"width": 1 / 8, "batch_norm": True}),
    "mlp, layer norm": ("mlp", (8,), {"hidden": (64, 64, 48)}),
    "mlp, channels": ("mlp", (8,), {"hidden": (64, 64), "layer_norm": False, "per_channel": True}),
    "hybrid": ("mlp", (8,), {"hidden": (64, 64), "encoding": "hybrid", "input_zero": -4.0, "input_span": 8.0}),
    "single spikes": ("mlp", (8,), {"hidden": (64, 64), "single_spike": True}),
}


@pytest.mark.parametrize("timesteps", [4, 1])
@pytest.mark.parametrize("case", list(CASES))
def test_every_layer_goes_on_firing_and_one_timestep_answers_as_before(case: str, timesteps: int) -> None:
    name, shape, options = CASES[case]
    network = network_of(name, shape, 5, **options)
    wanted, before = answers(network)
    plain = copy.deepcopy(network)
    plain.set_timesteps(timesteps)
    left, starved = answers(plain)
    leaks = [neuron.leak.detach().clone() for neuron in network.neurons]
    factors = lower_timesteps(network, timesteps, inputs_of(network))
    outputs, after = answers(network)
    assert network.timesteps == timesteps
    # Of an untrained deep network all that is changed changes much.
    if timesteps == 1 and not case.startswith("resnet"):
        assert (outputs - wanted).square().mean() < (left - wanted).square().mean()
    for now, were, had in zip(after, before, starved, strict=True):
        assert 0.9 * were * timesteps / 5 < now < 1.15 * were, "between as many per timestep and as many per decision"
        assert timesteps > 1 or now >= had
    assert all(timesteps / 5 <= factor <= 2 for factor in factors)
    assert all(torch.equal(a, neuron.leak) for a, neuron in zip(leaks, network.neurons, strict=True))
    if timesteps == 1 and case.startswith(("vgg", "resnet")):
        assert starved[-1] < 0.2 * after[-1], "the comparison is with a network that falls silent"


def test_a_current_that_lasts_needs_a_threshold_as_much_lower() -> None:
    network = network_of("mlp", (8,), 10, hidden=(512,))
    with torch.no_grad():
        network.neurons[0].threshold.mul_(6)  # no neuron fires at more than every other timestep
    threshold = network.neurons[0].threshold.item()
    kernel = network.readout.weight.detach().clone()
    wanted, before = answers(network)
    factors = lower_timesteps(network, 5, inputs_of(network))
    outputs, after = answers(network)
    # Half the time, half the threshold, as many spikes: the outputs are means, so that each spike weighs half.
    assert factors == pytest.approx([0.5], abs=0.03)
    assert network.neurons[0].threshold.item() == pytest.approx(threshold * factors[0], rel=1e-5)
    assert after == pytest.approx(before, rel=0.03)
    torch.testing.assert_close(network.readout.weight, kernel / 2, rtol=0.05, atol=0)
    assert (outputs - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_outputs_with_spike_times_fire_as_early_in_a_decision() -> None:
    options = {"encoding": "hybrid", "input_zero": -4.0, "input_span": 8.0, "kappa": 0.5}
    network = network_of("mlp", (8,), 6, hidden=(64, 64), **options)
    inputs = inputs_of(network, 400).unsqueeze(0)
    threshold = network.spike_time.threshold.detach().clone()
    with torch.no_grad():
        before = network.spike_times(inputs).float().mean() / 7
        lower_timesteps(network, 3, inputs[0])
        after = network.spike_times(inputs).float().mean() / 4
    torch.testing.assert_close(network.spike_time.threshold.detach(), threshold / 2)
    assert 0.3 < float(before) < 0.95
    assert abs(float(after - before)) < 0.1


def test_thresholds_of_channels_keep_their_proportions() -> None:
    network = network_of("mlp", (8,), 3, hidden=(16,), per_channel=True)
    with torch.no_grad():
        network.neurons[0].threshold.mul_(torch.linspace(0.5, 2, 16))
    before = network.neurons[0].threshold.detach().clone()
    factors = lower_timesteps(network, 1, inputs_of(network))
    torch.testing.assert_close(network.neurons[0].threshold, before * factors[0])


def test_nothing_but_what_it_says_is_left_changed() -> None:
    network = network_of("vgg6", (3, 32, 32), 3, width=1 / 16, batch_norm=True, dropout=0.3)
    network.train()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].eval()  # somebody's own
    norms[1].momentum = 0.02
    modes = [(module.training, getattr(module, "momentum", None)) for module in network.modules()]
    kernels = {name: p.detach().clone() for name, p in network.named_parameters() if name.startswith("maps.1")}
    lower_timesteps(network, 2, inputs_of(network))
    assert [(module.training, getattr(module, "momentum", None)) for module in network.modules()] == modes
    assert all(torch.equal(dict(network.named_parameters())[name], p) for name, p in kernels.items()), "normalised"
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_it_gives_the_same_whenever_it_is_asked() -> None:
    first, second = (network_of("vgg6", (3, 32, 32), 3, width=1 / 16, batch_norm=True) for _ in range(2))
    assert lower_timesteps(first, 1, inputs_of(first)) == lower_timesteps(second, 1, inputs_of(second))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize(
    ("timesteps", "inputs", "field"),
    [
        (3, torch.zeros(4, 8), "timesteps"),
        (4, torch.zeros(4, 8), "timesteps"),
        (0, torch.zeros(4, 8), "timesteps"),
        (1.5, torch.zeros(4, 8), "timesteps"),
        (True, torch.zeros(4, 8), "timesteps"),
        (1, torch.zeros(1, 8), "inputs"),
        (1, torch.full((4, 8), float("nan")), "inputs"),
        (1, torch.zeros(4, 7), "inputs"),
        (1, torch.zeros(4, 8, dtype=torch.int64), "inputs"),
        (1, torch.zeros(4, 8, dtype=torch.float64), "inputs"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(timesteps: int, inputs: torch.Tensor, field: str) -> None:
    network = network_of("mlp", (8,), 3, hidden=(16,))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError) as caught:
        lower_timesteps(network, timesteps, inputs)
    assert caught.value.field == field
    assert network.timesteps == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_relu_network_has_no_timesteps_to_lower() -> None:
    with pytest.raises(UserError, match="timesteps"):
        lower_timesteps(build_network("mlp", (8,), 2, neuron="relu"), 1, torch.zeros(4, 8))


def test_a_layer_that_cannot_fire_does_not_stop_it() -> None:
    network = network_of("mlp", (8,), 3, hidden=(16, 16), layer_norm=False)
    with torch.no_grad():
        network.maps[1].bias.fill_(-100)
    lower_timesteps(network, 1, inputs_of(network))
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())
    assert all(bool(layer.weight.any()) for layer in (*network.maps, network.readout)), "it can still learn"
    assert all(isinstance(neuron, LIF) and neuron.threshold.item() > 0 for neuron in network.neurons)


def test_decisions_that_may_exit_early_are_watched_to_their_end() -> None:
    plain, early = (network_of("mlp", (8,), 5, hidden=(64, 64)) for _ in range(2))
    early.set_exit_margin(0.05)
    assert lower_timesteps(early, 2, inputs_of(early)) == lower_timesteps(plain, 2, inputs_of(plain))
    assert early.exit_margin == 0.05


def test_an_error_on_the_way_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("vgg6", (3, 32, 32), 3, width=1 / 16, batch_norm=True)
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    calls = 0

    def failing(*given: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise MemoryError
        return lif_scan(*given, **options)  # type: ignore[arg-type,return-value]

    monkeypatch.setattr(layerwise, "lif_scan", failing)
    with pytest.raises(MemoryError):
        lower_timesteps(network, 1, inputs_of(network))
    assert network.timesteps == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(module.training for module in network.modules())


def test_of_large_inputs_fewer_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    network, same = (network_of("mlp", (8,), 4, hidden=(64, 32)) for _ in range(2))
    monkeypatch.setattr(lowering, "_HELD", 64 * 4 * 10)
    assert lower_timesteps(network, 1, inputs_of(network)) == lower_timesteps(same, 1, inputs_of(same)[:10])
