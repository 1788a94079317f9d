"""How an analog input becomes a current over timesteps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spiking_rl.errors import UserError

ENCODINGS = ("direct", "hybrid", "poisson")
"""How inputs can be presented; direct needs no encoder."""


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


class Encoder(nn.Module):
    """Turns an analog input into the first layer's input at every timestep.

    Args:
        zero: input that is level 0, per channel or one for all.
        span: how far above (or below) ``zero`` an input is level 1 (or -1), > 0.

    Attributes:
        name: of the encoding, as settings call it.
        analog: timesteps of a decision in which the first layer multiplies; in the others it adds up spikes.

    Raises:
        UserError: a span that is not positive, or numbers that are not finite.
    """

    zero: Tensor
    span: Tensor
    name = ""
    analog = 0

    def __init__(self, zero: float | Sequence[float] = 0.0, span: float | Sequence[float] = 1.0) -> None:
        super().__init__()
        for name, value in (("zero", zero), ("span", span)):
            numbers = list(value) if isinstance(value, Sequence) else [float(value)]
            if not all(math.isfinite(v) and (name == "zero" or v > 0) for v in numbers):
                raise UserError(f"input_{name}", value, "must be finite, and a span positive")
            # They follow from the settings, so no checkpoint needs them.
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32), persistent=False)

    def level(self, inputs: Tensor) -> Tensor:
        """Return the inputs ``(B, C, ...)`` on the scale of the code."""
        return (inputs - self.per_channel(self.zero, inputs)) / self.per_channel(self.span, inputs)

    @staticmethod
    def per_channel(numbers: Tensor, inputs: Tensor) -> Tensor:
        """Return numbers ``(C,)``, or ``(1,)`` for all channels, so that they broadcast against ``(B, C, ...)``."""
        return numbers.reshape(-1, *[1] * (inputs.dim() - 2))


class HybridEncoder(Encoder):
    """The analog input in the first timestep; after it every input spikes once, the stronger the earlier.

    An input of level x fires at the first t in 2..T with ``|x| > 1 - (t - 1) / T``; level 0 never does. A negative
    level fires a spike of amplitude -1: an on/off pair that shares its weights. With T = 1 there is no temporal part.

    This is our reading of single-spike hybrid input encoding (Datta, Kundu, Beerel 2021), whose code is not public.
    """

    name = "hybrid"
    analog = 1

    def forward(self, inputs: Tensor, timesteps: int) -> Tensor:
        """Return ``(T, B, *I)`` of inputs ``(B, *I)``."""
        if timesteps == 1:
            return inputs.unsqueeze(0)
        level = self.level(inputs)
        size = level.abs()
        parts = [inputs]
        for t in range(2, timesteps + 1):
            spikes = size > 1 - (t - 1) / timesteps
            if t > 2:
                spikes &= size <= 1 - (t - 2) / timesteps
            parts.append(level.sign() * spikes)
        return torch.stack(parts)


class PoissonEncoder(Encoder):
    """At every timestep each input spikes at random, with a probability of its level's size.

    Spikes have the amplitude ``span`` and the sign of the level, so that the mean over many timesteps is the analog
    input, up to the span. (A factor of all inputs goes into the weights: the first layer only adds.) The latency
    comparison of DIET-SNN (Rathi, Roy 2020). Drawn from torch's global generator; ``zero`` must be 0.
    """

    name = "poisson"

    def forward(self, inputs: Tensor, timesteps: int) -> Tensor:
        """Return ``(T, B, *I)`` of inputs ``(B, *I)``."""
        level = self.level(inputs)
        drawn = torch.rand(timesteps, *level.shape, device=level.device)
        return (drawn < level.abs()) * (level.sign() * self.per_channel(self.span, inputs))


def build_encoder(encoding: str, zero: float | Sequence[float], span: float | Sequence[float]) -> Encoder | None:
    """Return the encoder of a name in :data:`ENCODINGS`; None for direct encoding, which needs none.

    Raises:
        UserError: an unknown name, or a level that cannot be.
    """
    if encoding not in ENCODINGS:
        raise UserError("encoding", encoding, f"must be one of {', '.join(ENCODINGS)}")
    if encoding == "direct":
        return None
    if encoding == "hybrid":
        return HybridEncoder(zero, span)
    if any([zero] if isinstance(zero, (int, float)) else zero):
        raise UserError("input_zero", zero, "must be 0 for poisson, whose spikes are as many as inputs are far from 0")
    return PoissonEncoder(0.0, span)
