"""The measurement of how well stored membranes stand for a whole history."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli

MODULE = "spiking_rl.scripts.agreement"


def test_stored_membranes_agree_with_the_history_and_zero_ones_less(script: Cli, tmp_path: Path) -> None:
    path = tmp_path / "agreement.json"
    done = script(MODULE, "cartpole-masked", "--decisions", 400, "--burn-in", 0, "--length", 16, "--output", path)
    assert done.returncode == 0, done.stderr
    stored, zero = json.loads(path.read_text())["rows"]
    assert (stored["start"], zero["start"]) == ("stored", "zero")
    assert stored["decisions"] >= 400
    assert stored["agreement"] > 0.98
    assert zero["agreement"] < stored["agreement"] - 0.05


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--decisions", 0], "decisions = 0: must be at least 1"),
        (["--length", 0], "length = 0: must be at least 1"),
        (["--burn-in", -1], "burn_in = -1: must be at least 0"),
        (["--length", 250], "length = 250: needs episodes of at least 508 decisions"),
    ],
)
def test_numbers_that_leave_nothing_to_compare(script: Cli, flags: list[object], said: str) -> None:
    done = script(MODULE, "cartpole-masked", *flags)
    assert done.returncode == 2
    assert said in done.stderr
