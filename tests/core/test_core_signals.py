"""Membrane traces and bars of action values: what is drawn is where the value says."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from spiking_rl.drawing import COLOURS, MARGIN, STEP, beside, fitted, font, rounded_range, stacked
from spiking_rl.signals import ActionBars, MembraneTraces

BLUE, ORANGE = COLOURS[:2]


def of_colour(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.int64]:
    """Return (row, column) of the pixels of exactly this colour."""
    return np.argwhere((picture == colour).all(-1))


def column_of(potentials: list[float], neurons: int = 1) -> NDArray[np.float64]:
    """Return potentials ``(T, K)``, the same for all neurons."""
    return np.tile(np.array(potentials)[:, None], neurons)


def silent(timesteps: int, neurons: int = 1) -> NDArray[np.float64]:
    return np.zeros((timesteps, neurons))


def test_a_trace_is_as_high_as_its_potential() -> None:
    rows = []
    for potential in (0.0, 0.5, 1.0, 1.2):
        traces = MembraneTraces(["layer1:0"], [BLUE])
        traces.push(column_of([potential] * traces.columns), silent(traces.columns))
        line = of_colour(traces.draw(), BLUE)
        assert np.ptp(line[:, 0]) <= 2, "constant, so level"
        assert np.ptp(line[:, 1]) >= (traces.columns - 1) * STEP, "over the whole width"
        rows.append(line[:, 0].mean())
    # The scale is the same for all four: equal steps of potential are equal steps in the picture.
    assert rows[0] > rows[1] > rows[2] > rows[3]
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=1.5)
    assert rows[2] - rows[3] == pytest.approx(0.4 * (rows[1] - rows[2]), abs=1.5)


def test_the_threshold_line_lies_at_one() -> None:
    traces = MembraneTraces(["layer1:0"], [BLUE])
    empty = traces.draw()
    traces.push(column_of([1.0] * 9), silent(9))
    line = of_colour(traces.draw(), BLUE)
    row = round(line[:, 0].mean())
    grey = empty[row - 2 : row + 3, MARGIN + 20].astype(int)
    assert (grey.sum(1) < 600).sum() == 1, "one thin line in the paper, where potentials are 1"


def test_a_trace_enters_at_the_right_and_moves_as_the_raster_does() -> None:
    traces = MembraneTraces(["layer1:0"], [BLUE])
    assert len(of_colour(traces.draw(), BLUE)) == 0
    traces.push(column_of([0.2, 0.2]), silent(2))
    first = of_colour(traces.draw(), BLUE)
    assert first[:, 1].max() == MARGIN + traces.columns * STEP - 1
    traces.push(column_of([np.nan] * 5), silent(5))  # no line
    assert (of_colour(traces.draw(), BLUE) - first).tolist() == [[0, -5 * STEP]] * len(first)


def test_a_spike_is_a_tick_above_the_line_of_its_neuron() -> None:
    traces = MembraneTraces(["layer1:0", "layer2:1"], [BLUE, ORANGE])
    potentials = column_of([0.1, 0.1, 0.1], 2)
    traces.push(potentials, silent(3, 2))
    before = traces.draw()
    traces = MembraneTraces(["layer1:0", "layer2:1"], [BLUE, ORANGE])
    traces.push(potentials, np.array([[0, 0], [0, 1], [0, 0]]))
    changed = np.argwhere((traces.draw() != before).any(-1))
    assert (traces.draw()[tuple(changed.T)] == ORANGE).all()
    left = MARGIN + (traces.columns - 2) * STEP
    assert changed[:, 1].min() == left, "at the timestep of the spike"
    assert changed[:, 1].max() < left + STEP
    assert changed[:, 0].max() < of_colour(before, ORANGE)[:, 0].min(), "above the line"
    assert changed[:, 0].min() > of_colour(before, BLUE)[:, 0].max(), "but not of the neuron above"


@pytest.mark.parametrize("fresh", [True, False])
def test_a_line_joins_decisions_unless_membranes_are_fresh(fresh: bool) -> None:
    traces = MembraneTraces(["layer1:0"], [BLUE])
    traces.push(column_of([0.0, 0.0]), silent(2), fresh)
    traces.push(column_of([1.2, 1.2]), silent(2), fresh)
    rows = np.unique(of_colour(traces.draw(), BLUE)[:, 0])
    assert (np.diff(rows).max() > 5) == fresh, "a gap in height between the two, or none"


def test_the_scale_of_a_trace_grows_and_stays() -> None:
    traces = MembraneTraces(["layer1:0", "layer1:1"], [BLUE, ORANGE])
    traces.push(column_of([0.5] * 3, 2), silent(3, 2))
    level = of_colour(traces.draw(), BLUE)[:, 0].mean(), of_colour(traces.draw(), ORANGE)[:, 0].mean()
    traces.push(np.array([[-6.0, 0.5]]), silent(1, 2))
    traces.push(column_of([0.5] * traces.columns, 2), silent(traces.columns, 2))
    after = of_colour(traces.draw(), BLUE)[:, 0].mean(), of_colour(traces.draw(), ORANGE)[:, 0].mean()
    assert after[0] < level[0] - 5, "what was seen low presses the line up, even when it has left"
    assert after[1] == level[1], "each neuron has a scale of its own"


@pytest.mark.parametrize("values", [[np.nan] * 3, [np.inf, -np.inf, 1.0], [1e30, -1e30, 0.0], [1e-30, 0.0, 0.0]])
def test_odd_numbers_can_be_drawn(values: list[float]) -> None:
    traces = MembraneTraces(["layer1:0"], [BLUE])
    traces.push(column_of(values), silent(3))
    assert traces.draw().shape == (traces.height, 360, 3)
    bars = ActionBars(["a", "b", "c"], 320)
    bars.push(np.array(values), 0)
    assert bars.draw().shape == (bars.height, 320, 3)


def ends(bars: ActionBars) -> tuple[list[int], int]:
    """Return where the bars end in x, and the index of the one in colour."""
    picture = bars.draw()
    found, taken = [], -1
    for i, top in enumerate(range(46 + 18, bars.height - 8, 21)):
        line = picture[top + 10]
        orange, grey = ((line == c).all(-1).nonzero()[0] for c in (ORANGE, (160, 174, 192)))
        assert not (len(orange) and len(grey))
        if len(orange):
            taken = i
        found.append(int(max([*orange, *grey])))
    return found, taken


def test_bars_are_as_long_as_values_are_high_and_the_action_taken_is_coloured() -> None:
    bars = ActionBars(["NOOP", "FIRE", "LEFT"], 400)
    bars.push(np.array([1.0, 3.0, 2.0]), 1)
    (first, second, third), taken = ends(bars)
    assert taken == 1
    assert third - first == pytest.approx(second - third, abs=2)
    assert second - first > 150
    bars.push(np.array([1.0, 3.0, 2.0]), 2)  # an action that is not the best is marked all the same
    assert ends(bars) == ([first, second, third], 2)


def test_the_scale_of_the_bars_grows_and_never_shrinks() -> None:
    bars = ActionBars(["0", "1"], 400)
    bars.push(np.array([70.0, 70.5]), 1)
    low, high = bars.scale
    assert low <= 70
    assert high >= 70.5
    assert high - low >= 4, "two close values do not fill the scale"
    bars.push(np.array([71.0, 71.2]), 1)
    assert bars.scale == (low, high)
    bars.push(np.array([20.0, 71.0]), 1)
    wide = bars.scale
    assert wide[0] <= 20
    bars.push(np.array([70.0, 70.5]), 1)
    assert bars.scale == wide


def test_a_number_stands_at_every_bar() -> None:
    bars = ActionBars(["0", "1"], 400)
    bars.push(np.array([1.0, 2.0]), 1)
    first = bars.draw()
    bars.push(np.array([1.0, 1.5]), 1)
    changed = np.argwhere((bars.draw() != first).any(-1))
    assert changed[:, 1].max() > 370
    assert changed[:, 0].min() > 46 + 18 + 21, "the first line is as it was"


def test_captions_are_written_above_and_cut_to_the_width() -> None:
    bars = ActionBars(["0", "1"], 320)
    without = bars.draw()
    changed = np.argwhere((bars.draw(["T = 1   return 12", "word " * 50, "a third is left out"]) != without).any(-1))
    assert len(changed) > 50
    assert changed[:, 0].max() < 46
    assert changed[:, 1].max() < 320 - MARGIN + 2


@pytest.mark.parametrize("actions", [1, 2, 6, 18, 24, 25, 4672])
def test_any_number_of_actions_can_be_drawn(actions: int) -> None:
    bars = ActionBars([f"ACTION{i}" for i in range(actions)], 320)
    bars.push(np.linspace(-1, 1, actions), actions - 1)
    picture = bars.draw(["one", "two"])
    assert picture.shape == (bars.height, 320, 3)
    assert bars.height < 460
    assert (picture[-4:] == picture[0, 0]).all(), "nothing is cut off at the bottom"
    line = 21 if actions <= 8 else 14
    inked = (picture[46 + 18 :, MARGIN : MARGIN + 40] < 120).all(-1).any(1)
    lines = [inked[k * line : (k + 1) * line].any() for k in range(min(actions, 24))]
    assert all(lines), "a name for each that is shown"


def test_a_long_name_is_cut() -> None:
    assert fitted("LEFT", 100, 13) == "LEFT"
    cut = fitted("DOWNRIGHTFIRE" * 3, 100, 13)
    assert cut.endswith("...")
    assert 60 < font(13).getlength(cut) <= 100


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1.2, (0, 1.2)), (-0.9, 1.9, (-1, 2)), (61, 73, (60, 74)), (-31, 47, (-40, 60)), (0.101, 0.109, (0.1, 0.11))],
)
def test_a_range_is_rounded_outwards(low: float, high: float, expected: tuple[float, float]) -> None:
    assert rounded_range(low, high) == pytest.approx(expected)


def test_pictures_are_put_together_on_paper() -> None:
    red = np.full((4, 6, 3), (255, 0, 0), dtype=np.uint8)
    blue = np.full((3, 2, 3), (0, 0, 255), dtype=np.uint8)
    wide = beside(red, blue)
    assert wide.shape == (4, 8, 3)
    assert (wide[:, :6] == red).all()
    assert (wide[:3, 6:] == blue).all()
    assert (wide[3, 6:] > 240).all()
    high = stacked(red, blue)
    assert high.shape == (7, 6, 3)
    assert (high[4:, 2:4] == blue).all()
    assert (high[4:, :2] > 240).all()
