"""Let a run of a classifier go on in other ways than it was begun: with spikes, with fewer timesteps, for longer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spiking_rl.errors import UserError
from spiking_rl.files import recover_folder, write_atomically
from spiking_rl.runs import RunFolder
from spiking_rl.settings import changed_settings, continued
from spiking_rl.vision.config import ClassifyConfig, save_config
from spiking_rl.vision.stages import budgets_of
from spiking_rl.vision.training import Trainer

_LENGTHS = ("ann_epochs", "rate_epochs", "epochs", "prune_epochs", "last_epochs")
CHANGEABLE = (*_LENGTHS, "threads", "save_every")
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
    if trainer.stages.spiking:
        raise UserError("run", str(trainer.folder.path), "has spikes already; lower its T with classify prune")
    if not trainer.finished:
        raise UserError("run", str(trainer.folder.path), "has not finished its ReLU network; go on with --resume")
    if epochs < 1:
        raise UserError("epochs", epochs, "must be at least 1")
    config = dataclasses.replace(
        trainer.config, timesteps=timesteps, prune_to=prune_to, epochs=epochs, rate_epochs=rate_epochs
    )
    config.check()
    trainer.stages.config = config
    trainer.stages.plan()
    trainer.begin_spikes()
    _save_both(trainer, "by classify convert")


def change_run(trainer: Trainer, changes: Mapping[str, Any]) -> None:
    """Change settings of a run under way: how long stages train, threads, and how often it is saved.

    The learning rate goes on from where the cycle of the stage's new length has it.

    Args:
        trainer: of the run.
        changes: new values by setting, of :data:`CHANGEABLE`.

    Raises:
        UserError: naming the setting: it cannot change, its stage is over or has trained as long, or a number is out of
            range. Nothing has changed then.
    """
    before = trainer.config
    config = changed_settings(before, changes, CHANGEABLE, str(trainer.folder.path))
    config.check()
    spent = trainer.batches / trainer.batches_per_epoch
    when = f"{trainer.stages.label} after {spent:.4g} of {trainer.stages.epochs} epochs"
    new = {name: getattr(config, name) for name in _LENGTHS if getattr(config, name) != getattr(before, name)}
    if new:
        _check_lengths(trainer, config, new)
    trainer.stages.config = config
    _save_settings(trainer, when)  # what is saved of the run takes its lengths from there


def _check_lengths(trainer: Trainer, config: ClassifyConfig, new: Mapping[str, int]) -> None:
    """Refuse lengths that cannot be any more, or give the stages theirs."""
    if trainer.finished:
        remedy = "cannot change where training is finished; without it --resume scores the run, convert and prune go on"
        raise UserError(next(iter(new)), next(iter(new.values())), remedy)
    for name, over in (("ann_epochs", trainer.stages.spiking), ("rate_epochs", trainer.stages.on_spikes)):
        if over and name in new:
            kept = getattr(trainer.config, name)
            raise UserError(name, new[name], f"that stage is over, or never was; keep {kept}")
    spent = trainer.batches / trainer.batches_per_epoch
    own = "rate_epochs" if trainer.stages.on_rates else "ann_epochs"
    if not trainer.stages.on_spikes and getattr(config, own) <= spent:
        raise UserError(own, getattr(config, own), f"{spent:.4g} epochs are trained already; choose more")
    if trainer.stages.spiking and not config.epochs:
        raise UserError("epochs", 0, "must be at least 1 where spikes train")
    names = {"epochs": "first_budget", "prune_epochs": "stage_budget", "last_epochs": "last_budget"}
    budgets = budgets_of(config)
    asked = {names[name]: budgets[names[name]] for name in new if name in names}
    try:
        trainer.stages.pruning.change_budgets(spent if trainer.stages.on_spikes else 0.0, asked)
    except UserError as error:
        raise error.renamed({field: name for name, field in names.items()}) from None


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
    if not trainer.stages.spiking:
        raise UserError("run", str(trainer.folder.path), "holds a ReLU network alone; see classify convert")
    if not trainer.finished:
        again = f"classify train {trainer.config.network} {trainer.config.dataset} --run {trainer.folder.path} --resume"
        raise UserError("run", str(trainer.folder.path), f"has not finished training; continue it with {again}")
    if epochs is not None:
        if epochs < 1:
            raise UserError("epochs", epochs, "must be at least 1")
        trainer.config.prune_epochs, trainer.config.last_epochs = epochs, 0
    if rescale_thresholds is not None:
        trainer.config.rescale_thresholds = rescale_thresholds
    trainer.next_stage(trainer.stages.pruning.extend(to, epochs))
    trainer.config.prune_to = to
    _save_both(trainer, "by classify prune")


def _save_both(trainer: Trainer, when: str) -> None:
    """Save the run with the settings with which it goes on: whoever dies in between loses neither."""
    own = trainer.folder.config
    provenance = continued(own, trainer.config, when) if trainer.team.leads else {}
    trainer.save(lambda folder: save_config(folder / own.name, trainer.config, provenance))
    if trainer.team.leads:
        settle(trainer.folder)


def settle(folder: RunFolder) -> None:
    """Put settings in their place that were saved with a run by a process that died before it could."""
    recover_folder(folder.resume)
    pending = folder.resume / folder.config.name
    if pending.is_file():
        write_atomically(folder.config, pending.read_bytes())
        pending.unlink()


def _save_settings(trainer: Trainer, when: str) -> None:
    """Write the settings with which a run goes on, and what has changed in them."""
    if trainer.team.leads:
        path = trainer.folder.config
        save_config(path, trainer.config, continued(path, trainer.config, when))
