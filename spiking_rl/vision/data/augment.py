"""Augmented batches of images that are in memory, made on their device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from spiking_rl.errors import UserError


def augment(
    images: Tensor, *, crop: int = 4, flip: bool = True, cutout: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Shift, mirror and partly cover every image, each in its own way.

    The shift is a random crop of the reflected image: every pixel comes from the image, whether it is
    normalised or not, where padding with zeros would bring in a colour that depends on it.

    Args:
        images: ``(B, C, H, W)``, uint8 or floating point.
        crop: largest shift in pixels, 0 to the smaller side minus 1, in each direction; 0 for none.
        flip: mirror left and right half of the time.
        cutout: side in pixels of the square that is set to zero (DeVries & Taylor 2017), its centre anywhere in
            the image, so that it may reach beyond; 0 for none. Zero is black in uint8 and
            the mean colour in normalised images.
        generator: source of randomness, on any device; the same state gives the same images.

    Returns:
        New images of the same shape and type.

    Raises:
        UserError: the shape, ``crop`` or ``cutout`` is out of range.
    """
    if images.dim() != 4:
        raise UserError("images", tuple(images.shape), "must have the shape (B, C, H, W)")
    batch, channels, height, width = images.shape
    if not 0 <= crop < min(height, width):
        raise UserError("crop", crop, f"must be 0 to {min(height, width) - 1} for images of {height} x {width}")
    if cutout < 0:
        raise UserError("cutout", cutout, "must be 0 or more pixels")

    def draw(low: int, high: int) -> Tensor:
        """Draw one whole number from low to high per image, ``(B, 1)``."""
        place = generator.device if generator is not None else images.device
        return torch.randint(low, high + 1, (batch, 1), generator=generator, device=place).to(images.device)

    rows = torch.arange(height, device=images.device) + draw(-crop, crop)  # (B, H)
    columns = torch.arange(width, device=images.device) + draw(-crop, crop)  # (B, W)
    if flip:
        columns = torch.where(draw(0, 1) == 1, width - 1 - columns, columns)
    rows = height - 1 - (height - 1 - rows.abs()).abs()
    columns = width - 1 - (width - 1 - columns.abs()).abs()
    places = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    out = images.reshape(batch, channels, -1).gather(2, places).view(images.shape)
    if cutout:
        covered = _within(height, draw(0, height - 1), cutout)[:, :, None] & _within(
            width, draw(0, width - 1), cutout
        ).unsqueeze(1)
        out.masked_fill_(covered.unsqueeze(1), 0)
    return out


def _within(size: int, centre: Tensor, length: int) -> Tensor:
    """Return which of ``size`` places lie in the ``length`` places around each centre, ``(B, size)``."""
    distance = torch.arange(size, device=centre.device) - (centre - length // 2)
    return (distance >= 0) & (distance < length)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Standardise the channels: x becomes (x - mean) / std.

    Args:
        images: ``(B, C, H, W)``, uint8 0 to 255, or floating point 0 to 1.
        mean: one per channel, on the scale 0 to 1.
        std: one per channel, on the scale 0 to 1, above 0.

    Returns:
        ``(B, C, H, W)`` float32.

    Raises:
        UserError: the numbers of channels differ, or a standard deviation is not above 0.
    """
    channels = images.shape[1]
    for field, given in (("mean", mean), ("std", std)):
        if len(given) != channels:
            raise UserError(field, tuple(given), f"must have one number for each of the {channels} channels")
    if not min(std) > 0:
        raise UserError("std", tuple(std), "must be above 0; a channel that never changes cannot be standardised")
    full = 1.0 if images.is_floating_point() else 255.0
    scale = torch.tensor([1 / (full * s) for s in std], device=images.device)[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)[:, None, None]
    return (
        torch.addcmul(shift, images, scale) if images.dtype == torch.float32 else images.float().mul_(scale).add_(shift)
    )


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    shuffle: bool = False,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go once through images in memory, batch by batch, on their device.

    Args:
        images: ``(N, C, H, W)``.
        labels: ``(N,)``, on the same device.
        batch_size: images per batch, at least 1.
        shuffle: in a random order, each image once.
        drop_last: leave out a last batch that is smaller.
        generator: source of the order, on any device.
        transform: applied to the images of every batch, for example
            ``partial(augment, crop=4, generator=generator)``.

    Returns:
        An iterator of ``(B, C, H, W)`` images and ``(B,)`` labels.

    Raises:
        UserError: there are not as many labels as images, or ``batch_size`` is below 1, or no batch is left.
    """
    if len(images) != len(labels):
        raise UserError("labels", len(labels), f"must be as many as the images, {len(images)}")
    if batch_size < 1 or (drop_last and batch_size > len(images)):
        raise UserError("batch_size", batch_size, f"must be at least 1, and with drop_last at most {len(images)}")
    place = generator.device if generator is not None else images.device
    order = torch.randperm(len(images), generator=generator, device=place).to(images.device) if shuffle else None
    end = len(images) - len(images) % batch_size if drop_last else len(images)

    def go() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, end, batch_size):
            part = slice(start, min(start + batch_size, end))
            taken = part if order is None else order[part]
            yield (transform(images[taken]) if transform else images[taken]), labels[taken]

    return go()
