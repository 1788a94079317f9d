"""An allocator that keeps freed memory: glibc's default gives large blocks back and fetches them at every step."""

from __future__ import annotations

import os
import sys

SWITCH = "SPIKING_RL_KEEP_MEMORY"
"""Environment variable; ``0`` leaves the allocator as it is."""

_USERS_OWN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = -1
_PAD_BYTES = 64 << 20  # how much more than asked is fetched at a time


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, for its next allocations.

    By default glibc maps every large tensor afresh and unmaps it when it is freed: each training step then faults
    in its activations again, page by page. Afterwards large blocks come from the heap, which never shrinks; the
    resident size stays at its highest point. Call it before the first large tensors. It acts on Linux with glibc
    only, and does nothing where the user has set glibc's own variables (``MALLOC_TRIM_THRESHOLD_`` and its like,
    ``GLIBC_TUNABLES``), preloads another allocator, or sets ``SPIKING_RL_KEEP_MEMORY=0``.

    Returns:
        Whether the allocator keeps memory now.
    """
    if not sys.platform.startswith("linux") or os.environ.get(SWITCH) == "0" or _chosen_by_user():
        return False
    try:
        if "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
            return False
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
    except (ValueError, OSError, ImportError, AttributeError):  # another C library
        return False
    return all(mallopt(*pair) == 1 for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD_BYTES)))


def _chosen_by_user() -> bool:
    if any(name in os.environ for name in _USERS_OWN) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return True
    return any(name in os.environ.get("LD_PRELOAD", "") for name in ("jemalloc", "tcmalloc", "mimalloc"))
