"""Replay of stacked frames that keeps each frame once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from spiking_rl.errors import UserError

_MEMINFO = Path("/proc/meminfo")


class FrameReplayBuffer(BaseBuffer):
    """A ring of frames per environment; stacks are put together when sampled.

    Stable-Baselines3's ``ReplayBuffer`` stores a stack of four frames twice per transition: every frame
    eight times. Here a row is one frame with what was done on it. The final observation of an episode
    is a row of its own, without action, so that a truncated episode bootstraps from what it saw last.
    For Stable-Baselines3's ``DQN`` too: ``replay_buffer_class=FrameReplayBuffer``.

    Args:
        buffer_size: rows kept, over all environments.
        observation_space: uint8 ``(stack, H, W)``, oldest frame first; as a rule zero before an episode's first frame
            (as ``AtariVectorEnv`` and ``VecFrameStack`` do it). Other frames there, such as those before a lost life,
            are kept in rows of their own.
        action_space: Discrete.
        device: of the sampled tensors.
        n_envs: environments.
        n_steps: n of the n-step returns, >= 1.
        gamma: discount in them.

    Raises:
        UserError: another observation space, or less memory free than the arrays take.
    """

    ARRAYS = ("frames", "actions", "rewards", "starts", "terminal", "decisions")

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        *,
        n_steps: int = 1,
        gamma: float = 0.99,
    ) -> None:
        if not isinstance(observation_space, spaces.Box) or len(observation_space.shape) != 3:
            raise UserError("observation_space", str(observation_space), "FrameReplayBuffer takes (stack, H, W) images")
        super().__init__(max(1, buffer_size // n_envs), observation_space, action_space, device, n_envs)
        self.stack = observation_space.shape[0]
        self.n_steps = n_steps
        self.gamma = gamma
        least = self.stack + n_steps + 2  # two candidates: one of them may be a final observation
        if self.buffer_size < least:
            raise UserError("buffer_size", buffer_size, f"holds no transition; {least * n_envs} is the least")
        shape = (self.buffer_size, n_envs)
        _require_memory(buffer_size, math.prod(shape) * self.row_bytes(observation_space))
        self.frames = np.zeros((*shape, *observation_space.shape[1:]), dtype=observation_space.dtype)
        self.actions = np.zeros(shape, dtype=np.int16)
        self.rewards = np.zeros(shape, dtype=np.float32)
        self.starts = np.zeros(shape, dtype=bool)
        self.terminal = np.zeros(shape, dtype=bool)
        self.decisions = np.zeros(shape, dtype=bool)
        self.written = np.zeros(n_envs, dtype=np.int64)
        self.opens = np.ones(n_envs, dtype=bool)
        self.expected: NDArray[Any] | None = None  # observations, of games that go on

    @staticmethod
    def row_bytes(observation_space: spaces.Box) -> int:
        """Return the bytes that one row takes in all arrays."""
        frame = math.prod(observation_space.shape[1:]) * np.dtype(observation_space.dtype).itemsize
        return frame + 2 + 4 + 3

    def size(self) -> int:
        """Return the rows that every environment has."""
        return int(min(self.written.min(), self.buffer_size))

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Write one step of all environments, as SB3's buffers do.

        Args:
            obs: that were decided on, ``(N, stack, H, W)``.
            next_obs: that came of it; the final observation where an episode ended.
            action: ``(N,)`` or ``(N, 1)``.
            reward: ``(N,)``.
            done: the episode ended here, ``(N,)``.
            infos: ``TimeLimit.truncated`` is looked at.

        Raises:
            UserError: a game goes on with an observation that is not the one before, moved on by a frame.
        """
        done = np.asarray(done, dtype=bool)
        if (next_obs[~done, :-1] != obs[~done, 1:]).any():
            remedy = (
                "is no stack of frames, the newest last, that moves by one at each step; leave FrameReplayBuffer out "
                "(or, where a callback ended an earlier learn, go on with reset_num_timesteps=True)"
            )
            raise UserError("env", "an observation", remedy)
        starts = self._opened(obs)
        self.expected = next_obs.copy()
        everyone = np.arange(self.n_envs)
        truncated = np.array([bool(i.get("TimeLimit.truncated", False)) for i in infos])
        self._write(everyone, obs, np.reshape(action, -1), reward, starts, done & ~truncated, True)
        self.opens = done.copy()
        self._close(np.flatnonzero(done), next_obs)

    def _opened(self, obs: NDArray[Any]) -> NDArray[np.bool_]:
        """Tell which rows begin their episode; of an episode that goes on from older frames those do."""
        # A learner that begins anew (Stable-Baselines3's `learn`) resets its environments without a word.
        if self.expected is not None:
            self.cut(~self.opens & (obs != self.expected).any((1, 2, 3)))
        older = np.flatnonzero(self.opens)
        older = older[obs[older, :-1].any((1, 2, 3))]
        if len(older):
            for back in range(self.stack - 1, 0, -1):
                self._write(older, obs[older, :-back], 0, 0.0, back == self.stack - 1, False, False)
        starts = self.opens.copy()
        starts[older] = False
        return starts

    def cut(self, running: NDArray[np.bool_] | None = None) -> None:
        """Make final observations of the latest rows ``(N,)``; None: wherever an episode is running."""
        rows = np.flatnonzero(~self.opens if running is None else running)
        at = (self.written[rows] - 1) % self.buffer_size
        for array in (self.actions, self.rewards, self.terminal, self.decisions):
            array[at, rows] = 0
        self.opens[rows] = True

    def end_episodes(self, observations: NDArray[Any]) -> None:
        """Cut all running episodes, which were left at these observations, ``(N, stack, H, W)``."""
        self._close(np.flatnonzero(~self.opens), observations)
        self.opens[:] = True

    def _close(self, rows: NDArray[np.int64], observations: NDArray[Any]) -> None:
        if len(rows):
            self._write(rows, observations[rows], 0, 0.0, False, False, False)

    def _write(self, rows: NDArray[np.int64], observations: NDArray[Any], *rest: Any) -> None:
        at = self.written[rows] % self.buffer_size
        self.frames[at, rows] = observations[:, -1]
        arrays: tuple[NDArray[Any], ...] = (self.actions, self.rewards, self.starts, self.terminal, self.decisions)
        for array, values in zip(arrays, rest, strict=True):
            array[at, rows] = values
        self.written[rows] += 1

    def _candidates(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first usable time of each environment, and how many there are."""
        # The oldest rows lack frames before them, the newest rewards after them.
        overwritten = np.maximum(0, self.written - self.buffer_size)
        first = overwritten + np.where(overwritten > 0, self.stack, 0)
        return first, np.maximum(0, self.written - self.n_steps - first)

    @property
    def transitions(self) -> int:
        """Rows that can be drawn, about: those without an action count where others do too."""
        first, counts = self._candidates()
        drawn = any(
            self.decisions[(first[row] + np.arange(counts[row])) % self.buffer_size, row].any()
            for row in range(self.n_envs)
        )
        return int(counts.sum()) if drawn else 0

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Draw transitions at random, with numpy's global generator as SB3 does.

        Args:
            batch_size: transitions.
            env: must be None: frames are not normalised.
        """
        if env is not None:
            raise UserError("env", "VecNormalize", "FrameReplayBuffer does not normalise; leave it out")
        first, counts = self._candidates()
        nothing = UserError("batch_size", batch_size, "nothing to sample yet; the buffer has too few steps")
        if not counts.sum():
            raise nothing
        rows = np.empty(0, dtype=np.int64)
        at = np.empty(0, dtype=np.int64)
        while len(rows) < batch_size:
            drawn = np.random.randint(counts.sum(), size=batch_size)
            row = np.searchsorted(np.cumsum(counts), drawn, side="right")
            time = first[row] + drawn - (np.cumsum(counts) - counts)[row]
            decided = self.decisions[time % self.buffer_size, row]  # final observations have no action
            if not decided.any() and not self.transitions:  # which looks at every row
                raise nothing
            rows, at = np.append(rows, row[decided]), np.append(at, time[decided])
        return self._transitions(at[:batch_size], rows[:batch_size])

    def _transitions(self, at: NDArray[np.int64], rows: NDArray[np.int64]) -> ReplayBufferSamples:
        """Put transitions together that begin at absolute times ``at`` in the environments ``rows``."""
        returns = np.zeros(len(at), dtype=np.float32)
        discounts = np.ones(len(at), dtype=np.float32)
        going = np.ones(len(at), dtype=bool)
        terminal = np.zeros(len(at), dtype=bool)
        reach = at.copy()
        for _ in range(self.n_steps):
            where = reach % self.buffer_size, rows
            going = going & self.decisions[where]
            returns += going * discounts * self.rewards[where]
            discounts = np.where(going, discounts * np.float32(self.gamma), discounts)
            terminal |= going & self.terminal[where]
            reach = reach + going
            going = going & ~terminal
        return ReplayBufferSamples(
            observations=self.to_torch(self._stacks(at, rows)),
            actions=self.to_torch(self.actions[at % self.buffer_size, rows].astype(np.int64)[:, None]),
            next_observations=self.to_torch(self._stacks(reach, rows)),
            dones=self.to_torch(terminal.astype(np.float32)[:, None]),
            rewards=self.to_torch(returns[:, None]),
            # A plain one-step learner has its own gamma.
            discounts=self.to_torch(discounts[:, None]) if self.n_steps > 1 else None,
        )

    def _stacks(self, at: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the stacks that end at the times ``at``: zero before the episode's first frame."""
        stacks = np.zeros((len(at), self.stack, *self.frames.shape[2:]), dtype=self.frames.dtype)
        inside = np.ones(len(at), dtype=bool)
        for back in range(self.stack):
            where = (at - back) % self.buffer_size
            stacks[inside, -1 - back] = self.frames[where[inside], rows[inside]]
            inside = inside & ~self.starts[where, rows]
        return stacks

    def latest(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return observations ``(L, N, stack, H, W)`` and starts ``(L, N)`` of the latest rows."""
        frames = max(1, min(frames, self.size() - (self.stack if self.size() == self.buffer_size else 0)))
        at = self.written - frames + np.arange(frames)[:, None]
        rows = np.broadcast_to(np.arange(self.n_envs), at.shape)
        stacks = self._stacks(at.ravel(), rows.ravel()).reshape(*at.shape, *self.obs_shape)
        return self.to_torch(stacks), self.to_torch(self.starts[at % self.buffer_size, rows])

    def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
        raise NotImplementedError("transitions are drawn by sample()")


def _require_memory(buffer_size: int, needed: int) -> None:
    """Refuse a buffer for which the machine has no room.

    Raises:
        UserError: naming both sizes.
    """
    if not _MEMINFO.is_file():
        return  # not Linux: the allocation itself will tell
    found = [line.split()[1] for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable")]
    free = int(found[0]) * 1024 if found else needed
    if needed > free:
        rows = int(buffer_size * 0.9 * free / needed)
        raise UserError(
            "buffer_size",
            buffer_size,
            f"takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; choose at most {rows}",
        )
