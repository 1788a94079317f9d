"""SpikingDQN: Stable-Baselines3's DQN with a spiking network and Double Q-learning."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch.nn import functional as F

from spiking_rl.agents.policies import SpikingMlpPolicy
from spiking_rl.agents.staged import StagedAlgorithm
from spiking_rl.agents.targets import double_q_targets


class SpikingDQN(StagedAlgorithm, DQN):
    """Double DQN (van Hasselt et al. 2016) with a spiking Q-network: the algorithm of the papers.

    Takes every argument of :class:`stable_baselines3.DQN` and adds one.

    Args:
        policy: ``"MlpPolicy"`` or a policy class.
        env: environment, vectorised environment or its id.
        learning_rate: initial learning rate, or a schedule of the progress remaining.
        learning_starts: random agent steps before learning; observation scaling and thresholds are
            set on them, so at least 1,000 are worth having.
        firing_rate: spikes per neuron and timestep that calibration aims at.
        kwargs: everything else that SB3's DQN takes.
    """

    algo = "dqn"
    hyperparameters = (
        "buffer_size",
        "learning_starts",
        "batch_size",
        "gamma",
        "gradient_steps",
        "target_update_interval",
        "exploration_fraction",
        "exploration_initial_eps",
        "exploration_final_eps",
        "max_grad_norm",
        "firing_rate",
    )
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": SpikingMlpPolicy}
    policy: SpikingMlpPolicy  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[SpikingMlpPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 1e-4,
        learning_starts: int = 1000,
        firing_rate: float = 0.2,
        **kwargs: Any,
    ) -> None:
        self.firing_rate = firing_rate
        super().__init__(
            policy,  # type: ignore[arg-type]
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            learning_starts=learning_starts,
            **kwargs,
        )

    def _on_step(self) -> None:
        super()._on_step()
        self.exploration_rate = self.exploration_schedule(self.exploration_progress())

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Do ``gradient_steps`` Double-DQN updates on replayed batches."""
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        if not self.calibrated:
            self.calibrate(self._replayed_observations())
        losses = []
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            with torch.no_grad():
                targets = double_q_targets(
                    batch.rewards,
                    batch.dones,
                    self.gamma if batch.discounts is None else batch.discounts,
                    self.q_net(batch.next_observations),
                    self.q_net_target(batch.next_observations),
                )
            q = self.q_net(batch.observations).gather(1, batch.actions.long())
            loss = F.smooth_l1_loss(q, targets)
            self.policy.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.policy.q_net.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            losses.append(loss.detach())
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.last_loss = torch.stack(losses).mean().item()
        self.logger.record("train/loss", self.last_loss)

    def _replayed_observations(self, most: int = 4096) -> torch.Tensor:
        """Return the latest raw observations of the replay buffer, ``(B, *obs)``."""
        assert self.replay_buffer is not None
        rows = self.replay_buffer.size()
        stored = self.replay_buffer.observations[:rows].reshape(-1, *self.replay_buffer.obs_shape)
        return torch.as_tensor(np.array(stored[-most:]), device=self.device)

    def begin_stage(self, timesteps: int) -> None:
        """As in :class:`StagedAlgorithm`; the target network starts equal to the online one."""
        super().begin_stage(timesteps)
        self.policy.q_net_target.load_state_dict(self.policy.q_net.state_dict())
