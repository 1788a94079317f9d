"""A rolling spike raster, drawn as a picture beside a video frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
_PAPER, _INK, _FAINT = (250, 250, 250), (45, 55, 72), (226, 232, 240)
_COLOURS = [(43, 108, 176), (221, 107, 32), (47, 133, 90), (128, 90, 213)]
_DOT = 3  # pixels per spike, in both directions: single pixels vanish in a compressed video
_MARGIN = 12
_LABEL, _GAP = 18, 8  # above and below the dots of a layer
_HEAD = 48  # the captions


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
        self.columns = (width - 2 * _MARGIN) // _DOT
        room = (height - _HEAD) // max(1, len(layers)) - _LABEL - _GAP
        self._history: dict[str, NDArray[np.bool_]] = {}
        self._shown: dict[str, NDArray[np.int64]] = {}
        self._rates: dict[str, float] = {}
        for name, neurons in layers.items():
            rows = max(1, min(neurons, room // _DOT))
            self._shown[name] = np.linspace(0, neurons - 1, rows).astype(np.int64)
            self._history[name] = np.zeros((rows, self.columns), dtype=bool)

    def push(self, layer: str, spikes: NDArray[np.generic]) -> None:
        """Add the spikes of one decision, ``(T, N)``, at the right edge."""
        shown = np.asarray(spikes, dtype=bool)[:, self._shown[layer]].T
        self._history[layer] = np.concatenate([self._history[layer], shown], axis=1)[:, -self.columns :]
        self._rates[layer] = float(np.mean(np.asarray(spikes, dtype=bool)))

    def draw(self, captions: Sequence[str] = ()) -> Picture:
        """Return the picture ``(height, width, 3)`` with up to two lines of text above."""
        height, width = self.size
        image = Image.new("RGB", (width, height), _PAPER)
        draw = ImageDraw.Draw(image)
        large, small = ImageFont.load_default(size=15), ImageFont.load_default(size=13)
        for i, caption in enumerate(captions[:2]):
            draw.text((_MARGIN, 6 + i * 20), caption, fill=_INK, font=large if i == 0 else small)
        top = _HEAD
        for i, (name, history) in enumerate(self._history.items()):
            colour = _COLOURS[i % len(_COLOURS)]
            label = f"{name}: {self._rates.get(name, 0.0):.2f} spikes per neuron per timestep"
            draw.text((_MARGIN, top), label, fill=_INK, font=small)
            top += _LABEL
            dots = np.full((*history.shape, 3), 255, dtype=np.uint8)
            dots[history] = colour
            grown = Image.fromarray(dots.repeat(_DOT, axis=0).repeat(_DOT, axis=1))
            image.paste(grown, (_MARGIN, top))
            box = (_MARGIN - 1, top - 1, _MARGIN + grown.width, top + grown.height)
            draw.rectangle(box, outline=_FAINT)
            top += grown.height + _GAP
        return np.asarray(image)
