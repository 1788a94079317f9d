"""The figure of the speed benchmark: every library against the ReLU network, with the limit as a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spiking_rl.scripts.speed.variants import LIMIT, OURS, RELU

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _GREY, _RED = "#2b6cb0", "#a0aec0", "#c53030"
_TITLES = {"nature_cnn": "Nature-CNN", "vgg16": "VGG16"}
_COLUMNS = 2


def drawn_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that :func:`speed_figure` draws."""
    return [row for row in rows if row.get("ratio_quartiles") and row["timesteps"]]


def speed_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a panel per case and T: bars of time as multiples of the ReLU network's, and the limit.

    Args:
        rows: of the benchmark; those without a limit are not drawn. Whiskers are the quartiles over rounds.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in drawn_rows(rows):
        panels.setdefault((row["case"], row["timesteps"], row.get("device", "cpu")), []).append(row)
    lines = max(1, -(-len(panels) // _COLUMNS))
    figure = Figure(figsize=(10, 2.3 * lines + 0.4), layout="constrained")
    for i, members in enumerate(panels.values()):
        ax = figure.add_subplot(lines, _COLUMNS, i + 1)
        _panel(ax, members)
        if i + _COLUMNS >= len(panels):
            ax.set_xlabel("time, multiples of the ReLU network", fontsize=9)
    return figure


def _panel(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    bars = [row for row in rows if row["library"] not in (LIMIT, RELU)]
    limit = next(row["ratio_to_relu"] for row in rows if row["library"] == LIMIT)
    for y, row in enumerate(bars):
        colour = _BLUE if row["library"].startswith(OURS) else _GREY
        ax.barh(y, row["ratio_to_relu"], color=colour, height=0.7)
        low, high = row["ratio_quartiles"]
        ax.plot([low, high], [y, y], color="#1a202c", linewidth=1.2)
        text = ax.text(max(high, row["ratio_to_relu"]), y, f" {row['ratio_to_relu']:.2f}", va="center", fontsize=8)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # the limit's line may run behind it
    ax.axvline(limit, color=_RED, linewidth=1.2)
    ax.text(limit, -0.75, f" dense layers {limit:.2f}", color=_RED, fontsize=8, ha="left", va="center")
    ax.set_yticks(range(len(bars)), [row["library"] for row in bars])
    ax.set_ylim(len(bars) - 0.4, -1.1)
    ax.set_xlim(0, 1.15 * max([limit, *(row["ratio_quartiles"][1] for row in bars)]))
    ax.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    name = _TITLES.get(first["network"], first["network"])
    where = "" if first.get("device", "cpu") == "cpu" else f", {first['device']}"
    title = f"{name}, {first['pass']}, batch {first['batch']}, T={first['timesteps']}{where}"
    ax.set_title(title, fontsize=9, loc="left")
    ax.tick_params(labelsize=8)
