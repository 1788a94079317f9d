"""Spiking quantile networks as policies for QR-DQN, which is in ``sb3_contrib``.

Nothing of that package is imported: its ``QRDQN`` asks a policy for ``quantile_net``,
``quantile_net_target`` and ``n_quantiles`` only.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from spiking_rl.agents.policies import SpikingMlpPolicy, SpikingQNetwork
from spiking_rl.errors import UserError


class SpikingQuantileNetwork(SpikingQNetwork):
    """Quantiles of the return of each action (Dabney et al. 2018) from a network of spiking neurons.

    Args:
        observation_space: a Box, Discrete, MultiDiscrete or MultiBinary space.
        action_space: Discrete.
        n_quantiles: quantiles per action.
        kwargs: everything else that :class:`SpikingQNetwork` takes.
    """

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Discrete, *, n_quantiles: int, **kwargs: Any
    ) -> None:
        super().__init__(observation_space, action_space, outputs_per_action=n_quantiles, **kwargs)
        self.n_quantiles = n_quantiles

    def forward(self, obs: PyTorchObs) -> Tensor:
        """Return quantiles ``(B, n_quantiles, A)`` of independent observations ``(B, *obs)``."""
        outputs, _ = self.outputs(obs)
        return self._per_quantile(outputs)

    def of_actions(self, outputs: Tensor) -> Tensor:
        """Return Q-values ``(B, A)`` of what the network gives, ``(B, n_quantiles * A)``: means over the quantiles."""
        return self._per_quantile(outputs).mean(1)

    def _per_quantile(self, outputs: Tensor) -> Tensor:
        return outputs.reshape(len(outputs), self.n_quantiles, -1)

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        return self.q_values(observation)[0].argmax(dim=1).reshape(-1)


class SpikingQRMlpPolicy(SpikingMlpPolicy):
    """Policy for ``sb3_contrib.QRDQN`` with a spiking quantile network, for vector observations.

    ``QRDQN`` comes with ``pip install 'spiking-rl[contrib]'``.

    Args:
        observation_space: a Box, Discrete, MultiDiscrete or MultiBinary space.
        action_space: Discrete.
        lr_schedule: learning rate against progress remaining.
        n_quantiles: quantiles per action.
        kwargs: everything else that :class:`SpikingMlpPolicy` takes.

    Raises:
        UserError: n_quantiles below 1, or a space that a spiking Q-network cannot serve.
    """

    gives: ClassVar[str] = "quantiles, for sb3_contrib.QRDQN"
    n_quantiles: int

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        *,
        n_quantiles: int = 200,
        **kwargs: Any,
    ) -> None:
        if not isinstance(n_quantiles, Integral) or n_quantiles < 1:
            raise UserError("n_quantiles", n_quantiles, "must be a whole number of at least 1")
        self.n_quantiles = int(n_quantiles)
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def make_q_net(self) -> SpikingQuantileNetwork:  # type: ignore[override]
        """Build one quantile network."""
        assert isinstance(self.action_space, spaces.Discrete)
        network = SpikingQuantileNetwork(
            self.observation_space, self.action_space, n_quantiles=self.n_quantiles, **self.q_net_kwargs
        )
        return network.to(self.device)

    @property
    def quantile_net(self) -> SpikingQNetwork:
        """The online network, by the name that QR-DQN looks for."""
        return self.q_net

    @property
    def quantile_net_target(self) -> SpikingQNetwork:
        """The target network, by the name that QR-DQN looks for."""
        return self.q_net_target

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"n_quantiles": self.n_quantiles}


class SpikingQRCnnPolicy(SpikingQRMlpPolicy):
    """The same for images, with a spiking Nature-CNN; see :class:`SpikingCnnPolicy`."""

    default_network: ClassVar[str] = "nature_cnn"
