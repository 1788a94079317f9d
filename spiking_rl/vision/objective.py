"""What a classifier learns from: labels, its ReLU network's class probabilities, and what its spikes cost."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from spiking_rl.energy import SpikeCost
from spiking_rl.networks import LayeredNetwork
from spiking_rl.vision.config import ClassifyConfig
from spiking_rl.vision.data import normalise
from spiking_rl.vision.feeding import Images


class Objective:
    """The loss of a batch, ``(1 - distill) * labels + distill * teacher + spike_penalty * cost``.

    Labels and teacher are cross-entropies, the first with ``label_smoothing``; the cost is that of
    :class:`spiking_rl.energy.SpikeCost`.

    Args:
        network: that learns, with the timesteps that it learns with.
        config: the settings.
        images: whose mean and deviation the networks' inputs have.
        teacher: the trained ReLU network; None: labels alone.
    """

    def __init__(
        self, network: LayeredNetwork, config: ClassifyConfig, images: Images, teacher: LayeredNetwork | None
    ) -> None:
        self.network = network
        self.config = config
        self.mean, self.std = images.mean, images.std
        self.teacher = teacher
        self.cost = SpikeCost(network) if network.spiking and config.spike_penalty else None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            images: uint8 ``(B, C, H, W)``.
            labels: class indices ``(B,)``.
        """
        inputs = normalise(images, self.mean, self.std).unsqueeze(0)
        logits, _ = self.network(inputs, observer=self.cost)
        scores = logits[0].float()
        loss = functional.cross_entropy(scores, labels, label_smoothing=self.config.label_smoothing)
        if self.teacher is not None:
            with torch.no_grad():
                wanted, _ = self.teacher(inputs)
            distance = functional.cross_entropy(scores, wanted[0].float().softmax(1))
            loss = torch.lerp(loss, distance, self.config.distill)
        if self.cost is not None:
            loss = loss + self.config.spike_penalty * self.cost.total
            self.cost.clear()
        return loss
