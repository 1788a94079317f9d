"""The compiled loops of ``lif_scan.c``: built once per machine by its own C compiler, else done without."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SWITCH = "SPIKING_RL_COMPILE"
"""Environment variable; ``0`` leaves the compiled loops out."""

_SOURCES = [Path(__file__).with_name(name) for name in ("lif_scan.c", "lif_loops.h")]
# No fused multiply-add and no reordering: the forward pass gives the plain loop's values bit for bit.
_FLAGS = ["-O3", "-march=native", "-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # a sixth off the backward pass; compilers stop at 256 by themselves


@functools.cache
def built_loops() -> ctypes.CDLL | None:
    """Return the compiled loops; None where there is no compiler, or the switch is off.

    The result is kept in the user's cache folder, under a name made of the source, the compiler and the processor.
    """
    if os.environ.get(SWITCH) == "0" or not sys.platform.startswith("linux"):
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    # Threads come from the OpenMP that torch has loaded: a second one would fight it for the cores. So the object is
    # linked against none, and where torch's cannot be found it is built without threads.
    for threads in (("-fopenmp",), ("-fopenmp-simd",)):
        try:
            return _declared(ctypes.CDLL(str(_built(compiler, threads))))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what the loops take: addresses, all but the surrogate gradient's height."""
    address = ctypes.c_void_p
    for stored in ("float", "bfloat16"):
        getattr(loaded, f"lif_forward_{stored}").argtypes = [address] * 9
        getattr(loaded, f"lif_backward_{stored}").argtypes = [*[address] * 4, ctypes.c_float, *[address] * 9]
    return loaded


def _built(compiler: str, threads: tuple[str, ...]) -> Path:
    """Return the path of the library, building it if it is not there."""
    parts = [
        *(source.read_bytes() for source in _SOURCES),
        *(text.encode() for text in (compiler, _processor(), *_FLAGS, *threads)),
    ]
    folder = _cache()
    path = folder / f"lif_scan-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if not path.is_file():
        # The library takes its place when it is whole: several processes may be building it.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made, built = Path(scratch, "lif_scan.o"), Path(scratch, "lif_scan.so")
            quiet = {"check": True, "capture_output": True, "timeout": 60}
            subprocess.run([compiler, *_FLAGS, *threads, "-c", str(_SOURCES[0]), "-o", str(made)], **quiet)  # type: ignore[call-overload]
            subprocess.run([compiler, "-shared", str(made), "-o", str(built)], **quiet)  # type: ignore[call-overload]
            built.replace(path)
    return path


def _cache() -> Path:
    """Return a folder that only this user can write to: what lies in it is run."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "spiking-rl"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise OSError(f"{folder} can be written to by others")
    return folder


def _processor() -> str:
    """Describe the processor: code for its instructions must not run on a lesser one that shares the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("flags", "Features", "model")))
