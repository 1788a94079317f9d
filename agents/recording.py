"""Record greedy play as arrays: what was seen, done and valued, and what every neuron did."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from spiking_rl.agents.evaluation import (
    MAX_DECISIONS,
    REPORT_SEED,
    check_episodes,
    playing_network,
    require_id,
    require_spaces,
)
from spiking_rl.envs.make import make_single
from spiking_rl.errors import UserError
from spiking_rl.files import write_atomically


@dataclass(frozen=True)
class Recording:
    """D decisions of greedy play, T timesteps each.

    Attributes:
        observations: raw, ``(D, *obs)``.
        actions: ``(D,)``.
        rewards: ``(D,)``.
        episode_starts: bool ``(D,)``, true where an episode opens.
        q_values: ``(D, A)``.
        spikes: bool ``(D, T, *N)`` by layer; non-zero outputs where the network is a ReLU network. Under hybrid and
            Poisson encoding also those of the ``input``.
        potentials: membrane potential before reset, float32 ``(D, T, *N)`` by layer, in units of the
            layer's current.
    """

    observations: NDArray[Any]
    actions: NDArray[np.int64]
    rewards: NDArray[np.float32]
    episode_starts: NDArray[np.bool_]
    q_values: NDArray[np.float32]
    spikes: dict[str, NDArray[np.bool_]]
    potentials: dict[str, NDArray[np.float32]]

    def save(self, path: Path | str) -> None:
        """Write a NumPy archive; read it with ``numpy.load(path, allow_pickle=False)``.

        Layers are kept as ``spikes.layer1``, ``potentials.layer1`` and so on.

        Raises:
            UserError: the name does not end with .npz.
        """
        if Path(path).suffix != ".npz":
            raise UserError("path", str(path), "must end with .npz")
        arrays: dict[str, NDArray[Any]] = {}
        for name, value in self.__dict__.items():
            arrays |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(Path(path), buffer.getvalue())


@torch.no_grad()
def record(
    model: BaseAlgorithm, env: str, *, episodes: int = 1, seed: int = REPORT_SEED, decisions: int = MAX_DECISIONS
) -> Recording:
    """Play greedy episodes and record them; episode k is reset with ``seed + k``, as in ``evaluate``.

    Args:
        model: a SpikingDQN or SpikingPQN; a stateful one carries its membranes.
        env: Gymnasium id.
        episodes: how many, >= 1.
        seed: of the first episode.
        decisions: stop after so many in all.

    Raises:
        UserError: a bad number, an unknown environment or one of other spaces, a foreign model.
    """
    check_episodes(episodes, seed)
    if decisions < 1:
        raise UserError("decisions", decisions, "must be at least 1")
    q_net = playing_network(model)
    require_id(env)
    q_net.set_training_mode(False)
    names = q_net.network.layer_names
    rows: list[tuple[Any, int, float, bool, NDArray[np.float32]]] = []
    spikes: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in names}
    potentials: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}

    def observer(layer: str, output: Tensor, potential: Tensor) -> None:
        spikes.setdefault(layer, []).append((output[:, 0] != 0).cpu().numpy())
        if layer in potentials:  # coded inputs have none
            potentials[layer].append(potential[:, 0].float().cpu().numpy())

    playing = make_single(env)
    try:
        require_spaces(q_net, playing, env)
        for episode in range(episodes):
            observation, _ = playing.reset(seed=seed + episode)
            state = q_net.network.initial_state(1) if q_net.stateful else None
            start, over = True, False
            while not over and len(rows) < decisions:
                batch = torch.as_tensor(np.asarray(observation)[None], device=q_net.device)
                values, state = q_net.q_values(batch, state, observer=observer)
                action = int(values.argmax())
                seen = np.array(observation)
                observation, reward, terminated, truncated, _ = playing.step(action)
                rows.append((seen, action, float(reward), start, values[0].float().cpu().numpy()))
                start, over = False, terminated or truncated
    finally:
        playing.close()
    observations, actions, rewards, starts, q_values = zip(*rows, strict=True)
    return Recording(
        observations=np.stack(observations),
        actions=np.array(actions, dtype=np.int64),
        rewards=np.array(rewards, dtype=np.float32),
        episode_starts=np.array(starts, dtype=bool),
        q_values=np.stack(q_values),
        spikes={name: np.stack(values) for name, values in spikes.items()},
        potentials={name: np.stack(values) for name, values in potentials.items()},
    )
