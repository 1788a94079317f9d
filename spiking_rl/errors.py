"""The one error that a user is meant to read."""

from __future__ import annotations

from collections.abc import Mapping

_LONGEST_VALUE, _LONGEST_PROBLEM = 300, 1200  # characters: what a stranger put into a file must not fill the screen


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 20]} ... {text[-14:]}"


class UserError(ValueError):
    """Input that cannot work, told as: the field, the value seen, the remedy.

    The command line prints it as one line and exits with 2. Library users may catch it as a
    ``ValueError``.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        super().__init__(
            f"{field} = {_shortened(repr(value), _LONGEST_VALUE)}: {_shortened(problem, _LONGEST_PROBLEM)}"
        )

    def renamed(self, names: Mapping[str, str]) -> UserError:
        """Return the same error of the field as its caller calls it; ``names`` has those that are called otherwise."""
        return type(self)(names.get(self.field, self.field), self.value, self.problem)

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str]]:
        """Let it travel between processes, as from a worker that reads data."""
        return type(self), (self.field, self.value, self.problem)


class WorkError(UserError):
    """Something went wrong while the work was under way; what had been saved before is intact."""
