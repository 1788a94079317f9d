"""Replacing a folder: whenever the process dies, what is left is the old one or the new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from spiking_rl.files import recover_folder, replace_folder, write_atomically

OLD = {"a.txt": "old", "inner/b.txt": "old too"}
NEW = {"a.txt": "new", "c.txt": "new only"}


class Death(BaseException):
    """The process is gone: nothing after it does anything."""


class Machine:
    """Dies at the n-th operation on the file system, and stays dead."""

    def __init__(self, patch: pytest.MonkeyPatch, dies_at: int) -> None:
        self.dies_at = dies_at
        self.operations: list[str] = []
        for owner, name in (
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "replace"),
            (Path, "unlink"),
            (os, "fsync"),
            (shutil, "rmtree"),
        ):
            patch.setattr(owner, name, self.mortal(name, getattr(owner, name)))

    def mortal(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.operations.append(name)
            if len(self.operations) < self.dies_at:
                return operation(*args, **options)
            if len(self.operations) == self.dies_at and name == "rmtree" and Path(args[0]).is_dir():
                # Removing a folder takes many operations: die in the midst of them.
                for file in [p for p in sorted(Path(args[0]).rglob("*")) if p.is_file()][:1]:
                    os.remove(file)
            raise Death

        return wrapped


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str] | None:
    if not folder.is_dir():
        return None
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def siblings(folder: Path, *kinds: str) -> list[Path]:
    return [folder.with_name(f".{folder.name}.{kind}") for kind in kinds]


def replace_and_die(folder: Path, dies_at: int) -> Machine:
    """Replace a folder on a machine that dies at an operation, then bring the machine back."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, dies_at)
        try:
            with replace_folder(folder) as partial:
                fill(partial, NEW)
        except Death:
            pass
    return machine


def operations(tmp_path: Path, old: bool) -> list[str]:
    """Return the operations of a replacement that nothing interrupts."""
    folder = tmp_path / "uninterrupted"
    if old:
        fill(folder, OLD)
    return replace_and_die(folder, dies_at=10_000).operations


@pytest.mark.parametrize("old", [OLD, None], ids=["replacing", "first"])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, old: dict[str, str] | None) -> None:
    done = operations(tmp_path, old is not None)
    assert {"mkdir", "fsync", "rename", "rmtree"} <= set(done)
    seen = []
    for n in range(1, len(done) + 1):
        folder = tmp_path / f"at{n}" / "run"
        folder.parent.mkdir()
        if old is not None:
            fill(folder, old)
        replace_and_die(folder, n)
        assert read(folder) in (old, NEW, None), "half a folder is never seen under the name"
        recover_folder(folder)
        seen.append(read(folder))
        assert seen[-1] in (old, NEW), f"died at operation {n}, {done[n - 1]}"
        assert not any(s.exists() for s in siblings(folder, "ready", "old"))
        # And life goes on: the next replacement works and clears up.
        with replace_folder(folder) as partial:
            assert read(partial) == {}
            fill(partial, {"d.txt": "newer"})
        assert read(folder) == {"d.txt": "newer"}
        assert [p.name for p in folder.parent.iterdir()] == ["run"]
    assert old in seen
    assert NEW in seen


@pytest.mark.parametrize("first", range(1, 12))
def test_recovery_itself_may_die(tmp_path: Path, first: int) -> None:
    ready, old = siblings(tmp_path / "run", "ready", "old")
    for i in range(1, 12):
        folder = tmp_path / "run"
        fill(folder, OLD)
        fill(ready, NEW)
        for dies_at in (first, i):
            with pytest.MonkeyPatch.context() as patch:
                Machine(patch, dies_at)
                with suppress(Death):
                    recover_folder(folder)
        recover_folder(folder)
        assert read(folder) == NEW
        assert not ready.exists()
        assert not old.exists()
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        ({"run": OLD}, OLD),
        ({"run": OLD, ".run.partial": NEW}, OLD),
        ({"run": OLD, ".run.ready": NEW}, NEW),
        ({".run.old": OLD, ".run.ready": NEW}, NEW),
        ({"run": NEW, ".run.old": OLD}, NEW),
        ({"run": OLD, ".run.ready": NEW, ".run.old": {"a.txt": "older"}}, NEW),
        ({".run.ready": NEW}, NEW),
        ({".run.partial": NEW}, None),
        ({}, None),
    ],
    ids=lambda value: "+".join(value) or "nothing" if isinstance(value, dict) else "",
)
def test_recovery_from_what_a_crash_left(tmp_path: Path, left: dict[str, Any], expected: dict[str, str] | None) -> None:
    for name, content in left.items():
        fill(tmp_path / name, content)
    for _ in range(2):  # recovering twice is recovering once
        recover_folder(tmp_path / "run")
        assert read(tmp_path / "run") == expected
        assert not any(s.exists() for s in siblings(tmp_path / "run", "ready", "old"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [OLD, None], ids=["replacing", "first"])
def test_an_error_in_the_body_keeps_the_old(
    tmp_path: Path, error: type[BaseException], old: dict[str, str] | None
) -> None:
    folder = tmp_path / "run"
    if old is not None:
        fill(folder, old)

    def body(partial: Path) -> None:
        fill(partial, NEW)
        raise error

    with pytest.raises(error), replace_folder(folder) as partial:
        body(partial)
    assert read(folder) == old
    assert [p.name for p in tmp_path.iterdir()] == (["run"] if old else [])


def test_folders_above_are_made(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "x" / "y" / "run") as partial:
        fill(partial, NEW)
        assert not (tmp_path / "x" / "y" / "run").exists(), "nothing is visible before it is complete"
    assert read(tmp_path / "x" / "y" / "run") == NEW


@pytest.mark.parametrize("data", ["text, ümlaut", b"\x00\xff"])
def test_a_file_is_written(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "file"
    path.write_text("something older and longer than the new content")
    write_atomically(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_crash_while_writing_a_file_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    seen = []
    for n in range(1, 5):
        path = tmp_path / f"file{n}"
        path.write_text("old")
        with pytest.MonkeyPatch.context() as patch:
            Machine(patch, n)
            with suppress(Death):
                write_atomically(path, "new")
        seen.append(path.read_text())
        write_atomically(path, "newer")
        assert path.read_text() == "newer"
    assert seen == ["old", "old", "new", "new"]


def test_a_file_that_cannot_be_written_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
