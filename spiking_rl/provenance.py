"""Where a result was made: versions, machine, commit."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("spiking-rl", "torch", "stable-baselines3", "gymnasium", "numpy")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the git commit of the source tree that is running, None outside one.

    ``-dirty`` is appended where tracked files differ from it, other than results: those are written, not run.
    """
    source = Path(__file__).resolve().parent
    if not (source.parent / ".git").exists():
        return None
    git = ["git", "-C", str(source.parent)]
    try:
        found, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno", "--", ".", ":!results"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{found}-dirty" if changed else found


def machine() -> str:
    """Describe processor count and architecture, and the GPU where there is one."""
    parts = [f"{os.cpu_count()} CPU cores", platform.machine(), platform.system()]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def provenance() -> dict[str, Any]:
    """Return versions, commit, date and machine."""
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        "commit": commit(),
        "date": today(),
        "machine": machine(),
    }


def peak_rss_mb() -> float | None:
    """Return the largest resident set of this process so far, in MB; None where POSIX is missing."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def rss_mb() -> float | None:
    """Return the resident set of this process now, in MB; None where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def memory_columns(device: torch.device) -> dict[str, float | None]:
    """Return what progress.csv says of memory, in MB: ``rss_mb``, and on a GPU ``gpu_mb``, reserved there."""
    found = {"rss_mb": rss_mb()}
    if device.type == "cuda":
        found["gpu_mb"] = round(torch.cuda.memory_reserved(device) / 2**20, 1)
    return found


def today() -> str:
    """Return the date in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
