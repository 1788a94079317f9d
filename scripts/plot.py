"""spiking-rl plot: figures of one run, or the learning curves of several, seeds of one algorithm as one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from spiking_rl.agents.config import load_config
from spiking_rl.checkpoint import read_json
from spiking_rl.errors import UserError
from spiking_rl.files import write_table
from spiking_rl.plotting import accuracy_curve, continuum, learning_curve, learning_curves, save_figure
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.options import parse
from spiking_rl.scripts.published import checked_rows, distinct_runs
from spiking_rl.vision import config as vision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DESCRIPTION = """Draw learning curves, and score, spike rate and energy against T.

Of several runs: one line per algorithm, or per network and data set, the mean of its seeds, in a band from the lowest
to the highest. Each figure is a .png and a .svg, its data a .csv beside them.

Example: spiking-rl plot runs/cartpole-seed0
         spiking-rl plot runs/cartpole-seed0 runs/cartpole-seed1 --output seeds.png"""

Row = dict[str, Any]


@dataclass
class Options:
    """What to draw."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    output: Path | None = None
    """Picture of several runs (.png, .svg or .pdf; a .png gets a .svg beside it); none: learning_curves.png."""


@dataclass(frozen=True)
class DrawnRun:
    """A run as a figure of several needs it: what it is called, and its rows of progress.csv."""

    name: str
    learner: str
    """The algorithm, or a classifier's network."""
    task: str
    """The environment, or the data set."""
    seed: int
    rows: list[Row]
    classifies: bool

    @property
    def without_seed(self) -> str:
        """What the name says besides the seed."""
        above, _, own = self.name.rpartition("/")
        bare = re.sub(r"[-_.]?seed[-_.]?\d+", "", own)
        if bare == own:
            bare = re.sub(rf"(^|[-_.])s?{self.seed}$", "", own)
        return "/".join(part for part in (above, bare) if part)


def run(args: list[str]) -> dict[str, Any]:
    """Draw figures and say where they are."""
    options = parse(Options, "plot", args, DESCRIPTION)
    folders = distinct_runs(options.runs)
    if len(folders) == 1 and options.output is None:
        made = draw_run(folders[0])
    else:
        path = options.output or Path("learning_curves.png")
        _draw_several(folders, path)
        made = [path]
    figures = [picture for path in made for picture in pictures_of(path)]
    tables = [path.with_suffix(".csv") for path in made]
    for picture in figures:
        print(f"figure: {picture}")
    for table in tables:
        print(f"data:   {table}")
    return {"figures": [str(p) for p in figures], "data": [str(p) for p in tables]}


def draw_run(folder: RunFolder) -> list[Path]:
    """Draw every figure that a run has data for.

    Returns:
        The pictures (.png); a .svg and the data as .csv lie beside each.

    Raises:
        UserError: its files are missing or damaged, or hold what cannot be drawn.
    """
    try:
        return _draw_run(folder)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(repr(error).split())[:200]
        raise UserError("run", str(folder.path), f"holds results that cannot be drawn ({reason})") from None


def _draw_run(folder: RunFolder) -> list[Path]:
    progress, rows = folder.read_progress(), []
    if folder.results.is_file():
        rows = checked_rows(read_json(folder.results, "results"), folder.results)
    if vision.classifies(folder.config):
        classifier = vision.load_config(folder.config)
        about = {"network": classifier.network, "dataset": classifier.dataset, "seed": classifier.seed}
        title = f"{classifier.network}, {classifier.dataset}, seed {classifier.seed}"
        figure, measured = accuracy_curve(progress, title), "test images"
    else:
        config = load_config(folder.config)
        about = {"algo": config.algo, "environment": config.env, "seed": config.seed}
        title = f"{config.env}, {config.algo}, seed {config.seed}"
        figure, measured = learning_curve(progress, title), "unseen episodes"
    about = {"run": folder.name, **about}
    made = [folder.figures / "learning_curve.png"]
    save_with_data(figure, made[0], [_evaluation(about, row) for row in progress])
    if len([r for r in rows if r["timesteps"] is not None]) > 1:  # of one T results.json says as much
        made.append(folder.figures / "timesteps.png")
        count = rows[0].get("episodes", rows[0].get("images"))
        figure = continuum(rows, f"{title}: {count:,} {measured} at each T")
        save_with_data(figure, made[1], [_measurement(about, row) for row in rows])
    return made


