"""Let a run of a classifier go on in other ways than it was begun: with spikes, with fewer timesteps, for longer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spiking_rl.errors import UserError
from spiking_rl.provenance import provenance
from spiking_rl.settings import provenance_of_changes
from spiking_rl.vision.config import save_config
from spiking_rl.vision.training import Trainer

CHANGEABLE = ("ann_epochs", "rate_epochs", "epochs", "prune_epochs", "last_epochs", "threads", "save_every")
"""Settings of a run under way that may change: how long stages train, threads, and how often it is saved."""


def convert_run(trainer: Trainer, timesteps: int, prune_to: int, epochs: int, rate_epochs: int = 0) -> None:
    """Let a run that ended with its ReLU network go on with spikes.

    Args:
        trainer: of the run.
        timesteps: T of the first stage.
        prune_to: of the last.
        epochs: of the first stage, on spikes.
        rate_epochs: on firing rates, before them.

    Raises:
        UserError: the run is not there, or beyond it, or a number is out of range.
    """
    if trainer.spiking:
        raise UserError("run", str(trainer.folder.path), "has spikes already; lower its T with classify prune")
    if not trainer.finished:
        raise UserError("run", str(trainer.folder.path), "has not finished its ReLU network; go on with --resume")
    if epochs < 1:
        raise UserError("epochs", epochs, "must be at least 1")
    config = dataclasses.replace(
        trainer.config, timesteps=timesteps, prune_to=prune_to, epochs=epochs, rate_epochs=rate_epochs
    )
    config.check()
    trainer.config = config
    trainer.pruning = trainer.new_pruning()
    trainer.begin_spikes()
    trainer.save()


def change_run(trainer: Trainer, changes: Mapping[str, Any]) -> None:
    """Change settings of a run under way: how long stages train, threads, and how often it is saved.

    The learning rate goes on from where the cycle of the stage's new length has it.

    Args:
        trainer: of the run.
        changes: new values by setting, of :data:`CHANGEABLE`.

    Raises:
        UserError: naming the setting: its stage is over or has trained as long, or a number is out of range.
    """
    if trainer.finished:
        raise UserError("run", str(trainer.folder.path), "has finished training; go on with classify convert or prune")
    before = trainer.config
    config = dataclasses.replace(before, **changes)
    config.check()
    for name, over in (("ann_epochs", trainer.spiking), ("rate_epochs", trainer.on_spikes)):
        if over and name in changes:
            raise UserError(name, changes[name], f"that stage is over, or never was; keep {getattr(before, name)}")
    spent = trainer.batches / trainer.batches_per_epoch
    when = f"{trainer.label} after {spent:.4g} of {trainer.epochs} epochs"
    own = "rate_epochs" if trainer.on_rates else "ann_epochs"
    if not trainer.on_spikes and getattr(config, own) <= spent:
        raise UserError(own, getattr(config, own), f"{spent:.4g} epochs are trained already; choose more")
    names = {"first_budget": "epochs", "stage_budget": "prune_epochs", "last_budget": "last_epochs"}
    first = config.epochs if trainer.spiking else max(1, config.epochs)
    try:
        trainer.pruning.change_budgets(
            spent if trainer.on_spikes else 0.0, first, config.prune_epochs, config.last_epochs or None
        )
    except UserError as error:
        raise error.renamed(names) from None
    trainer.config = config
    if not trainer.team.leads:
        return
    if (trainer.folder.resume / "state.json").is_file():
        trainer.save()  # first the state, then the settings: killed between them, the run takes the change again
    path = trainer.folder.config
    save_config(path, config, provenance() | provenance_of_changes(path, changes, before, when))


def extend_run(trainer: Trainer, to: int, epochs: int | None, rescale_thresholds: bool | None = None) -> None:
    """Lower T further in a finished run.

    Args:
        trainer: of the run.
        to: timesteps to end with.
        epochs: of each stage; None: as the run has it.
        rescale_thresholds: change whether thresholds follow T; None: as the run has it.

    Raises:
        UserError: the run is not finished, has no spikes, or is at ``to`` already.
    """
    if not trainer.spiking:
        raise UserError("run", str(trainer.folder.path), "holds a ReLU network alone; see classify convert")
    if not trainer.finished:
        raise UserError("run", str(trainer.folder.path), "has not finished training; continue it with train --resume")
    if epochs is not None:
        if epochs < 1:
            raise UserError("epochs", epochs, "must be at least 1")
        trainer.config.prune_epochs, trainer.config.last_epochs = epochs, 0
    if rescale_thresholds is not None:
        trainer.config.rescale_thresholds = rescale_thresholds
    trainer.next_stage(trainer.pruning.extend(to, epochs))
    trainer.config.prune_to = to
    trainer.save()
