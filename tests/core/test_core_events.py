"""Maps computed from active inputs alone give what the layers themselves give.

Weights and amounts are multiples of 1/8 and 1/4, so that every sum is exact in 32 bits, in any order: equal is equal.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import event_layers_drawn
import pytest
import torch
from event_layers_drawn import convolutions, inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from spiking_rl import build_network, calibrate_thresholds, compiling
from spiking_rl import events as event_maps
from spiking_rl.deploy import deploy, deploy_stateful
from spiking_rl.events import EventMap, runs_on_events
from spiking_rl.small_maps import SmallMapConv2d

needs_compiler = pytest.mark.skipif(compiling.built_events() is None, reason="no C compiler here")
pytestmark = needs_compiler


def exact(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    return event_layers_drawn.exact(layer).requires_grad_(False)


def refuse(_: Tensor) -> Tensor:
    raise AssertionError("the layer itself was asked")


@given(drawn=convolutions([0.0, 0.01, 0.1]), threads=st.integers(1, 3), last=st.booleans())
@settings(max_examples=300, deadline=None)
def test_convolutions_of_any_shape(drawn: tuple[nn.Conv2d, Tensor], threads: int, last: bool) -> None:
    layer, x = drawn
    layer.requires_grad_(False)
    if last:
        layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    found = on_threads(threads, lambda: EventMap(layer, layer.forward)(x))
    # In 64 bits: torch's own kernels were seen to give -0.0071 for silent inputs, strides and one column of outputs.
    assert torch.equal(found, copy.deepcopy(layer).double()(x.double()).float())


def on_threads(number: int, do: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return do()
    finally:
        torch.set_num_threads(before)


LARGE = [
    (nn.Conv2d(32, 64, 4, 2), (32, 20, 20)),  # the Nature-CNN's
    (nn.Conv2d(64, 64, 3), (64, 9, 9)),
    (nn.Conv2d(16, 64, 3, padding=1), (16, 64, 64)),  # outputs of a megabyte, worked on in parts
    (SmallMapConv2d(256, 512, 3, padding=1), (256, 2, 2)),  # several samples at a time
    (nn.Conv2d(64, 128, 1, 2), (64, 16, 16)),  # a shortcut
    (nn.Linear(3136, 512), (3136,)),
    (nn.Linear(300, 4096, bias=False), (300,)),
]


def test_weights_that_somebody_holds_are_not_copied() -> None:
    torch.manual_seed(0)
    layer, x = exact(nn.Linear(300, 512)), inputs_of((3, 300), 0.1)
    rows = layer.weight.detach().t().contiguous()
    events = EventMap(layer, refuse, rows)  # type: ignore[arg-type]
    assert events.weights.data_ptr() == rows.data_ptr()
    with torch.no_grad():
        assert torch.equal(events(x), layer(x))


@pytest.mark.parametrize(("layer", "shape"), LARGE, ids=lambda value: str(value) if isinstance(value, tuple) else "")
@pytest.mark.parametrize("batch", [1, 2, 9, 64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layers_of_real_networks(layer: nn.Conv2d, shape: tuple[int, ...], batch: int, threads: int) -> None:
    torch.manual_seed(0)
    layer, x = exact(copy.deepcopy(layer)), inputs_of((batch, *shape), 0.05)  # type: ignore[assignment]
    assert runs_on_events(layer)
    assert torch.equal(on_threads(threads, lambda: EventMap(layer, refuse)(x)), layer(x))


@pytest.mark.parametrize(("layer", "shape"), LARGE, ids=lambda value: str(value) if isinstance(value, tuple) else "")
@pytest.mark.parametrize("batch", [1, 32])
def test_many_active_inputs_are_left_to_the_layer(layer: nn.Conv2d, shape: tuple[int, ...], batch: int) -> None:
    torch.manual_seed(0)
    layer = exact(copy.deepcopy(layer))  # type: ignore[assignment]
    asked: list[Tensor] = []

    def otherwise(x: Tensor) -> Tensor:
        asked.append(x)
        return layer(x)  # type: ignore[no-any-return]

    events = EventMap(layer, otherwise)
    x = inputs_of((batch, *shape), 0.6)
    with torch.no_grad():
        assert torch.equal(events(x), layer(x))
        assert len(asked) == 1
        events(inputs_of((batch, *shape), 0.1))
        assert len(asked) == 1


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(2, 3, 8, 8, dtype=torch.float64),
        torch.zeros(2, 3, 8, 8, device="meta"),
        torch.zeros(3, 8, 8),
        torch.zeros(3),
        torch.zeros(2, 4, 8, 8),
        torch.zeros(2, 3, 8, 2),
        torch.zeros(1, 3, 70_000, 3),
        torch._neg_view(torch.zeros(2, 3, 8, 8)),  # type: ignore[no-untyped-call]
        nn.Parameter(torch.zeros(2, 3, 8, 8)),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}",
)
def test_what_it_was_not_made_for_goes_to_the_layer(odd: Tensor) -> None:
    seen = EventMap(nn.Conv2d(3, 8, 3), lambda x: x)(odd)
    assert seen is odd


def test_so_do_rows_of_another_length() -> None:
    for length in (10, 300):
        x = torch.zeros(2, 500)[:, :length]
        assert EventMap(nn.Linear(40, 512), lambda x: x)(x) is x


def test_whatever_torch_makes_by_default() -> None:
    torch.manual_seed(0)
    layer, x = exact(nn.Conv2d(16, 32, 3)), inputs_of((4, 16, 9, 9), 0.1)
    events, expected, before = EventMap(layer, refuse), layer(x), torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            with torch.device("meta"):
                found = events(x)
            assert found.dtype is torch.float32
            assert torch.equal(found, expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_what_is_no_number_stays_where_it_reaches(stride: int) -> None:
    layer, x = nn.Conv2d(4, 8, 3, stride), torch.zeros(1, 4, 12, 12)
    for column in (5, 11):
        x.zero_()[0, 1, 3, column] = torch.inf
        with torch.no_grad():
            assert torch.equal(EventMap(layer, refuse)(x).isfinite(), layer(x).isfinite())


def test_denormal_amounts_are_one_thing_to_all_threads() -> None:
    layer = exact(nn.Conv2d(64, 64, 3, padding=1))
    events, x = EventMap(layer, lambda x: x), (torch.rand(16, 64, 32, 32) < 0.1) * 1e-40
    on_threads(2, lambda: events(x))  # the other thread is there now
    torch.set_flush_denormal(True)
    try:
        assert on_threads(2, lambda: events(x)).shape == (16, 64, 32, 32)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_records_hold_what_the_layers_do() -> None:
    """A trace, and a graph of the operations, work on other inputs too."""
    torch.manual_seed(0)
    layer, few = exact(nn.Conv2d(16, 32, 3)), inputs_of((4, 16, 9, 9), 0.1)
    events = EventMap(layer, layer.forward)
    graph = make_fx(events)(few)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: events(x), few)  # type: ignore[no-untyped-call]
    other = inputs_of((4, 16, 9, 9), 0.1)
    assert torch.equal(traced(other), layer(other))
    assert torch.equal(graph(other), layer(other))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert events(mode.from_tensor(few)).shape == (4, 32, 7, 7)


class Standardised(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_a_network_without_compiler_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was deployed, and packed up, where there is one."""
    torch.manual_seed(0)
    network = build_network("nature_cnn", (2, 36, 36), 3, timesteps=1)
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    inputs = torch.randn(5, 2, 36, 36)
    deployed = deploy(network)
    expected, packed = deployed(inputs), pickle.dumps(deployed)
    monkeypatch.setenv(compiling.SWITCH, "0")
    for built in (compiling.built_events, compiling.built_loops):
        monkeypatch.setattr(compiling, built.__name__, built.__wrapped__)
    monkeypatch.setattr(event_maps, "built_events", compiling.built_events)
    assert not runs_on_events(nn.Linear(4, 4))
    for elsewhere in (pickle.loads(packed), deploy(network)):
        torch.testing.assert_close(elsewhere(inputs), expected, rtol=1e-4, atol=1e-4)


