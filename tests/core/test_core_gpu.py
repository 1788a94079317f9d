"""The GPU kernels, run by Triton's interpreter on a CPU: the plain loop's values and gradients.

Triton comes with torch for CUDA; without it (``pip install triton``) all of this is skipped. What a device makes of the
kernels only a device can tell: they check themselves there (``gpu._usable``).
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")

SCRIPT = """
import random, torch
from spiking_rl import LIFState, gpu, lif_scan_reference
from spiking_rl.fused import FusedScan, Options, plan_for

assert gpu._usable(torch.device("cpu"))

for seed in range(60):
    draw = torch.Generator().manual_seed(seed)
    choose = random.Random(seed)
    shape = choose.choice([(1,), (5,), (700,), (6, 4, 5), (40, 1, 1), (32, 11, 9), (3, 17, 19), (4, 6)])
    steps, repeat, batch = choose.randint(1, 4), choose.randint(1, 3), choose.randint(1, 3)
    half, carried, reset = (choose.random() < 0.4 for _ in range(3))
    once = not carried and not reset and choose.random() < 0.5
    current = torch.randn(steps * batch, *shape, generator=draw)
    if len(shape) == 3 and choose.random() < 0.5:
        current = current.to(memory_format=torch.channels_last)
    current = current.unflatten(0, (steps, batch)).to(torch.bfloat16 if half else torch.float32)
    per_channel = (shape[0], *[1] * (len(shape) - 1))
    membrane = torch.randn(batch, *shape, generator=draw) if carried else None
    leak, threshold = (torch.rand(choose.choice([(), per_channel]), generator=draw) + d for d in (0, 0.2))
    starts = torch.rand(steps * repeat, batch, generator=draw) < 0.3 if reset else None
    weights = [torch.randn(n, batch, *shape, generator=draw).bfloat16().float() for n in (steps * repeat,) * 2 + (1,)]
    found = []
    for kernel in (True, False):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (current, membrane, leak, threshold)]
        if kernel:
            plan = plan_for(current, leak, threshold)
            keep = None if starts is None else (~starts).float()
            outputs = FusedScan.apply(*leaves, keep, Options(plan, 0.7, repeat, True, True, once), gpu.KERNELS)
        else:
            state = None if membrane is None else LIFState(leaves[1])
            options = {"gamma": 0.7, "repeat": repeat, "trace": True, "single_spike": once}
            scan = lif_scan_reference(leaves[0].float(), state, leaves[2], leaves[3], starts, **options)
            outputs = scan.spikes, scan.state.membrane, scan.potential
        spikes, after, potential = (t.float() for t in outputs)
        ((spikes * weights[0]).sum() + (potential * weights[1]).sum() + (after * weights[2][0]).sum()).backward()
        gradients = [t.grad.float() for t in leaves if t is not None and t.grad is not None]
        found.append([spikes, after, potential, *gradients])
    for i, (ours, expected) in enumerate(zip(*found, strict=True)):
        rounded = half and i == 3
        torch.testing.assert_close(ours, expected, rtol=2e-2 if rounded else 3e-4, atol=1e-3, msg=f"{seed}, {i}")

potential, threshold = torch.randn(4, 9), torch.rand(9)
assert torch.equal(gpu.triton_fire(potential, threshold, 0.3), (potential > threshold).float())
print("agrees")
"""


@needs_triton
def test_the_kernels_are_the_plain_loop(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], env={**environment(), "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("agrees\n")


def test_where_kernels_fail_or_differ_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from spiking_rl import gpu

    device = torch.device("cpu")
    monkeypatch.setattr(gpu, "kernels", object())

    def broken(*_: object) -> bool:
        raise RuntimeError("no such architecture")

    for check, warns in ((broken, True), (lambda _: False, False)):
        gpu._usable.cache_clear()
        monkeypatch.setattr(gpu, "_agrees", check)
        if warns:
            with pytest.warns(UserWarning, match="no such architecture"):
                assert not gpu._usable(device)
        else:
            assert not gpu._usable(device)
    gpu._usable.cache_clear()
    monkeypatch.setattr(gpu, "_agrees", lambda _: True)
    assert gpu._usable(device)
    gpu._usable.cache_clear()


def test_a_kernel_that_fires_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from spiking_rl import gpu
    from spiking_rl.fused import COMPILED

    def otherwise(job: Any, wanted: Any) -> None:
        COMPILED.forward(job._replace(threshold=job.threshold + 0.1), wanted)

    device = torch.device("cpu")
    monkeypatch.setattr(gpu, "KERNELS", COMPILED)
    assert gpu._agrees(device)
    monkeypatch.setattr(gpu, "KERNELS", COMPILED._replace(forward=otherwise))
    assert not gpu._agrees(device)
