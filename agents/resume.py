"""The whole state of a training run as files: resume continues bit for bit, unpickling nothing.

Atari is the exception: a save cuts its games, see :func:`spiking_rl.envs.make.restart`.

state.json            counters, schedules, random generators, environments, hashes of the rest
tensors.safetensors   networks and optimiser
replay/*.npy          replay buffer, where there is one
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer

from spiking_rl.agents.fitting import require_fit
from spiking_rl.agents.frame_replay import FrameReplayBuffer
from spiking_rl.agents.replay import SequenceReplay
from spiking_rl.agents.spaces import space_to_json
from spiking_rl.agents.staged import StagedAlgorithm
from spiking_rl.checkpoint import misfits, plain_number, read_json
from spiking_rl.envs.make import can_be_saved, get_states, restart, set_states
from spiking_rl.errors import UserError
from spiking_rl.files import recover_folder, replace_folder
from spiking_rl.neurons import LIFState
from spiking_rl.state import (
    REMEDY,
    generators,
    hashes_of,
    pack_optimiser,
    read_array,
    read_tensors,
    restore_generators,
    unpack_optimiser,
    verify,
)

_COUNTERS = (
    "num_timesteps",
    "_n_updates",
    "_n_calls",
    "_episode_num",
    "_current_progress_remaining",
    "exploration_rate",
    "calibrated",
    "stage",
    "stage_start",
    "last_loss",
    "_norm_steps",
)
_REPLAY = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
AnyReplay = ReplayBuffer | SequenceReplay | FrameReplayBuffer


def save_training_state(folder: Path, model: StagedAlgorithm, extra: dict[str, Any]) -> None:
    """Write everything that continuing needs, atomically, replacing an older state.

    Args:
        folder: receives the files.
        model: between two rollouts, on an environment of :func:`spiking_rl.envs.make_vectorised`. Games
            of Atari begin anew: emulators cannot be saved.
        extra: the caller's own state, JSON-serialisable.

    Raises:
        OSError: the folder cannot be written; the older state stays.
    """
    assert model.env is not None
    if not can_be_saved(model.env):
        model.end_episodes()
        model._last_obs = restart(model.env)
    with replace_folder(folder) as partial:
        tensors = {f"policy.{k}": v.cpu().contiguous() for k, v in model.policy.state_dict().items()}
        tensors |= {f"average.{k}": v.cpu().contiguous() for k, v in (model.average or {}).items()}
        tensors |= {f"membrane.{i}": s.membrane.cpu().contiguous() for i, s in enumerate(model.membranes or ())}
        optimiser, scalars = pack_optimiser(model.policy.optimizer)
        last_obs = np.asarray(model._last_obs)
        (partial / "tensors.safetensors").write_bytes(safetensors.torch.save({**tensors, **optimiser}))
        (partial / "replay").mkdir()
        replay = getattr(model, "replay_buffer", None)
        if replay is not None:
            for name, rows in _replay_arrays(replay).items():
                _write_array(partial / "replay" / f"{name}.npy", rows)
        _write_array(partial / "last_obs.npy", last_obs)
        state = {
            "spaces": _spaces(model),
            "counters": {name: getattr(model, name) for name in _COUNTERS if hasattr(model, name)},
            "timesteps": model.policy.timesteps,
            "episode_starts": model.episode_starts.tolist(),
            "exploring": {"left": model.explorer.left.tolist(), "action": model.explorer.action.tolist()},
            "optimiser": scalars,
            "replay": _replay_counters(replay),
            "episodes": list(model.ep_info_buffer or []),
            "generators": generators(),
            "action_space": model.action_space.np_random.bit_generator.state,
            "environments": get_states(model.env),
            "extra": extra,
            "sha256": hashes_of(partial),
        }
        (partial / "state.json").write_text(json.dumps(state, default=plain_number))


class _Chunks:
    """What numpy writes to piece by piece: of a file that it knows for one it loses the reason why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.write = file.write