def _draw_several(folders: Sequence[RunFolder], path: Path) -> None:
    """Draw the learning curves of several runs.

    Raises:
        UserError: a name with another ending, or agents beside classifiers.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError("output", str(path), "must end with .png, .svg or .pdf")
    refuse_mixture(folders)
    runs = [read_run(folder) for folder in folders]
    groups = {label: [r.rows for r in group] for label, group in group_runs(runs).items()}
    tasks = {r.task for r in runs}
    title = tasks.pop() if len(tasks) == 1 else ""  # else the names of the lines tell
    rows = [_evaluation(_about(r), row) for r in runs for row in r.rows]
    save_with_data(learning_curves(groups, title), path, rows)


def refuse_mixture(folders: Sequence[RunFolder]) -> None:
    """Refuse agents beside classifiers: their scores have no axis in common.

    Raises:
        UserError: a run of another kind than the first.
    """
    first = vision.classifies(folders[0].config)
    for folder in folders:
        if vision.classifies(folder.config) != first:
            other, kind = ("an agent", "a classifier") if first else ("a classifier", "an agent")
            raise UserError("runs", str(folder.path), f"holds {other}, and the first run {kind}; draw them apart")


def read_run(folder: RunFolder) -> DrawnRun:
    """Return what a figure of several shows of a run.

    Raises:
        UserError: no evaluation yet, or damaged.
    """
    name, rows = folder.name, folder.read_progress()
    if vision.classifies(folder.config):
        classifier = vision.load_config(folder.config)
        rows = [{**row, "epoch": i + 1} for i, row in enumerate(rows)]  # which every stage counts anew
        return DrawnRun(name, classifier.network, classifier.dataset, classifier.seed, rows, classifies=True)
    config = load_config(folder.config)
    return DrawnRun(name, config.algo, config.env, config.seed, rows, classifies=False)


def group_runs(runs: Sequence[DrawnRun]) -> dict[str, list[DrawnRun]]:
    """Return the runs that differ by their seed alone, under what the legend calls them.

    A name says no more than it must: the algorithm or network, the environment or data set where there are several, and
    the run's name where groups differ by nothing else.
    """
    found: dict[tuple[str, str, str], list[DrawnRun]] = {}
    for one in runs:
        found.setdefault((one.learner, one.task, one.without_seed), []).append(one)
    labels = {}
    for key, group in found.items():
        learner, task, bare = key
        rivals = [other for other in found if other[0] == learner and other != key]
        parts = [learner]
        if len({other[1] for other in found}) > 1:
            parts.append(task)
        if any(other[1] == task for other in rivals):
            parts.append(bare)
        if len(group) > 1:
            what = "seeds" if len({r.seed for r in group}) == len(group) else "runs"
            parts.append(f"{len(group)} {what}, band: min to max")
        labels[", ".join(parts)] = group
    return labels


def _about(one: DrawnRun) -> Row:
    learner, task = ("network", "dataset") if one.classifies else ("algo", "environment")
    return {"run": one.name, learner: one.learner, task: one.task, "seed": one.seed}


def _evaluation(about: Row, row: Row) -> Row:
    """Return what the data say of one evaluation while a run learned."""
    at = "agent_steps" if "agent_steps" in row else "epoch"
    known: Row = {name: row[name] for name in ("on_rates", "ci95") if name in row}
    return {**about, at: row.get(at), "timesteps": row["timesteps"], "score": row["score"], **known}


def _measurement(about: Row, row: Row) -> Row:
    """Return what the data say of a final score at one T."""
    names = ("mean_return", "ci95", "top1", "energy_ratio")
    rates = row["spike_rate"] or {}
    known = {name: row[name] for name in names if name in row}
    return {**about, "timesteps": row["timesteps"], **known, **{f"spike_rate_{n}": rate for n, rate in rates.items()}}


def save_with_data(figure: Figure, path: Path, rows: Sequence[Row]) -> None:
    """Write a figure, and its data as CSV beside it."""
    for picture in pictures_of(path):
        save_figure(figure, picture)
    write_table(path.with_suffix(".csv"), rows)


def pictures_of(path: Path) -> list[Path]:
    """Return the pictures that are made for one: a .svg beside a .png."""
    return [path, path.with_suffix(".svg")] if path.suffix == ".png" else [path]
