"""Published results: what was measured, by which command, where and when."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spiking_rl.errors import UserError
from spiking_rl.files import write_atomically
from spiking_rl.provenance import commit, machine, today
from spiking_rl.runs import RunFolder
from spiking_rl.settings import read_settings

_LARGEST = 1e100
_MOST_TIMESTEPS = 1_000_000


def go_on_with(folder: RunFolder) -> str:
    """Return the command that continues a run which is not finished, an agent's or a classifier's."""
    settings = read_settings(folder.config)
    if "dataset" in settings:
        command = ["classify", "train", str(settings.get("network")), str(settings["dataset"])]
    else:
        command = ["train", str(settings.get("env"))]
        command += [] if "algo" not in settings else ["--algo", str(settings["algo"])]
    return shlex.join(["spiking-rl", *command, "--run", str(folder.path), "--resume"])


def distinct_runs(runs: Sequence[Path]) -> list[RunFolder]:
    """Return the runs that a command was given.

    Raises:
        UserError: there are none, or one is no run or named twice.
    """
    if not runs:
        raise UserError("runs", None, "name at least one run folder")
    folders = [RunFolder(path) for path in runs]
    seen = set()
    for folder in folders:
        folder.require()
        if folder.path.resolve() in seen:
            raise UserError("runs", str(folder.path), "is named twice; each run counts once")
        seen.add(folder.path.resolve())
    return folders


def published_runs(runs: Sequence[Path], output: Path) -> list[RunFolder]:
    """Return the runs that a script gathers into a JSON file.

    Raises:
        UserError: as :func:`distinct_runs`, or the file is no JSON.
    """
    folders = distinct_runs(runs)
    if output.suffix != ".json":
        raise UserError("output", str(output), "must end with .json")
    return folders


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


def write_results(path: Path, script: str, rows: Sequence[dict[str, Any]], before: Sequence[str] = ()) -> None:
    """Write ``{"command", "commit", "date", "machine", "rows"}``.

    Args:
        path: the JSON file; its folder is made.
        script: name of the script of this package that measured, without its arguments.
        rows: one per measurement.
        before: commands that made some of the rows before this one.
    """
    command = f"python -m spiking_rl.scripts.{script} {shlex.join(sys.argv[1:])}".strip()
    commands = " && ".join(dict.fromkeys([*before, command]))
    results = {"command": commands, "commit": commit(), "date": today(), "machine": machine(), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=1) + "\n")


def add_results(path: Path, script: str, rows: Sequence[dict[str, Any]], same: Sequence[str]) -> list[dict[str, Any]]:
    """Write results as :func:`write_results` does, beside the rows of other parts of the same measurement.

    Rows that the file has already stay if it was made at the same commit, but for those that agree with a new one
    in the fields ``same``. Its command is then that of all parts, ``a && b``.

    Args:
        path: the JSON file.
        script: name of the script of this package that measured.
        rows: the new rows.
        same: fields that say which part a row belongs to.

    Returns:
        All rows of the file.

    Raises:
        UserError: the file exists and holds no results.
    """
    earlier = _earlier(path)
    parts = {tuple(row.get(field) for field in same) for row in rows}
    kept = [row for row in earlier["rows"] if tuple(row.get(field) for field in same) not in parts]
    write_results(path, script, [*kept, *rows], before=earlier["command"].split(" && ") if earlier["rows"] else [])
    return [*kept, *rows]


def earlier_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of results that were made at this commit; none where the file is of another one, or missing.

    Raises:
        UserError: the file exists and holds no results.
    """
    rows: list[dict[str, Any]] = _earlier(path)["rows"]
    return rows


def _earlier(path: Path) -> dict[str, Any]:
    none: dict[str, Any] = {"command": "", "rows": []}
    if not path.exists():
        return none
    try:
        earlier: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(earlier["command"], str) or not all(isinstance(row, dict) for row in earlier["rows"]):
            raise ValueError("no results")
        return earlier if earlier["commit"] == commit() else none
    except (ValueError, KeyError, TypeError):
        raise UserError("output", str(path), "exists and holds no results; remove it or name another") from None
