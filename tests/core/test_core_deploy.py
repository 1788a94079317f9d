"""Deployed networks compute what the networks they come from do."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

from spiking_rl import LIF, NETWORKS, LayeredNetwork, UserError, build_network, calibrate_thresholds
from spiking_rl.deploy import SparseLinear, deploy, deploy_stateful, fold_thresholds

SHAPES = [(6,), (3, 32, 32), (4, 84, 84)]
EVERY = pytest.mark.parametrize("name", sorted(NETWORKS))
TIMESTEPS = pytest.mark.parametrize("timesteps", [1, 2, 4])


def network_and_inputs(
    name: str, timesteps: int = 1, rate: float = 0.2, **options: object
) -> tuple[LayeredNetwork, Tensor]:
    """Build a network whose spikes are neither all nor none, and inputs for it, in float64.

    There a current lies within rounding of its threshold about never: equal means equal.
    """
    torch.manual_seed(0)
    if "width" in inspect.signature(NETWORKS[name]).parameters:
        options = {"width": 1 / 8, **options}
    for shape in SHAPES:
        try:
            network = build_network(name, shape, 4, timesteps=timesteps, **options).double().eval()
            network.neuron_shapes()
            break
        except (RuntimeError, ValueError):
            continue
    inputs = torch.randn(24, *network.input_shape, dtype=torch.float64)
    calibrate_thresholds(network, inputs, rate)
    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.normal_(module.weight)  # of either sign
            nn.init.normal_(module.bias)
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    return network, inputs


@torch.no_grad()
def outputs_of(network: LayeredNetwork, inputs: Tensor) -> Tensor:
    return network(inputs.unsqueeze(0))[0].squeeze(0)


def require_equal(network: LayeredNetwork, inputs: Tensor) -> None:
    expected = outputs_of(network, inputs)
    assert len(expected.unique(dim=0)) > len(inputs) / 2
    deployed, before = deploy(network), inputs.clone()
    single = inputs[: 24 // network.timesteps]
    for got in (deployed(inputs), torch.cat([deployed(x.unsqueeze(0)) for x in single])):
        torch.testing.assert_close(got, expected[: len(got)], rtol=1e-9, atol=1e-9)
        assert torch.equal(got.argmax(1), expected[: len(got)].argmax(1))
    assert torch.equal(inputs, before)


@TIMESTEPS
@EVERY
def test_every_registered_network_gives_equal_outputs(name: str, timesteps: int) -> None:
    require_equal(*network_and_inputs(name, timesteps))


@TIMESTEPS
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"layer_norm": False}),
        ("mlp", {"per_channel": True, "hidden": (700, 600)}),
        ("nature_cnn", {"layer_norm": False, "per_channel": False}),
        ("vgg6", {"width": 0.25, "per_channel": True}),  # a large linear layer behind a pool
        ("vgg6", {"batch_norm": True}),
        ("vgg6", {"width": 0.25, "rate": 0.02}),  # whose inputs are silent enough to be skipped at T=4
        ("vgg6", {"dropout": 0.2, "dense_dropout": 0.5}),
        ("resnet12", {"batch_norm": True, "per_channel": True}),
        ("mlp", {"leak": 0.7}),
    ],
)
def test_so_do_networks_with_other_options(name: str, options: dict[str, object], timesteps: int) -> None:
    require_equal(*network_and_inputs(name, timesteps, **options))


def test_so_do_neurons_that_fire_once_at_one_timestep() -> None:
    require_equal(*network_and_inputs("mlp", single_spike=True))


@TIMESTEPS
def test_a_large_readout_sees_means_of_spikes(timesteps: int) -> None:
    network, inputs = network_and_inputs("mlp", timesteps, rate=0.05, hidden=(512,))
    network.readout = nn.Linear(512, 600).double()
    require_equal(network, inputs)


@pytest.mark.parametrize("timesteps", [1, 4])
def test_thousands_of_inputs_in_float32(timesteps: int) -> None:
    """Only where a potential comes within rounding of its threshold may a spike differ."""
    torch.manual_seed(0)
    network = build_network("mlp", (8,), 4, timesteps=timesteps, hidden=(128, 128)).eval()
    inputs = torch.randn(20_000, 8)
    calibrate_thresholds(network, inputs[:500], 0.2)
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    nearest = torch.full((len(inputs),), torch.inf)

    def observe(layer: str, _: Tensor, potential: Tensor) -> None:
        threshold = network.neurons[int(layer[-1]) - 1].threshold
        nearest.copy_(torch.minimum(nearest, (potential - threshold).abs().flatten(2).amin((0, 2))))

    with torch.no_grad():
        expected = network(inputs.unsqueeze(0), observer=observe)[0].squeeze(0)
    deployed = deploy(network)
    clear = nearest > 1e-5
    assert clear.float().mean() > (0.99 if timesteps == 1 else 0.95)
    alone = torch.cat([deployed(x.unsqueeze(0)) for x in inputs[:500]])
    for got in (deployed(inputs), alone):
        sure = clear[: len(got)]
        torch.testing.assert_close(got[sure], expected[: len(got)][sure], rtol=1e-5, atol=1e-5)
        assert torch.equal(got[sure].argmax(1), expected[: len(got)][sure].argmax(1))


def test_batches_of_any_size_and_layout_in_turn() -> None:
    """What is remembered of one batch must not be used for the next."""
    torch.manual_seed(0)
    network = build_network("nature_cnn", (2, 36, 36), 3, timesteps=3).eval()
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    inputs = torch.randn(4, 2, 36, 36)
    calibrate_thresholds(network, inputs, 0.1)
    deployed, threads = deploy(network), torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for batch in (inputs, inputs[:1], inputs.to(memory_format=torch.channels_last), inputs[::2], inputs):
                torch.testing.assert_close(deployed(batch), outputs_of(network, batch), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_a_deployed_network_can_be_copied(timesteps: int) -> None:
    torch.manual_seed(0)
    network = build_network("mlp", (6,), 3, timesteps=timesteps)
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    deployed, inputs = deploy(network), torch.randn(50, 6)
    expected = deployed(inputs)
    copies = [copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))]
    del deployed
    gc.collect()
    assert all(torch.equal(copied(inputs), expected) for copied in copies)


def test_the_thresholds_are_in_the_biases() -> None:
    network, _ = network_and_inputs("nature_cnn", layer_norm=False)
    folded = fold_thresholds(network)
    assert not any(isinstance(module, LIF) for module in folded.modules())
    for before, after, neuron in zip(network.maps, folded.maps, network.neurons, strict=True):
        old, new = list(before.modules())[-1], list(after.modules())[-1]
        assert torch.equal(new.bias, old.bias - neuron.threshold.flatten())
        assert torch.equal(new.weight, old.weight)


@pytest.mark.parametrize(
    "end",
    [nn.Tanh(), nn.LayerNorm(5, elementwise_affine=False), nn.LayerNorm((5,), bias=False), nn.GroupNorm(5, 5)],
    ids=lambda end: str(end).split("(")[0],
)
def test_layers_of_other_kinds(end: nn.Module) -> None:
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(6, 5, bias=False), end)
    network = LayeredNetwork([chain], [LIF(5, threshold=0.1)], nn.Linear(5, 3), input_shape=(6,)).double().eval()
    inputs = torch.randn(200, 6, dtype=torch.float64)
    torch.testing.assert_close(deploy(network)(inputs), outputs_of(network, inputs))


class Doubled(nn.Module):
    """A map of somebody's own, that goes on behind its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.linear = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.norm(torch.tanh(self.linear(x)))


