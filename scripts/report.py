"""spiking-rl report: one HTML page about a run, complete in itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiking_rl.checkpoint import read_json
from spiking_rl.envs.atari import parse_atari
from spiking_rl.envs.video import still
from spiking_rl.errors import UserError
from spiking_rl.files import write_atomically
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.options import first_argument, parse
from spiking_rl.scripts.page import Facts, page
from spiking_rl.scripts.published import checked_rows, go_on_with
from spiking_rl.settings import read_settings

DESCRIPTION = """Write one self-contained HTML page about a run: settings, curves, every T, spikes, energy, video.

It opens from disk without a network, on a phone too. Works for agents and classifiers, finished or not.

Example: spiking-rl report runs/cartpole-seed0 --controls runs/cartpole-relu-seed0"""

_LARGEST_VIDEO = 50 * 2**20  # bytes: a page beyond that is no longer sent about


@dataclass(kw_only=True)
class Options:
    """What to write."""

    controls: tuple[Path, ...] = ()
    """Finished runs to compare with, such as the ReLU network or T=1 trained directly."""
    results: Path | None = None
    """Published results (JSON) whose controls are shown too."""
    output: Path | None = None
    """The page; none: RUN/report.html."""


def run(args: list[str]) -> dict[str, Any]:
    """Write the page and say where it is and what it lacks."""
    name, rest = first_argument(args, "run", "a run folder")
    options = parse(Options, "report RUN", rest, DESCRIPTION)
    assert name is not None
    folder = RunFolder(name)
    folder.require()
    path = options.output or folder.path / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise UserError("output", str(path), "must end with .html")
    if path.is_dir():
        raise UserError("output", str(path), "is a folder; name a file")
    facts = read_facts(folder)
    for control in options.controls:
        facts.controls += _of_same_task(facts, control_rows(RunFolder(control)), "controls", control)
    if options.results is not None:
        facts.controls += _of_same_task(facts, _published(options.results), "results", options.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page(facts))
    print(f"report: {path}")
    for missing in facts.missing:
        print(f"missing: {missing}")
    return {"report": str(path), "missing": facts.missing}


def read_facts(folder: RunFolder) -> Facts:
    """Read what a run knows about itself, and list what it does not know yet.

    Raises:
        UserError: a file is damaged.
    """
    settings = read_settings(folder.config)
    provenance = settings.pop("provenance", None)
    facts = Facts(folder.name, settings, provenance if isinstance(provenance, dict) else {})
    if folder.progress.is_file():
        facts.progress = folder.read_progress()
        if not facts.classifies and any(row.get("agent_steps") is None for row in facts.progress):
            raise UserError("run", str(folder.progress), "is not that of an agent: a line has no agent_steps")
    if not facts.progress:
        facts.missing.append("learning curves: no evaluation yet")
    if folder.results.is_file():
        facts.results = read_json(folder.results, "results")
        facts.rows = checked_rows(facts.results, folder.results)
    else:
        told = f"no final table yet; go on with {go_on_with(folder)}"
        facts.missing.append(f"scores at every T, energy and latency: {told}")
    if facts.classifies:
        return facts
    films = (v for v in sorted(folder.videos.glob("*.mp4")) if v.is_file())
    videos = [v for v in films if v.stat().st_size <= _LARGEST_VIDEO]
    if videos:
        # The lowest T is what the run is for, and a film with spikes says more.
        facts.video = min(videos, key=lambda v: (_timesteps_of(v), "-spikes" not in v.stem))
        facts.still = still(facts.video)
    else:
        facts.missing.append("a video: spiking-rl render RUN --spikes makes one")
    return facts


def _timesteps_of(video: Path) -> int:
    digits = video.stem.removeprefix("T").split("-")[0]
    return int(digits) if digits.isdigit() else 10_000


def control_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the rows of a run that another is compared with.

    Raises:
        UserError: no run there, or not a finished one.
    """
    folder.require()
    if not folder.results.is_file():
        raise UserError("controls", str(folder.path), f"has no final table yet; go on with {go_on_with(folder)}")
    rows = checked_rows(read_json(folder.results, "results"), folder.results)
    settings = read_settings(folder.config)
    start = settings.get("timesteps")
    direct = settings.get("prune_to") == start  # there was no stage above it
    found = [{**row, "run": folder.name} for row in rows]
    return [{**row, "method": "trained directly"} if direct and row.get("timesteps") == start else row for row in found]


def _of_same_task(facts: Facts, rows: list[dict[str, Any]], field: str, path: Path) -> list[dict[str, Any]]:
    """Refuse to set scores of another environment or data set beside those of the run."""
    own = facts.settings.get("dataset" if facts.classifies else "env")
    for row in rows:
        other = row.get("dataset", row.get("environment"))
        if isinstance(other, str) and isinstance(own, str) and _task(other) != _task(own):
            raise UserError(field, str(path), f"is of {other}, and the run of {own}; their scores cannot be compared")
    return rows


def _task(name: str) -> str:
    """Return what a data set or environment is: an Atari game whatever its options, an id whatever its module."""
    try:
        atari = parse_atari(name)
    except UserError:  # without ale-py, or a game of somebody else's ROMs
        return name.partition("?")[0]
    return name.rpartition(":")[2] if atari is None else atari.game


def _published(path: Path) -> list[dict[str, Any]]:
    """Return the rows of published results that no pruning made."""
    rows = checked_rows(read_json(path, "results"), path)
    found = [r for r in rows if r.get("timesteps") is None or r.get("method") in ("direct", "converted")]
    if not found:
        raise UserError("results", str(path), "holds no control (a ReLU network, or a T that was trained directly)")
    return found
