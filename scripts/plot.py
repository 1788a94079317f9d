"""spiking-rl plot: figures of one run, or the learning curves of several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from spiking_rl.agents.config import load_config
from spiking_rl.checkpoint import read_json
from spiking_rl.errors import UserError
from spiking_rl.plotting import accuracy_curve, continuum, learning_curve, save_figure
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.options import parse
from spiking_rl.settings import load_settings
from spiking_rl.vision import config as vision

DESCRIPTION = """Draw learning curves, and score, spike rate and energy against T.

Example: spiking-rl plot runs/cartpole-seed0
         spiking-rl plot runs/cartpole-seed0 runs/cartpole-seed1 --output seeds.png"""


@dataclass
class Options:
    """What to draw."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    output: Path | None = None
    """Picture of several runs (.png, .svg or .pdf); default learning_curves.png."""


def run(args: list[str]) -> dict[str, Any]:
    """Draw figures and say where they are."""
    options = parse(Options, "plot", args, DESCRIPTION)
    folders = [RunFolder(path) for path in options.runs]
    if not folders:
        raise UserError("runs", None, "name at least one run folder")
    for folder in folders:
        folder.require()
    if len(folders) == 1 and options.output is None:
        made = draw_run(folders[0])
    else:
        path = options.output or Path("learning_curves.png")
        if path.suffix not in (".png", ".svg", ".pdf"):
            raise UserError("output", str(path), "must end with .png, .svg or .pdf")
        for folder in filter(_classifies, folders):
            raise UserError("runs", str(folder.path), "holds a classifier; plot it alone, without --output")
        save_figure(learning_curve({f.path.name: f.read_progress() for f in folders}), path)
        made = [path]
    for path in made:
        print(f"figure: {path}")
    return {"figures": [str(p) for p in made]}


def draw_run(folder: RunFolder) -> list[Path]:
    """Draw every figure that a run has data for; return their paths."""
    progress, rows = folder.read_progress(), []
    if folder.results.is_file():
        rows = read_json(folder.results, "results").get("rows", [])
    made = [folder.figures / "learning_curve.png"]
    if _classifies(folder):
        classifier = vision.load_config(folder.config)
        title = f"{classifier.network}, {classifier.dataset}, seed {classifier.seed}"
        figure, measured = accuracy_curve(progress, title), "test images"
    else:
        config = load_config(folder.config)
        title = f"{config.env}, {config.algo}, seed {config.seed}"
        figure, measured = learning_curve({folder.path.name: progress}, title), "unseen episodes"
    save_figure(figure, made[0])
    if any(r["timesteps"] is not None for r in rows):
        made.append(folder.figures / "timesteps.png")
        count = rows[0].get("episodes", rows[0].get("images"))
        save_figure(continuum(rows, f"{title}: {count:,} {measured} at each T"), made[1])
    return made


def _classifies(folder: RunFolder) -> bool:
    return bool(load_settings(folder.config).get("kind") == "classify")
