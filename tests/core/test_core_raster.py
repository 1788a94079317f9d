"""The spike raster: a spike is a coloured dot that enters at the right and moves left."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from spiking_rl.raster import SpikeRaster


def dots(raster: SpikeRaster) -> NDArray[np.int64]:
    """Return (row, column) of the coloured pixels: text, boxes and paper are grey or nearly so."""
    picture = raster.draw().astype(int)
    return np.argwhere(picture.max(-1) - picture.min(-1) > 60)


def spikes_at(neuron: int | None, neurons: int, timesteps: int = 1) -> NDArray[np.float32]:
    """Return ``(T, N)`` in which one neuron, or none, fires at the last timestep."""
    spikes = np.zeros((timesteps, neurons), dtype=np.float32)
    if neuron is not None:
        spikes[-1, neuron] = 1
    return spikes


def test_a_picture_has_the_size_asked_for() -> None:
    raster = SpikeRaster({"layer1": 16, "layer2": 16}, height=300, width=200)
    picture = raster.draw()
    assert picture.shape == (300, 200, 3)
    assert picture.dtype == np.uint8
    assert len(dots(raster)) == 0


def test_a_spike_enters_at_the_right_and_scrolls_out_at_the_left() -> None:
    raster = SpikeRaster({"layer1": 8}, height=200)
    raster.push("layer1", spikes_at(None, 8, 3))
    assert len(dots(raster)) == 0
    raster.push("layer1", spikes_at(3, 8))
    first = dots(raster)
    tall, wide = np.ptp(first, axis=0) + 1
    assert len(first) == tall * wide, "one dot"
    assert tall >= 2
    assert wide % 2 == 0, "videos keep colours at half the resolution"
    assert first[:, 1].max() > 300, "at the right edge of a picture 360 wide"
    raster.push("layer1", spikes_at(None, 8, 5))
    assert (dots(raster) - first).tolist() == [[0, -5 * wide]] * len(first), "five timesteps to the left"
    raster.push("layer1", spikes_at(None, 8, raster.columns - 6))
    assert len(dots(raster)) == len(first), "in the last column"
    raster.push("layer1", spikes_at(None, 8))
    assert len(dots(raster)) == 0


def test_timesteps_of_one_decision_run_to_the_right() -> None:
    raster = SpikeRaster({"layer1": 4}, height=200)
    raster.push("layer1", np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))
    rows, columns = dots(raster).T
    tops = [rows[columns == c].min() for c in sorted(set(columns))]
    assert tops == sorted(tops)
    assert len(set(tops)) == 3, "one row per neuron, the first on top"


def test_more_timesteps_than_columns_leave_the_latest() -> None:
    raster = SpikeRaster({"layer1": 4}, height=200)
    raster.push("layer1", spikes_at(2, 4, 10 * raster.columns))
    assert len(dots(raster)) > 0
    raster.push("layer1", np.vstack([spikes_at(2, 4), np.zeros((raster.columns, 4))]))
    assert len(dots(raster)) == 0


def test_layers_have_a_place_and_a_colour_of_their_own() -> None:
    raster = SpikeRaster({"layer1": 8, "layer2": 8}, height=300)
    raster.push("layer1", spikes_at(0, 8))
    upper, above = dots(raster), raster.draw()
    raster.push("layer1", spikes_at(None, 8, raster.columns))
    raster.push("layer2", spikes_at(0, 8))
    lower, below = dots(raster), raster.draw()
    assert lower[:, 0].min() > upper[:, 0].max()
    assert tuple(above[tuple(upper[0])]) != tuple(below[tuple(lower[0])])


def test_a_large_layer_shows_the_first_and_the_last_neuron() -> None:
    raster = SpikeRaster({"layer1": 5000}, height=200)
    for neuron in (0, 4999):
        raster.push("layer1", spikes_at(neuron, 5000))
    rows = dots(raster)[:, 0]
    assert rows.max() - rows.min() > 60
    assert rows.max() < 200


@pytest.mark.parametrize("neurons", [1, 3, 256])
@pytest.mark.parametrize("layers", [1, 2, 6])
@pytest.mark.parametrize("height", [84, 400])
def test_any_layers_and_height_can_be_drawn(neurons: int, layers: int, height: int) -> None:
    names = [f"layer{i}" for i in range(layers)]
    raster = SpikeRaster(dict.fromkeys(names, neurons), height)
    for name in names:
        raster.push(name, np.ones((2, neurons)))
    assert raster.draw().shape == (height, 360, 3)


@pytest.mark.parametrize("layers", [1, 2, 4, 6])
@pytest.mark.parametrize("height", [400, 420])
def test_the_last_layer_ends_above_the_edge(layers: int, height: int) -> None:
    names = [f"layer{i}" for i in range(layers)]
    raster = SpikeRaster(dict.fromkeys(names, 500), height)
    for name in names:
        raster.push(name, np.ones((1, 500)))
    picture = raster.draw()
    assert (picture[-4:] == picture[0, 0]).all(), "nothing but paper"
    assert dots(raster)[:, 0].max() > height - 40, "and not much of it"


def test_the_label_tells_the_rate() -> None:
    raster = SpikeRaster({"layer1": 4}, height=200)
    raster.push("layer1", spikes_at(None, 4, 2))
    silent = raster.draw()
    raster.push("layer1", spikes_at(1, 4, 2))
    raster.push("layer1", spikes_at(None, 4, raster.columns))
    assert np.array_equal(raster.draw(), silent), "the rate is that of the latest decision"
    raster.push("layer1", np.ones((1, 4)))
    assert (raster.draw()[:70, :300] != silent[:70, :300]).any()
