"""Temporal pruning: lower the number of timesteps step by step while training goes on.

    train at T = start; for T = start-1 ... stop:
        load the best checkpoint of the stage above, fresh optimiser, fine-tune at T, keep the best

The object here only decides. It knows nothing of agents or classifiers: whoever trains reports
scores and does as told.

Source: Chowdhury, Rathi, Roy, ECCV 2022.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

from spiking_rl.errors import UserError

MAX_TIMESTEPS = 10_000
"""Most timesteps of a decision: far beyond any use, so that no file can ask for an endless loop."""


@dataclass(frozen=True)
class Stay:
    """Go on training at this number of timesteps.

    Attributes:
        improved: the reported weights are the best of the stage: keep them.
    """

    improved: bool


@dataclass(frozen=True)
class Next:
    """This stage is over: load ``checkpoint``, start a fresh optimiser, train at ``timesteps``.

    Attributes:
        timesteps: T of the stage to begin.
        checkpoint: name of the best checkpoint of the stage above.
        improved: the reported weights are the best of the finished stage: keep them first.
    """

    timesteps: int
    checkpoint: str
    improved: bool


@dataclass(frozen=True)
class Done:
    """The last stage is over.

    Attributes:
        improved: the reported weights are the best of the stage: keep them.
    """

    improved: bool


Decision = Stay | Next | Done


@dataclass
class StageRecord:
    """Scores of one stage.

    Attributes:
        timesteps: T of the stage.
        best: highest score reported, None before the first report.
        last: most recent score, None if it was NaN.
        reports: number of scores reported.
        at_goal: how many of the latest scores in a row reached the goal.
    """

    timesteps: int
    best: float | None = None
    last: float | None = None
    reports: int = 0
    at_goal: int = 0


def check_pruning(start: int, stop: int) -> None:
    """Refuse a range of timesteps that cannot be pruned through.

    Raises:
        UserError: naming ``timesteps`` or ``prune_to``.
    """
    for field, value in (("timesteps", start), ("prune_to", stop)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise UserError(field, value, "must be a whole number of at least 1")
        if value > MAX_TIMESTEPS:
            raise UserError(field, value, f"must be at most {MAX_TIMESTEPS}")
    if stop > start:
        raise UserError("prune_to", stop, f"is above timesteps = {start}; pruning only lowers T, choose 1 to {start}")


def _plain(budget: float) -> float:
    """Return a number of NumPy's or torch's as Python's own, whole where it is whole: it is saved as JSON."""
    return int(budget) if isinstance(budget, Integral) else float(budget)


