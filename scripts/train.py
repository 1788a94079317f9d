"""spiking-rl train: everything from an empty folder to a one-timestep agent on video."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.preprocessing import is_image_space

from spiking_rl.agents.config import (
    DQNConfig,
    MainSettings,
    PQNConfig,
    TrainConfig,
    load_config,
    load_recipe,
)
from spiking_rl.agents.filming import film
from spiking_rl.agents.loading import load_agent
from spiking_rl.agents.report import evaluate_run, format_table
from spiking_rl.agents.session import TrainingSession
from spiking_rl.agents.training import CHANGEABLE, change_run, resume_run, start_run
from spiking_rl.arithmetic import slow_arithmetic
from spiking_rl.errors import UserError
from spiking_rl.provenance import peak_rss_mb
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.main import Stopped
from spiking_rl.scripts.options import changes_of, first_argument, parse_settings, told
from spiking_rl.scripts.plot import draw_run
from spiking_rl.stopping import Interrupted

DESCRIPTION = """Train a spiking Q-network, prune it to one timestep, score it, film it.

ENV is a recipe (see `spiking-rl list`), a Gymnasium id, or module:EnvId for your own environment.

Example: spiking-rl train cartpole --algo dqn --seed 1 --run runs/first

`spiking-rl train ENV --help-all` shows every setting of the algorithm."""


@dataclass(kw_only=True)
class RunOptions:
    """Where and how to run; nothing here changes what is learned."""

    run: Path | None = None
    """Run folder; none: runs/NAME-seedN."""
    resume: bool = False
    """Go on with the run in that folder; agent steps of its stages may be others from there."""
    hours: float | None = None
    """Save and stop after so many hours."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(kw_only=True)
class MainOptions(RunOptions, MainSettings):
    """What ``--help`` shows; ``--help-all`` shows every setting."""


@dataclass(kw_only=True)
class PQNOptions(RunOptions, PQNConfig):
    """Options of ``train --algo pqn``."""


@dataclass(kw_only=True)
class DQNOptions(RunOptions, DQNConfig):
    """Options of ``train --algo dqn``."""


OPTIONS: dict[str, type[PQNOptions] | type[DQNOptions]] = {"pqn": PQNOptions, "dqn": DQNOptions}


def run(args: list[str]) -> dict[str, Any]:
    """Train, then score every T, draw the curves and film the last one."""
    name, rest = first_argument(args, "env", "a recipe or an environment id")
    if name == "default":
        raise UserError("env", name, "is the recipe of every other environment; name the environment's id")
    algo = _option(rest, "--algo")
    rest = _without(rest, "--algo")
    short, recipe = load_recipe(name or "cartpole", algo)
    kind = OPTIONS[recipe.algo]
    usage = f"train {name or 'ENV'} [--algo pqn|dqn]"
    options = parse_settings(kind, MainOptions, recipe, usage, rest, DESCRIPTION)
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(type(recipe))}
    config = type(recipe)(**values)
    folder = RunFolder(options.run or Path("runs") / _default_name(short, config, recipe))
    where: dict[str, Any] = {"device": options.device, "hours": options.hours, "progress": True}
    if options.resume:
        folder.require()
        saved = load_config(folder.config)
        if type(saved) is not type(config):
            remedy = f"the run in {folder.path} uses {saved.algo}; leave --algo out or match it"
            raise UserError("algo", config.algo, remedy)
        changes = changes_of(folder, saved, config, rest, ("env",), CHANGEABLE)
        with folder.locked():
            session = resume_run(folder, **where, named=config.env)
            if changes:
                change_run(session, changes)
                print(told(saved, changes))
            return finish(session, _command(args))
    session = start_run(config, folder, **where)
    with folder.locked():
        return finish(session, _command(args))


def _default_name(short: str, config: TrainConfig, recipe: TrainConfig) -> str:
    parts = [short]
    if config.algo != load_recipe(short)[1].algo:
        parts.append(config.algo)
    if config.neuron != recipe.neuron:
        parts.append(config.neuron)
    if config.start_from is not None:
        parts.append(f"from-{Path(config.start_from).name}")
    return "-".join([*parts, f"seed{config.seed}"])


def _command(args: list[str]) -> str:
    return shlex.join(["spiking-rl", "train", *args])


