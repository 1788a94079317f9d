"""A run that dies and is resumed ends as one that did not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import COMMAND, SMALL, Cli, as_flags, environment

from spiking_rl import UserError, load_checkpoint
from spiking_rl.agents.building import build_model
from spiking_rl.agents.config import load_recipe
from spiking_rl.agents.resume import load_training_state, save_training_state
from spiking_rl.agents.session import TrainingSession
from spiking_rl.agents.training import change_run, replace_settings, resume_run, start_run
from spiking_rl.runs import RunFolder
from spiking_rl.settings import read_settings
from spiking_rl.stopping import Interrupted

DQN = {"learning_starts": 256, "train_freq": 64, "gradient_steps": 8, "buffer_size": 2048, "batch_size": 16}


def session_in(path: Path, algo: str, **changes: object) -> TrainingSession:
    settings = {**SMALL, "agent_steps": 1536, **(DQN if algo == "dqn" else {}), **changes}
    return start_run(replace_settings(load_recipe("cartpole", algo)[1], settings), RunFolder(path), device="cpu")


def run_until(session: TrainingSession, agent_steps: int) -> None:
    """Stop a run from within, as Ctrl-C does, once it has come so far."""
    between = session.between_rollouts

    def stop() -> None:
        session.stop_requested = session.model.num_timesteps >= agent_steps
        between()

    session.between_rollouts = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        session.run()


def final_tensors(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("T3", "T3-end", "T2", "T2-end"):
        tensors = load_checkpoint(path / "checkpoints" / name).tensors
        found |= {f"{name}/{k}": v for k, v in tensors.items()}
    return found


def assert_same_end(a: Path, b: Path) -> None:
    first, second = final_tensors(a), final_tensors(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs"
    rows = [RunFolder(path).read_progress() for path in (a, b)]
    for row in rows[0] + rows[1]:
        assert row.pop("seconds") > 0
        assert (row.pop("rss_mb") or 1) > 0
    assert rows[0] == rows[1]


@pytest.fixture(scope="module", params=["pqn", "dqn"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("whole") / request.param
    session_in(path, request.param).run()
    return request.param, path


@pytest.mark.parametrize("stop_at", [300, 1300, 1700])
def test_a_stopped_run_resumes_bit_for_bit(uninterrupted: tuple[str, Path], tmp_path: Path, stop_at: int) -> None:
    algo, whole = uninterrupted
    session = session_in(tmp_path / "run", algo)
    run_until(session, stop_at)
    # Other random numbers drawn meanwhile must not matter: everything comes from the files.
    torch.manual_seed(stop_at)
    np.random.seed(stop_at)
    resume_run(RunFolder(tmp_path / "run"), device="cpu").run()
    assert_same_end(whole, tmp_path / "run")


HYBRID = {"ann_steps": 1536, "agent_steps": 512, "imitation": 0.75, "save_every": 256}


@pytest.fixture(scope="module")
def whole_hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid") / "whole"
    session_in(path, "pqn", **HYBRID).run()
    return path


@pytest.mark.parametrize("stop_at", [300, 1600, 1800])
def test_a_run_that_starts_with_a_relu_network_resumes_bit_for_bit(
    whole_hybrid: Path, tmp_path: Path, stop_at: int
) -> None:
    """Stopped while the ReLU network learns, after its end, and after the first save with spikes."""
    session = session_in(tmp_path / "run", "pqn", **HYBRID)
    assert session.ann is not None
    run_until(session.ann if stop_at < 1536 else session, stop_at)
    torch.manual_seed(stop_at)
    resume_run(RunFolder(tmp_path / "run"), device="cpu").run()
    assert_same_end(whole_hybrid, tmp_path / "run")
    rows = RunFolder(tmp_path / "run").read_progress()
    assert [r["agent_steps"] for r in rows] == sorted(r["agent_steps"] for r in rows)
    assert list(dict.fromkeys(r["timesteps"] for r in rows)) == [None, 3, 2]


def test_a_run_killed_without_warning_resumes_bit_for_bit(
    cli: Cli, uninterrupted: tuple[str, Path], tmp_path: Path
) -> None:
    algo, whole = uninterrupted
    path = tmp_path / "run"
    settings = {**SMALL, "agent_steps": 1536, **(DQN if algo == "dqn" else {})}
    command = [
        "train",
        "cartpole",
        "--algo",
        algo,
        *as_flags(settings),
        "--device",
        "cpu",
        "--run",
        str(path),
    ]
    process = subprocess.Popen(
        [*COMMAND, *command], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (path / "resume" / "state.json").is_file():
        assert process.poll() is None, "the run ended before it saved anything"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = cli(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_end(whole, path)


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(tmp_path: Path) -> None:
    path = tmp_path / "run"
    settings = {**SMALL, "agent_steps": 1_000_000, "save_every": 1_000_000}
    command = [*COMMAND, "train", "cartpole", *as_flags(settings), "--run", str(path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (path / "progress.csv").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--run {path} --resume" in errors
    assert "Traceback" not in errors
    state = json.loads((path / "resume" / "state.json").read_text())
    assert state["counters"]["num_timesteps"] >= 512


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_a_stopped_run_keeps_its_membranes(tmp_path: Path, algo: str) -> None:
    """The membranes, the replayed sequences and the episode starts go on bit for bit too."""
    memory = {"stateful": True, "agent_steps": 1536}
    if algo == "dqn":
        memory |= {"burn_in": 4, "sequence_length": 8, "buffer_size": 1024}
    session_in(tmp_path / "whole", algo, **memory).run()
    session = session_in(tmp_path / "run", algo, **memory)
    run_until(session, 1300)
    assert session.model.membranes is not None
    resume_run(RunFolder(tmp_path / "run"), device="cpu").run()
    assert_same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_a_reached_goal_ends_the_stage_and_resumes_bit_for_bit(tmp_path: Path, algo: str) -> None:
    easy = {"goal": 0.0, "eval_every": 256, "agent_steps": 100_000, "prune_steps": 100_000, "save_every": 150}
    whole = session_in(tmp_path / "whole", algo, **easy)
    whole.run()
    assert [row["timesteps"] for row in whole.rows] == [3, 3, 3, 2, 2, 2], "three evaluations a stage, then on"
    session = session_in(tmp_path / "run", algo, **easy)
    run_until(session, 550)
    resume_run(RunFolder(tmp_path / "run"), device="cpu").run()
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_hours_stop_the_run_with_everything_saved(tmp_path: Path) -> None:
    session = session_in(tmp_path / "run", "pqn")
    session.deadline = time.monotonic()  # the hours are over at once
    with pytest.raises(Interrupted, match="time"):
        session.run()
    resume_run(RunFolder(tmp_path / "run"), device="cpu").run()
    assert (tmp_path / "run" / "checkpoints" / "T2").is_dir()


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_a_run_under_way_may_get_other_lengths(tmp_path: Path, algo: str) -> None:
    """Stages to come end as in a run that began so; the stage under way ends where it is told to now."""
    begun = session_in(tmp_path / "whole", algo, prune_steps=768)
    begun.run()
    session = session_in(tmp_path / "run", algo)
    run_until(session, 300)
    session = resume_run(RunFolder(tmp_path / "run"), device="cpu")
    change_run(session, {"prune_steps": 768, "video_episodes": 1})
    resume_run(RunFolder(tmp_path / "run"), device="cpu").run()
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    told = read_settings(tmp_path / "run/config.yaml")["provenance"]["changes"]
    assert [line.split(",")[0] for line in told] == ["prune_steps: 512 to 768", "video_episodes: 0 to 1"]

    other = session_in(tmp_path / "longer", algo)
    run_until(other, 300)
    other = resume_run(RunFolder(tmp_path / "longer"), device="cpu")
    with pytest.raises(UserError, match=r"agent_steps = \d+: the stage at T=3 has spent \d+ already"):
        change_run(other, {"agent_steps": other.model.num_timesteps - 1})
    change_run(other, {"agent_steps": 2048})
    assert other.model.exploration_progress() == pytest.approx(1 - other.model.num_timesteps / 2048)
    other.run()
    ends = {row["timesteps"]: row["agent_steps"] for row in other.rows}
    assert (ends[3], ends[2]) == (2048, 2048 + 512)
    with pytest.raises(UserError, match="cannot change where training is finished"):
        change_run(other, {"agent_steps": 4096})
    change_run(other, {"video_episodes": 2})
    with pytest.raises(UserError, match=r"learning_rate = 0\.1: cannot change in a run under way"):
        change_run(other, {"learning_rate": 0.1})


def test_a_run_whose_relu_network_is_under_way_may_get_other_lengths(tmp_path: Path) -> None:
    session = session_in(tmp_path / "run", "pqn", ann_steps=1536)
    assert session.ann is not None
    run_until(session.ann, 300)
    session = resume_run(RunFolder(tmp_path / "run"), device="cpu")
    change_run(session, {"agent_steps": 1792, "threads": 2})
    (first, _) = read_settings(tmp_path / "run/config.yaml")["provenance"]["changes"]
    assert "agent_steps: 1536 to 1792, relu after " in first
    session = resume_run(RunFolder(tmp_path / "run"), device="cpu")
    assert session.ann is not None
    assert session.ann.config.threads == session.config.threads == 2
    change_run(session, {"threads": 1})  # two would wait for each other beside other tests
    session.run()
    ends = {row["timesteps"]: row["agent_steps"] for row in session.rows}
    assert ends == {None: 1536, 3: 1536 + 1792, 2: 1536 + 1792 + 512}


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors", "last_obs.npy", "replay/rewards.npy"])
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, file: str) -> None:
    session = session_in(tmp_path / "run", "dqn")
    session.deadline = time.monotonic()
    with pytest.raises(Interrupted):
        session.run()
    target = tmp_path / "run" / "resume" / file
    target.write_bytes(target.read_bytes()[:-7])
    with pytest.raises(UserError, match=os.path.basename(file)):
        resume_run(RunFolder(tmp_path / "run"), device="cpu")


@pytest.mark.parametrize(("algo", "stateful"), [("pqn", False), ("pqn", True), ("dqn", False), ("dqn", True)])
def test_a_saved_atari_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, algo: str, stateful: bool) -> None:
    """Emulators cannot be saved, so the run that goes on begins new games at the same point."""
    settings = {
        "env": f"ALE/Pong-v5?frame_stack={1 if stateful else 2}",
        "timesteps": 1,
        "num_envs": 2,
        "stateful": stateful,
    }
    if algo == "dqn":
        settings |= {"learning_starts": 40, "train_freq": 16, "gradient_steps": 1, "buffer_size": 400, "batch_size": 8}
        settings |= {"burn_in": 2, "sequence_length": 4, "target_update_interval": 32}
    else:
        settings |= {"n_steps": 8, "n_minibatches": 2, "n_epochs": 1}
    config = replace_settings(load_recipe("pong", algo)[1], settings)
    model, resumed = build_model(config, "cpu"), build_model(config, "cpu")
    if algo == "pqn":
        model.calibration_steps = resumed.calibration_steps = 32
    # No point is scored in so few steps: values that are not zero give the learner something to do.
    torch.nn.init.normal_(model.policy.q_net.network.readout.weight)
    model.learn(96)
    save_training_state(tmp_path / "resume", model, {})
    model.learn(48, reset_num_timesteps=False)
    torch.manual_seed(1)
    np.random.seed(1)
    load_training_state(tmp_path / "resume", resumed)
    resumed.learn(48, reset_num_timesteps=False)
    ends = [model.policy.state_dict(), resumed.policy.state_dict()]
    before = saved_tensors(tmp_path / "resume")
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
    assert any(not torch.equal(before[f"policy.{name}"], tensor) for name, tensor in ends[0].items())


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((folder / "tensors.safetensors").read_bytes())