class TemporalPruning:
    """A resumable state machine: ``report(score, spent)`` until it answers :class:`Done`.

    Args:
        start: timesteps T of the first stage.
        stop: timesteps of the last stage, 1 <= stop <= start.
        first_budget: what the first stage may spend, in the caller's unit (agent steps, epochs).
        stage_budget: what each later stage may spend.
        goal: a stage ends early once ``goal_reports`` scores in a row reach it; None: never.
        goal_reports: see there.
        last_budget: what the stage at ``stop`` may spend, where it is not the first; None: as every later stage.

    Raises:
        UserError: stop above start, or a number that is not positive, or a budget without an end.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        first_budget: float,
        stage_budget: float,
        goal: float | None = None,
        goal_reports: int = 3,
        last_budget: float | None = None,
    ) -> None:
        check_pruning(start, stop)
        if isinstance(goal_reports, bool) or not hasattr(goal_reports, "__index__") or goal_reports < 1:
            raise UserError("goal_reports", goal_reports, "must be a whole number of at least 1")
        if goal is not None and math.isnan(goal):
            raise UserError("goal", goal, "must be a score to reach, or None")
        budgets = {"first_budget": first_budget, "stage_budget": stage_budget, "last_budget": last_budget}
        for field, value in budgets.items():
            if value is not None and not 0 < value < float("inf"):
                raise UserError(field, value, "must be positive and finite")
        self.start = int(start)
        self.stop = int(stop)
        self.set_budgets(first_budget, stage_budget, last_budget)
        self.goal = None if goal is None else float(goal)
        self.goal_reports = int(goal_reports)
        self.finished = False
        self.stages = [StageRecord(self.start)]

    @property
    def timesteps(self) -> int:
        """T of the current stage."""
        return self.stages[-1].timesteps

    @property
    def budget(self) -> float:
        """What the current stage may spend."""
        return self._budget_at(self.timesteps)

    @property
    def remaining(self) -> float:
        """What the current stage and those after it may spend; 0 once all is done."""
        return 0 if self.finished else sum(map(self._budget_at, range(self.stop, self.timesteps + 1)))

    def _budget_at(self, timesteps: int) -> float:
        """Return what a stage may spend."""
        budget: float = getattr(self, self._field(timesteps))
        return budget

    def _field(self, timesteps: int) -> str:
        """Return the name of the budget that a stage has."""
        if timesteps == self.start:
            return "first_budget"
        return "last_budget" if timesteps == self.stop and self.last_budget is not None else "stage_budget"

    @property
    def checkpoint(self) -> str:
        """Name under which the best weights of the current stage are kept."""
        return f"T{self.timesteps}"

    def report(self, score: float, spent: float) -> Decision:
        """Take a validation score of the current weights and decide what comes next.

        Args:
            score: higher is better. A later score equal to the best replaces it: where scores
                saturate, the weights trained longer are the better guess. NaN never improves.
            spent: what the current stage has spent so far, in the unit of the budgets.

        Raises:
            UserError: ``spent`` is NaN.
            RuntimeError: pruning is finished already.
        """
        if math.isnan(spent):
            raise UserError("spent", spent, "must be what the stage has spent so far")
        if self.finished:
            raise RuntimeError("pruning is finished; call extend(stop) to lower T further")
        stage = self.stages[-1]
        score = float(score)  # a mean of NumPy's or torch's too: it is saved as JSON
        improved = not math.isnan(score) and (stage.best is None or score >= stage.best)
        if improved:
            stage.best = score
        stage.last = None if math.isnan(score) else score
        stage.reports += 1
        stage.at_goal = stage.at_goal + 1 if self.goal is not None and score >= self.goal else 0
        if spent < self.budget and stage.at_goal < self.goal_reports:
            return Stay(improved)
        if stage.best is None:
            raise RuntimeError(f"no usable score at T={stage.timesteps}: every report was NaN")
        if stage.timesteps == self.stop:
            self.finished = True
            return Done(improved)
        checkpoint = self.checkpoint
        self.stages.append(StageRecord(stage.timesteps - 1))
        return Next(self.timesteps, checkpoint, improved)

    def change_budgets(self, spent: float, budgets: Mapping[str, float | None]) -> None:
        """Give the stage under way and those to come other budgets than they began with.

        Args:
            spent: what the current stage has spent so far; 0 where it has not begun.
            budgets: new values of ``first_budget``, ``stage_budget`` and ``last_budget``, as for the constructor; the
                others stay.

        Raises:
            UserError: naming the budget: no stage is left that has it, the stage under way has spent as much, or it is
                not positive and finite.
            RuntimeError: pruning is finished.
        """
        if self.finished:
            raise RuntimeError("pruning is finished; call extend(stop) to lower T further")
        for field, value in budgets.items():
            if value is None and field != "last_budget":
                raise UserError(field, value, "must be a number; only last_budget can be left out")
            if value is not None and not 0 < value < float("inf"):
                raise UserError(field, value, "must be positive and finite")
        before = {field: getattr(self, field) for field in ("first_budget", "stage_budget", "last_budget")}
        had = self._budgets_left
        self.set_budgets(**{**before, **budgets})
        have = self._budgets_left
        idle = [field for field, value in budgets.items() if field not in (had if value is None else have)]
        own, budget = self._field(self.timesteps), self.budget
        if not idle and budget > spent:
            return
        self.set_budgets(**before)
        if idle:
            raise UserError(idle[0], budgets[idle[0]], f"no stage is left that it is for; keep {before[idle[0]]}")
        told = f"{spent:.4g}" if spent % 1 else f"{spent:.0f}"
        raise UserError(own, budget, f"the stage at T={self.timesteps} has spent {told} already; choose more")

    def set_budgets(self, first_budget: float, stage_budget: float, last_budget: float | None) -> None:
        """Set all three without a look at what is spent: where a saved pruning goes on with its caller's settings."""
        self.first_budget, self.stage_budget = _plain(first_budget), _plain(stage_budget)
        self.last_budget = None if last_budget is None else _plain(last_budget)

    @property
    def _budgets_left(self) -> set[str]:
        """Names of the budgets of the current stage and those to come."""
        return {self._field(timesteps) for timesteps in range(self.stop, self.timesteps + 1)}

    def extend(self, stop: int, stage_budget: float | None = None) -> Next:
        """Continue a finished pruning downwards to ``stop``.

        Args:
            stop: timesteps of the new last stage.
            stage_budget: what every further stage may spend, the last one too; None: as before.

        Raises:
            UserError: stop is not below the T reached, or a budget that is not positive and finite.
            RuntimeError: pruning is not finished yet.
        """
        if not self.finished:
            raise RuntimeError("pruning is still under way")
        check_pruning(self.start, stop)
        if stage_budget is not None and not 0 < stage_budget < float("inf"):
            raise UserError("stage_budget", stage_budget, "must be positive and finite")
        if stop >= self.timesteps:
            raise UserError("to", stop, f"the run is at T={self.timesteps} already; choose a smaller number")
        if stage_budget is not None:
            self.stage_budget, self.last_budget = _plain(stage_budget), None
        self.stop = int(stop)
        self.finished = False
        checkpoint = self.checkpoint
        self.stages.append(StageRecord(self.timesteps - 1))
        return Next(self.timesteps, checkpoint, False)

    @classmethod
    def trained(
        cls, timesteps: int, stage_budget: float, goal: float | None = None, last_budget: float | None = None
    ) -> TemporalPruning:
        """Return a finished machine for a network that was trained at ``timesteps`` elsewhere.

        Call :meth:`extend` to prune it; each stage may spend ``stage_budget`` (the last one ``last_budget``,
        where it is given), or end at ``goal``.
        """
        made = cls(timesteps, timesteps, stage_budget, stage_budget, goal, last_budget=last_budget)
        made.finished = True
        return made

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on, as JSON-serialisable values."""
        return {
            "start": self.start,
            "stop": self.stop,
            "first_budget": self.first_budget,
            "stage_budget": self.stage_budget,
            "goal": self.goal,
            "goal_reports": self.goal_reports,
            "last_budget": self.last_budget,
            "finished": self.finished,
            "stages": [asdict(s) for s in self.stages],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> TemporalPruning:
        """Rebuild from :meth:`state_dict`.

        Raises:
            KeyError: something is missing.
            TypeError: something is of another kind, or unknown.
            ValueError: a number cannot be.
        """
        names = ("start", "stop", "first_budget", "stage_budget", "goal", "goal_reports")
        made = cls(**{name: state[name] for name in names}, last_budget=state.get("last_budget"))
        made.finished = bool(state["finished"])
        made.stages = [StageRecord(**s) for s in state["stages"]]
        reached = [stage.timesteps for stage in made.stages]
        if (
            not reached
            or reached != [made.start - k for k in range(len(reached))]
            or not made.stop <= made.timesteps <= made.start
        ):
            raise ValueError(f"stages at T = {reached} do not lead from {made.start} to {made.stop}")
        if made.finished and made.timesteps != made.stop:
            raise ValueError(f"it is not finished at T = {made.timesteps}, above {made.stop}")
        scores = [made.goal, *(score for stage in made.stages for score in (stage.best, stage.last))]
        if not all(score is None or type(score) in (int, float) for score in scores):
            raise TypeError("a score is no number")
        counts = [made.goal_reports, *(n for s in made.stages for n in (s.timesteps, s.reports, s.at_goal))]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError("a count is no whole number")
        if not max(made.first_budget, made.stage_budget, made.last_budget or 0) < float("inf"):
            raise ValueError("a budget has no end")
        return made
