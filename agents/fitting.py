"""Whether a saved training state fits the learner that takes it over: who alters files can fit their hashes too."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer

from spiking_rl.agents.staged import StagedAlgorithm

_MOST = 2**53
_WHOLE = ("num_timesteps", "_n_updates", "_n_calls", "_episode_num", "stage", "stage_start", "_norm_steps")
_PARTS = ("_current_progress_remaining", "exploration_rate")


def require_fit(model: StagedAlgorithm, episodes: Any) -> None:
    """Refuse what a learner could not go on with.

    Args:
        model: with the state's values in it.
        episodes: returns of the latest training episodes.

    Raises:
        ValueError: telling what does not fit.
    """
    assert isinstance(model.action_space, spaces.Discrete)
    n_envs, n_actions = model.n_envs, int(model.action_space.n)
    space = model.observation_space
    _require_like("last_obs", np.asarray(model._last_obs), (n_envs, *(space.shape or ())), space.dtype)
    _require_like("episode_starts", model.episode_starts, (n_envs,), bool)
    for name, numbers, below in (("left", model.explorer.left, _MOST), ("action", model.explorer.action, n_actions)):
        _require_like(name, numbers, (n_envs,), np.int64)
        _require(name, bool(((numbers >= 0) & (numbers < below)).all()))
    for name in _WHOLE:
        value = getattr(model, name, 0)
        _require(name, type(value) is int and 0 <= value < _MOST)
    for name in _PARTS:
        value = getattr(model, name, 0.0)
        _require(name, type(value) in (int, float) and 0 <= value <= 1)
    _require("calibrated", type(model.calibrated) is bool)
    _require("last_loss", model.last_loss is None or _is_number(model.last_loss))
    _require(
        "episodes",
        isinstance(episodes, list) and all(isinstance(e, dict) and all(map(_is_number, e.values())) for e in episodes),
    )
    _require("episodes", all({"r", "l"} <= e.keys() for e in episodes))
    _require_tensors(model)
    _require_replay(getattr(model, "replay_buffer", None), n_actions)


def _require_tensors(model: StagedAlgorithm) -> None:
    q_net = model.policy.q_net
    if model.average is not None:
        own, averaged = (
            {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            for tensors in (q_net.state_dict(), model.average)
        )
        _require("average", averaged == own)
    if model.membranes is not None:
        resting = [state.membrane for state in q_net.network.initial_state(model.n_envs)]
        _require(
            "membrane", model.stateful and [s.membrane.shape for s in model.membranes] == [r.shape for r in resting]
        )
        _require("membrane", all(s.membrane.dtype == r.dtype for s, r in zip(model.membranes, resting, strict=True)))


def _require_replay(replay: Any, n_actions: int) -> None:
    if replay is None:
        return
    _require("replay", bool(((replay.actions >= 0) & (replay.actions < n_actions)).all()))
    if isinstance(replay, ReplayBuffer):
        _require("replay", 0 <= replay.pos < replay.buffer_size)
        return
    _require_like("written", replay.written, (replay.n_envs,), np.int64)
    _require("written", bool(((replay.written >= 0) & (replay.written < _MOST)).all()))


def _require_like(name: str, array: NDArray[Any], shape: tuple[int, ...], dtype: Any) -> None:
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{name} is {array.dtype} {array.shape} instead of {np.dtype(dtype)} {shape}")


def _require(name: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{name} holds what cannot be")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
