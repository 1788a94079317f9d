"""Layers that leave silent inputs out of their sums give what torch gives, and so do their gradients.

Numbers are multiples of 1/8 and 1/4, so that every sum is exact in 32 bits, in any order: equal is equal.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from event_layers_drawn import convolutions, exact, inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from spiking_rl import build_network, calibrate_thresholds, compiling, event_layers
from spiking_rl.event_layers import through_events
from spiking_rl.small_maps import SmallMapConv2d

CLEARLY = event_layers._CLEARLY

pytestmark = pytest.mark.skipif(compiling.built_events() is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small layers too, as many events as on a processor of 8 lanes, and all of them counted."""
    monkeypatch.setattr(event_layers, "_SIXTEEN_LANES", False)
    monkeypatch.setattr(event_layers, "_FAST_HALVES", False)
    monkeypatch.setattr(event_layers, "_CLEARLY", math.inf)
    monkeypatch.setattr(event_layers, "_CONVOLUTIONS_FROM", 0)
    monkeypatch.setattr(event_layers, "_LINEAR_FROM", 0)
    monkeypatch.setattr(event_layers, "_FEWEST", 0)
    monkeypatch.setattr(event_layers, "_PLACES_FROM", 0)
    event_layers._sizes.cache_clear()
    yield
    event_layers._sizes.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def spikes(*shape: int, density: float = 0.05) -> Tensor:
    found = inputs_of(shape, density)
    return found.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else found


def is_by_events(output: Tensor) -> bool:
    assert output.grad_fn is not None
    return output.grad_fn.name().startswith("_Convolution")


def assert_like_torch(layer: nn.Conv2d, x: Tensor, stored: torch.dtype = torch.float32) -> None:
    """Compare outputs and all gradients of a layer with torch's in 64 bits, rounded where they are stored in fewer.

    A gradient that is left to torch may be what torch's own layer gives: processors without bfloat16 add up in it.
    """
    x = x.to(stored).requires_grad_()
    parameters = list(layer.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=stored is torch.bfloat16):
        output, plain = through_events(layer, x), layer(x)
    assert is_by_events(output)
    assert output.dtype is stored
    gradient = (torch.randint(-8, 9, output.shape) / 8).to(stored)
    found = torch.autograd.grad(output, (x, *parameters), gradient)
    torchs = torch.autograd.grad(plain, (x, *parameters), gradient)
    double = [p.detach().double().requires_grad_() for p in parameters]
    y = x.detach().double().requires_grad_()
    expected = functional.conv2d(y, *double, stride=layer.stride, padding=layer.padding)  # type: ignore[call-overload]
    if event_layers._HAS_TILES and not torch.equal(plain, expected.to(stored)):
        return  # torch's own layer is wrong there, such as with kernels of 1 x 2 and strides as long
    assert torch.equal(output, expected.to(stored))
    exact = torch.autograd.grad(expected, (y, *double), gradient.double())
    # Processors with matrix tiles give what they like for strides and few outputs (pytorch/pytorch issue 169688).
    first = 1 if stored is torch.bfloat16 and layer.stride != (1, 1) else 0
    for ours, theirs, right in list(zip(found, torchs, exact, strict=True))[first:]:
        assert torch.equal(ours, right.to(ours.dtype)) or torch.equal(ours, theirs)
    assert [ours.dtype for ours in found] == [stored, *(torch.float32 for _ in parameters)]


@given(
    drawn=convolutions([0.0, 0.05, 0.3, 0.9], 1),
    number=st.integers(1, 3),
    last=st.booleans(),
    stored=st.sampled_from(event_layers._STORED),
)
@settings(max_examples=200, deadline=None)
def test_a_convolution_and_its_gradients_are_torchs(
    drawn: tuple[nn.Conv2d, Tensor], number: int, last: bool, stored: torch.dtype
) -> None:
    layer, x = drawn
    if last:
        layer = layer.to(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_layers, "threads_of", lambda _: number)  # small layers are worth one
        if stored is torch.bfloat16:
            patch.setattr(event_layers, "_most_weighed", lambda *_: 1000)  # no gradient of weights is torch's own
        assert_like_torch(layer, x.contiguous(memory_format=torch.channels_last), stored)


