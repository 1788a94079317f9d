"""Small data sets as tensors in memory: CIFAR-10, CIFAR-100, Tiny ImageNet at 32 x 32, and any image folder."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from spiking_rl.errors import UserError
from spiking_rl.vision.data.cifar import CIFAR10, CIFAR100, PickledLayout, read_batches, read_classes
from spiking_rl.vision.data.decode import decode_all
from spiking_rl.vision.data.layouts import UNDERSTOOD, data_folder, open_split
from spiking_rl.vision.data.sources import check_labels

Triple = tuple[float, float, float]
_CHUNK = 4096  # images whose pixels are counted at once, which takes 8 bytes each
_SHUFFLE_SEED = 0


class Dataset(NamedTuple):
    """A data set in memory.

    Images are uint8 ``(N, 3, H, W)``, labels int64 ``(N,)``. ``mean`` and ``std`` are those of the channels
    of the training images, on the scale 0 to 1. Select on the validation images; the test images are for
    the number that is reported.
    """

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    mean: Triple
    std: Triple

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an image, ``(3, H, W)``."""
        return tuple(self.train_images.shape[1:])

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images that select, with their labels."""
        yield self.val_images, self.val_labels

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the test images, with their labels."""
        yield self.test_images, self.test_labels

    def to(self, device: torch.device | str) -> Dataset:
        """Return the same data on a device."""
        train, val, test = (
            (images.to(device), labels.to(device)) for images, labels in (self[0:2], self[2:4], self[4:6])
        )
        return Dataset(*train, *val, *test, self.classes, self.mean, self.std)


class _Kind(NamedTuple):
    """What is known of a data set by its name.

    Attributes:
        classes: their number; None where any will do.
        validation: images taken from the end of the training images; None takes a tenth.
        label: label column of its parquet files.
        subfolders: where its files lie in a copy of the published archive or repository.
        pickled: CIFAR's own layout.
    """

    classes: int | None
    validation: int | None
    label: str = "label"
    subfolders: tuple[str, ...] = ("", "data")
    pickled: PickledLayout | None = None


_KINDS = {
    "cifar10": _Kind(10, 5_000, subfolders=("", "data", "plain_text", CIFAR10.folder), pickled=CIFAR10),
    "cifar100": _Kind(100, 5_000, "fine_label", ("", "data", CIFAR100.folder), CIFAR100),
    "tiny-imagenet-32": _Kind(200, 10_000),
    "folder": _Kind(None, None),
}
DATASETS = tuple(_KINDS)
"""Names that :func:`load_dataset` knows."""


class _Split(NamedTuple):
    """A split whose labels are read and checked; its pixels are decoded when asked for."""

    classes: list[str]
    labels: Tensor
    pixels: Callable[[], Tensor]


def load_dataset(name: str, data: Path | str | None = None, *, size: int = 32) -> Dataset:
    """Load a small data set into memory.

    The validation images are the last 5,000 training images (Tiny ImageNet: 10,000; ``folder``: those in
    ``val`` if there is a ``test`` too, else the last tenth). Training images that come class by class are
    shuffled before, always in the same way, so that the last ones are of all classes.

    Args:
        name: ``"cifar10"``, ``"cifar100"`` (fine labels), ``"tiny-imagenet-32"`` or ``"folder"``.
        data: folder that holds the set, or a folder ``name`` with it: parquet files as on the Hugging Face
            hub, class folders ``train/<class>/*.png`` and ``test/<class>/*.png``, or CIFAR's own
            pickled batches, of which nothing is run. None takes the environment variable SPIKING_RL_DATA.
        size: side of the images of a ``folder`` in pixels; larger ones are cut to their centred square and
            scaled down. The other sets are 32 x 32.

    Returns:
        The images as they are: see :func:`augment` and :func:`normalise`.

    Raises:
        UserError: an unknown name; missing, damaged or too small images; class names or labels that do
            not fit; an empty split; pyarrow is needed and missing.
    """
    if name == "imagenet":
        raise UserError("dataset", name, "does not fit into memory; StreamedDataset reads it from disk")
    if name not in _KINDS:
        known = (*DATASETS, "imagenet")
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
        raise UserError("dataset", name, f"no such data set; {hint}")
    if size < 1 or (name != "folder" and size != 32):
        raise UserError("size", size, "must be at least 1 for 'folder', and 32 for the other data sets")
    kind, root = _KINDS[name], data_folder(data)
    folders = [root / own / sub for own in ((name, "") if name != "folder" else ("",)) for sub in kind.subfolders]
    for folder in folders:
        train = _open(kind, folder, "train", size)  # what else lies in a folder without it is no data of ours
        if train:
            test, val = (_open(kind, folder, split, size) for split in ("test", "val"))
            break
    else:
        cifar = f"; or {kind.pickled.folder}/" if kind.pickled else ""
        raise UserError("data", str(root), f"holds no {name} that is understood; it should hold {UNDERSTOOD}{cifar}")
    if not test:
        test, val = val, None  # with one split beside the training images, that one is the test
    if not test:
        raise UserError("data", str(folder), f"has training images but no test split; it should hold {UNDERSTOOD}")
    _check_classes(kind, name, folder, train, test, val)
    return _joined(kind, folder, train, test, val)