def _option(args: list[str], name: str) -> str | None:
    for i, arg in enumerate(args):
        if arg == name:
            if i + 1 == len(args) or args[i + 1].startswith("-"):
                raise UserError(name.removeprefix("--"), None, "needs a value: pqn or dqn")
            return args[i + 1]
        if arg.startswith(name + "="):
            return arg.split("=", 1)[1]
    return None


def _without(args: list[str], name: str) -> list[str]:
    kept, skip = [], False
    for arg in args:
        if skip:
            skip = False
        elif arg == name:
            skip = True
        elif not arg.startswith(name + "="):
            kept.append(arg)
    return kept


def finish(session: TrainingSession, command: str) -> dict[str, Any]:
    """Run a session to its end, then make the table, the figures and the video."""
    folder, config = session.folder, session.config
    print(f"run folder: {folder.path}\n{_plan(config)}")
    seen = session.model.observation_space
    if len(seen.shape or ()) == 3 and not is_image_space(seen):
        print(
            f"note: observations {seen.dtype} {seen.shape} are taken as vectors; a convolutional network takes images: "
            "uint8, 0 to 255, (channels, height, width)"
        )
    for field in ("precision", "spike_precision"):
        if slow := slow_arithmetic(getattr(config, field), session.model.device, field):
            print(slow)
            break
    try:
        session.run()
    except Interrupted as stop:
        steps = session.agent_steps
        text = f"stopped after {steps:,} agent steps, everything is saved.\nGo on with: {_go_on(folder, config)}"
        raise Stopped(text, 130 if stop.reason == "interrupt" else 0) from None
    try:
        return _present(session, command)
    except KeyboardInterrupt:
        text = f"training is done and saved; the rest was left out.\nGo on with: {_go_on(folder, config)}"
        raise Stopped(text, 130) from None


def _plan(config: TrainConfig) -> str:
    """Say what is to come: some recipes take hours."""
    parts = [f"{config.ann_steps:,} of a ReLU network"] if config.trains_ann else []
    if config.neuron == "relu":
        parts.append(f"{config.agent_steps:,} of a ReLU network")
    else:
        parts.append(f"{config.agent_steps:,} at T={config.timesteps}")
    lowest, last = config.prune_to, []
    prunes = config.neuron == "lif" and lowest < config.timesteps
    if prunes and config.last_steps:
        last, lowest = [f"{config.last_steps:,} at T={lowest}"], lowest + 1
    if prunes and lowest < config.timesteps:
        each = f"T={lowest}" if lowest == config.timesteps - 1 else f"each of T={config.timesteps - 1} to {lowest}"
        parts.append(f"{config.prune_steps:,} at {each}")
    parts += last
    return f"agent steps, at most: {', '.join(parts)}; Ctrl-C saves, --resume goes on"


def _present(session: TrainingSession, command: str) -> dict[str, Any]:
    """Make the table, the figures and the video of a trained run."""
    folder, config = session.folder, session.config
    results: dict[str, Any] = {"run": str(folder.path), "rows": []}
    if config.report_episodes:
        print(f"scoring every T on {config.report_episodes} unseen episodes ...")
        cost = {"train_seconds": round(session.seconds, 1), "peak_rss_mb": peak_rss_mb()}
        results |= evaluate_run(folder, config.report_episodes, command, **cost)
        print(f"\n{config.env}, seed {config.seed}, {config.algo}\n{format_table(results['rows'])}\n")
    for figure in draw_run(folder):
        print(f"figure: {figure}")
    if config.video_episodes:
        _film(folder, config)
    return results


def _film(folder: RunFolder, config: TrainConfig) -> None:
    agent = load_agent(folder.path, device="cpu")
    spiking = agent.model.policy.q_net.network.spiking
    path = folder.videos / f"{agent.checkpoint.name}{'-spikes' if spiking else ''}.mp4"
    try:
        made = film(agent.model, agent.environment, path, episodes=config.video_episodes, spikes=spiking)
    except UserError as error:
        # Some environments do not draw themselves; the training is no worse for it.
        print(f"no video: {error}")
        return
    print(f"video:  {made.path} (returns {', '.join(f'{r:g}' for r in made.returns)})")


def _go_on(folder: RunFolder, config: TrainConfig) -> str:
    algo = "" if load_recipe(config.env)[1].algo == config.algo else f" --algo {config.algo}"
    return f"spiking-rl train {shlex.quote(config.env)}{algo} --run {shlex.quote(str(folder.path))} --resume"