@pytest.mark.parametrize("stored", event_layers._STORED)
@pytest.mark.parametrize(("batch", "number"), [(1, 2), (1, 4), (3, 4)])
def test_parts_of_one_pixels_outputs_are_computed_apart(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, batch: int, number: int
) -> None:
    monkeypatch.setattr(event_layers, "threads_of", lambda _: number)
    for _ in range(5):
        assert_like_torch(exact(nn.Conv2d(16, 256, 3)), spikes(batch, 16, 3, 3, density=0.1), stored)  # type: ignore[arg-type]


@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("side", [2, 4, 9])
@pytest.mark.parametrize("stored", event_layers._STORED)
def test_narrow_maps_too(side: int, density: float, stored: torch.dtype) -> None:
    layer = SmallMapConv2d(24, 40, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    assert_like_torch(exact(layer), spikes(12, 24, side, side, density=density), stored)  # type: ignore[arg-type]


@pytest.mark.parametrize("stored", event_layers._STORED)
def test_many_samples_are_summed_up_block_by_block(stored: torch.dtype) -> None:
    layer = exact(nn.Conv2d(17, 64, 3, padding=1))  # a sample's gradients are 64 KB: several blocks
    assert_like_torch(layer, spikes(20, 17, 16, 16), stored)  # type: ignore[arg-type]


def test_what_is_left_out_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few active inputs: torch's convolution is asked for nothing but the gradient of the inputs."""
    layer, asked = nn.Conv2d(8, 16, 3, padding=1), []
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *_: pytest.fail("the layer itself was asked"))
    monkeypatch.setattr(event_layers, "gradients", lambda *found: asked.append(found[-1]) or (found[2], None, None))
    output = through_events(layer, spikes(2, 8, 9, 9).requires_grad_())
    output.sum().backward()
    through_events(layer, spikes(2, 8, 9, 9)).sum().backward()
    assert asked == [(True, False, False)]  # and for a leaf that needs none, for nothing


def test_frozen_weights_get_no_gradient() -> None:
    layer = exact(nn.Conv2d(8, 16, 3)).requires_grad_(False)
    x = spikes(2, 8, 9, 9).requires_grad_()
    output = through_events(layer, x)
    assert is_by_events(output)
    output.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("density", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_map_of_a_few_frames_is_torchs(frames: int, density: float, bias: bool) -> None:
    layer = exact(nn.Linear(203, 38, bias=bias))
    x = spikes(frames, 203, density=density)
    with torch.no_grad():
        assert torch.equal(through_events(layer, x), layer(x))
        found = event_layers._linear(layer, x)  # type: ignore[arg-type]
    assert (found is not None) == (frames <= 8 and density < 0.5 and (density < 0.1 or frames < 5))


def test_a_linear_map_reads_active_inputs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = exact(nn.Linear(64, 16))
    monkeypatch.setattr(functional, "linear", lambda *_: pytest.fail("the layer itself was asked"))
    with torch.no_grad():
        layer.weight[:, 32:] = torch.nan  # of silent inputs
        x = torch.cat((torch.ones(2, 4), torch.zeros(2, 60)), 1)
        assert torch.equal(through_events(layer, x), x[:, :32] @ layer.weight[:, :32].T + layer.bias)


def test_weights_written_behind_autograds_back_are_seen() -> None:
    convolution, linear = exact(nn.Conv2d(8, 16, 3)), exact(nn.Linear(72, 5))
    for layer, x in ((convolution, spikes(2, 8, 9, 9)), (linear, spikes(2, 72))):
        with torch.no_grad():
            before = through_events(layer, x)
            layer.weight.data.mul_(2)  # as target networks are written; no version is counted
            layer.bias.data.mul_(2)  # type: ignore[union-attr]
            assert event_layers._by_events(layer, x, True) is not None
            assert torch.equal(through_events(layer, x), 2 * before)


@pytest.mark.parametrize("stored", event_layers._STORED)
def test_any_number_of_threads_gives_the_same_bits(threads: None, stored: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(40, 64, 3, padding=1), spikes(30, 40, 16, 16, density=0.1).to(stored)
    gradient = torch.randn(30, 64, 16, 16).to(stored)
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=stored is torch.bfloat16):
            output = through_events(layer, x)
        assert is_by_events(output)
        found.append((output, *torch.autograd.grad(output, layer.weight, gradient)))
    assert all(torch.equal(a, b) for more in found[1:] for a, b in zip(found[0], more, strict=True))


def test_outputs_of_relu_count_for_the_gradient_of_the_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_layers, "_convolved", lambda *_: pytest.fail("asked for outputs"))
    layer, x = exact(nn.Conv2d(8, 128, 3, padding=1)), spikes(2, 8, 9, 9, density=0.3)
    output = through_events(layer, x, spikes=False)
    assert is_by_events(output)
    assert torch.equal(output, layer(x))
    weighed = torch.autograd.grad(output.sum(), layer.weight)[0]
    assert torch.equal(weighed, torch.autograd.grad(layer(x).sum(), layer.weight)[0])
    assert not is_by_events(through_events(nn.Conv2d(8, 16, 3, padding=1), x, spikes=False))  # torch is fast at it
    with torch.no_grad():
        through_events(layer, x, spikes=False)


