"""Replay of sequences with the membranes that were current when they were played."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import BaseBuffer
from torch import Tensor

Bools = NDArray[np.bool_]


class SequenceBatch(NamedTuple):
    """Sequences of frames; a frame is one decision, or the final observation of an episode.

    Attributes:
        observations: raw, ``(S, B, *obs)``.
        actions: int64 ``(S, B)``; 0 in a final frame.
        rewards: ``(S, B)``; 0 in a final frame.
        starts: bool ``(S, B)``, true where a frame opens an episode.
        terminal: bool ``(S, B)``, true where the decision ended its episode (not by truncation).
        decisions: bool ``(S, B)``, false in a final frame.
        membranes: before the first frame, all layers side by side, ``(B, neurons)``.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    starts: Tensor
    terminal: Tensor
    decisions: Tensor
    membranes: Tensor


class SequenceReplay(BaseBuffer):
    """A ring of frames per environment, and their membranes at every ``stride``-th frame.

    When an episode ends its final observation is a frame of its own, without action: the value that
    a truncated episode bootstraps from is then simply that of the next frame, computed with the
    membrane that the episode ended with.

    Args:
        buffer_size: frames kept, over all environments.
        observation_space: any space with a shape.
        action_space: Discrete.
        device: of the sampled tensors.
        n_envs: environments.
        span: frames per sampled sequence.
        stride: sequences begin at multiples of it.

    Source: Kapturowski et al. 2019 (R2D2), stored states; here in float16.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        *,
        span: int = 1,
        stride: int = 1,
    ) -> None:
        blocks = max(1, buffer_size // (n_envs * stride))
        super().__init__(blocks * stride, observation_space, action_space, device, n_envs)
        self.span = span
        self.stride = stride
        shape = (self.buffer_size, n_envs)
        self.observations = np.zeros((*shape, *self.obs_shape), dtype=observation_space.dtype)
        self.actions = np.zeros(shape, dtype=np.int64)
        self.rewards = np.zeros(shape, dtype=np.float32)
        self.starts = np.zeros(shape, dtype=bool)
        self.terminal = np.zeros(shape, dtype=bool)
        self.decisions = np.zeros(shape, dtype=bool)
        self.membranes = np.zeros((blocks, n_envs, 0), dtype=np.float16)
        self.written = np.zeros(n_envs, dtype=np.int64)

    ARRAYS = ("observations", "actions", "rewards", "starts", "terminal", "decisions", "membranes")

    def add(
        self,
        observations: NDArray[Any],
        actions: NDArray[np.int64],
        rewards: NDArray[np.float32],
        starts: Bools,
        terminated: Bools,
        ended: Bools,
        final: NDArray[Any],
        before: NDArray[np.float32],
        after: NDArray[np.float32],
    ) -> None:
        """Write one step of all environments, and a final frame where an episode ended.

        Args:
            observations: that were decided on, ``(N, *obs)``.
            actions: taken, ``(N,)``.
            rewards: received, ``(N,)``.
            starts: the observation opened an episode.
            terminated: the episode ended here, not by truncation.
            ended: the episode ended here.
            final: observations after the step; used where ``ended``.
            before: membranes before the decision, ``(N, neurons)``.
            after: membranes after it.
        """
        everyone = np.arange(self.n_envs)
        self._write(everyone, observations, before, actions, rewards, starts, terminated, True)
        self.end_episodes(ended, final, after)

    def end_episodes(self, running: Bools, observations: NDArray[Any], membranes: NDArray[np.float32]) -> None:
        """Cut running episodes ``(N,)``, left at these observations with these membranes."""
        rows = np.flatnonzero(running)
        if len(rows):
            self._write(rows, observations[rows], membranes[rows], 0, 0.0, False, False, False)

    def cut(self) -> None:
        """Make final frames of the latest: what is written next does not follow them."""
        rows = np.flatnonzero(self.written)
        at = (self.written[rows] - 1) % self.buffer_size
        for array in (self.actions, self.rewards, self.terminal, self.decisions):
            array[at, rows] = 0

    def _write(
        self, rows: NDArray[np.int64], observations: NDArray[Any], membranes: NDArray[np.float32], *rest: Any
    ) -> None:
        if self.membranes.shape[2] != membranes.shape[1]:
            self.membranes = np.zeros((*self.membranes.shape[:2], membranes.shape[1]), dtype=np.float16)
        at = self.written[rows] % self.buffer_size
        self.observations[at, rows] = observations.reshape(len(rows), *self.obs_shape)
        arrays: tuple[NDArray[Any], ...] = (self.actions, self.rewards, self.starts, self.terminal, self.decisions)
        for array, values in zip(arrays, rest, strict=True):
            array[at, rows] = values
        opens = at % self.stride == 0
        self.membranes[at[opens] // self.stride, rows[opens]] = membranes[opens]
        self.written[rows] += 1

    def size(self) -> int:
        """Return the frames that every environment has."""
        return int(min(self.written.min(), self.buffer_size))

    def _blocks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first usable block of each environment, and how many there are."""
        first = -(-np.maximum(0, self.written - self.buffer_size) // self.stride)
        last = (self.written - self.span) // self.stride
        return first, np.maximum(0, last - first + 1)

    @property
    def sequences(self) -> int:
        """Sequences that could be sampled."""
        return int(self._blocks()[1].sum())

    def sample(self, batch_size: int, env: Any = None) -> SequenceBatch:
        """Draw sequences of ``span`` frames at random, with numpy's global generator as SB3 does."""
        first, counts = self._blocks()
        drawn = np.random.randint(counts.sum(), size=batch_size)
        rows = np.searchsorted(np.cumsum(counts), drawn, side="right")
        blocks = first[rows] + drawn - (np.cumsum(counts) - counts)[rows]
        frames = (blocks * self.stride + np.arange(self.span)[:, None]) % self.buffer_size  # (S, B)

        def frames_of(array: NDArray[Any]) -> Tensor:
            return self.to_torch(array[frames, rows])

        return SequenceBatch(
            observations=frames_of(self.observations),
            actions=frames_of(self.actions),
            rewards=frames_of(self.rewards),
            starts=frames_of(self.starts),
            terminal=frames_of(self.terminal),
            decisions=frames_of(self.decisions),
            membranes=self.to_torch(self.membranes[blocks % len(self.membranes), rows].astype(np.float32)),
        )

    def latest(self, frames: int) -> tuple[Tensor, Tensor]:
        """Return observations ``(L, N, *obs)`` and starts ``(L, N)`` of the latest frames."""
        frames = max(1, min(frames, self.size()))
        at = (self.written - frames + np.arange(frames)[:, None]) % self.buffer_size
        rows = np.arange(self.n_envs)
        return self.to_torch(self.observations[at, rows]), self.to_torch(self.starts[at, rows])

    def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
        raise NotImplementedError("sequences are sampled whole: use sample()")
