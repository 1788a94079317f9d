"""Networks: every registered one keeps the same promises."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spiking_rl import LIF, NETWORKS, LayeredNetwork, UserError, build_network, calibrate_thresholds

# A new network is tested as soon as it is registered: with the first of these shapes that it takes.
SHAPES = [(6,), (2, 16, 16), (2, 36, 36), (4, 84, 84), (3, 32, 32)]
OUTPUTS = 3
EVERY = pytest.mark.parametrize("name", sorted(NETWORKS))


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    """A batch of another size may round a current differently, and a spike is a yes or no."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def narrow(name: str) -> dict[str, float]:
    """Return the options that make a network quick to test."""
    return {"width": 1 / 8} if "width" in inspect.signature(NETWORKS[name]).parameters else {}


def built(name: str, timesteps: int = 2, neuron: str = "lif") -> LayeredNetwork:
    """Build a registered network as it is, or narrow where it has a width."""
    torch.manual_seed(0)
    for shape in SHAPES:
        try:
            network = build_network(name, shape, OUTPUTS, timesteps=timesteps, neuron=neuron, **narrow(name))
            network.neuron_shapes()
        except (RuntimeError, ValueError):
            continue
        return network
    raise AssertionError(f"no input shape of this test fits {name!r}; add one")


def awake(name: str, timesteps: int = 2, neuron: str = "lif") -> LayeredNetwork:
    """Build a network whose readout is not zero and whose membranes matter."""
    network = built(name, timesteps, neuron)
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, LIF):
                module.leak.fill_(0.9)
    if network.spiking and name not in ("mlp", "nature_cnn"):  # these normalise their currents; deep ones fall silent
        calibrate_thresholds(network, inputs_for(network, 1, 30)[0], 0.25)
    return network


def inputs_for(network: LayeredNetwork, length: int, batch: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(length, batch, *network.input_shape, generator=draw)


class Recorder:
    """Observer that keeps what each layer gave."""

    def __init__(self) -> None:
        self.outputs: defaultdict[str, list[Tensor]] = defaultdict(list)
        self.potentials: defaultdict[str, list[Tensor]] = defaultdict(list)

    def __call__(self, layer: str, output: Tensor, potential: Tensor) -> None:
        self.outputs[layer].append(output)
        self.potentials[layer].append(potential)

    def spikes(self, layer: str) -> Tensor:
        return torch.cat(self.outputs[layer])


@EVERY
@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("neuron", ["lif", "relu"])
def test_shapes(name: str, timesteps: int, neuron: str) -> None:
    network = built(name, timesteps, neuron)
    inputs = inputs_for(network, 2, 5)
    recorder = Recorder()
    stateless, none = network(inputs)
    stateful, after = network(inputs, network.initial_state(5), observer=recorder)
    assert stateless.shape == stateful.shape == (2, 5, OUTPUTS)
    assert none is None
    shapes = network.neuron_shapes()
    assert [s.membrane.shape[1:] for s in after] == (shapes if neuron == "lif" else [])
    assert list(recorder.outputs) == network.layer_names
    scan_time = 2 * (timesteps if neuron == "lif" else 1)
    for layer, shape in zip(network.layer_names, shapes, strict=True):
        assert recorder.spikes(layer).shape == recorder.potentials[layer][0].shape == (scan_time, 5, *shape)


@EVERY
@pytest.mark.parametrize("timesteps", [1, 3])
def test_stateless_decisions_are_independent(name: str, timesteps: int) -> None:
    network = awake(name, timesteps)
    inputs = inputs_for(network, 3, 2)
    together, _ = network(inputs)
    one_by_one = [network(inputs[i : i + 1, j : j + 1])[0] for i in range(3) for j in range(2)]
    torch.testing.assert_close(together.flatten(0, 1), torch.cat(one_by_one).flatten(0, 1))
    assert len(together.flatten(0, 1).unique(dim=0)) == 6, "outputs that are all alike would prove nothing"


@EVERY
@pytest.mark.parametrize("timesteps", [1, 2, 3])
def test_acting_step_by_step_equals_the_whole_sequence(name: str, timesteps: int) -> None:
    network = awake(name, timesteps)
    inputs = inputs_for(network, 5, 3)
    starts = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.bool)
    whole, acting = Recorder(), Recorder()
    expected, last = network(inputs, network.initial_state(3), starts, whole)
    state, outputs = network.initial_state(3), []
    for t in range(5):
        output, state = network(inputs[t : t + 1], state, starts[t : t + 1], acting)
        outputs.append(output)
    for layer in network.layer_names:
        assert torch.equal(acting.spikes(layer), whole.spikes(layer))
    torch.testing.assert_close(torch.cat(outputs), expected)
    torch.testing.assert_close(state, last)
    # Nothing above would fail if membranes were dropped or resets ignored; this would.
    for changed in (network(inputs)[0], network(inputs, network.initial_state(3))[0]):
        assert not torch.allclose(changed, expected)


