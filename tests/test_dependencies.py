"""Dependencies are few, bounded, audited, and those that were tested together."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from audit import verdict
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


def a_report(**packages: list[str] | None) -> str:
    """Return what pip-audit prints: vulnerabilities by package, None for one that the service does not know."""
    told = []
    for name, ids in packages.items():
        if ids is None:
            told.append({"name": name, "skip_reason": f"Dependency not found on PyPI and could not be audited: {name}"})
        else:
            vulns = [{"id": i, "fix_versions": ["2.0"], "aliases": [], "description": ""} for i in ids]
            told.append({"name": name, "version": "1.0", "vulns": vulns})
    return json.dumps({"dependencies": told, "fixes": []})


@pytest.mark.parametrize(
    ("reports", "code", "words"),
    [
        ([a_report(torch=[], numpy=[])], 0, "no known vulnerability in 2 of 2"),
        ([a_report(torch=[], numpy=None), ""], 0, "in 1 of 2"),
        ([a_report(torch=None), "Traceback ..."], 0, "nothing was checked"),
        ([], 0, "nothing was checked"),
        (["[]", "{}", "null"], 0, "nothing was checked"),
        ([a_report(torch=None), a_report(torch=["CVE-1"], numpy=[])], 1, "torch 1.0: CVE-1, mended in 2.0"),
        ([a_report(pillow=["CVE-2", "CVE-3"])], 1, "pillow 1.0: CVE-3"),
    ],
)
def test_an_audit_fails_for_what_is_known_and_for_nothing_else(reports: list[str], code: int, words: str) -> None:
    assert verdict(reports)[0] == code
    assert words in "\n".join(verdict(reports)[1])


def test_the_tested_versions_are_named() -> None:
    """The classifiers are the Pythons that the constraints file says were tested, with dates."""
    text = (ROOT / "constraints.txt").read_text()
    tested = re.findall(r"^# Python (3\.\d+)\.\d+, torch [\d.]+.*(?:\d{4}-\d\d-\d\d)", text, re.MULTILINE)
    prefix = "Programming Language :: Python :: "
    named = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert named == sorted(set(tested), key=Version)
