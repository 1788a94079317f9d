"""Agent steps per second on Pong against Stable-Baselines3's ReLU DQN with its own wrappers, in one run.

pip install opencv-python-headless    # what Stable-Baselines3's wrappers resize with
python -m spiking_rl.scripts.benchmark_atari --output results/atari-speed.json
"""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

from spiking_rl.agents.building import build_model
from spiking_rl.agents.config import load_recipe
from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.training import replace_settings
from spiking_rl.envs.make import make_vectorised
from spiking_rl.errors import UserError
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import write_results

DESCRIPTION = """Train SB3's DQN, SpikingDQN and SpikingPQN on Pong in turns, and time them.

Example: python -m spiking_rl.scripts.benchmark_atari --output results/atari-speed.json"""


@dataclass(kw_only=True)
class Options:
    """How to measure."""

    rounds: int = 8
    """Rounds; each trains every learner once, so that a slow moment meets all of them."""
    agent_steps: int = 2048
    """Agent steps per learner and round."""
    num_envs: int = 8
    """Environments of both DQNs; SpikingPQN plays as in the recipe pong."""
    train_freq: int = 4
    """Environment steps between the updates of both DQNs."""
    gradient_steps: int = 8
    """Updates each time; with 8 environments, one per 4 transitions, as one environment with SB3's defaults has."""
    batch_size: int = 32
    """Transitions per update of both DQNs."""
    buffer_size: int = 20_000
    """Transitions in the replay of both DQNs."""
    threads: int = 2
    """Torch threads."""
    output: Path | None = None
    """Results as JSON."""


def main() -> None:
    """Measure, print, write."""
    options = parse(Options, "benchmark_atari", sys.argv[1:], DESCRIPTION)
    if importlib.util.find_spec("cv2") is None:
        raise UserError("cv2", None, "SB3's Atari wrappers need it: pip install opencv-python-headless")
    torch.set_num_threads(options.threads)
    learners = _learners(options)
    speeds: dict[str, list[float]] = {name: [] for name in learners}
    for number in range(options.rounds + 1):
        for name, learner in learners.items():
            before, start = learner.num_timesteps, time.perf_counter()
            learner.learn(options.agent_steps, reset_num_timesteps=False)
            if number:  # the first round calibrates and fills the replay
                speeds[name].append((learner.num_timesteps - before) / (time.perf_counter() - start))
    base = np.array(speeds["sb3-dqn"])
    rows: list[dict[str, Any]] = []
    for name, learner in learners.items():
        ratio = np.array(speeds[name]) / base
        low, median, high = (float(q) for q in np.percentile(ratio, [25, 50, 75]))
        replay = getattr(learner, "replay_buffer", None)
        stored = None if replay is None else sum(a.nbytes for a in vars(replay).values() if isinstance(a, np.ndarray))
        rows.append(
            {
                "network": "nature_cnn",
                "variant": name,
                "timesteps": None if name == "sb3-dqn" else 1,
                "agent_steps_per_second": round(float(np.median(speeds[name])), 1),
                "ratio_to_sb3": round(median, 3),
                "quartiles": [round(low, 3), round(high, 3)],
                "replay_bytes_per_transition": None if stored is None else round(stored / options.buffer_size, 1),
                "threads": options.threads,
            }
        )
        print(f"{name:12} {rows[-1]['agent_steps_per_second']:8.1f} agent steps/s  {median:.2f} x SB3's DQN")
    if options.output is not None:
        write_results(options.output, "benchmark_atari", rows)


def _learners(options: Options) -> dict[str, BaseAlgorithm]:
    """Return the learners; both DQNs play, replay and update alike."""
    shared: dict[str, Any] = {
        "learning_rate": 1e-4,
        "buffer_size": options.buffer_size,
        "learning_starts": 1000,
        "batch_size": options.batch_size,
        "train_freq": options.train_freq,
        "gradient_steps": options.gradient_steps,
        "target_update_interval": 1000,
        "seed": 0,
        "device": "cpu",
    }
    import ale_py  # noqa: F401  # registers the id below

    wrapped = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=options.num_envs, seed=0), 4)
    recipe = replace_settings(load_recipe("pong")[1], {"timesteps": 1, "prune_to": 1})
    native = make_vectorised(recipe.env, options.num_envs, 0)
    return {
        "sb3-dqn": DQN("CnnPolicy", wrapped, **shared),
        "spiking-dqn": SpikingDQN("CnnPolicy", native, policy_kwargs={"timesteps": 1}, **shared),
        "spiking-pqn": build_model(recipe, "cpu"),
    }


if __name__ == "__main__":
    script(main)
