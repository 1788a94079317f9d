"""Dependencies are few, bounded, and those that were tested together."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = [
    Requirement(text) for name in ("contrib", "export", "vision") for text in PROJECT["optional-dependencies"][name]
]
PINS = dict(
    line.strip().split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if re.match(r"[\w-]+==", line)
)


@pytest.mark.parametrize("requirement", [*RUNTIME, *EXTRAS], ids=lambda r: r.name)
def test_every_dependency_is_bounded_and_pinned_within_its_bounds(requirement: Requirement) -> None:
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == {">=", "<"}, "the next major version may break what works"
    assert PINS[requirement.name] in requirement.specifier
    # Users may have any version that pyproject.toml allows; those of the constraints are the tested ones.
    assert Version(metadata.version(requirement.name)) in requirement.specifier


def test_they_stay_few() -> None:
    assert len(RUNTIME) <= 14, [r.name for r in RUNTIME]


def test_the_supported_python_is_the_one_that_runs_this_or_newer() -> None:
    assert PROJECT["requires-python"] == ">=3.11"
    assert "Python 3.11" in (ROOT / "constraints.txt").read_text()
