"""An agent made ready to act outside of training: Stable-Baselines3's ``predict`` on a deployed network."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space, maybe_transpose
from stable_baselines3.common.utils import is_vectorized_observation
from torch import Tensor, nn

from spiking_rl.agents.policies import as_arrays, as_state, q_network
from spiking_rl.deploy import deploy, deploy_stateful
from spiking_rl.networks import NetworkState


class DeployedAgent:
    """A trained agent that acts greedily, and faster than the model it is made of.

    It decides as the model's ``predict(..., deterministic=True)`` does, on the network of
    :func:`spiking_rl.deploy.deploy` (:func:`~spiking_rl.deploy.deploy_stateful` where the agent is stateful): a
    decision differs only where a potential comes within rounding of its threshold. It can stand in for the model in
    SB3's ``evaluate_policy``.

    Args:
        model: a SpikingDQN, a SpikingPQN, or SB3's own DQN or QRDQN with a spiking policy. It stays as it is, and
            what it learns later does not reach this agent.

    Raises:
        UserError: the model has no Q-network of ours, or one with ReLU, a code, scores of spike times, an exit margin,
            or neurons that fire once (those only at T > 1 or with carried membranes).
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        q_net = q_network(model)
        self.stateful = q_net.stateful
        self.observation_space: spaces.Space[Any] = q_net.observation_space
        self.action_space: spaces.Discrete = q_net.action_space
        self._carrying = deploy_stateful(q_net.network) if q_net.stateful else None
        self._fresh = None if q_net.stateful else deploy(q_net.network)
        self._device = q_net.device
        self._around = copy.deepcopy(q_net)  # all but the network: it scales observations by statistics of now
        self._around.network = nn.Identity()  # type: ignore[assignment]
        self._around.set_training_mode(False)

    @torch.no_grad()
    def predict(
        self,
        observation: NDArray[Any],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Return greedy actions and the membranes after them (None when stateless).

        Args:
            observation: one observation, or a batch of them.
            state: membranes returned by the last call, ``(n_envs, *neurons)`` per layer; None at the start.
            episode_start: bool ``(n_envs,)``, true where the observation opens an episode.
            deterministic: taken for the sake of SB3; exploring is the learner's.

        Raises:
            ValueError: observations of another shape (SB3's own message).
        """
        space = self.observation_space
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
            raise ValueError("observation is what Gymnasium's reset returns, (observation, info); pass its first part")
        seen = np.array(observation)  # copied: torch takes neither negative strides nor read-only memory
        if is_image_space(space):
            seen = maybe_transpose(seen, space)
        vectorised = is_vectorized_observation(seen, space)
        batch = seen.reshape(-1, *(space.shape or ()))
        outputs, after = self._decide(torch.as_tensor(batch, device=self._device), state, episode_start)
        actions: NDArray[Any] = self._around.of_actions(outputs).argmax(1).cpu().numpy()
        return (actions if vectorised else actions.squeeze(0)), None if after is None else as_arrays(after)

    def _decide(
        self, observations: Tensor, state: tuple[NDArray[Any], ...] | None, episode_start: NDArray[Any] | None
    ) -> tuple[Tensor, NetworkState | None]:
        inputs = self._around.features(observations)
        if self._carrying is None:
            assert self._fresh is not None
            return self._fresh(inputs), None
        before = self._carrying.initial_state(len(inputs)) if state is None else as_state(state, self._device)
        starts = None
        if episode_start is not None:
            starts = torch.as_tensor(episode_start, dtype=torch.bool, device=self._device).reshape(-1)
        return self._carrying(inputs, before, starts)