@EVERY
def test_a_reset_in_one_row_is_a_new_episode_for_that_row_alone(name: str) -> None:
    network = awake(name, 2)
    inputs = inputs_for(network, 5, 3)
    opens = [0, 2, 4]  # where the second episode of each row begins
    starts = torch.zeros(5, 3, dtype=torch.bool)
    for row, at in enumerate(opens):
        starts[at, row] = True
    found, _ = network(inputs, network.initial_state(3), starts)
    for row, at in enumerate(opens):
        for episode in (slice(0, at), slice(at, 5)):
            if episode.stop > episode.start:
                alone, _ = network(inputs[episode, row : row + 1], network.initial_state(1))
                torch.testing.assert_close(found[episode, row : row + 1], alone)


@EVERY
def test_memory_is_learned_through(name: str) -> None:
    network = awake(name, 2)
    inputs = inputs_for(network, 3, 10).requires_grad_()
    for state, reaches in ((network.initial_state(10), True), (None, False)):
        (gradient,) = torch.autograd.grad(network(inputs, state)[0][-1].square().sum(), inputs)
        assert bool(gradient[0].any()) == reaches
        assert gradient[-1].any()


@EVERY
@pytest.mark.parametrize("stateful", [False, True])
def test_the_first_current_is_computed_once(name: str, stateful: bool) -> None:
    network = awake(name, 4)
    rows: dict[int, list[int]] = defaultdict(list)
    for i, layer in enumerate(network.maps):
        layer.register_forward_hook(lambda _, args, __, i=i: rows[i].append(len(args[0])))
    readout: list[int] = []
    network.readout.register_forward_hook(lambda _, args, __: readout.append(len(args[0])))
    state = network.initial_state(3) if stateful else None
    rows.clear()  # finding the shapes of the states is a pass too
    network(inputs_for(network, 2, 3), state)
    assert rows[0] == [2 * 3]
    assert all(rows[i] == [2 * 3 * 4] for i in range(1, len(network.maps)))
    assert readout == [2 * 3]


@EVERY
@pytest.mark.parametrize("stateful", [False, True])
def test_the_output_is_the_mean_over_timesteps(name: str, stateful: bool) -> None:
    network = awake(name, 4)
    recorder = Recorder()
    state = network.initial_state(3) if stateful else None
    output, _ = network(inputs_for(network, 1, 3), state, observer=recorder)
    spikes = recorder.spikes(network.layer_names[-1])
    torch.testing.assert_close(output[0], torch.stack([network.readout(s) for s in spikes]).mean(0))
    assert len(spikes.flatten(1).unique(dim=0)) > 1, "spikes that never change would prove nothing"


@EVERY
def test_the_output_keeps_its_scale_when_timesteps_change(name: str) -> None:
    network = awake(name, 1)
    with torch.no_grad():
        for neuron in network.neurons:
            neuron.leak.fill_(0)  # without memory every timestep is the same
    inputs = inputs_for(network, 1, 4)
    expected, _ = network(inputs)
    for timesteps in (2, 7):
        network.set_timesteps(timesteps)
        torch.testing.assert_close(network(inputs)[0], expected)


