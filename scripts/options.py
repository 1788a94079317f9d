"""How the commands read their arguments: typed dataclasses through tyro."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import dropwhile, takewhile
from operator import or_
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from spiking_rl.errors import UserError
from spiking_rl.runs import RunFolder

T = TypeVar("T")

AsTheRun = Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: as the run has it)")]
"""Type of a flag whose value, where it is not given, is a run's own (:func:`parse_over_run`)."""


_REGISTRY = ConstructorRegistry()
_PLAIN = {
    "invalid literal for int() with base 10:": "a whole number is wanted, not",
    "could not convert string to float:": "a number is wanted, not",
}


@_REGISTRY.primitive_rule
def _or_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """Show an option that may be left out as ``PATH (default: none)``; its text says what ``none`` means."""
    kinds = get_args(info.type)
    if NoneType not in kinds:
        return None
    given = reduce(or_, [kind for kind in kinds if kind is not NoneType])
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(given, info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec

    def read(words: list[str]) -> Any:
        return None if [word.lower() for word in words] == ["none"] else spec.instance_from_str(words)

    choices = None if spec.choices is None else ("none", *spec.choices)
    return PrimitiveConstructorSpec(
        nargs=(1, spec.nargs) if isinstance(spec.nargs, int) and spec.nargs != 1 else spec.nargs,
        metavar=spec.metavar if choices is None else "{" + ",".join(choices) + "}",
        instance_from_str=read,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["none"] if value is None else spec.str_from_instance(value),
        choices=choices,
    )


def parse(kind: type[T], command: str, args: list[str], description: str, default: T | None = None) -> T:
    """Parse arguments into a dataclass; a mistake exits with 2 and says what is allowed.

    Args:
        kind: a dataclass whose field docstrings are the help.
        command: such as ``train CartPole-v1``, for the usage line.
        args: what follows the command.
        description: what the command does, with an example.
        default: values of the options that are not given.
    """
    name = f"spiking-rl {command}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, prog=name, args=args, description=description, registry=_REGISTRY)
            return tyro.cli(kind, prog=name, args=args, description=description, default=default, registry=_REGISTRY)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UserError("arguments", " ".join(args), f"{_first_sentence(said.getvalue())}; see --help") from None


def parse_over_run(kind: type[T], command: str, args: list[str], description: str, own: Callable[[], T]) -> T:
    """Parse arguments over values that a run has; ``--help`` is shown whatever the run.

    Args:
        kind: as for :func:`parse`.
        command: likewise.
        args: likewise.
        description: likewise.
        own: reads the values of the options that are not given.

    Raises:
        UserError: of ``own``, or a mistake in the arguments.
    """
    if asks_help(args) or "--help-all" in args:
        return parse(kind, command, ["--help"], description)
    return parse(kind, command, args, description, own())


def parse_settings(kind: type[T], main: type[Any], recipe: Any, command: str, args: list[str], description: str) -> T:
    """Parse arguments over a recipe's values; ``--help`` shows the main settings, ``--help-all`` every one.

    Args:
        kind: all options, a dataclass with the recipe's fields among them.
        main: those that the short help shows.
        recipe: the values where nothing is given, a dataclass.
        command: as for :func:`parse`.
        args: likewise.
        description: likewise.
    """
    if asks_help(args):
        own = {field.name for field in dataclasses.fields(recipe)}
        shown = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(main) if f.name in own}
        parse(main, command, ["--help"], description, main(**shown))
    everything = ["--help" if arg == "--help-all" else arg for arg in args]
    return parse(kind, command, everything, description, kind(**dataclasses.asdict(recipe)))


def _first_sentence(box: str) -> str:
    """Return the message, which may be broken into lines, out of the frame that the parser draws around it.

    With the option that it takes to be meant, if any.
    """
    lines = [line.strip("│╭╮╰╯─ \t") for line in box.splitlines()]
    words = list(takewhile(bool, dropwhile(lambda line: not line, lines[1:])))
    hints = dropwhile(lambda line: not line.startswith("Perhaps"), lines)
    meant = next(([word.strip(",") for word in line.split()] for line in hints if line.startswith("-")), None)
    off = " --no-" in " ".join(words)
    hint = f"; did you mean {next((w for w in meant if w.startswith('--no-') == off), meant[0])}?" if meant else ""
    message = " ".join(words).rstrip(".")
    for python, plain in _PLAIN.items():
        message = message.replace(python, plain)
    return message + hint if message else "cannot be understood"


def changes_of(
    folder: RunFolder, saved: Any, asked: Any, args: list[str], always: Sequence[str], free: Sequence[str]
) -> dict[str, Any]:
    """Return which settings a resumed run is to change; it keeps most: refuse a flag that says otherwise.

    Args:
        folder: of the run.
        saved: its settings, a dataclass.
        asked: the settings of the same kind that the command line comes to.
        args: of the command line: what stands there counts.
        always: names of settings that count wherever they stand.
        free: those that may change.

    Raises:
        UserError: naming the setting.
    """
    found = {}
    given = _given(args)
    for field in dataclasses.fields(asked):
        value, own = getattr(asked, field.name), getattr(saved, field.name)
        if field.name not in given.union(always) or value == own:
            continue
        if field.name in free:
            found[field.name] = value
        else:
            remedy = "keep to that to go on with it, or start another run"
            raise UserError(field.name, value, f"the run in {folder.path} was started with {own!r}; {remedy}")
    return found


def kept_instead(saved: Any, asked: Any, args: list[str]) -> list[str]:
    """Return the settings in which a resumed run differs from the recipe that the command line names.

    They are no mistake, as most of them are those of the command that began the run.

    Args:
        saved: as for :func:`changes_of`.
        asked: likewise.
        args: likewise.
    """
    given = _given(args)
    if "recipe" not in given:
        return []
    names = [field.name for field in dataclasses.fields(asked) if field.name not in given]
    return [name for name in names if getattr(asked, name) != getattr(saved, name)]


def _given(args: list[str]) -> set[str]:
    """Return the names of the settings that a command line has flags for."""
    flags = {arg.split("=")[0].removeprefix("--").replace("_", "-") for arg in args if arg.startswith("--")}
    return {flag.removeprefix("no-").replace("-", "_") for flag in flags}


def told(saved: Any, changes: dict[str, Any]) -> str:
    """Return in words what a run goes on with instead of the settings it has."""
    return "from here: " + ", ".join(f"{name} {value}, was {getattr(saved, name)}" for name, value in changes.items())


def script(main: Callable[[], None]) -> None:
    """Run a script that is no command; a mistake is told in one line and exits with 2."""
    try:
        main()
    except UserError as error:
        print(f"spiking-rl: {error}", file=sys.stderr)
        sys.exit(2)


def asks_help(args: Sequence[str]) -> bool:
    """Tell whether help is asked for: then nothing else that is wrong is told."""
    return not {"-h", "--help"}.isdisjoint(args)


def first_argument(args: list[str], field: str, what: str) -> tuple[str | None, list[str]]:
    """Split off the positional argument that every command begins with.

    Returns:
        It and the rest; None where help is asked for instead.

    Raises:
        UserError: it is missing.
    """
    if args and args[0] in ("-h", "--help", "--help-all"):
        return None, args
    if not args or args[0].startswith("-"):
        raise UserError(field, args[0] if args else None, f"name {what} first, before any option")
    return args[0], args[1:]
