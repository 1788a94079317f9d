"""Files and folders that are either the old or the new, never half of one."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems refuse to sync a folder; the rename is still atomic
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


def read_bounded(path: Path, most: int) -> bytes:
    """Read a file that may be anybody's: a regular one, of at most so many bytes.

    A link to a device would never end, and a pipe never begin.

    Raises:
        OSError: missing, no regular file, or larger.
    """
    require_regular(path)
    size = path.stat().st_size
    if size > most:
        raise OSError(errno.EFBIG, f"larger, with {size:,} bytes, than the {most:,} that are read", str(path))
    with path.open("rb") as file:
        return file.read(size)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file, which is not held in memory.

    Raises:
        OSError: missing, or no regular file.
    """
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_regular(path: Path) -> None:
    """Refuse what is no file with an end: a folder, a device, a pipe.

    Raises:
        OSError: that, or nothing there.
    """
    path.stat()  # says what is wrong with a missing one
    if not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file so that a crash leaves the old content or the new."""
    raw = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a CSV file; its columns are the keys of all rows, gaps where a row has none of a key."""
    text = io.StringIO()
    # A ReLU network's rows come first and know no thresholds.
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def _real(folder: Path) -> Path:
    """Return where a folder lies; of links in a circle, one of them."""
    return Path(os.path.realpath(folder))


def _siblings(folder: Path) -> tuple[Path, Path, Path]:
    return tuple(folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "ready", "old"))  # type: ignore[return-value]


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of ``folder``, or of that which a link names.

    A crash at any moment leaves the old folder, or a complete new one that :func:`recover_folder`
    puts in place. If the body raises, the old folder is untouched.
    """
    folder = _real(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
    partial, ready, _ = _siblings(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
        partial.rename(ready)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    recover_folder(folder)


def being_replaced(folder: Path) -> Path | None:
    """Return the complete copy that stands for a folder whose replacement is under way, if any.

    Readers use it: only the writer may move folders about.
    """
    _, ready, old = _siblings(_real(folder))
    return next((path for path in (ready, old) if path.is_dir()), None)


def recover_folder(folder: Path) -> None:
    """Finish a replacement that a crash interrupted; does nothing where there was none."""
    folder = _real(folder)  # "." has no name to derive others from
    _, ready, old = _siblings(folder)
    if ready.is_dir():
        if folder.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        ready.rename(folder)
        _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
