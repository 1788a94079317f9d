"""A rolling spike raster, drawn as a picture beside a video frame."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spiking_rl.drawing import FAINT, MARGIN, ROW, STEP, Picture, blank, colour_of, write

_LABEL, _GAP = 18, 8  # above and below the dots of a layer
_HEAD = 6  # above the first layer


class SpikeRaster:
    """Draws the latest spikes of each layer: time runs to the right, one row per neuron.

    A layer with more neurons than rows shows evenly spaced ones.

    Args:
        layers: number of neurons by layer name.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
    """

    def __init__(self, layers: Mapping[str, int], height: int, width: int = 360) -> None:
        self.size = (height, width)
        self.columns = (width - 2 * MARGIN) // STEP
        room = (height - _HEAD) // max(1, len(layers)) - _LABEL - _GAP
        self._history: dict[str, NDArray[np.bool_]] = {}
        self._shown: dict[str, NDArray[np.int64]] = {}
        self._rates: dict[str, float] = {}
        for name, neurons in layers.items():
            rows = max(1, min(neurons, room // ROW))
            self._shown[name] = np.linspace(0, neurons - 1, rows).astype(np.int64)
            self._history[name] = np.zeros((rows, self.columns), dtype=bool)

    def push(self, layer: str, spikes: NDArray[np.generic]) -> None:
        """Add the spikes of one decision, ``(T, N)``, at the right edge."""
        shown = np.asarray(spikes, dtype=bool)[:, self._shown[layer]].T
        self._history[layer] = np.concatenate([self._history[layer], shown], axis=1)[:, -self.columns :]
        self._rates[layer] = float(np.mean(np.asarray(spikes, dtype=bool)))

    def draw(self) -> Picture:
        """Return the picture ``(height, width, 3)``."""
        image, pen = blank(*self.size)
        top = _HEAD
        for i, (name, history) in enumerate(self._history.items()):
            label = f"{name}: {self._rates.get(name, 0.0):.2f} spikes per neuron per timestep"
            write(image, (MARGIN, top), label, 13)
            top += _LABEL
            dots = np.full((*history.shape, 3), 255, dtype=np.uint8)
            dots[history] = colour_of(i)
            grown = Image.fromarray(dots.repeat(ROW, axis=0).repeat(STEP, axis=1))
            image.paste(grown, (MARGIN, top))
            box = (MARGIN - 1, top - 1, MARGIN + grown.width, top + grown.height)
            pen.rectangle(box, outline=FAINT)
            top += grown.height + _GAP
        return np.asarray(image)
