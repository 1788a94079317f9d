"""spiking-rl: train, prune, evaluate, render and plot spiking agents."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sys
import warnings
from typing import NoReturn, Protocol, cast

import spiking_rl
from spiking_rl.allocator import keep_memory
from spiking_rl.errors import UserError, WorkError

COMMANDS = {
    "train": "train an agent, prune it to one timestep, score and film it",
    "prune": "continue a finished run to fewer timesteps",
    "evaluate": "score an agent, with spike rates, energy and latency",
    "exit": "score what deciding early, where the readout is clear, costs and saves",
    "render": "film episodes, optionally with the spikes beside the picture",
    "classify": "train, prune and score image classifiers on the same core",
    "export": "write an agent as a Stable-Baselines3 zip or an ONNX file",
    "inspect": "show what a checkpoint is made of, layer by layer",
    "plot": "draw learning curves and the continuum of timesteps",
    "report": "write one self-contained HTML page about a run",
    "list": "list recipes and networks",
}

_OWN = os.path.join(os.path.abspath(os.path.dirname(spiking_rl.__file__)), "")
_usual_format = warnings.formatwarning

USAGE = """usage: spiking-rl COMMAND ...

{commands}

  spiking-rl COMMAND --help    options of a command
  spiking-rl COMMAND --json    one JSON object on standard output, for scripts
  spiking-rl --version

example:
  spiking-rl train cartpole
  spiking-rl render runs/cartpole-seed0 --timesteps 1 --spikes"""


class Command(Protocol):
    """A module of this folder that serves one command."""

    def run(self, args: list[str]) -> object:
        """Do the job; return what ``--json`` prints."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed while working, 2 bad input, 130 interrupted."""
    keep_memory()  # here and not in run: a process that imports us decides for itself
    warnings.formatwarning = _format_warning
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=lines))
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"spiking-rl {spiking_rl.__version__}")
        return 0
    name, args = argv[0], argv[1:]
    if name not in COMMANDS:
        return _fail(f"command = {name!r}: unknown; choose one of {', '.join(COMMANDS)}", 2)
    as_json = "--json" in args
    module = {"list": "listing", "exit": "early_exit", "inspect": "inspection"}.get(
        name, name
    )  # names that Python has taken
    # `my_module:MyEnv-v0` means a module of the folder one stands in, as with `python -m`.
    sys.path.insert(0, os.getcwd())
    try:
        command = cast(Command, importlib.import_module(f"spiking_rl.scripts.{module}"))
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            result = command.run([a for a in args if a != "--json"])
        if as_json:
            print(json.dumps(result, allow_nan=False))
        return 0
    except WorkError as error:
        return _fail(f"{error}{_kept(name, args)}", 1)
    except UserError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail(f"interrupted{_kept(name, args)}", 130)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        if as_json:
            print(json.dumps({"stopped": True, "message": str(stopped)}))
        return stopped.code
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong, and nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (RuntimeError, MemoryError, EOFError) as error:
        text = _machine_message(error)
        if text is None:
            raise
        return _fail(f"{text}{_kept(name, args)}", 1)
    except OSError as error:
        return _fail(_disk_message(error, _trains(name, args)), 1)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return our own warnings in a line, for people; others as Python has them."""
    if os.path.abspath(filename).startswith(_OWN):
        return f"warning: {message}\n"
    return _usual_format(message, category, filename, lineno, line)


class Stopped(Exception):
    """A command ended early and says how to go on.

    Args:
        text: for the person.
        code: exit code.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def _fail(text: str, code: int) -> int:
    print(f"spiking-rl: {text}", file=sys.stderr)
    return code


def _trains(name: str, args: list[str]) -> bool:
    """Tell whether a command keeps a state from which ``--resume`` goes on."""
    return name in ("train", "prune") or (name == "classify" and args[:1] != ["evaluate"])


def _kept(name: str, args: list[str]) -> str:
    """Return what is left of a command that went wrong in the middle of its work."""
    return "; what was saved before is intact, --resume goes on from there" if _trains(name, args) else ""


def _machine_message(error: Exception) -> str | None:
    """Return in a line what went wrong outside of the program: memory, or a decoding process; None: neither."""
    said = " ".join(str(error).split())[:200]
    if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
        return f"memory = {said or 'none left'!r}: is too small for this; choose smaller batches (or --accumulate)"
    if isinstance(error, EOFError) or "DataLoader worker" in said:
        return f"workers = {said or 'a process'!r}: one that decodes images died, as for lack of memory; choose fewer"
    return None


def _disk_message(error: OSError, trains: bool) -> str:
    where = f" ({error.filename})" if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space" if full else "mend that"
    if trains:
        return f"{error.strerror or error}{where}: what was saved before is intact; {remedy}, then go on with --resume"
    return f"{error.strerror or error}{where}: {remedy} and try again"
