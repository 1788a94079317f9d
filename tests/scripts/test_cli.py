"""The real command line: the whole job, and one clear line for every mistake."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL, Cli, as_flags, copy_run, curves_of, environment, last_json

from spiking_rl import load_checkpoint
from spiking_rl.agents import SpikingPQN, load_agent
from spiking_rl.arithmetic import has_bfloat16
from spiking_rl.errors import UserError
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.main import run as run_command
from spiking_rl.scripts.options import parse
from spiking_rl.scripts.plot import DrawnRun, group_runs, read_run


@pytest.fixture(scope="module")
def whole_job(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    run = tmp_path_factory.mktemp("job") / "run"
    settings = {**SMALL, "video_episodes": 1}
    done = cli("train", "cartpole", *as_flags(settings), "--run", run, "--json")
    assert done.returncode == 0, done.stderr
    return run, last_json(done.stdout)


def test_train_says_what_is_to_come(cli: Cli, tmp_path: Path) -> None:
    last = 512
    settings = {**SMALL, "prune_to": 1, "last_steps": last, "eval_every": last, "ann_steps": 1024}
    flags = as_flags({**settings, "report_episodes": 0, "video_episodes": 0, "spike_precision": "bfloat16"})
    done = cli("train", "cartpole", *flags, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert ("no instructions for bfloat16" in done.stdout) == (not has_bfloat16())
    budget, later = SMALL["agent_steps"], SMALL["prune_steps"]
    stages = f"{budget:,} at T=3, {later:,} at T=2, {last} at T=1"
    assert f"at most: 1,024 of a ReLU network, {stages}; Ctrl-C" in done.stdout
    ends = {row["timesteps"]: row["agent_steps"] for row in RunFolder(tmp_path / "run").read_progress()}
    assert (ends[2] - ends[3], ends[1] - ends[2]) == (later, last)
    assert "converting" in done.stderr


def test_train_leaves_everything_it_promises(whole_job: tuple[Path, dict[str, object]]) -> None:
    run, printed = whole_job
    for name in (
        "config.yaml",
        "progress.csv",
        "results.json",
        "resume/state.json",
        "checkpoints/T3/model.safetensors",
        "checkpoints/T2/config.json",
        "figures/learning_curve.png",
        "figures/timesteps.png",
        "videos/T2-spikes.mp4",
    ):
        assert (run / name).stat().st_size > 0, name
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["seed"] == 0
    assert config["timesteps"] == 3
    assert set(config["provenance"]["versions"]) >= {"torch", "stable-baselines3", "gymnasium", "numpy"}
    results = json.loads((run / "results.json").read_text())
    assert [row["timesteps"] for row in results["rows"]] == [3, 2]
    assert set(results) == {"command", "commit", "date", "machine", "train_seconds", "peak_rss_mb", "rows"}
    assert printed["rows"] == results["rows"]
    progress = RunFolder(run).read_progress()
    stages = [row["timesteps"] for row in progress]
    assert stages == sorted(stages, reverse=True)
    assert set(stages) == {3, 2}
    for row in progress:  # 4 inputs, two layers of 16, 2 actions; currents are normalised, three MACs per neuron
        rates = [row[f"spike_rate_layer{i}"] for i in (1, 2)]
        spikes = row["timesteps"] * (16 * 16 * rates[0] + 16 * 2 * rates[1])
        energy = (64 + 48 + row["timesteps"] * 48) * 4.6 + spikes * 0.9
        assert row["energy_ratio"] == pytest.approx((64 + 256 + 32) * 4.6 / energy)


def test_tensorboard_has_the_curves_of_the_run(whole_job: tuple[Path, dict[str, object]]) -> None:
    run, _ = whole_job
    tags = {"score": "eval/mean_return", "energy_ratio": "eval/energy_ratio", "timesteps": "train/timesteps_T"}
    for i in (1, 2):
        tags |= {f"spike_rate_layer{i}": f"spikes/layer{i}"}
        tags |= {f"{quantity}_layer{i}": f"{quantity}/layer{i}" for quantity in ("threshold", "leak")}
    progress, found = RunFolder(run).read_progress(), curves_of(run)
    assert len(progress) > 2
    for column, tag in tags.items():
        assert found[tag] == pytest.approx({row["agent_steps"]: row[column] for row in progress}, rel=1e-6), tag
    assert set(found) >= {"train/loss", "train/learning_rate"}


def test_the_table_also_plays_elsewhere_and_the_curves_are_published(
    whole_job: tuple[Path, dict[str, object]], cli: Cli, script: Cli, tmp_path: Path
) -> None:
    run = tmp_path / "started"
    # An agent that balances, and goes on doing so: where episodes are shorter, so are its returns.
    start = {"start_from": "cartpole", "timesteps": 1, "prune_to": 1, "agent_steps": 512, "learning_rate": 1e-9}
    other = {"report_also": ("CartPole-v0",), "eval_every": 256, "eval_episodes": 2, "report_episodes": 3}
    done = cli("train", "cartpole", *as_flags({**start, **other, "video_episodes": 0}), "--run", run, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = last_json(done.stdout)["rows"]
    assert row["mean_return"] == 500
    assert [(e["environment"], e["mean_return"]) for e in row["also"]] == [("CartPole-v0", 200)]
    assert "in CartPole-v0: T=1 200.0 " in done.stderr
    output = tmp_path / "curves.json"

    curves = partial(script, "spiking_rl.scripts.curves")

    refused = curves(run, tmp_path, "--output", output)
    assert refused.returncode == 2
    assert refused.stderr.startswith("spiking-rl: run = ")
    assert not output.exists()
    second = tmp_path / "second"
    shutil.copytree(whole_job[0], second)
    assert curves(run, second, "--output", output).returncode == 0
    rows = json.loads(output.read_text())["rows"]
    assert [r["run"] for r in rows] == ["started", "second"]
    assert rows[0]["curve"] == RunFolder(run).read_progress()
    assert rows[0]["settings"]["start_from"] == "cartpole"
    seconds = [r["seconds"] for r in rows[0]["curve"]]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    assert output.with_suffix(".png").stat().st_size > 0
    shutil.copytree(run, tmp_path / "elsewhere" / "started")
    refused = curves(run, tmp_path / "elsewhere" / "started", "--output", output)
    assert (refused.returncode, "has the name of another one" in refused.stderr) == (2, True)


def test_the_scores_of_several_runs_are_published_together(
    whole_job: tuple[Path, dict[str, object]], script: Cli, tmp_path: Path
) -> None:
    output = tmp_path / "scores.json"

    gather = partial(script, "spiking_rl.scripts.gather")

    unfinished = tmp_path / "unfinished"
    shutil.copytree(whole_job[0], unfinished)
    (unfinished / "results.json").write_text("{}")
    refused = gather(unfinished, "--output", output)
    assert (refused.returncode, "rows" in refused.stderr) == (2, True), refused.stderr
    (unfinished / "results.json").unlink()
    refused = gather(whole_job[0], unfinished, "--output", output)
    assert refused.returncode == 2
    assert "has no final table yet; go on with spiking-rl train CartPole-v1 --algo pqn --run" in refused.stderr
    refused = gather(whole_job[0], whole_job[0], "--output", output)
    assert (refused.returncode, "is named twice" in refused.stderr) == (2, True)
    assert not output.exists()
    assert gather(whole_job[0], "--output", output).returncode == 0
    published = json.loads(output.read_text())
    own = json.loads((whole_job[0] / "results.json").read_text())
    assert [row["mean_return"] for row in published["rows"]] == [row["mean_return"] for row in own["rows"]]
    assert {row["run"] for row in published["rows"]} == {whole_job[0].name}
    assert {row["command"] for row in published["rows"]} == {own["command"]}


def test_another_environment_for_the_table_must_fit(cli: Cli, tmp_path: Path) -> None:
    refused = cli("train", "cartpole", "--report-also", "Acrobot-v1", "--run", tmp_path / "run")
    assert refused.returncode == 2
    assert "report_also = 'Acrobot-v1': has other spaces" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_the_later_stage_starts_from_the_best_of_the_one_above(whole_job: tuple[Path, dict[str, object]]) -> None:
    rows = RunFolder(whole_job[0]).read_progress()
    best = max(row["score"] for row in rows if row["timesteps"] == 3)
    config = load_checkpoint(whole_job[0] / "checkpoints" / "T3").config
    assert config["score"] == best
    assert config["timesteps"] == 3


def test_evaluate_prints_one_json_object(cli: Cli, small_run: Path) -> None:
    done = cli("evaluate", small_run, "--timesteps", 3, "--episodes", 3, "--json")
    assert done.returncode == 0, done.stderr
    row = last_json(done.stdout)
    assert list(row) == [
        "environment",
        "timesteps",
        "episodes",
        "mean_return",
        "ci95",
        "spike_rate",
        "energy_ratio",
        "decision_ms",
        "deployed_ms",
        "distinct_episodes",
    ]
    assert row["timesteps"] == 3
    assert row["environment"] == "CartPole-v1"
    again = last_json(cli("evaluate", small_run / "checkpoints" / "T3", "--episodes", 3, "--json").stdout)
    assert again["mean_return"] == row["mean_return"]


def test_an_agent_plays_elsewhere_where_spaces_are_equal(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    row = last_json(cli("evaluate", small_run, "--env", "CartPole-v0", "--episodes", 2, "--json").stdout)
    assert row["environment"] == "CartPole-v0"
    video = tmp_path / "elsewhere.mp4"
    for refused in (
        cli("evaluate", small_run, "--env", "Acrobot-v1", "--episodes", 2),
        cli("render", small_run, "--env", "ALE/Pong-v5", "--output", video),
    ):
        assert refused.returncode == 2
        assert "other spaces than the agent" in refused.stderr
    assert not video.exists()


def test_render_films_the_episode_that_evaluate_scores(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    video = tmp_path / "deep" / "film.mp4"
    done = cli("render", small_run, "--spikes", "--seed", 7, "--output", video, "--json")
    assert done.returncode == 0, done.stderr
    made = last_json(done.stdout)
    frames, _ = imageio_ffmpeg.count_frames_and_secs(str(video))
    assert frames == made["frames"]
    scored = last_json(cli("evaluate", small_run, "--seed", 7, "--episodes", 1, "--json").stdout)
    assert made["returns"] == [scored["mean_return"]]
    width, height = size_of(video)
    assert width == 600 + 360, "the frame, and beside it spikes and membranes"
    assert height > 400 + 50, "and below it Q-values"


def size_of(video: Path) -> tuple[int, int]:
    """Return width and height."""
    reader = imageio_ffmpeg.read_frames(str(video))
    size: tuple[int, int] = next(reader)["size"]
    reader.close()
    return size


def test_render_shows_the_membranes_that_are_named(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    names = ("layer1:3", "layer2:15")
    for name, flags in (("two", ["--neurons", *names]), ("three", [])):
        done = cli("render", small_run, "--spikes", *flags, "--seed", 7, "--output", tmp_path / f"{name}.mp4")
        assert done.returncode == 0, done.stderr
    assert size_of(tmp_path / "two.mp4")[1] < size_of(tmp_path / "three.mp4")[1], "a membrane less"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--spikes", "--neurons", "layer3:1"], "'layer3:1'"),
        (["--spikes", "--neurons", "layer1:3", "layer2:16"], "'layer2:16'"),
        (["--spikes", "--neurons", "layer1:-1"], "'layer1:-1'"),
        (["--spikes", "--neurons", "layer1"], "'layer1'"),
        (["--neurons", "layer1:3"], "--spikes"),
    ],
)
def test_render_refuses_a_neuron_that_is_not_there(
    flags: list[str], named: str, cli: Cli, small_run: Path, tmp_path: Path
) -> None:
    done = cli("render", small_run, *flags, "--output", tmp_path / "film.mp4")
    assert done.returncode == 2
    said = one_line(done.stderr)
    assert said.startswith("spiking-rl: neurons = ")
    assert named in said
    assert named == "--spikes" or "layer1:0 to layer1:15, layer2:0 to layer2:15" in said
    assert not (tmp_path / "film.mp4").exists()


def test_plot_draws_several_runs(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    seeds = [copy_run(small_run, tmp_path / f"cart-seed{seed}", seed=seed) for seed in (0, 1, 2)]
    other = copy_run(small_run, tmp_path / "slow-seed0", learning_rate=1e-5)
    done = cli("plot", *seeds, other, "--output", tmp_path / "curves.png", "--json")
    assert done.returncode == 0, done.stderr
    made = last_json(done.stdout)
    assert made["figures"] == [str(tmp_path / "curves.png"), str(tmp_path / "curves.svg")]
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert made["data"] == [str(tmp_path / "curves.csv")]
    progress = RunFolder(small_run).read_progress()
    assert len(rows) == 4 * len(progress)
    assert list(dict.fromkeys(row["run"] for row in rows)) == ["cart-seed0", "cart-seed1", "cart-seed2", "slow-seed0"]
    last = rows[len(progress) - 1]
    assert (last["algo"], last["environment"], last["seed"]) == ("pqn", "CartPole-v1", "0")
    assert float(last["score"]) == progress[-1]["score"]
    assert int(last["agent_steps"]) == progress[-1]["agent_steps"]
    assert int(last["timesteps"]) == 2
    assert float(last["ci95"]) == progress[-1]["ci95"]
    assert _legend([*seeds, other]) == ["pqn, cart, 3 seeds, band: min to max", "pqn, slow"]
    assert _legend(seeds) == ["pqn, 3 seeds, band: min to max"]
    again = copy_run(small_run, tmp_path / "again" / "cart-seed0", seed=0)
    assert _legend([seeds[0], again]) == ["pqn, 2 runs, band: min to max"], "one seed twice is not two seeds"
    apart = [copy_run(small_run, tmp_path / name / f"seed{seed}", seed=seed) for name in ("a", "b") for seed in (0, 1)]
    two = "2 seeds, band: min to max"
    assert _legend(apart) == [f"pqn, a, {two}", f"pqn, b, {two}"], "folders named by the seed alone"
    assert RunFolder(apart[0]).name == "a/seed0"
    bare = [copy_run(small_run, tmp_path / name / str(seed), seed=seed) for name in ("c", "d") for seed in (0, 1)]
    assert _legend(bare) == [f"pqn, c, {two}", f"pqn, d, {two}"]
    refused = cli("plot", seeds[0], seeds[0])
    assert refused.returncode == 2
    assert "is named twice" in one_line(refused.stderr)


def test_of_several_environments_every_line_names_its_own() -> None:
    runs = [DrawnRun("a", "pqn", "CartPole-v1", 0, [], False), DrawnRun("b", "dqn", "Acrobot-v1", 0, [], False)]
    assert list(group_runs(runs)) == ["pqn, CartPole-v1", "dqn, Acrobot-v1"]


def _legend(folders: list[Path]) -> list[str]:
    """Return what the legend calls the groups of runs."""
    return list(group_runs([read_run(RunFolder(folder)) for folder in folders]))


def test_a_run_has_its_name_where_one_stands_in_it_too(
    cli: Cli, script: Cli, whole_job: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    run = tmp_path / "its name-seed0"
    shutil.copytree(whole_job[0], run)
    assert cli("plot", ".", cwd=run).returncode == 0
    with (run / "figures" / "learning_curve.csv").open() as file:
        assert next(csv.DictReader(file))["run"] == run.name
    assert cli("report", ".", cwd=run).returncode == 0
    assert run.name in (run / "report.html").read_text()
    for name in ("gather", "curves"):
        done = script(f"spiking_rl.scripts.{name}", ".", "--output", tmp_path / f"{name}.json", cwd=run)
        assert done.returncode == 0, done.stderr
        assert {row["run"] for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]} == {run.name}
    done = cli("render", ".", "--json", cwd=run / "checkpoints" / "T2")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["video"] == "videos/T2.mp4"
    done = script("spiking_rl.scripts.gather", run.name, "--output", "g.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    command = json.loads((tmp_path / "g.json").read_text())["command"]
    assert shlex.split(command)[3:] == [run.name, "--output", "g.json"], "it can be pasted again"


def test_plot_of_one_run_leaves_pictures_and_their_data(
    whole_job: tuple[Path, dict[str, object]], cli: Cli, tmp_path: Path
) -> None:
    run = copy_run(whole_job[0], tmp_path / "run")
    shutil.copy(whole_job[0] / "results.json", run)
    done = cli("plot", run)
    assert done.returncode == 0, done.stderr
    found = sorted(path.name for path in (run / "figures").iterdir())
    assert found == [f"{name}.{ending}" for name in ("learning_curve", "timesteps") for ending in ("csv", "png", "svg")]
    with (run / "figures" / "timesteps.csv").open() as file:
        rows = list(csv.DictReader(file))
    results = json.loads((run / "results.json").read_text())["rows"]
    assert [float(row["energy_ratio"]) for row in rows] == [row["energy_ratio"] for row in results]
    assert float(rows[0]["spike_rate_layer2"]) == results[0]["spike_rate"]["layer2"]


def test_prune_continues_a_finished_run(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**SMALL, "prune_to": 3, "agent_steps": 2048}
    assert cli("train", "CartPole-v1", *as_flags(settings), "--run", run).returncode == 0
    over_timesteps = run / "figures" / "timesteps.png"
    assert not over_timesteps.exists(), "of one T there is nothing to draw over T"
    above = load_checkpoint(run / "checkpoints" / "T3").tensors
    done = cli("prune", run, "--to", 1)
    assert done.returncode == 0, done.stderr
    assert over_timesteps.exists()
    assert RunFolder(run).checkpoint_timesteps() == [3, 2, 1]
    assert {r["timesteps"] for r in RunFolder(run).read_progress()} == {3, 2, 1}
    after = load_checkpoint(run / "checkpoints" / "T3").tensors
    assert all((after[k] == v).all() for k, v in above.items())  # the stage above is left as it was
    done = cli("prune", run, "--to", 1)
    assert done.returncode == 2
    assert "to = 1" in done.stderr


def test_prune_goes_on_in_the_environment_of_the_run(cli: Cli, small_run: Path) -> None:
    before = (small_run / "config.yaml").read_bytes()
    done = cli("prune", small_run, "--to", "1", "--env", "Acrobot-v1")
    assert done.returncode == 2
    assert "env = 'Acrobot-v1': is not what the run trains in, 'CartPole-v1'" in one_line(done.stderr)
    assert (small_run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(("flag", "follows"), [(["--rescale-leak"], True), (["--no-rescale-leak"], False), ([], False)])
def test_prune_says_whether_leaks_follow_the_timesteps(
    flag: list[str], follows: bool, cli: Cli, tmp_path: Path
) -> None:
    """With a flag it does what the run was not begun with, without one what it was."""
    run = tmp_path / "run"
    first = {**SMALL, "timesteps": 2, "prune_to": 2, "agent_steps": 2048, "report_episodes": 0}
    own = "--rescale-leak" if follows is not bool(flag) else "--no-rescale-leak"
    assert cli("train", "cartpole", *as_flags(first), own, "--stateful", "--run", run).returncode == 0
    above = load_checkpoint(run / "checkpoints" / "T2").tensors["network.neurons.0.leak"]
    # So few agent steps that training moves the leaks less than rescaling does.
    done = cli("prune", run, "--to", 1, *flag)
    assert done.returncode == 0, done.stderr
    below = load_checkpoint(run / "checkpoints" / "T1").tensors["network.neurons.0.leak"]
    expected, other = (above**2, above) if follows else (above, above**2)
    assert (below - expected).abs().mean() < 0.3 * (below - other).abs().mean()


def test_the_relu_control_runs_the_same_way(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli("train", "cartpole", *as_flags(SMALL), "--neuron", "relu", "--run", run, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = last_json(done.stdout)["rows"]  # type: ignore[misc]
    assert row["timesteps"] is None
    assert row["energy_ratio"] == 1
    assert cli("evaluate", run, "--episodes", 1).returncode == 0
    done = cli("render", run, "--spikes", "--output", tmp_path / "relu.mp4", "--json")
    assert done.returncode == 0
    assert "note: a ReLU network" in done.stderr, "it has no spikes, but its Q-values are shown"
    assert size_of(tmp_path / "relu.mp4") == (600, 400 + 46 + 18 + 2 * 21 + 8)
    assert "neurons = 'layer1:3'" in one_line(cli("render", run, "--spikes", "--neurons", "layer1:3").stderr)
    assert "ReLU" in cli("prune", run, "--to", 1).stderr


def one_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "CartPol-v1"], ["env", "CartPol-v1", "CartPole-v1"]),
        (["train", "no_such_module:Env-v0"], ["env", "no_such_module"]),
        (["train", "Pendulum-v1"], ["action_space", "Box", "Discrete"]),
        (["train", "cartpole", "--timesteps", "0"], ["timesteps", "0", "at least 1"]),
        (["train", "cartpole", "--prune-to", "6"], ["prune_to", "6", "timesteps = 5"]),
        (["train", "cartpole", "--prune-to", "0"], ["prune_to", "0"]),
        (["train", "cartpole", "--algo", "ppo"], ["algo", "ppo", "pqn"]),
        (["train", "cartpole", "--hours", "-1"], ["hours", "-1"]),
        (["train", "cartpole", "--device", "cuda:9"], ["device", "cuda:9"]),
        (["train", "cartpole", "--device", "toaster"], ["device", "toaster"]),
        (["train", "cartpole", "--learning-rate", "nan"], ["learning_rate", "nan"]),
        (["train", "cartpole", "--hidden", "0"], ["hidden"]),
        (["train", "cartpole", "--firing-rate", "1"], ["firing_rate", "1"]),
        (["train", "cartpole", "--run", "/dev/null/x"], ["run", "/dev/null/x", "cannot be written"]),
        (["train", "cartpole", "--run", "/proc/nothing"], ["run", "/proc/nothing", "cannot be written"]),
        (["train", "cartpole", "--run", "nowhere", "--resume"], ["run", "nowhere", "no run"]),
        (["train"], ["env"]),
        (["evaluate", "nowhere"], ["run", "nowhere"]),
        (["render", "nowhere"], ["run", "nowhere"]),
        (["plot", "nowhere"], ["run", "nowhere"]),
        (["prune", "nowhere", "--to", "1"], ["run", "nowhere"]),
        (["fly"], ["command", "fly", "train"]),
        (["train", "cartpole", "--timesteps", "abc"], ["--timesteps", "abc"]),
        (["train", "cartpole", "--tiemsteps", "3"], ["--tiemsteps", "did you mean --timesteps?"]),
        (["train", "cartpole", "--resum"], ["--resum", "did you mean --resume?"]),
        (["train", "cartpole", "--no-resum"], ["--no-resum", "did you mean --no-resume?"]),
        (["evaluate", "cartpole", "--episode", "3"], ["--episode", "did you mean --episodes?"]),
        (["train", "cartpole", "--algo"], ["algo"]),
        (["train", "default"], ["default"]),
        (["list", "recipes"], ["arguments", "recipes", "list --help"]),
        (["classify"], ["command", "is missing", "train, convert"]),
        (["export", "cartpole", "--output", "."], ["output", "is a folder", "agent.zip"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    args: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(args) == 2  # in this process: starting one costs seconds, and there are many cases
    line = one_line(capfd.readouterr().err)
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir()), "something was written"


def test_a_folder_in_use_is_left_alone(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in small_run.rglob("*") if p.is_file()}
    done = cli("train", "cartpole", "--run", small_run)
    assert done.returncode == 2
    assert "--resume" in one_line(done.stderr)
    assert before == {p: p.stat().st_mtime_ns for p in small_run.rglob("*") if p.is_file()}
    (tmp_path / "file").write_text("mine")
    assert cli("train", "cartpole", "--run", tmp_path / "file").returncode == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_held_by_another_process_is_refused(cli: Cli, small_run: Path) -> None:
    with RunFolder(small_run).locked():
        done = cli("train", "cartpole", *as_flags(SMALL), "--run", small_run, "--resume")
    assert done.returncode == 2
    assert "another process" in one_line(done.stderr)


def test_resume_refuses_other_settings(cli: Cli, small_run: Path) -> None:
    done = cli("train", "cartpole", "--run", small_run, "--resume", "--seed", 5)
    assert done.returncode == 2
    assert "seed = 5" in one_line(done.stderr)
    done = cli("train", "cartpole", "--run", small_run, "--resume", "--prune-steps", 7)
    assert done.returncode == 2
    assert "cannot change where training is finished" in one_line(done.stderr)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "pickle"])
def test_a_bad_checkpoint_is_named(cli: Cli, small_run: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "T2"
    folder.mkdir()
    for file in (small_run / "checkpoints" / "T2").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "pickle":
        weights.write_bytes(b"\x80\x04cos\nsystem\n")
    else:
        config.write_text('{"format": "something else"}')
    done = cli("evaluate", folder)
    assert done.returncode == 2
    assert str(folder) in one_line(done.stderr)


@pytest.mark.skipif(os.name != "posix", reason="limits file sizes through POSIX")
def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**SMALL, "prune_to": 3, "agent_steps": 1024}
    assert cli("train", "cartpole", *as_flags(settings), "--run", run).returncode == 0
    good = load_checkpoint(run / "checkpoints" / "T3").tensors

    done = cli("prune", run, "--to", 1, file_size=3000)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "--resume" in done.stderr.strip().splitlines()[-1]
    after = load_checkpoint(run / "checkpoints" / "T3").tensors
    assert all((after[k] == v).all() for k, v in good.items())
    assert not list(run.rglob("*.partial"))
    done = cli("prune", run, "--to", 1)
    if done.returncode == 2:  # the pruning had begun and was saved: it is continued as any run
        done = cli("train", "cartpole", "--run", run, "--resume")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        *("train", "prune", "evaluate", "exit", "render", "export", "inspect", "plot", "report", "list"),
        *(f"classify {part}" for part in ("train", "convert", "prune", "evaluate")),
    ],
)
def test_help_fits_a_screen_and_has_an_example(cli: Cli, command: str) -> None:
    done = cli(*command.split(), "--help")
    assert done.returncode == 0
    assert "Example: spiking-rl" in done.stdout
    assert len(done.stdout.splitlines()) <= 45
    assert_readable(done.stdout)


def assert_readable(shown: str) -> None:
    """Options that may be left out say so in one word, and lines break where they are full."""
    assert "None" not in shown
    rows = [line[2:-1] for line in shown.splitlines() if line.startswith("│ ")]
    for row, below in pairwise(rows):
        if row.startswith(" " * 8) and below.startswith(" " * 8):
            first = below.split()[0]
            assert len(row.rstrip()) + 1 + len(first) > len(row) - 2, f"{row!r} has room for {first!r}"


@pytest.mark.parametrize("command", ["prune", "classify prune"])
def test_what_a_run_says_itself_is_no_default(cli: Cli, command: str) -> None:
    for flags in (["--help"], ["no-such-run", "--help-all"]):
        done = cli(*command.split(), *flags)
        assert done.returncode == 0, done.stderr
        words = " ".join(done.stdout.replace("│", " ").split())
        assert "(default: as the run has it)" in words
        assert "(default: True)" not in words
        assert "(default: False)" not in words


@pytest.mark.parametrize("command", ["train cartpole", "classify train vgg6 cifar10"])
def test_all_settings_are_told_where_they_are_asked_for(cli: Cli, command: str) -> None:
    shown, everything = (cli(*command.split(), flag).stdout for flag in ("--help", "--help-all"))
    assert "--help-all" in shown
    assert "--learning-rate" not in shown
    assert "--learning-rate" in everything
    assert_readable(everything)
    for option in ("--timesteps", "--seed", "--run", "--resume"):
        assert option in shown
        assert option in everything


@pytest.mark.parametrize("word", ["none", "None"])
def test_what_may_be_left_out_may_be_none(word: str) -> None:
    def read(*args: str) -> Both:
        return parse(Both, "try", list(args), "Tries.", Both(1.5, (1.0, 2.0), ("a",), True, "relu"))

    assert read() == Both(1.5, (1.0, 2.0), ("a",), True, "relu")
    assert read("--hours", word).hours is None
    assert read("--pair", word).pair is None
    assert read("--names", word).names is None
    assert read("--part", word).part is None
    assert read("--flag", "none").flag is None
    assert read("--pair", "3", "4", "--names", "b", "c") == Both(1.5, (3.0, 4.0), ("b", "c"), True, "relu")
    assert read("--part", "3").part == 3
    assert read("--flag", "False").flag is False
    for args in (["--hours", "soon"], ["--pair", "1"], ["--flag", "maybe"], ["--part", "lif"]):
        with pytest.raises(UserError, match=args[0].removeprefix("--")):
            read(*args)


@dataclass
class Both:
    """Options of every kind that may be left out."""

    hours: float | None
    """A number."""
    pair: tuple[float, float] | None
    """Two."""
    names: tuple[str, ...] | None
    """Any number of words."""
    flag: bool | None
    """True or False."""
    part: int | Literal["relu"] | None
    """A number or a word."""


def test_overview_and_version(cli: Cli) -> None:
    overview = cli("--help")
    assert overview.returncode == 0
    for command in ("train", "prune", "evaluate", "render", "plot", "inspect", "list"):
        assert command in overview.stdout
    assert cli("--version").stdout.startswith("spiking-rl 0.")
    listed = last_json(cli("list", "--json").stdout)
    assert listed["recipes"]["cartpole"] == "CartPole-v1"  # type: ignore[index]
    assert "mlp" in listed["networks"]  # type: ignore[operator]


TAXI = "Taxi-v4" if "Taxi-v4" in gymnasium.registry else "Taxi-v3"  # the newest that Gymnasium has


@pytest.mark.parametrize("env", ["Acrobot-v1", "MountainCar-v0", "LunarLander-v3", TAXI])
def test_other_environments_run_with_the_defaults(cli: Cli, tmp_path: Path, env: str) -> None:
    settings = {**SMALL, "agent_steps": 1500, "prune_steps": 512, "report_episodes": 1}
    done = cli("train", env, *as_flags(settings), "--run", tmp_path / "run", "--json")
    if env == "LunarLander-v3" and "not installed" in done.stderr:
        assert done.returncode == 2
        return
    assert done.returncode == 0, done.stderr
    assert [row["timesteps"] for row in last_json(done.stdout)["rows"]] == [3, 2]  # type: ignore[attr-defined]


OWN = """
import gymnasium as gym, numpy as np

