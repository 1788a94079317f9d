"""Data sets that strangers made: parquet, CIFAR's pickles, image folders; read or refused, and nothing else."""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from core.image_files import encode, python2_pickle, random_pixels, write_folders, write_parquet
from hostile import bounded, clear, damaged, few
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spiking_rl import UserError
from spiking_rl.vision.data import StreamedDataset, load_dataset
from spiking_rl.vision.data.cifar import CIFAR10, read_batches, read_classes

NAMES = ("dark", "light")


def load(folder: Path) -> int:
    """Load a data set of any kind; return how many images it has, -1 where it was refused."""
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a decoder may complain of damage before it gives up
        try:
            images = load_dataset("folder", folder, size=8)
        except UserError as error:
            clear(error)
            return -1
        return len(images.train_images) + len(images.val_images) + len(images.test_images)


def shard(path: Path, count: int = 4) -> None:
    images = [encode(p) for p in random_pixels(count, 8)]
    write_parquet(path, images, [k % 2 for k in range(count)], NAMES, image="image", rows=3)


@few
@given(st.data())
def test_damaged_parquet(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("case")
    for split in ("train", "test"):
        shard(folder / f"{split}.parquet")
    path = folder / data.draw(st.sampled_from(["train.parquet", "test.parquet"]))
    path.write_bytes(damaged(data, path.read_bytes()))
    load(folder)


COLUMNS: dict[str, Any] = {
    "images as text": lambda n: pa.array([{"bytes": "x" * k} for k in range(n)]),
    "images as numbers": lambda n: pa.array([{"bytes": k} for k in range(n)]),
    "no struct": lambda n: pa.array([b"x"] * n),
    "another field": lambda n: pa.array([{"path": "x"}] * n),
    "lists": lambda n: pa.array([{"bytes": [b"x"]}] * n),
    "nulls": lambda n: pa.array([None] * n, pa.struct([("bytes", pa.binary())])),
    "an empty image": lambda n: pa.array([{"bytes": b""}] * n),
}
LABELS: dict[str, Any] = {
    "text": lambda n: pa.array(["1"] * n),
    "fractions": lambda n: pa.array([0.5] * n),
    "NaN": lambda n: pa.array([float("nan")] * n),
    "negative": lambda n: pa.array([-(2**63)] * n),
    "huge": lambda n: pa.array([2**64 - 1] * n, pa.uint64()),
    "nulls": lambda n: pa.array([None] * n, pa.int64()),
    "lists": lambda n: pa.array([[1]] * n),
    "booleans": lambda n: pa.array([True] * n),
    "dates": lambda n: pa.array([0] * n, pa.date32()),
    "decimals": lambda n: pa.array([1] * n).cast(pa.decimal128(20, 0)),
}
SCHEMAS: list[Any] = [
    *(None, b"", b"{", b"[]", b'{"info": null}', b'{"info": {"features": {"label": {"names": 5}}}}'),
    b'{"info": {"features": {"label": {"names": "dark"}}}}',
    b'{"info": {"features": {"label": {"names": {"a": 1}}}}}',
    b'{"info": {"features": {"label": {"names": ["\\u0000", "\\n"]}}}}',
    b"[" * 100_000,
    json.dumps({"info": {"features": {"label": {"names": ["x" * 100_000] * 2}}}}).encode(),
]


def write_columns(path: Path, image: Any, label: Any, schema: bytes | None, **options: Any) -> None:
    table = pa.table({"image": image, "label": label})
    named = table.replace_schema_metadata(None if schema is None else {b"huggingface": schema})
    pq.write_table(named, path, **options)


GOOD = json.dumps({"info": {"features": {"label": {"names": list(NAMES)}}}}).encode()


@pytest.mark.parametrize("image", COLUMNS)
def test_image_columns_of_other_types(tmp_path: Path, image: str) -> None:
    shard(tmp_path / "test.parquet")
    write_columns(tmp_path / "train.parquet", COLUMNS[image](20), pa.array([0, 1] * 10), GOOD)
    assert load(tmp_path) == -1


@pytest.mark.parametrize("label", LABELS)
def test_label_columns_of_other_types(tmp_path: Path, label: str) -> None:
    shard(tmp_path / "test.parquet")
    images = pa.array([{"bytes": encode(p)} for p in random_pixels(20, 8)])
    write_columns(tmp_path / "train.parquet", images, LABELS[label](20), GOOD)
    assert load(tmp_path) == -1


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_schemas_of_another_kind(tmp_path: Path, schema: bytes | None) -> None:
    images = pa.array([{"bytes": encode(p)} for p in random_pixels(20, 8)])
    for split in ("train", "test"):
        write_columns(tmp_path / f"{split}.parquet", images, pa.array([0, 1] * 10), schema)
    load(tmp_path)


def test_rows_that_cost_nothing(tmp_path: Path) -> None:
    """A parquet file of 90 kilobytes may stand for terabytes of one image, repeated."""
    shard(tmp_path / "test.parquet")
    count, raw = 200_000, b"x" * 2**20
    dictionary = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([raw]))
    image = pa.StructArray.from_arrays([dictionary], ["bytes"])
    write_columns(tmp_path / "train.parquet", image, pa.array(np.arange(count) % 2), GOOD, store_schema=False)
    assert (tmp_path / "train.parquet").stat().st_size < 2**21
    assert load(tmp_path) == -1


BATCH = {"labels": [0, 1], "data": random_pixels(2, 32).reshape(2, 3072), "filenames": ["0.png", "1.png"]}


