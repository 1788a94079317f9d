"""Make a results table: seeds x (pruned, its controls and ablations), through the real command line.

python -m spiking_rl.scripts.table --output results/cartpole.json
python -m spiking_rl.scripts.table --recipe cartpole-masked --algos pqn --methods direct stateless one-leak
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from spiking_rl.agents.config import TrainConfig, load_config, load_recipe
from spiking_rl.checkpoint import read_json
from spiking_rl.errors import UserError
from spiking_rl.plotting import continuum, save_figure
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import checked_rows, write_results

_SECOND = {"rescaled": ["--rescale-leak"], "fixed-leak": ["--no-rescale-leak"]}
"""What ``prune`` is told by the methods that share their first stage."""

_FIRST: defaultdict[tuple[str, int], Lock] = defaultdict(Lock)

DESCRIPTION = """Train and score every seed of every line of the table; finished runs are not repeated.

Example: python -m spiking_rl.scripts.table --recipe cartpole --jobs 2"""


@dataclass(kw_only=True)
class Options:
    """What to run."""

    recipe: str = "cartpole"
    """Recipe or environment id."""
    algos: tuple[str, ...] = ("pqn", "dqn")
    """Algorithms."""
    methods: tuple[str, ...] = ("pruned", "direct", "relu")
    """pruned: T=5 to 1; direct: at T=1 from the start; converted: at T=1 from the ReLU network; relu: the ReLU network;
    stateful: pruned, membranes carried; stateless: direct, fresh membranes; one-leak: direct, one threshold and leak
    per layer; single-spike, -0.2 and -1: pruned to T=2 with hybrid encoding and neurons that fire once, kappa 0, 0.2
    and 1; rescaled and fixed-leak: from one run at T=5, pruned to 1 with and without leaks that follow T. Controls
    get the agent steps that the recipe as it stands gets, over all its stages."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds."""
    runs: Path = Path("runs/table")
    """Folder of the runs."""
    output: Path | None = None
    """Results; default results/RECIPE.json."""
    extend: bool = False
    """Keep the lines that the output has already, and all its others."""
    jobs: int = 1
    """Runs side by side."""


def main() -> None:
    """Run what is missing, then write the table."""
    options = parse(Options, "table", sys.argv[1:], DESCRIPTION)
    _check(options)
    short, config = load_recipe(options.recipe, options.algos[0])
    output = options.output or Path("results") / f"{short}.json"
    lines = [(s, a, m) for a in options.algos for m in options.methods for s in options.seeds]
    known = _known(output, config.env)
    lost = [line for line in known if line not in lines]
    if lost and not options.extend:
        seed, algo, method = lost[0]
        remedy = "--extend keeps them, or name another --output"
        raise UserError("output", str(output), f"holds other lines, such as {algo}, {method}, seed {seed}; {remedy}")
    known = known if options.extend else {}
    lines = [line for line in lines if line not in known]
    with ThreadPoolExecutor(options.jobs) as pool:
        known |= zip(lines, pool.map(lambda line: _line(options, *line), lines), strict=True)
    rows = [row for part in known.values() for row in part]
    write_results(output, "table", rows)
    print(f"{len(rows)} rows: {output}")
    for algo in options.algos:
        figure = output.with_name(f"{output.stem}-{algo}.png")
        own = [row for row in rows if row["algo"] == algo]
        if all(row["timesteps"] is None for row in own):
            continue  # ReLU networks have no timesteps to draw
        seeds = ", ".join(str(s) for s in sorted({row["seed"] for row in own}))
        save_figure(continuum(own, f"{own[0]['environment']}, {algo}, seeds {seeds}; line: mean"), figure)
        print(f"figure: {figure}")


def _check(options: Options) -> None:
    """Refuse what cannot be measured before anything is.

    Raises:
        UserError: naming the option.
    """
    for name in ("algos", "methods", "seeds"):
        if not getattr(options, name):
            raise UserError(name, (), "must name at least one")
    for algo in options.algos:
        methods = {*_arguments(load_recipe(options.recipe, algo)[1]), *_SECOND} - {"first"}
        for method in options.methods:
            if method not in methods:
                raise UserError("methods", method, f"unknown; choose of {', '.join(sorted(methods))}")
    if options.jobs < 1:
        raise UserError("jobs", options.jobs, "must be at least 1")
    if options.output is not None and options.output.suffix != ".json":
        raise UserError("output", str(options.output), "must end with .json")