class Env(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(2, np.float32), float(action), self.left == 0, False, {}

gym.register('MyEnv-v0', entry_point=Env)
"""


def own_environment(folder: Path, env: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """Train in an environment of the current folder, by the command that is installed."""
    command = Path(sys.executable).with_name("spiking-rl")
    settings = {**SMALL, "agent_steps": 1500, "prune_steps": 512, "video_episodes": 1}
    words = [command, "train", env, *as_flags(settings), *map(str, flags), "--run", "run"]
    return subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


def test_the_installed_command_finds_an_environment_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "my_env.py").write_text(OWN)
    done = own_environment(tmp_path, "my_env:MyEnv-v0")
    assert done.returncode == 0, done.stderr
    assert "no video:" in done.stdout  # it does not draw itself, which is no reason to fail


def test_resume_does_not_replace_a_run_whose_state_is_gone(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    shutil.copytree(small_run, tmp_path / "run", ignore=shutil.ignore_patterns("resume"))
    done = cli("train", "cartpole", "--run", tmp_path / "run", "--resume")
    assert done.returncode == 2
    assert "resume" in one_line(done.stderr)


def test_export_halves_the_weights_and_nothing_else(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    done = cli("export", small_run, "--format", "half", "--timesteps", 2, "--output", half)
    assert done.returncode == 0, done.stderr
    whole = load_checkpoint(small_run / "checkpoints" / "T2")
    rounded = load_checkpoint(half)
    for name, tensor in whole.tensors.items():
        weight = name.endswith(".weight") and tensor.dim() > 1
        assert rounded.tensors[name].dtype == (torch.float16 if weight else tensor.dtype), name
        torch.testing.assert_close(rounded.tensors[name].to(tensor.dtype), tensor, rtol=1e-3, atol=1e-6)
    scored = cli("evaluate", half, "--episodes", 2, "--json")
    assert last_json(scored.stdout)["timesteps"] == 2
    (tmp_path / "mine").mkdir()
    refused = cli("export", small_run, "--format", "half", "--output", tmp_path / "mine")
    assert refused.returncode == 2
    assert "is no checkpoint" in refused.stderr


def test_an_export_is_called_after_its_run(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "mine-seed0"
    shutil.copytree(small_run, run)
    for name, flags, ending in (
        (run, ["--timesteps", 3], "mine-seed0-T3.zip"),
        (run / "checkpoints" / "T2", ["--format", "half"], "mine-seed0-T2-half"),
        ("cartpole", [], "cartpole.zip"),
    ):
        done = cli("export", name, *flags, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert last_json(done.stdout)["file"] == ending
        assert (tmp_path / ending).exists()


def test_an_environment_that_breaks_its_own_space_is_told_before_a_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "broken_env.py").write_text(OWN.replace("np.zeros(2, np.float32), float", "np.zeros(3), float"))
    done = own_environment(tmp_path, "broken_env:MyEnv-v0")
    assert done.returncode == 2
    assert "of shape (3,), and its space says (2,), 1 steps after a reset" in one_line(done.stderr)
    assert not (tmp_path / "run").exists()


def test_pictures_that_are_taken_as_vectors_are_told(tmp_path: Path) -> None:
    text = OWN.replace("Box(-1, 1, (2,)", "Box(0, 1, (3, 4, 4)").replace("np.zeros(2, ", "np.zeros((3, 4, 4), ")
    (tmp_path / "my_env.py").write_text(text)
    done = own_environment(tmp_path, "my_env:MyEnv-v0", "--agent-steps", 300, "--prune-steps", 100)
    assert done.returncode == 0, done.stderr
    assert "note: observations float32 (3, 4, 4) are taken as vectors" in done.stdout


def test_export_writes_a_zip_that_stable_baselines3_loads(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "agent.zip"
    done = cli("export", small_run, "--timesteps", 2, "--output", path, "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["class"] == "SpikingPQN"
    loaded, own = SpikingPQN.load(path, device="cpu"), load_agent(small_run, timesteps=2, device="cpu").model
    assert loaded.policy.timesteps == 2
    seen = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    actions = [model.predict(seen, deterministic=True)[0].tolist() for model in (loaded, own)]
    assert actions[0] == actions[1]
    loaded.save_checkpoint(tmp_path / "back", environment="CartPole-v1")
    assert load_agent(tmp_path / "back").model.predict(seen, deterministic=True)[0].tolist() == actions[0]
