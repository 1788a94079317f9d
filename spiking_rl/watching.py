"""Whether somebody writes down, transforms or follows what torch does: loops of our own would pass them by unseen."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

is_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def is_watched() -> bool:
    """Tell whether torch is being traced, or runs under a dispatch mode, ``torch.func`` or forward differentiation.

    Not to be asked while torch compiles, which cannot look through it.
    """
    return torch._C._is_tracing() or is_in_torch_dispatch_mode() or is_transforming() or forward_ad._current_level >= 0
