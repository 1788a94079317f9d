"""Where a running loop spends its time: methods of its objects are timed, each without what it calls."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Seconds by part, exclusive: while a part runs inside another, the outer one stands still.

    ``whole`` names parts that are not looked into: what runs inside them belongs to them.
    """

    def __init__(self, whole: tuple[str, ...] = ()) -> None:
        self.seconds: dict[str, float] = {}
        self.whole = whole
        self.open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what runs inside as a part."""
        if any(outer in self.whole for outer in self.open):
            yield
            return
        self._account()
        self.open.append(name)
        try:
            yield
        finally:
            self._account()
            self.open.pop()

    def _account(self) -> None:
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def timing(self, owner: Any, method: str, name: str) -> Iterator[None]:
        """Time a method, or a function of a module, as a part as long as the context lasts.

        Args:
            owner: instance, class or module that has it.
            method: its name.
            name: of the part; ``{}`` in it is filled with the part that calls.
        """
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name.format(self.open[-1] if self.open else "")):
                return original(*args, **kwargs)

        own = method in vars(owner)
        setattr(owner, method, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, method, original)
            else:
                delattr(owner, method)
