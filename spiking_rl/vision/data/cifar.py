"""CIFAR's published Python batches, read without unpickling: their data is interpreted, nothing in them is run."""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spiking_rl.errors import UserError
from spiking_rl.files import read_bounded

_AGAIN = "download CIFAR's archive again"
_MAX_BYTES = 2**30  # of a batch; CIFAR-100's have 0.16
_PIXELS = (3, 32, 32)


class PickledLayout(NamedTuple):
    """File and key names of one of CIFAR's two archives."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: str
    classes: str


CIFAR10 = PickledLayout(
    "cifar-10-batches-py",
    tuple(f"data_batch_{n}" for n in range(1, 6)),
    ("test_batch",),
    "batches.meta",
    "labels",
    "label_names",
)
CIFAR100 = PickledLayout("cifar-100-python", ("train",), ("test",), "meta", "fine_labels", "fine_label_names")


class _Name(NamedTuple):
    """A global that a pickle names. It is never looked up."""

    name: str


class _Array:
    """A NumPy array as a pickle describes it; ``state`` comes after it is made."""

    state: Any = None

    def read(self) -> NDArray[np.uint8]:
        _, shape, dtype, fortran_order, raw = self.state
        if dtype != _Name("dtype u1"):
            raise ValueError("an array is not of bytes")
        raw = raw if isinstance(raw, bytes) else raw.encode("latin1")  # strings of Python 2 are bytes
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran_order else "C")


def _called(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Return what one of the three known functions would, without calling anything."""
    match function, arguments:
        case (_Name("numpy.core.multiarray _reconstruct" | "numpy._core.multiarray _reconstruct"), (_, _, _)):
            return _Array()
        case (_Name("numpy dtype"), (str(code), *_)):
            return _Name(f"dtype {code}")
        case (_Name("_codecs encode"), (str(text), "latin1")):  # how Python 3 writes bytes at protocol 2
            return text.encode("latin1")
    raise ValueError("a call is not one that makes an array")


_KNOWN = {
    "numpy.core.multiarray _reconstruct",
    "numpy._core.multiarray _reconstruct",
    "numpy ndarray",
    "numpy dtype",
    "_codecs encode",
}


def _interpret(raw: bytes, path: Path) -> Any:
    """Build what a protocol-2 pickle of dicts, lists, tuples, numbers, strings and byte arrays describes."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, given, _ in pickletools.genops(raw):
        argument: Any = given
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINSTRING" | "SHORT_BINSTRING" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "GLOBAL":
                if argument not in _KNOWN:
                    raise UserError(
                        "data", str(path), f"names {argument!r}, which CIFAR's files do not; nothing was run; {_AGAIN}"
                    )
                stack.append(_Name(argument))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_called(function, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Array):
                    stack[-1].state = state  # that of a dtype says nothing about single bytes
            case other:
                raise UserError(
                    "data",
                    str(path),
                    f"has the pickle opcode {other}, which CIFAR's files do not; nothing was run; {_AGAIN}",
                )
    (result,) = stack
    return result


def read_pickled(path: Path) -> dict[str, Any]:
    """Read one of CIFAR's pickled files as data; byte arrays become ``(N, 3072)`` uint8.

    Only the opcodes and names that these files contain are understood, and no function that a file
    names is ever looked up or called.

    Raises:
        UserError: missing, truncated, or anything else than a dictionary of plain data.
    """
    try:
        raw = read_bounded(path, _MAX_BYTES)
    except OSError as error:
        raise UserError("data", str(path), f"cannot be read ({error.strerror}); {_AGAIN}") from None
    try:
        content = _interpret(raw, path)
        return {key: value.read() if isinstance(value, _Array) else value for key, value in content.items()}
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError("data", str(path), f"is truncated or not one of CIFAR's files ({error}); {_AGAIN}") from None


def read_classes(folder: Path, layout: PickledLayout) -> list[str]:
    """Return the class names of an archive.

    Raises:
        UserError: the file is missing or damaged.
    """
    names = read_pickled(folder / layout.meta).get(layout.classes)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("data", str(folder / layout.meta), f"has no list {layout.classes!r}; {_AGAIN}")
    return names


def read_batches(folder: Path, files: tuple[str, ...], layout: PickledLayout, classes: int) -> tuple[Tensor, Tensor]:
    """Read and join batches: images ``(N, 3, 32, 32)`` uint8 and labels ``(N,)`` int64.

    Raises:
        UserError: a file is missing or damaged, or a label is outside 0 ... ``classes`` - 1.
    """
    images, labels = [], []
    for path in (folder / file for file in files):
        batch = read_pickled(path)
        pixels, numbers = batch.get("data"), batch.get(layout.labels)
        if not isinstance(pixels, np.ndarray) or not isinstance(numbers, list):
            raise UserError("data", str(path), f"has no 'data' or no {layout.labels!r}; {_AGAIN}")
        if pixels.shape != (len(numbers), 3072):
            raise UserError("data", str(path), f"has pixels {pixels.shape} for {len(numbers)} labels; {_AGAIN}")
        if not all(isinstance(n, int) for n in numbers):
            raise UserError("data", str(path), f"has {layout.labels!r} that are no whole numbers; {_AGAIN}")
        if wrong := [n for n in numbers if not 0 <= n < classes]:
            raise UserError("data", str(path), f"has label {wrong[0]}, but labels go from 0 to {classes - 1}; {_AGAIN}")
        images.append(torch.tensor(pixels).reshape(-1, *_PIXELS))
        labels.append(torch.tensor(numbers, dtype=torch.int64))
    return torch.cat(images), torch.cat(labels)
