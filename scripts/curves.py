"""Publish the learning curves of runs: JSON, and a figure against agent steps, or epochs, and minutes.

python -m spiking_rl.scripts.curves runs/pong-seed0 runs/pong-relu-seed0 --output results/pong-curves.json
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from spiking_rl.agents.config import load_config
from spiking_rl.errors import UserError
from spiking_rl.plotting import learning_curves, save_figure
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.plot import refuse_mixture
from spiking_rl.scripts.published import published_runs, write_results
from spiking_rl.vision import config as vision

DESCRIPTION = """Gather what runs scored while they learned, on selection seeds or validation images.

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
    folders = published_runs(options.runs, options.output)
    refuse_mixture(folders)
    for folder in folders:
        # With all its settings a curve has the recipe that made it.
        if vision.classifies(folder.config):
            settings = dataclasses.asdict(vision.load_config(folder.config))
        else:
            config = load_config(folder.config)
            settings = {"algo": config.algo, **dataclasses.asdict(config)}
        if any(row["run"] == folder.name for row in rows):
            raise UserError("runs", str(folder.path), "has the name of another one, and curves are told by it")
        rows.append({"run": folder.name, "settings": settings, "curve": folder.read_progress()})
    write_results(options.output, "curves", rows)
    figure = options.output.with_suffix(".png")
    save_figure(learning_curves({row["run"]: [row["curve"]] for row in rows}, minutes=True), figure)
    print(f"{options.output}\nfigure: {figure}")


if __name__ == "__main__":
    script(main)
