"""The allocator keeps freed memory: in the command line, for users who ask, and never against their own settings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

GLIBC = sys.platform.startswith("linux") and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
pytestmark = pytest.mark.skipif(not GLIBC, reason="glibc's allocator")

# Page faults of ten tensors of 64 MB that are made, written and freed, one after the other.
FAULTS = """
import resource
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
BY_HAND = f"import spiking_rl\nkept = spiking_rl.keep_memory()\n{FAULTS}\nfaults()\nprint(kept, faults())"
BY_COMMAND_LINE = f"""
from spiking_rl.scripts.main import main
try:
    main(["--version"])
except SystemExit:
    pass
{FAULTS}
faults()
print(None, faults())
"""
FEW = 500  # one tensor of 64 MB is 16,384 pages; with huge pages 32


def run(code: str, **variables: str) -> tuple[str, int]:
    """Run code in a process of its own; return the two words that it prints last."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "SPIKING_RL_KEEP"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=plain | variables, check=True)
    said, faults = done.stdout.split()[-2:]
    return said, int(faults)


@pytest.fixture(scope="module")
def stock() -> int:
    """Return the page faults of the allocator as it is."""
    _, faults = run(BY_HAND, SPIKING_RL_KEEP_MEMORY="0")
    if faults < FEW:
        pytest.skip("huge pages: the stock allocator faults too little to tell them apart")
    return faults


@pytest.mark.parametrize("code", [BY_HAND, BY_COMMAND_LINE], ids=["by hand", "by the command line"])
def test_freed_memory_is_used_again(code: str, stock: int) -> None:
    said, faults = run(code)
    assert said in ("True", "None")
    assert faults < stock / 5  # one of the ten may come anew, where something else has taken its place


@pytest.mark.parametrize(
    "variables",
    [
        {"SPIKING_RL_KEEP_MEMORY": "0"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=1000"},
    ],
    ids=lambda v: next(iter(v)),
)
def test_the_users_own_settings_stand(variables: dict[str, str], stock: int) -> None:
    said, faults = run(BY_HAND, **variables)
    assert said == "False"
    assert faults > stock / 2
