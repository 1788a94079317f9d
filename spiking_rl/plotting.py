"""Figures: learning curves, and the continuum of timesteps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiking_rl.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_BLUE, _ORANGE, _GREEN, _GREY, _RED = "#2b6cb0", "#dd6b20", "#2f855a", "#a0aec0", "#c53030"
_RELU = "ReLU"
_CURVES = (_BLUE, _ORANGE, _GREEN, "#805ad5", _RED)
_STYLES = ("-", "--", ":", "-.")  # for more groups than colours
_LONG_NAME = 24  # characters, beyond which a legend needs a place of its own
_FEW_POINTS = 60  # of a curve: more hide it behind their marks
_METHOD_COLOURS = (_BLUE, _GREEN, _RED, "#6b46c1", "#0987a0")


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # slow to import, and most users of the core never plot

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e2e8f0", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _entitled(figure: Figure, title: str) -> Figure:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically in the format that the file's ending names."""
    import io

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names of runs in scripts that the font lacks are drawn as boxes, which says enough.
        warnings.filterwarnings("ignore", message=r"Glyph \d+", category=UserWarning)
        figure.savefig(buffer, format=path.suffix.lstrip("."), dpi=200)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def learning_curves(groups: Mapping[str, Sequence[Sequence[Row]]], title: str = "", *, minutes: bool = False) -> Figure:
    """Draw the scores of several runs against agent steps or epochs: a line per group, the mean of its runs in a band.

    The band reaches from the lowest run to the highest. Runs are evaluated at different agent steps, so their
    scores are interpolated, where all runs of the group have data (:func:`mean_and_band`).

    Args:
        groups: by name, such as an algorithm's, the rows of ``progress.csv`` of each of its runs; keys
            ``agent_steps`` (of agents) or ``epoch`` (of classifiers), ``score`` and, for ``minutes``, ``seconds``.
        title: drawn above.
        minutes: draw them against minutes of training too, where all runs know them.
    """
    runs = [rows for group in groups.values() for rows in group]
    images = any("epoch" in row for rows in runs for row in rows)
    units = [("epoch", 1.0, "epochs") if images else ("agent_steps", 1.0, "agent steps")]
    units += [("seconds", 60.0, "minutes of training")] if minutes else []
    units = [u for u in units if all(row.get(u[0]) is not None for rows in runs for row in rows)]
    figure, axes = _figure(len(units), 11 if len(units) > 1 else 6, 3.6)
    for ax, (key, unit, label) in zip(axes, units, strict=True):
        for i, (name, group) in enumerate(groups.items()):
            style: dict[str, Any] = {
                "color": _CURVES[i % len(_CURVES)],
                "linestyle": _STYLES[i // len(_CURVES) % len(_STYLES)],
            }
            _draw_group(ax, name, [_points(rows, key, unit) for rows in group if rows], style)
        ax.set_xlim(left=0)
        ax.set_xlabel(label)
        ax.set_ylabel("validation accuracy (%)" if images else "return per episode, greedy")
        if key == "agent_steps":
            _steps_in_thousands(ax)
    if any(runs):
        handles, names = axes[0].get_legend_handles_labels()
        if max(map(len, names), default=0) > _LONG_NAME:  # it would lie on the curves
            figure.legend(handles, names, frameon=False, loc="outside upper left", title=title, alignment="left")
            return figure
        axes[0].legend(frameon=False, loc="best")
    return _entitled(figure, title)


def _points(rows: Sequence[Row], key: str, unit: float) -> list[tuple[float, float]]:
    """Return the scores of a run against one of its columns; epochs, which every stage counts anew, all together."""
    if key == "epoch":
        return [(i + 1, row["score"]) for i, row in enumerate(rows)]
    return [(row[key] / unit, row["score"]) for row in rows]


def _draw_group(ax: Axes, name: str, runs: Sequence[Sequence[tuple[float, float]]], style: Mapping[str, Any]) -> None:
    """Draw the points of a group's runs as one line with its band, or one by one where they have nothing in common."""
    if not runs:
        return
    x, mean, low, high = mean_and_band(runs)
    if len(x) < 2 and len(runs) > 1:
        for i, points in enumerate(runs):
            ax.plot(*zip(*points, strict=True), linewidth=1.5, label=f"{name}, one by one" if not i else None, **style)
        return
    ax.plot(x, mean, linewidth=1.5, marker="o" if len(x) <= _FEW_POINTS else None, markersize=3, label=name, **style)
    if len(runs) > 1:
        ax.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def mean_and_band(
    runs: Sequence[Sequence[tuple[float, float]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return where several curves are all known, and there their mean, lowest and highest value.

    Args:
        runs: points (x, y) of each curve, in the order of x, at least one; straight lines lie between them.

    Returns:
        x, mean, low, high, of equal length: every x of any curve from the latest first to the earliest last x.
        Empty where no x is in all curves' range.
    """
    import numpy as np

    begin, end = max(points[0][0] for points in runs), min(points[-1][0] for points in runs)
    x = sorted({at for points in runs for at, _ in points if begin <= at <= end})
    y = np.array([np.interp(x, [p[0] for p in points], [p[1] for p in points]) for points in runs])
    return x, y.mean(0).tolist(), y.min(0).tolist(), y.max(0).tolist()


def learning_curve(rows: Sequence[Row], title: str = "") -> Figure:
    """Draw the score of one run against agent steps, with the stages of temporal pruning marked.

    Args:
        rows: rows of ``progress.csv``; keys ``agent_steps``, ``timesteps``, ``score`` (greedy evaluation) and
            ``train_return`` (None where no episode ended yet).
        title: drawn above.
    """
    figure, (ax,) = _figure(1, 8, 4)
    steps = [r["agent_steps"] for r in rows]
    ax.plot(steps, [r["score"] for r in rows], color=_BLUE, marker="o", markersize=3, label="greedy evaluation")
    trained = [(r["agent_steps"], r["train_return"]) for r in rows if r["train_return"] is not None]
    if trained:
        ax.plot(*zip(*trained, strict=True), color=_ORANGE, alpha=0.8, label="training episodes")
    if rows:
        _mark_stages(ax, steps, [_stage_of(r) for r in rows])
    ax.set_xlim(left=0)
    ax.set_xlabel("agent steps")
    ax.set_ylabel("return per episode")
    _steps_in_thousands(ax)
    ax.legend(frameon=False, loc="best")
    if title:
        ax.set_title(title, loc="left", pad=18)
    return figure


def _steps_in_thousands(ax: Axes) -> None:
    """Write the ticks of agent steps as 50k or 1.5M."""
    ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1000:g}k" if x else "0")


def accuracy_curve(rows: Sequence[Row], title: str = "") -> Figure:
    """Draw a classifier's validation accuracy against its epochs, with the stages marked.

    Args:
        rows: rows of ``progress.csv``; keys ``timesteps`` (None: the ReLU network), ``on_rates`` where a network
            learned on firing rates first, and ``score``, in percent.
        title: drawn above.
    """
    figure, (ax,) = _figure(1, 8, 4)
    epochs = list(range(1, 1 + len(rows)))
    ax.plot(epochs, [r["score"] for r in rows], color=_BLUE, marker="o", markersize=3)
    if rows:
        _mark_stages(ax, epochs, [_stage_of(r) for r in rows])
    ax.set_xlim(left=0)
    ax.set_xlabel("epochs")
    ax.set_ylabel("validation accuracy (%)")
    if title:
        ax.set_title(title, loc="left", pad=18)
    return figure


def _stage_of(row: Row) -> str:
    """Return what is written above the stage of a row of ``progress.csv``."""
    if row["timesteps"] is None:
        return _RELU
    return "rates" if row.get("on_rates") else f"T={row['timesteps']}"


def _mark_stages(ax: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Draw a line where the stage changes and write its name above each.

    Args:
        ax: to draw on.
        places: of the measurements on the horizontal axis.
        names: of each measurement's stage.
    """
    edges = [0.0] + [place for place, (a, b) in zip(places, pairwise(names), strict=False) if a != b]
    stages = list(dict.fromkeys(names))
    if stages == [_RELU]:
        return
    ends = [*edges[1:], places[-1]]
    for edge in edges[1:]:
        ax.axvline(edge, color=_GREY, linestyle="--", linewidth=0.8)
    for left, right, stage in zip(edges, ends, stages, strict=False):
        ax.annotate(
            stage,
            ((left + right) / 2, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            color="#4a5568",
            fontsize=9,
        )


def continuum(rows: Sequence[Row], title: str = "") -> Figure:
    """Draw score, spike rate and energy against T, one point per row and the mean over seeds.

    Args:
        rows: result rows with ``timesteps``, ``mean_return`` and ``ci95`` (of classifiers ``top1`` instead),
            ``spike_rate`` (by layer) and ``energy_ratio``; rows with ``timesteps`` None (the ReLU control) are
            a dashed line, those of a ``method`` with one T only crosses.
        title: drawn above.
    """
    figure, axes = _figure(3, 11, 3.6)
    spiking = [r for r in rows if r["timesteps"] is not None]
    score, meaning = ("top1", "test accuracy (%)") if "top1" in rows[0] else ("mean_return", "return per episode")
    control = [r[score] for r in rows if r["timesteps"] is None]
    order = sorted({r["timesteps"] for r in spiking}, reverse=True)
    methods = list(dict.fromkeys(r.get("method", "pruned") for r in spiking))
    # Lines stand on the ticks, single points beside them.
    methods.sort(key=lambda m: -len({r["timesteps"] for r in spiking if r.get("method", "pruned") == m}))
    series: dict[str, Callable[[Row], float]] = {
        meaning: lambda r: float(r[score]),
        "spikes per neuron per timestep": lambda r: _mean(list(r["spike_rate"].values())),
        "energy: ANN / SNN": lambda r: float(r["energy_ratio"]),
    }
    for ax, (label, value) in zip(axes, series.items(), strict=True):
        for i, method in enumerate(methods):
            own = [r for r in spiking if r.get("method", "pruned") == method]
            colour = _METHOD_COLOURS[i % len(_METHOD_COLOURS)]
            name = _METHODS.get(method, method)
            stages = [t for t in order if any(r["timesteps"] == t for r in own)]
            at = [order.index(r["timesteps"]) + 0.12 * i for r in own]  # beside, not under, the others
            if len(stages) < 2 and len(methods) > 1:
                ax.scatter(at, [value(r) for r in own], color=colour, marker="x", s=24, label=name)
                continue
            x = [order.index(t) + 0.12 * i for t in stages]
            means = [_mean([value(r) for r in own if r["timesteps"] == t]) for t in stages]
            ax.plot(x, means, color=colour, marker="o", markersize=4, label=name)
            if len(own) > len(stages):
                ax.scatter(at, [value(r) for r in own], color=colour, alpha=0.35, s=16)
            elif label == "return per episode":
                ax.errorbar(at, [value(r) for r in own], [r["ci95"] for r in own], color=colour, capsize=3, fmt="none")
        ax.set_xticks(range(len(order)), [str(t) for t in order])
        ax.set_xlabel("timesteps T")
        ax.set_ylabel(label)
        if label == "test accuracy (%)":  # points matter, not the distance from 0
            low = min([value(r) for r in spiking] + control)
            ax.set_ylim(max(0.0, low - 5), min(100.0, max([value(r) for r in spiking] + control) + 2))
        elif min((value(r) for r in spiking), default=-1) >= 0:
            ax.set_ylim(0, ax.get_ylim()[1] * 1.08)
    if control:
        axes[0].axhline(_mean(control), color=_ORANGE, linestyle="--", linewidth=1, label="ReLU network")
    if control or len(methods) > 1:
        axes[0].legend(frameon=False, loc="lower left")
    axes[2].set_ylim(top=max(axes[2].get_ylim()[1], 1.12))  # with room for what stands above the line at 1
    axes[2].axhline(1, color=_ORANGE, linestyle="--", linewidth=1)
    axes[2].annotate(
        "ReLU network", (1, 1), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=_ORANGE, fontsize=8
    )
    return _entitled(figure, title)


def early_exit(rows: Sequence[Row], title: str = "") -> Figure:
    """Draw score and energy against the mean number of timesteps that decisions took.

    Args:
        rows: ``mean_timesteps``, ``energy_ratio``, and ``mean_return`` with ``ci95`` or ``top1``; the row with
            ``margin`` None took all timesteps and is a dashed line.
        title: drawn above.
    """
    figure, axes = _figure(2, 9, 3.6)
    score, meaning = ("top1", "test accuracy (%)") if "top1" in rows[0] else ("mean_return", "return per episode")
    early = sorted((r for r in rows if r["margin"] is not None), key=lambda r: r["mean_timesteps"])
    for ax, (key, label) in zip(axes, ((score, meaning), ("energy_ratio", "energy: ANN / SNN")), strict=True):
        x, y = [r["mean_timesteps"] for r in early], [r[key] for r in early]
        ax.plot(x, y, color=_BLUE, marker="o", markersize=4, label="early exit")
        if key == "mean_return":
            ax.errorbar(x, y, [r["ci95"] for r in early], color=_BLUE, capsize=3, fmt="none")
        for row in rows:
            if row["margin"] is None:
                ax.axhline(row[key], color=_ORANGE, linestyle="--", linewidth=1, label="all timesteps")
        ax.set_xlabel("mean timesteps per decision")
        ax.set_ylabel(label)
    axes[0].legend(frameon=False, loc="best")
    return _entitled(figure, title)


_METHODS = {
    "pruned": "pruned step by step",
    "stateful": "pruned, stateful",
    "stateless": "stateless",
    "direct": "trained directly",
    "converted": "T=1 from the ReLU network",
    "rescaled": "pruned, leaks follow T",
    "fixed-leak": "pruned, leaks kept",
    "one-leak": "one leak per layer",
    "single-spike": "single spikes",
    "single-spike-0.2": "single spikes, kappa 0.2",
    "single-spike-1": "single spikes, kappa 1",
}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
