"""The stages of a run: the ReLU network, firing rates, and spikes with fewer and fewer timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spiking_rl.pruning import MAX_TIMESTEPS, TemporalPruning
from spiking_rl.vision.config import ClassifyConfig


def budgets_of(config: ClassifyConfig) -> dict[str, Any]:
    """Return the epochs of the spiking stages as :class:`spiking_rl.TemporalPruning` calls them."""
    return {
        "first_budget": max(1, config.epochs),
        "stage_budget": config.prune_epochs,
        "last_budget": config.last_epochs or None,
    }


class Stages:
    """Which stage a run is in, and what its settings say of that stage.

    Args:
        config: checked settings; they may be replaced while the run goes on.
    """

    def __init__(self, config: ClassifyConfig) -> None:
        self.config = config
        self.spiking = not config.trains_ann
        self.on_rates = self.spiking and config.rate_epochs > 0
        self.pruning: TemporalPruning
        self.plan()

    def plan(self) -> None:
        """Set the spiking stages up as the settings have them, none begun."""
        self.pruning = TemporalPruning(self.config.timesteps, self.config.prune_to, **budgets_of(self.config))

    @property
    def on_spikes(self) -> bool:
        """Whether spikes train, timestep by timestep, and neither ReLU nor firing rates."""
        return self.spiking and not self.on_rates

    @property
    def name(self) -> str:
        """Name of the stage and of its best checkpoint: ``relu``, ``rates``, or ``T5``."""
        if self.on_rates:
            return "rates"
        return self.pruning.checkpoint if self.spiking else "relu"

    @property
    def label(self) -> str:
        """The stage in words: ``ReLU``, ``rates``, or ``T=5``."""
        if self.on_spikes:
            return f"T={self.pruning.timesteps}"
        return "rates" if self.on_rates else "ReLU"

    @property
    def number(self) -> int:
        """A number of the stage's own: from each another order of the images is drawn."""
        if self.on_rates:
            return MAX_TIMESTEPS + 1
        return self.pruning.timesteps if self.spiking else 0

    @property
    def epochs(self) -> int:
        """Epochs of the stage."""
        if self.on_rates:
            return self.config.rate_epochs
        return int(self.pruning.budget) if self.spiking else self.config.ann_epochs

    @property
    def batch_size(self) -> int:
        """Images per update."""
        return self.config.batch_size if self.on_spikes else self.config.ann_batch_size

    @property
    def milestones(self) -> tuple[float, ...]:
        """Parts of the stage at which the learning rate falls."""
        return self.config.milestones if self.on_spikes else self.config.ann_milestones

    @property
    def rate_setting(self) -> str:
        """Name of the setting that is the stage's learning rate."""
        return "learning_rate" if self.on_spikes else "ann_learning_rate"

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is, for JSON."""
        return {"pruning": self.pruning.state_dict(), "spiking": self.spiking, "on_rates": self.on_rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to where :meth:`state_dict` was taken; stages that are left get the lengths of the settings.

        Raises:
            LookupError, TypeError, ValueError: a part is missing, of another kind, or cannot be.
        """
        pruning = TemporalPruning.from_state_dict(state["pruning"])
        if not pruning.finished:
            pruning.set_budgets(**budgets_of(self.config))
        self.pruning = pruning
        self.spiking, self.on_rates = bool(state["spiking"]), bool(state.get("on_rates", False))