def _write_array(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(_Chunks(file), array, allow_pickle=False)


def _spaces(model: StagedAlgorithm) -> list[dict[str, Any]]:
    return [space_to_json(model.observation_space), space_to_json(model.action_space)]


def has_training_state(folder: Path) -> bool:
    """Tell whether there is anything to resume from."""
    recover_folder(folder)
    return (folder / "state.json").is_file()


def load_training_state(folder: Path, model: StagedAlgorithm) -> dict[str, Any]:
    """Put a saved state into a freshly built model of the same configuration; return ``extra``.

    Raises:
        UserError: a file is missing, truncated, altered, or does not fit the model.
    """
    recover_folder(folder)
    state = read_json(folder / "state.json", "resume")
    try:
        verify(folder, state["sha256"])
        if state.get("spaces", _spaces(model)) != _spaces(model):
            raise UserError("resume", str(folder), f"was saved with other observations or actions; {REMEDY}")
        tensors = read_tensors(folder / "tensors.safetensors")
        model.policy.set_timesteps(state["timesteps"])
        model.policy_kwargs["timesteps"] = state["timesteps"]
        own = {k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")}
        if wrong := misfits(model.policy, own):
            raise ValueError("; ".join(wrong))
        model.policy.load_state_dict(own)
        average = {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
        model.average = {k: v.to(model.device) for k, v in average.items()} or None
        membranes = [tensors[f"membrane.{i}"] for i in range(sum(k.startswith("membrane.") for k in tensors))]
        model.membranes = tuple(LIFState(m.to(model.device)) for m in membranes) or None
        model.episode_starts = np.array(state["episode_starts"], dtype=bool)
        model.policy.rebuild_optimizer(model.lr_schedule(1.0))
        unpack_optimiser(model.policy.optimizer, tensors, state["optimiser"])
        for name, value in state["counters"].items():
            if name not in _COUNTERS:
                raise KeyError(name)
            setattr(model, name, value)
        model.explorer.left = np.array(state["exploring"]["left"], dtype=np.int64)
        model.explorer.action = np.array(state["exploring"]["action"], dtype=np.int64)
        replay = getattr(model, "replay_buffer", None)
        if replay is not None:
            _load_replay(folder / "replay", replay, state["replay"])
        model._last_obs = read_array(folder / "last_obs.npy")
        model._last_original_obs = None
        model.ep_info_buffer = deque(state["episodes"], maxlen=model._stats_window_size)
        model.ep_success_buffer = deque(maxlen=model._stats_window_size)
        set_states(model.env, state["environments"])  # type: ignore[arg-type]
        restore_generators(state["generators"])
        model.action_space.np_random.bit_generator.state = state.get(
            "action_space", state["generators"].get("action_space")
        )
        require_fit(model, state["episodes"])
        extra: dict[str, Any] = state["extra"]
        if not isinstance(extra, dict):
            raise TypeError("extra is no mapping")
        return extra
    except (LookupError, TypeError, ValueError, RuntimeError, OSError, AttributeError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError("resume", str(folder), f"cannot be continued ({reason}); {REMEDY}") from None


def _replay_arrays(replay: AnyReplay) -> dict[str, np.ndarray[Any, Any]]:
    """Return what has been written of a replay buffer."""
    if isinstance(replay, FrameReplayBuffer):
        return {n: getattr(replay, n)[: int(min(replay.written.max(), replay.buffer_size))] for n in replay.ARRAYS}
    if isinstance(replay, SequenceReplay):
        frames = int(min(replay.written.max(), replay.buffer_size))
        blocks = -(-frames // replay.stride)
        return {n: getattr(replay, n)[: blocks if n == "membranes" else frames] for n in replay.ARRAYS}
    return {name: getattr(replay, name)[: replay.size()] for name in _REPLAY}


def _replay_counters(replay: AnyReplay | None) -> dict[str, Any] | None:
    if replay is None:
        return None
    if isinstance(replay, FrameReplayBuffer):
        return {"written": replay.written.tolist(), "opens": replay.opens.tolist()}
    if isinstance(replay, SequenceReplay):
        return {"written": replay.written.tolist()}
    return {"pos": replay.pos, "full": replay.full}


def _load_replay(folder: Path, replay: AnyReplay, state: dict[str, Any]) -> None:
    if isinstance(replay, SequenceReplay):
        membranes = read_array(folder / "membranes.npy")
        replay.membranes = np.zeros((*replay.membranes.shape[:2], *membranes.shape[2:]), dtype=np.float16)
    names = _REPLAY if isinstance(replay, ReplayBuffer) else replay.ARRAYS
    for name in names:
        target = getattr(replay, name)
        rows = read_array(folder / f"{name}.npy")
        if rows.shape[1:] != target.shape[1:] or rows.dtype != target.dtype or len(rows) > len(target):
            raise UserError("resume", str(folder / f"{name}.npy"), f"has another shape or type; {REMEDY}")
        target[: len(rows)] = rows
    if isinstance(replay, ReplayBuffer):
        replay.pos, replay.full = int(state["pos"]), bool(state["full"])
        return
    replay.written = np.array(state["written"], dtype=np.int64)
    if isinstance(replay, FrameReplayBuffer):
        replay.opens = np.array(state["opens"], dtype=bool)
