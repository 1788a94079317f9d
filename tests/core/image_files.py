"""Small image files in the layouts in which data sets are published."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def random_pixels(count: int, size: int = 32, seed: int = 0) -> Pixels:
    """Return ``(count, 3, size, size)``."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def encode(pixels: Pixels, kind: str = "PNG") -> bytes:
    """Encode ``(3, H, W)``, without loss unless as JPEG."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, kind, **options)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int | None],
    classes: Sequence[str],
    *,
    image: str = "img",
    label: str = "label",
    rows: int = 1000,
) -> None:
    """Write a shard as the hub does: encoded bytes and a path, labels, class names in the schema metadata."""
    column = pa.array(
        [{"bytes": raw, "path": f"{k}.png"} for k, raw in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    features = {image: {"_type": "Image"}, label: {"names": list(classes), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({image: column, label: pa.array(labels, pa.int64())}).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def write_folders(folder: Path, images: dict[str, Sequence[Pixels]], suffix: str = ".png") -> None:
    """Write ``folder/<class>/<number>.png``."""
    kind = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}.get(suffix.lower(), "JPEG")
    for name, of_class in images.items():
        (folder / name).mkdir(parents=True)
        for k, pixels in enumerate(of_class):
            (folder / name / f"{k:04}{suffix}").write_bytes(encode(pixels, kind))


def python2_pickle(content: Any, module: str = "numpy.core.multiarray", order: str = "C") -> bytes:
    """Return what Python 2's cPickle wrote at protocol 2, for dicts, lists, strings, numbers and byte arrays."""
    memo = iter(range(1, 100_000))

    def put() -> bytes:
        number = next(memo)
        return b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)

    def text(raw: bytes) -> bytes:
        return (b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw))) + raw

    def emit(value: Any) -> bytes:
        match value:
            case dict():
                return b"}" + put() + b"(" + b"".join(emit(k) + emit(v) for k, v in value.items()) + b"u"
            case list():
                return b"]" + put() + b"(" + b"".join(map(emit, value)) + b"e"
            case str():
                return text(value.encode()) + put()
            case int():
                if 0 <= value < 256:
                    return b"K" + bytes([value])
                return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)
            case np.ndarray():
                assert value.dtype == np.uint8
                dtype = b"cnumpy\ndtype\n" + put() + b"U\x02u1" + put() + b"K\x00K\x01\x87" + put() + b"R" + put()
                dtype += b"(K\x03U\x01|" + put() + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t" + put() + b"b"
                shape = emit(value.shape[0]) + emit(value.shape[1]) + b"\x86" + put()
                return (
                    b"c" + module.encode() + b"\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put()
                    + b"K\x00\x85" + put() + b"U\x01b" + put() + b"\x87" + put() + b"R" + put()
                    + b"(K\x01" + shape + dtype + (b"\x88" if order == "F" else b"\x89")
                    + text(value.tobytes(order)) + put() + b"t" + put() + b"b"  # type: ignore[arg-type]
                )  # fmt: skip
        raise TypeError(type(value))

    return b"\x80\x02" + emit(content) + b"."


def write_cifar10_batches(
    folder: Path, train: Pixels, train_labels: list[int], test: Pixels, test_labels: list[int]
) -> None:
    """Write CIFAR-10's archive, the training images shared out over five batches."""
    folder.mkdir(parents=True)
    names = [f"data_batch_{n}" for n in range(1, 6)]
    parts = zip(names, np.array_split(np.arange(len(train)), 5), strict=True)
    for file, rows in parts:
        batch = {
            "batch_label": f"training {file}",
            "labels": [train_labels[r] for r in rows],
            "data": train[rows].reshape(len(rows), 3072),
            "filenames": [f"{r}.png" for r in rows],
        }
        (folder / file).write_bytes(python2_pickle(batch))
    (folder / "test_batch").write_bytes(
        python2_pickle({"labels": test_labels, "data": test.reshape(len(test), 3072)}, order="F")
    )
    meta = {"num_cases_per_batch": 10000, "label_names": [f"class {c}" for c in range(10)], "num_vis": 3072}
    (folder / "batches.meta").write_bytes(python2_pickle(meta))