def _open(kind: _Kind, folder: Path, split: str, size: int) -> _Split | None:
    source = open_split(folder, split, kind.label)
    if source:
        check_labels(source, split, folder)
        return _Split(source.classes, torch.from_numpy(source.labels), partial(decode_all, source, size, split))
    layout = kind.pickled
    if split == "val" or layout is None or not (folder / layout.meta).is_file():
        return None
    classes = read_classes(folder, layout)
    images, labels = read_batches(folder, layout.train if split == "train" else layout.test, layout, len(classes))
    return _Split(classes, labels, lambda: images)


def _check_classes(kind: _Kind, name: str, folder: Path, train: _Split, test: _Split, val: _Split | None) -> None:
    if kind.classes not in (None, len(train.classes)):
        raise UserError(
            "data", str(folder), f"has {len(train.classes)} classes, but {name} has {kind.classes}; is it another set?"
        )
    for split in (test, val):
        if split and split.classes != train.classes:
            differing = sorted(set(split.classes) ^ set(train.classes))[:3] or "in another order"
            raise UserError(
                "data",
                str(folder),
                f"has {len(train.classes)} classes for training and {len(split.classes)} for testing, which differ "
                f"({differing}); both must have the same, in the same order",
            )


def _joined(kind: _Kind, folder: Path, train: _Split, test: _Split, val: _Split | None) -> Dataset:
    """Split off the validation images and decode everything."""
    total = len(train.labels)
    kept = total if val else total - (kind.validation or max(1, total // 10))
    if kept < 1 or not len(test.labels):
        raise UserError(
            "data",
            str(folder),
            f"has {total} training and {len(test.labels)} test images, which leaves a split empty: "
            f"the last {total - kept} for training are for validation; download it again",
        )
    images, labels = train.pixels(), train.labels
    if not val and _by_class(labels):
        order = torch.randperm(total, generator=torch.Generator().manual_seed(_SHUFFLE_SEED))
        images, labels = images[order], labels[order]
    val_images, val_labels = (val.pixels(), val.labels) if val else (images[kept:], labels[kept:])
    mean, std = channel_statistics(images[:kept])
    return Dataset(
        images[:kept], labels[:kept], val_images, val_labels, test.pixels(), test.labels, train.classes, mean, std
    )


def _by_class(labels: Tensor) -> bool:
    """Tell whether images lie class by class, in whatever order of classes: far fewer changes than chance makes."""
    if bool((labels.diff() >= 0).all()):  # of few images a class changes are many all the same
        return True
    shares = labels.bincount().double() / len(labels)
    changes = int((labels.diff() != 0).sum())
    return changes <= 0.5 * len(labels) * float(1 - shares.square().sum())


def channel_statistics(images: Tensor) -> tuple[Triple, Triple]:
    """Return mean and standard deviation of the channels of uint8 images ``(N, 3, H, W)``, on the scale 0 to 1."""
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for chunk in torch.split(images, _CHUNK):  # counting is exact, and needs no copy in floating point
        counts += torch.stack([chunk[:, c].flatten().bincount(minlength=256) for c in range(3)]).cpu()
    shares = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    std = (shares @ values.square() - mean.square()).clamp_min(0).sqrt()
    (m0, m1, m2), (s0, s1, s2) = mean.tolist(), std.tolist()
    return (m0, m1, m2), (s0, s1, s2)
