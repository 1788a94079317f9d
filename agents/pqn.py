"""SpikingPQN: parallel Q-learning with spikes, without replay buffer or target network."""

from __future__ import annotations

import time
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import LinearSchedule, obs_as_tensor, safe_mean

from spiking_rl.agents.cnn_policies import SpikingPQNCnnPolicy
from spiking_rl.agents.imitation import Teacher, imitation_loss
from spiking_rl.agents.policies import SpikingPQNPolicy
from spiking_rl.agents.staged import StagedAlgorithm, own_policy_kwargs
from spiking_rl.agents.targets import lambda_returns
from spiking_rl.errors import UserError
from spiking_rl.networks import NetworkState
from spiking_rl.neurons import LIFState


class Rollout(NamedTuple):
    """What one rollout of N environments leaves to learn from.

    Attributes:
        observations: raw, ``(L, N, *obs)``.
        actions: ``(L, N)``.
        targets: Q(lambda) targets of the actions, ``(L, N)``.
        starts: true where an observation opens an episode, ``(L, N)``.
        before: membranes before the first decision; None when stateless.
        taught: a teacher's Q-values to learn instead, ``(L, N, A)``; None where nobody is imitated.
    """

    observations: NDArray[Any]
    actions: NDArray[np.int64]
    targets: NDArray[np.float32]
    starts: NDArray[np.bool_]
    before: NetworkState | None
    taught: NDArray[np.float32] | None = None


_MINIBATCHES = 4
_FALLING = LinearSchedule(1e-3, 0.0, 1.0)

SelfSpikingPQN = TypeVar("SelfSpikingPQN", bound="SpikingPQN")


