"""Publish the scores of finished runs in one file, each with the command and commit that made it.

python -m spiking_rl.scripts.gather runs/pong-relu-seed0 runs/pong-seed0 --output results/pong.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from spiking_rl.checkpoint import read_json
from spiking_rl.errors import UserError
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import checked_rows, go_on_with, published_runs, write_results

DESCRIPTION = """Gather the final tables of runs that were trained one by one.

Example: python -m spiking_rl.scripts.gather runs/pong-seed0 runs/pong-seed1 --output results/pong.json"""

_ABOUT_THE_RUN = ("command", "commit", "date", "machine", "train_seconds", "peak_rss_mb")


@dataclass(kw_only=True)
class Options:
    """What to gather."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of finished runs."""
    output: Path
    """Results as JSON."""


def main() -> None:
    """Write the rows of all runs."""
    options = parse(Options, "gather", sys.argv[1:], DESCRIPTION)
    rows: list[dict[str, Any]] = []
    for folder in published_runs(options.runs, options.output):
        if not folder.results.is_file():
            raise UserError("runs", str(folder.path), f"has no final table yet; go on with {go_on_with(folder)}")
        results = read_json(folder.results, "results")
        about = {key: results.get(key) for key in _ABOUT_THE_RUN}
        rows += [{"run": folder.name, **row, **about} for row in checked_rows(results, folder.results)]
    write_results(options.output, "gather", rows)
    print(f"{len(rows)} rows: {options.output}")


if __name__ == "__main__":
    script(main)
