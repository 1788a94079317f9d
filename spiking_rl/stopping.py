"""How a long training is stopped: by a signal, or when its hours are over."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from spiking_rl.errors import UserError


class Interrupted(Exception):
    """Training stopped early, with its state saved.

    Attributes:
        reason: "interrupt" (Ctrl-C or SIGTERM) or "time" (the hours given are over).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def check_hours(hours: float | None) -> None:
    """Refuse a time that is no time.

    Raises:
        UserError: naming ``hours``.
    """
    if hours is not None and not hours > 0:
        raise UserError("hours", hours, "must be positive")


@contextmanager
def stopping_on_signals(request: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM call ``request``, which stops where the state is complete; the second one kills.

    Outside the main thread, which alone gets signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requested = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        request()

    old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
