"""spiking-rl export: an agent in a format of others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spiking_rl.agents.loading import load_agent
from spiking_rl.scripts.options import first_argument, parse

DESCRIPTION = """Write an agent as a Stable-Baselines3 zip, for SpikingDQN.load or SpikingPQN.load.

RUN is a run folder, one of its checkpoints, or a pretrained agent. The zip pickles: whoever loads
one runs what is in it.
Back: SpikingDQN.load("agent.zip").save_checkpoint("agent", environment="CartPole-v1").

Example: spiking-rl export runs/cartpole-seed0 --timesteps 1 --output agent.zip"""


@dataclass(kw_only=True)
class Options:
    """What to export."""

    format: Literal["sb3"] = "sb3"
    """sb3: the zip of Stable-Baselines3."""
    timesteps: int | None = None
    """T of the run; default its lowest."""
    output: Path = Path("agent.zip")
    """The file."""


def run(args: list[str]) -> dict[str, Any]:
    """Export and say where the file is."""
    name, rest = first_argument(args, "run", "a run or checkpoint folder")
    options = parse(Options, "export RUN", rest, DESCRIPTION)
    assert name is not None
    agent = load_agent(name, options.timesteps, device="cpu")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    agent.model.save(options.output)
    loader = type(agent.model).__name__
    print(f"zip: {options.output} (load with {loader}.load)")
    return {"file": str(options.output), "format": options.format, "environment": agent.environment, "class": loader}