def _known(output: Path, environment: str) -> dict[tuple[int, str, str], list[dict[str, Any]]]:
    """Return the rows of an earlier, perhaps unfinished table by seed, algorithm and method.

    Raises:
        UserError: the file is no table, or one of another environment.
    """
    found: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    if output.is_file():
        for row in checked_rows(read_json(output, "results"), output):
            if row.get("environment") != environment or not {"seed", "algo", "method"} <= row.keys():
                raise UserError("output", str(output), f"is no table of {environment}; name another --output")
            found.setdefault((row["seed"], row["algo"], row["method"]), []).append(row)
    return found


def _arguments(config: TrainConfig) -> dict[str, list[str]]:
    """Return the flags of ``train`` that make a line of the table, by method."""
    stages = config.timesteps - config.prune_to
    # The controls get all the agent steps that the recipe as it stands gets over its stages.
    later = (stages - 1) * config.prune_steps + (config.last_steps or config.prune_steps) if stages else 0
    spiking = config.agent_steps + later
    single = ["--agent-steps", str(config.ann_steps + spiking), "--ann-steps", "0"]
    direct = ["--timesteps", "1", "--prune-to", "1", *single]
    pruned = ["--timesteps", "5", "--prune-to", "1"]
    once = ["--timesteps", "5", "--prune-to", "2", "--encoding", "hybrid", "--single-spike"]
    return {
        "first": ["--timesteps", "5", "--prune-to", "5"],
        "pruned": pruned,
        "direct": direct,
        "converted": ["--timesteps", "1", "--prune-to", "1", "--agent-steps", str(spiking)],
        "relu": ["--neuron", "relu", "--no-stateful", *single],
        "stateful": [*pruned, "--stateful"],
        "stateless": [*direct, "--no-stateful", "--first-layer-norm", "False"],
        "single-spike": once,
        "single-spike-0.2": [*once, "--kappa", "0.2"],
        "single-spike-1": [*once, "--kappa", "1"],
        # 0.45: a time constant of 1.25 decisions, the middle of the default spread.
        "one-leak": [*direct, "--time-constants", "None", "--leak", "0.45", "--no-per-channel"],
    }


def _line(options: Options, seed: int, algo: str, method: str) -> list[dict[str, Any]]:
    """Train one run unless it is there, and return its rows."""
    short, config = load_recipe(options.recipe, algo)
    run = options.runs / f"{short}-{algo}-{method}-seed{seed}"
    if not (run / "results.json").is_file():
        if method in _SECOND:
            _prune(options, seed, algo, run, method)
        else:
            _train(options, seed, algo, run, _arguments(config)[method])
    results = read_json(run / "results.json", "results")
    cost = {key: results.get(key) for key in ("train_seconds", "peak_rss_mb", "commit")}
    scores = ", ".join(f"{row['mean_return']:.1f}" for row in results["rows"])
    print(f"{run.name}: {scores}", flush=True)
    return [{"method": method, **row, **cost} for row in results["rows"]]


def _prune(options: Options, seed: int, algo: str, run: Path, method: str) -> None:
    """Prune a copy of the run at T=5 that two methods share."""
    short, config = load_recipe(options.recipe, algo)
    first = run.with_name(f"{short}-{algo}-first-seed{seed}")
    with _FIRST[(algo, seed)]:
        if not (first / "results.json").is_file():
            _train(options, seed, algo, first, _arguments(config)["first"])
    if not run.is_dir():
        copy = run.with_name(f".{run.name}.partial")  # a copy that was cut short is never taken for a run
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(first, copy, ignore=shutil.ignore_patterns("results.json", ".lock"))
        copy.rename(run)
    if load_config(run / "config.yaml").prune_to == 1:
        _train(options, seed, algo, run, [])  # it was pruning when it stopped
    else:
        steps = ["--agent-steps", str(config.prune_steps)]
        _call(run, ["prune", str(run), "--to", "1", *steps, *_SECOND[method]])


def _train(options: Options, seed: int, algo: str, run: Path, extra: list[str]) -> None:
    own = ["train", options.recipe, "--algo", algo, "--seed", str(seed)]
    # A run that was begun keeps the lengths it has: none is given anew.
    _call(run, [*own, "--run", str(run), *(["--resume"] if (run / "config.yaml").is_file() else extra)])


def _call(run: Path, arguments: list[str]) -> None:
    log = run.with_name(f"{run.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        command = [sys.executable, "-m", "spiking_rl.scripts", *arguments]
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)


if __name__ == "__main__":
    script(main)
