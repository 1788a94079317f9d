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


def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