@pytest.mark.parametrize("sixteen_lanes", [False, True])
def test_where_many_inputs_are_active_only_a_few_pixels_are_looked_at(
    sixteen_lanes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_layers, "_SIXTEEN_LANES", sixteen_lanes)
    monkeypatch.setattr(event_layers, "_CLEARLY", CLEARLY)
    counted: list[int] = []
    count = event_layers._convolved
    monkeypatch.setattr(event_layers, "_convolved", lambda *a: counted.append(1) or count(*a))
    layer, many = exact(nn.Conv2d(32, 64, 3, padding=1)), spikes(16, 32, 20, 20, density=0.7)
    assert torch.equal(through_events(layer, many), layer(many))
    with torch.no_grad():
        through_events(layer, many)
    assert not counted
    assert is_by_events(through_events(layer, spikes(16, 32, 20, 20, density=0.01)))
    assert counted == [1]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 40),
    side=st.integers(1, 24),
    channels=st.integers(1, 64),
    density=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_the_pixels_looked_at_tell_how_many_inputs_are_active(
    batch: int, side: int, channels: int, density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = spikes(batch, channels, side, side, density=density)
    pixels = batch * side * side
    error = 0.0 if pixels <= 128 else 500 / math.sqrt(64 * channels)  # one standard deviation, of 64 pixels or more
    assert abs(event_layers._sampled(x) - 1000 * float((x != 0).float().mean())) <= 1 + 5 * error


@pytest.mark.parametrize("side", [5, 9, 16, 20, 32])
@pytest.mark.parametrize("batch", [1, 3, 64, 128, 160, 640])
def test_the_pixels_looked_at_are_in_step_with_no_size(batch: int, side: int) -> None:
    pixels = batch * side * side
    places: set[int] = set()
    for part in range(5):
        x = torch.zeros(batch, 1, side, side).contiguous(memory_format=torch.channels_last)
        rows = slice(part * side // 5, (part + 1) * side // 5)  # one fifth of every picture is active
        x[:, :, rows] = 1
        if abs(event_layers._sampled(x) - 1000 * float(x.mean())) < 100:
            places.add(part)
    assert places == set(range(5))
    corner = torch.zeros(batch, 1, side, side).contiguous(memory_format=torch.channels_last)
    corner[:, :, 0, 0] = 1
    assert event_layers._sampled(corner) <= 1000 / (side * side) + 50 or pixels <= 128


def most(
    frames: int,
    channels: int,
    outputs: int,
    side: int,
    kernel: int = 3,
    stride: int = 1,
    stored: torch.dtype = torch.float32,
) -> tuple[int, int]:
    """Return how many inputs in a thousand may be active for the outputs, and for the gradient of the weights."""
    padding = (1, 1) if kernel == 3 else (0, 0)
    shapes = (frames, channels, side, side), (outputs, channels, kernel, kernel)
    sizes = event_layers.sizes_of(*shapes, (stride, stride), padding)
    assert sizes is not None
    return event_layers._most_convolved(sizes, stored), event_layers._most_weighed(sizes, stored)


@pytest.mark.parametrize("sixteen_lanes", [False, True])
def test_how_many_inputs_may_be_active(sixteen_lanes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 lanes fewer may; and always more where torch is slow: small maps, many outputs, gradients of weights."""
    monkeypatch.setattr(event_layers, "_SIXTEEN_LANES", sixteen_lanes)

    large, small = most(64, 128, 128, 16), most(64, 512, 512, 4)
    assert large[0] < small[0]
    assert large[1] <= small[1]
    assert most(128, 32, 64, 20, 4, 2) == ((70, 80) if sixteen_lanes else (120, 150))  # the Nature-CNN's
    assert most(128, 64, 64, 9) == ((90, 90) if sixteen_lanes else (150, 300))
    assert most(320, 512, 512, 2) == ((220, 400) if sixteen_lanes else (300, 500))  # VGG16's


@pytest.mark.parametrize("tiles", [False, True])
def test_in_bfloat16_fewer_inputs_may_be_active_and_on_small_maps_alone_beside_tiles(
    tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_layers, "_FAST_HALVES", True)
    monkeypatch.setattr(event_layers, "_HAS_TILES", tiles)

    layers = [(64, 32, 3), (128, 16, 3), (256, 8, 3), (512, 4, 3), (512, 2, 3), (64, 4, 3), (512, 8, 5)]
    found = [most(64, 64, outputs, side, kernel, stored=torch.bfloat16) for outputs, side, kernel in layers]
    if tiles:
        assert found == [(0, 0), (0, 0), (0, 50), (55, 110), (90, 170), (0, 0), (0, 0)]
    else:
        assert found == [(n, n) for n in (70, 90, 140, 180, 180, 70, 0)]
    for side in (8, 16):
        layer, x = exact(nn.Conv2d(64, 128, 3, padding=1)), spikes(8, 64, side, side, density=0.02).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert is_by_events(through_events(layer, x)) is (side == 8 or not tiles)


def test_beside_tiles_a_map_of_8_x_8_has_only_the_gradient_of_its_weights_by_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_layers, "_FAST_HALVES", True)
    monkeypatch.setattr(event_layers, "_HAS_TILES", True)
    layer = exact(nn.Conv2d(64, 128, 3, padding=1))
    for density, few in ((0.02, True), (0.2, False)):
        x = spikes(8, 64, 8, 8, density=density)
        with torch.autocast("cpu", torch.bfloat16):
            assert through_events(layer, x.bfloat16()).grad_fn.few is few  # type: ignore[union-attr]
        assert_like_torch(layer, x, torch.bfloat16)


def test_in_bfloat16_weights_are_not_rounded() -> None:
    """Of three weights half a last place above 1 the sum is seen, of each alone nothing would be."""
    layer, x = nn.Conv2d(1, 8, 3, bias=False), spikes(2, 1, 3, 3, density=0.0)
    x[:, :, 1] = 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.weight.fill_(1 + 2**-8)
        found, rounded = through_events(layer, x.bfloat16()), layer(x.bfloat16())
    assert torch.equal(found, torch.full_like(found, 3 + 2**-6))
    assert torch.equal(rounded, torch.full_like(found, 3))


STORED = [
    lambda kernel: kernel.repeat(1, 1, 1, 2)[..., ::2],  # with gaps
    lambda kernel: kernel[:1, :1].expand_as(kernel),
    lambda kernel: torch._neg_view(kernel),
    lambda kernel: kernel.transpose(2, 3),
]


@pytest.mark.parametrize("stored", STORED)
def test_weights_however_they_are_stored(stored: Callable[[Tensor], Tensor]) -> None:
    layer, x = exact(nn.Conv2d(8, 16, 3)), spikes(2, 8, 9, 9)
    layer.weight = nn.Parameter(stored(layer.weight.detach()))
    gradient = torch.randint(-8, 9, (2, 16, 7, 7)) / 8
    ours, theirs = through_events(layer, x), layer(x)
    assert torch.equal(ours, theirs)
    found = (torch.autograd.grad(output, layer.weight, gradient)[0] for output in (ours, theirs))
    assert torch.equal(*found)


def test_biases_that_the_loops_cannot_read() -> None:
    for kind in (nn.Conv2d(8, 16, 3), nn.Linear(72, 16)):
        layer, x = exact(kind), spikes(2, 8, 9, 9) if isinstance(kind, nn.Conv2d) else spikes(2, 72)
        with torch.no_grad():
            for bias in (torch.randn(32)[::2], torch.randn(1).expand(16), torch._neg_view(torch.randn(16))):
                layer.bias = nn.Parameter(bias)
                torch.testing.assert_close(through_events(layer, x), layer(x))
            layer.bias = nn.Parameter(torch.randn(16).double())
            with pytest.raises(RuntimeError, match="type"):
                through_events(layer, x)


class Odd(Tensor):
    """Weights of somebody's own."""


def test_weights_of_a_class_of_their_own_are_left_to_it() -> None:
    layer, x = nn.Conv2d(8, 16, 3), spikes(2, 8, 9, 9)
    layer.weight = nn.Parameter(torch.randn(16, 8, 3, 3).as_subclass(Odd))
    with torch.no_grad():
        assert event_layers._by_events(layer, x, True) is None


def test_what_was_kept_for_the_gradient_may_come_back_in_another_layout() -> None:
    layer, x = exact(nn.Conv2d(8, 16, 3)), spikes(2, 8, 9, 9)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), _same
    ):
        output = through_events(layer, x)
    assert is_by_events(output)
    gradient = torch._neg_view(torch.randint(-8, 9, output.shape) / 8).contiguous(memory_format=torch.channels_last)
    ours, theirs = (torch.autograd.grad(y, layer.weight, gradient)[0] for y in (output, layer(x)))
    assert torch.equal(ours, theirs)
    negative = torch._neg_view(gradient)
    ours, theirs = (torch.autograd.grad(y, layer.weight, negative)[0] for y in (through_events(layer, x), layer(x)))
    assert torch.equal(ours, theirs)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def test_outputs_may_be_written_to() -> None:
    layer = SmallMapConv2d(8, 16, 3, padding=1)
    output = through_events(layer, spikes(20, 8, 2, 2, density=0.9))  # all images in one row
    assert is_by_events(output)
    output.relu_().sum().backward()


def test_pictures_in_torchs_own_layout_stay_in_it() -> None:
    layer, x = nn.Conv2d(8, 16, 3), spikes(2, 8, 9, 9).contiguous()
    output = through_events(layer, x)
    assert not is_by_events(output)
    output.view(2, -1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, at the first tangent
def test_gradients_can_be_vectorised_and_pushed_forward() -> None:
    layer, x = exact(nn.Conv2d(8, 16, 3)), spikes(2, 8, 9, 9)
    gradient = torch.randint(-8, 9, (3, 2, 16, 7, 7)) / 8
    ours, theirs = (
        torch.autograd.grad(y, layer.weight, gradient, is_grads_batched=True)[0]
        for y in (through_events(layer, x), layer(x))
    )
    assert torch.equal(ours, theirs)
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(through_events(layer, forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert tangent is not None


def test_a_batch_of_any_size_is_exported() -> None:
    network = build_network("nature_cnn", (4, 36, 36), 6, neuron="relu").eval()
    batch = torch.export.Dim("batch", min=1, max=1024)
    torch.export.export(_First(network), (torch.rand(4, 4, 36, 36),), dynamic_shapes=({0: batch},))


class _First(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x[None])[0]  # type: ignore[no-any-return]


def test_strides_that_were_set_by_hand() -> None:
    layer, x = nn.Conv2d(8, 16, 3), spikes(2, 8, 9, 9)
    layer.stride, layer.padding = [2, 2], 1  # type: ignore[assignment]
    assert torch.equal(through_events(layer, x), layer(x))
    with pytest.raises(RuntimeError):
        through_events(nn.Conv2d(8, 16, 3, padding=2), torch.zeros(2, 8, 0, 5))


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 16, 3, padding=1), SmallMapConv2d(8, 16, 3, padding=1)])
def test_second_derivatives_are_torchs(layer: nn.Conv2d) -> None:
    layer, x = exact(layer), spikes(2, 8, 4, 4).requires_grad_()  # type: ignore[assignment]

    def second(outputs: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(outputs.pow(2).sum(), (x, layer.weight), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, layer.weight))

    output = through_events(layer, x)
    assert is_by_events(output)
    for ours, theirs in zip(second(output), second(layer(x)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_who_listens_is_heard() -> None:
    layer, x, heard = nn.Conv2d(8, 16, 3), spikes(2, 8, 9, 9), []
    handle = layer.register_forward_hook(lambda *_: heard.append("forward"))
    through_events(nn.Sequential(layer), x)
    handle.remove()
    layer.register_forward_pre_hook(lambda *_: heard.append("before"))
    through_events(layer, x)
    with Nothing():
        assert not is_by_events(through_events(nn.Conv2d(8, 16, 3), x))
    everybodys = nn.modules.module.register_module_forward_hook(lambda *_: heard.append("everybody"))
    through_events(nn.Sequential(nn.Conv2d(8, 16, 3)), x)
    everybodys.remove()
    assert heard == ["forward", "before", "everybody", "everybody"]


def test_other_arithmetic_is_torchs() -> None:
    layer, x = nn.Conv2d(8, 16, 3), spikes(2, 8, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        output = through_events(layer, x)  # of 32-bit floats, which the loops for bfloat16 do not read
        assert output.dtype is torch.bfloat16
        assert not is_by_events(output)
    with torch.autocast("cpu", torch.float16):
        assert not is_by_events(through_events(layer, x.half()))
    with pytest.raises(RuntimeError, match="type"):
        through_events(layer, x.bfloat16())  # without autocast
    assert through_events(copy.deepcopy(layer).bfloat16(), x.bfloat16()).dtype is torch.bfloat16
    double = copy.deepcopy(layer).double()
    assert through_events(double, x.double()).dtype is torch.float64
    assert not is_by_events(through_events(nn.Conv2d(8, 16, 3, groups=2), x))
    assert not is_by_events(through_events(nn.Conv2d(8, 16, 3, padding="same"), x))
    assert not is_by_events(through_events(nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), x))
    with pytest.raises(RuntimeError, match="channels"):
        through_events(nn.Conv2d(9, 16, 3), x)
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        through_events(nn.Conv2d(8, 16, 11), x)


def test_torchs_transforms_pass() -> None:
    layer, x = exact(nn.Conv2d(8, 16, 3)), spikes(3, 8, 9, 9)
    assert is_by_events(through_events(layer, x))
    parameters = dict(layer.named_parameters())

    def loss(weights: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(_Through(layer), {f"layer.{k}": w for k, w in weights.items()}, (one[None],)).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)["weight"].sum(0)
    assert torch.equal(found, torch.autograd.grad(through_events(layer, x).sum(), layer.weight)[0])


class _Through(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return through_events(self.layer, x)


@pytest.mark.parametrize("name", ["vgg9", "resnet12", "nature_cnn"])
@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize(("neuron", "halves"), [("lif", False), ("relu", False), ("lif", True)])
def test_a_network_learns_what_it_learned_without(
    monkeypatch: pytest.MonkeyPatch, name: str, timesteps: int, neuron: str, halves: bool
) -> None:
    """The same gradients, up to the order of sums (and in bfloat16 up to its rounding), of the same spikes."""
    error = 2e-2 if halves else 1e-5
    torch.manual_seed(0)
    size = {"width": 0.5} if name != "nature_cnn" else {}
    shape = (3, 32, 32) if name != "nature_cnn" else (4, 36, 36)
    network = build_network(name, shape, 10, timesteps=timesteps, neuron=neuron, **size)
    with torch.no_grad():
        for weight in network.maps.parameters():  # exact sums of spikes, and so the same spikes
            weight.copy_((weight * 256).round() / 256)
    if neuron == "lif":
        calibrate_thresholds(network, torch.randn(4, *shape), rate=0.1)
    x = torch.randn(4, *shape)  # others: those have potentials that are thresholds
    nn.init.normal_(network.readout.weight)
    network.train()
    asked = []
    by_events = event_layers._by_events

    def noting(*arguments: object) -> Tensor | None:
        found = by_events(*arguments)  # type: ignore[arg-type]
        asked.append(found is not None)
        return found

    monkeypatch.setattr(event_layers, "_by_events", noting)

    def learned() -> list[Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=halves):
            outputs, _ = network(x[None])
        outputs.float().square().sum().backward()
        return [outputs, *(p.grad for p in network.parameters() if p.grad is not None)]

    found = learned()
    assert any(asked) or (neuron, name) == ("relu", "nature_cnn")  # where it does not pay
    monkeypatch.setattr(event_layers, "built_events", lambda _: None)
    for ours, plain in zip(found, learned(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=error * float(plain.detach().abs().max()))