def test_inputs_of_other_sizes_in_turn() -> None:
    torch.manual_seed(0)
    layer = exact(nn.Conv2d(8, 16, 3, 2, 1))
    events = EventMap(layer, refuse)  # type: ignore[arg-type]
    for shape in ((1, 8, 9, 9), (3, 8, 9, 9), (3, 8, 12, 5), (1, 8, 9, 9)):
        x = inputs_of(shape, 0.1)
        assert torch.equal(events(x), layer(x))
    assert torch.equal(events(x.expand(4, -1, -1, -1)), layer(x.expand(4, -1, -1, -1)))
    assert torch.equal(events(x.transpose(2, 3)), layer(x.transpose(2, 3)))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 8, 3, dilation=2),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 8, 3, padding="same"),
        nn.Linear(4, 8).double(),
        nn.Linear(4, 8).bfloat16(),
        nn.ConvTranspose2d(4, 8, 3),
        Standardised(4, 8, 3),
        nn.Identity(),
    ],
    ids=str,
)
def test_other_layers_are_left_alone(layer: nn.Module) -> None:
    assert not runs_on_events(layer)


def test_later_changes_to_the_layer_do_not_arrive() -> None:
    layer, x = exact(nn.Conv2d(8, 16, 3)), inputs_of((2, 8, 6, 6), 0.1)
    before, events = layer(x), EventMap(layer, refuse)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert torch.equal(events(x), before)


