"""The other measurements of speed: exclusive times of loops, and how cost grows."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from conftest import Cli

from spiking_rl.scripts import benchmark_scaling as scaling
from spiking_rl.scripts.profile_loops import table
from spiking_rl.scripts.speed.stopwatch import Stopwatch
from spiking_rl.scripts.speed.variants import LIMIT, OURS


class Loop:
    def inner(self) -> None:
        time.sleep(0.02)

    def outer(self) -> None:
        time.sleep(0.01)
        self.inner()


def test_parts_are_timed_without_what_they_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("spiking_rl.scripts.speed.stopwatch.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    loop, watch = Loop(), Stopwatch(whole=("closed",))
    with watch.timing(loop, "inner", "{}: inner"), watch.timing(loop, "outer", "outer"):
        loop.outer()  # one tick before the inner part, one in it, one behind it
        loop.inner()
        with watch.part("closed"):
            loop.outer()
    assert watch.seconds == {"outer": 2, "outer: inner": 1, ": inner": 1, "closed": 1}
    assert "outer" not in vars(loop)
    assert watch.open == []


def test_a_table_begins_with_the_largest_part() -> None:
    rows = table({"a": 1.0, "b": 3.0}, loop="pong")
    assert rows[0] == {"loop": "pong", "part": "b", "seconds": 3.0, "share": 0.75}
    assert rows[1]["share"] == 0.25


def test_slopes() -> None:
    rows = [{"axis": "T", "library": OURS, "value": v, "ms": 3.0 + 2 * v} for v in (4, 1, 2)]
    rows += [{"axis": "T", "library": LIMIT, "value": v, "ms": 1.5 * v} for v in (4, 1, 2)]
    rows += [{"axis": "width", "library": OURS, "value": v, "ms": float(v**2)} for v in (1, 2, 8)]
    assert scaling.slope(rows, "T", OURS) == 2
    assert scaling.slope(rows, "width", OURS) == 2
    assert scaling.explained(rows, "T").startswith("2.000 ms per timestep")
    assert "1.500 of them in the linear layers, 0.500 in neurons" in scaling.explained(rows, "T")


def test_growing_work_is_timed_and_drawn(script: Cli, tmp_path: Path) -> None:
    output = tmp_path / "scaling.json"
    small = ["--timesteps", 1, 2, "--batches", 1, 2, "--lengths", 1, 2, "--widths", 8, 16]
    done = script("spiking_rl.scripts.benchmark_scaling", *small, "--rounds", 1, "--threads", 1, "--output", output)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert {(row["axis"], row["library"]) for row in rows} == {(a, lib) for a in scaling.AXES for lib in (OURS, LIMIT)}
    assert len(rows) == 16
    assert output.with_suffix(".png").exists()
    refused = script("spiking_rl.scripts.benchmark_scaling", "--widths", 8)
    assert refused.returncode == 2
    assert "at least two" in refused.stderr


def test_real_loops_are_profiled(script: Cli, tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    small = ["--cartpole-steps", 2048, "--images", 128, "--network", "vgg6", "--width", 0.03, "--timesteps", 2]
    arguments = ["--loops", "cartpole", "vgg", *small, "--label", "now", "--output", output]
    done = script("spiking_rl.scripts.profile_loops", *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    for loop in ("cartpole", "vgg"):
        shares = {row["part"]: row["share"] for row in rows if row["loop"] == loop}
        assert sum(shares.values()) == pytest.approx(1, abs=0.01)
        assert {"backward", "optimiser", "evaluation"} <= set(shares)
