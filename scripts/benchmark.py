"""Speed and memory against the ReLU network, the limit of the machine and other spiking libraries, in one run.

pip install -c constraints.txt '.[benchmark]'    # the other libraries; those that are missing are left out
python -m spiking_rl.scripts.benchmark --output results/speed.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from spiking_rl.agents.building import resolve_device
from spiking_rl.allocator import keep_memory
from spiking_rl.arithmetic import has_bfloat16
from spiking_rl.compiling import build_op
from spiking_rl.errors import UserError
from spiking_rl.plotting import save_figure
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import add_results, earlier_rows
from spiking_rl.scripts.speed.cases import CASES
from spiking_rl.scripts.speed.figure import drawn_rows, speed_figure
from spiking_rl.scripts.speed.half import RATES, half_rows
from spiking_rl.scripts.speed.latency import latency_rows
from spiking_rl.scripts.speed.narrow import narrow_rows
from spiking_rl.scripts.speed.peers import PEERS, is_installed
from spiking_rl.scripts.speed.rates import rates_rows
from spiking_rl.scripts.speed.rows import WITH_MEMORY, add_memory, fastest_format_is_channels_last, printed, timed_rows
from spiking_rl.scripts.speed.scan import scan_rows
from spiking_rl.scripts.speed.stateful import stateful_rows

DESCRIPTION = """Time spiking-rl, SpikingJelly, snnTorch, Norse, Sinabs, the ReLU network and the limit in turns.

Example: python -m spiking_rl.scripts.benchmark --cases nature latency-nature --output results/speed.json"""

_OWN = ("rates", "scan", "stateful", "half", "narrow", "latency-cartpole")  # no other library runs these
_ON_ANY_DEVICE = (*CASES, "scan")


@dataclass(kw_only=True)
class Options:
    """How to measure."""

    cases: tuple[str, ...] = (*CASES, *_OWN)
    """What to measure. Parts add up in the output file as long as the commit is the same, and the device."""
    rounds: int = 40
    """Rounds; each times every variant once, so that a slow moment meets all of them."""
    seconds: float = 240
    """No round of a case begins after that many, once there are 3."""
    threads: int = 2
    """Torch threads (the CartPole network always runs on one)."""
    timesteps: tuple[int, ...] = (5, 4, 3, 2, 1)
    """T of the CartPole network."""
    time: bool = True
    """Time passes; --no-time only adds the memory to the rows of the output file, also on a busy machine."""
    memory: bool = True
    """Measure peak memory too, in a process per variant."""
    device: str = "cpu"
    """cpu or cuda. On a GPU only the cases that every library runs, and ``scan``."""
    stock_allocator: bool = False
    """Leave the allocator as it is; by default it keeps freed memory, for everyone (spiking_rl.keep_memory)."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=("--json",))] = None
    """Results as JSON; the figure is written beside it as PNG."""


def main() -> None:
    """Measure, print, write."""
    options = parse(Options, "benchmark", sys.argv[1:], DESCRIPTION)
    _check(options)
    build_op()  # not in the background of what is timed
    torch.set_num_threads(options.threads)
    kept = not options.stock_allocator and keep_memory()
    for peer in PEERS:
        if not is_installed(peer):
            print(f"{peer}: not installed, left out")
    for name in options.cases:
        if name not in _ON_ANY_DEVICE and resolve_device(options.device).type != "cpu":
            print(f"{name}: left out, it is a measurement of CPUs")
        elif name in _OWN_CASES:
            _keep(options, _OWN_CASES[name](options), kept)
        else:
            _measure_shared(name, options, kept)


def _measure_shared(name: str, options: Options, kept: bool) -> None:
    """Time a case that every library runs, then measure its memory, which takes a process per row."""
    device = resolve_device(options.device)
    if options.time:
        last = fastest_format_is_channels_last(name, device)
        rows = timed_rows(name, rounds=options.rounds, seconds=options.seconds, channels_last=last, device=device)
        print(printed(rows), flush=True)
        _keep(options, rows, kept)
    else:
        assert options.output is not None
        chosen = {"case": name, "allocator": _allocator(kept), "device": device.type}
        rows = [row for row in earlier_rows(options.output) if chosen.items() <= row.items()]
    if options.memory and name in WITH_MEMORY:
        add_memory(rows, keep=kept, device=device)
        print(printed(rows), flush=True)
        _keep(options, rows, kept)


