"""Spiking hidden layers as a feature extractor for any Stable-Baselines3 algorithm."""

from __future__ import annotations

import math
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn

from spiking_rl.agents.policies import RunningNorm, check_observation_space, observation_scaling
from spiking_rl.errors import UserError
from spiking_rl.neurons import LIF
from spiking_rl.registry import build_network


class SpikingFeaturesExtractor(BaseFeaturesExtractor):
    """Hidden layers of spiking neurons; the features are each last-layer neuron's mean spikes over T.

    Use it as ``features_extractor_class``, with ``net_arch=[]`` where the heads shall read the spikes
    directly. Thresholds and leaks that an optimiser has moved out of their range are put back before the next
    pass in training. The parts of a Dict observation, as ``MultiInputPolicy`` has them, are laid side by side.

    Args:
        observation_space: a Box or Discrete space, or a Dict of such without images.
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
        self._parts: tuple[str, ...] = ()
        if isinstance(observation_space, spaces.Dict):
            self._parts = _vector_parts(observation_space)
            shape: tuple[int, ...] = (sum(map(get_flattened_obs_dim, observation_space.spaces.values())),)
            norm: RunningNorm | None = RunningNorm(shape)
        else:
            check_observation_space(observation_space, network, normalize_images)
            norm, shape = observation_scaling(observation_space, network, normalize_images)
        layers = build_network(network, shape, 1, timesteps=timesteps, **(network_kwargs or {}))
        layers.readout = nn.Flatten()  # what the readout would have seen
        super().__init__(observation_space, math.prod(layers.neuron_shapes()[-1]))
        self.norm = norm
        self.network = layers

    def forward(self, observations: PyTorchObs) -> Tensor:
        """Return features ``(B, N)`` of preprocessed observations ``(B, *obs)``: mean spikes, in [0, 1]."""
        if self.training:
            self._clamp()
        if isinstance(observations, dict):
            observations = torch.cat([observations[name].flatten(1) for name in self._parts], 1)
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


class ExtractorStages:
    """Timesteps of a policy whose features come from :class:`SpikingFeaturesExtractor`: of all its networks at once.

    Args:
        policy: of any Stable-Baselines3 algorithm.
    """

    def __init__(self, policy: BasePolicy) -> None:
        self.policy = policy
        self._extractors = [m for m in policy.modules() if isinstance(m, SpikingFeaturesExtractor)]

    @staticmethod
    def fits(policy: BasePolicy) -> bool:
        """Tell whether a policy's features come from the extractor."""
        kind = getattr(policy, "features_extractor_class", None)
        return isinstance(kind, type) and issubclass(kind, SpikingFeaturesExtractor)

    @property
    def timesteps(self) -> int:
        """Timesteps T per decision."""
        return self._extractors[0].timesteps

    def begin(self, model: BaseAlgorithm, timesteps: int) -> None:
        """Change T in every network, targets too, and in what ``model.save`` writes; fresh moments of optimisers."""
        for extractor in self._extractors:
            extractor.set_timesteps(timesteps)
        name = "features_extractor_kwargs"
        options = {**self.policy.features_extractor_kwargs, "timesteps": timesteps}  # not the caller's own
        self.policy.features_extractor_kwargs = options
        model.policy_kwargs = {**model.policy_kwargs, name: options}
        for module in self.policy.modules():
            optimizer = getattr(module, "optimizer", None)
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.state.clear()


def _vector_parts(space: spaces.Dict) -> tuple[str, ...]:
    """Return the names of the parts of a Dict observation.

    Raises:
        UserError: one is an image or no vector.
    """
    for name, part in space.spaces.items():
        if is_image_space(part) or not isinstance(
            part, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        ):
            raise UserError(
                "observation_space",
                f"{name}: {part}",
                "of a Dict only vectors are taken; leave it out with gymnasium.wrappers.FilterObservation, or make a "
                "features extractor of your own that joins a SpikingFeaturesExtractor of each image",
            )
    return tuple(space.spaces)
