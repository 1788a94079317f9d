"""Build the networks of a classification run from its settings."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spiking_rl.balancing import balance_thresholds, convert_balanced
from spiking_rl.checkpoint import load_checkpoint, load_into
from spiking_rl.conversion import calibrate_thresholds, take_weights
from spiking_rl.errors import UserError
from spiking_rl.folding import fold_batch_norm
from spiking_rl.networks import NETWORKS, LayeredNetwork, build_network, evaluating
from spiking_rl.runs import RunFolder
from spiking_rl.vision.config import ClassifyConfig, load_config
from spiking_rl.vision.feeding import Images


def build(config: ClassifyConfig, images: Images, *, spiking: bool) -> LayeredNetwork:
    """Return a fresh network of a run.

    Args:
        config: the settings.
        images: give the input's shape and the number of classes.
        spiking: in spiking form; else ReLU.
    """
    folded = spiking and config.fold_first
    options: dict[str, Any] = {"batch_norm": config.batch_norm and not folded, "bias": folded}
    options |= {"dropout": config.dropout, "width": config.width}
    builder = NETWORKS.get(config.network)
    if builder is not None and "dense_dropout" in inspect.signature(builder).parameters:
        options["dense_dropout"] = config.dense_dropout  # a ResNet's readout is its only dense layer
    if spiking:
        options |= {"neuron": "lif", "timesteps": config.timesteps, "gamma": config.surrogate_gamma}
        options |= _coding(config, images)
    else:
        options["neuron"] = "relu"
    return build_network(config.network, images.input_shape, len(images.classes), **options)


def _coding(config: ClassifyConfig, images: Images) -> dict[str, Any]:
    """Return how images are presented: hybrid codes run from black to white, Poisson codes both ways from the mean."""
    options = {"encoding": config.encoding, "single_spike": config.single_spike, "kappa": config.kappa}
    black = [-mean / std for mean, std in zip(images.mean, images.std, strict=True)]
    white = [(1 - mean) / std for mean, std in zip(images.mean, images.std, strict=True)]
    if config.encoding == "hybrid":
        span = [w - b for w, b in zip(white, black, strict=True)]
        return options | {"input_zero": black, "input_span": span}
    return options | {"input_span": max(-min(black), max(white))}


def convert(relu: LayeredNetwork, config: ClassifyConfig, images: Images, inputs: Tensor) -> LayeredNetwork:
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


def load_relu(run: str, config: ClassifyConfig, images: Images) -> LayeredNetwork:
    """Return the trained ReLU network of another run, for a spiking one to start from.

    Args:
        run: the other run's folder.
        config: settings of the run that starts from it.
        images: its data set, with as many classes.

    Raises:
        UserError: no such run, without a ReLU network, or with another network.
    """
    try:
        folder = RunFolder(run)
        folder.require()
        theirs = load_config(folder.config)
        for name in ("network", "width", "batch_norm"):
            if getattr(theirs, name) != getattr(config, name):
                raise UserError(name, getattr(config, name), f"is {getattr(theirs, name)} there; match it")
        relu = build(theirs, images, spiking=False)
        checkpoint = load_checkpoint(folder.checkpoint(None))
        load_into(relu, checkpoint.tensors, folder.checkpoint(None))
    except UserError as error:
        raise UserError("start_from", run, f"cannot be started from: {error}") from None
    return relu.eval()


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
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean of what is seen
    with evaluating(network):
        for norm in norms:
            norm.train()
        calibrate_thresholds(network, inputs, config.firing_rate)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def load_classifier(folder: Path, config: ClassifyConfig, images: Images) -> LayeredNetwork:
    """Return the network of a checkpoint of a run.

    Raises:
        UserError: missing, damaged, or of another network.
    """
    checkpoint = load_checkpoint(folder)
    timesteps = checkpoint.config.get("timesteps")
    network = build(config, images, spiking=timesteps is not None)
    if timesteps is not None:
        network.set_timesteps(timesteps)
    load_into(network, checkpoint.tensors, folder)
    return network.eval()
