"""spiking-rl evaluate: score an agent on unseen episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spiking_rl.agents.building import resolve_device
from spiking_rl.agents.evaluation import REPORT_SEED, evaluate
from spiking_rl.agents.loading import load_agent
from spiking_rl.agents.report import format_table
from spiking_rl.scripts.options import first_argument, parse

DESCRIPTION = """Score an agent: greedy return with 95 % interval, spike rates, energy, latency.

RUN is a run folder, one of its checkpoints, or a pretrained agent (see `spiking-rl list`).

Example: spiking-rl evaluate runs/cartpole-seed0 --timesteps 1 --json"""


@dataclass(kw_only=True)
class Options:
    """What to measure."""

    timesteps: int | None = None
    """T of the run to score; none: its lowest."""
    episodes: int = 100
    """Number of episodes."""
    env: str | None = None
    """Another environment with the same spaces, as 'ALE/Pong-v5?sticky_actions=0.25'; none: its own."""
    seed: int = REPORT_SEED
    """Seed of the first episode; episode k uses seed + k."""
    device: str = "cpu"
    """cpu, cuda or auto; one decision at a time is fastest on the cpu."""


def run(args: list[str]) -> dict[str, Any]:
    """Evaluate and print a table; return the row."""
    name, rest = first_argument(args, "run", "a run or checkpoint folder")
    options = parse(Options, "evaluate RUN", rest, DESCRIPTION)
    assert name is not None
    resolve_device(options.device)
    agent = load_agent(name, options.timesteps, options.device)
    environment = options.env or agent.environment
    row = evaluate(agent.model, environment, episodes=options.episodes, seed=options.seed).as_row()
    print(f"{environment}, {agent.checkpoint}, {options.episodes} episodes")
    print(format_table([row]))
    return row
