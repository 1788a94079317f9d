"""Temporal pruning as a state machine: what it decides, and that it can be put down and taken up."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spiking_rl import Done, Next, Stay, TemporalPruning, UserError
from spiking_rl.pruning import check_pruning

NAN = float("nan")
SCORES = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.just(NAN), st.floats(allow_infinity=False)), min_size=1, max_size=40
)


def test_a_full_walk_from_five_to_one() -> None:
    pruning = TemporalPruning(5, 1, first_budget=100, stage_budget=10)
    assert (pruning.timesteps, pruning.budget, pruning.checkpoint) == (5, 100, "T5")
    assert pruning.report(3.0, 10) == Stay(True)
    assert pruning.report(2.0, 99.9) == Stay(False)
    assert pruning.report(4.0, 100) == Next(4, "T5", improved=True)
    assert (pruning.timesteps, pruning.budget, pruning.checkpoint) == (4, 10, "T4")
    # Every stage is judged by its own scores: 1 is the first and best of T=4.
    assert pruning.report(1.0, 5) == Stay(True)
    assert pruning.report(0.5, 10) == Next(3, "T4", improved=False)
    assert pruning.report(0.5, 11) == Next(2, "T3", improved=True)
    assert pruning.report(-7.0, 10) == Next(1, "T2", improved=True)
    assert pruning.report(-8.0, 1) == Stay(True)
    assert not pruning.finished
    assert pruning.report(9.0, 10) == Done(True)
    assert pruning.finished
    assert [(s.timesteps, s.best, s.last, s.reports) for s in pruning.stages] == [
        (5, 4.0, 4.0, 3),
        (4, 1.0, 0.5, 2),
        (3, 0.5, 0.5, 1),
        (2, -7.0, -7.0, 1),
        (1, 9.0, 9.0, 2),
    ]
    with pytest.raises(RuntimeError, match="finished"):
        pruning.report(1.0, 1)


def test_a_stage_ends_early_once_its_goal_is_reached_often_enough() -> None:
    pruning = TemporalPruning(3, 1, 100, 100, goal=500, goal_reports=2)
    assert pruning.report(500.0, 1) == Stay(True)
    assert pruning.report(499.9, 2) == Stay(False), "the goal must be reached in a row"
    assert pruning.report(500.0, 3) == Stay(True)
    pruning = TemporalPruning.from_state_dict(json.loads(json.dumps(pruning.state_dict())))
    assert pruning.report(501.0, 4) == Next(2, "T3", improved=True)
    assert pruning.report(500.0, 1) == Stay(True), "each stage counts for itself"
    assert pruning.report(NAN, 2) == Stay(False)
    assert pruning.report(1.0, 100) == Next(1, "T2", improved=False), "a budget ends a stage without it"
    assert [pruning.report(600.0, spent) for spent in (1, 2)] == [Stay(True), Done(True)]
    for goal_reports in (0, -1):
        with pytest.raises(UserError, match="goal_reports"):
            TemporalPruning(2, 1, 10, 10, goal=1.0, goal_reports=goal_reports)


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor])
def test_numbers_of_numpy_and_torch_are_saved(kind: Any) -> None:
    pruning = TemporalPruning(np.int64(3), np.int32(1), np.int64(2), np.float32(1), last_budget=np.float64(1))
    pruning.report(kind(0.5), np.int64(1))
    assert isinstance(pruning.report(kind(0.25), np.int64(2)), Next)
    state = json.loads(json.dumps(pruning.state_dict()))
    assert state == pruning.state_dict()
    again = TemporalPruning.from_state_dict(pruning.state_dict())
    assert (again.stages, again.start, again.budget) == (pruning.stages, 3, 1)
    assert (again.stages[0].best, again.stages[0].last) == (0.5, 0.25)


def test_start_equal_to_stop_is_one_stage() -> None:
    pruning = TemporalPruning(2, 2, 10, 10)
    assert pruning.report(1.0, 9) == Stay(True)
    assert pruning.report(0.0, 10) == Done(False)


def test_the_later_of_two_equal_scores_wins() -> None:
    pruning = TemporalPruning(2, 1, 10, 10)
    assert [pruning.report(s, 1).improved for s in (500.0, 500.0, 499.9, 500.0)] == [True, True, False, True]


def test_nan_never_improves() -> None:
    pruning = TemporalPruning(2, 1, 10, 10)
    assert [pruning.report(s, 1).improved for s in (NAN, -1e9, NAN, -1e9)] == [False, True, False, True]
    assert pruning.stages[0].best == -1e9
    assert pruning.report(NAN, 10) == Next(1, "T2", improved=False)


def test_a_stage_without_a_usable_score_cannot_end() -> None:
    pruning = TemporalPruning(2, 1, 10, 10)
    pruning.report(NAN, 5)
    with pytest.raises(RuntimeError, match=r"T=2.*NaN"):
        pruning.report(NAN, 10)
    assert pruning.timesteps == 2


@given(scores=SCORES, start=st.integers(1, 5), data=st.data())
def test_saved_at_any_point_it_decides_the_same(scores: list[float], start: int, data: st.DataObject) -> None:
    stop = data.draw(st.integers(1, start))
    kept = TemporalPruning(start, stop, first_budget=3, stage_budget=2)
    spent = 0
    for score in scores:
        spent += 1
        resumed = TemporalPruning.from_state_dict(json.loads(json.dumps(kept.state_dict())))
        assert (resumed.timesteps, resumed.budget, resumed.checkpoint) == (kept.timesteps, kept.budget, kept.checkpoint)
        decision, error = answer(kept, score, spent)
        assert answer(resumed, score, spent) == (decision, error)
        assert json.dumps(resumed.state_dict()) == json.dumps(kept.state_dict())
        if isinstance(decision, Next):
            spent = 0
        if isinstance(decision, Done):
            resumed = TemporalPruning.from_state_dict(json.loads(json.dumps(kept.state_dict())))
            assert resumed.finished
            assert answer(resumed, score, spent) == answer(kept, score, spent), "finished is finished"
            assert stop == 1 or resumed.extend(stop - 1) == kept.extend(stop - 1)
        if isinstance(decision, Done) or error:
            break


def answer(pruning: TemporalPruning, score: float, spent: float) -> tuple[Any, str | None]:
    try:
        return pruning.report(score, spent), None
    except RuntimeError as error:
        return None, str(error)


@given(scores=SCORES, reports_per_stage=st.integers(1, 4))
def test_improved_means_no_earlier_score_of_the_stage_was_higher(scores: list[float], reports_per_stage: int) -> None:
    pruning = TemporalPruning(4, 1, reports_per_stage, reports_per_stage)
    stage: list[float] = []
    for score in scores:
        usable = [s for s in stage if not math.isnan(s)]
        before = pruning.timesteps
        decision, error = answer(pruning, score, len(stage) + 1)
        stage.append(score)
        if error:
            assert all(math.isnan(s) for s in stage)
            return
        assert decision.improved == (not math.isnan(score) and all(score >= s for s in usable))
        assert isinstance(decision, Stay) == (len(stage) < reports_per_stage)
        if isinstance(decision, Next):
            assert (decision.timesteps, decision.checkpoint) == (before - 1, f"T{before}")
            stage = []
        if isinstance(decision, Done):
            assert before == 1
            return


def test_a_finished_run_is_extended_downwards() -> None:
    pruning = TemporalPruning(4, 3, 10, 5)
    with pytest.raises(RuntimeError, match="under way"):
        pruning.extend(1)
    pruning.report(1.0, 10)
    assert pruning.report(2.0, 5) == Done(True)
    for stop in (3, 4):
        with pytest.raises(UserError, match="T=3"):
            pruning.extend(stop)
    assert pruning.finished, "a refused extension changes nothing"
    assert pruning.extend(1) == Next(2, "T3", improved=False)
    pruning = TemporalPruning.from_state_dict(json.loads(json.dumps(pruning.state_dict())))
    assert (pruning.timesteps, pruning.budget, pruning.stop) == (2, 5, 1)
    assert pruning.report(0.0, 5) == Next(1, "T2", improved=True)
    assert pruning.report(0.0, 5) == Done(True)
    with pytest.raises(UserError):
        pruning.extend(0)


@pytest.mark.parametrize(
    ("start", "stop", "field"),
    [
        *[(start, 1, "timesteps") for start in (0, -2, True, 2.0, "5", None)],
        *[(5, stop, "prune_to") for stop in (0, -1, True, 1.0, "1", None, 6)],
    ],
)
def test_impossible_ranges_are_refused(start: Any, stop: Any, field: str) -> None:
    for refuse in (lambda: check_pruning(start, stop), lambda: TemporalPruning(start, stop, 10, 10)):
        with pytest.raises(UserError) as caught:
            refuse()
        assert caught.value.field == field
        assert repr(start if field == "timesteps" else stop) in str(caught.value)


def test_a_possible_range_is_accepted() -> None:
    for start, stop in ((1, 1), (5, 1), (5, 5)):
        check_pruning(start, stop)


def test_the_last_stage_may_have_a_budget_of_its_own() -> None:
    pruning = TemporalPruning(3, 1, first_budget=7, stage_budget=2, last_budget=5)
    seen, remaining = [], []
    while not pruning.finished:
        seen.append((pruning.timesteps, pruning.budget))
        remaining.append(pruning.remaining)
        pruning.report(0.0, pruning.budget)
        pruning = TemporalPruning.from_state_dict(json.loads(json.dumps(pruning.state_dict())))
    assert seen == [(3, 7), (2, 2), (1, 5)]
    assert remaining == [14, 7, 5]
    alone = TemporalPruning(1, 1, first_budget=7, stage_budget=2, last_budget=5)
    assert (alone.budget, alone.remaining) == (7, 7), "the only stage is the first"


@pytest.mark.parametrize(("budget", "expected"), [(None, [2, 5]), (3.0, [3, 3])])
def test_an_extension_keeps_the_budgets_or_sets_one_for_all(budget: float | None, expected: list[float]) -> None:
    pruning = TemporalPruning(3, 3, first_budget=7, stage_budget=2, last_budget=5)
    pruning.report(0.0, 7)
    pruning.extend(1, budget)
    seen = []
    while not pruning.finished:
        seen.append(pruning.budget)
        pruning.report(0.0, pruning.budget)
    assert seen == expected


@pytest.mark.parametrize("budget", [0.0, -1.0, NAN, float("inf")])
def test_an_extension_with_no_budget_is_refused_before_anything_changes(budget: float) -> None:
    pruning = TemporalPruning(2, 2, first_budget=7, stage_budget=2)
    pruning.report(0.0, 7)
    before = pruning.state_dict()
    with pytest.raises(UserError, match="positive and finite"):
        pruning.extend(1, budget)
    assert pruning.state_dict() == before


@pytest.mark.parametrize("field", ["first_budget", "stage_budget", "last_budget"])
@pytest.mark.parametrize("budget", [0, -1, NAN, float("inf")])
def test_budgets_must_be_positive(field: str, budget: float) -> None:
    budgets = {"first_budget": 10.0, "stage_budget": 10.0, field: budget}
    with pytest.raises(UserError, match="must be positive") as caught:
        TemporalPruning(5, 1, **budgets)
    assert caught.value.field == field


def test_budgets_change_while_pruning_is_under_way() -> None:
    pruning = TemporalPruning(3, 1, first_budget=7, stage_budget=2, last_budget=5)
    pruning.report(0.0, 4)
    pruning.change_budgets(4, {"first_budget": 5, "stage_budget": 3, "last_budget": None})
    assert pruning.budget == 5
    assert isinstance(pruning.report(0.0, 5), Next)
    pruning.change_budgets(0, {"stage_budget": 4, "last_budget": 6})
    seen = []
    while not pruning.finished:
        seen.append((pruning.timesteps, pruning.budget))
        pruning.report(0.0, pruning.budget)
        pruning = TemporalPruning.from_state_dict(json.loads(json.dumps(pruning.state_dict())))
    assert seen == [(2, 4), (1, 6)]
    with pytest.raises(RuntimeError, match="finished"):
        pruning.change_budgets(0, {"stage_budget": 5})


@pytest.mark.parametrize(
    ("stages", "budgets", "field", "words"),
    [
        (0, {"first_budget": 4}, "first_budget", r"T=3 has spent 4 already"),
        (0, {"first_budget": 0}, "first_budget", "positive and finite"),
        (0, {"stage_budget": float("inf")}, "stage_budget", "positive and finite"),
        (0, {"last_budget": NAN}, "last_budget", "positive and finite"),
        (1, {"first_budget": 8}, "first_budget", "no stage is left that it is for; keep 7"),
        (1, {"stage_budget": 4}, "stage_budget", r"T=2 has spent 4 already"),
        (2, {"last_budget": 3}, "last_budget", r"T=1 has spent 4 already"),
        (2, {"stage_budget": 3}, "stage_budget", r"T=1 has spent 4 already"),
        (2, {"last_budget": 6, "stage_budget": 9, "first_budget": 9}, "stage_budget", "no stage is left"),
    ],
)
def test_budgets_that_cannot_be_change_nothing(
    stages: int, budgets: dict[str, float | None], field: str, words: str
) -> None:
    pruning = TemporalPruning(3, 1, first_budget=7, stage_budget=5)
    for _ in range(stages):
        pruning.report(0.0, 7)
    before = pruning.state_dict()
    with pytest.raises(UserError, match=words) as caught:
        pruning.change_budgets(4, budgets)
    assert caught.value.field == field
    assert pruning.state_dict() == before


def test_a_budget_that_no_stage_has_cannot_change() -> None:
    pruning = TemporalPruning(2, 1, first_budget=7, stage_budget=5, last_budget=3)
    with pytest.raises(UserError, match="no stage is left that it is for; keep 5"):
        pruning.change_budgets(0, {"stage_budget": 6})
    pruning.change_budgets(0, {"stage_budget": 6, "last_budget": None})
    pruning.report(0.0, 7)
    assert pruning.budget == 6
    alone = TemporalPruning(1, 1, first_budget=7, stage_budget=5)
    with pytest.raises(UserError, match="no stage is left") as caught:
        alone.change_budgets(0, {"last_budget": 3})
    assert caught.value.field == "last_budget"


def test_a_state_that_is_finished_before_its_end_is_none() -> None:
    pruning = TemporalPruning(5, 3, 10, 5)
    state = {**pruning.state_dict(), "finished": True}
    with pytest.raises(ValueError, match="not finished at T = 5, above 3"):
        TemporalPruning.from_state_dict(state)


def test_nothing_remains_when_all_is_done() -> None:
    pruning = TemporalPruning(2, 1, 10, 5)
    assert pruning.remaining == 15
    pruning.report(1.0, 10)
    assert (pruning.timesteps, pruning.remaining) == (1, 5)
    pruning.report(1.0, 5)
    assert pruning.finished
    assert pruning.remaining == 0
