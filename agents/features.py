"""Spiking hidden layers as a feature extractor for any Stable-Baselines3 algorithm."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import Tensor, nn

from spiking_rl.agents.policies import (
    CHOSEN_NETWORKS,
    SIMPLE_SPACES,
    RunningNorm,
    check_observation_space,
    check_vector,
    observation_scaling,
)
from spiking_rl.errors import UserError
from spiking_rl.neurons import LIF
from spiking_rl.registry import build_network

_OPTIONS = "features_extractor_kwargs"


class SpikingFeaturesExtractor(BaseFeaturesExtractor):
    """Hidden layers of spiking neurons; the features are each last-layer neuron's mean spikes over T.

    Use it as ``features_extractor_class``, with ``net_arch=[]`` where the heads shall read the spikes
    directly. Thresholds and leaks that an optimiser has moved out of their range are put back before the next
    pass, and before they are saved. The parts of a Dict observation, as ``MultiInputPolicy`` has them, are laid side
    by side.

    Args:
        observation_space: a Box, Discrete, MultiDiscrete or MultiBinary space, or a Dict of such without
            images.
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
        is_image = is_image_space(observation_space, normalized_image=not normalize_images)
        network = network or CHOSEN_NETWORKS[is_image]
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
        self.register_state_dict_pre_hook(_clamp_before_saving)  # type: ignore[no-untyped-call]

    def forward(self, observations: PyTorchObs) -> Tensor:
        """Return features ``(B, N)`` of preprocessed observations ``(B, *obs)``: mean spikes, in [0, 1]."""
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


def _clamp_before_saving(extractor: SpikingFeaturesExtractor, *_: Any) -> None:
    """Nobody tells the extractor of an optimiser's step, and the last one may have been taken."""
    extractor._clamp()


class ExtractorStages:
    """Timesteps of a policy whose features come from :class:`SpikingFeaturesExtractor`: of all its networks at once.

    Args:
        model: of any Stable-Baselines3 algorithm, its features extractor one of these or made of some.

    Raises:
        UserError: the policy, or an extractor of somebody's own, could not be built again with other timesteps.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        self.policy = model.policy
        self._extractors = [m for m in self.policy.modules() if isinstance(m, SpikingFeaturesExtractor)]
        kind = model.policy_kwargs.get("features_extractor_class")
        if kind is None:
            remedy = "has an extractor of its own; name it in policy_kwargs instead, as features_extractor_class"
            raise UserError("policy", type(self.policy).__name__, remedy)
        taken = signature(kind).parameters.values()
        if not any(p.name == "timesteps" or p.kind is p.VAR_KEYWORD for p in taken):
            remedy = "takes no timesteps: once pruned it could be saved, and not loaded; let its constructor take them"
            raise UserError("features_extractor_class", kind.__name__, remedy)

    @staticmethod
    def fits(policy: BasePolicy) -> bool:
        """Tell whether a policy's features come from the extractor."""
        return any(isinstance(module, SpikingFeaturesExtractor) for module in policy.modules())

    @property
    def timesteps(self) -> int:
        """Timesteps T per decision."""
        return self._extractors[0].timesteps

    def begin(self, model: BaseAlgorithm, timesteps: int) -> None:
        """Change T in every network, targets too, and in what ``model.save`` writes; fresh moments of optimisers."""
        for extractor in self._extractors:
            extractor.set_timesteps(timesteps)
        options = {**self.policy.features_extractor_kwargs, "timesteps": timesteps}  # not the caller's own
        self.policy.features_extractor_kwargs = options
        model.policy_kwargs = {**model.policy_kwargs, _OPTIONS: options}
        made = [getattr(module, "optimizer", None) for module in self.policy.modules()]
        for optimizer in (*made, getattr(model, "ent_coef_optimizer", None)):
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer.state.clear()


def _vector_parts(space: spaces.Dict) -> tuple[str, ...]:
    """Return the names of the parts of a Dict observation.

    Raises:
        UserError: one is an image or no vector, or there is none.
    """
    if not space.spaces:
        raise UserError("observation_space", str(space), "is an empty Dict; there is nothing to see")
    for name, part in space.spaces.items():
        if is_image_space(part) or not isinstance(part, SIMPLE_SPACES):
            raise UserError(
                "observation_space",
                f"{name}: {part}",
                "of a Dict only vectors are taken; leave it out with gymnasium.wrappers.FilterObservation, or make a "
                "features extractor of your own (policy_kwargs of SB3's MultiInputPolicy) that joins one of each part",
            )
        check_vector(part, f"{name}: {part}")
    return tuple(space.spaces)
