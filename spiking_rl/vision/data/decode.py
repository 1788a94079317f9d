"""From encoded images to pixels: decoding, cropping, scaling."""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from spiking_rl.errors import UserError
from spiking_rl.vision.data.sources import ImageSource

# No others: Pillow hands some formats to outside programs, and these files may be anybody's.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MOST_PIXELS = 80_000_000  # a few bytes may stand for any number; ImageNet's largest photograph has 61 million
_BEHIND = (128, 128, 128, 255)
_SMALLEST_AREA = 0.08  # of a random crop, as a share of the image; with the aspect ratio, Szegedy et al. 2014
_WIDEST_RATIO = 4 / 3
_TRIES = 10
_SHORT_SIDE = 256 / 224  # of an evaluated image before its centre is cut out
_LONGEST = 8  # sides in a side of an evaluated image; what is beyond is cut off first


def decode(raw: bytes, name: str, *, upright: bool = False) -> Image.Image:
    """Decode PNG, JPEG, WebP or BMP to RGB.

    Args:
        raw: the file's bytes.
        name: for the message.
        upright: turn pictures as their camera says; ImageNet's are trained on as they lie in their files.

    Raises:
        UserError: it is none of these, or damaged; the message has ``name``.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=_FORMATS) as image:
            if math.prod(image.size) > _MOST_PIXELS:
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are more than {_MOST_PIXELS:,}")
            picture = ImageOps.exif_transpose(image) if upright else image
            return _opaque(_eight_bits(picture))
    except Exception as error:  # damaged bytes raise many types: OSError, SyntaxError, ValueError, struct.error ...
        reason = "no PNG, JPEG, WebP or BMP" if isinstance(error, UnidentifiedImageError) else error
        raise UserError("data", name, f"cannot be decoded ({reason}); replace or remove it") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return shades of 16 bits in 8, which Pillow would cut off at white."""
    if not image.mode.startswith("I"):
        return image
    shades = np.asarray(image).astype(np.int64)
    return Image.fromarray((shades.clip(0, 65535) // 257).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """Return RGB; what is transparent shows mid-grey, on which black shapes and white ones stay what they are."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, _BEHIND), shown).convert("RGB")


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return ``(3, H, W)`` uint8."""
    return np.asarray(image).transpose(2, 0, 1)


def fit(image: Image.Image, size: int, name: str) -> Image.Image:
    """Cut out the largest centred square and scale it down to ``size`` x ``size``; that size is left as it is.

    Raises:
        UserError: the image is smaller.
    """
    width, height = image.size
    side = min(width, height)
    if side < size:
        raise UserError(
            "data", name, f"is {width} x {height} pixels, smaller than the size {size}; choose a smaller size"
        )
    if width == height == size:
        return image
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BILINEAR)


def decode_all(source: ImageSource, size: int, title: str) -> Tensor:
    """Decode a whole split in threads, with a progress bar on a terminal.

    Args:
        source: N images.
        size: side, in pixels; larger images are scaled down.
        title: stands before the bar.

    Returns:
        ``(N, 3, size, size)`` uint8.

    Raises:
        UserError: an image is damaged or too small.
    """
    total = len(source.labels)
    out = np.empty((total, 3, size, size), np.uint8)

    def fill(group: int) -> int:
        images = source.read(group)
        for index, raw in enumerate(images, int(source.bounds[group])):
            name = source.name(index)
            out[index] = pixels(fit(decode(raw, name, upright=True), size, name))
        return len(images)

    with (
        tqdm(total=total, desc=title, unit=" images", leave=False, disable=None) as bar,
        ThreadPoolExecutor(torch.get_num_threads()) as pool,
    ):
        for done in pool.map(fill, range(len(source.bounds) - 1)):
            bar.update(done)
    return torch.from_numpy(out)


def random_crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the part of an image to train on (Szegedy et al. 2014): 8 to 100 % of its area, ratio 3/4 to 4/3.

    Returns:
        left, top, right, bottom in pixels, inside the image. Where ten draws do not fit (very long images),
        the centre with the nearest allowed ratio.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(_SMALLEST_AREA, 1)
        ratio = math.exp(rng.uniform(-math.log(_WIDEST_RATIO), math.log(_WIDEST_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * _WIDEST_RATIO)))
    h = min(height, max(1, round(width * _WIDEST_RATIO)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_resized_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Scale a random part of an image to ``size`` x ``size``, mirrored half of the time."""
    part = image.crop(random_crop_box(*image.size, rng))  # resize's own box would mix in what lies around it
    cropped = part.resize((size, size), Image.Resampling.BILINEAR)
    return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cropped


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side to 256/224 of ``size``, then cut out the centred ``size`` x ``size``."""
    if max(image.size) > _LONGEST * min(image.size):  # scaled up first, a strip of pixels would take gigabytes
        short = min(image.size)
        width, height = (min(side, _LONGEST * short) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    width, height = image.size
    scale = round(size * _SHORT_SIDE) / min(width, height)
    width, height = round(width * scale), round(height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size, top + size))
