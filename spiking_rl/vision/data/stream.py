"""Images of a set too large for memory, ImageNet, decoded while the network trains."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from spiking_rl.errors import UserError
from spiking_rl.vision.data.decode import centre_crop, decode, pixels, random_resized_crop
from spiking_rl.vision.data.layouts import SPLITS, UNDERSTOOD, data_folder, open_split
from spiking_rl.vision.data.sources import ImageSource, check_labels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Part = Literal["all", "kept", "held"]
"""Of a split: everything, or what is left without the groups that are held back, or those."""
_EVALUATED = 100  # images per batch of validation and test
_HELD = 100  # one group in so many is held back for validation
_GROUPS_MIXED = 10
"""Groups that are read together and mixed: about 1,000 images of the hub's ImageNet, 100 MB per worker."""


class ImageStream:
    """The images of one split, read from disk batch by batch.

    Understood are class folders (``train/n01440764/*.JPEG``, ``val/...``) and the Hugging Face hub's
    parquet shards (``train-00000-of-00294.parquet``).

    Args:
        data: folder that holds them, or a folder ``imagenet`` with them; None takes the environment
            variable SPIKING_RL_DATA.
        split: ``"train"``, ``"val"`` or ``"test"``.
        size: side of the images that come out, in pixels.
        seed: of the order and the augmentation.
        part: ``"held"`` is one file of a class folder, or one row group of a parquet shard, in a hundred (the last
            of each hundred; of fewer the last), ``"kept"`` all others, ``"all"`` both.

    Attributes:
        classes: name of every class.
        labels: class of every image, ``(N,)`` int64, in the order of batches that are not augmented.

    Raises:
        UserError: no such split, nothing understood there, labels that do not fit, pyarrow missing.
    """

    def __init__(
        self,
        data: Path | str | None = None,
        split: str = "train",
        *,
        size: int = 224,
        seed: int = 0,
        part: Part = "all",
    ) -> None:
        if split not in SPLITS:
            raise UserError("split", split, f"no such split; choose one of {', '.join(SPLITS)}")
        for field, value, least in (("size", size, 1), ("seed", seed, 0)):
            if value < least:
                raise UserError(field, value, f"must be at least {least}")
        root = data_folder(data)
        folders = [root / own / sub for own in ("imagenet", "") for sub in ("", "data")]
        source = next((s for s in (open_split(folder, split) for folder in folders) if s), None)
        if source is None:
            raise UserError("data", str(root), f"has no {split} split that is understood; it should hold {UNDERSTOOD}")
        check_labels(source, split, root)
        self._source = source
        self._size = size
        self._seed = seed
        self.classes = source.classes
        groups = np.arange(len(source.bounds) - 1)
        held = (groups + 1) % min(_HELD, len(groups)) == 0
        self._groups = groups if part == "all" else groups[held == (part == "held")]
        if not len(self._groups):
            raise UserError("data", str(root), f"has one group of {split} images, too few to hold some back; add more")
        spans = [np.arange(source.bounds[g], source.bounds[g + 1]) for g in self._groups]
        self.labels = torch.from_numpy(source.labels[np.concatenate(spans)])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def batches(
        self, batch_size: int, *, augmented: bool, epoch: int = 0, workers: int = 0, share: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go once through the images.

        Augmented: in random order, a random part of the image (8 to 100 % of its area) scaled to the size and
        mirrored half of the time; whole batches only, so each worker may leave out a few images, and
        there are at most ``len(stream) // batch_size`` batches. Else: every image, short side scaled to 256/224 of
        the size, the centre cut out.

        The same seed, epoch and number of workers give the same batches. What becomes of an image depends
        on the seed and the epoch alone; the workers only change the order.

        Args:
            batch_size: images per batch, at least 1.
            augmented: for training.
            epoch: number of this round, from 0.
            workers: processes that decode; 0 decodes in this one.
            share: number of a share of the images, from 0, and how many there are: for training in several
                processes.

        Returns:
            An iterator of uint8 ``(B, 3, size, size)`` images and int64 ``(B,)`` labels.

        Raises:
            UserError: an argument is out of range; while iterating, an image is damaged (the file, and the row of
                a parquet file, are named).
        """
        for field, value, least in (("batch_size", batch_size, 1), ("epoch", epoch, 0), ("workers", workers, 0)):
            if value < least:
                raise UserError(field, value, f"must be at least {least}")
        plan = _Round(self._source, self._groups, self._size, batch_size, augmented, self._seed, epoch, share)
        # A generator of its own: the loader would advance torch's global one.
        loader = DataLoader(
            _Batches(plan), None, num_workers=workers, generator=torch.Generator(), worker_init_fn=_left_to_the_trainer
        )
        return _raising(loader)


def _left_to_the_trainer(worker: int) -> None:
    """Let a worker outlive a signal that the whole process group gets: who trains saves first, then ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _raising(loader: DataLoader[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class _Round(NamedTuple):
    """One round through the images, as every worker gets it."""

    source: ImageSource
    groups: NDArray[np.int64]
    size: int
    batch_size: int
    augmented: bool
    seed: int
    epoch: int
    share: tuple[int, int]

    def images(self, worker: int, workers: int) -> Iterator[tuple[NDArray[np.uint8], int]]:
        """Yield a worker's share of the images, with labels."""
        source = self.source
        order = self.groups
        if self.augmented:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
        own, all_of_them = self.share
        worker, workers = own * workers + worker, all_of_them * workers
        order = order[worker::workers]
        mixing = np.random.default_rng((self.seed, self.epoch, worker, workers))
        for start in range(0, len(order), _GROUPS_MIXED):
            groups = order[start : start + _GROUPS_MIXED]
            read = [(int(source.bounds[g]) + k, raw) for g in groups for k, raw in enumerate(source.read(int(g)))]
            for which in mixing.permutation(len(read)) if self.augmented else range(len(read)):
                index, raw = read[which]
                yield self.prepared(raw, index), int(source.labels[index])

    def prepared(self, raw: bytes, index: int) -> NDArray[np.uint8]:
        """Decode and crop one image; the chances are those of the image, whoever decodes it."""
        image = decode(raw, self.source.name(index))
        if not self.augmented:
            return pixels(centre_crop(image, self.size))
        return pixels(
            random_resized_crop(image, self.size, np.random.default_rng((self.seed, self.epoch, 0, 0, index)))
        )


class _Batches(IterableDataset[Tensor]):
    """What the workers run. Errors are yielded: raised in a worker, they would arrive as another type."""

    def __init__(self, plan: _Round) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[object]:  # type: ignore[override]
        info = get_worker_info()
        images = self._plan.images(*((info.id, info.num_workers) if info else (0, 1)))
        try:
            yield from self._batches(images)
        except UserError as error:
            yield error

    def _batches(self, images: Iterator[tuple[NDArray[np.uint8], int]]) -> Iterator[tuple[Tensor, Tensor]]:
        batch: list[tuple[NDArray[np.uint8], int]] = []
        for item in images:
            batch.append(item)
            if len(batch) == self._plan.batch_size:
                yield _stacked(batch)
                batch = []
        if batch and not self._plan.augmented:
            yield _stacked(batch)


def _stacked(batch: list[tuple[NDArray[np.uint8], int]]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.stack([image for image, _ in batch])), torch.tensor([label for _, label in batch])


class StreamedDataset:
    """A large data set as the trainer takes it: ImageNet.

    One training image in a hundred is held back for validation (:class:`ImageStream`, ``part``); the
    published validation images are the test, as everybody reports them.

    Args:
        data: folder that holds the splits, as for :class:`ImageStream`.
        size: side of the images in pixels.
        seed: of the order and the augmentation.

    Attributes:
        train: the training images.
        classes: name of every class.
        input_shape: ``(3, size, size)``.
        mean: of the channels, on the scale 0 to 1; those of ImageNet.
        std: likewise.

    Raises:
        UserError: as :class:`ImageStream`; or the splits have different classes.
    """

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, data: Path | str | None = None, *, size: int = 224, seed: int = 0) -> None:
        self.train = ImageStream(data, "train", size=size, seed=seed, part="kept")
        self._held = ImageStream(data, "train", size=size, part="held")
        self._test = ImageStream(data, "val", size=size)
        self.classes = self.train.classes
        if self._test.classes != self.classes:
            counts = f"{len(self.classes)} classes for training and {len(self._test.classes)} for validation"
            raise UserError("data", str(data), f"has {counts}, or others; both splits must have the same")
        self.input_shape = (3, size, size)

    @property
    def test_labels(self) -> Tensor:
        """Classes of the test images, ``(N,)``."""
        return self._test.labels

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``(B, 3, H, W)`` that select, with their labels."""
        return self._held.batches(_EVALUATED, augmented=False)

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test images in their order, with labels; decoded in this process, which keeps the order."""
        return self._test.batches(_EVALUATED, augmented=False)
