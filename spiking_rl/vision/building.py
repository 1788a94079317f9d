"""Build the networks of a classification run from its settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spiking_rl.balancing import balance_thresholds, convert_balanced
from spiking_rl.checkpoint import Checkpoint, load_checkpoint, load_into
from spiking_rl.conversion import calibrate_spike_time, calibrate_thresholds, linear_map, take_weights
from spiking_rl.errors import UserError
from spiking_rl.folding import fold_batch_norm
from spiking_rl.lowering import lower_timesteps, measuring_norms
from spiking_rl.networks import LayeredNetwork, evaluating
from spiking_rl.registry import NETWORKS, build_network
from spiking_rl.runs import RunFolder
from spiking_rl.vision.config import LARGEST_IMAGE, ClassifyConfig, load_config

_LARGEST = 1e30  # mean or deviation of a channel
_SPIKE_TIME = "spike_time.threshold"
_CLOSE = 1e-4  # in which means of the same images agree, on the scale 0 to 1


class ImageFacts(Protocol):
    """What a network must know of its images: a data set has it, and so has a checkpoint (:func:`facts_of`)."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an image, ``(3, H, W)``."""

    @property
    def classes(self) -> list[str]:
        """Name of every class."""

    @property
    def mean(self) -> Sequence[float]:
        """Of the channels, on the scale 0 to 1."""

    @property
    def std(self) -> Sequence[float]:
        """Likewise."""


@dataclass(frozen=True)
class KnownImages:
    """Facts of images without the images; see :class:`ImageFacts`."""

    input_shape: tuple[int, ...]
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def facts_of(config: ClassifyConfig, checkpoint: dict[str, Any], origin: Path) -> KnownImages:
    """Return what a run's settings and a checkpoint's ``config.json`` tell of the images, without the data set.

    Args:
        config: settings of the run.
        checkpoint: the content of ``config.json``.
        origin: the checkpoint's folder, for messages.

    Raises:
        UserError: a data set whose images have no size that is known, or no class names, mean or deviation.
    """
    sizes = {"cifar10": 32, "cifar100": 32, "tiny-imagenet-32": 32, "imagenet": 224, "folder": 32}
    size = config.image_size or sizes.get(config.dataset)
    if size is None:
        raise UserError("dataset", config.dataset, f"the size of its images is not known; {origin} cannot be rebuilt")
    if size > LARGEST_IMAGE:
        raise UserError("image_size", size, f"must be at most {LARGEST_IMAGE}")
    classes = checkpoint.get("classes")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise UserError("checkpoint", str(origin), "names no classes in its config.json; no classifier of ours")
    mean, std = (_triple(checkpoint.get(name), name, origin) for name in ("mean", "std"))
    if min(std) <= 0:
        raise UserError("std", list(std), f"must be positive in {origin}")
    return KnownImages((3, size, size), classes, mean, std)


def _triple(value: Any, name: str, origin: Path) -> tuple[float, ...]:
    numbers = isinstance(value, list) and all(type(v) in (int, float) and abs(v) < _LARGEST for v in value)
    if not numbers or len(value) != 3:
        raise UserError(name, value, f"must be three numbers, one per channel, in {origin}")
    return tuple(map(float, value))


def build(config: ClassifyConfig, images: ImageFacts, *, spiking: bool) -> LayeredNetwork:
    """Return a fresh network of a run.

    Args:
        config: the settings.
        images: give the input's shape and the number of classes.
        spiking: in spiking form; else ReLU.
    """
    if not min(images.std) > 0:
        remedy = "as std of the channels: one that never changes cannot be standardised; use images of three colours"
        raise UserError("data", list(images.std), remedy)
    folded = spiking and config.fold_first
    options: dict[str, Any] = {"batch_norm": config.batch_norm and not folded, "bias": folded}
    options |= {"dropout": config.dropout, "width": config.width}
    builder = NETWORKS.get(config.network)
    if builder is not None and "dense_dropout" in inspect.signature(builder).parameters:
        options["dense_dropout"] = config.dense_dropout  # a ResNet's readout is its only dense layer
    if spiking:
        options |= {"neuron": "lif", "timesteps": config.timesteps, "gamma": config.surrogate_gamma}
        if config.leak is not None:
            options["leak"] = config.leak
        options |= _coding(config, images)
    else:
        options["neuron"] = "relu"
    return build_network(config.network, images.input_shape, len(images.classes), **options)


