"""SpikingDQN: Stable-Baselines3's DQN with a spiking network and Double Q-learning."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch.nn import functional as F

from spiking_rl.agents.cnn_policies import SpikingCnnPolicy
from spiking_rl.agents.policies import SpikingMlpPolicy, SpikingQNetwork
from spiking_rl.agents.staged import StagedAlgorithm
from spiking_rl.agents.targets import double_q_targets
from spiking_rl.errors import UserError


class SpikingDQN(StagedAlgorithm, DQN):
    """Double DQN (van Hasselt et al. 2016) with a spiking Q-network: the algorithm of the papers.

    Takes every argument of :class:`stable_baselines3.DQN` and adds three.

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"`` or a policy class.
        env: environment, vectorised environment or its id.
        learning_rate: initial learning rate, or a schedule of the progress remaining.
        learning_starts: random agent steps before learning; observation scaling and thresholds are
            set on them, so at least 1,000 are worth having.
        firing_rate: spikes per neuron and timestep that calibration aims at.
        reward_scale: rewards are multiplied by it for learning (reported returns are not); Q-values
            near 1 suit spikes, whose readout starts at zero.
        exploration_repeat: mean number of steps that a random action is held.
        kwargs: everything else that SB3's DQN takes.
    """

    algo = "dqn"
    hyperparameters = (
        "buffer_size",
        "learning_starts",
        "n_steps",
        "batch_size",
        "gamma",
        "gradient_steps",
        "target_update_interval",
        "exploration_fraction",
        "exploration_initial_eps",
        "exploration_final_eps",
        "exploration_repeat",
        "max_grad_norm",
        "firing_rate",
        "reward_scale",
    )
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": SpikingMlpPolicy,
        "CnnPolicy": SpikingCnnPolicy,
    }
    policy: SpikingMlpPolicy
    _norm_steps = 0  # agent steps whose observations the running scaling has seen
    q_net: SpikingQNetwork  # type: ignore[assignment]
    q_net_target: SpikingQNetwork  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[SpikingMlpPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 1e-4,
        *,
        learning_starts: int = 1000,
        firing_rate: float = 0.2,
        reward_scale: float = 1.0,
        exploration_repeat: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if learning_starts < 2:
            raise UserError("learning_starts", learning_starts, "calibration needs at least 2, better 1,000")
        kwargs["policy_kwargs"] = dict(kwargs.get("policy_kwargs") or {})  # a copy: stages change it
        self.firing_rate = firing_rate
        self.reward_scale = reward_scale
        self.exploration_repeat = exploration_repeat
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            learning_starts=learning_starts,
            **kwargs,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        self._setup_explorer()

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Explore in each environment on its own (SB3's DQN draws one coin for all)."""
        assert self._last_obs is not None
        warm_up = self.num_timesteps < learning_starts
        if warm_up:
            greedy = np.zeros(n_envs, dtype=np.int64)
        else:
            greedy, _ = self.policy.predict(self._last_obs, deterministic=True)
        actions = self.explorer.choose(greedy, 1.0 if warm_up else self.exploration_rate)
        return actions, actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: NDArray[Any],
        new_obs: NDArray[Any] | dict[str, NDArray[Any]],
        reward: NDArray[Any],
        dones: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self.explorer.end_episodes(dones)

    def _on_step(self) -> None:
        super()._on_step()
        self.exploration_rate = self.exploration_schedule(self.exploration_progress())
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Do ``gradient_steps`` Double-DQN updates on replayed batches."""
        assert self.replay_buffer is not None
        if self.replay_buffer.size() * self.n_envs < 2:
            return  # nothing to calibrate on yet
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        if self.calibrated:
            # A random policy sees a small part of the state space: the scaling must go on learning.
            fresh = (self.num_timesteps - self._norm_steps) // self.n_envs
            self.q_net.update_norm(self._latest_observations(max(1, fresh)))
        else:
            self.calibrate(self._latest_observations(self.replay_buffer.size()))
        self._norm_steps = self.num_timesteps
        losses = []
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            with torch.no_grad():
                targets = double_q_targets(
                    batch.rewards * self.reward_scale,
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
        self.update_average()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.last_loss = torch.stack(losses).mean().item()
        self.logger.record("train/loss", self.last_loss)

    def _latest_observations(self, rows: int) -> torch.Tensor:
        """Return the raw observations of the latest ``rows`` steps of all environments, ``(B, *obs)``."""
        assert self.replay_buffer is not None
        rows = min(rows, self.replay_buffer.size())
        where = np.arange(self.replay_buffer.pos - rows, self.replay_buffer.pos) % self.replay_buffer.buffer_size
        stored = self.replay_buffer.observations[where].reshape(-1, *self.replay_buffer.obs_shape)
        if self._vec_normalize_env is not None:  # the buffer holds what came before VecNormalize
            stored = self._vec_normalize_env.normalize_obs(stored)  # type: ignore[assignment]
        return torch.as_tensor(stored, device=self.device)

    def begin_stage(self, timesteps: int) -> None:
        """As in :class:`StagedAlgorithm`; the target network starts equal to the online one."""
        super().begin_stage(timesteps)
        self.policy.q_net_target.load_state_dict(self.policy.q_net.state_dict())
