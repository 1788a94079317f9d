"""CIFAR's pickled batches: read as Python 2 wrote them, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import python2_pickle, random_pixels, write_cifar10_batches

from spiking_rl import UserError
from spiking_rl.vision.data import load_dataset
from spiking_rl.vision.data.cifar import read_pickled

BATCH = {"batch_label": "testing batch 1 of 1", "labels": [3, 8, 300], "data": random_pixels(3).reshape(3, 3072)}


def refused(data: Path, *told: str) -> None:
    """Assert that one line tells all of this."""
    with pytest.raises(UserError) as caught:
        load_dataset("cifar10", data)
    for words in told:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_a_pickle_of_python_2_is_read_as_pickle_would(tmp_path: Path, module: str, order: str) -> None:
    raw = python2_pickle(BATCH, module, order)
    with warnings.catch_warnings(action="ignore"):  # of NumPy, that its old name is old
        reference = pickle.loads(raw, encoding="latin1")
    (tmp_path / "batch").write_bytes(raw)
    for content in (reference, read_pickled(tmp_path / "batch")):
        assert list(content) == list(BATCH)
        assert content["labels"] == BATCH["labels"]
        assert np.array_equal(content["data"], BATCH["data"])  # type: ignore[arg-type]


def test_a_pickle_of_python_3_at_protocol_2_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "batch").write_bytes(pickle.dumps(BATCH, 2))
    assert np.array_equal(read_pickled(tmp_path / "batch")["data"], BATCH["data"])  # type: ignore[arg-type]


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_pickle_is_run(tmp_path: Path, protocol: int) -> None:
    sprung, data = tmp_path / "sprung", tmp_path / "data"
    raw = pickle.dumps({"labels": [0], "data": Trap(sprung)}, protocol)
    write_cifar10_batches(data, random_pixels(5), [0] * 5, random_pixels(1), [0])
    for file in ("batches.meta", "data_batch_3"):
        whole = (data / file).read_bytes()
        (data / file).write_bytes(raw)
        refused(data, file, "nothing was run")
        (data / file).write_bytes(whole)
    assert not sprung.exists()
    pickle.loads(raw)
    assert sprung.exists(), "the trap does not work"


@pytest.mark.parametrize(
    "body",
    [
        b"cnumpy\nndarray\n(K\x05tR",  # a call of a known name that makes no array
        b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\nK\x00K\x00tR",
        b"(lp0\n.",  # protocol 0
        b"K\x01",
        b"h\x09",  # a memo that was never made
        b"u",
        b"\x87",
        b"]q\x00h\x00a",  # a list in itself, and no dictionary
    ],
)
def test_a_pickle_of_anything_else(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "batch").write_bytes(b"\x80\x02" + body + b".")
    with pytest.raises(UserError, match=r"batch.*download"):
        read_pickled(tmp_path / "batch")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of a string that is altered
def test_a_truncated_or_altered_pickle_never_ends_in_another_error(tmp_path: Path) -> None:
    raw = python2_pickle({"labels": [1, 2], "data": np.zeros((2, 20), np.uint8), "names": ["a", "b"]})
    path = tmp_path / "batch"
    for cut in range(len(raw)):
        path.write_bytes(raw[:cut])
        with pytest.raises(UserError, match="batch"):
            read_pickled(path)
    rng = np.random.default_rng(0)
    for _ in range(400):
        altered = bytearray(raw)
        altered[rng.integers(len(raw))] = rng.integers(256)
        path.write_bytes(altered)
        try:
            read_pickled(path)
        except UserError as error:
            assert "batch" in str(error)  # noqa: PT017


def test_batches_that_do_not_fit_together(tmp_path: Path) -> None:
    write_cifar10_batches(tmp_path / "cifar10", random_pixels(5), [0] * 5, random_pixels(2), [0])
    refused(tmp_path, "test_batch", "(2, 3072)", "1 labels")
    test = tmp_path / "cifar10" / "test_batch"
    test.write_bytes(python2_pickle({"labels": ["0"], "data": np.zeros((1, 3072), np.uint8)}))
    refused(tmp_path, "test_batch", "no whole numbers")
    test.write_bytes(python2_pickle({"labels": [0]}))
    refused(tmp_path, "test_batch", "no 'data'")
    test.unlink()
    refused(tmp_path, "test_batch", "cannot be read")
