"""Cost as the work grows: over timesteps T, batch, environment steps L and width, beside the limit.

python -m spiking_rl.scripts.benchmark_scaling --output results/scaling.json
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spiking_rl.allocator import keep_memory
from spiking_rl.errors import UserError
from spiking_rl.plotting import save_figure
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import write_results
from spiking_rl.scripts.speed.cases import Case, build_case
from spiking_rl.scripts.speed.timing import interleave, median_ratio, times_of
from spiking_rl.scripts.speed.variants import LIMIT, OURS, Pass, build_pass

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DESCRIPTION = """Time forward and backward passes of growing work, ours and the linear layers alone.

Example: python -m spiking_rl.scripts.benchmark_scaling --output results/scaling.json"""

AXES = {
    "T": "timesteps T (Nature-CNN, batch 8)",
    "batch": "batch (Nature-CNN, T=4)",
    "L": "environment steps L (Nature-CNN, stateful, 4 sequences, T=1)",
    "width": "neurons per layer (MLP of two layers, batch 64, T=4)",
}

_LINE = 72  # characters of a panel's title
_PLAIN = (("layer_norm", False), ("per_channel", False))


@dataclass(kw_only=True)
class Options:
    """How to measure."""

    timesteps: tuple[int, ...] = (1, 2, 4, 8, 16)
    """T to time."""
    batches: tuple[int, ...] = (1, 4, 16, 32, 64)
    """Batches to time."""
    lengths: tuple[int, ...] = (1, 4, 16, 32, 64)
    """L to time."""
    widths: tuple[int, ...] = (64, 256, 512, 1024, 2048)
    """Neurons per layer to time."""
    rounds: int = 15
    """Rounds; each times everything once."""
    seconds: float = 240
    """No round begins after that many, once there are 3."""
    threads: int = 2
    """Torch threads."""
    output: Path | None = None
    """Results as JSON; the figure is written beside it as PNG."""


def main() -> None:
    """Measure, print, write."""
    options = parse(Options, "benchmark_scaling", sys.argv[1:], DESCRIPTION)
    _check(options)
    torch.set_num_threads(options.threads)
    kept = keep_memory()
    runs: dict[tuple[str, int, str], Pass] = {}
    for axis, values in _asked(options).items():
        for value in values:
            for library, run in _passes(axis, value).items():
                runs[axis, value, library] = run
    times = interleave(runs, rounds=options.rounds, seconds=options.seconds)
    rows = []
    for (axis, value, library), measured in times.items():
        told: dict[str, Any] = {"axis": axis, "value": value, "library": library, "pass": "forward+backward"}
        told |= {"ratio_to_limit": median_ratio(measured, times[axis, value, LIMIT])}
        told |= {"threads": options.threads, "allocator": "keeps" if kept else "stock"}
        rows.append(told | times_of(measured))
    for row in rows:
        row["slope"] = slope(rows, row["axis"], row["library"])
        figures = f"{row['ms']:9.2f} ms  {row['ratio_to_limit']:.2f} x limit"
        print(f"{row['axis']:6}{row['value']:5}  {row['library']:11}{figures}")
    for axis in AXES:
        print(f"{axis}: {explained(rows, axis)}")
    if options.output is not None:
        write_results(options.output, "benchmark_scaling", rows)
        save_figure(figure(rows), options.output.with_suffix(".png"))


def _asked(options: Options) -> dict[str, tuple[int, ...]]:
    return {"T": options.timesteps, "batch": options.batches, "L": options.lengths, "width": options.widths}


def _check(options: Options) -> None:
    for axis, values in _asked(options).items():
        if len(set(values)) < 2 or min(values) < 1:  # one point has no slope
            raise UserError(axis, values, "needs at least two different values, each at least 1")
    if options.output is not None and options.output.suffix != ".json":
        raise UserError("output", str(options.output), "must end with .json")


def _passes(axis: str, value: int) -> dict[str, Pass]:
    """Return our pass and the limit's at one point of an axis."""
    timesteps = {"T": value, "L": 1}.get(axis, 4)
    if axis == "width":
        options = (("hidden", (value, value)), ("layer_norm", False))
        case = Case("mlp", (64,), 4, 64, (timesteps,), True, options)
    else:
        batch = {"T": 8, "batch": value, "L": 4 * value}[axis]
        case = Case("nature_cnn", (4, 84, 84), 6, batch, (timesteps,), True, _PLAIN)
    network, inputs = build_case(case, timesteps)
    limit = build_pass(LIMIT, case, network, inputs)
    if axis != "L":
        return {OURS: build_pass(OURS, case, network, inputs), LIMIT: limit}
    sequences = inputs.reshape(value, 4, *inputs.shape[1:])
    state = network.initial_state(4)
    starts = torch.zeros(value, 4, dtype=torch.bool)

    def stateful() -> None:
        network.zero_grad(set_to_none=True)
        network(sequences, state, starts)[0].square().mean().backward()

    return {OURS: stateful, LIMIT: limit}


def slope(rows: Sequence[dict[str, Any]], axis: str, library: str) -> float:
    """Return milliseconds per unit of an axis; along the width, the power of it, between its two largest values."""
    points = sorted((r["value"], r["ms"]) for r in rows if r["axis"] == axis and r["library"] == library)
    x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    if axis == "width":
        return round(float(np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2])), 3)
    return round(float(np.polyfit(x, y, 1)[0]), 4)


def explained(rows: Sequence[dict[str, Any]], axis: str) -> str:
    """Return where the slope of our cost along an axis comes from."""
    ours, limit = slope(rows, axis, OURS), slope(rows, axis, LIMIT)
    if axis == "width":
        return f"work grows as width^{ours:.2f}, weights alone as width^{limit:.2f}; neurons grow as width^1"
    per = {"T": "timestep (all layers but the first)", "batch": "sample", "L": "environment step of 4 sequences"}[axis]
    return f"{ours:.3f} ms per {per}, {limit:.3f} of them in the linear layers, {ours - limit:.3f} in neurons"


def figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw time against each axis, ours and the limit; logarithmic along the width."""
    from matplotlib.figure import Figure

    chart = Figure(figsize=(10, 6.6), layout="constrained")
    for i, (axis, label) in enumerate(AXES.items()):
        ax = chart.add_subplot(2, 2, i + 1)
        for library, colour in ((OURS, "#2b6cb0"), (LIMIT, "#c53030")):
            points = [r for r in rows if r["axis"] == axis and r["library"] == library]
            x = [r["value"] for r in points]
            ax.plot(x, [r["ms"] for r in points], color=colour, marker="o", markersize=3, label=library)
            low, high = ([r["quartiles"][end] for r in points] for end in (0, 1))
            ax.fill_between(x, low, high, color=colour, alpha=0.2)
        if axis == "width":
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
        else:
            ax.set_xlim(left=0)
            ax.set_ylim(bottom=0)
        ax.set_xlabel(label, fontsize=9)
        ax.set_ylabel("ms, forward and backward", fontsize=9)
        ax.set_title(textwrap.fill(explained(rows, axis), _LINE), fontsize=8, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#e2e8f0", linewidth=0.8)
        ax.legend(frameon=False, fontsize=8)
    return chart


if __name__ == "__main__":
    script(main)
