"""Which arithmetic a device is fast in."""

from __future__ import annotations

import platform

import torch


def has_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Tell whether a device has instructions for bfloat16; a CPU without them takes three to ten times as long."""
    device = torch.device(device)
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        asked = [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
    else:
        asked = [ask] if (ask := getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)) else []
    return not asked or any(ask() for ask in asked)  # where torch does not tell, nobody is warned


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
