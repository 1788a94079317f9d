"""Where the time of each training loop goes: CartPole and Pong with SpikingPQN, CIFAR-sized images with a VGG.

python -m spiking_rl.scripts.profile_loops --output results/profile.json
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spiking_rl.agents import pqn
from spiking_rl.agents.config import Precision, load_recipe
from spiking_rl.agents.training import replace_settings, start_run
from spiking_rl.errors import UserError
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import add_results
from spiking_rl.scripts.speed.stopwatch import Stopwatch
from spiking_rl.vision import feeding, training
from spiking_rl.vision.config import load_recipe as load_image_recipe
from spiking_rl.vision.config import save_config
from spiking_rl.vision.data import Dataset

DESCRIPTION = """Run each training loop for a while, by the learners themselves, and say where its time goes.

Example: python -m spiking_rl.scripts.profile_loops --output results/profile.json"""

_VALIDATION = 500  # images


@dataclass(kw_only=True)
class Options:
    """What to run, and for how long."""

    loops: tuple[str, ...] = ("cartpole", "pong", "vgg")
    """Loops to profile."""
    timesteps: int = 5
    """T."""
    cartpole_steps: int = 20_000
    """Agent steps on CartPole."""
    pong_steps: int = 4096
    """Agent steps on Pong, calibration included."""
    images: int = 1024
    """Training images of an epoch."""
    network: str = "vgg9"
    """Network for images."""
    width: float = 0.375
    """Its width."""
    precision: Precision = "float32"
    """Arithmetic of training."""
    label: str = ""
    """Said in every row, such as "before"."""
    threads: int = 2
    """Torch threads."""
    output: Path | None = None
    """Results as JSON; loops and labels measured before at the same commit stay in it."""


def main() -> None:
    """Profile, print, write."""
    options = parse(Options, "profile_loops", sys.argv[1:], DESCRIPTION)
    loops: dict[str, Callable[[Options, Stopwatch], None]] = {
        "cartpole": partial(_agent, "cartpole"),
        "pong": partial(_agent, "pong"),
        "vgg": _classifier,
    }
    for name in options.loops:
        if name not in loops:
            raise UserError("loops", name, f"unknown; choose among {', '.join(loops)}")
    torch.set_num_threads(options.threads)
    for name in options.loops:
        watch = Stopwatch(whole=("evaluation", "saving"))
        start = time.perf_counter()
        loops[name](options, watch)
        told = {"loop": name, "label": options.label, "precision": options.precision, "timesteps": options.timesteps}
        rows = table(watch.seconds, **told)
        print(f"{name}, T={options.timesteps}: {time.perf_counter() - start:.1f} s with its setup")
        for row in rows:
            print(f"  {row['part']:24}{row['seconds']:8.2f} s {row['share']:6.1%}")
        if options.output is not None:
            add_results(options.output, "profile_loops", rows, same=("loop", "label"))


def table(seconds: dict[str, float], **told: Any) -> list[dict[str, Any]]:
    """Return a row per part, the largest first, with its share of the whole."""
    whole = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [told | {"part": part, "seconds": round(s, 3), "share": round(s / whole, 4)} for part, s in ordered]


def _agent(name: str, options: Options, watch: Stopwatch) -> None:
    """Train an agent at one T, as its recipe does but for the length, and without a ReLU network first."""
    steps = options.cartpole_steps if name == "cartpole" else options.pong_steps
    own: dict[str, Any] = {
        "timesteps": options.timesteps,
        "prune_to": options.timesteps,
        "agent_steps": steps,
        "prune_steps": 1,
    }
    own |= {"eval_every": max(1, steps // 2), "eval_episodes": 10 if name == "cartpole" else 1, "goal": None}
    own |= {"spike_precision": options.precision}
    own |= {"ann_steps": 0, "imitation": 0.0, "threads": options.threads, "save_every": steps}
    config = replace_settings(load_recipe(name)[1], own)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        session = start_run(config, RunFolder(Path(folder) / "run"), device="cpu")
        model = session.model
        optimiser = model.policy.optimizer
        for owner, method, part in (
            (session, "run", "session, rest"),
            (session, "_evaluate", "evaluation"),
            (session, "save", "saving"),
            (model, "_calibrate_on_random_policy", "calibration"),
            (model, "_collect", "collecting, rest"),
            (model.env, "step", "environment"),
            (model, "act_values", "acting"),
            (model, "_values_ahead", "acting"),
            (pqn, "lambda_returns", "returns"),
            (model, "train", "learning, rest"),
            (model.policy.q_net.network, "forward", "{}: forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "optimiser"),
            (optimiser, "step", "optimiser"),
            (optimiser, "zero_grad", "optimiser"),
        ):
            stack.enter_context(watch.timing(owner, method, part))
        session.run()


def _classifier(options: Options, watch: Stopwatch) -> None:
    """Train an epoch of a classifier on random pixels of CIFAR's shape, as the recipe `fast` does."""
    config = load_image_recipe("fast")
    config.network, config.width, config.threads = options.network, options.width, options.threads
    config.timesteps = config.prune_to = options.timesteps
    config.precision = options.precision
    config.ann_epochs, config.epochs, config.prune_epochs = 0, 1, 1
    config.distill = 0.0  # there is no ReLU network to learn from
    images = _pixels(options.images)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = RunFolder(Path(name) / "run")
        folder.create()
        save_config(folder.config, config, {})
        trainer = training.Trainer(config, folder, images, torch.device("cpu"))
        for owner, method, part in (
            (trainer, "run", "session, rest"),
            (trainer, "_update", "update, rest"),
            (trainer, "_score", "evaluation"),
            (trainer, "save", "saving"),
            (trainer, "_keep", "saving"),
            (feeding, "augment", "augmentation"),
            (training, "normalise", "augmentation"),
            (trainer.network, "forward", "forward"),
            (torch.Tensor, "backward", "backward"),
            (torch.nn.utils, "clip_grad_norm_", "optimiser"),
            (trainer.optimizer, "step", "optimiser"),
            (trainer.optimizer, "zero_grad", "optimiser"),
        ):
            stack.enter_context(watch.timing(owner, method, part))
        trainer.run()


def _pixels(count: int) -> Dataset:
    """Return random images, with random labels."""
    random = torch.Generator().manual_seed(0)

    def draw(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randint(256, (number, 3, 32, 32), dtype=torch.uint8, generator=random)
        return images, torch.randint(10, (number,), generator=random)

    train, validation, test = draw(count), draw(_VALIDATION), draw(_VALIDATION)
    return Dataset(*train, *validation, *test, [str(k) for k in range(10)], (0.5,) * 3, (0.25,) * 3)


if __name__ == "__main__":
    script(main)
