"""`spiking-rl export --format onnx`: what ONNX Runtime then does is what the agent does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import Cli, last_json
from numpy.typing import NDArray

import spiking_rl.envs  # noqa: F401  registers masked CartPole
from spiking_rl.agents import load_agent
from spiking_rl.envs.make import make_vectorised
from spiking_rl.scripts import main

Array = NDArray[np.generic]


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def episode(env_id: str, seed: int, decide: Callable[[Array, bool], int]) -> list[int]:
    """Play an episode and return its actions."""
    env = gym.make(env_id)
    observation, _ = env.reset(seed=seed)
    actions, over = [], False
    while not over:
        actions.append(decide(observation, not actions))
        observation, _, terminated, truncated, _ = env.step(actions[-1])
        over = terminated or truncated
    return actions


def test_cartpole_plays_the_same_games(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "new" / "cartpole.onnx"
    done = cli("export", "cartpole", "--format", "onnx", "--output", path, "--json")
    assert done.returncode == 0, done.stderr
    said = last_json(done.stdout)
    assert said["file"] == str(path)
    assert said["timesteps"] == 1
    assert (said["inputs"], said["outputs"]) == (["observation"], ["q_values"])
    onnx.checker.check_model(path, full_check=True)
    assert [p.name for p in path.parent.iterdir()] == ["cartpole.onnx"]
    session, model = session_of(path), load_agent("cartpole", device="cpu").model

    def exported(observation: Array, _: bool) -> int:
        (values,) = session.run(["q_values"], {"observation": observation[None]})
        return int(values.argmax())

    def own(observation: Array, _: bool) -> int:
        return int(model.predict(observation, deterministic=True)[0])

    for seed in range(20_000_000, 20_000_003):
        actions = episode("CartPole-v1", seed, exported)
        assert actions == episode("CartPole-v1", seed, own)
        assert len(actions) == 500


def test_a_stateful_agent_plays_the_same_games_with_its_membranes(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "masked.onnx"
    done = cli("export", "cartpole-masked", "--format", "onnx", "--output", path)
    assert done.returncode == 0, done.stderr
    session, model = session_of(path), load_agent("cartpole-masked", device="cpu").model
    shapes = {v.name: [1, *v.shape[1:]] for v in session.get_inputs() if v.name.startswith("membrane")}
    membranes = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}  # zeroed at the start
    state = None

    def exported(observation: Array, opens: bool) -> int:
        feed = {"observation": observation[None], "episode_start": np.array([opens]), **membranes}
        found = dict(zip([v.name for v in session.get_outputs()], session.run(None, feed), strict=True))
        membranes.update({name: found[f"{name}_after"] for name in membranes})
        return int(found["q_values"].argmax())

    def own(observation: Array, opens: bool) -> int:
        nonlocal state
        action, state = model.predict(observation, state, np.array([opens]), deterministic=True)
        return int(action)

    for seed in (20_000_000, 20_000_001):
        actions = episode("spiking_rl/CartPoleMasked-v1", seed, exported)
        assert actions == episode("spiking_rl/CartPoleMasked-v1", seed, own)
        assert len(actions) > 300


def test_pong_decides_the_same_on_real_frames(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "pong.onnx"
    done = cli("export", "pong", "--format", "onnx", "--output", path)
    assert done.returncode == 0, done.stderr
    agent = load_agent("pong", device="cpu")
    venv = make_vectorised(agent.environment, 4, seed=5)
    frames = [venv.reset()]
    for _ in range(60):
        frames.append(venv.step(agent.model.predict(frames[-1], deterministic=True)[0])[0])
    venv.close()
    seen = np.concatenate(frames)
    assert seen.dtype == np.uint8
    with torch.no_grad():
        expected = agent.model.policy.q_net(torch.as_tensor(seen)).numpy()
    (values,) = session_of(path).run(None, {"observation": seen})
    np.testing.assert_allclose(values, expected, atol=1e-4)
    assert np.array_equal(values.argmax(1), expected.argmax(1))
    assert len(np.unique(expected.argmax(1))) > 2
    facts = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert facts["environment"] == agent.environment
    assert len(facts["sha256"]) == 64


def test_a_run_at_more_timesteps(cli: Cli, small_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "agent.onnx"
    done = cli("export", small_run, "--format", "onnx", "--timesteps", 3, "--output", path)
    assert done.returncode == 0, done.stderr
    q_net = load_agent(small_run, timesteps=3, device="cpu").model.policy.q_net
    seen = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    seen[0] = 1e6  # clipped
    with torch.no_grad():
        expected = q_net(torch.as_tensor(seen)).numpy()
    (values,) = session_of(path).run(None, {"observation": seen})
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_a_zip_is_where_it_is_said_to_be(cli: Cli, tmp_path: Path) -> None:
    done = cli("export", "cartpole", "--output", tmp_path / "agent.v2" / "mine", "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["file"] == str(tmp_path / "agent.v2" / "mine.zip")
    assert [path.name for path in (tmp_path / "agent.v2").iterdir()] == ["mine.zip"]


def test_a_full_disk_leaves_the_older_zip(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    path.write_bytes(b"the older one")
    done = cli("export", "cartpole", "--output", path, file_size=50_000)
    assert done.returncode == 1, done.stderr
    assert "free some space" in done.stderr
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("agent.zip", b"the older one")]


def test_refusals(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    done = cli("export", "cartpole", "--format", "onnx", "--output", tmp_path / "agent.zip")
    assert done.returncode == 2
    assert ".onnx" in done.stderr
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.chdir(tmp_path)
    assert main.run(["export", "cartpole", "--format", "onnx"]) == 2
    assert "pip install 'spiking-rl[export]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
