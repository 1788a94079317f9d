"""Membrane traces and bars of action values, drawn as pictures for a video."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from spiking_rl.drawing import (
    COLOURS,
    FAINT,
    GREY,
    MARGIN,
    STEP,
    Colour,
    Picture,
    blank,
    fitted,
    font,
    rounded_range,
    widened,
    write,
)

_SMALL, _TEXT, _LARGE = 12, 13, 15  # sizes of the font
_LABEL, _TICK, _TRACE, _GAP = 17, 7, 40, 8  # pixels: label of a trace, spikes, line, space below
_CAPTIONS, _HEAD, _LINE, _THIN_LINE = 46, 18, 21, 14  # pixels: captions, scale of the bars, a bar's line
_BARS, _WIDE_BARS = 24, 8  # so many bars are drawn at most; so many have a wide line each


class MembraneTraces:
    """Draws a rolling line per neuron: its membrane potential before reset, in units of its threshold.

    Time runs to the right with as many pixels per timestep as in :class:`spiking_rl.raster.SpikeRaster`. A thin
    line lies at the threshold, 1; a tick above the line marks a spike. Each scale begins with 0 and the threshold
    and only grows.

    Args:
        labels: name of each of the K neurons.
        colours: of each.
        width: of the picture, in pixels.
    """

    def __init__(self, labels: Sequence[str], colours: Sequence[Colour], width: int = 360) -> None:
        self.labels, self.colours, self.width = list(labels), list(colours), width
        self.columns = (width - 2 * MARGIN) // STEP
        self.height = len(self.labels) * (_LABEL + _TICK + _TRACE + _GAP) + _GAP
        self._potentials = np.full((len(self.labels), self.columns), np.nan)
        self._spikes = np.zeros((len(self.labels), self.columns), dtype=bool)
        self._opens = np.zeros(self.columns, dtype=bool)
        self._scales = [(0.0, 1.5)] * len(self.labels)

    def push(self, potentials: NDArray[np.generic], spikes: NDArray[np.generic], fresh: bool = False) -> None:
        """Add one decision at the right edge.

        Args:
            potentials: ``(T, K)``, over the threshold.
            spikes: ``(T, K)``, non-zero where a neuron fired.
            fresh: the membranes began at rest: the line does not come from the decision before.
        """
        new = np.asarray(potentials, dtype=float)
        opens = np.zeros(len(new), dtype=bool)
        opens[:1] = fresh
        self._potentials = np.concatenate([self._potentials, new.T], axis=1)[:, -self.columns :]
        self._spikes = np.concatenate([self._spikes, np.asarray(spikes, dtype=bool).T], axis=1)[:, -self.columns :]
        self._opens = np.concatenate([self._opens, opens])[-self.columns :]
        self._scales = [widened(scale, values) for scale, values in zip(self._scales, new.T, strict=True)]

    def draw(self) -> Picture:
        """Return the picture ``(height, width, 3)``."""
        image, pen = blank(self.height, self.width)
        right = MARGIN + self.columns * STEP
        top = 0
        for k, (label, colour) in enumerate(zip(self.labels, self.colours, strict=True)):
            low, high = self._scales[k]
            write(image, (MARGIN, top), f"{label}: membrane over threshold", _TEXT)
            write(image, (right, top + 1), f"{low:g} to {high:g}", _SMALL, "right")
            top += _LABEL
            bottom = top + _TICK + _TRACE
            pen.rectangle((MARGIN - 1, top - 1, right, bottom), fill=(255, 255, 255), outline=FAINT)
            rows = bottom - 2 - (self._potentials[k] - low) / (high - low) * (_TRACE - 3)
            threshold = round(bottom - 2 - (1 - low) / (high - low) * (_TRACE - 3))
            pen.line((MARGIN, threshold, right - 1, threshold), fill=GREY)
            for line in self._lines(rows):
                pen.line(line, fill=colour, width=2, joint="curve")
            for column in np.flatnonzero(self._spikes[k]):
                left = MARGIN + int(column) * STEP
                pen.rectangle((left, top, left + STEP - 3, top + _TICK - 2), fill=colour)
            top = bottom + _GAP
        return np.asarray(image)

    def _lines(self, rows: NDArray[np.float64]) -> list[list[tuple[float, float]]]:
        """Return the pieces of a line as points (x, y): it is broken at fresh membranes and at what is no number."""
        lines: list[list[tuple[float, float]]] = []
        broken = True
        for column in range(self.columns):
            row = float(rows[column])
            if not math.isfinite(row):
                broken = True
                continue
            if broken or self._opens[column]:
                lines.append([(MARGIN + column * STEP, row)])  # what stands alone is a dash
            broken = False
            lines[-1].append((MARGIN + column * STEP + STEP - 1, row))
        return lines


class ActionBars:
    """Draws a horizontal bar per action, as long as its value is high on a scale that only ever grows.

    The first 24 actions have a bar.

    Args:
        names: of the A actions.
        width: of the picture, in pixels.
    """

    def __init__(self, names: Sequence[str], width: int) -> None:
        self.width = width
        self._line, self._size = (_LINE, _TEXT) if len(names) <= _WIDE_BARS else (_THIN_LINE, _SMALL)
        self._names = [fitted(name, width // 3, self._size) for name in names[:_BARS]]
        self._more = len(names) - len(self._names)
        self.height = _CAPTIONS + _HEAD + (len(self._names) + bool(self._more)) * self._line + _GAP
        labels = max(font(self._size).getlength(name) for name in [*self._names, "Q-values"])
        self._left = MARGIN + math.ceil(labels) + 10
        self._right = width - MARGIN - math.ceil(font(self._size).getlength("-000.000")) - 6
        self._values = np.full(len(names), np.nan)
        self._action = -1
        self._scale: tuple[float, float] | None = None

    def push(self, values: NDArray[np.generic], action: int) -> None:
        """Take the values of one decision, ``(A,)``, and the index of the action taken."""
        self._values, self._action = np.asarray(values, dtype=float), action
        if self._scale is None and np.isfinite(self._values).any():
            # Wide enough from the first decision on, when all that is known may lie close together.
            seen = self._values[np.isfinite(self._values)]
            room = max(0.05 * float(np.abs(seen).max()), 1e-3)
            self._scale = rounded_range(float(seen.min()) - room, float(seen.max()) + room)
        if self._scale is not None:
            self._scale = widened(self._scale, self._values)

    @property
    def scale(self) -> tuple[float, float]:
        """The values at the two ends of a bar's line."""
        return self._scale or (0.0, 1.0)

    def draw(self, captions: Sequence[str] = ()) -> Picture:
        """Return the picture ``(height, width, 3)``, with up to two lines of text above."""
        image, pen = blank(self.height, self.width)
        for i, (caption, size) in enumerate(zip(captions, (_LARGE, _TEXT), strict=False)):
            write(image, (MARGIN, 4 + i * 20), fitted(caption, self.width - 2 * MARGIN, size), size)
        low, high = self.scale
        left, right, top = self._left, self._right, _CAPTIONS
        write(image, (MARGIN, top), "Q-values", self._size)
        write(image, (left, top + 1), f"{low:g}", _SMALL)
        write(image, (right, top + 1), f"{high:g}", _SMALL, "right")
        top += _HEAD
        decimals = min(4, max(0, 2 - math.floor(math.log10(high - low))))
        for i, (name, value) in enumerate(zip(self._names, self._values, strict=False)):
            text = top + (self._line - self._size) // 2 - 2
            fill = COLOURS[1] if i == self._action else GREY
            write(image, (MARGIN, text), name, self._size)
            box = (left, top + 2, right, top + self._line - 3)
            pen.rectangle(box, fill=FAINT)
            if math.isfinite(value):
                end = left + 2 * round((value - low) / (high - low) * (right - left) / 2)
                pen.rectangle((left, box[1], end, box[3]), fill=fill)
            write(image, (self.width - MARGIN, text), f"{value:.{decimals}f}", self._size, "right")
            top += self._line
        if self._more:
            write(image, (MARGIN, top), f"and {self._more} more actions", self._size)
        return np.asarray(image)
