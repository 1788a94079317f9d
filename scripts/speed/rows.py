"""Rows of the speed benchmark: timed, told against ReLU and against the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from spiking_rl.scripts.speed.cases import CASES, Case, build_case
from spiking_rl.scripts.speed.memory import device_mb, extra_mb
from spiking_rl.scripts.speed.peers import PEERS
from spiking_rl.scripts.speed.timing import interleave, median_ratio, ratio_quartiles, settler, times_of
from spiking_rl.scripts.speed.variants import LIMIT, RELU, Pass, build_pass, differing_spikes, libraries

Key = tuple[str, int | None]
_CPU = torch.device("cpu")
_COMPARED = 8  # inputs on which spikes are compared
_LATENCY_PASSES = 10  # per timing

WITH_MEMORY = tuple(name for name, case in CASES.items() if case.backward)
"""Cases whose memory is measured too: those that keep activations for a backward pass."""


def fastest_format_is_channels_last(name: str, device: torch.device, rounds: int = 3) -> bool:
    """Say which memory format of a case is the fastest for the ReLU network: all get that one."""
    case = CASES[name]
    runs: dict[bool, Pass] = {}
    for channels_last in (True, False):
        runs[channels_last] = build_pass(
            RELU, case, *build_case(case, 1, channels_last=channels_last, calibrated=False, device=device)
        )
    times = interleave(runs, rounds=rounds, seconds=20, passes=_passes(case, device), settle=settler(device))
    return median_ratio(times[True], times[False]) <= 1


def timed_rows(
    name: str, *, rounds: int, seconds: float, channels_last: bool, device: torch.device = _CPU
) -> list[dict[str, Any]]:
    """Return a case's rows, without memory: ReLU, then at every T us, the limit and the other libraries.

    Args:
        name: of the case.
        rounds: timings of every variant, at most.
        seconds: no round begins after that many.
        channels_last: memory format of everything.
        device: where it runs.
    """
    case = CASES[name]
    runs: dict[Key, Pass] = {}
    differing: dict[Key, float] = {}
    for timesteps in case.timesteps:
        network, inputs = build_case(case, timesteps, channels_last=channels_last, device=device)
        if not runs:
            runs[RELU, None] = build_pass(RELU, case, network, inputs)
        for library in libraries(case, device):
            runs[library, timesteps] = build_pass(library, case, network, inputs)
            if library in PEERS:
                differing[library, timesteps] = differing_spikes(library, network, inputs[:_COMPARED])
    times = interleave(runs, rounds=rounds, seconds=seconds, passes=_passes(case, device), settle=settler(device))
    shared = {"case": name, "network": case.network, "pass": case.kind, "batch": case.batch}
    rows = []
    for (library, steps), values in times.items():
        limit = times.get((LIMIT, steps))
        told = {
            "library": library,
            "timesteps": steps,
            "ratio_to_relu": median_ratio(values, times[RELU, None]),
            "ratio_quartiles": ratio_quartiles(values, times[RELU, None]),
            "ratio_to_limit": None if limit is None else median_ratio(values, limit),
            "extra_mb": None,
            "differing_spikes": differing.get((library, steps)),
            "memory_format": "channels_last" if channels_last else "contiguous",
            "threads": torch.get_num_threads(),
            "device": device.type,
        }
        rows.append(shared | told | times_of(values))
    return rows


def _passes(case: Case, device: torch.device) -> int:
    """Return the calls per timing: one where each decision must be waited for, as whoever acts on it does."""
    return 1 if case.backward or device.type != "cpu" else _LATENCY_PASSES


def add_memory(rows: Sequence[dict[str, Any]], *, keep: bool, device: torch.device = _CPU) -> None:
    """Fill in ``extra_mb`` of rows, on a CPU each measured in a process of its own."""
    for row in rows:
        asked = row["case"], row["library"], row["timesteps"] or 1
        last = row["memory_format"] == "channels_last"
        if device.type == "cuda":
            row["extra_mb"] = device_mb(*asked, channels_last=last, device=device)
        else:
            row["extra_mb"] = extra_mb(*asked, channels_last=last, keep=keep, threads=row["threads"])


def printed(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a table."""
    lines = [f"{'':30}{'ms':>10}{'x ReLU':>9}{'x limit':>9}{'MB':>8}  spikes that differ"]
    for row in rows:
        name = "ReLU" if row["library"] == RELU else f"{row['library']} T={row['timesteps']}"
        limit, memory, differ = row["ratio_to_limit"], row["extra_mb"], row["differing_spikes"]
        lines.append(
            f"{row['case'] + ' ' + name:30}{row['ms']:10.2f}{row['ratio_to_relu']:9.2f}"
            f"{'' if limit is None else f'{limit:.2f}':>9}{'' if memory is None else f'{memory:.0f}':>8}"
            f"{'' if differ is None else f'  {differ:.1%}'}"
        )
    return "\n".join(lines)
