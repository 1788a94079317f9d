"""Settings as typed dataclasses, from and to YAML, with their checks of names and types."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from spiking_rl.errors import UserError
from spiking_rl.files import read_bounded, write_atomically
from spiking_rl.provenance import commit, today

T = TypeVar("T")

_MAX_BYTES = 64 * 2**10  # of a file of settings; ours have 2,000, and YAML is read slowly


class _Loader(yaml.SafeLoader):
    """Reads plain values alone: an alias, repeated within itself, makes gigabytes out of ten lines."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which settings do not need")
        return super().compose_node(parent, index)


def settings_from_dict(kind: type[T], values: dict[str, Any], origin: str) -> T:
    """Build a dataclass of settings from plain values (YAML, JSON), refusing unknown names and wrong types.

    Raises:
        UserError: naming the field and where it came from.
    """
    hints = get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    made = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise UserError(str(name), value, f"unknown setting in {origin}; {hint}")
        made[name] = _typed(name, value, hints[name], origin)
    return kind(**made)


def _typed(name: str, value: Any, hint: Any, origin: str) -> Any:
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise UserError(name, value, f"must be one of {', '.join(map(repr, get_args(hint)))} in {origin}")
    if get_origin(hint) is UnionType:  # an optional value
        return None if value is None else _typed(name, value, get_args(hint)[0], origin)
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        if isinstance(value, (list, tuple)) and all(type(v) is kind or (kind is float and _is_whole(v)) for v in value):
            return tuple(kind(v) for v in value)
        what = {float: "numbers", int: "whole numbers", str: "names"}[kind]
        raise UserError(name, value, f"must be a list of {what} in {origin}")
    if hint is float and _is_whole(value):
        return float(value)
    if type(value) is hint:
        return value
    raise UserError(name, value, f"must be of type {hint.__name__} in {origin}")


def _is_whole(value: Any) -> bool:
    """Tell whether this is an integer that a float can hold."""
    return type(value) is int and abs(value) < 2**1000


def read_yaml(text: str, origin: str) -> dict[str, Any]:
    """Return the settings that a YAML text holds.

    Raises:
        UserError: no YAML, or no settings by name.
    """
    try:
        loaded = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # A value with a tag that it does not fit, such as `!!bool maybe`, raises what Python raises.
        raise UserError("config", origin, f"is not valid YAML: {' '.join(str(error).split())[:150]}") from None
    if not isinstance(loaded, dict):
        raise UserError("config", origin, "does not hold settings by name")
    return loaded


def recipes_of(package: str) -> dict[str, dict[str, Any]]:
    """Return the settings in a package's folder ``recipes``, by name; they are the caller's own.

    Raises:
        UserError: one is damaged.
    """
    return copy.deepcopy(_read_recipes(package))


@functools.cache  # a package stays as it is, and reading them takes a tenth of a second
def _read_recipes(package: str) -> dict[str, dict[str, Any]]:
    found = {}
    for entry in resources.files(package).joinpath("recipes").iterdir():
        if entry.name.endswith(".yaml"):
            name = entry.name.removesuffix(".yaml")
            found[name] = read_yaml(entry.read_text(), f"recipe {name}")
    return found


def save_settings(path: Path, values: dict[str, Any]) -> None:
    """Write settings as YAML, tuples as lists, in their order."""
    plain = {name: _plain(value) for name, value in values.items()}
    write_atomically(path, yaml.safe_dump(plain, sort_keys=False))


def read_settings(path: Path) -> dict[str, Any]:
    """Read a file of settings as it is.

    Raises:
        UserError: missing, too large, or damaged.
    """
    try:
        text = read_bounded(path, _MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("run", str(path.parent), f"holds no readable config.yaml ({error})") from None
    return read_yaml(text, str(path))


def changed_settings(settings: T, changes: Mapping[str, Any], allowed: Sequence[str], run: str) -> T:
    """Return a run's settings with some changed, types checked.

    Args:
        settings: a dataclass.
        changes: new values by setting.
        allowed: settings that may change.
        run: named in the error.

    Raises:
        UserError: naming a setting that may not change, or is of another type.
    """
    for name, value in changes.items():
        if name not in allowed:
            raise UserError(name, value, f"cannot change in a run under way; {', '.join(allowed)} can")
    values = {**dataclasses.asdict(settings), **changes}  # type: ignore[call-overload]
    return settings_from_dict(type(settings), values, f"the changes of {run}")


def continued(path: Path, settings: Any, when: str) -> dict[str, Any]:
    """Return the provenance of a run that goes on with other settings: that of its start, and what has changed.

    Args:
        path: of its config.yaml, as it is.
        settings: the new ones, a dataclass.
        when: how far the run is.

    Returns:
        As in the file, ``changes`` with a line more for each setting that is another: its values, how far the run was,
        day and commit.
    """
    values = read_settings(path)
    past = values.get("provenance")
    made: dict[str, Any] = past if isinstance(past, dict) else {}
    told = made.get("changes")
    kept = [line for line in told if isinstance(line, str)] if isinstance(told, list) else []
    new = {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}
    own = f"{today()}, commit {(commit() or 'unknown')[:10]}"
    lines = [f"{n}: {values[n]} to {new[n]}, {when}; {own}" for n in new if n in values and values[n] != new[n]]
    return {**made, "changes": [*kept, *lines]}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_settings(path: Path) -> dict[str, Any]:
    """Read the settings of a run, without its provenance.

    Raises:
        UserError: missing or damaged.
    """
    values = read_settings(path)
    values.pop("provenance", None)
    return values
