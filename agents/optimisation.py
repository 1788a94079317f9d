"""What every optimiser of a spiking policy is told."""

from __future__ import annotations

import torch
from torch import nn

from spiking_rl.neurons import clamp_after_step


def equip_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Keep thresholds and leaks in range after each step, and loaded moments in their weights' layout.

    Files hold tensors in plain order, convolutions learn in channels-last, and fused optimisers go
    through memory without a look at strides: each weight would meet another one's moments.

    Args:
        optimizer: just made, or restored without its hooks.
        module: whose neurons it trains.
    """
    clamp_after_step(optimizer, module)
    optimizer.register_load_state_dict_post_hook(_lay_out_moments)
    optimizer.register_load_state_dict_post_hook(_forget_recording)


class _Prepared:
    """What a recording of an optimiser's step reads; equal to nothing but itself."""

    def __init__(self, rates: list[torch.Tensor]) -> None:
        self.rates = rates  # of the groups


_PREPARED = "_prepared_for_recording"  # attribute of an optimiser, which no copy and no file keeps


def prepare_recording(optimizer: torch.optim.Optimizer) -> bool:
    """Make an optimiser's step part of a CUDA graph: what changes from one step to the next is kept on the device.

    Returns:
        Whether it is now; False for optimisers that cannot.
    """
    groups = optimizer.param_groups
    if not all("capturable" in group for group in groups):
        return False
    prepared = getattr(optimizer, _PREPARED, None)
    rates = [] if prepared is None else prepared.rates
    if len(rates) == len(groups) and all(
        group["capturable"] and group["lr"] is rate for group, rate in zip(groups, rates, strict=True)
    ):
        return True
    for group in groups:
        device = group["params"][0].device
        group["capturable"] = True
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        for slots in (optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state):
            slots["step"] = torch.as_tensor(slots["step"], dtype=torch.float32, device=device)
    setattr(optimizer, _PREPARED, _Prepared([group["lr"] for group in groups]))
    return True


def recorded_as(optimizer: torch.optim.Optimizer) -> object:
    """Return what is another object whenever a recording of the optimiser's step is none of its any more."""
    return getattr(optimizer, _PREPARED, None)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, in place where a recording reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the first group."""
    return float(optimizer.param_groups[0]["lr"])


def _forget_recording(optimizer: torch.optim.Optimizer) -> None:
    """Undo :func:`prepare_recording` in what was loaded: it may have been saved on another device."""
    for group in optimizer.param_groups:
        if not group.get("capturable"):
            continue
        group["capturable"] = False
        group["lr"] = float(group["lr"])
        if not group.get("fused"):  # such a step is counted on the CPU, and asked for
            for parameter in group["params"]:
                if "step" in optimizer.state.get(parameter, {}):
                    optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].cpu()


def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
