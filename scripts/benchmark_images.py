"""How fast images come and go: the pipelines of small sets and of ImageNet against the training that they feed.

python -m spiking_rl.scripts.benchmark_images --output results/images-speed.json
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from spiking_rl.networks import LayeredNetwork
from spiking_rl.provenance import peak_rss_mb
from spiking_rl.registry import build_network
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import write_results
from spiking_rl.vision.data import ImageStream, augment, normalise

DESCRIPTION = """Measure images per second of augmentation, decoding and training, on random pixels.

Example: python -m spiking_rl.scripts.benchmark_images --output results/images-speed.json"""

_IMAGENET = 1_281_167
_MEAN = (0.5, 0.5, 0.5)


@dataclass(kw_only=True)
class Options:
    """How to measure."""

    network: str = "vgg9"
    """Network for images of 32 pixels."""
    width: float = 0.375
    """Its width."""
    batch: int = 128
    """Images of 32 pixels per batch."""
    large_network: str = "vgg16"
    """Network for images of 224 pixels."""
    large_width: float = 1.0
    """Its width."""
    large_batch: int = 8
    """Images of 224 pixels per batch."""
    files: int = 200
    """JPEG files of 500 x 375 pixels, ImageNet's usual size, that are made and decoded."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of processes that decode."""
    rounds: int = 5
    """Timings of everything, after one to warm up."""
    precision: str = "bfloat16"
    """float32 or bfloat16."""
    threads: int = 1
    """Torch threads."""
    output: Path | None = None
    """Results as JSON."""


def main() -> None:
    """Measure, print, write."""
    options = parse(Options, "benchmark_images", sys.argv[1:], DESCRIPTION)
    torch.set_num_threads(options.threads)
    rows = [*_small(options), *_stream(options), *_large(options)]
    for row in rows:
        name = "" if "timesteps" not in row else "ReLU " if row["timesteps"] is None else f"T={row['timesteps']} "
        rest = "".join(f"  {key} {row[key]:g}" for key in ("ratio_to_training", "hours_90_epochs") if key in row)
        print(f"{row['pass']:30} {name}{row['images_per_second']:.1f} images/s{rest}")
    if options.output is not None:
        write_results(options.output, "benchmark_images", rows)


def _small(options: Options) -> Iterator[dict[str, Any]]:
    """Measure what prepares batches of small images, and the training that takes them, turn by turn."""
    images = torch.randint(256, (5_000, 3, 32, 32), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)

    def prepare() -> None:
        rows = torch.randint(len(images), (options.batch,), generator=generator)
        normalise(augment(images[rows], crop=4, flip=True, cutout=8, generator=generator), _MEAN, _MEAN)

    kwargs = {"width": options.width, "batch_norm": True}
    trained: dict[int | None, Callable[[], None]] = {
        t: _training(_network(options.network, 32, 10, t, **kwargs), options.batch, 32, options.precision)
        for t in (None, 1)
    }
    times = _timed({"prepare": prepare, None: trained[None], 1: trained[1]}, options.rounds)
    prepared = options.batch / float(np.median(times["prepare"]))
    for t in (None, 1):
        rate = options.batch / float(np.median(times[t]))
        yield {
            "pass": "training, 32 x 32",
            "network": options.network,
            "width": options.width,
            "precision": options.precision,
            "timesteps": t,
            "batch": options.batch,
            "images_per_second": rate,
        }
        yield {
            "pass": "augmentation, 32 x 32",
            "timesteps": t,
            "batch": options.batch,
            "images_per_second": prepared,
            "ratio_to_training": prepared / rate,
        }


def _stream(options: Options) -> Iterator[dict[str, Any]]:
    """Measure the decoding of ImageNet's usual JPEGs, random crops of 224 pixels included."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "train" / "class"
        place.mkdir(parents=True)
        for k in range(options.files):
            # Smooth pictures: noise would be far larger as JPEG than a photograph is.
            coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{k}.JPEG", quality=95)
        stream = ImageStream(folder, "train")
        for workers in options.workers:
            rates = []
            for number in range(options.rounds + 1):
                start, count = time.perf_counter(), 0
                for images, _ in stream.batches(20, augmented=True, epoch=number, workers=workers):
                    count += len(images)
                rates.append(count / (time.perf_counter() - start))
            yield {
                "pass": "decoding, 500 x 375 to 224",
                "workers": workers,
                "images_per_second": float(np.median(rates[1:])),
            }


def _large(options: Options) -> Iterator[dict[str, Any]]:
    """Measure training at 224 x 224, and tell what a run over ImageNet would take."""
    batch = options.large_batch
    for t in (None, 1):
        network = _network(options.large_network, 224, 1000, t, width=options.large_width)
        step = _training(network, batch, 224, options.precision)
        rate = batch / float(np.median(_timed({"step": step}, max(2, options.rounds // 2))["step"]))
        yield {
            "pass": "training, 224 x 224",
            "network": options.large_network,
            "width": options.large_width,
            "precision": options.precision,
            "timesteps": t,
            "batch": batch,
            "images_per_second": rate,
            "hours_per_epoch": _IMAGENET / rate / 3600,
            "hours_90_epochs": 90 * _IMAGENET / rate / 3600,
            "peak_rss_mb": peak_rss_mb(),
        }


def _network(name: str, side: int, classes: int, timesteps: int | None, **kwargs: Any) -> LayeredNetwork:
    torch.manual_seed(0)
    if timesteps is None:
        return build_network(name, (3, side, side), classes, neuron="relu", **kwargs)
    return build_network(name, (3, side, side), classes, neuron="lif", timesteps=timesteps, **kwargs)


def _training(network: LayeredNetwork, batch: int, side: int, precision: str) -> Callable[[], None]:
    """Return one update on random pixels."""
    network.train()
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(1, batch, 3, side, side)
    labels = torch.zeros(batch, dtype=torch.int64)

    def update() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
            logits, _ = network(images)
            loss = functional.cross_entropy(logits[0].float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    return update


def _timed(jobs: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, list[float]]:
    """Time jobs turn by turn, in seconds, so that a slow moment meets all of them; the first round warms up."""
    times: dict[Any, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    script(main)
