"""Figures: they can be saved, and show what the rows say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spiking_rl.plotting import (
    accuracy_curve,
    continuum,
    learning_curve,
    learning_curves,
    mean_and_band,
    save_figure,
)


def progress(
    agent_steps: int, timesteps: int | None, score: float, train_return: float | None = None
) -> dict[str, Any]:
    return {"agent_steps": agent_steps, "timesteps": timesteps, "score": score, "train_return": train_return}


CURVE = [
    progress(1000, 3, 20.0),
    progress(2000, 3, 150.0, 60.0),
    progress(3000, 2, 180.0, 100.0),
    progress(4000, 1, 500.0, 300.0),
]


LATER = [progress(1500, 3, 100.0), progress(2500, 2, 265.0), progress(5000, 1, 400.0)]


def result(timesteps: int | None, mean: float, rate: float = 0.1, ratio: float = 4.0) -> dict[str, Any]:
    rates = {"layer1": rate, "layer2": 3 * rate}
    return {"timesteps": timesteps, "mean_return": mean, "ci95": 5.0, "spike_rate": rates, "energy_ratio": ratio}


RESULTS = [result(3, 480.0), result(2, 470.0), result(1, 490.0)]


def texts(axes: Any) -> list[str]:
    return [t.get_text() for t in axes.texts]


FIGURES = {
    "one run": lambda: learning_curve(CURVE, "CartPole-v1"),
    "one run, one row": lambda: learning_curve(CURVE[:1]),
    "two runs": lambda: learning_curves({"pqn": [CURVE], "dqn": [CURVE[:2]]}),
    "a title and a long name": lambda: learning_curves({"n" * 60: [CURVE], "dqn": [CURVE[:2]]}, "CartPole-v1"),
    "seven runs": lambda: learning_curves({f"run{i}": [CURVE] for i in range(7)}),
    "two seeds of an algorithm": lambda: learning_curves({"pqn, 2 seeds": [CURVE, LATER]}),
    "seeds with nothing in common": lambda: learning_curves({"pqn": [CURVE[:1], CURVE[2:]]}),
    "no rows at all": lambda: learning_curves({"pqn": [[], []]}),
    "relu run": lambda: learning_curve([progress(1000, None, 20.0), progress(2000, None, 30.0)]),
    "run of no rows": lambda: learning_curve([]),
    "classifier": lambda: accuracy_curve([progress(0, None, 80.0), progress(0, 2, 79.0), progress(0, 1, 78.0)]),
    "classifier of no rows": lambda: accuracy_curve([]),
    "accuracies": lambda: continuum([{**result(t, 0.0), "top1": 90.0 - t} for t in (3, 2, 1)]),
    "continuum": lambda: continuum(RESULTS, "CartPole-v1"),
    "with control": lambda: continuum([*RESULTS, result(None, 450.0)]),
    "two seeds": lambda: continuum([*RESULTS, *RESULTS]),
    "one T": lambda: continuum(RESULTS[:1]),
    "negative": lambda: continuum([result(t, -90.0 - t) for t in (3, 2, 1)]),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_figures_are_saved(tmp_path: Path, figure: str) -> None:
    made = FIGURES[figure]()
    save_figure(made, tmp_path / "figures" / "a.png")
    save_figure(made, tmp_path / "figures" / "a.svg")
    picture = np.asarray(Image.open(io.BytesIO((tmp_path / "figures" / "a.png").read_bytes())).convert("L"))
    assert picture.shape[0] > 300
    assert picture.std() > 1, "an empty picture"
    assert "<svg" in (tmp_path / "figures" / "a.svg").read_text()
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["a.png", "a.svg"]


def test_the_curve_shows_scores_and_stages() -> None:
    (axes,) = learning_curve(CURVE, "CartPole-v1").axes
    greedy, training = axes.lines[:2]
    assert greedy.get_xydata().tolist() == [[1000, 20], [2000, 150], [3000, 180], [4000, 500]]
    assert training.get_xydata().tolist() == [[2000, 60], [3000, 100], [4000, 300]], "None is left out"
    assert texts(axes) == ["T=3", "T=2", "T=1"]
    assert [line.get_xdata()[0] for line in axes.lines[2:]] == [2000, 3000]
    assert axes.get_title(loc="left") == "CartPole-v1"
    assert axes.get_xlabel() == "agent steps"


def test_curves_of_several_runs_have_names_and_colours_of_their_own() -> None:
    (axes,) = learning_curves({"seed0": [CURVE], "seed1": [CURVE[:2]]}).axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["seed0", "seed1"]
    assert len({line.get_color() for line in axes.lines}) == 2
    assert texts(axes) == []
    assert axes.get_title(loc="left") == ""


def test_more_curves_than_colours_differ_by_their_dashes() -> None:
    (axes,) = learning_curves({f"run{i}": [CURVE] for i in range(12)}).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12


def test_seeds_make_one_line_in_a_band_where_all_have_data() -> None:
    x, mean, low, high = mean_and_band([[(r["agent_steps"], r["score"]) for r in rows] for rows in (CURVE, LATER)])
    # From LATER's first evaluation to CURVE's last one; by hand: CURVE at 1500 is half way from 20 to 150.
    assert x == [1500, 2000, 2500, 3000, 4000]
    assert low == pytest.approx([85, 150, 165, 180, 346])
    assert high == pytest.approx([100, 182.5, 265, 292, 500])
    assert mean == pytest.approx([92.5, 166.25, 215, 236, 423])
    assert mean_and_band([[(0, 1.0), (1, 1.0)], [(2, 1.0), (3, 1.0)]])[0] == []
    (axes,) = learning_curves({"pqn": [CURVE, LATER]}).axes
    (line,) = axes.lines
    assert line.get_xdata().tolist() == x  # type: ignore[union-attr]
    assert line.get_ydata().tolist() == mean  # type: ignore[union-attr]
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).y1 == pytest.approx(500)


def test_classifiers_are_drawn_against_all_their_epochs() -> None:
    """Every stage counts its epochs anew."""
    rows = [{"epoch": e, "timesteps": t, "score": 80.0 + t, "seconds": 60.0} for t in (2, 1) for e in (1, 2)]
    epochs, minutes = learning_curves({"vgg9": [rows], "vgg16": [rows[:2]]}, minutes=True).axes
    assert epochs.lines[0].get_xdata().tolist() == [1, 2, 3, 4]  # type: ignore[union-attr]
    assert epochs.lines[1].get_xdata().tolist() == [1, 2]  # type: ignore[union-attr]
    assert (epochs.get_xlabel(), epochs.get_ylabel()) == ("epochs", "validation accuracy (%)")
    assert minutes.get_xlabel() == "minutes of training"


def test_minutes_are_drawn_where_all_runs_know_them() -> None:
    timed = [{**row, "seconds": 60.0 * i} for i, row in enumerate(CURVE)]
    steps, minutes = learning_curves({"pqn": [timed]}, minutes=True).axes
    assert minutes.lines[0].get_xdata().tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert steps.lines[0].get_xdata().tolist() == [1000, 2000, 3000, 4000]  # type: ignore[union-attr]
    assert len(learning_curves({"pqn": [timed], "dqn": [CURVE]}, minutes=True).axes) == 1


def test_the_continuum_shows_return_rate_and_energy() -> None:
    figure = continuum([*RESULTS, result(None, 450.0)])
    first, second, third = (a.lines[0].get_ydata() for a in figure.axes)
    assert list(first) == [480, 470, 490], "from high T to low"
    assert list(second) == pytest.approx([0.2, 0.2, 0.2]), "mean over layers"
    assert list(third) == [4, 4, 4]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["3", "2", "1"]
    assert "ReLU network" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert figure.axes[0].lines[-1].get_ydata()[0] == 450


@pytest.mark.parametrize("ratio", [0.01, 0.85, 1.0, 30.0])
def test_the_line_of_the_relu_network_is_on_the_picture(ratio: float) -> None:
    energy = continuum([result(1, 400.0, ratio=ratio), result(2, 400.0, ratio=0.9 * ratio)]).axes[2]
    assert energy.lines[-1].get_ydata()[0] == 1
    assert energy.get_ylim()[0] == 0
    assert energy.get_ylim()[1] >= max(ratio, 1.1)


def test_the_continuum_takes_the_mean_over_seeds() -> None:
    figure = continuum([result(1, 400.0), result(1, 500.0)])
    assert list(figure.axes[0].lines[0].get_ydata()) == [450]
    assert figure.axes[0].collections[0].get_offsets()[:, 1].tolist() == [400, 500]


def test_methods_of_the_continuum_have_their_own_marks() -> None:
    rows = [{**r, "method": "rescaled"} for r in RESULTS] + [{**result(1, 300.0), "method": "one-leak"}]
    axes = continuum(rows).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines[:1]] == [[480, 470, 490]]
    assert axes.collections[-1].get_offsets()[:, 1].tolist() == [300]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["pruned, leaks follow T", "one leak per layer"]
    alone = continuum([{**result(1, 300.0), "method": "direct"}]).axes[0]
    assert list(alone.lines[0].get_ydata()) == [300]


@pytest.mark.parametrize("means", [[480, 470, 490], [-21, -5, 18], [-90, -110, -80], [0, 0, 0]], ids=str)
def test_every_point_lies_inside_the_axes(means: list[float]) -> None:
    axes = continuum([result(t, float(m)) for t, m in zip((3, 2, 1), means, strict=True)]).axes[0]
    low, high = axes.get_ylim()
    assert low < high, "higher is better must read upwards"
    assert all(low <= m <= high for m in means)


def test_accuracies_are_drawn_as_such() -> None:
    rows = [{**result(t, 0.0), "top1": top1} for t, top1 in ((2, 88.0), (1, 87.0), (None, 90.0))]
    axes = continuum(rows).axes[0]
    assert axes.get_ylabel() == "test accuracy (%)"
    assert axes.lines[0].get_ydata().tolist() == [88.0, 87.0]  # type: ignore[union-attr]
    low, high = axes.get_ylim()
    assert 80 < low < 87
    assert 90 < high <= 100
    rows = [progress(0, None, 80.0), progress(0, None, 81.0), {**progress(0, 2, 78.0), "on_rates": 1.0}]
    curve = accuracy_curve([*rows, {**progress(0, 2, 79.0), "on_rates": 0.0}]).axes[0]
    assert texts(curve) == ["ReLU", "rates", "T=2"]
    assert curve.lines[0].get_ydata().tolist() == [80.0, 81.0, 78.0, 79.0]  # type: ignore[union-attr]


@pytest.mark.parametrize("title", ["\x00", "\u5b66\u7fd2"], ids=["control", "script"])
def test_a_title_that_the_font_cannot_write_is_no_warning(title: str, tmp_path: Path) -> None:
    save_figure(learning_curves({"pqn": [CURVE]}, title), tmp_path / "figure.png")  # a warning would be an error here
    assert (tmp_path / "figure.png").stat().st_size > 1000
