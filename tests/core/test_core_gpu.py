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
from spiking_rl.fused import FusedScan, Options
from spiking_rl.fused_plan import plan_for

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
    with torch.inference_mode():  # as a deployed network's first scan
        assert gpu._agrees(device)
    monkeypatch.setattr(gpu, "KERNELS", COMPILED._replace(forward=otherwise))
    assert not gpu._agrees(device)


def test_so_is_one_whose_gradient_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from spiking_rl import gpu
    from spiking_rl.fused import COMPILED

    def otherwise(job: Any, arriving: Any, leaving: Any) -> Any:
        return COMPILED.backward(job._replace(options=job.options._replace(gamma=0.5)), arriving, leaving)

    monkeypatch.setattr(gpu, "KERNELS", COMPILED._replace(backward=otherwise))
    assert not gpu._agrees(torch.device("cpu"))


def test_numbers_that_lie_elsewhere_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from spiking_rl import gpu

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_usable", lambda _: True)
    here = [torch.ones(4, 1, 8), torch.tensor(0.5), torch.tensor(1.0)]
    assert gpu.triton_plan(*here) is not None
    for i in (1, 2):
        mixed = [tensor.to("meta") if i == j else tensor for j, tensor in enumerate(here)]
        assert gpu.triton_plan(*mixed) is None


COMPILING = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spiking_rl import gpu_kernels

NUMBERS = {"steps": 5, "repeat": 1, "channels": 64, "places": 1, "channel_stride": 1, "place_stride": 1}
FLAGS = {"TILE_P": 1, "TILE_C": 64, "BY_SPIKES": True, "TINY": 1e-30}  # the other capitals: nothing is there
NONE = "before", "keep", "potentials", "after", "by_potentials", "by_after", "of_before"
for kernel in (gpu_kernels.forward, gpu_kernels.backward):
    for batch in (1, 3, 32):
        numbers = NUMBERS | {"batch": batch}
        signature, constants = {}, {}
        for place, name in enumerate(kernel.arg_names):
            if name.isupper() or name in NONE or numbers.get(name) == 1:  # a 1 is a constant to the compiler
                constants[place,] = FLAGS.get(name, False) if name.isupper() else numbers.get(name)
                signature[name] = "constexpr"
            else:
                signature[name] = "i32" if name in numbers else "fp32" if name == "gamma" else "*fp32"
        triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
print("compiled")
"""


@needs_triton
def test_the_kernels_compile_for_a_gpu_whatever_the_batch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(COMPILING)
    done = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("compiled\n")
