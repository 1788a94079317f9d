"""Published results: what was measured, by which command, where and when."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spiking_rl.errors import UserError
from spiking_rl.files import write_atomically
from spiking_rl.provenance import commit, machine, today
from spiking_rl.runs import RunFolder

_LARGEST = 1e100
_MOST_TIMESTEPS = 1_000_000


def published_runs(runs: Sequence[Path], output: Path) -> Iterator[RunFolder]:
    """Yield the runs that a script gathers into a JSON file.

    Raises:
        UserError: there are none, one is no run, or the file is no JSON.
    """
    if not runs:
        raise UserError("runs", None, "name at least one run folder")
    if output.suffix != ".json":
        raise UserError("output", str(output), "must end with .json")
    for folder in map(RunFolder, runs):
        folder.require()
        yield folder


def checked_rows(results: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Return the rows of results that were read from a file; what a ReLU network's may leave out is None in them.

    Raises:
        UserError: there are none, or their ``timesteps`` or ``spike_rate`` cannot be.
    """
    rows = results.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError("results", str(path), "holds no rows of results; score the run again")
    for row in rows:
        rates, also = row.get("spike_rate"), row.get("also")
        known = _is_timesteps(row.get("timesteps")) and isinstance(rates, dict | None) and isinstance(also, list | None)
        known = known and all(isinstance(other, dict) for other in also or [])
        if not known or not all(is_number(rate) for rate in (rates or {}).values()):
            raise UserError("results", str(path), "holds a row whose timesteps or spike_rate cannot be; score it again")
    return [{"timesteps": None, "spike_rate": None, **row} for row in rows]


def is_number(value: Any) -> bool:
    """Tell whether a value out of a file is a number that arithmetic can go on with."""
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def _is_timesteps(value: Any) -> bool:
    return value is None or (type(value) is int and 0 < value < _MOST_TIMESTEPS)


def write_results(path: Path, script: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``{"command", "commit", "date", "machine", "rows"}``.

    Args:
        path: the JSON file; its folder is made.
        script: name of the script of this package that measured, without its arguments.
        rows: one per measurement.
    """
    command = f"python -m spiking_rl.scripts.{script} " + " ".join(sys.argv[1:])
    results = {"command": command.strip(), "commit": commit(), "date": today(), "machine": machine(), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=1) + "\n")
