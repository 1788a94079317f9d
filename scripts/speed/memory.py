"""Peak memory of a pass: how far the resident set of a process of its own rises above the idle network.

Run as a process per variant: weights, inputs and code are resident and freed blocks are given back before the
peak is reset; the allocator is then the one that is timed. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import torch

from spiking_rl.allocator import keep_memory
from spiking_rl.provenance import rss_mb
from spiking_rl.scripts.speed.cases import CASES, build_case
from spiking_rl.scripts.speed.variants import Pass, build_pass

_PASSES = 3
_RESET_PEAK = "5"  # proc(5), clear_refs


def extra_mb(case: str, library: str, timesteps: int, *, channels_last: bool, keep: bool, threads: int) -> float | None:
    """Return MB of peak memory of forward and backward, gradients included, over the idle network.

    Args:
        case: name of a case.
        library: who runs it.
        timesteps: T.
        channels_last: memory format.
        keep: whether the allocator keeps freed memory.
        threads: of torch.

    Returns:
        None where the system does not tell.
    """
    if not sys.platform.startswith("linux"):
        return None
    given = {"case": case, "library": library, "timesteps": timesteps, "channels_last": channels_last}
    given |= {"keep": keep, "threads": threads}
    command = [sys.executable, "-W", "ignore", "-m", "spiking_rl.scripts.speed.memory", json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _idle_pass(case: str, library: str, timesteps: int, channels_last: bool, device: torch.device) -> Pass:
    """Return a pass that has not run yet, everything loaded that it needs."""
    network, inputs = build_case(CASES[case], timesteps, channels_last=channels_last, calibrated=False, device=device)
    build_pass(library, CASES[case], network, inputs[:1])()  # loads what is loaded at the first call
    run = build_pass(library, CASES[case], network, inputs)
    network.zero_grad(set_to_none=True)
    return run


def device_mb(case: str, library: str, timesteps: int, *, channels_last: bool, device: torch.device) -> float:
    """Return the same of a CUDA device's memory, which is counted there: no process of its own is needed."""
    run = _idle_pass(case, library, timesteps, channels_last, device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    idle = torch.cuda.memory_allocated(device)
    for _ in range(_PASSES):
        run()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - idle) / 2**20, 1)


def _measure(case: str, library: str, timesteps: int, channels_last: bool, keep: bool, threads: int) -> float:
    torch.set_num_threads(threads)
    run = _idle_pass(case, library, timesteps, channels_last, torch.device("cpu"))
    ctypes.CDLL(None).malloc_trim(0)
    if keep:
        keep_memory()
    idle = rss_mb()
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    for _ in range(_PASSES):
        run()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert idle is not None
    return round(int(status["VmHWM"].split()[0]) / 2**10 - idle, 1)


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))