def build_empty(config: ClassifyConfig, images: ImageFacts, *, spiking: bool) -> LayeredNetwork:
    """Return what :func:`build` does with shapes but no values: it takes no memory, whatever the settings say."""
    with torch.device("meta"):
        return build(config, images, spiking=spiking)


def _coding(config: ClassifyConfig, images: ImageFacts) -> dict[str, Any]:
    """Return how images are presented: hybrid codes run from black to white, Poisson codes both ways from the mean."""
    options = {"encoding": config.encoding, "single_spike": config.single_spike, "kappa": config.kappa}
    black = [-mean / std for mean, std in zip(images.mean, images.std, strict=True)]
    white = [(1 - mean) / std for mean, std in zip(images.mean, images.std, strict=True)]
    if config.encoding == "hybrid":
        span = [w - b for w, b in zip(white, black, strict=True)]
        return options | {"input_zero": black, "input_span": span}
    return options | {"input_span": max(-min(black), max(white))}


def convert(relu: LayeredNetwork, config: ClassifyConfig, images: ImageFacts, inputs: Tensor) -> LayeredNetwork:
    """Return the spiking network that starts from a trained ReLU network.

    Args:
        relu: the network.
        config: says how thresholds are set.
        images: the data set.
        inputs: a batch ``(B, C, H, W)`` as in training, to set them on.
    """
    spiking = build(config, images, spiking=True).to(inputs.device)
    if config.fold_first:
        convert_balanced(
            fold_batch_norm(relu),
            spiking,
            inputs,
            percentile=config.percentile,
            scale=config.threshold_scale,
            timesteps=config.calibration_timesteps,
        )
        return spiking
    take_weights(relu, spiking)
    set_thresholds(spiking, config, inputs)
    return spiking


def origin_of(start_from: str) -> tuple[Path, Path | None]:
    """Return the run that ``start_from`` names and, where it names one of the run's checkpoints, that folder."""
    path = Path(start_from)
    for whole in (path.absolute(), path.resolve()):
        if whole.parent.name == "checkpoints" and not RunFolder(whole).config.is_file():
            return whole.parent.parent, path
    return path, None


def load_relu(run: Path, config: ClassifyConfig, images: ImageFacts) -> tuple[LayeredNetwork, Checkpoint]:
    """Return the trained ReLU network of a run, for a spiking one to start from, and the checkpoint that holds it.

    Args:
        run: that run's folder.
        config: settings of the run that starts from it.
        images: its data set, of the same classes and on the same scale.

    Raises:
        UserError: no such run, without a ReLU network, with another network, or trained on other images.
    """
    with _told_of(str(run)):
        folder = RunFolder(run)
        theirs = _alike(folder, config)
        relu = build(theirs, images, spiking=False)
        checkpoint = load_checkpoint(folder.checkpoint(None))
        require_same_images(checkpoint.config, images, run)
        load_into(relu, checkpoint.tensors, folder.checkpoint(None))
    return relu.eval(), checkpoint


