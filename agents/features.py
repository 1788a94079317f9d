"""Spiking hidden layers as a feature extractor for any Stable-Baselines3 algorithm."""

from __future__ import annotations

import math
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from spiking_rl.agents.policies import check_observation_space, observation_scaling
from spiking_rl.neurons import LIF
from spiking_rl.registry import build_network


class SpikingFeaturesExtractor(BaseFeaturesExtractor):
    """Hidden layers of spiking neurons; the features are each last-layer neuron's mean spikes over T.

    Use it as ``features_extractor_class``, with ``net_arch=[]`` where the heads shall read the spikes
    directly. Thresholds and leaks that an optimiser has moved out of their range are put back before the next
    pass in training.

    Args:
        observation_space: a Box or Discrete space.
        timesteps: T per decision.
        network: name of a registered network; default ``"nature_cnn"`` for images, else ``"mlp"``.
        network_kwargs: its options, such as ``hidden`` or ``neuron``.
        normalize_images: as given to the policy; False where pixels are scaled already.

    Raises:
        UserError: observations that the network cannot take, or bad options.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        timesteps: int = 5,
        network: str | None = None,
        network_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
    ) -> None:
        network = network or ("nature_cnn" if is_image_space(observation_space) else "mlp")
        check_observation_space(observation_space, network, normalize_images)
        norm, shape = observation_scaling(observation_space, network, normalize_images)
        layers = build_network(network, shape, 1, timesteps=timesteps, **(network_kwargs or {}))
        layers.readout = nn.Flatten()  # what the readout would have seen
        super().__init__(observation_space, math.prod(layers.neuron_shapes()[-1]))
        self.norm = norm
        self.network = layers

    def forward(self, observations: Tensor) -> Tensor:
        """Return features ``(B, N)`` of preprocessed observations ``(B, *obs)``: mean spikes, in [0, 1]."""
        if self.training:
            self._clamp()
        inputs = observations if self.norm is None else self.norm(observations.flatten(1))
        spikes, _ = self.network(inputs.unsqueeze(0))
        features: Tensor = spikes.squeeze(0)
        return features

    @torch.no_grad()
    def _clamp(self) -> None:
        """Put parameters back into their range; those within are not touched, for a backward pass may need them."""
        for neuron in self.network.neurons:
            if isinstance(neuron, LIF) and not neuron.is_in_range():
                neuron.clamp_()

    @property
    def timesteps(self) -> int:
        """Timesteps T per decision."""
        return self.network.timesteps

    def set_timesteps(self, timesteps: int) -> None:
        """Change T; weights, thresholds and leaks stay."""
        self.network.set_timesteps(timesteps)
