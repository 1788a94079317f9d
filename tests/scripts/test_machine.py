"""What goes wrong with the machine, or with what is asked for, is told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli, write_shades

from spiking_rl.agents.building import resolve_device
from spiking_rl.errors import UserError
from spiking_rl.scripts import main


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory = "),
        (torch.OutOfMemoryError("CUDA out of memory."), "memory = "),
        (MemoryError(), "memory = 'none left'"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "workers = "),
        (EOFError(), "workers = "),
    ],
)
def test_a_machine_that_is_too_small(
    error: Exception, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(args: list[str]) -> None:
        raise error

    monkeypatch.setattr("spiking_rl.scripts.classify.run", fails)
    assert main.run(["classify", "train", "vgg6", "cifar10"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert told in said
    assert "--resume" in said


@pytest.mark.parametrize(("name", "goes_on"), [("classify", True), ("listing", False)])
def test_ctrl_c_outside_of_training_says_how_to_go_on(
    name: str, goes_on: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_interrupted(args: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"spiking_rl.scripts.{name}.run", is_interrupted)
    assert main.run(["classify", "train"] if goes_on else ["list"]) == 130
    assert ("--resume" in capsys.readouterr().err) is goes_on


def test_warnings_of_ours_are_a_line() -> None:
    ours = (main.__file__, "warning: rates are low\n")
    for file, told in (ours, ("/usr/lib/other.py", "/usr/lib/other.py:7: UserWarning: rates are low\n")):
        assert main._format_warning("rates are low", UserWarning, file, 7) == told


def test_an_error_of_ours_is_not_taken_for_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(args: list[str]) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("spiking_rl.scripts.listing.run", fails)
    with pytest.raises(RuntimeError, match="a fault"):
        main.run(["list"])


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
def test_devices_that_nothing_is_trained_on(device: str) -> None:
    with pytest.raises(UserError, match=f"device = '{device}'"):
        resolve_device(device)


def test_predictions_of_small_images_are_counted_and_have_a_place(cli: Cli, tmp_path: Path) -> None:
    data, run = write_shades(tmp_path / "images", {"train": 40, "test": 5}), tmp_path / "run"
    flags = ["--image-size", "16", "--width", "0.0625", "--ann-epochs", "1", "--epochs", "0", "--threads", "1"]
    done = cli("classify", "train", "vgg6", "folder", "--data", data, *flags, "--run", run)
    assert done.returncode == 0, done.stderr
    assert "ann_batch_size is 128 and there are 72 training images" in done.stdout + done.stderr
    counted = cli("classify", "evaluate", run / "predictions.json", "--dataset", "folder", "--data", data)
    assert counted.returncode == 0, counted.stderr
    assert "as claimed" in counted.stdout
    nowhere = cli("classify", "evaluate", run, "--data", data, "--predictions", tmp_path / "no" / "p.json")
    assert nowhere.returncode == 2
    assert "lies in no folder" in nowhere.stderr
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"format": "spiking-rl predictions", "rows": []}))
    counted = cli("classify", "evaluate", empty, "--dataset", "folder", "--data", data)
    assert counted.returncode == 2
    assert "holds no rows" in counted.stderr
