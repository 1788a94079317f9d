"""Regression targets of Q-learning: pure functions on arrays."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float32]


def lambda_returns(
    rewards: FloatArray,
    next_values: FloatArray,
    terminated: NDArray[np.bool_],
    done: NDArray[np.bool_],
    gamma: float,
    lam: float,
) -> FloatArray:
    """Return Q(lambda) targets of a rollout.

        G[t] = r[t] + gamma * V[t+1]                                  where the episode was truncated
        G[t] = r[t]                                                   where it terminated
        G[t] = r[t] + gamma * ((1-lam) * V[t+1] + lam * G[t+1])       elsewhere

    and the last step bootstraps with V alone.

    Args:
        rewards: ``(L, N)``.
        next_values: V[t+1] = max_a Q(s[t+1], a), ``(L, N)``; at the end of an episode that of its
            final observation, not of the next episode's first.
        terminated: the environment ended the episode here, ``(L, N)``.
        done: terminated or truncated, ``(L, N)``.
        gamma: discount in [0, 1].
        lam: 0 gives one-step targets, 1 gives Monte Carlo returns.

    Returns:
        ``(L, N)``.

    Raises:
        ValueError: shapes differ.

    Source: Gallici et al. 2024 (PQN), Peng's Q(lambda); truncation as in Pardo et al. 2018.
    """
    if not rewards.shape == next_values.shape == terminated.shape == done.shape:
        raise ValueError(
            f"shapes differ: rewards {rewards.shape}, next_values {next_values.shape}, "
            f"terminated {terminated.shape}, done {done.shape}"
        )
    one_step = rewards + gamma * np.where(terminated, 0, next_values)
    returns = one_step.copy()
    for t in range(len(rewards) - 2, -1, -1):
        mixed = rewards[t] + gamma * ((1 - lam) * next_values[t] + lam * returns[t + 1])
        returns[t] = np.where(done[t], one_step[t], mixed)
    return returns.astype(np.float32)


def sequence_targets(
    rewards: Tensor,
    terminal: Tensor,
    decisions: Tensor,
    gamma: float,
    steps: int,
    next_online: Tensor,
    next_target: Tensor,
) -> Tensor:
    """Return n-step Double DQN targets along sequences of frames.

    A frame is one decision, or the final observation of an episode, which is no decision: returns
    stop there and bootstrap from it, unless the episode terminated.

    Args:
        rewards: ``(L + n, B)``.
        terminal: bool ``(L + n, B)``, the decision ended its episode (not by truncation).
        decisions: bool ``(L + n, B)``.
        gamma: discount.
        steps: n >= 1.
        next_online: online network's Q-values of every frame, ``(L + n, B, A)``.
        next_target: target network's.

    Returns:
        ``(L, B)``; meaningless where the frame is no decision.

    Source: van Hasselt et al. 2016; Kapturowski et al. 2019.
    """
    length = len(rewards) - steps
    best = next_online.argmax(2, keepdim=True)
    values = next_target.gather(2, best).squeeze(2)
    total = torch.zeros_like(rewards[:length])
    discount = torch.ones_like(total)
    going = torch.ones_like(terminal[:length])
    ended = torch.zeros_like(going)
    reach = torch.zeros_like(going, dtype=torch.long)
    for k in range(steps):
        window = slice(k, k + length)
        going = going & decisions[window]
        total = total + going * discount * rewards[window]
        discount = torch.where(going, discount * gamma, discount)
        reach = reach + going
        ended = ended | (going & terminal[window])
        going = going & ~terminal[window]
    at = torch.arange(length, device=rewards.device).unsqueeze(1) + reach
    return total + discount * ~ended * values.gather(0, at)


def double_q_targets(
    rewards: Tensor, dones: Tensor, discounts: Tensor | float, next_online: Tensor, next_target: Tensor
) -> Tensor:
    """Return one-step Double DQN targets ``r + discount * (1-done) * Q_target(s', argmax Q_online(s'))``.

    Args:
        rewards: ``(B, 1)``.
        dones: 1 where the episode terminated (not truncated), ``(B, 1)``.
        discounts: gamma, or gamma**n per sample ``(B, 1)``.
        next_online: online network's Q-values of the next observation, ``(B, A)``.
        next_target: target network's, ``(B, A)``.

    Source: van Hasselt et al. 2016.
    """
    best = next_online.argmax(dim=1, keepdim=True)
    return rewards + discounts * (1 - dones) * torch.gather(next_target, 1, best)
