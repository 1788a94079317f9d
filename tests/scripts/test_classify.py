"""spiking-rl classify, through the real command line on small images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli, as_flags, last_json
from PIL import Image

SMALL = {
    "width": 0.03125,
    "timesteps": 2,
    "ann_epochs": 3,
    "epochs": 2,
    "prune_epochs": 4,
    "learning_rate": 0.003,
    "ann_optimizer": "adam",
    "ann_learning_rate": 0.003,
    "ann_batch_size": 8,
    "batch_size": 8,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write dark and light images, sorted into a folder per class."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in {"train": 160, "test": 20}.items():
        for name, level in {"dark": 40, "light": 170}.items():
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = level + random.integers(0, 40, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def finished(cli: Cli, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    run = tmp_path_factory.mktemp("runs") / "shades"
    done = cli("classify", "train", "vgg6", "folder", "--data", data, *as_flags(SMALL), "--run", run, "--json")
    assert done.returncode == 0, done.stderr
    return run, last_json(done.stdout)


def test_one_command_trains_prunes_and_scores(finished: tuple[Path, dict[str, object]]) -> None:
    run, printed = finished
    results = json.loads((run / "results.json").read_text())
    assert printed["rows"] == results["rows"]
    assert [row["timesteps"] for row in results["rows"]] == [2, 1, None]
    assert all(row["top1"] > 90 for row in results["rows"]), "dark and light"
    assert set(results["rows"][0]) >= {"dataset", "network", "timesteps", "top1", "spike_rate", "energy_ratio"}
    assert results["rows"][0]["images"] == 40
    for name in (
        "config.yaml",
        "progress.csv",
        "figures/learning_curve.png",
        "figures/timesteps.png",
        "resume/state.json",
        "checkpoints/T1/model.safetensors",
    ):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").glob("events*"))


def test_a_score_is_evaluated_again_and_its_predictions_checked(
    finished: tuple[Path, dict[str, object]], cli: Cli, data: Path, tmp_path: Path
) -> None:
    run, _ = finished
    path = tmp_path / "predictions.json"
    own = ("--data", data, "--timesteps", 1, "--predictions", path, "--json")
    done = cli("classify", "evaluate", run, *own)
    assert done.returncode == 0, done.stderr
    (row,) = last_json(done.stdout)["rows"]
    assert row["top1"] == json.loads((run / "results.json").read_text())["rows"][1]["top1"]
    checked = cli("classify", "evaluate", path, "--data", data, "--dataset", "folder", "--json")
    assert checked.returncode == 0, checked.stderr
    assert last_json(checked.stdout)["rows"] == [{"timesteps": 1, "top1": row["top1"], "claimed": row["top1"]}]
    content = json.loads(path.read_text())
    content["rows"][0]["predicted"] = [1 - c for c in content["rows"][0]["predicted"]]
    path.write_text(json.dumps(content))
    refused = cli("classify", "evaluate", path, "--data", data, "--dataset", "folder")
    assert refused.returncode == 2
    assert "claims" in refused.stderr


def test_the_steps_can_be_taken_one_by_one(cli: Cli, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    where = ("--data", data, "--device", "cpu")
    flags = as_flags({**SMALL, "epochs": 0, "ann_epochs": 1})
    assert cli("classify", "train", "vgg6", "folder", "--data", data, *flags, "--run", run).returncode == 0
    assert cli("classify", "prune", run, *where).returncode == 2
    spikes = ("--timesteps", 2, "--prune-to", 2, "--epochs", 1)
    assert cli("classify", "convert", run, *where, *spikes).returncode == 0
    done = cli("classify", "prune", run, *where, "--to", 1, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert [r["timesteps"] for r in json.loads((run / "results.json").read_text())["rows"]] == [2, 1, None]


def test_a_run_out_of_time_goes_on_with_resume(cli: Cli, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = ("classify", "train", "vgg6", "folder", "--data", data, *as_flags(SMALL), "--run", run)
    stopped = cli(*own, "--hours", 1e-9)
    assert stopped.returncode == 0
    assert f"--run {run} --resume" in stopped.stderr
    assert not (run / "results.json").exists()
    again = cli(*own)
    assert again.returncode == 2
    assert "add --resume" in again.stderr
    other = cli("classify", "train", "vgg9", "folder", "--data", data, "--run", run, "--resume")
    assert other.returncode == 2
    assert "was started with 'vgg6'" in other.stderr
    changed = cli(*own, "--resume", "--weight-decay", 0.1)
    assert changed.returncode == 2
    assert "weight_decay = 0.1" in changed.stderr
    assert cli(*own, "--resume").returncode == 0
    assert (run / "results.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "vgg7", "folder"), "network = 'vgg7'"),
        (("train", "vgg6", "cifar11"), "'cifar11'"),
        (("train", "vgg6"), "dataset"),
        (("train", "vgg6", "folder", "--recipe", "slow"), "recipe = 'slow'"),
        (("train", "vgg6", "folder", "--dropout", "2"), "dropout = 2.0"),
        (("train", "vgg6", "folder", "--crop", "32"), "crop = 32"),
        (("train", "vgg6", "folder", "--hours", "0"), "hours = 0.0"),
        (("train", "vgg6", "folder", "--fold-first"), "firing_rate = 0.15"),
        (("prune", "nowhere"), "holds no run"),
        (("learn",), "choose one of train, convert, prune, evaluate"),
        (("evaluate", "nowhere"), "holds no run"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    cli: Cli, data: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    where = ("--data", data) if arguments[0] != "learn" else ()
    done = cli("classify", *arguments, *where, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_missing_images_are_told_with_what_is_understood(cli: Cli, tmp_path: Path) -> None:
    done = cli("classify", "train", "vgg6", "cifar10", "--data", tmp_path / "none", "--run", tmp_path / "run")
    assert done.returncode == 2
    assert str(tmp_path / "none") in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_classifier_is_reported_on_one_page(
    finished: tuple[Path, dict[str, object]], cli: Cli, tmp_path: Path
) -> None:
    run, _ = finished
    page = tmp_path / "page.html"
    done = cli("report", run, "--output", page, "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["missing"] == []
    text = page.read_text()
    for row in json.loads((run / "results.json").read_text())["rows"]:
        assert f"<td>{row['top1']:.2f}</td>" in text
        assert f"<td>{row['energy_ratio_int32']:.2f}</td>" in text
    assert "Mean threshold of each layer" in text
