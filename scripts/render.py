"""spiking-rl render: film an agent."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiking_rl.agents.evaluation import REPORT_SEED
from spiking_rl.agents.filming import film
from spiking_rl.agents.loading import load_agent
from spiking_rl.errors import UserError
from spiking_rl.scripts.options import first_argument, parse

DESCRIPTION = """Film greedy episodes as an mp4.

RUN is a run folder, one of its checkpoints, or a pretrained agent (see `spiking-rl list`).

Example: spiking-rl render runs/cartpole-seed0 --timesteps 1 --spikes"""


@dataclass(kw_only=True)
class Options:
    """What to film."""

    timesteps: int | None = None
    """T of the run to film; none: its lowest."""
    spikes: bool = False
    """Draw Q-values, a live spike raster and membrane potentials around the picture."""
    neurons: tuple[str, ...] = ()
    """With --spikes: whose membranes, such as layer1:3 layer2:17; three with large readout weights if not named."""
    episodes: int = 1
    """Number of episodes."""
    env: str | None = None
    """Another environment with the same spaces, as 'ALE/Pong-v5?sticky_actions=0.25'; none: its own."""
    seed: int = REPORT_SEED
    """Seed of the first episode; episode k uses seed + k."""
    output: Path | None = None
    """The mp4; none: RUN/videos/T1.mp4 and so on."""


def run(args: list[str]) -> dict[str, Any]:
    """Film and say where the video is."""
    name, rest = first_argument(args, "run", "a run or checkpoint folder")
    options = parse(Options, "render RUN", rest, DESCRIPTION)
    assert name is not None
    agent = load_agent(name, options.timesteps, device="cpu")
    environment = options.env or agent.environment
    stem = agent.checkpoint.resolve().name + ("-spikes" if options.spikes else "")
    folder = agent.run.videos if agent.run else Path("videos")
    path = options.output or folder / f"{stem}.mp4"
    try:
        made = film(
            agent.model,
            environment,
            path,
            episodes=options.episodes,
            seed=options.seed,
            spikes=options.spikes,
            neurons=options.neurons,
        )
    except PermissionError as error:
        raise UserError("output", str(path), f"cannot be written ({error.strerror}); choose another --output") from None
    spiking = agent.model.policy.q_net.network.spiking
    if options.spikes and not spiking:
        print("note: a ReLU network has no spikes and no membranes; the film shows its Q-values", file=sys.stderr)
    print(f"video: {made.path} ({made.frames} frames, returns {', '.join(f'{r:g}' for r in made.returns)})")
    return {
        "video": str(made.path),
        "environment": environment,
        "timesteps": agent.model.policy.timesteps if spiking else None,
        "returns": made.returns,
        "frames": made.frames,
    }
