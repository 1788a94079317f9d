"""Where the trainer's batches come from: a set in memory, or images that are decoded while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from spiking_rl.errors import UserError
from spiking_rl.vision.config import ClassifyConfig
from spiking_rl.vision.data import Dataset, ImageStream, StreamedDataset, augment
from spiking_rl.vision.parallel import Team

Images = Dataset | StreamedDataset
"""A data set: small ones in memory, large ones on disk."""

_ALONE = Team()
_SOME_EPOCH = 2**40  # of a stream, from which thresholds are set: no training reaches it


class Batch(Protocol):
    """A batch before it is augmented and moved to the device."""

    def __len__(self) -> int:
        """Return the number of images, those of all processes together."""

    def parts(self, number: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's share in parts, augmented: uint8 ``(B, C, H, W)`` and labels ``(B,)``, on the device."""


class Feed(Protocol):
    """Training images of one run.

    Attributes:
        count: how many there are.
    """

    count: int

    def batches(self, epoch: int, generator: torch.Generator, batch_size: int, first: int) -> Iterator[Batch]:
        """Go through the images of an epoch from its batch number ``first`` on.

        Whole batches only, but where all images in memory do not make one.
        """

    def some(self, number: int, generator: torch.Generator) -> Tensor:
        """Return at most so many training images, chosen at random, uint8 ``(B, C, H, W)``."""


def feed_of(images: Images, config: ClassifyConfig, device: torch.device, team: Team = _ALONE) -> Feed:
    """Return what feeds a run.

    Raises:
        UserError: a crop or a cutout that is too large for images in memory, or a batch that they do not fill.
    """
    if isinstance(images, StreamedDataset):
        return _Streamed(images.train, config, device, team)
    return _InMemory(images, config, device, team)


class _InMemory:
    """A small set, on the device, augmented there."""

    def __init__(self, images: Dataset, config: ClassifyConfig, device: torch.device, team: Team) -> None:
        side = min(images.input_shape[1:])
        if config.crop >= side or config.cutout > side:
            field = "crop" if config.crop >= side else "cutout"
            raise UserError(field, getattr(config, field), f"is too large for images of {side} pixels")
        for field in ("ann_batch_size", "batch_size") if team.size > 1 and config.batch_norm else ():
            if getattr(config, field) // config.accumulate < team.size:
                # Batch norm would learn nothing where there are none, and its means be taken with that.
                remedy = f"leaves parts of {field} without an image for each of {team.size} processes; lower it"
                raise UserError("accumulate", config.accumulate, remedy)
        self.config, self.team = config, team
        self.images = images.train_images.to(device)
        self.labels = images.train_labels.to(device)
        self.count = len(self.labels)

    def batches(self, epoch: int, generator: torch.Generator, batch_size: int, first: int) -> Iterator[Batch]:
        """Yield rows of the images; ``epoch`` is in the generator."""
        order = torch.randperm(self.count, generator=generator).to(self.labels.device)
        for batch in range(first, max(1, self.count // batch_size)):
            yield _Rows(self, order[batch * batch_size : (batch + 1) * batch_size])

    def some(self, number: int, generator: torch.Generator) -> Tensor:
        """Return rows as they are."""
        chosen = torch.randperm(self.count, generator=generator)[:number].to(self.labels.device)
        return self.images[chosen]


class _Rows:
    """A batch of images in memory."""

    def __init__(self, feed: _InMemory, rows: Tensor) -> None:
        self.feed, self.rows = feed, rows

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def parts(self, number: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Crop, flip and cut out the whole batch, so that every process draws alike; take one's share of it."""
        own = self.feed.config
        for rows in self.rows.chunk(number):
            images = augment(
                self.feed.images[rows], crop=own.crop, flip=own.flip, cutout=own.cutout, generator=generator
            )
            own_share = slice(self.feed.team.rank, None, self.feed.team.size)
            yield images[own_share], self.feed.labels[rows][own_share]


class _Streamed:
    """A large set, decoded and augmented by worker processes."""

    def __init__(self, stream: ImageStream, config: ClassifyConfig, device: torch.device, team: Team) -> None:
        for field in ("ann_batch_size", "batch_size"):
            size = getattr(config, field)
            if size * max(1, config.workers) > len(stream):
                remedy = f"the {len(stream)} training images do not fill a batch of every worker; lower it, or workers"
                raise UserError(field, size, remedy)
            if size % team.size:
                raise UserError(field, size, f"must be a multiple of the {team.size} processes, which share it")
        self.stream, self.config, self.device, self.team = stream, config, device, team
        self.count = len(stream)

    def batches(self, epoch: int, generator: torch.Generator, batch_size: int, first: int) -> Iterator[Batch]:
        """Decode; what comes before ``first`` is decoded again after a resume, and dropped."""
        share = (self.team.rank, self.team.size)
        own = batch_size // self.team.size
        read = self.stream.batches(own, augmented=True, epoch=epoch, workers=self.config.workers, share=share)
        for number, (images, labels) in enumerate(read):
            if number >= first:
                yield _Decoded(images, labels, batch_size, self.device)

    def some(self, number: int, generator: torch.Generator) -> Tensor:
        """Return the first of a random order."""
        read = self.stream.batches(min(number, self.count), augmented=True, epoch=_SOME_EPOCH)
        return next(read)[0].to(self.device)


class _Decoded:
    """A batch as it came from the disk, augmented by the worker."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, device: torch.device) -> None:
        self.images, self.labels, self.size, self.device = images, labels, size, device

    def __len__(self) -> int:
        """Return the number of images."""
        return self.size

    def parts(self, number: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Move to the device."""
        for images, labels in zip(self.images.chunk(number), self.labels.chunk(number), strict=True):
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
