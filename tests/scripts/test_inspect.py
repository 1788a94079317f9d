"""spiking-rl inspect, through the real command line."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import Cli, last_json

from spiking_rl import load_checkpoint, save_checkpoint
from spiking_rl.agents.report import evaluate_run
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.main import run as run_command


@pytest.fixture(scope="module")
def scored(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score a copy of the small run."""
    run = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(small_run, run)
    evaluate_run(RunFolder(run), 2, "a test")
    return run


def test_the_page_shows_what_is_shown(cli: Cli) -> None:
    done = cli("inspect", "pong")
    assert done.returncode == 0, done.stderr
    _, shown = done.stdout.split("\n\n", 1)
    assert shown.strip() in (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()


def test_a_run_shows_its_lowest_stage_with_what_was_measured(cli: Cli, scored: Path) -> None:
    done = cli("inspect", scored, "--json")
    assert done.returncode == 0, done.stderr
    facts = last_json(done.stdout)
    layers = facts["layers"]
    # 4 inputs, two layers of 16 neurons with layer norm, 2 actions.
    assert [layer["macs"] for layer in layers] == [4 * 16, 16 * 16, 16 * 2]  # type: ignore[attr-defined]
    norm_threshold_leak = 2 * 16 + 1 + 1
    expected = [4 * 16 + 16 + norm_threshold_leak, 16 * 16 + 16 + norm_threshold_leak, 16 * 2 + 2]
    assert [layer["parameters"] for layer in layers] == expected  # type: ignore[attr-defined]
    assert facts["macs"] == 352
    assert facts["parameters"] == sum(expected)
    assert facts["timesteps"] == 2
    assert facts["membrane_traffic"] == 2 * 2 * 32
    tensors, config = load_checkpoint(scored / "checkpoints" / "T2")
    threshold = layers[1]["threshold"]  # type: ignore[index]
    assert threshold["mean"] == pytest.approx(tensors["network.neurons.1.threshold"].item())
    row = json.loads((scored / "results.json").read_text())["rows"][1]
    measured = facts["measured"]
    assert measured["spike_rate"] == row["spike_rate"]  # type: ignore[index]
    assert measured["energy_ratio"] == row["energy_ratio"]  # type: ignore[index]
    assert measured["mean_return"] == row["mean_return"]  # type: ignore[index]
    origin = facts["provenance"]
    assert origin["weights_sha256"] == config["sha256"]  # type: ignore[index]
    assert origin["versions"]["torch"] == version("torch")  # type: ignore[index]
    assert origin["environment"] == "CartPole-v1"  # type: ignore[index]
    assert last_json(cli("inspect", scored, "--timesteps", 3, "--json").stdout)["timesteps"] == 3


def test_the_table_says_the_same(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", str(scored / "checkpoints" / "T2")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = (line for line in lines if line.startswith("layer1 "))
    assert first.split()[:8] == ["layer1", "linear,", "layer", "norm", "lif", "16", "114", "64"]
    assert any(line.startswith("energy, ANN/SNN") and line.endswith("x") for line in lines)
    assert not any("not measured" in line for line in lines)


def test_results_of_other_weights_are_not_taken_for_these(cli: Cli, scored: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scored, run)
    tensors, config = load_checkpoint(run / "checkpoints" / "T2")
    config.pop("sha256")
    save_checkpoint(run / "checkpoints" / "T2", {name: 2 * t for name, t in tensors.items()}, config)
    facts = last_json(cli("inspect", run, "--json").stdout)
    assert facts["measured"] is None
    assert facts["measure_with"] == f"spiking-rl evaluate {run} --timesteps 2"


def test_a_pretrained_agent_has_thresholds_per_channel_and_says_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(["inspect", "pong-stateful", "--json"]) == 0
    facts = last_json(capsys.readouterr().out)
    first, *_, readout = facts["layers"]  # type: ignore[misc]
    assert first["kind"] == "conv 8x8/4, group norm"
    assert first["output_shape"] == [32, 20, 20]
    assert first["macs"] == 32 * 20 * 20 * 8 * 8
    assert first["leak"]["min"] < first["leak"]["mean"] < first["leak"]["max"]
    assert first["leak"]["count"] == 32
    assert (readout["neuron"], readout["threshold"], readout["output_shape"]) == (None, None, [6])
    assert facts["stateful"] is True
    assert facts["membrane_traffic"] == 2 * (32 * 400 + 64 * 81 + 64 * 49 + 512)
    assert facts["measure_with"] == "spiking-rl evaluate pong-stateful"
    assert facts["provenance"]["commit"] is None  # type: ignore[index]
    assert run_command(["inspect", "pong-stateful"]) == 0
    shown = capsys.readouterr().out
    assert "not measured; measure with: spiking-rl evaluate pong-stateful" in shown
    assert "carried from decision to decision" in shown


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["checkpoint", "first"]),
        (["nowhere"], ["nowhere", "neither a run nor a checkpoint"]),
        (["pong", "--timesteps", "3"], ["timesteps = 3", "T=1"]),
        (["pong", "--timesteps", "0"], ["timesteps = 0"]),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", *args]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert all(word in line for word in words)


def test_a_threshold_that_is_no_number_is_refused(
    small_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors, config = load_checkpoint(small_run / "checkpoints" / "T2")
    tensors["network.neurons.0.threshold"].fill_(float("nan"))
    config.pop("sha256")
    save_checkpoint(tmp_path / "T2", tensors, config)
    assert run_command(["inspect", str(tmp_path / "T2"), "--json"]) == 2
    assert "layer1 holds a threshold or leak that is no number" in capfd.readouterr().err
