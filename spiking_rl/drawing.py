"""What the pictures beside a video frame share: colours, sizes, text, scales, and how they are put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
"""RGB, ``(height, width, 3)``."""

Colour = tuple[int, int, int]
PAPER, INK, FAINT, GREY = (250, 250, 250), (45, 55, 72), (226, 232, 240), (160, 174, 192)
COLOURS: Sequence[Colour] = ((43, 108, 176), (221, 107, 32), (47, 133, 90), (128, 90, 213))
STEP = 4  # pixels per timestep: a video has half the colours' resolution, and an odd step makes it twice as large
ROW = 3  # pixels per row of spikes: single pixels vanish in a compressed video
MARGIN = 12


def colour_of(index: int) -> Colour:
    """Return the colour of the layer with this index; they repeat after the fourth."""
    return COLOURS[index % len(COLOURS)]


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, read once per size."""
    return ImageFont.load_default(size=size)


def blank(height: int, width: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return an empty picture and a pen for it."""
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def write(image: Image.Image, at: tuple[int, int], text: str, size: int, align: str = "left") -> None:
    """Write one line of text, as tall as its font, with its upper corner at ``at``.

    Args:
        image: is changed.
        at: x and y, in pixels.
        text: of one line.
        size: of the font.
        align: ``left`` or ``right``: which of its upper corners lies there.
    """
    letters = _letters(text, size)
    x, y = at
    image.paste(INK, (x - letters.width if align == "right" else x, y), letters)


@lru_cache(maxsize=1024)
def _letters(text: str, size: int) -> Image.Image:
    """Return a text as a mask: pictures repeat their texts, and drawing letters takes longer than all else."""
    width, height = math.ceil(font(size).getlength(text)) + 1, size + math.ceil(size / 3)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font(size))
    return mask


@lru_cache(maxsize=256)
def fitted(text: str, width: int, size: int) -> str:
    """Return a text, cut with three dots where it is wider than ``width`` pixels in the font of this size."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def rounded_range(low: float, high: float) -> tuple[float, float]:
    """Return a range around ``[low, high]`` whose ends are multiples of 1, 2 or 5 times a power of ten.

    Args:
        low: finite, below ``high``.
        high: finite.
    """
    part = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(part))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= part * (1 - 1e-9))
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def widened(scale: tuple[float, float], values: NDArray[np.float64]) -> tuple[float, float]:
    """Return a scale as it is where it holds all values (those that are no number aside), else a wider one."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min(initial=scale[0])), float(finite.max(initial=scale[1]))
    return scale if (low, high) == scale else rounded_range(low, high)


def beside(left: Picture, right: Picture) -> Picture:
    """Return two pictures side by side; the lower one stands at the top, with paper under it."""
    height = max(left.shape[0], right.shape[0])
    return np.concatenate([_on_paper(p, height, p.shape[1]) for p in (left, right)], axis=1)


def stacked(upper: Picture, lower: Picture) -> Picture:
    """Return two pictures, one above the other; the narrower one stands in the middle of its paper."""
    width = max(upper.shape[1], lower.shape[1])
    return np.concatenate([_on_paper(p, p.shape[0], width) for p in (upper, lower)], axis=0)


def _on_paper(picture: Picture, height: int, width: int) -> Picture:
    if picture.shape[:2] == (height, width):
        return picture
    paper = np.full((height, width, 3), PAPER, dtype=np.uint8)
    left = (width - picture.shape[1]) // 2
    paper[: picture.shape[0], left : left + picture.shape[1]] = picture
    return paper
