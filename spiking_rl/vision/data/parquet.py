"""Images in parquet shards, in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_rl.errors import UserError
from spiking_rl.files import require_regular
from spiking_rl.vision.data.sources import LARGEST_IMAGE_FILE, ImageSource

_SHARD = re.compile(r"(?P<split>[a-z]+)(-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?)?\.parquet")
_NUMBERS = (("number", 0), ("total", 1))  # and what a file without them has
_IMAGE_COLUMNS = ("image", "img")
# Repetition costs a parquet file nothing: a few bytes may stand for any number of rows.
_MOST_ROWS = 20_000_000  # of a file; ImageNet has 1.3 million in all
_MOST_GROUP_BYTES = 2**30  # of the encoded images of a row group
_READ = 64  # rows at once


def find_shards(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split, in order: ``train-00000-of-00003.parquet`` ..., or ``train.parquet``.

    Raises:
        UserError: a shard is missing, or one is left over from another set.
    """
    matches = ((path, _SHARD.fullmatch(path.name)) for path in sorted(folder.glob(f"{split}*.parquet")))
    shards = [(path, match) for path, match in matches if match and match["split"] == split]
    if shards:
        total = int(shards[0][1]["total"] or 1)
        numbers, totals = ([int(match[name] or least) for _, match in shards] for name, least in _NUMBERS)
        if numbers != list(range(total)) or set(totals) != {total}:
            raise UserError(
                "data",
                str(folder),
                f"has {len(shards)} file(s) {split}*.parquet, but {shards[0][0].name} is one of {total}; "
                "download what is missing, remove what is left over",
            )
    return [path for path, _ in shards]


@contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    """Open a parquet file, and tell what goes wrong with it."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            "data", str(path), "is a parquet file, which needs pyarrow; pip install 'spiking-rl[vision]'"
        ) from None
    try:
        require_regular(Path(path))
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise UserError("data", str(path), f"cannot be read as parquet ({reason}); download it again") from None


def _columns(file: Any, path: Path, label: str) -> tuple[str, list[str]]:
    """Return the name of the image column, and the class names of the label column."""
    names = file.schema_arrow.names
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    if image is None or label not in names:
        raise UserError("data", str(path), f"has the columns {names}, but 'image' (or 'img') and {label!r} are needed")
    kind = file.schema_arrow.field(image).type
    encoded = {field.name: str(field.type) for field in kind} if str(kind).startswith("struct") else {}
    if encoded.get("bytes") not in ("binary", "large_binary"):
        raise UserError(
            "data", str(path), f"holds {str(kind)[:100]} in column {image!r}, where a struct with bytes belongs"
        )
    try:
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
        classes = [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            "data", str(path), f"does not name the classes of {label!r} in its schema; take the Hugging Face hub's file"
        ) from None
    return image, classes


@dataclass(frozen=True)
class ParquetImages(ImageSource):
    """Images in parquet shards; a group is a row group.

    Attributes:
        column: name of the image column, a struct with the field ``bytes``.
        places: shard, number of the row group, and first row of it, for every group.
    """

    column: str
    places: list[tuple[str, int, int]]

    def name(self, index: int) -> str:
        """Return the shard and the row in it, counted from 0."""
        group = int(np.searchsorted(self.bounds, index, side="right")) - 1
        path, _, first = self.places[group]
        return f"{path}, row {first + index - int(self.bounds[group])}"

    def read(self, group: int) -> list[bytes]:
        """Return the encoded images of a row group."""
        path, number, _ = self.places[group]
        first, total = int(self.bounds[group]), 0
        images: list[bytes] = []
        with _opened(path) as file:
            # No threads: this may run in a forked worker, where the parent's threads do not exist.
            parts = file.iter_batches(_READ, row_groups=[number], columns=[f"{self.column}.bytes"], use_threads=False)
            for part in parts:
                for raw in part.column(self.column).field("bytes").to_pylist():
                    images.append(self._present(raw, first + len(images)))
                    total += len(images[-1])
                if total > _MOST_GROUP_BYTES:
                    raise UserError(
                        "data", path, f"row group {number} holds over {_MOST_GROUP_BYTES:,} bytes of images"
                    )
        return images

    def _present(self, raw: bytes | None, index: int) -> bytes:
        if raw is None:
            raise UserError("data", self.name(index), "has no image bytes; take a file that holds its images")
        if len(raw) > LARGEST_IMAGE_FILE:
            raise UserError("data", self.name(index), f"has {len(raw):,} bytes, more than any image; remove it")
        return raw


def open_parquet(shards: Sequence[Path], label: str) -> ParquetImages:
    """Read the labels and class names of parquet shards, not yet their images.

    Args:
        shards: files with a struct column ``image`` or ``img`` (``bytes``, ``path``), an integer label
            column, and the class names in the schema metadata.
        label: name of the label column.

    Raises:
        UserError: pyarrow is missing, a file is damaged or lacks a column, its class names or a label,
            or the shards name different classes.
    """
    first: tuple[str, list[str]] | None = None
    labels: list[NDArray[np.int64]] = []
    sizes: list[int] = []
    places: list[tuple[str, int, int]] = []
    for path in shards:
        with _opened(path) as file:
            found = _columns(file, path, label)
            first = first or found
            if found != first:
                raise UserError(
                    "data", str(path), f"has other classes or columns than {shards[0]}; take one set's files"
                )
            if file.metadata.num_rows > _MOST_ROWS:
                raise UserError("data", str(path), f"claims {file.metadata.num_rows:,} rows, over {_MOST_ROWS:,}")
            values = file.read(columns=[label], use_threads=False)[label]
            if values.null_count or not str(values.type).startswith(("int", "uint")):
                raise UserError("data", str(path), f"column {label!r} must hold a whole number in every row")
            labels.append(values.to_numpy().astype(np.int64))
            rows = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            places += [(str(path), g, sum(rows[:g])) for g in range(len(rows))]
            sizes += rows
    assert first is not None
    return ParquetImages(first[1], np.concatenate(labels), np.cumsum([0, *sizes]), first[0], places)
