"""Publish the learning curves of runs: JSON, and a figure against agent steps and minutes.

python -m spiking_rl.scripts.curves runs/pong-seed0 runs/pong-relu-seed0 --output results/pong-curves.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from spiking_rl.agents.runs import RunFolder
from spiking_rl.errors import UserError
from spiking_rl.plotting import learning_curves, save_figure
from spiking_rl.scripts.options import parse
from spiking_rl.scripts.published import write_results

DESCRIPTION = """Gather what runs scored while they learned: greedy episodes on the selection seeds.

Example: python -m spiking_rl.scripts.curves runs/pong-seed0 --output results/pong-curves.json"""


@dataclass(kw_only=True)
class Options:
    """What to gather."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, finished or not."""
    output: Path
    """Curves as JSON; the figure lies beside it."""


def main() -> None:
    """Write the curves and the figure."""
    options = parse(Options, "curves", sys.argv[1:], DESCRIPTION)
    rows: list[dict[str, Any]] = []
    for folder in map(RunFolder, options.runs):
        folder.require()
        progress = folder.read_progress()
        # The settings as they are: with the curve they are the recipe that made it.
        config = yaml.safe_load(folder.config.read_text())
        rows.append({"run": folder.path.name, "config": config, "curve": progress})
    if not rows:
        raise UserError("runs", None, "name at least one run folder")
    write_results(options.output, "curves", rows)
    figure = options.output.with_suffix(".png")
    save_figure(learning_curves({row["run"]: row["curve"] for row in rows}), figure)
    print(f"{options.output}\nfigure: {figure}")


if __name__ == "__main__":
    main()