@EVERY
@pytest.mark.parametrize("timesteps", [0, -1, 1.5, 2.0, True, "3", None, float("nan")])
def test_bad_timesteps_are_refused(name: str, timesteps: Any) -> None:
    network = built(name, 2)
    with pytest.raises(UserError, match="timesteps") as caught:
        network.set_timesteps(timesteps)
    assert caught.value.field == "timesteps"
    assert network.timesteps == 2, "a refused value changes nothing"
    with pytest.raises(UserError, match="timesteps"):
        build_network(name, network.input_shape, OUTPUTS, timesteps=timesteps, **narrow(name))


@EVERY
@pytest.mark.parametrize("neuron", ["lif", "relu"])
@pytest.mark.parametrize("stateful", [False, True])
def test_nothing_is_remembered_between_calls(name: str, neuron: str, stateful: bool) -> None:
    network = awake(name, 3, neuron).eval()
    inputs = inputs_for(network, 2, 3)
    state = network.initial_state(3) if stateful else None
    before = {k: v.clone() for k, v in network.state_dict().items()}
    first, _ = network(inputs, state)
    network(-inputs, state)
    again, _ = network(inputs, state)
    assert torch.equal(first, again)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert state is None or not any(s.membrane.any() for s in state), "the caller's state is not written to"


@EVERY
@pytest.mark.parametrize("neuron", ["lif", "relu"])
def test_the_head_starts_at_zero(name: str, neuron: str) -> None:
    network = built(name, 2, neuron)
    assert not network(inputs_for(network, 2, 3))[0].any()


@EVERY
def test_the_relu_control_is_the_plain_network(name: str) -> None:
    network = awake(name, 5, "relu")
    assert not network.spiking
    assert network.timesteps == 1
    assert network.initial_state(4) == ()
    assert not any(isinstance(m, LIF) for m in network.modules())
    inputs = inputs_for(network, 2, 3)
    x, hidden = inputs.flatten(0, 1), []
    for i, layer in enumerate(network.maps):
        hidden.append(layer(x))
        if i in network.sources:
            hidden[-1] = hidden[-1] + network.shortcuts[str(i)](hidden[network.sources[i]].relu())
        x = hidden[-1].relu()
    recorder = Recorder()
    output, _ = network(inputs, observer=recorder)
    torch.testing.assert_close(output.flatten(0, 1), network.readout(x))
    for layer, current in zip(network.layer_names, hidden, strict=True):
        torch.testing.assert_close(recorder.potentials[layer][0].flatten(0, 1), current)
        torch.testing.assert_close(recorder.outputs[layer][0].flatten(0, 1), current.relu())
    spiking = built(name, 5)
    assert [m.shape for m in spiking.maps.parameters()] == [m.shape for m in network.maps.parameters()]


@EVERY
@pytest.mark.parametrize(
    "option", [{"neuron": "izhikevich"}, {"no_such_option": 1}, {"threshold": -1.0}, {"leak": 2.0}]
)
def test_a_bad_option_is_an_error_for_the_user(name: str, option: dict[str, Any]) -> None:
    ((field, value),) = option.items()
    with pytest.raises(UserError) as caught:
        build_network(name, built(name).input_shape, OUTPUTS, **narrow(name), **option)
    assert field in str(caught.value)
    assert field == "no_such_option" or repr(value) in str(caught.value)


@EVERY
@pytest.mark.parametrize("timesteps", [1, 5])
@pytest.mark.parametrize("neuron", ["lif", "relu"])
def test_a_gradient_reaches_every_parameter(name: str, timesteps: int, neuron: str) -> None:
    network = awake(name, timesteps, neuron)
    network(inputs_for(network, 1, 20))[0].square().sum().backward()
    for parameter_name, parameter in network.named_parameters():
        if timesteps == 1 and parameter_name.endswith("leak"):
            continue  # without memory there is nothing to leak
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("hidden", [(), (0,), (16, -1), (2.5,)])
def test_bad_widths_are_refused(hidden: Any) -> None:
    with pytest.raises(UserError, match="hidden"):
        build_network("mlp", (4,), 2, hidden=hidden)


