"""What is compiled: built once per machine by its own compilers, else done without.

The loops of ``lif_scan.c`` and ``events.c`` take seconds, and are waited for. ``lif_op.cpp``, which makes the former an
operation of torch's own, includes torch's headers, which take half a minute: it is built in the background, and used
from the next start on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import torch

SWITCH = "SPIKING_RL_COMPILE"
"""Environment variable; ``0`` leaves the compiled loops out."""

_SCAN = ("lif_scan.c", "lif_loops.h", "stored.h")
_EVENTS = ("events.c", "event_lists.h", "event_rows.h", "stored.h")
_FLAGS = ["-O3", "-march=native", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
# No fused multiply-add and no reordering: the scan's forward pass gives the plain loop's values bit for bit.
_EXACT = "-ffp-contract=off"
_HANGS = 600  # seconds: a compiler that takes so long, on a machine however busy, does not end at all
_STORED: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("-DHALVES",)}
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")  # a sixth off the backward pass; compilers stop at 256 by themselves


@functools.cache
def built_loops(stored: torch.dtype = torch.float32) -> ctypes.CDLL | None:
    """Return the compiled loops; None where there is no compiler, or the switch is off.

    Each type of currents and spikes, float32 and bfloat16, has a library of its own, built when it is first asked for.
    It is kept in the user's cache folder, under a name made of the source, the compiler and the processor.
    """
    loaded = _library(_SCAN, (_EXACT, *_STORED[stored]))
    if loaded is not None:
        address = ctypes.c_void_p
        loaded.lif_forward.argtypes = [address] * 9
        loaded.lif_backward.argtypes = [*[address] * 4, ctypes.c_float, *[address] * 9]
    return loaded


@functools.cache
def built_events(stored: torch.dtype = torch.float32) -> ctypes.CDLL | None:
    """Return the compiled ``events.c`` likewise, for one type of inputs and outputs."""
    loaded = _library(_EVENTS, _STORED[stored])
    if loaded is not None:
        address = ctypes.c_void_p
        loaded.events_run.argtypes = [address, ctypes.c_int64, *[address] * 7]
        loaded.events_density.argtypes = [address, ctypes.c_int64, ctypes.c_int64]
        loaded.events_density.restype = ctypes.c_int64
        loaded.events_sample.argtypes = [address, ctypes.c_int64, ctypes.c_int64]
        loaded.events_sample.restype = ctypes.c_int64
        loaded.events_weigh.argtypes = [address, ctypes.c_int64, *[address] * 5]
        if stored is torch.float32:
            loaded.events_rows.argtypes = [*[ctypes.c_int64] * 5, *[address] * 4]
    return loaded


def _library(sources: tuple[str, ...], chosen: tuple[str, ...]) -> ctypes.CDLL | None:
    """Return what the first of the sources, which includes the others, makes; None where it cannot be made."""
    if os.environ.get(SWITCH) == "0" or not sys.platform.startswith("linux"):
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    # Threads come from the OpenMP that torch has loaded: a second one would fight it for the cores. So the object is
    # linked against none, and where torch's cannot be found it is built without threads.
    for threads in ("-fopenmp", "-fopenmp-simd"):
        try:
            return ctypes.CDLL(str(_built(compiler, sources, (threads, *chosen))))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _built(compiler: str, sources: tuple[str, ...], chosen: tuple[str, ...]) -> Path:
    """Return the path of the library, building it if it is not there."""
    paths = [Path(__file__).with_name(name) for name in sources]
    parts = [
        *(source.read_bytes() for source in paths),
        *(text.encode() for text in (compiler, _processor(), *_FLAGS, *chosen)),
    ]
    folder = _cache()
    path = folder / f"{paths[0].stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if not path.is_file():
        # The library takes its place when it is whole: several processes may be building it.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made, built = Path(scratch, "made.o"), Path(scratch, "built.so")
            quiet = {"check": True, "capture_output": True, "timeout": _HANGS}
            subprocess.run([compiler, *_FLAGS, *chosen, "-c", str(paths[0]), "-o", str(made)], **quiet)  # type: ignore[call-overload]
            subprocess.run([compiler, "-shared", str(made), "-o", str(built)], **quiet)  # type: ignore[call-overload]
            built.replace(path)
    return path


_OP = Path(__file__).with_name("lif_op.cpp")
_OP_FLAGS = ["-O2", "-std=c++20", "-fvisibility=hidden", "-shared", "-fPIC"]


@functools.cache
def built_op() -> ModuleType | None:
    """Return the module of ``lif_op.cpp``; None where there is none yet, there cannot be, or the switch is off.

    Where it is missing it is built in the background, for the next process that asks.
    """
    try:
        path, command = _op_command()
        if not path.is_file() and not _is_busy(path):
            _build_op(path, command)
        return _imported(path) if path.is_file() else None
    except (OSError, subprocess.SubprocessError, ImportError):
        return None


def build_op() -> None:
    """Build the module of ``lif_op.cpp`` now, where it can be, before anybody asks for it."""
    try:
        path, command = _op_command()
        if not path.is_file() and not _is_busy(path):
            _build_op(path, command)
        while not path.is_file() and _is_busy(path):
            time.sleep(0.1)
    except (OSError, subprocess.SubprocessError):
        return


def _op_command() -> tuple[Path, list[str]]:
    """Return where the operation lies, and the command that makes it but for ``-o``; raise where it cannot be made."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if built_loops() is None or compiler is None or not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise FileNotFoundError("no compilers, or no headers of Python")
    home = Path(torch.__file__).parent
    includes = (home / "include", home / "include/torch/csrc/api/include", sysconfig.get_path("include"))
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-ltorch_python", "-lc10"]  # those that are loaded already
    interface = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = [*_OP_FLAGS, interface, *(f"-isystem{path}" for path in includes)]
    facts = os.stat(compiler)  # another compiler in its place may do what that one could not
    own = f"{compiler} {facts.st_size} {facts.st_mtime_ns}"
    parts = (_OP.read_text(), own, torch.__version__, EXTENSION_SUFFIXES[0], platform.machine(), *flags)
    name = f"lif_op-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:24]}.so"
    return _cache() / name, [compiler, *flags, str(_OP), *libraries]


def _is_busy(path: Path) -> bool:
    """Tell whether somebody is building it."""
    import fcntl  # there is none on Windows, where nothing is built

    try:
        with path.with_suffix(".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _build_op(path: Path, command: list[str]) -> None:
    """Start to build it in the background, unless a compiler has refused it; somebody else may be quicker."""
    if path.with_suffix(".failed").exists():
        return
    builder = [sys.executable, "-I", str(Path(__file__).with_name("op_builder.py"))]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    told = [*builder, str(path.with_suffix(".lock")), str(path), *command]
    subprocess.run(told, check=True, timeout=60, **quiet)  # type: ignore[call-overload]


def _imported(path: Path) -> ModuleType:
    loader = ExtensionFileLoader("spiking_rl._lif_op", str(path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


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
