"""Commands that start at once: forked from a process that holds what they import of other packages.

Importing torch takes seconds, and the tests run a hundred commands. Each is a process of its own as ever and imports
this project itself; only what it needs of others is there already. Needs :func:`os.fork`, as Linux has it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

_HELD = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "stable_baselines3",
    "ale_py",
    "tyro",
    "imageio",
    "pyarrow.parquet",
    "onnx",
)
_MESSAGE = 1 << 17  # bytes


class Forker:
    """Runs ``python -m MODULE ARGUMENTS`` as :func:`subprocess.run` does, without the wait for imports."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        timeout: float,
        cwd: Path | None = None,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.CompletedProcess[str]:
        """Run a module, with ``more`` in its environment, and return what it printed and its exit code.

        Raises:
            subprocess.TimeoutExpired: it was killed after ``timeout`` seconds.
        """
        command = [module, *arguments]
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            message = {"command": command, "cwd": str(cwd or Path.cwd()), "environment": dict(os.environ, **more)}
            socket.send_fds(self._socket, [json.dumps(message).encode()], [out.fileno(), err.fileno()])
            pid = int(self._socket.recv(_MESSAGE))
            self._socket.settimeout(timeout)
            try:
                code = int(self._socket.recv(_MESSAGE))
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self._socket.settimeout(None)
                self._socket.recv(_MESSAGE)
                raise subprocess.TimeoutExpired(command, timeout) from None
            finally:
                self._socket.settimeout(None)
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, code, out.read(), err.read())

    def close(self) -> None:
        """End the process that waits for commands."""
        self._socket.close()
        self._process.wait()


def _next_command(connection: socket.socket) -> list[str]:
    """Fork for every message and tell the child's number, then its exit code; in the child return what it is to run."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE, 2)
        if not message:
            sys.exit()  # nobody is left to ask
        child = os.fork()
        if child == 0:
            told = json.loads(message)
            for standard, descriptor in enumerate(descriptors, start=1):
                os.dup2(descriptor, standard)
            os.environ.update(told["environment"])
            os.chdir(told["cwd"])
            command: list[str] = told["command"]
        for descriptor in descriptors:
            os.close(descriptor)
        if child == 0:
            connection.close()
            return command
        connection.send(str(child).encode())
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


if __name__ == "__main__":
    for name in _HELD:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    gc.freeze()  # what is held stays: no child need look through it
    sys.argv = _next_command(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = os.getcwd()  # as -m has it
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
