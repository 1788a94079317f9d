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

from spiking_rl.allocator import keep_memory
from spiking_rl.errors import UserError
from spiking_rl.plotting import save_figure
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import add_results
from spiking_rl.scripts.speed.cases import CASES
from spiking_rl.scripts.speed.figure import speed_figure
from spiking_rl.scripts.speed.latency import latency_rows
from spiking_rl.scripts.speed.peers import PEERS, is_installed
from spiking_rl.scripts.speed.rows import add_memory, fastest_format_is_channels_last, printed, timed_rows
from spiking_rl.scripts.speed.stateful import stateful_rows

DESCRIPTION = """Time spiking-rl, SpikingJelly, snnTorch, Norse, Sinabs, the ReLU network and the limit in turns.

Example: python -m spiking_rl.scripts.benchmark --cases nature latency-nature --output results/speed.json"""

_OWN = ("stateful", "latency-cartpole")  # no other library runs these


@dataclass(kw_only=True)
class Options:
    """How to measure."""

    cases: tuple[str, ...] = (*CASES, *_OWN)
    """What to measure. Parts add up in the output file as long as the commit is the same."""
    rounds: int = 40
    """Rounds; each times every variant once, so that a slow moment meets all of them."""
    seconds: float = 240
    """No round of a case begins after that many, once there are 3."""
    threads: int = 2
    """Torch threads (the CartPole network always runs on one)."""
    timesteps: tuple[int, ...] = (5, 4, 3, 2, 1)
    """T of the CartPole network."""
    memory: bool = True
    """Measure peak memory too, in a process per variant."""
    stock_allocator: bool = False
    """Leave the allocator as it is; by default it keeps freed memory, for everyone (spiking_rl.keep_memory)."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=("--json",))] = None
    """Results as JSON; the figure is written beside it as PNG."""


def main() -> None:
    """Measure, print, write."""
    options = parse(Options, "benchmark", sys.argv[1:], DESCRIPTION)
    _check(options)
    torch.set_num_threads(options.threads)
    kept = not options.stock_allocator and keep_memory()
    for peer in PEERS:
        if not is_installed(peer):
            print(f"{peer}: not installed, left out")
    for name in options.cases:
        measured = _MEASURE.get(name, _shared_case(name))(options, kept)
        for row in measured:
            row["allocator"] = "keeps" if kept else "stock"
        if options.output is not None:
            everything = add_results(options.output, "benchmark", measured, same=("case", "allocator"))
            save_figure(speed_figure(everything), options.output.with_suffix(".png"))


def _check(options: Options) -> None:
    for name in options.cases:
        if name not in (*CASES, *_OWN):
            raise UserError("cases", name, f"unknown; choose among {', '.join((*CASES, *_OWN))}")
    for field in ("rounds", "threads"):
        if getattr(options, field) < 1:
            raise UserError(field, getattr(options, field), "must be at least 1")
    if options.output is not None and options.output.suffix != ".json":
        raise UserError("output", str(options.output), "must end with .json")


Measured = Callable[[Options, bool], list[dict[str, Any]]]


def _shared_case(name: str) -> Measured:
    def measure(options: Options, kept: bool) -> list[dict[str, Any]]:
        channels_last = fastest_format_is_channels_last(name)
        rows = timed_rows(name, rounds=options.rounds, seconds=options.seconds, channels_last=channels_last)
        if options.memory:
            add_memory(rows, keep=kept)
        print(printed(rows), flush=True)
        return rows

    return measure


def _stateful(options: Options, kept: bool) -> list[dict[str, Any]]:
    rows = stateful_rows(rounds=options.rounds, seconds=options.seconds)
    for row in rows:
        told = f"{row['ratio_to_stateless']:.2f} x stateless"
        print(f"{row['network']:10} {row['variant']:9} {row['ms']:9.2f} ms  {told}", flush=True)
    return rows


def _latency(options: Options, kept: bool) -> list[dict[str, Any]]:
    rows = latency_rows(options.timesteps, rounds=options.rounds, seconds=options.seconds)
    for row in rows:
        name = "ReLU" if row["timesteps"] is None else f"T={row['timesteps']}"
        print(f"{row['pass']:8} {name:5} {row['ms']:.4f} ms  {row['ratio_to_relu']:.2f} x ReLU", flush=True)
    return rows


_MEASURE: dict[str, Measured] = {"stateful": _stateful, "latency-cartpole": _latency}


if __name__ == "__main__":
    script(main)
