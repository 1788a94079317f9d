"""SpikingDQN: Stable-Baselines3's DQN with a spiking network and Double Q-learning."""

from __future__ import annotations

import io
import math
import pathlib
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.type_aliases import GymEnv, RolloutReturn, Schedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch.nn import functional as F

from spiking_rl.agents.cnn_policies import SpikingCnnPolicy, SpikingDQNCnnPolicy
from spiking_rl.agents.frame_replay import FrameReplayBuffer
from spiking_rl.agents.imitation import imitation_loss
from spiking_rl.agents.policies import SpikingDQNPolicy, SpikingMlpPolicy, SpikingQNetwork
from spiking_rl.agents.replay import SequenceReplay
from spiking_rl.agents.staged import StagedAlgorithm, flat_membranes, own_policy_kwargs, split_membranes
from spiking_rl.agents.targets import double_q_targets, sequence_targets
from spiking_rl.envs.atari import AtariVecEnv
from spiking_rl.errors import UserError

_OUT = "leave it out"
_SCALES_ITSELF = f"a stateful agent scales observations itself; {_OUT}"


class SpikingDQN(StagedAlgorithm, DQN):
    """Double DQN (van Hasselt et al. 2016) with a spiking Q-network: the algorithm of the papers.

    Takes every argument of :class:`stable_baselines3.DQN`; those that differ or are added:

    Args:
        policy: ``"MlpPolicy"``, ``"CnnPolicy"`` or a policy class.
        env: environment, vectorised environment or its id.
        learning_rate: initial learning rate, or a schedule of the progress remaining.
        learning_starts: agent steps to replay before learning. They are random, and observation scaling
            and thresholds are set on them, so at least 1,000 are worth having; a trained agent that goes
            on plays them itself.
        firing_rate: spikes per neuron and timestep that calibration aims at.
        reward_scale: rewards are multiplied by it for learning (reported returns are not); Q-values
            near 1 suit spikes, whose readout starts at zero.
        exploration_repeat: mean number of steps that a random action is held.
        stateful: carry the membranes through the episode, and learn from sequences (R2D2): the
            membranes stored with a sequence are brought up to date on its first frames by the online
            and by the target network, then the rest is learned from, ``batch_size`` decisions per
            update in all.
        burn_in: frames of the first kind, >= 0.
        sequence_length: frames of the second kind, >= 1.
        stored_membranes: begin from them; False begins at rest, whose error is larger.
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
        "tau",
        "exploration_fraction",
        "exploration_initial_eps",
        "exploration_final_eps",
        "exploration_repeat",
        "max_grad_norm",
        "firing_rate",
        "reward_scale",
        "burn_in",
        "sequence_length",
        "stored_membranes",
    )
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": SpikingDQNPolicy,
        "CnnPolicy": SpikingDQNCnnPolicy,
        "MultiInputPolicy": SpikingDQNPolicy,  # which says what to do with a Dict
    }
    policy: SpikingMlpPolicy
    _norm_steps = 0  # agent steps whose observations the running scaling has seen
    _before: NDArray[np.float32]  # membranes before the decision under way
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
        stateful: bool = False,
        burn_in: int = 8,
        sequence_length: int = 16,
        stored_membranes: bool = True,
        **kwargs: Any,
    ) -> None:
        if learning_starts < 2:
            raise UserError("learning_starts", learning_starts, "calibration needs at least 2, better 1,000")
        kwargs["policy_kwargs"] = own_policy_kwargs(kwargs.get("policy_kwargs"), stateful)
        # What serves stock DQN as it is carries no state.
        if policy is SpikingMlpPolicy:
            policy = SpikingDQNPolicy
        elif policy is SpikingCnnPolicy:
            policy = SpikingDQNCnnPolicy
        self.burn_in = burn_in
        self.sequence_length = sequence_length
        self.stored_membranes = stored_membranes
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
        if self.env is not None:  # of a zip that was saved by an agent that only played, too
            self.plays_only = False
        self.check_settings()
        self.episode_starts = np.ones(self.n_envs, dtype=bool)
        wanted = self.buffer_size, self.replay_buffer_class, self.replay_buffer_kwargs, self.n_steps
        try:
            replay = self._own_replay()
            if replay is None:
                self.replay_buffer_kwargs = dict(self.replay_buffer_kwargs)
            else:
                self.replay_buffer_class, self.replay_buffer_kwargs = replay
                self.n_steps = 1  # Stable-Baselines3 would warn that it sets up no n-step returns for it
            if self.plays_only:
                self.buffer_size = 1
            super()._setup_model()
        finally:
            # What was asked for stays: another environment, or n, may lead to another replay.
            self.buffer_size, self.replay_buffer_class, self.replay_buffer_kwargs, self.n_steps = wanted
        if self.stateful and self._vec_normalize_env is not None:
            raise UserError("env", "VecNormalize", _SCALES_ITSELF)
        self._finish_setup()

    def _own_replay(self) -> tuple[type[Any], dict[str, Any]] | None:
        """Return which replay of ours this agent learns from, and its options; None: one of Stable-Baselines3."""
        given: type[Any] | None = self.replay_buffer_class
        options = dict(self.replay_buffer_kwargs)
        if self.policy_kwargs.get("stateful"):
            if given is not None and given is not SequenceReplay:
                remedy = "a stateful agent replays sequences (SequenceReplay); leave it out"
                raise UserError("replay_buffer_class", given.__name__, remedy)
            if options or self.optimize_memory_usage:
                name = "replay_buffer_kwargs" if options else "optimize_memory_usage"
                remedy = "is no option of a stateful agent's replay, which burn_in and sequence_length describe"
                raise UserError(name, options or True, f"{remedy}; leave it out")
            span, stride = self.burn_in + self.sequence_length + self.n_steps, max(1, self.sequence_length // 2)
            # Rows are whole strides, and the oldest of them are being overwritten.
            least = stride * -(-(span + stride - 1) // stride) * self.n_envs
            if self.env is not None and self.buffer_size < least:
                raise UserError("buffer_size", self.buffer_size, f"holds no sequence; {least} frames are the least")
            return SequenceReplay, {"span": span, "stride": stride}
        if given is FrameReplayBuffer or (given is None and isinstance(self.env, AtariVecEnv)):
            returns = {"n_steps": self.n_steps, "gamma": self.gamma}
            if options not in ({}, returns):
                raise UserError("replay_buffer_kwargs", options, f"FrameReplayBuffer has the agent's {returns}; {_OUT}")
            return FrameReplayBuffer, returns
        return None

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As in Stable-Baselines3; an agent that was loaded to play gets its replay buffer, and can learn on."""
        env = self._wrap_env(env, self.verbose)
        if self.stateful and unwrap_vec_normalize(env) is not None:
            raise UserError("env", "VecNormalize", _SCALES_ITSELF)
        with self._as_it_was_if_refused():
            if self.plays_only:
                self.replay_buffer = None
            super().set_env(env, force_reset)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """Load what ``save_replay_buffer`` wrote, of our own buffers too; as all of SB3's it unpickles.

        Raises:
            UserError: a buffer that this agent cannot learn from, or an agent that was loaded to play.
        """
        if self.plays_only or self.replay_buffer is None:
            raise UserError("replay_buffer", str(path), "this agent was loaded to play; give it an environment first")
        found = load_from_pkl(path, self.verbose)
        if type(found) is not type(self.replay_buffer):
            wanted = type(self.replay_buffer).__name__
            raise UserError("replay_buffer", type(found).__name__, f"is no {wanted}, which this agent learns from")
        if found.n_envs != self.n_envs:
            remedy = f"is of {found.n_envs} environments; give the agent as many, not {self.n_envs}"
            raise UserError("replay_buffer", str(path), remedy)
        for name in ("obs_shape", "span", "stride", "n_steps", "gamma"):
            theirs, own = getattr(found, name, None), getattr(self.replay_buffer, name, None)
            if theirs != own:
                raise UserError("replay_buffer", str(path), f"has {name} {theirs}, this agent {own}; make them alike")
        if isinstance(found, SequenceReplay):
            neurons = sum(map(math.prod, self.q_net.network.neuron_shapes()))
            if found.membranes.shape[2] not in (0, neurons):
                remedy = f"has membranes of {found.membranes.shape[2]} neurons, this agent {neurons}"
                raise UserError("replay_buffer", str(path), f"{remedy}; load one of the same network")
        found.device = self.device
        self.replay_buffer = found
        # What is played next does not go on where these games were left.
        if isinstance(found, (SequenceReplay, FrameReplayBuffer)):
            found.cut()
        else:
            _cut(found)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kwargs: Any) -> RolloutReturn:
        """As in Stable-Baselines3, but the step at which a callback ends learning is kept.

        There it is lost: a later ``learn(reset_num_timesteps=False)`` would go on from the observation before it,
        and replay a transition that never was.
        """
        rollout = super().collect_rollouts(env, callback, *args, **kwargs)
        if not rollout.continue_training:
            last = callback.locals
            self._update_info_buffer(last["infos"], last["dones"])
            names = ("replay_buffer", "buffer_actions", "new_obs", "rewards", "dones", "infos")
            self._store_transition(*(last[name] for name in names))
        return rollout

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Explore in each environment on its own (SB3's DQN draws one coin for all)."""
        assert self._last_obs is not None
        warm_up = self.num_timesteps < learning_starts and not self.calibrated  # a trained agent need not
        if warm_up and not self.stateful:
            greedy = np.zeros(n_envs, dtype=np.int64)
        else:
            if self.stateful:
                self._before = flat_membranes(self.current_membranes())
            greedy = self.act_values(self._last_obs).argmax(1)  # type: ignore[arg-type]
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
        self.explorer.end_episodes(dones)
        if not isinstance(replay_buffer, SequenceReplay):
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
            return
        assert isinstance(new_obs, np.ndarray)
        assert isinstance(self._last_obs, np.ndarray)
        final = new_obs.copy()
        truncated = np.zeros(len(dones), dtype=bool)
        for row in np.flatnonzero(dones):
            final[row] = infos[row].get("terminal_observation", new_obs[row])
            truncated[row] = infos[row].get("TimeLimit.truncated", False)
        replay_buffer.add(
            self._last_obs,
            buffer_action,
            reward.astype(np.float32),
            self.episode_starts,
            dones & ~truncated,
            dones,
            final,
            self._before,
            flat_membranes(self.current_membranes()),
        )
        self.episode_starts = dones.copy()
        self._last_obs = new_obs

    def _on_step(self) -> None:
        super()._on_step()
        self.exploration_rate = self.exploration_schedule(self.exploration_progress())
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Do ``gradient_steps`` Double-DQN updates on replayed batches."""
        assert self.replay_buffer is not None
        sequences = self.replay_buffer if isinstance(self.replay_buffer, SequenceReplay) else None
        frames = self.replay_buffer if isinstance(self.replay_buffer, FrameReplayBuffer) else None
        empty = (sequences is not None and not sequences.sequences) or (frames is not None and not frames.transitions)
        # Stable-Baselines3 counts the agent's steps from its birth; a loaded or converted one has others behind it.
        waits_for = max(2, min(self.learning_starts, self.replay_buffer.buffer_size * self.n_envs))
        if self.replay_buffer.size() * self.n_envs < waits_for or empty:
            return  # nothing to calibrate on yet, or to learn from
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        if self.calibrated:
            # A random policy sees a small part of the state space: the scaling must go on learning.
            fresh = (self.num_timesteps - self._norm_steps) // self.n_envs
            if self.q_net.norm is not None:
                self.q_net.update_norm(self._latest(max(1, fresh))[0].flatten(0, 1))
        else:
            self.calibrate(*self._latest(self.replay_buffer.size()))
        self._norm_steps = self.num_timesteps
        losses = []
        for _ in range(gradient_steps):
            if sequences is None:
                losses.append(self._update(batch_size))
            else:
                losses.append(self.learn_from(lambda: self._sequence_loss(sequences, batch_size), record=False))
        self._n_updates += gradient_steps
        self.update_average()
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.record_loss(losses)

    def _update(self, batch_size: int) -> torch.Tensor:
        """Learn from one batch of independent transitions; return the loss."""
        assert self.replay_buffer is not None
        batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
        teacher = self.imitated()
        if teacher is not None:
            alone = torch.ones(1, len(batch.observations), dtype=torch.bool, device=self.device)
            taught = teacher.values(batch.observations.unsqueeze(0), alone)[0]
            return self.learn_from(self._imitation, batch.observations, taught)
        played = batch.observations, batch.actions.long(), batch.rewards * self.reward_scale
        discounts = () if batch.discounts is None else (batch.discounts,)
        return self.learn_from(self._regression, *played, batch.next_observations, batch.dones, *discounts)

    def _imitation(self, observations: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch against a teacher's Q-values."""
        with self.arithmetic():
            values = self.q_net(observations).float()
        return imitation_loss(values, taught)

    def _regression(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        next_observations: torch.Tensor,
        dones: torch.Tensor,
        discounts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of a batch against Double DQN's targets."""
        with torch.no_grad(), self.arithmetic():
            targets = double_q_targets(
                rewards,
                dones,
                self.gamma if discounts is None else discounts,
                self.q_net(next_observations),
                self.q_net_target(next_observations),
            )
        with self.arithmetic():
            q = self.q_net(observations).gather(1, actions).float()
        return F.smooth_l1_loss(q, targets)

    def _sequence_loss(self, replay: SequenceReplay, batch_size: int) -> torch.Tensor:
        """Return the loss of one batch of sequences, the membranes brought up to date on their first frames."""
        batch = replay.sample(max(1, batch_size // self.sequence_length))
        stored = batch.membranes if self.stored_membranes else torch.zeros_like(batch.membranes)
        before = split_membranes(stored, self.q_net.network.neuron_shapes())
        cut = self.burn_in
        learned = slice(cut, cut + self.sequence_length)
        teacher = self.imitated()
        with torch.no_grad(), self.arithmetic():
            if teacher is None:
                target = self.q_net_target.q_sequence(batch.observations, before, batch.starts).float()
            if cut:
                before = self.q_net.sequence(batch.observations[:cut], before, batch.starts[:cut])[1]
        if teacher is not None:
            teacher.forget()  # it has a few frames to look back on where the burn-in has as many
            taught = teacher.values(batch.observations, batch.starts)[learned]
            with self.arithmetic():
                q = self.q_net.q_sequence(batch.observations[learned], before, batch.starts[learned]).float()
            mask = batch.decisions[learned]
            return imitation_loss(q[mask], taught[mask])
        # One pass over the rest: its Q-values are regressed, and without gradient choose the best action.
        with self.arithmetic():
            q = self.q_net.q_sequence(batch.observations[cut:], before, batch.starts[cut:]).float()
        targets = sequence_targets(
            batch.rewards[cut:] * self.reward_scale,
            batch.terminal[cut:],
            batch.decisions[cut:],
            self.gamma,
            self.n_steps,
            q.detach(),
            target[cut:],
        )
        chosen = q[: self.sequence_length].gather(2, batch.actions[learned].unsqueeze(2)).squeeze(2)
        mask = batch.decisions[learned]
        return F.smooth_l1_loss(chosen[mask], targets[mask])

    def _latest(self, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return raw observations ``(L, N, *obs)`` and episode starts ``(L, N)`` of the latest steps."""
        if isinstance(self.replay_buffer, (SequenceReplay, FrameReplayBuffer)):
            return self.replay_buffer.latest(steps)
        latest = self._latest_observations(steps).unsqueeze(0)
        return latest, torch.zeros(latest.shape[:2], dtype=torch.bool)

    def _latest_observations(self, rows: int) -> torch.Tensor:
        """Return the raw observations of the latest ``rows`` steps of all environments, ``(B, *obs)``."""
        assert self.replay_buffer is not None
        rows = min(rows, self.replay_buffer.size())
        where = np.arange(self.replay_buffer.pos - rows, self.replay_buffer.pos) % self.replay_buffer.buffer_size
        stored = self.replay_buffer.observations[where].reshape(-1, *self.replay_buffer.obs_shape)
        if self._vec_normalize_env is not None:  # the buffer holds what came before VecNormalize
            stored = self._vec_normalize_env.normalize_obs(stored)  # type: ignore[assignment]
        return torch.as_tensor(stored, device=self.device)

    def end_episodes(self) -> None:
        """As in :class:`StagedAlgorithm`; the replay keeps where they were left."""
        assert isinstance(self._last_obs, np.ndarray)
        if isinstance(self.replay_buffer, SequenceReplay):
            self.replay_buffer.end_episodes(
                ~self.episode_starts, self._last_obs, flat_membranes(self.current_membranes())
            )
        elif isinstance(self.replay_buffer, FrameReplayBuffer):
            self.replay_buffer.end_episodes(self._last_obs)
        elif self.replay_buffer is not None:
            _cut(self.replay_buffer)
        super().end_episodes()

    def begin_stage(self, timesteps: int) -> None:
        """As in :class:`StagedAlgorithm`; the target network starts equal to the online one."""
        super().begin_stage(timesteps)
        self.policy.q_net_target.load_state_dict(self.policy.q_net.state_dict())


def _cut(replay: ReplayBuffer) -> None:
    """Let no return of Stable-Baselines3's replay reach beyond its latest step: the episode is left there.

    As where time is up: the last observation of each environment, which is stored, still has a value.
    """
    if replay.size() and replay.handle_timeout_termination and not replay.optimize_memory_usage:
        running = replay.dones[replay.pos - 1] == 0
        replay.timeouts[replay.pos - 1, running] = 1
        replay.dones[replay.pos - 1, running] = 1
