"""Which arithmetic a device is fast in."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Tell whether a device has instructions for bfloat16; on a CPU without them it takes ten times as long."""
    device = torch.device(device)
    if device.type == "cpu":
        asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return asked is None or bool(asked())
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def slow_arithmetic(precision: str, device: torch.device | str, field: str) -> str | None:
    """Return a line of warning where an arithmetic is slow on a device, else None.

    Args:
        precision: ``bfloat16`` or another.
        device: to compute on.
        field: the setting that asks for it.
    """
    if precision != "bfloat16" or has_bfloat16(device):
        return None
    flag = field.replace("_", "-")
    return f"warning: this processor has no instructions for bfloat16, float32 is far faster here; see --{flag}"
