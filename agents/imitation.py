"""Learning from a trained agent: its Q-values and its choices are the targets, on the learner's own play."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from spiking_rl.agents.policies import SpikingQNetwork

_ROWS = 256  # observations per forward pass, to bound memory


class Teacher:
    """Tells the Q-values of a trained, stateless agent for what a learner sees.

    A learner that sees single frames of a game can be taught by an agent that sees several stacked: the
    teacher stacks them itself, zero before the first of an episode as the Atari environments do.

    Args:
        q_net: the trained agent's.
        frames: observations of the learner that make one of the teacher's, at least 1.
    """

    def __init__(self, q_net: SpikingQNetwork, frames: int = 1) -> None:
        q_net.set_training_mode(False)
        self.q_net = q_net
        self.frames = frames
        self._history: Tensor | None = None  # the last frames - 1 observations, (frames - 1, N, *obs)
        self._opened: Tensor | None = None  # which of them opened an episode, (frames - 1, N)

    def forget(self) -> None:
        """Begin anew: the next observations follow no others."""
        self._history = self._opened = None

    @torch.no_grad()
    def values(self, observations: Tensor, starts: Tensor) -> Tensor:
        """Return Q-values ``(L, N, A)`` of observations that follow those of the last call.

        Args:
            observations: raw, ``(L, N, *obs)``.
            starts: bool ``(L, N)``, true where an observation opens an episode.
        """
        rows = self._stacked(observations, starts).flatten(0, 1)
        values = torch.cat([self.q_net(part) for part in torch.split(rows, _ROWS)])
        return values.reshape(*observations.shape[:2], -1)

    def _stacked(self, observations: Tensor, starts: Tensor) -> Tensor:
        """Return ``(L, N, frames * C, ...)``, the oldest frame first."""
        before = self.frames - 1
        if not before:
            return observations
        if self._history is None or self._opened is None:
            self._history = torch.zeros_like(observations[:1].expand(before, *observations.shape[1:]))
            self._opened = torch.ones_like(starts[:1].expand(before, *starts.shape[1:]))
        seen, opened = torch.cat([self._history, observations]), torch.cat([self._opened, starts])
        self._history, self._opened = seen[len(seen) - before :], opened[len(opened) - before :]
        episode = opened.cumsum(0)
        length = len(observations)
        parts = []
        for back in range(before, -1, -1):
            part = seen[before - back : before - back + length]
            same = episode[before - back : before - back + length] == episode[before:]
            parts.append(part * same.reshape(*same.shape, *[1] * (part.dim() - 2)).to(part.dtype))
        return torch.cat(parts, 2)


def imitation_loss(values: Tensor, taught: Tensor) -> Tensor:
    """Return how far Q-values ``(B, A)`` are from a teacher's, in value and in choice.

    Squared differences of values, and the Kullback-Leibler divergence of the two softmax policies (Rusu et al.
    2016) at a temperature of half the teacher's own mean distance between its best two actions. Values of one
    state differ far less than those of different states: their squares alone say little about what to do.

    Args:
        values: the learner's.
        taught: the teacher's.
    """
    best = taught.topk(2, 1).values
    temperature = 0.5 * (best[:, 0] - best[:, 1]).mean().clamp(min=1e-6)
    chosen, wanted = (values / temperature).log_softmax(1), (taught / temperature).log_softmax(1)
    choice = functional.kl_div(chosen, wanted, log_target=True, reduction="batchmean")
    return 0.5 * functional.mse_loss(values, taught) + temperature * choice