def test_an_unknown_network_is_answered_with_the_known() -> None:
    with pytest.raises(UserError, match="mlp") as caught:
        build_network("no_such_network", (4,), 2)
    assert caught.value.field == "network"
    assert "'no_such_network'" in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'vgg16'"):
        build_network("vgg15", (3, 32, 32), 2)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_nothing_that_others_hold_is_overwritten(timesteps: int) -> None:
    """Without a gradient spikes take the place of currents, but of no input's, and of none that a hook has kept."""
    torch.set_default_dtype(torch.float32)  # in which that happens
    torch.manual_seed(0)
    linear = [nn.Sequential(nn.Flatten(), nn.Linear(6, 6)), nn.Linear(6, 6), nn.Identity(), nn.Sequential()]
    network = LayeredNetwork(
        linear, [LIF(threshold=0.1) for _ in linear], nn.Linear(6, 2), input_shape=(2, 3), timesteps=timesteps
    )
    unchanged = LayeredNetwork(
        [nn.Identity()], [LIF(threshold=0.1)], nn.Linear(6, 2), input_shape=(6,), timesteps=timesteps
    )
    inputs = torch.randn(1, 4, 2, 3)
    before = inputs.clone()
    wanted = network(inputs)[0].detach()
    kept: list[Tensor] = []

    def keep(module: nn.Module, _: object, out: Tensor) -> None:
        if module in watched:
            kept.append(out)

    watched = [linear[0], linear[0][1], linear[1]]
    for listen in (
        lambda: [layer.register_forward_hook(keep) for layer in watched],
        lambda: [nn.modules.module.register_module_forward_hook(keep)],
    ):
        kept.clear()
        hooks = listen()
        with torch.no_grad():
            assert torch.equal(network(inputs)[0], wanted)
        for hook in hooks:
            hook.remove()
        assert len(kept) == 3
        assert all(bool(((out != 0) & (out != 1)).any()) for out in kept), "these are currents"
    kept.clear()
    plain = linear[1].forward

    def wrapped(x: Tensor) -> Tensor:
        kept.append(plain(x))
        return kept[-1]

    linear[1].forward = wrapped  # type: ignore[method-assign]
    with torch.no_grad():
        unchanged(inputs.flatten(2))
        assert torch.equal(network(inputs)[0], wanted)
    assert torch.equal(inputs, before)
    assert bool(((kept[0] != 0) & (kept[0] != 1)).any())
    del linear[1].forward
    with torch.no_grad():
        assert torch.equal(network(inputs)[0], wanted)


@EVERY
def test_watching_a_network_changes_nothing(name: str) -> None:
    """An observer may ask for potentials and take another way through the layers; training drops outputs in all."""
    network = awake(name, timesteps=3).train()
    network.dropout = [0.3] * len(network.maps)
    inputs = inputs_for(network, 2, 3)
    found = []
    for observer in (None, lambda *_: None, Spikes()):
        torch.manual_seed(1)
        network.zero_grad()
        outputs, _ = network(inputs, observer=observer)
        outputs.square().sum().backward()
        found.append([outputs.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1 + len(network.neurons), "every layer learns"
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


class Spikes:
    """An observer that looks at no potentials."""

    potentials = False

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, layer: str, output: Tensor, potential: Tensor) -> None:
        """Keep the spikes."""
        self.seen[layer] = output


@EVERY
@pytest.mark.parametrize("timesteps", [1, 3])
def test_who_looks_at_no_potentials_sees_the_same_spikes_and_keeps_none(
    name: str, timesteps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = awake(name, timesteps=timesteps)
    inputs = inputs_for(network, 2, 3)
    everything, spikes = Spikes(), Spikes()
    everything.potentials = True
    outputs, _ = network(inputs, observer=everything)
    monkeypatch.setattr(LIF, "forward", None)  # what would trace potentials
    again, _ = network(inputs, observer=spikes)
    torch.testing.assert_close(again, outputs)
    assert list(spikes.seen) == list(everything.seen) == list(network.layer_names)
    for layer, seen in spikes.seen.items():
        assert torch.equal(seen, everything.seen[layer])


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("stateful", [False, True])
def test_a_batch_may_be_empty(timesteps: int, stateful: bool) -> None:
    network = built("mlp", timesteps)
    state = network.initial_state(0) if stateful else None
    for observer in (None, lambda *_: None):
        outputs, _ = network(torch.zeros(2, 0, *network.input_shape), state, observer=observer)
        assert outputs.shape == (2, 0, OUTPUTS)
