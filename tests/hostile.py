"""What the fuzzers share: absurd values, places to put them, and limits of time and memory."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from spiking_rl import UserError

SECONDS = 5.0  # no file of a few kilobytes may keep a reader busy for longer
GIGABYTES = 2  # that reading one may add to the address space

ABSURD: list[Any] = [
    *(None, True, 0, -1, 1, 2, 3.5, 1e308, 10**9, 2**63, 10**400, float("nan"), float("inf"), -float("inf")),
    *("", "lif", "relu", "mlp", "nature_cnn", "vgg16", "../../etc/passwd", "/dev/zero", "\x00", "a" * 10_000),
    *([], [0], [-1], [1] * 2000, [10**6, 10**6], [2**62], [[[]]], {}, {"timesteps": 10**9}),
    *({"__class__": "os.system"}, "!!python/object:os.system"),
]


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the address space, and time what is done."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30, hard))
    start = time.process_time(), time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    # Of its own time, as the machine may be busy; but nobody waits for ever.
    assert time.process_time() - start[0] < SECONDS
    assert time.monotonic() - start[1] < 10 * SECONDS


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything inside a JSON value."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy with another value at a path."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


def clear(error: UserError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


def damaged(data: Any, raw: bytes) -> bytes:
    """Draw a truncated, bit-flipped, spliced or foreign version of a file's bytes."""
    kind = data.draw(st.sampled_from(["cut", "flip", "splice", "noise", "twice"]))
    if kind == "cut":
        return raw[: data.draw(st.integers(0, len(raw)))]
    if kind == "noise":
        return bytes(data.draw(st.binary(max_size=300)))
    if kind == "twice":
        return raw + raw
    changed = bytearray(raw)
    if kind == "flip":
        for place in data.draw(st.lists(st.integers(0, 8 * len(raw) - 1), min_size=1, max_size=8)):
            changed[place // 8] ^= 1 << place % 8
    else:
        place = data.draw(st.integers(0, len(raw)))
        changed[place : place + data.draw(st.integers(0, 16))] = data.draw(st.binary(max_size=16))
    return bytes(changed)


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
few = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
