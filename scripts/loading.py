"""Load what a user names, an agent or a classifier, with its network."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.loading import find_checkpoint, load_agent
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.checkpoint import load_checkpoint
from spiking_rl.errors import UserError
from spiking_rl.networks import LayeredNetwork
from spiking_rl.runs import RunFolder, checkpoint_name
from spiking_rl.vision.building import ImageFacts, build_empty, facts_of, load_classifier
from spiking_rl.vision.config import load_config


@dataclass(frozen=True)
class Loaded:
    """A checkpoint with its network.

    Attributes:
        network: of the agent or the classifier.
        checkpoint: its folder.
        run: that it belongs to, where there is one.
        config: content of its config.json.
        measure: the command that measures it; empty where there is none.
        agent: where it is one.
        images: what is known of a classifier's.
    """

    network: LayeredNetwork
    checkpoint: Path
    run: RunFolder | None
    config: dict[str, Any]
    measure: str
    agent: SpikingPQN | SpikingDQN | None = None
    images: ImageFacts | None = None

    @property
    def stateful(self) -> bool:
        """Whether membranes are carried from decision to decision."""
        return self.agent is not None and bool(self.agent.stateful)


def load(name: str, timesteps: int | None) -> Loaded:
    """Load an agent or a classifier; no data set is read.

    Args:
        name: a run folder, a checkpoint folder or a pretrained agent.
        timesteps: T of the run; None for its lowest.

    Raises:
        UserError: nothing there, T not in the run, damaged, or a classifier without its run.
    """
    folder, found = find_checkpoint(name, timesteps)
    tensors, config = load_checkpoint(folder)
    owner = found or _run_of(folder)
    own_t = config.get("timesteps")
    which = "" if found is None or own_t is None else f" --timesteps {own_t}"
    if config.get("kind") != "classifier":
        model = load_agent(folder, device="cpu").model
        command = f"spiking-rl evaluate {shlex.quote(name)}{which}"
        return Loaded(model.policy.q_net.network, folder, owner, config, command, agent=model)
    if owner is None:
        raise UserError(
            "checkpoint", name, "is a classifier away from its run, whose config.yaml has its width; name the run"
        )
    settings = load_config(owner.config)
    settings.check()
    images = facts_of(settings, config, folder)
    _require_fit(tensors, build_empty(settings, images, spiking=own_t is not None), folder)
    network = load_classifier(folder, settings, images)
    which = "" if own_t is None else f" --timesteps {own_t}"
    command = f"spiking-rl classify evaluate {shlex.quote(str(owner.path))}{which} --data FOLDER"
    if folder.name != checkpoint_name(own_t):
        command = ""  # it scores the kept best, and this is the end of a stage
    return Loaded(network, folder, owner, config, command, images=images)


def _require_fit(tensors: Mapping[str, Tensor], network: LayeredNetwork, origin: Path) -> None:
    """Refuse settings that ask for another network than the weights', before it takes its memory."""
    asked, stored = (sum(t.numel() for t in x.values()) for x in (network.state_dict(), tensors))
    if asked > 2 * stored:
        raise UserError("checkpoint", str(origin), f"holds {stored:,} numbers, its run's network {asked:,}; no match")


def _run_of(checkpoint: Path) -> RunFolder | None:
    """Return the run in whose ``checkpoints/`` a folder lies."""
    owner = RunFolder(checkpoint.absolute().parent.parent)
    return owner if checkpoint.absolute().parent == owner.checkpoints and owner.config.is_file() else None