class SpikingPQN(StagedAlgorithm, BaseAlgorithm):
    """Parallelised Q-network (Gallici et al. 2024) with a spiking network.

    Many environments step together for a short rollout; the Q(lambda) targets of that rollout are
    regressed for a few epochs and thrown away. Nothing goes stale: no replay, no target network.

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"`` or a policy class.
        env: environment, vectorised environment or its id.
        learning_rate: a number, or a schedule of the stage's progress remaining; falls from 1e-3
            to 0 by default, and a constant one is markedly less steady.
        n_steps: agent steps per environment and rollout.
        n_epochs: passes over each rollout.
        n_minibatches: minibatches per pass; default 4. A stateful agent splits its environments: loaded into fewer, it
            has as many minibatches as there are.
        gamma: discount.
        lam: lambda of the returns.
        reward_scale: rewards are multiplied by it for learning (reported returns are not).
        exploration_fraction: part of the first stage over which epsilon falls.
        exploration_initial_eps: epsilon at the start.
        exploration_final_eps: epsilon afterwards.
        exploration_repeat: mean number of steps that a random action is held.
        max_grad_norm: gradient clipping.
        calibration_steps: random agent steps before learning, at most half of a run, on which observation scaling and
            thresholds are set.
        firing_rate: spikes per neuron and timestep that calibration aims at.
        stats_window_size: episodes over which the training return is averaged.
        tensorboard_log: folder for TensorBoard.
        stateful: carry the membranes through the episode; minibatches are then of environments, each
            rollout one sequence.
        policy_kwargs: options of the policy, such as ``timesteps``.
        verbose: 0 silent, 1 info.
        seed: of every random generator.
        device: torch device or "auto".
    """

    algo = "pqn"
    hyperparameters = (
        "n_steps",
        "n_epochs",
        "n_minibatches",
        "gamma",
        "lam",
        "reward_scale",
        "exploration_fraction",
        "exploration_initial_eps",
        "exploration_final_eps",
        "exploration_repeat",
        "max_grad_norm",
        "firing_rate",
    )
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": SpikingPQNPolicy,
        "CnnPolicy": SpikingPQNCnnPolicy,
        "MultiInputPolicy": SpikingPQNPolicy,  # which says what to do with a Dict
    }
    policy: SpikingPQNPolicy

    def __init__(
        self,
        policy: str | type[SpikingPQNPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = _FALLING,
        n_steps: int = 32,
        n_epochs: int = 4,
        n_minibatches: int | None = None,
        gamma: float = 0.99,
        lam: float = 0.9,
        reward_scale: float = 0.1,
        exploration_fraction: float = 0.3,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        exploration_repeat: float = 1.0,
        max_grad_norm: float = 10.0,
        calibration_steps: int = 1024,
        firing_rate: float = 0.2,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        stateful: bool = False,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy=policy,
            env=env,
            learning_rate=learning_rate,
            policy_kwargs=own_policy_kwargs(policy_kwargs, stateful),
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            supported_action_spaces=(spaces.Discrete,),
        )
        self.n_steps = n_steps
        self.n_epochs = n_epochs
        if n_minibatches is None:
            n_minibatches = min(_MINIBATCHES, self.n_envs) if stateful and self.env is not None else _MINIBATCHES
        elif stateful and self.env is not None and self.n_envs < n_minibatches:
            remedy = f"a stateful agent splits its environments, {self.n_envs}, so often"
            raise UserError("n_minibatches", n_minibatches, f"{remedy}; take fewer, or more environments")
        self.n_minibatches = n_minibatches
        self.gamma = gamma
        self.lam = lam
        self.reward_scale = reward_scale
        self.exploration_fraction = exploration_fraction
        self.exploration_initial_eps = exploration_initial_eps
        self.exploration_final_eps = exploration_final_eps
        self.exploration_repeat = exploration_repeat
        self.max_grad_norm = max_grad_norm
        self.calibration_steps = calibration_steps
        self.firing_rate = firing_rate
        self.exploration_rate = exploration_initial_eps
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.check_settings()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        options = {"optimizer_class": torch.optim.RAdam, **self.policy_kwargs}
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **options
        )
        self.policy = self.policy.to(self.device)
        self.episode_starts = np.ones(self.n_envs, dtype=bool)
        self._finish_setup()
        # The schedule divides by the fraction.
        first = self.exploration_initial_eps if self.exploration_fraction else self.exploration_final_eps
        self.exploration_schedule = LinearSchedule(first, self.exploration_final_eps, self.exploration_fraction or 1.0)

    def learn(
        self: SelfSpikingPQN,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 10,
        tb_log_name: str = "PQN",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSpikingPQN:
        """Train for ``total_timesteps`` agent steps (SB3's word for them), whole rollouts at a time.

        To callbacks the random play that thresholds are calibrated on is a rollout too, the first.
        """
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        assert self.env is not None
        # Of a short run half is left to learn in.
        random = min(self.calibration_steps, max(1, (total_timesteps - self.num_timesteps) // 2))
        if not self.calibrated:
            callback.on_rollout_start()
            if not self._calibrate_on_random_policy(random, callback):
                callback.on_training_end()
                return self
            callback.on_rollout_end()
        iteration = 0
        while self.num_timesteps < total_timesteps:
            callback.on_rollout_start()
            rollout = self._collect(callback)
            if rollout is None:
                break
            callback.on_rollout_end()
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self.train(rollout)
            iteration += 1
            if log_interval and iteration % log_interval == 0:
                self.dump_logs()
        callback.on_training_end()
        return self

    def dump_logs(self) -> None:
        """Write the scalars collected since the last call."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([e["r"] for e in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([e["l"] for e in self.ep_info_buffer]))
        self.logger.record("rollout/exploration_rate", self.exploration_rate)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    def _calibrate_on_random_policy(self, agent_steps: int, callback: BaseCallback) -> bool:
        """Act at random for so many agent steps, then scale inputs and set thresholds.

        Returns False if a callback stops it.
        """
        assert self.env is not None
        seen, starts = [np.array(self._last_obs)], [np.ones(self.n_envs, dtype=bool)]
        for _ in range(-(-agent_steps // self.n_envs)):
            actions = self.explorer.choose(np.zeros(self.n_envs, dtype=np.int64), epsilon=1.0)
            new_obs, rewards, dones, infos = self.env.step(actions)  # as SB3 calls them, where callbacks look
            self._last_obs = new_obs  # type: ignore[assignment]
            self.explorer.end_episodes(dones)
            self.num_timesteps += self.n_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            seen.append(np.array(self._last_obs))
            starts.append(dones)
        observations = obs_as_tensor(np.stack(seen), self.device)
        assert isinstance(observations, torch.Tensor)
        self.calibrate(observations, torch.as_tensor(np.stack(starts), device=self.device))
        self.episode_starts = starts[-1]
        return True

    def _collect(self, callback: BaseCallback) -> Rollout | None:
        """Play one rollout; return it with its targets, or None if a callback stops."""
        assert self.env is not None
        assert self._last_obs is not None
        self.policy.set_training_mode(False)
        shape = (self.n_steps, self.n_envs)
        observations = np.zeros((*shape, *self._last_obs.shape[1:]), dtype=self._last_obs.dtype)  # type: ignore[union-attr]
        actions = np.zeros(shape, dtype=np.int64)
        all_rewards = np.zeros(shape, dtype=np.float32)
        values = np.zeros((self.n_steps + 1, self.n_envs), dtype=np.float32)
        final_values = np.zeros(shape, dtype=np.float32)
        terminated = np.zeros(shape, dtype=bool)
        done = np.zeros(shape, dtype=bool)
        starts = np.zeros(shape, dtype=bool)
        before = self.current_membranes() if self.stateful else None
        teacher = self.imitated()
        taught = []
        for t in range(self.n_steps):
            self.exploration_rate = self.exploration_schedule(self.exploration_progress())
            starts[t] = self.episode_starts
            q = self.act_values(self._last_obs)  # type: ignore[arg-type]
            observations[t] = self._last_obs
            values[t] = q.max(1)
            if teacher is None:
                actions[t] = self.explorer.choose(q.argmax(1), self.exploration_rate)
            else:
                # Who knows nothing yet is shown by its teacher what a good game looks like.
                told = self._ask(teacher, observations[t])
                taught.append(told)
                shown = np.random.random(self.n_envs) < self.exploration_rate
                actions[t] = np.where(shown, told.argmax(1), q.argmax(1))
            new_obs, rewards, dones, infos = self.env.step(actions[t])
            self._last_obs = new_obs  # type: ignore[assignment]
            all_rewards[t], done[t] = rewards, dones
            self.num_timesteps += self.n_envs
            self._update_info_buffer(infos, done[t])
            self.explorer.end_episodes(done[t])
            self.episode_starts = done[t].copy()
            callback.update_locals(locals())
            if not callback.on_step():
                return None
            truncated = np.array([bool(i.get("TimeLimit.truncated", False)) for i in infos])
            terminated[t] = done[t] & ~truncated
            cut = np.flatnonzero(done[t] & truncated)
            if len(cut):
                final = np.stack([infos[i]["terminal_observation"] for i in cut])
                final_values[t, cut] = self._values_ahead(final, cut)
        values[-1] = self._values_ahead(self._last_obs, np.arange(self.n_envs))  # type: ignore[arg-type]
        next_values = np.where(done, final_values, values[1:])
        targets = lambda_returns(all_rewards * self.reward_scale, next_values, terminated, done, self.gamma, self.lam)
        return Rollout(observations, actions, targets, starts, before, np.stack(taught) if taught else None)

    def _ask(self, teacher: Teacher, observations: NDArray[Any]) -> NDArray[np.float32]:
        """Return a teacher's Q-values ``(n_envs, A)`` of the environments' observations, in their order."""
        obs = torch.as_tensor(observations, device=self.device).unsqueeze(0)
        starts = torch.as_tensor(self.episode_starts, device=self.device).unsqueeze(0)
        values: NDArray[np.float32] = teacher.values(obs, starts)[0].float().cpu().numpy()
        return values

    def _values_ahead(self, observations: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return max_a Q of the observations that follow the latest decision in some environments.

        The membranes are those after that decision, also where it ended the episode (a truncated
        episode goes on in the bootstrap); they stay as they are.
        """
        obs = obs_as_tensor(observations, self.device)
        state = None
        if self.stateful:
            state = tuple(LIFState(layer.membrane[rows]) for layer in self.current_membranes())
        with torch.no_grad():
            values = self.policy.q_net.q_values(obs, state)[0].max(1).values
        result: NDArray[np.float32] = values.float().cpu().numpy()
        return result

    def train(self, rollout: Rollout) -> None:
        """Regress Q(s, a) on the targets of one rollout, or all of Q(s) on the teacher's while there is one."""
        observations, actions, targets, starts, before, told = rollout
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        flat_obs = obs_as_tensor(observations.reshape(-1, *observations.shape[2:]), self.device)
        assert isinstance(flat_obs, torch.Tensor)
        self.policy.q_net.update_norm(flat_obs)
        all_obs = flat_obs.reshape(*targets.shape, *flat_obs.shape[1:])
        all_actions = torch.as_tensor(actions, device=self.device).unsqueeze(-1)
        all_targets = torch.as_tensor(targets, device=self.device)
        all_starts = torch.as_tensor(starts, device=self.device)
        taught = None if told is None else torch.as_tensor(told, device=self.device)
        losses = []
        for _ in range(self.n_epochs):
            # Stateless decisions are shuffled one by one, stateful ones stay in their episodes.
            order = torch.randperm(self.n_envs if before else targets.size).to(self.device)
            for rows in order.tensor_split(min(self.n_minibatches, len(order))):
                if before is None:
                    wanted = all_targets.flatten()[rows] if taught is None else taught.flatten(0, 1)[rows]
                    batch = [flat_obs[rows], all_actions.flatten(0, 1)[rows], wanted]
                else:
                    wanted = (all_targets if taught is None else taught)[:, rows]
                    batch = [all_obs[:, rows], all_actions[:, rows], wanted, all_starts[:, rows]]
                    batch += [layer.membrane[rows] for layer in before]
                losses.append(self.learn_from(self._regression if taught is None else self._imitation, *batch))
        self._n_updates += len(losses)
        self.update_average()
        self.record_loss(losses)
        self.logger.record("train/q_target_mean", float(targets.mean()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _values(self, observations: torch.Tensor, sequence: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return Q-values of a minibatch, whose ``sequence`` are starts and membranes where there is one."""
        with self.arithmetic():
            if not sequence:
                values: torch.Tensor = self.policy.q_net(observations).float()
                return values
            starts, *membranes = sequence
            return self.policy.q_net.q_sequence(observations, tuple(LIFState(m) for m in membranes), starts).float()

    def _regression(
        self, observations: torch.Tensor, played: torch.Tensor, wanted: torch.Tensor, *sequence: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of a minibatch against returns."""
        values = self._values(observations, sequence)
        return 0.5 * torch.nn.functional.mse_loss(values.gather(-1, played).squeeze(-1), wanted)

    def _imitation(
        self, observations: torch.Tensor, _: torch.Tensor, wanted: torch.Tensor, *sequence: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of a minibatch against a teacher's Q-values."""
        values = self._values(observations, sequence)
        return imitation_loss(values.flatten(0, -2), wanted.flatten(0, -2))

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