def test_one_map_serves_several_threads() -> None:
    torch.manual_seed(0)
    layer = exact(nn.Conv2d(16, 32, 3, padding=1))
    events = EventMap(layer, refuse)  # type: ignore[arg-type]
    batches = [inputs_of((1 + i % 3, 16, 6 + i % 5, 7), 0.1) for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(events, batches))
    assert all(torch.equal(a, layer(x)) for a, x in zip(found, batches, strict=True))


@pytest.mark.parametrize("name", ["nature_cnn", "vgg9", "resnet12"])
@pytest.mark.parametrize("timesteps", [1, 3])
def test_deployed_networks_run_on_events(name: str, timesteps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape, options = ((2, 36, 36), {"layer_norm": False}) if name == "nature_cnn" else ((3, 32, 32), {"width": 0.25})
    network = build_network(name, shape, 4, timesteps=timesteps, **options).eval()
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            exact(layer)
    inputs = torch.randint(-4, 5, (20, *shape)) / 4.0
    with torch.no_grad():
        for neuron in network.neurons:
            neuron.leak.fill_(0.5)
        calibrate_thresholds(network, inputs, 0.1)
        for neuron in network.neurons:
            neuron.threshold.copy_((neuron.threshold * 64).ceil() / 64)
        expected = network(inputs.unsqueeze(0))[0].squeeze(0)
    assert len(expected.unique(dim=0)) > 10
    ran: list[bool] = []
    run = EventMap.__call__

    def counted(events: EventMap, x: Tensor) -> Tensor:
        otherwise = events.otherwise
        ran.append(True)
        try:
            events.otherwise = lambda x: (ran.pop(), otherwise(x))[1]  # type: ignore[func-returns-value]
            return run(events, x)
        finally:
            events.otherwise = otherwise

    deployed, stateful = deploy(network), deploy_stateful(network)
    monkeypatch.setattr(EventMap, "__call__", counted)
    for batch in (inputs, inputs[:1], inputs[:3]):
        torch.testing.assert_close(deployed(batch), expected[: len(batch)], rtol=1e-5, atol=1e-5)
    assert len(ran) >= 6
    with torch.no_grad():
        sequence, state = inputs.unflatten(0, (5, 4)), stateful.initial_state(4)
        expected = network(sequence, network.initial_state(4))[0]
    ran.clear()
    for observation, outputs in zip(sequence, expected, strict=True):
        found, state = stateful(observation, state)
        torch.testing.assert_close(found, outputs, rtol=1e-5, atol=1e-5)
    assert len(ran) >= 10


@pytest.mark.parametrize("timesteps", [1, 3])
def test_a_network_on_events_can_be_copied(timesteps: int) -> None:
    torch.manual_seed(0)
    network = build_network("nature_cnn", (2, 36, 36), 3, timesteps=timesteps)
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    deployed, inputs = deploy(network), torch.randn(5, 2, 36, 36)
    expected = deployed(inputs)
    copies = [copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))]
    del deployed
    gc.collect()
    assert all(torch.equal(copied(inputs), expected) for copied in copies)
