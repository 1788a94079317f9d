"""Augmented batches: every pixel from its image, every label with its image, the same from the same seed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from spiking_rl import UserError
from spiking_rl.vision.data import augment, batches, normalise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Return images in which every pixel has a value of its own."""
    return torch.arange(batch * channels * height * width).float().reshape(batch, channels, height, width)


def shifts_of(original: Tensor, changed: Tensor, crop: int) -> list[tuple[int, int, bool]]:
    """Return the shifts and flips that lead from an image to another, by trying all of them on a reflected image."""
    height, width = original.shape[1:]
    padded = torch.nn.functional.pad(original[None], (crop,) * 4, mode="reflect")[0]
    return [
        (dy - crop, dx - crop, flip)
        for dy in range(2 * crop + 1)
        for dx in range(2 * crop + 1)
        for flip in (False, True)
        for window in [padded[:, dy : dy + height, dx : dx + width]]
        if torch.equal(window.flip(2) if flip else window, changed)
    ]


@pytest.mark.parametrize(("height", "width", "crop"), [(8, 8, 2), (10, 13, 4), (9, 7, 2)])
def test_each_image_becomes_a_crop_of_its_own_reflection(height: int, width: int, crop: int) -> None:
    images = numbered(200, height, width)
    changed = augment(images, crop=crop, generator=seeded())
    found = [shifts_of(a, b, crop) for a, b in zip(images, changed, strict=True)]
    assert {len(ways) for ways in found} == {1}
    shifts = [ways[0] for ways in found]
    # Each image in its own way, and the whole range is used.
    assert {dy for dy, _, _ in shifts} == {dx for _, dx, _ in shifts} == set(range(-crop, crop + 1))
    assert len(set(shifts)) > 30


@pytest.mark.parametrize(("height", "width", "crop"), [(5, 9, 4), (6, 4, 3), (2, 2, 1)])
def test_the_largest_crop_is_still_one_of_the_reflection(height: int, width: int, crop: int) -> None:
    images = numbered(100, height, width)
    changed = augment(images, crop=crop, generator=seeded())
    assert all(shifts_of(a, b, crop) for a, b in zip(images, changed, strict=True))


def test_flips_happen_about_half_of_the_time() -> None:
    images = numbered(1000, 4, 4)
    changed = augment(images, crop=0, generator=seeded())
    flipped = torch.tensor([torch.equal(a.flip(2), b) for a, b in zip(images, changed, strict=True)])
    assert 430 < int(flipped.sum()) < 570
    assert torch.equal(changed[~flipped], images[~flipped])


def test_nothing_asked_for_changes_nothing() -> None:
    images = numbered(5, 6, 7)
    assert torch.equal(augment(images, crop=0, flip=False), images)
    kept = augment(images, crop=2, flip=False, generator=seeded())
    assert not any(shifts_of(a, b, 2)[0][2] for a, b in zip(images, kept, strict=True))


