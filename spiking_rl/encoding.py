"""How an analog input becomes a current over timesteps."""

from __future__ import annotations

from torch import Tensor


def scan_starts(starts: Tensor | None, timesteps: int) -> Tensor | None:
    """Return episode starts per timestep, bool ``(L*T, B)``, of those per decision ``(L, B)``.

    Only the first timestep of a decision can open an episode. None stays None.
    """
    if starts is None:
        return None
    spread = starts.new_zeros(len(starts), timesteps, starts.shape[1])
    spread[:, 0] = starts
    return spread.flatten(0, 1)


def direct(current: Tensor, timesteps: int) -> Tensor:
    """Present the analog input at every timestep (direct encoding).

    The first layer's current does not change over the timesteps of one decision, so it is computed
    once and repeated: ``(L, B, *N)`` becomes ``(L*T, B, *N)``, the timestep being the faster axis.

    Args:
        current: the first layer's current, one per decision, ``(L, B, *N)``.
        timesteps: T >= 1.

    Source: DIET-SNN (Rathi, Roy 2020).
    """
    if timesteps == 1:
        return current
    if current.shape[0] == 1:
        # A view: all fresh decisions travel in the batch, and nothing is copied.
        return current.expand(timesteps, *current.shape[1:])
    return current.repeat_interleave(timesteps, dim=0)
