"""spiking-rl exit: decide as soon as the readout is clear, and measure what that costs and saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymnasium.spaces import Discrete
from tqdm import tqdm

from spiking_rl.agents.building import resolve_device
from spiking_rl.agents.evaluation import REPORT_SEED, check_episodes, evaluate, typical_gap
from spiking_rl.agents.loading import load_agent
from spiking_rl.errors import UserError
from spiking_rl.plotting import early_exit
from spiking_rl.provenance import commit, machine, today
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.options import first_argument, parse
from spiking_rl.scripts.plot import pictures_of, save_with_data
from spiking_rl.vision import evaluation as vision
from spiking_rl.vision.building import load_classifier
from spiking_rl.vision.config import classifies, load_config
from spiking_rl.vision.data import load_dataset

DESCRIPTION = """Decide early: stop at the first timestep at which the best output leads by a margin.

RUN is the run of an agent without memory, or of a classifier, with a checkpoint of more than one timestep.

Example: spiking-rl exit runs/cartpole-seed0 --timesteps 5"""

_DRAWN = ("margin", "mean_timesteps", "mean_return", "ci95", "top1", "energy_ratio")


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    timesteps: int | None = None
    """T of the run; none: its highest."""
    margins: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0)
    """Margins to try, in units of the median gap between the two highest outputs after all timesteps."""
    episodes: int = 100
    """Episodes of an agent."""
    seed: int = REPORT_SEED
    """Seed of the first of them."""
    env: str | None = None
    """Of an agent: play in another environment with the same spaces."""
    data: Path | None = None
    """Images of a classifier; none: the environment variable SPIKING_RL_DATA."""
    device: str = "cpu"
    """cpu, cuda or auto."""
    output: Path | None = None
    """Figure (.png, .svg or .pdf), a .csv beside it; none: figures/early-exit.png in the run."""


def run(args: list[str]) -> dict[str, Any]:
    """Measure every margin; print a table, draw the curve, return the rows."""
    name, rest = first_argument(args, "run", "a run folder")
    options = parse(Options, "exit RUN", rest, DESCRIPTION)
    check_episodes(options.episodes, options.seed)
    if not options.margins or not all(0 <= margin < float("inf") for margin in options.margins):
        raise UserError("margins", options.margins, "must be finite numbers, 0 or larger")
    if options.output is not None and options.output.suffix not in (".png", ".svg", ".pdf"):
        raise UserError("output", str(options.output), "must end with .png, .svg or .pdf")
    folder = RunFolder(Path(str(name)))
    folder.require()
    kept = [t for t in folder.checkpoint_timesteps() if t is not None]
    if not kept:
        raise UserError("run", str(folder.path), "holds no spiking network yet; early exit needs one of T >= 2")
    timesteps = max(kept) if options.timesteps is None else options.timesteps
    if timesteps not in kept or timesteps < 2:
        raise UserError("timesteps", timesteps, f"needs a checkpoint of at least 2; {folder.path} holds T = {kept}")
    images = classifies(folder.config)
    measured = (_classifier if images else _agent)(folder, timesteps, options)
    title, gap, measure = measured
    score = "top1" if images else "mean_return"
    rows = []
    print(f"{title}; margins in units of {gap:.3g}")
    print(f"{'margin':>8} {'timesteps':>9} {'score':>8} {'energy':>7}")
    margins = [*sorted(options.margins), None]
    for margin in tqdm(margins, unit="margin", leave=False, disable=None):
        row = {**measure(None if margin is None else margin * gap), "margin": margin, "timesteps": timesteps}
        rows.append(row)
        label = "none" if margin is None else f"{margin:g}"
        tqdm.write(f"{label:>8} {row['mean_timesteps']:9.2f} {row[score]:8.2f} {row['energy_ratio']:6.2f}x")
    path = options.output or folder.figures / "early-exit.png"
    save_with_data(early_exit(rows, title), path, [{k: v for k, v in row.items() if k in _DRAWN} for row in rows])
    figures = [str(picture) for picture in pictures_of(path)]
    for figure in figures:
        print(f"figure: {figure}")
    print(f"data:   {path.with_suffix('.csv')}")
    about = {"commit": commit(), "date": today(), "machine": machine(), "median_gap": gap}
    return {"run": str(folder.path), **about, "rows": rows, "figures": figures}


Measured = tuple[str, float, Callable[[float | None], dict[str, Any]]]
"""A title, the typical gap, and what measures a margin (None: all timesteps)."""


def _agent(folder: RunFolder, timesteps: int, options: Options) -> Measured:
    resolve_device(options.device)
    agent = load_agent(folder.path, timesteps, options.device)
    if agent.model.stateful:
        raise UserError("run", str(folder.path), "is stateful; its membranes need every timestep")
    assert isinstance(agent.model.action_space, Discrete)
    if agent.model.action_space.n < 2:
        raise UserError("run", str(folder.path), "has a single action; there is nothing to decide early")
    environment = options.env or agent.environment

    def measure(margin: float | None) -> dict[str, Any]:
        row = evaluate(
            agent.model,
            environment,
            episodes=options.episodes,
            seed=options.seed,
            measure_latency=False,
            exit_margin=margin,
        ).as_row()
        return {"mean_timesteps": float(timesteps), **row}

    title = f"{environment}, {options.episodes} episodes, T up to {timesteps}"
    return title, typical_gap(agent.model, environment), measure


def _classifier(folder: RunFolder, timesteps: int, options: Options) -> Measured:
    config = load_config(folder.config)
    if config.dataset == "imagenet":
        raise UserError("run", str(folder.path), "is of imagenet; early exit is measured on sets that fit into memory")
    images = load_dataset(config.dataset, options.data, size=config.image_size or 32)
    network = load_classifier(folder.checkpoint(timesteps), config, images).to(resolve_device(options.device))

    def measure(margin: float | None) -> dict[str, Any]:
        return vision.evaluate_exit(network, images, float("inf") if margin is None else margin)

    title = f"{config.network}, {config.dataset}, {len(images.test_labels):,} test images, T up to {timesteps}"
    return title, vision.typical_gap(network, images), measure
