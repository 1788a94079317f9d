"""Convolutions of narrow maps, laid side by side: results and gradients of the plain convolution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from spiking_rl import NETWORKS
from spiking_rl.small_maps import SmallMapConv2d, gradients

SIZES = {
    "images": st.integers(1, 30),
    "rows": st.integers(1, 9),
    "columns": st.integers(1, 9),
    "stride": st.sampled_from([1, 2]),
}


def _pair(bias: bool, channels: tuple[int, int] = (3, 5), **options: int) -> tuple[SmallMapConv2d, nn.Conv2d]:
    options = {"kernel_size": 3, "padding": 1, **options}
    small, plain = SmallMapConv2d(*channels, bias=bias, **options), nn.Conv2d(*channels, bias=bias, **options)
    plain.load_state_dict(small.state_dict())
    return small, plain


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_single_pixels_at_a_stride_are_padded_as_ever(mode: str) -> None:
    for channels in (3, 8):
        small, plain = (kind(channels, 4, 1, 2, 1, padding_mode=mode) for kind in (SmallMapConv2d, nn.Conv2d))
        plain.load_state_dict(small.state_dict())
        x = torch.randn(2, channels, 8, 8)
        torch.testing.assert_close(small(x), plain(x))


@settings(max_examples=60, deadline=None)
@given(
    **SIZES,
    bias=st.booleans(),
    narrow=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_the_plain_convolution(
    images: int, rows: int, columns: int, stride: int, bias: bool, narrow: bool, channels_last: bool, seed: int
) -> None:
    # Torch's own gradient of a single column at stride 2 in bfloat16 holds memory that nobody wrote.
    assume(not (narrow and stride == 2 and columns == 1))
    torch.manual_seed(seed)
    small, plain = _pair(bias, stride=stride)
    x = torch.randn(images, 3, rows, columns)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    found = []
    for layer in (small, plain):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            y = layer(own)
        assert y.dtype == (torch.bfloat16 if narrow else torch.float32)
        torch.manual_seed(seed)
        y.float().mul(torch.randn(y.shape)).sum().backward()
        found.append([y.detach().float(), own.grad, *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        scale = float(theirs.abs().max()) + 1e-6
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=3e-2 if narrow else 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    **SIZES,
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_gradients_are_those_of_autograd(
    images: int, rows: int, columns: int, stride: int, wanted: tuple[bool, bool, bool], seed: int
) -> None:
    torch.manual_seed(seed)
    small, plain = _pair(True, stride=stride)
    x = torch.randn(images, 3, rows, columns, requires_grad=True)
    y = plain(x)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, plain.weight, plain.bias), gradient)
    for ours, theirs, asked in zip(
        gradients(small, gradient, x.detach(), small.weight, wanted), expected, wanted, strict=True
    ):
        if asked:
            assert ours is not None
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()) + 1e-7)


@pytest.mark.parametrize("options", [{"stride": 3}, {"kernel_size": 1, "padding": 0}, {"padding": 0}, {"dilation": 2}])
def test_other_convolutions_are_left_as_they_are(options: dict[str, int]) -> None:
    small, plain = _pair(True, **options)
    x = torch.randn(8, 3, 4, 4)
    assert torch.equal(small(x), plain(x))


def test_narrow_maps_reach_the_kernel_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    convolve = functional.conv2d

    def watched(x: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return convolve(x, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "conv2d", watched)
    network = NETWORKS["vgg16"]((3, 32, 32), 10, neuron="relu", width=0.05)
    network(torch.randn(1, 24, 3, 32, 32))
    assert {shape[0] for shape in seen if shape[3] >= 16 and shape[2] >= 8} == {24}  # wide ones come alone
    last = seen[-1]  # 2 x 2 pixels: 12 images of 3 columns in a row
    assert last == (2, last[1], 2, 36)
    seen.clear()
    network = NETWORKS["resnet20"]((3, 32, 32), 10, neuron="relu", width=0.05)
    network(torch.randn(1, 24, 3, 32, 32))
    assert (4, 13, 4, 36) in seen  # at stride 2, from 4 x 4 pixels: 6 images of 6 columns in a row


@pytest.mark.parametrize("images", [1, 41])  # 41 cannot be divided
def test_gradients_of_a_single_column_hold_no_unwritten_memory(images: int) -> None:
    torch.manual_seed(0)
    for _ in range(300):
        unwritten = [torch.full((size,), torch.nan) for size in (135, 270, 540, 1000, 5000, 20000)]
        del unwritten
        small, _ = _pair(False, stride=2)
        x = torch.randn(images, 3, 2, 1, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            small(x).float().sum().backward()
        for gradient in (small.weight.grad, x.grad):
            assert gradient is not None
            assert gradient.isfinite().all()


def test_images_of_a_batch_do_not_touch() -> None:
    torch.manual_seed(0)
    small, _ = _pair(False)
    x = torch.zeros(10, 3, 4, 4)
    x[3] = torch.randn(3, 4, 4)
    y = small(x)
    assert y[3].abs().max() > 0
    assert y[[0, 1, 2, 4, 5, 6, 7, 8, 9]].abs().max() == 0


def test_doubles_are_left_as_they_are_under_autocast() -> None:
    small, plain = _pair(True)
    x = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(small.double()(x), plain.double()(x))


@pytest.mark.parametrize("shape", [(3, 2, 2), (0, 3, 2, 2)])
def test_single_images_and_no_images_are_taken(shape: tuple[int, ...]) -> None:
    small, plain = _pair(True)
    x = torch.randn(shape)
    assert torch.equal(small(x), plain(x))


def test_few_images_leave_channels_last() -> None:
    small, _ = _pair(False)
    x = torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last)
    assert small(x).is_contiguous(memory_format=torch.channels_last)


def test_an_exported_layer_takes_other_batches() -> None:
    small, plain = _pair(True)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(small, (torch.randn(8, 3, 2, 2),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(9, 3, 2, 2)
    assert torch.allclose(exported(x), plain(x), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_a_narrow_shortcut_at_stride_two_leaves_memory_alone(channels: int) -> None:
    torch.manual_seed(0)
    layer = SmallMapConv2d(channels, 8, 1, 2)
    for side in (16, 9):
        x = torch.randn(16, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
        y = layer(x)
        wanted = torch.nn.functional.conv2d(x.double(), layer.weight.double(), layer.bias.double(), 2)  # type: ignore[union-attr]
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
        weights = torch.randn_like(y)
        found = torch.autograd.grad((y * weights).sum(), [x, layer.weight])
        truly = torch.autograd.grad((wanted * weights).sum(), [x, layer.weight])
        for a, b in zip(found, truly, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