@few
@given(st.data())
def test_damaged_pickles(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("case")
    whole = {"data_batch_1": python2_pickle(BATCH), "batches.meta": python2_pickle({"label_names": ["a", "b"]})}
    name = data.draw(st.sampled_from(sorted(whole)))
    for file, raw in whole.items():
        # What stands around the pixels is the pickle's language.
        (folder / file).write_bytes(damaged(data, raw) if file == name else raw)
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            classes = read_classes(folder, CIFAR10)
            images, labels = read_batches(folder, ("data_batch_1",), CIFAR10, len(classes))
        except UserError as error:
            clear(error)
            return
    assert images.shape[1:] == (3, 32, 32)
    assert len(images) == len(labels)


class Touch:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_act_does_not(tmp_path: Path, protocol: int) -> None:
    harm = pickle.dumps({"labels": [0], "data": Touch(tmp_path / "was-run")}, protocol)
    (tmp_path / "data_batch_1").write_bytes(harm)
    with bounded(), pytest.raises(UserError):
        read_batches(tmp_path, ("data_batch_1",), CIFAR10, 10)
    # The same bytes as parquet, as an image, and as one inside a parquet file.
    (tmp_path / "set" / "train" / "dark").mkdir(parents=True)
    (tmp_path / "set" / "train" / "dark" / "0.png").write_bytes(harm)
    (tmp_path / "set" / "test.parquet").write_bytes(harm)
    assert load(tmp_path / "set") == -1
    write_parquet(tmp_path / "two" / "train.parquet", [harm] * 20, [0, 1] * 10, NAMES, image="image")
    shard(tmp_path / "two" / "test.parquet")
    assert load(tmp_path / "two") == -1
    assert not (tmp_path / "was-run").exists()


def small_folder(folder: Path, suffix: str = ".png") -> Path:
    """Write two images per class and split."""
    for split in ("train", "test"):
        write_folders(folder / split, dict.fromkeys(NAMES, random_pixels(2, 8)), suffix)
    return folder


@few
@given(st.data())
def test_damaged_images(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("case")
    suffix = data.draw(st.sampled_from([".png", ".jpg", ".webp", ".bmp"]))
    path = small_folder(folder, suffix) / "train" / "dark" / f"0000{suffix}"
    path.write_bytes(damaged(data, path.read_bytes()))
    load(folder)


def bomb(width: int, height: int, kind: str) -> bytes:
    """Return a small file that says it holds a large picture."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, kind)
    raw = bytearray(buffer.getvalue())
    if kind == "PNG":  # width and height stand behind the signature and the name of the first chunk
        import zlib

        raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    else:
        raw[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    return bytes(raw)


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (12_000, 7_400), (0, 8)], ids=str)
def test_pictures_that_say_they_are_huge(tmp_path: Path, kind: str, size: tuple[int, int]) -> None:
    folder = small_folder(tmp_path)
    (folder / "train" / "dark" / "0000.png").write_bytes(bomb(*size, kind))
    assert load(folder) == -1


PLACES: Sequence[bytes] = [
    *(
        b"..",
        b"a\nb",
        b"\x1b[31mred",
        b"a" * 255,
        b"\xff\xfe",
        b"-rf",
        b"~",
        b"$(touch was-run)",
        b"%s%n",
        b" ",
    ),
    "‮evil".encode(),
]


@pytest.mark.skipif(os.name != "posix", reason="makes names that Windows cannot")
@pytest.mark.parametrize("name", PLACES, ids=repr)
def test_names_with_tricks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    """Class folders and files with odd names are a class and images like others, or refused in one line."""
    folder = small_folder(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        place = os.path.join(os.fsencode(folder / split), name)
        if not os.path.exists(place):  # ".." is there
            os.mkdir(place)
            Path(os.fsdecode(place), "0.png").write_bytes(encode(random_pixels(1, 8)[0]))
    before = sorted(p for p in tmp_path.rglob("*"))
    assert load(folder) > 0
    Path(os.fsdecode(os.path.join(os.fsencode(folder / "train"), name)), "1.png").write_bytes(b"no image")
    if name != b"..":
        assert load(folder) == -1
    assert not (tmp_path / "was-run").exists()
    assert len(sorted(p for p in tmp_path.rglob("*"))) == len(before) + 1


@pytest.mark.skipif(os.name != "posix", reason="makes links and a pipe")
@pytest.mark.parametrize("kind", ["device", "pipe", "loop", "folder", "sparse", "nothing"])
@pytest.mark.parametrize("place", ["train/dark/0000.png", "train.parquet", "cifar/data_batch_1"])
def test_links_and_what_is_no_file(tmp_path: Path, kind: str, place: str) -> None:
    folder = small_folder(tmp_path)
    (folder / "cifar").mkdir()
    path = folder / place
    path.unlink(missing_ok=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        path.symlink_to(tmp_path / "nothing")
    if place.startswith("cifar"):
        with bounded(), pytest.raises(UserError):
            read_batches(folder / "cifar", ("data_batch_1",), CIFAR10, 10)
    else:
        assert load(folder) == -1


@few
@given(st.data())
def test_a_damaged_stream(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """ImageNet's way: the files are listed first, and decoded while it trains."""
    folder = tmp_path_factory.mktemp("case")
    for split in ("train", "val"):
        shard(folder / f"{split}.parquet", 8)
    path = folder / data.draw(st.sampled_from(["train.parquet", "val.parquet"]))
    path.write_bytes(damaged(data, path.read_bytes()))
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            images = StreamedDataset(folder, size=8, seed=0)
            for batch, labels in images.test():
                assert len(batch) == len(labels)
        except UserError as error:
            clear(error)


def test_what_was_not_touched_loads(tmp_path: Path) -> None:
    assert load(small_folder(tmp_path / "folder")) == 8
    for split in ("train", "test"):
        shard(tmp_path / "parquet" / f"{split}.parquet")
    assert load(tmp_path / "parquet") == 8
