"""The classes that a network sees in images, as many at once as fit into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spiking_rl.energy import SpikeCounter
from spiking_rl.networks import LayeredNetwork
from spiking_rl.state import seed_generator
from spiking_rl.vision.data import normalise

_EVALUATED = 500  # images per forward pass, at most
PIXELS = _EVALUATED * 5 * 32 * 32
"""Of all images and timesteps of a pass: of large images fewer fit into memory."""


def images_per_pass(network: LayeredNetwork, side: Sequence[int]) -> int:
    """Return how many images to score at once: 500 of CIFAR's at five timesteps.

    Args:
        network: says how many timesteps.
        side: height and width of an image, in pixels.
    """
    return max(1, min(_EVALUATED, PIXELS // (network.timesteps * math.prod(side))))


@torch.no_grad()
def predict(
    network: LayeredNetwork,
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    observer: SpikeCounter | None = None,
) -> Tensor:
    """Return the class of each image, ``(N,)``.

    Args:
        network: put into evaluation mode.
        images: uint8 ``(N, C, H, W)``.
        mean: of the channels, on the scale 0 to 1.
        std: likewise.
        observer: counts spikes.
    """
    network.eval()
    found = []
    device = next(network.parameters()).device
    with torch.random.fork_rng():
        seed_generator(0, device)  # a Poisson code is drawn: the same one whenever the same images are scored
        for part in torch.split(images, images_per_pass(network, images.shape[2:])):
            inputs = normalise(part.to(device), mean, std).unsqueeze(0)
            logits, _ = network(inputs, observer=observer)
            found.append(logits[0].argmax(1).cpu())
    return torch.cat(found)