@TIMESTEPS
@pytest.mark.parametrize("maps", ["own", "inside", "twice", "twice in one"])
def test_maps_of_somebodys_own_and_maps_used_twice(maps: str, timesteps: int) -> None:
    torch.manual_seed(0)
    twice = nn.Linear(5, 5)
    layers = {
        "own": [Doubled(), Doubled()],
        "inside": [nn.Sequential(nn.Linear(5, 5), Doubled()), nn.Linear(5, 5)],
        "twice": [nn.Linear(5, 5), twice, nn.Sequential(twice)],
        "twice in one": [nn.Sequential(twice, nn.Tanh(), twice), nn.Linear(5, 5)],
    }[maps]
    neurons = [LIF(5, threshold=0.3) for _ in layers]
    network = LayeredNetwork(layers, neurons, nn.Linear(5, 3), input_shape=(5,), timesteps=timesteps).double().eval()
    inputs = torch.randn(200, 5, dtype=torch.float64)
    torch.testing.assert_close(deploy(network)(inputs), outputs_of(network, inputs))


@TIMESTEPS
def test_the_network_stays_as_it_is_and_may_go_on_learning(timesteps: int) -> None:
    network, inputs = network_and_inputs("resnet12", timesteps, batch_norm=True)
    network.train()
    before = copy.deepcopy(network.state_dict())
    deployed = deploy(network)
    first = deployed(inputs)
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.requires_grad for p in network.parameters())
    assert not first.requires_grad
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert torch.equal(deployed(inputs), first)


