"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Input that cannot work, told as: the field, the value seen, the remedy.

    The command line prints it as one line and exits with 2. Library users may catch it as a
    ``ValueError``.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        super().__init__(f"{field} = {value!r}: {problem}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, object, str]]:
        """Let it travel between processes, as from a worker that reads data."""
        return type(self), (self.field, self.value, self.problem)
