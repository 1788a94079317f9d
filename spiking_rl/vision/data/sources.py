"""Encoded images of one split, wherever they lie: what a class-folder tree and parquet shards have in common."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spiking_rl.errors import UserError
from spiking_rl.files import read_bounded

LARGEST_IMAGE_FILE = 64 * 2**20  # bytes; ImageNet's largest has 15 million
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_OTHER_IMAGES = (".gif", ".tif", ".tiff", ".jfif", ".jpe", ".jp2", ".avif", ".heic", ".ppm", ".pgm", ".npy")


@dataclass(frozen=True)
class ImageSource(ABC):
    """The images of one split, still encoded.

    Images lie in groups that are best read as a whole: a file, or a row group of a parquet shard.

    Attributes:
        classes: name of every class.
        labels: ``(N,)`` int64, class of every image.
        bounds: ``(G + 1,)`` int64; group g holds the images ``bounds[g]`` to ``bounds[g + 1] - 1``.
    """

    classes: list[str]
    labels: NDArray[np.int64]
    bounds: NDArray[np.int64]

    @abstractmethod
    def name(self, index: int) -> str:
        """Return where an image lies, for messages."""

    @abstractmethod
    def read(self, group: int) -> list[bytes]:
        """Return the encoded images of a group.

        Raises:
            UserError: a file cannot be read; the message names it.
        """


def check_labels(source: ImageSource, split: str, place: Path | str) -> None:
    """Refuse a split without images, or with labels that stand for no class.

    Raises:
        UserError: the split is empty (named with its place), or a label is outside 0 ... C - 1.
    """
    if not len(source.labels):
        raise UserError(
            "data",
            str(place),
            f"has no images in its {split} split; put {', '.join(_SUFFIXES)} files right in the folders of its classes",
        )
    outside = (source.labels < 0) | (source.labels >= len(source.classes))
    if outside.any():
        first = int(outside.argmax())
        raise UserError(
            "data",
            source.name(first),
            f"has label {source.labels[first]}, but labels go from 0 to {len(source.classes) - 1}; "
            "take a split with labels, or download the file again",
        )


@dataclass(frozen=True)
class ClassFolders(ImageSource):
    """Images in one folder per class; every file is a group of its own."""

    paths: list[str]

    def name(self, index: int) -> str:
        """Return the file."""
        return self.paths[index]

    def read(self, group: int) -> list[bytes]:
        """Return the one file of the group."""
        try:
            return [read_bounded(Path(self.paths[group]), LARGEST_IMAGE_FILE)]
        except OSError as error:
            raise UserError("data", self.paths[group], f"cannot be read ({error.strerror})") from None


def open_class_folders(folder: Path) -> ClassFolders:
    """List ``folder/<class>/*.png`` (or jpg, jpeg, webp, bmp); classes and files in alphabetical order.

    What begins with a dot is left out; images of other kinds, and folders in a class's folder, with a warning.

    Raises:
        UserError: the folder has no class folders, or cannot be listed.
    """
    try:
        classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        listed = [_images_and_others(folder / c) for c in classes]
    except OSError as error:
        raise UserError("data", str(folder), f"cannot be listed ({error.strerror})") from None
    if not classes:
        raise UserError("data", str(folder), "holds no class folders; sort its images into one folder per class")
    files = [images for images, _ in listed]
    if others := [path for _, of_class in listed for path in of_class]:
        kinds = ", ".join(_SUFFIXES)
        remedy = f"images are {kinds} right in their class's folder"
        warnings.warn(f"{len(others)} left out in {folder}, such as {min(others)}: {remedy}", stacklevel=2)
    labels = np.repeat(np.arange(len(classes)), [len(of_class) for of_class in files])
    return ClassFolders(classes, labels, np.arange(len(labels) + 1), [path for of_class in files for path in of_class])


def _images_and_others(folder: Path) -> tuple[list[str], list[str]]:
    """List the images of a class in order, and what somebody may have taken for images that are read."""
    images, others = [], []  # strings, not Paths: ImageNet has 1.3 million of them
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.lower()
            if name.startswith("."):
                continue
            if name.endswith(_SUFFIXES):
                images.append(entry.path)
            elif name.endswith(_OTHER_IMAGES) or entry.is_dir():
                others.append(entry.path)
    return sorted(images), others
