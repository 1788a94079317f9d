"""The two ways in which a layer gets to the compiled loops: by way of Python, and as an operation of torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from spiking_rl import compiling, fused


@pytest.fixture(scope="session")
def built_operation() -> ModuleType:
    """Return the operation, built."""
    compiling.build_op()
    compiling.built_op.cache_clear()
    module = compiling.built_op()
    if module is None:
        pytest.skip("no C++ compiler here, or no headers")
    return module


@pytest.fixture
def scan_in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the operation out."""
    monkeypatch.setattr(fused, "built_op", lambda: None)
    fused._fresh.cache_clear()
    yield
    fused._fresh.cache_clear()


@pytest.fixture
def operation(built_operation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Scan with the operation, from the second time on that a layer is asked."""
    monkeypatch.setattr(fused, "built_op", lambda: built_operation)
    fused._fresh.cache_clear()
    yield built_operation
    fused._fresh.cache_clear()


@pytest.fixture(params=["scan_in_python", "operation"])
def scanning(request: pytest.FixtureRequest) -> str:
    """Scan in one way, then in the other."""
    request.getfixturevalue(request.param)
    return str(request.param)