@pytest.mark.parametrize("active", [0, 1, 10, 39, 40])
@pytest.mark.parametrize("binary", [True, False])
def test_silent_inputs_are_skipped_and_nothing_else(active: int, binary: bool) -> None:
    torch.manual_seed(0)
    for layer in (nn.Linear(40, 7), nn.Linear(40, 7, bias=False)):
        x = torch.zeros(1, 40)
        x[0, torch.randperm(40)[:active]] = 1.0 if binary else 0.25
        sparse = SparseLinear(layer, binary)
        with torch.no_grad():
            torch.testing.assert_close(sparse(x), layer(x))
            torch.testing.assert_close(sparse(x.expand(3, -1)), layer(x.expand(3, -1)))
            torch.testing.assert_close(sparse(x), layer(x))  # the bias has not been added to itself


@pytest.mark.parametrize("total", [0, 1, 10, 20, 21, 60])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("outputs", [7, 1100])
def test_so_are_those_of_several_timesteps(total: int, binary: bool, outputs: int) -> None:
    torch.manual_seed(0)
    for layer in (nn.Linear(40, outputs), nn.Linear(40, outputs, bias=False)):
        x = torch.zeros(3, 40)
        x.view(-1)[torch.randperm(120)[:total]] = 1.0 if binary else 0.25
        x[1] = 0  # a silent timestep among others
        sparse, before = SparseLinear(layer, binary, timesteps=3), x.clone()
        with torch.no_grad():
            for batch in (x, x.repeat(2, 1), x[:1], x.t().contiguous().t()):
                torch.testing.assert_close(sparse(batch), layer(batch))
                torch.testing.assert_close(sparse(batch), layer(batch))
        assert torch.equal(x, before)


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("binary", [True, False])
def test_silent_inputs_are_skipped_under_autocast_too(timesteps: int, binary: bool) -> None:
    layer, x = nn.Linear(40, 7), torch.zeros(timesteps, 40)
    x[:, 5] = 1.0 if binary else 0.25
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = SparseLinear(layer, binary, timesteps)(x.bfloat16())
        torch.testing.assert_close(found.float(), layer(x).float(), rtol=2e-2, atol=2e-2)


@TIMESTEPS
@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"neuron": "relu"}, "network"),
        ({"encoding": "poisson"}, "encoding"),
        ({"kappa": 0.5}, "kappa"),
    ],
)
def test_what_only_the_network_can_do_is_refused(options: dict[str, object], field: str, timesteps: int) -> None:
    require_refused(build_network("mlp", (6,), 3, timesteps=timesteps, **options), field)


def require_refused(network: LayeredNetwork, field: str) -> None:
    with pytest.raises(UserError) as caught:
        deploy(network)
    assert caught.value.field == field


