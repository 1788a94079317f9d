"""spiking-rl export: an agent in a format of others, or small enough to ship."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from spiking_rl.agents.loading import load_agent
from spiking_rl.checkpoint import CONFIG, load_checkpoint, save_checkpoint
from spiking_rl.errors import UserError
from spiking_rl.scripts.options import first_argument, parse

DESCRIPTION = """Write an agent as a Stable-Baselines3 zip, or as a checkpoint of half the size.

RUN is a run folder, one of its checkpoints, or a pretrained agent. The zip is for SpikingDQN.load or SpikingPQN.load;
it pickles: whoever loads one runs what is in it.

Back: SpikingDQN.load("agent.zip").save_checkpoint("agent", environment="CartPole-v1").

Example: spiking-rl export runs/cartpole-seed0 --timesteps 1 --output agent.zip"""


@dataclass(kw_only=True)
class Options:
    """What to export."""

    format: Literal["sb3", "half"] = "sb3"
    """sb3: the zip of Stable-Baselines3; half: a checkpoint whose weights have 16 bits (evaluate it again)."""
    timesteps: int | None = None
    """T of the run; default its lowest."""
    output: Path | None = None
    """The file or folder; default agent.zip, or agent."""


def run(args: list[str]) -> dict[str, Any]:
    """Export and say where the file is."""
    name, rest = first_argument(args, "run", "a run or checkpoint folder")
    options = parse(Options, "export RUN", rest, DESCRIPTION)
    assert name is not None
    agent = load_agent(name, options.timesteps, device="cpu")
    if options.format == "half":
        folder = options.output or Path("agent")
        if folder.exists() and not (folder / CONFIG).is_file():
            raise UserError("output", str(folder), "is there already and is no checkpoint; name another folder")
        tensors, config = load_checkpoint(agent.checkpoint)
        save_checkpoint(folder, {n: t.half() if _is_weight(n, t) else t for n, t in tensors.items()}, config)
        print(f"checkpoint: {folder}")
        return {"file": str(folder), "format": options.format, "environment": agent.trained_in}
    path = options.output or Path("agent.zip")
    path.parent.mkdir(parents=True, exist_ok=True)
    agent.model.save(path)
    loader = type(agent.model).__name__
    print(f"zip: {path} (load with {loader}.load)")
    return {"file": str(path), "format": options.format, "environment": agent.trained_in, "class": loader}


def _is_weight(name: str, tensor: Tensor) -> bool:
    """Tell the large tensors from thresholds, leaks and statistics, which keep their precision."""
    return tensor.dim() > 1 and ".neurons." not in name
