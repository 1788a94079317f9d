"""spiking-rl prune: continue a finished run to fewer timesteps."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiking_rl.agents.config import load_config
from spiking_rl.agents.training import extend_run, resume_run
from spiking_rl.envs.atari import parse_atari
from spiking_rl.errors import UserError
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.options import AsTheRun, first_argument, parse_over_run
from spiking_rl.scripts.train import finish

DESCRIPTION = """Lower the timesteps of a finished run, training on at each T.

Example: spiking-rl prune runs/cartpole-seed0 --to 1"""


@dataclass(kw_only=True)
class Options:
    """How far, and how."""

    to: int = 1
    """Timesteps to end with."""
    agent_steps: int | None = None
    """Agent steps of each stage; none: as it was trained."""
    rescale_leak: AsTheRun = True
    """Let a stateful agent's leaks follow T."""
    env: str | None = None
    """The run's environment once more, where it is one of your own (module:EnvId): a file alone imports no module."""
    hours: float | None = None
    """Save and stop after so many hours."""
    device: str = "auto"
    """auto, cpu or cuda."""


def run(args: list[str]) -> dict[str, Any]:
    """Extend the run, then score, draw and film it as train does."""
    name, rest = first_argument(args, "run", "a run folder")
    folder = RunFolder(Path(str(name)))
    options = parse_over_run(Options, "prune RUN", rest, DESCRIPTION, lambda: _own(folder))
    config = load_config(folder.config)
    own = {config.env, *config.also_reported()}
    if options.env is not None and not {options.env, _spelled_out(options.env)} & own:
        remedy = f"is not what the run trains in, {config.env!r}; it goes on there, evaluate and render play elsewhere"
        raise UserError("env", options.env, remedy)
    with folder.locked():
        session = resume_run(folder, device=options.device, hours=options.hours, progress=True, named=options.env)
        extend_run(session, options.to, options.agent_steps, options.rescale_leak)
        return finish(session, shlex.join(["spiking-rl", "prune", *args]))


def _spelled_out(env_id: str) -> str:
    """Return an id as runs have it: of Atari games with all options."""
    return str(parse_atari(env_id) or env_id)


def _own(folder: RunFolder) -> Options:
    """Return the options as the run has them."""
    folder.require()
    return Options(rescale_leak=load_config(folder.config).rescale_leak)
