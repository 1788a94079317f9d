"""How well a start inside an episode stands for the whole history: stored membranes against zero ones.

python -m spiking_rl.scripts.agreement runs/cartpole-masked-seed0 --output results/agreement.json
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spiking_rl.agents.evaluation import REPORT_SEED
from spiking_rl.agents.loading import load_agent
from spiking_rl.agents.policies import SpikingQNetwork
from spiking_rl.agents.staged import flat_membranes, split_membranes
from spiking_rl.envs.make import make_single
from spiking_rl.errors import UserError
from spiking_rl.scripts.options import first_argument, parse, script
from spiking_rl.scripts.published import write_results

_SHORT = 10  # episodes too short to compare anything in, in a row, after which longer ones are not waited for

DESCRIPTION = """Compare greedy actions after a burn-in with those of the full history of the same play.

RUN is a run folder, a checkpoint or the name of a stateful agent.

Example: python -m spiking_rl.scripts.agreement runs/cartpole-masked-seed0"""


@dataclass(kw_only=True)
class Options:
    """How to measure."""

    decisions: int = 10_000
    """Decisions compared, at least."""
    burn_in: int = 8
    """Frames between the start and the first decision compared."""
    length: int = 32
    """Decisions compared after each start."""
    seed: int = REPORT_SEED
    """Seed of the first episode."""
    output: Path | None = None
    """Results as JSON."""


def main() -> None:
    """Measure, print, write."""
    name, rest = first_argument(sys.argv[1:], "run", "a run or checkpoint folder of a stateful agent")
    options = parse(Options, "agreement RUN", rest, DESCRIPTION)
    assert name is not None
    agent = load_agent(name, device="cpu")
    for field, least in (("decisions", 1), ("burn_in", 0), ("length", 1), ("seed", 0)):
        if getattr(options, field) < least:
            raise UserError(field, getattr(options, field), f"must be at least {least}")
    if not agent.model.stateful:
        raise UserError("run", name, "is a stateless agent; there is no history to agree with")
    rows = _compare(agent.model.policy.q_net, agent.environment, options)
    for row in rows:
        print(f"{row['start']:6} {100 * row['agreement']:.2f} % of {row['decisions']} decisions")
    if options.output is not None:
        write_results(options.output, "agreement", rows)


@torch.no_grad()
def _compare(q_net: SpikingQNetwork, env_id: str, options: Options) -> list[dict[str, Any]]:
    span = options.burn_in + options.length
    same, compared, episode, short = {"stored": 0, "zero": 0}, 0, 0, 0
    shapes = q_net.network.neuron_shapes()
    env = make_single(env_id)
    while compared < options.decisions:
        observations, actions, membranes = _play(q_net, env, options.seed + episode)
        episode += 1
        # Starts lie inside the episode: at its beginning a zero start would be right.
        firsts = range(options.length, len(actions) - span + 1, options.length)
        if not firsts:
            short += 1
            if short == _SHORT:
                least = 2 * options.length + options.burn_in
                remedy = f"needs episodes of at least {least} decisions, and {short} in a row were shorter; choose less"
                raise UserError("length", options.length, remedy)
            continue
        short = 0
        frames = np.array([[k + t for k in firsts] for t in range(span)])
        obs = torch.as_tensor(observations[frames])
        starts = torch.zeros(frames.shape, dtype=torch.bool)
        kept = torch.as_tensor(membranes[list(firsts)].astype(np.float16).astype(np.float32))
        for kind, before in (("stored", kept), ("zero", torch.zeros_like(kept))):
            again = q_net.q_sequence(obs, split_membranes(before, shapes), starts).argmax(2).numpy()
            same[kind] += int((again == actions[frames])[options.burn_in :].sum())
        compared += options.length * len(firsts)
    env.close()
    return [
        {"environment": env_id, "start": kind, "burn_in": options.burn_in, "length": options.length}
        | {"timesteps": q_net.network.timesteps, "decisions": compared, "agreement": count / compared}
        for kind, count in same.items()
    ]


def _play(q_net: SpikingQNetwork, env: Any, seed: int) -> tuple[Any, Any, Any]:
    """Return observations, greedy actions and the membranes before each decision of one episode."""
    observation, _ = env.reset(seed=seed)
    state = q_net.network.initial_state(1)
    observations, actions, membranes = [], [], []
    over = False
    while not over:
        observations.append(observation)
        membranes.append(flat_membranes(state)[0])
        values, after = q_net.q_values(torch.as_tensor(observation)[None], state)
        assert after is not None
        state = after
        actions.append(int(values.argmax()))
        observation, _, terminated, truncated, _ = env.step(actions[-1])
        over = terminated or truncated
    return np.stack(observations), np.array(actions), np.stack(membranes)


if __name__ == "__main__":
    script(main)
