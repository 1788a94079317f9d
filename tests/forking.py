"""Commands that start at once: forked from a process that holds what they import of other packages.

Importing torch takes seconds, and the tests run a hundred commands. Each is a process of its own as ever and imports
this project itself; only what it needs of others is there already. It ends when threads and exit functions are done,
without taking modules apart: files left open are not written out, and what dies in there is not seen. Needs
:func:`os.fork`, as Linux has it.
"""

from __future__ import annotations

import atexit
import compileall
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

_HELD = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "stable_baselines3",
    "ale_py",
    "gymnasium.wrappers",
    "tyro",
    "yaml",
    "filelock",
    "safetensors.torch",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "PIL.PngImagePlugin",
    "imageio_ffmpeg",
    "pyarrow.parquet",
    "onnx",
)
_PACKAGE = Path(__file__).parents[1] / "spiking_rl"
_NUMBER = 64  # bytes of a message: a number in digits
_STARTS = 120.0  # seconds that the imports may take


class Forker:
    """Runs ``python -m MODULE ARGUMENTS`` as :func:`subprocess.run` does, without the wait for imports.

    Args:
        environment: variables of the process that imports.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._start()

    def _start(self) -> None:
        self._compiled = tempfile.TemporaryDirectory()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno()), self._compiled.name]
            self._process = subprocess.Popen(command, env=self._environment, pass_fds=[theirs.fileno()])

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        timeout: float,
        environment: Mapping[str, str],
        cwd: Path | None = None,
        file_size: int | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a module and return what it printed, and its exit code.

        Files may grow to ``file_size`` bytes: as on a disk that is full, writing more fails.

        Raises:
            subprocess.TimeoutExpired: it was killed after ``timeout`` seconds.
            RuntimeError: the process that imports died.
        """
        command = [module, *arguments]
        file = partial(tempfile.TemporaryFile, "w+")
        with file() as told, file() as out, file() as err:
            wanted = {"command": command, "cwd": str(cwd or Path.cwd()), "environment": dict(environment)}
            json.dump({**wanted, "file_size": file_size}, told)
            told.flush()
            code = self._forked(command, [told.fileno(), out.fileno(), err.fileno()], timeout)
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, code, out.read(), err.read())

    def _forked(self, command: list[str], descriptors: list[int], timeout: float) -> int:
        child = 0
        try:
            socket.send_fds(self._socket, [b"fork"], descriptors)
            child = self._number(_STARTS)
            return self._number(timeout)
        except BaseException as error:
            # Whatever it was, an interrupt too: nothing of this command may be taken for an answer to the next.
            if child > 0:
                with contextlib.suppress(OSError, RuntimeError):
                    os.kill(child, signal.SIGKILL)
                    self._number(10)  # its parent has seen the end of it
            self._process.kill()
            self.close()
            self._start()
            if isinstance(error, TimeoutError):
                raise subprocess.TimeoutExpired(command, timeout) from None
            raise

    def _number(self, timeout: float) -> int:
        self._socket.settimeout(timeout)
        said = self._socket.recv(_NUMBER)
        if not said:
            raise RuntimeError("the process that commands are forked from died")
        return int(said)

    def close(self) -> None:
        """End the process that waits for commands."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._compiled.cleanup()


def _next_command(connection: socket.socket) -> list[str]:
    """Fork for every message and tell the child's number, then its exit code; in the child return what it is to run."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _NUMBER, 3)
        if not message:
            sys.exit()  # nobody is left to ask
        child = os.fork()
        if child == 0:
            connection.close()
            return _become(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(str(child).encode())
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


def _become(told: int, out: int, err: int) -> list[str]:
    """Make of the forked child what a fresh process would be, and return its command."""
    import numpy as np

    with open(told) as file:
        file.seek(0)
        wanted = json.load(file)
    for standard, descriptor in ((1, out), (2, err)):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["cwd"])
    if wanted["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["file_size"], wanted["file_size"]))
    np.random.seed()  # or every command had the same chance
    command: list[str] = wanted["command"]
    return command


def _run(module: str) -> int:
    """Run a module as ``python -m`` does and return its exit code, its threads and exit functions done."""
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        code = stopped.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # waits for threads, and ends those of pools
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0) & 0xFF


if __name__ == "__main__":
    for name in _HELD:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    gc.freeze()  # what is held stays: no child need look through it
    # Compiled once, also where Python is told to leave no such files beside the sources. Children write none: on a
    # full disk they would leave halves, and a source rewritten within a second would pass for its predecessor.
    sys.pycache_prefix = sys.argv[2]
    for folder in ("", "agents", "envs", "scripts"):  # links lead to these, which are not followed
        compileall.compile_dir(_PACKAGE / folder, quiet=2)
    sys.dont_write_bytecode = True
    sys.argv = _next_command(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = os.getcwd()  # as -m has it
    # Taking all modules apart again would take as long as most commands.
    os._exit(_run(sys.argv[0]))