def _keep(options: Options, rows: list[dict[str, Any]], kept: bool) -> None:
    """Put rows into the output file, and draw what it has of all libraries."""
    for row in rows:
        row |= {"allocator": _allocator(kept), "device": row.get("device", "cpu")}
    if options.output is not None:
        everything = add_results(options.output, "benchmark", rows, same=("case", "allocator", "device"))
        if drawn_rows(everything):
            save_figure(speed_figure(everything), options.output.with_suffix(".png"))


def _allocator(kept: bool) -> str:
    return "keeps" if kept else "stock"


def _check(options: Options) -> None:
    resolve_device(options.device)
    for name in options.cases:
        if name not in (*CASES, *_OWN):
            raise UserError("cases", name, f"unknown; choose among {', '.join((*CASES, *_OWN))}")
    for field in ("rounds", "threads"):
        if getattr(options, field) < 1:
            raise UserError(field, getattr(options, field), "must be at least 1")
    if not options.time and (options.output is None or not options.output.exists()):
        raise UserError("output", None, "--no-time adds memory to rows that were timed before: name their file")
    if options.output is not None and options.output.suffix != ".json":
        raise UserError("output", str(options.output), "must end with .json")


def _scan(options: Options) -> list[dict[str, Any]]:
    device = resolve_device(options.device)
    rows = scan_rows(rounds=options.rounds, seconds=options.seconds, device=device)
    for row in rows:
        told = f"{row['gb_per_second']:.1f} GB/s, {row['ratio_to_copy']:.2f} x a copy of as many bytes"
        print(f"{row['pass']:17}{_name(row):5} {row['ms']:9.3f} ms  {told}", flush=True)
    return rows


def _rates(options: Options) -> list[dict[str, Any]]:
    rows = [
        row
        for name in WITH_MEMORY
        for row in rates_rows(name, rounds=options.rounds, seconds=options.seconds / len(WITH_MEMORY))
    ]
    for row in rows:
        limit = "" if row["ratio_to_limit"] is None else f"  {row['ratio_to_limit']:.2f} x limit"
        rate = "" if row["fired"] is None else f"{row['fired']:.3f}"
        told = f"{row['network']:10} {row['library']:10} {_name(row):5} {rate:5} {row['ms']:9.2f} ms"
        print(f"{told}  {row['ratio_to_relu']:.2f} x ReLU{limit}", flush=True)
    return rows


def _stateful(options: Options) -> list[dict[str, Any]]:
    rows = stateful_rows(rounds=options.rounds, seconds=options.seconds)
    for row in rows:
        told = f"{row['ratio_to_stateless']:.2f} x stateless"
        print(f"{row['network']:10} {row['variant']:9} {row['ms']:9.2f} ms  {told}", flush=True)
    return rows


def _name(row: dict[str, Any]) -> str:
    return "ReLU" if row["timesteps"] is None else f"T={row['timesteps']}"


def _half(options: Options) -> list[dict[str, Any]]:
    if not has_bfloat16():
        print("half: left out, this processor has no instructions for bfloat16")
        return []
    rows = [
        row for name in RATES for row in half_rows(name, rounds=options.rounds, seconds=options.seconds / len(RATES))
    ]
    for row in rows:
        told = f"{row['ratio_to_float32']:.2f} x float32  {row['ratio_to_relu']:.2f} x ReLU"
        rate = "" if row["rate"] is None else f"{row['rate']:.2f}"
        print(
            f"{row['network']:10} {_name(row):5} {rate:4} {row['precision']:9} {row['ms']:9.2f} ms  {told}", flush=True
        )
    return rows


def _narrow(options: Options) -> list[dict[str, Any]]:
    rows = narrow_rows(rounds=options.rounds, seconds=options.seconds)
    for row in rows:
        told = f"{row['ratio_to_plain']:.2f} x nn.Conv2d"
        name = f"{row['network']:10} {_name(row):5}"
        print(f"{name} {row['precision']:9} {row['maps']:13} {row['ms']:9.2f} ms  {told}", flush=True)
    return rows


def _latency(options: Options) -> list[dict[str, Any]]:
    rows = latency_rows(options.timesteps, rounds=options.rounds, seconds=options.seconds)
    for row in rows:
        print(f"{row['pass']:8} {_name(row):5} {row['ms']:.4f} ms  {row['ratio_to_relu']:.2f} x ReLU", flush=True)
    return rows


_OWN_CASES: dict[str, Callable[[Options], list[dict[str, Any]]]] = {
    "rates": _rates,
    "scan": _scan,
    "stateful": _stateful,
    "half": _half,
    "narrow": _narrow,
    "latency-cartpole": _latency,
}


if __name__ == "__main__":
    script(main)