def test_so_is_what_only_matters_at_several_timesteps() -> None:
    require_refused(build_network("mlp", (6,), 3, timesteps=2, single_spike=True), "single_spike")
    require_refused(build_network("mlp", (6,), 3, timesteps=2, encoding="hybrid"), "encoding")
    coded = build_network("mlp", (6,), 3, timesteps=1, encoding="hybrid", single_spike=True).eval()
    inputs = torch.randn(9, 6)
    torch.testing.assert_close(deploy(coded)(inputs), coded(inputs.unsqueeze(0))[0][0])
    network = build_network("mlp", (6,), 3, timesteps=2)
    network.set_exit_margin(0.5)
    require_refused(network, "exit_margin")
    network.set_timesteps(1)
    deploy(network)


def test_thresholds_are_folded_at_one_timestep_only() -> None:
    with pytest.raises(UserError) as caught:
        fold_thresholds(build_network("mlp", (6,), 3, timesteps=2))
    assert caught.value.field == "timesteps"


@TIMESTEPS
def test_inputs_of_another_shape_are_refused(timesteps: int) -> None:
    deployed = deploy(build_network("mlp", (6,), 3, timesteps=timesteps))
    with pytest.raises(UserError, match="inputs"):
        deployed(torch.zeros(6))
    with pytest.raises(UserError, match="inputs"):
        deployed(torch.zeros(1, 1, 6))


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "nature_cnn", "vgg9", "resnet12"])  # chains, pools, shortcuts
def test_membranes_are_carried_as_the_network_carries_them(name: str, timesteps: int) -> None:
    network, inputs = network_and_inputs(name, timesteps)
    with torch.no_grad():
        for neuron in network.neurons:
            neuron.leak.fill_(0.6)
    sequence, starts = inputs.unflatten(0, (8, 3)), torch.rand(8, 3) < 0.2
    with torch.no_grad():
        expected, last = network(sequence, network.initial_state(3), starts)
    deployed, before = deploy_stateful(network), inputs.clone()
    state = deployed.initial_state(3)
    assert all(torch.equal(a.membrane, b.membrane) for a, b in zip(state, network.initial_state(3), strict=True))
    got = []
    for observation, begins in zip(sequence, starts, strict=True):
        outputs, state = deployed(observation, state, begins)
        got.append(outputs)
    assert len(expected.flatten(0, 1).unique(dim=0)) > 12
    assert not torch.allclose(outputs_of(network, inputs), expected.flatten(0, 1)), "membranes make no difference"
    torch.testing.assert_close(torch.stack(got), expected, rtol=1e-9, atol=1e-9)
    for now, then in zip(state, last, strict=True):
        torch.testing.assert_close(now.membrane, then.membrane, rtol=1e-9, atol=1e-9)
    assert torch.equal(inputs, before)


def test_given_states_stay_as_they_are_and_no_start_means_none() -> None:
    network, inputs = network_and_inputs("mlp", 2, leak=0.7)
    deployed = deploy_stateful(network)
    _, state = deployed(inputs, deployed.initial_state(24))
    kept = copy.deepcopy(state)
    outputs, _ = deployed(inputs, state)
    assert all(torch.equal(a.membrane, b.membrane) for a, b in zip(state, kept, strict=True))
    torch.testing.assert_close(deployed(inputs, state, torch.zeros(24, dtype=torch.bool))[0], outputs)
    copied = pickle.loads(pickle.dumps(deployed))
    assert torch.equal(copied(inputs, state)[0], outputs)
    assert deployed(inputs[:0], deployed.initial_state(0))[0].shape == (0, 4)
    state[0].membrane[3] = 0  # they are the caller's


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"neuron": "relu"}, "network"),
        ({"encoding": "poisson"}, "encoding"),
        ({"kappa": 0.5}, "kappa"),
        ({"single_spike": True}, "single_spike"),
    ],
)
def test_what_carries_no_membrane_is_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(UserError) as caught:
        deploy_stateful(build_network("mlp", (6,), 3, timesteps=1, **options))
    assert caught.value.field == field
    deployed = deploy_stateful(build_network("mlp", (6,), 3))
    with pytest.raises(UserError, match="inputs"):
        deployed(torch.zeros(1, 5), deployed.initial_state(1))
