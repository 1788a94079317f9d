"""Build ``lif_op.cpp`` in a process of its own, which outlives the one that starts it.

Run by its path, with nothing but the standard library: ``op_builder.py LOCK MADE COMMAND...``. Whoever holds the lock
is building; the system takes it from the dead. A compiler that says what is wrong is not asked again: MADE with the
ending ``.failed`` has its words. One that was killed, or had no room, is.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

TRANSIENT = ("Killed", "terminated", "No space left", "virtual memory exhausted", "out of memory")
"""What compilers say of troubles that pass."""


def main() -> None:
    """Take the lock, then build in the background."""
    lock, made, *command = sys.argv[1:]
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # somebody is at it
    if os.fork():
        os._exit(0)  # the child holds the lock too, and nobody waits for it
    os.setsid()
    os.nice(10)
    _build(Path(made), command)


def _build(made: Path, command: list[str]) -> None:
    part, failed = made.with_suffix(f".part{os.getpid()}"), made.with_suffix(".failed")
    if made.exists() or failed.exists():
        return  # between their look and our lock
    try:
        done = subprocess.run([*command, "-o", str(part)], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            part.replace(made)
        elif "error" in done.stderr and not any(word in done.stderr for word in TRANSIENT):
            failed.write_text(done.stderr)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
