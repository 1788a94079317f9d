"""Score trained classifiers on test images: accuracy, spike rates, energy, and the predicted classes as a file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spiking_rl.checkpoint import WEIGHTS, load_checkpoint, read_json
from spiking_rl.deploy import deploy
from spiking_rl.energy import SpikeCounter, macs_per_layer, measured_energy, membrane_traffic
from spiking_rl.errors import UserError
from spiking_rl.files import write_atomically
from spiking_rl.networks import LayeredNetwork
from spiking_rl.runs import RunFolder
from spiking_rl.vision.building import load_classifier
from spiking_rl.vision.config import ClassifyConfig
from spiking_rl.vision.data import normalise
from spiking_rl.vision.feeding import Images
from spiking_rl.vision.predicting import predict

_GAPS = 500  # images that say what a large gap is
_TIMED, _WARM_UP = 50, 5  # images whose time is measured one by one, and as many before them


def evaluate(
    run: RunFolder, config: ClassifyConfig, images: Images, timesteps: int | None, device: torch.device
) -> dict[str, Any]:
    """Score the kept best of a stage on the test images.

    Args:
        run: a classification run.
        config: its settings.
        images: the data set that it was trained on.
        timesteps: T; None for the ReLU network.
        device: to run on.

    Returns:
        ``dataset, network, width, timesteps, images, top1, spike_rate, energy_ratio, energy_ratio_int32,
        energy_ratio_of_rates, macs, accumulates_per_mac, membrane_traffic, image_ms, deployed_ms, sha256, weights,
        predicted``: accuracy in percent; spikes per neuron and timestep by layer (None for a ReLU network); energy with
        both sets of constants, and as the papers count (:class:`spiking_rl.energy.Energy`); additions per
        multiply-accumulate of the ReLU network behind the first layer, over all timesteps; reads and writes of
        membranes per image; the median time of one image alone, and on the deployed network
        (:func:`spiking_rl.deploy.deploy`; None where there can be none); the checkpoint's weights by their hash; and
        the class of every test image in its order.

    Raises:
        UserError: no such checkpoint, or a damaged one.
    """
    folder = run.checkpoint(timesteps)
    network = load_classifier(folder, config, images).to(device)
    counter = SpikeCounter()
    parts = (predict(network, part, images.mean, images.std, counter) for part, _ in images.test())
    with _float32():
        found = torch.cat(list(parts))
    rates = counter.rates if network.spiking else None
    energy = measured_energy(network, counter)
    return {
        "dataset": config.dataset,
        "network": config.network,
        "width": config.width,
        "timesteps": timesteps,
        "images": len(found),
        "top1": 100 * float((found == images.test_labels).float().mean()),
        "spike_rate": rates,
        "energy_ratio": energy.ratio,
        "energy_ratio_int32": energy.ratio_int32,
        "energy_ratio_of_rates": energy.ratio_of_rates,
        "macs": sum(macs_per_layer(network)),
        "accumulates_per_mac": energy.accumulates_per_mac,
        "membrane_traffic": membrane_traffic(network),
        "image_ms": _image_ms(network, images),
        "deployed_ms": _deployed_ms(network, images),
        "sha256": load_checkpoint(folder).config["sha256"],
        "weights": f"{folder.name}/{WEIGHTS}",
        "predicted": found.tolist(),
    }


@contextmanager
def _float32() -> Iterator[None]:
    """Let GPUs convolve in float32, which by default they round to 10 bits on the way: spikes follow the last ones."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def evaluate_exit(network: LayeredNetwork, images: Images, margin: float) -> dict[str, float]:
    """Score a classifier on the test images that decides as soon as it is clear.

    Args:
        network: with T > 1 timesteps; its exit margin is set for the time being.
        images: the data set.
        margin: see :meth:`spiking_rl.networks.LayeredNetwork.set_exit_margin`.

    Returns:
        ``margin, mean_timesteps, top1, energy_ratio, energy_ratio_int32``.
    """
    before, counter = network.exit_margin, SpikeCounter()
    network.set_exit_margin(margin)
    try:
        parts = (predict(network, part, images.mean, images.std, counter) for part, _ in images.test())
        with _float32():
            found = torch.cat(list(parts))
    finally:
        network.set_exit_margin(before)
    used = counter.timesteps(network, len(found))
    energy = measured_energy(network, counter, used)
    return {
        "margin": margin,
        "mean_timesteps": used,
        "top1": 100 * float((found == images.test_labels).float().mean()),
        "energy_ratio": energy.ratio,
        "energy_ratio_int32": energy.ratio_int32,
    }