def load_spiking(checkpoint: Path, config: ClassifyConfig, images: ImageFacts, inputs: Tensor) -> LayeredNetwork:
    """Return the spiking network of a run that starts from the one in a checkpoint of another run.

    Weights, thresholds and, unless one is given, leaks are taken over; timesteps, encoding and the rest are as the
    settings say. With ``rescale_thresholds`` thresholds follow T where it is lower
    (:func:`spiking_rl.lowering.lower_timesteps`). With ``fold_first`` a batch norm of the other network is folded into
    its weights. Outputs are means over the timesteps: where neurons fire at most once in both networks (all do at T=1),
    the readout's weights grow with T, so that outputs keep their scale. What else changes them, such as neurons that
    may fire again no more, is left to training.

    Args:
        checkpoint: ``RUN/checkpoints/T1`` or the like.
        config: settings of the run that starts from it.
        images: its data set, of the same classes and on the same scale.
        inputs: a batch ``(B, C, H, W)`` as in training, to set thresholds on: those that follow T, and the outputs'
            where the other network has none.

    Raises:
        UserError: no such checkpoint, or it holds no spiking network, or another one, or one trained on other images.
    """
    with _told_of(str(checkpoint)):
        theirs = _alike(RunFolder(origin_of(str(checkpoint))[0]), config)
        if theirs.fold_first and not config.fold_first:
            raise UserError("fold_first", False, "is True there: that network's batch norm is folded; match it")
        tensors, about = load_checkpoint(checkpoint)
        before = about.get("timesteps")
        if before is None:
            raise UserError("checkpoint", str(checkpoint), "holds a ReLU network; name its run instead")
        require_same_images(about, images, checkpoint)
        source = build(theirs, images, spiking=True)
        source.set_timesteps(before)
        load_into(source, tensors, checkpoint)
        if config.fold_first and not theirs.fold_first:
            source = fold_batch_norm(source)
        spiking = build(config, images, spiking=True)
        own, taken = spiking.state_dict(), source.state_dict()
        if config.leak is not None:
            taken |= {name: leak for name, leak in own.items() if name.endswith(".leak")}
        if spiking.spike_time is None:
            taken.pop(_SPIKE_TIME, None)
        elif source.spike_time is None:
            taken[_SPIKE_TIME] = own[_SPIKE_TIME]
        load_into(spiking, taken, checkpoint)
    if config.rescale_thresholds and config.timesteps < before:
        if any(getattr(theirs, name) != getattr(config, name) for name in ("encoding", "single_spike", "kappa")):
            remedy = f"needs the encoding, single_spike and kappa of {checkpoint}; match them, or do without"
            raise UserError("rescale_thresholds", True, remedy)
        spiking.set_timesteps(before)
        lower_timesteps(spiking.to(inputs.device), config.timesteps, inputs)
        return spiking
    longer = config.timesteps / before
    once = (theirs.single_spike or before == 1) and (config.single_spike or config.timesteps == 1)
    with torch.no_grad():
        if once:
            linear_map(spiking.readout).weight.mul_(longer)
        if source.spike_time is not None and spiking.spike_time is not None:
            spiking.spike_time.threshold.mul_(longer)  # of what outputs sum up over the timesteps
        elif spiking.spike_time is not None:
            calibrate_spike_time(spiking.to(inputs.device), inputs)
    return spiking


@contextmanager
def _told_of(start_from: str) -> Iterator[None]:
    """Say of what is refused within that it was to be started from."""
    try:
        yield
    except UserError as error:
        raise UserError("start_from", start_from, f"cannot be started from: {error}") from None


def _alike(folder: RunFolder, config: ClassifyConfig) -> ClassifyConfig:
    """Return the settings of a run that another is to start from; its network must be the same."""
    folder.require()
    theirs = load_config(folder.config)
    for name in ("network", "width", "batch_norm"):
        if getattr(theirs, name) != getattr(config, name):
            raise UserError(name, getattr(config, name), f"is {getattr(theirs, name)} there; match it")
    return theirs


def set_thresholds(network: LayeredNetwork, config: ClassifyConfig, inputs: Tensor) -> None:
    """Set every threshold of a spiking network on a batch of inputs, as the settings say."""
    if config.firing_rate is None:
        balance_thresholds(
            network,
            inputs,
            percentile=config.percentile,
            scale=config.threshold_scale,
            timesteps=config.calibration_timesteps,
        )
        return
    # Spikes have other means and variances than the ReLU's outputs: both are measured anew on the way.
    with evaluating(network), measuring_norms(network):
        calibrate_thresholds(network, inputs, config.firing_rate)


def load_classifier(folder: Path, config: ClassifyConfig, images: ImageFacts) -> LayeredNetwork:
    """Return the network of a checkpoint of a run.

    Raises:
        UserError: missing, damaged, of another network, or trained on other images.
    """
    checkpoint = load_checkpoint(folder)
    require_same_images(checkpoint.config, images, folder)
    timesteps = checkpoint.config.get("timesteps")
    network = build(config, images, spiking=timesteps is not None)
    if timesteps is not None:
        network.set_timesteps(timesteps)
    load_into(network, checkpoint.tensors, folder)
    return network.eval()


def require_same_images(about: dict[str, Any], images: ImageFacts, origin: Path) -> None:
    """Refuse images of other classes, or on another scale, than a network was trained on.

    Args:
        about: what is known of its images: ``classes``, ``mean`` and ``std``, each where it was written down.
        images: the others.
        origin: of the network, for messages.

    Raises:
        UserError: naming what differs.
    """
    remedy = f"are not those that {origin} was trained on; name its own folder"
    if "classes" in about and about["classes"] != list(images.classes):
        raise UserError("data", images.classes[:5], f"as first classes {remedy}")
    for name in ("mean", "std"):
        known, given = about.get(name), getattr(images, name)
        if known is not None and any(abs(a - b) > _CLOSE for a, b in zip(known, given, strict=True)):
            raise UserError("data", [round(value, 4) for value in given], f"as {name} of the channels {remedy}")
