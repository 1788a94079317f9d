"""Film greedy episodes, if wanted with Q-values, spikes and membranes around the picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from spiking_rl.agents.evaluation import MAX_DECISIONS, REPORT_SEED, check_episodes, playing_network, require_spaces
from spiking_rl.agents.panel import Neuron, Panel, action_names, choose_neurons
from spiking_rl.agents.policies import q_network
from spiking_rl.envs.make import make_single
from spiking_rl.envs.video import Frame, write_video
from spiking_rl.errors import UserError

_HEIGHT = 400  # pixels that a picture has at least, about: a raster beside it needs the room
_PLAIN, _DRAWN = 7, 6  # quality of a film; drawings change in every frame, and stay legible
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
    neurons: Sequence[str] = (),
) -> Film:
    """Write an mp4 of greedy episodes; episode k is reset with ``seed + k``, as in ``evaluate``.

    Args:
        model: a SpikingDQN or SpikingPQN.
        env: Gymnasium id that renders RGB frames.
        path: of the mp4.
        episodes: how many, >= 1.
        seed: of the first episode.
        spikes: also draw Q-values and, of a spiking network, a live spike raster and membrane potentials.
        neurons: whose membranes are drawn, such as ``layer1:3``; none: three with large readout weights.

    Raises:
        UserError: a bad number, a neuron that is not there, an environment that cannot render.
    """
    check_episodes(episodes, seed)
    if Path(path).suffix != ".mp4":
        raise UserError("output", str(path), "must end with .mp4")
    q_net = playing_network(model)
    network = q_net.network
    if neurons and not spikes:
        raise UserError("neurons", " ".join(neurons), "are drawn beside the spikes only; add --spikes (spikes=True)")
    if neurons and not network.spiking:
        raise UserError("neurons", " ".join(neurons), "a ReLU network has no membranes; leave it out")
    shown = (choose_neurons(network, neurons) if network.spiking else []) if spikes else None
    playing = make_single(env, render=True)
    if playing.render_mode != "rgb_array" or "rgb_array" not in playing.metadata.get("render_modes", []):
        playing.close()
        raise UserError("env", env, "gives no RGB frames (no render mode 'rgb_array')")
    made = Film(Path(path), fps=float(playing.metadata.get("render_fps") or 30))
    try:
        require_spaces(q_net, playing, env)
        frames = _frames(model, playing, seed, episodes, shown, made)
        made.frames = write_video(path, frames, made.fps, _DRAWN if shown is not None else _PLAIN)
    finally:
        playing.close()
    return made


def _enlarged(picture: Any) -> Frame:
    """Repeat the pixels of a small picture, as those of an Atari game, until it is about 400 high."""
    frame: Frame = np.asarray(picture)
    times = max(1, round(_HEIGHT / frame.shape[0]))
    return frame.repeat(times, axis=0).repeat(times, axis=1)


def _frames(
    model: BaseAlgorithm, env: Any, seed: int, episodes: int, shown: list[Neuron] | None, made: Film
) -> Iterator[Frame]:
    q_net = q_network(model)
    q_net.set_training_mode(False)
    network = q_net.network
    kind = f"T = {network.timesteps}" if network.spiking else "ReLU"
    limit = (env.spec.max_episode_steps if env.spec else None) or MAX_DECISIONS
    names = action_names(env, int(env.action_space.n))
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        total, over, step = 0.0, False, 0
        state = network.initial_state(1) if q_net.stateful else None
        panel = None if shown is None else Panel(network, names, shown, _enlarged(env.render()))
        while not over:
            with torch.no_grad():
                batch = torch.as_tensor(np.asarray(observation)[None], device=q_net.device)
                values, state = q_net.q_values(batch, state, observer=None if panel is None else panel.observe)
                action = int(values.argmax())
            # The frame shows what the agent saw, all around it how it decided on it.
            frame = _enlarged(env.render())
            if panel is not None:
                captions = [
                    f"return {total:g}   action {names[action]}",
                    f"{kind}   decision {step + 1}   episode seed {seed + episode}",
                ]
                fresh = not q_net.stateful or step == 0
                frame = panel.draw(frame, values[0].float().numpy(force=True), action, captions, fresh)
            yield frame
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            step += 1
            over = terminated or truncated or step >= limit
        made.returns.append(total)
        for _ in range(round(_PAUSE * made.fps)):
            yield frame
