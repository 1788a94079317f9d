"""Film greedy episodes, with the spikes beside the picture if wanted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from spiking_rl.agents.evaluation import MAX_DECISIONS, REPORT_SEED, check_episodes, q_network
from spiking_rl.envs.make import make_single
from spiking_rl.envs.video import Frame, write_video
from spiking_rl.errors import UserError
from spiking_rl.raster import SpikeRaster

_HEIGHT = 400  # pixels that a picture has at least, about: a raster beside it needs the room
_PAUSE = 0.6  # seconds that the last frame of an episode stays


@dataclass
class Film:
    """What was filmed.

    Attributes:
        path: of the mp4.
        returns: of each episode.
        frames: number of frames.
        fps: frames per second.
    """

    path: Path
    returns: list[float] = field(default_factory=list)
    frames: int = 0
    fps: float = 30.0


def film(
    model: BaseAlgorithm,
    env: str,
    path: Path | str,
    *,
    episodes: int = 1,
    seed: int = REPORT_SEED,
    spikes: bool = False,
) -> Film:
    """Write an mp4 of greedy episodes; episode k is reset with ``seed + k``, as in ``evaluate``.

    Args:
        model: a SpikingDQN or SpikingPQN.
        env: Gymnasium id that renders RGB frames.
        path: of the mp4.
        episodes: how many, >= 1.
        seed: of the first episode.
        spikes: draw a live spike raster at the right.

    Raises:
        UserError: a bad number, an environment that cannot render, a ReLU network with ``spikes``.
    """
    check_episodes(episodes, seed)
    if Path(path).suffix != ".mp4":
        raise UserError("output", str(path), "must end with .mp4")
    network = q_network(model).network
    if spikes and not network.spiking:
        raise UserError("spikes", spikes, "a ReLU network has none; leave it out")
    playing = make_single(env, render=True)
    if playing.render_mode != "rgb_array" or "rgb_array" not in playing.metadata.get("render_modes", []):
        playing.close()
        raise UserError("env", env, "gives no RGB frames (no render mode 'rgb_array')")
    spaces = (model.observation_space, model.action_space)
    if (playing.observation_space, playing.action_space) != spaces:
        playing.close()
        raise UserError("env", env, f"has other spaces than the agent: {spaces[0]}, {spaces[1]}")
    made = Film(Path(path), fps=float(playing.metadata.get("render_fps") or 30))
    try:
        made.frames = write_video(path, _frames(model, playing, seed, episodes, spikes, made), made.fps)
    finally:
        playing.close()
    return made


def _enlarged(picture: Any) -> Frame:
    """Repeat the pixels of a small picture, as those of an Atari game, until it is about 400 high."""
    frame: Frame = np.asarray(picture)
    times = max(1, round(_HEIGHT / frame.shape[0]))
    return frame.repeat(times, axis=0).repeat(times, axis=1)


def _frames(model: BaseAlgorithm, env: Any, seed: int, episodes: int, spikes: bool, made: Film) -> Iterator[Frame]:
    q_net = q_network(model)
    q_net.set_training_mode(False)
    limit = (env.spec.max_episode_steps if env.spec else None) or MAX_DECISIONS
    names = q_net.network.layer_names
    sizes = {} if q_net.network.encoder is None else {"input": int(np.prod(q_net.network.input_shape))}
    sizes |= {n: int(np.prod(s)) for n, s in zip(names, q_net.network.neuron_shapes(), strict=True)}
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        total, over, step = 0.0, False, 0
        frame = _enlarged(env.render())
        state = q_net.network.initial_state(1) if q_net.stateful else None
        raster = SpikeRaster(sizes, frame.shape[0]) if spikes else None
        while not over:
            seen: dict[str, NDArray[Any]] = {}

            def observer(layer: str, output: Tensor, _: Tensor, seen: dict[str, NDArray[Any]] = seen) -> None:
                seen[layer] = output[:, 0].flatten(1).numpy(force=True)

            with torch.no_grad():
                batch = torch.as_tensor(np.asarray(observation)[None], device=q_net.device)
                values, state = q_net.q_values(batch, state, observer=observer)
                action = int(values.argmax())
            # The frame shows what the agent saw, the raster how it decided on it.
            frame = _enlarged(env.render())
            if raster is not None:
                for layer, output in seen.items():
                    raster.push(layer, output)
                captions = [
                    f"T = {q_net.network.timesteps}   return {total:g}",
                    f"decision {step + 1}   action {action}   episode seed {seed + episode}",
                ]
                frame = np.concatenate([frame, raster.draw(captions)], axis=1)
            yield frame
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            step += 1
            over = terminated or truncated or step >= limit
        made.returns.append(total)
        for _ in range(round(_PAUSE * made.fps)):
            yield frame
