"""Line charts as inline SVG: drawn in the page's own colours, so that they stay legible in the dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import count

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 86, 12, 26, 46
_COLOURS = 6  # beyond them lines are dashed, each round in its own way
_LARGEST = 1e100
_WHOLE_STEPS = (1, 2, 4, 5, 10)  # epochs and agent steps are counted
_DASHES = ("", "6 4", "2 4", "10 3 2 3")
_ids = count(1)

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend.
        points: (x, y), in the order of x.
        low: lower ends of the intervals, one per point; empty for none.
        high: upper ends of the intervals.
        dashed: drawn so; a control.
    """

    name: str
    points: Sequence[Point]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False


def chart(
    title: str,
    across: str,
    up: str,
    lines: Sequence[Line],
    *,
    marks: Sequence[tuple[float, str]] = (),
    ticks: Sequence[tuple[float, str]] = (),
) -> str:
    """Return a figure with its legend as HTML.

    Points that are no number, or beyond all measure, are left out: a run that went wrong shall still be seen.

    Args:
        title: what is shown, for the caption and for those who do not see the chart.
        across: meaning and unit of x.
        up: meaning and unit of y.
        lines: to draw; those without points are left out.
        marks: (x, text) of vertical lines.
        ticks: (x, text) on the horizontal axis; none: round numbers.
    """
    lines = [line for line in map(_drawable, lines) if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [v for line in lines for v in (*(y for _, y in line.points), *line.low, *line.high)]
    across_ticks = list(ticks) or [(v, _short(v)) for v in _round_numbers(min(0.0, min(xs)), max(xs), _WHOLE_STEPS)]
    up_ticks = _round_numbers(min(ys), max(ys))
    left, right = min(across_ticks)[0], max(max(xs), across_ticks[0][0])
    across_ticks = [tick for tick in across_ticks if tick[0] <= right]  # no room for what was not reached
    if ticks:
        left, right = left - 0.15, right + 0.15
    place = _Scale(left, right, up_ticks[0], up_ticks[-1])
    number = next(_ids)
    facts = "; ".join(f"{line.name}: {_short(line.points[0][1])} to {_short(line.points[-1][1])}" for line in lines)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="t{number} d{number}">',
        f'<title id="t{number}">{escape(title)}</title>',
        f'<desc id="d{number}">{escape(f"{up} against {across}, first to last: {facts}")}</desc>',
    ]
    for value in up_ticks:
        y = place.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for value, text in across_ticks:
        y = _HEIGHT - _BOTTOM + 18
        parts.append(f'<text x="{place.x(value)}" y="{y}" text-anchor="middle">{escape(text)}</text>')
    for value, text in marks:
        x = place.x(value)
        parts.append(f'<path class="mark" d="M{x} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x + 3:.1f}" y="{_TOP - 8}">{escape(text)}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>')
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(up)}</text>'
    )
    for i, line in enumerate(lines):
        parts.extend(_draw(line, i, place))
    legend = "".join(
        f'<li class="c{i % _COLOURS}">{_sample(line, i)}{escape(line.name)}</li>' for i, line in enumerate(lines)
    )
    return (
        f"<figure>{''.join(parts)}</svg>"
        f'<figcaption>{escape(title)}</figcaption><ul class="legend">{legend}</ul></figure>'
    )


@dataclass(frozen=True)
class _Scale:
    left: float
    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        part = (value - self.left) / ((self.right - self.left) or 1)
        return round(_LEFT + part * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        part = (value - self.low) / ((self.high - self.low) or 1)
        return round(_HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM), 1)


def _drawable(line: Line) -> Line:
    """Return a line without what cannot be drawn; without its band where that cannot be."""
    kept = [i for i, point in enumerate(line.points) if all(abs(v) < _LARGEST for v in point)]
    band = [v for ends in (line.low, line.high) for v in ends]
    if len(kept) < len(line.points) or not all(abs(v) < _LARGEST for v in band):
        return replace(line, points=[line.points[i] for i in kept], low=(), high=())
    return line


def _dashes(line: Line, number: int) -> str:
    pattern = _DASHES[(number // _COLOURS + line.dashed) % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _sample(line: Line, number: int) -> str:
    """Return a piece of the line, for the legend."""
    dashes = _dashes(line, number)
    return f'<svg class="sample" viewBox="0 0 26 4" aria-hidden="true"><path class="line" d="M0 2H26"{dashes}/></svg>'


def _draw(line: Line, number: int, place: _Scale) -> list[str]:
    colour, dashes = number % _COLOURS, _dashes(line, number)
    at = [(place.x(x), place.y(y)) for x, y in line.points]
    parts = []
    if line.low:
        upper = [f"{x},{place.y(high)}" for (x, _), high in zip(at, line.high, strict=True)]
        lower = [f"{x},{place.y(low)}" for (x, _), low in zip(at, line.low, strict=True)]
        parts.append(f'<polygon class="band c{colour}" points="{" ".join([*upper, *reversed(lower)])}"/>')
    points = " ".join(f"{x},{y}" for x, y in at)
    parts.append(f'<polyline class="line c{colour}"{dashes} points="{points}"/>')
    if len(at) <= 60 and not line.dashed:
        parts += [f'<circle class="dot c{colour}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in at]
    return parts


def _round_numbers(low: float, high: float, steps: Sequence[float] = (1, 2, 2.5, 5, 10)) -> list[float]:
    """Return round numbers from at most ``low`` to at least ``high``, one of ``steps`` times a power of ten apart."""
    if high <= low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in steps if power * m >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _short(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}"