@pytest.mark.parametrize("cutout", [1, 2, 3, 4, 7])
def test_cutout_covers_a_square_around_any_pixel(cutout: int) -> None:
    changed = augment(torch.ones(2000, 2, 6, 8), crop=0, flip=False, cutout=cutout, generator=seeded())
    covered = changed == 0
    assert torch.equal(covered[:, 0], covered[:, 1]), "the same place in all channels"
    rows, columns = covered[:, 0].any(2), covered[:, 0].any(1)
    assert torch.equal(covered[:, 0], rows[:, :, None] & columns[:, None, :]), "a rectangle"
    for lines, size in ((rows, 6), (columns, 8)):
        # A centre c covers c - cutout // 2 and the next ones, as far as there is an image.
        expected = {
            tuple(k in range(c - cutout // 2, c - cutout // 2 + cutout) for k in range(size)) for c in range(size)
        }
        assert {tuple(line) for line in lines.tolist()} == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_images_in_any_type(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (16, 3, 8, 8), generator=seeded(1), dtype=torch.uint8)
    kept = images.clone()
    first, second = (augment(images.to(dtype), cutout=3, generator=seeded(5)) for _ in range(2))
    assert first.dtype == dtype
    assert torch.equal(first, second)
    assert torch.equal(first.float(), augment(images, cutout=3, generator=seeded(5)).float())
    assert not torch.equal(first, augment(images.to(dtype), cutout=3, generator=seeded(6)))
    assert torch.equal(images, kept), "the images themselves stay"


def test_images_in_any_memory_format() -> None:
    images = numbered(4, 8, 8)
    last = images.to(memory_format=torch.channels_last)
    assert torch.equal(augment(last, generator=seeded()), augment(images, generator=seeded()))


@pytest.mark.parametrize(
    ("options", "told"),
    [({"crop": 6}, "crop = 6.*0 to 5"), ({"crop": -1}, "crop"), ({"cutout": -1}, "cutout = -1")],
)
def test_options_out_of_range(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        augment(torch.zeros(1, 3, 6, 8), **options)
    with pytest.raises(UserError, match=r"\(B, C, H, W\)"):
        augment(torch.zeros(3, 6, 8))


def test_normalising_figures() -> None:
    images = torch.tensor([0, 51, 255, 102], dtype=torch.uint8).reshape(1, 2, 1, 2)
    expected = torch.tensor([-2.0, -1.2, 3.0, 0.6]).reshape(1, 2, 1, 2)
    for given in (images, images.float() / 255, images.double() / 255):
        result = normalise(given, (0.5, 0.25), (0.25, 0.25))
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected)


def test_normalising_needs_one_mean_and_a_positive_std_per_channel() -> None:
    images = torch.zeros(1, 3, 2, 2)
    for mean, std, told in (((0, 0), (1, 1, 1), "mean"), ((0,) * 3, (1,), "std"), ((0,) * 3, (1, 0, 1), "above 0")):
        with pytest.raises(UserError, match=told):
            normalise(images, mean, std)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_images_and_labels_stay_together(drop_last: bool, sizes: list[int]) -> None:
    labels = torch.arange(10)
    images = labels.reshape(10, 1, 1, 1).expand(10, 3, 6, 6).float()
    change = partial(augment, crop=2, generator=seeded())
    orders = []
    for epoch in range(3):
        seen = list(
            batches(images, labels, 4, shuffle=True, drop_last=drop_last, generator=seeded(epoch % 2), transform=change)
        )
        assert [len(part) for _, part in seen] == sizes
        for part, own in seen:
            assert torch.equal(part, own.reshape(-1, 1, 1, 1).expand(-1, 3, 6, 6).float())
        orders.append([int(label) for _, own in seen for label in own])
        assert len(set(orders[-1])) == sum(sizes), "no image twice"
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_without_shuffling_images_come_in_order_and_once() -> None:
    images, labels = numbered(7, 2, 2), torch.arange(7)
    seen = list(batches(images, labels, 3))
    assert torch.equal(torch.cat([part for part, _ in seen]), images)
    assert torch.equal(torch.cat([own for _, own in seen]), labels)


def test_batches_that_cannot_be_made_are_told_at_once() -> None:
    images, labels = numbered(7, 2, 2), torch.arange(7)
    with pytest.raises(UserError, match="labels = 6"):
        batches(images, labels[:6], 3)
    with pytest.raises(UserError, match="batch_size = 0"):
        batches(images, labels, 0)
    with pytest.raises(UserError, match="batch_size = 8"):
        batches(images, labels, 8, drop_last=True)


def test_everything_stays_on_the_device_of_the_images() -> None:
    # On "meta", mixing in a tensor from elsewhere fails as it would on a GPU.
    images, labels = numbered(8, 6, 6).to("meta"), torch.arange(8, device="meta")
    change = partial(augment, crop=2, cutout=3, generator=seeded())
    ((part, own),) = batches(images, labels, 8, shuffle=True, generator=seeded(), transform=change)
    standard = normalise(part, (0.5,) * 3, (0.2,) * 3)
    assert part.device.type == own.device.type == standard.device.type == "meta"
    assert part.shape == standard.shape == images.shape