@torch.no_grad()
def typical_gap(network: LayeredNetwork, images: Images) -> float:
    """Return the median gap between the two highest outputs on some test images, after all timesteps."""
    some, _ = next(iter(images.test()))
    inputs = normalise(some[:_GAPS].to(next(network.parameters()).device), images.mean, images.std)
    best = network.eval()(inputs.unsqueeze(0))[0][0].topk(2, dim=1).values
    return float((best[:, 0] - best[:, 1]).median())


def _image_ms(network: LayeredNetwork, images: Images) -> float:
    """Return the median time of one image, in milliseconds, its way to the network's device included."""
    return _median_ms(lambda image: predict(network, image, images.mean, images.std), images)


def _deployed_ms(network: LayeredNetwork, images: Images) -> float | None:
    """Return that of the deployed network; None for a ReLU network, or a code."""
    try:
        deployed = deploy(network)
    except UserError:
        return None
    device = next(network.parameters()).device
    return _median_ms(lambda x: deployed(normalise(x.to(device), images.mean, images.std)).argmax(1).cpu(), images)


def _median_ms(classify: Callable[[Tensor], Tensor], images: Images) -> float:
    times = []
    some, _ = next(iter(images.test()))
    for k in range(_TIMED + _WARM_UP):
        start = time.perf_counter()
        classify(some[k % len(some)].unsqueeze(0))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[_WARM_UP:])


def save_predictions(path: Path, rows: list[dict[str, Any]], seed: int) -> None:
    """Write the predicted classes of every T, so that a score can be checked without the weights."""
    names = ("dataset", "network", "timesteps", "top1", "sha256", "predicted")
    kept = [{"seed": seed, **{name: row[name] for name in names}} for row in rows]
    write_atomically(path, json.dumps({"format": "spiking-rl predictions", "rows": kept}) + "\n")


def check_predictions(path: Path, images: Images, dataset: str) -> list[dict[str, Any]]:
    """Count again what a predictions file claims.

    Args:
        path: written by :func:`save_predictions`.
        images: the data set, with its test labels.
        dataset: its name.

    Returns:
        Per row ``timesteps, top1, claimed``: the accuracy counted and the one claimed, in percent.

    Raises:
        UserError: no such file, another data set, a class outside the range, or a claim that is not so.
    """
    loaded = read_json(path, "predictions")
    if loaded.get("format") != "spiking-rl predictions":
        raise UserError("predictions", str(path), "is no file of predicted classes; classify evaluate writes them")
    if not loaded.get("rows", True):
        raise UserError("predictions", str(path), "holds no rows; classify evaluate writes one for every T")
    try:
        return [_checked(path, row, images, dataset) for row in loaded["rows"]]
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("predictions", str(path), f"is damaged ({type(error).__name__}: {error})") from None


def _checked(path: Path, row: dict[str, Any], images: Images, dataset: str) -> dict[str, Any]:
    if row["dataset"] != dataset:
        raise UserError("dataset", dataset, f"is not that of {path}, which is {row['dataset']}")
    timesteps, predicted = row["timesteps"], torch.tensor(row["predicted"])
    if (timesteps is not None and (type(timesteps) is not int or timesteps < 1)) or predicted.dim() != 1:
        raise ValueError("timesteps must be a whole number or null, and predicted a list of classes")
    if len(predicted) != len(images.test_labels):
        raise UserError("predictions", str(path), f"has {len(predicted)} classes for {len(images.test_labels)} images")
    if len(predicted) and not 0 <= int(predicted.min()) <= int(predicted.max()) < len(images.classes):
        raise UserError("predictions", str(path), f"names a class outside 0 to {len(images.classes) - 1}")
    top1 = 100 * float((predicted == images.test_labels).float().mean())
    if not abs(top1 - row["top1"]) <= 1e-6:  # so that NaN is refused too
        raise UserError("predictions", str(path), f"claims {row['top1']:.2f} % where {top1:.2f} % are right")
    return {"timesteps": timesteps, "top1": top1, "claimed": row["top1"]}
