"""Disasters in the middle of a classifier's training, as tests/agents/test_disasters.py has them for agents."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_core_vision_training import CPU, SMALL, dataset, new_run

from spiking_rl import load_checkpoint
from spiking_rl.errors import WorkError
from spiking_rl.neurons import LIF
from spiking_rl.runs import RunFolder
from spiking_rl.vision.training import Trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    new_run(path).run()
    return path


def assert_ends_alike(whole: Path, run: Path) -> None:
    trainer = Trainer(SMALL, RunFolder(run), dataset(), CPU)
    trainer.restore()
    trainer.run()
    for name in ("relu", "T2", "T1", "T1-end"):
        expected, got = (load_checkpoint(path / "checkpoints" / name).tensors for path in (whole, run))
        assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_the_same_seed_is_the_same_classifier(whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    torch.rand(100)
    new_run(tmp_path / "run").run()
    assert_ends_alike(whole, tmp_path / "run")
    new_run(tmp_path / "other", replace(SMALL, seed=1)).run()
    expected, other = (load_checkpoint(path / "checkpoints" / "T1").tensors for path in (whole, tmp_path / "other"))
    assert any(not torch.equal(expected[key], other[key]) for key in expected)


def strike_first_threshold(trainer: Trainer, value: float) -> None:
    """Set the first threshold before the second spiking epoch."""
    epoch = trainer._epoch

    def struck() -> None:
        neuron = trainer.network.neurons[0]
        if trainer.stages.spiking and trainer.batches and isinstance(neuron, LIF):
            with torch.no_grad():
                neuron.threshold.fill_(value)
        epoch()

    trainer._epoch = struck  # type: ignore[method-assign]


def test_a_threshold_that_is_no_number_is_named(whole: Path, tmp_path: Path) -> None:
    trainer = new_run(tmp_path / "run")
    score = trainer._score

    def spoiled() -> tuple[float, dict[str, float]]:
        if trainer.stages.spiking:
            with torch.no_grad():
                trainer.network.get_parameter("neurons.0.threshold").fill_(torch.nan)
        return score()

    trainer._score = spoiled  # type: ignore[method-assign]
    with pytest.raises(WorkError) as caught:
        trainer.run()
    assert "threshold of layer1" in str(caught.value)
    assert_ends_alike(whole, tmp_path / "run")


def test_a_layer_that_fell_silent_is_told_by_name(tmp_path: Path) -> None:
    trainer, said = new_run(tmp_path / "run"), []
    trainer.record.note = said.append
    strike_first_threshold(trainer, 1e6)
    trainer.run()
    assert any("layer1 has fallen silent" in line for line in said)
    assert any("layer1's threshold has exploded" in line for line in said)


@pytest.mark.parametrize(("percentile", "told"), [(1.0, True), (99.0, False)])
def test_a_threshold_at_its_floor_is_told_before_training(
    whole: Path, tmp_path: Path, percentile: float, told: bool
) -> None:
    # The first percentile of a current is far below zero, where no threshold can be.
    config = replace(SMALL, start_from=str(whole), firing_rate=None, percentile=percentile, calibration_timesteps=8)
    said: list[str] = []
    Trainer(config, RunFolder(tmp_path / "run"), dataset(), CPU, note=said.append)
    warnings = [line for line in said if "layer1's threshold is at its floor, 0.001" in line]
    assert bool(warnings) is told
    assert all("--percentile" in line for line in warnings)


@pytest.mark.skipif(os.name != "posix", reason="limits file sizes through POSIX")
@pytest.mark.parametrize("room", [0, 20_000])
def test_a_disk_that_is_full_in_the_middle_of_a_save(whole: Path, tmp_path: Path, room: int) -> None:
    import resource

    trainer = new_run(tmp_path / "run")
    save, (soft, hard) = trainer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def failing() -> None:
        if trainer.stages.spiking and trainer.batches:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        save()

    trainer.save = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(OSError, match="File too large"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert_ends_alike(whole, tmp_path / "run")
