"""Ranges of the learners' settings: of a recipe, a command line and a constructor alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spiking_rl.errors import UserError

_COUNTS = ("n_steps", "n_epochs", "n_minibatches", "sequence_length")
_PARTS = ("gamma", "lam", "exploration_fraction", "exploration_initial_eps", "exploration_final_eps")
_POSITIVE = ("max_grad_norm", "reward_scale")


def check_ranges(values: Mapping[str, Any]) -> None:
    """Refuse settings with which learning cannot work; names that are not known here may be anything.

    Args:
        values: of settings by name.

    Raises:
        UserError: naming the first bad one.
    """
    for name in filter(values.__contains__, _COUNTS):  # in their order: the first bad one is always the same
        if values[name] < 1:
            raise UserError(name, values[name], "must be at least 1")
    for name in filter(values.__contains__, _PARTS):
        if not 0 <= values[name] <= 1:
            raise UserError(name, values[name], "must lie between 0 and 1")
    for name in filter(values.__contains__, _POSITIVE):
        if not 0 < values[name] < float("inf"):
            raise UserError(name, values[name], "must be positive and finite")
    if values.get("burn_in", 0) < 0:
        raise UserError("burn_in", values["burn_in"], "must not be negative")
    if not 1 <= values.get("exploration_repeat", 1) <= 1000:
        raise UserError("exploration_repeat", values["exploration_repeat"], "must lie between 1 and 1000")
    if not 0 < values.get("firing_rate", 0.5) < 1:
        raise UserError("firing_rate", values["firing_rate"], "must lie strictly between 0 and 1")
