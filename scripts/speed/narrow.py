"""What laying narrow maps side by side saves: training passes with and without it, in both arithmetics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spiking_rl.arithmetic import has_bfloat16
from spiking_rl.networks import LayeredNetwork
from spiking_rl.scripts.speed.cases import CASES, Case, build_case
from spiking_rl.scripts.speed.timing import interleave, median_ratio, times_of
from spiking_rl.scripts.speed.variants import OURS, RELU, Pass, build_pass
from spiking_rl.small_maps import SmallMapConv2d

_CASES = (CASES["vgg16"], Case("resnet20", (3, 32, 32), 10, 64, (1,), True))
_PRECISIONS = ("float32", "bfloat16")
_PLAIN, _TOGETHER = "nn.Conv2d", "side by side"

Key = tuple[Case, str, int | None, str, str]


def narrow_rows(*, rounds: int, seconds: float, cases: Sequence[Case] = _CASES) -> list[dict[str, Any]]:
    """Return the rows of the ReLU networks and of ours at T=1, each as a multiple of its time with ``nn.Conv2d``.

    In bfloat16 only where the processor has instructions for it.
    """
    runs: dict[Key, Pass] = {}
    for case, maps in itertools.product(cases, (_PLAIN, _TOGETHER)):
        network, inputs = build_case(case, 1)
        if maps == _PLAIN:
            make_plain(network)
        for precision in _PRECISIONS[: 1 + has_bfloat16()]:
            runs[case, RELU, None, precision, maps] = build_pass(RELU, case, network, inputs, precision)
            runs[case, OURS, 1, precision, maps] = build_pass(OURS, case, network, inputs, precision)
    times = interleave(runs, rounds=rounds, seconds=seconds)
    return [
        {
            "case": f"narrow-{case.network}",
            "network": case.network,
            "pass": case.kind,
            "library": library,
            "precision": precision,
            "maps": maps,
            "timesteps": timesteps,
            "batch": case.batch,
            "ratio_to_plain": median_ratio(values, times[case, library, timesteps, precision, _PLAIN]),
            "threads": torch.get_num_threads(),
            **times_of(values),
        }
        for (case, library, timesteps, precision, maps), values in times.items()
    ]


def make_plain(network: LayeredNetwork) -> None:
    """Let a network convolve with ``nn.Conv2d`` itself."""
    for module in network.modules():
        if isinstance(module, SmallMapConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # same parameters, other arithmetic
