"""Numbers that go wrong in the middle of a training: it stops, names the cause, and keeps the last good state."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from conftest import COMMAND, SMALL, Cli, as_flags, environment, last_json, write_shades

from spiking_rl import load_checkpoint
from spiking_rl.envs.checked import CheckedEnv
from spiking_rl.errors import WorkError

ENVIRONMENT = '''
import pathlib

import gymnasium as gym
import numpy as np


class Env(gym.Env):
    """Say whether the first number is positive; while there is a file named broken it goes wrong in time."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 20
        self.seen = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.seen, {}

    def step(self, action):
        reward = float(action == (self.seen[0] > 0))
        self.seen = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        self.left -= 1
        Env.steps += 1
        broken = pathlib.Path("broken")
        seen = self.seen
        if Env.steps > 1800 and broken.exists():
            if ALGO == "dqn":
                raise RuntimeError("the motor is gone")
            seen = seen * np.nan
        return seen, reward, False, self.left == 0, {}


gym.register("Frail-v0", entry_point=Env)
'''
SAID = {"dqn": "raised RuntimeError: the motor is gone", "pqn": "an observation with NaN or infinity"}
FLAGS = as_flags({**SMALL, "timesteps": 2, "agent_steps": 2048, "prune_steps": 512, "report_episodes": 0})


@pytest.mark.parametrize("algo", SAID)
def test_a_frail_environment_is_named_and_once_mended_the_run_goes_on(cli: Cli, tmp_path: Path, algo: str) -> None:
    folder = tmp_path
    (folder / "frail.py").write_text(f"ALGO = {algo!r}\n{ENVIRONMENT}")
    train = ("train", "frail:Frail-v0", "--algo", algo, *FLAGS, "--run")
    done = cli(*train, "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "broken").touch()
    broken = cli(*train, "own", cwd=folder)
    (folder / "broken").unlink()
    assert broken.returncode == 1
    last = broken.stderr.strip().splitlines()[-1]
    assert "frail:Frail-v0" in last
    assert SAID[algo] in last
    assert "--resume" in last
    assert "Traceback" not in broken.stderr
    assert (folder / "own" / "resume").is_dir()
    mended = cli(*train, "own", "--resume", cwd=folder)
    assert mended.returncode == 0, mended.stderr
    whole, own = (load_checkpoint(folder / run / "checkpoints" / "T2-end").tensors for run in ("whole", "own"))
    assert whole.keys() == own.keys()
    # The weights are the same bits as where nothing broke.
    assert all((whole[name] == own[name]).all() for name in whole)


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
def test_a_loss_that_is_no_number_stops_the_run(cli: Cli, tmp_path: Path, algo: str) -> None:
    wild = ("--learning-rate", "1e36", "--average-decay", "0")
    done = cli("train", "cartpole", "--algo", algo, *FLAGS, *wild, "--run", tmp_path / "run")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "learning_rate = " in last
    assert "is too high: after" in last
    assert "Traceback" not in done.stderr


def test_a_classifiers_loss_likewise(cli: Cli, tmp_path: Path) -> None:
    data = write_shades(tmp_path / "images", {"train": 40, "test": 4})
    small = {"width": 0.03125, "ann_epochs": 2, "epochs": 0, "ann_batch_size": 8, "ann_learning_rate": 1e30}
    run = tmp_path / "run"
    done = cli("classify", "train", "vgg6", "folder", "--data", data, *as_flags(small), "--no-batch-norm", "--run", run)
    assert done.returncode == 1
    assert "ann_learning_rate = 1e+30: is too high" in done.stderr
    assert not (run / "checkpoints" / "relu").exists()


class Wrong(gym.Env[np.ndarray, int]):
    """Goes wrong at its second step."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, seen: object, reward: object) -> None:
        self.wrong, self.steps = (seen, reward), 0

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(3, np.float32), {}

    def step(self, action: int) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        seen, reward = self.wrong if self.steps == 2 else (np.full(3, 3e38, np.float32), -1e300)
        return seen, reward, False, False, {}


@pytest.mark.parametrize(
    ("seen", "reward", "said"),
    [
        (np.array([0, np.nan, 0], np.float32), 0.0, "NaN or infinity"),
        (np.array([0, 0, -np.inf], np.float32), 0.0, "NaN or infinity"),
        (np.zeros(4, np.float32), 0.0, "of shape (4,), and its space says (3,)"),
        (None, 0.0, "of shape ()"),
        (np.zeros(3, np.float32), float("nan"), "a reward of nan"),
        (np.zeros(3, np.float32), float("-inf"), "a reward of -inf"),
        (np.zeros(3, np.float32), None, "'None' as a reward"),
        (np.zeros(3, np.float32), "much", "'much' as a reward"),
        (np.array(["a", "b", "c"]), 0.0, "which are no numbers"),
        (np.array([None, None, None]), 0.0, "which are no numbers"),
        ([1.0, [2.0], 3.0], 0.0, "of uneven lists"),
    ],
)
def test_what_an_environment_may_not_return(seen: object, reward: object, said: str) -> None:
    env = CheckedEnv(Wrong(seen, reward), "Wrong-v0")
    env.reset()
    env.step(0)  # large, but finite
    with pytest.raises(WorkError) as caught:
        env.step(0)
    assert said in str(caught.value)
    assert "Wrong-v0" in str(caught.value)
    assert "2 steps after a reset" in str(caught.value)


@pytest.mark.parametrize("seen", [9, 0, -1, 1.5, None, "two", float("nan")])
def test_a_number_that_a_discrete_space_lacks(seen: object) -> None:
    env = Wrong(seen, 0.0)
    env.observation_space = gym.spaces.Discrete(4, start=1)
    with pytest.raises(WorkError, match=r"as an observation, which Discrete\(4, start=1\) lacks"):
        CheckedEnv(env, "Wrong-v0")._check(seen)
    for fits in (1, 4, np.int64(2), np.array(3), 2.0):
        CheckedEnv(env, "Wrong-v0")._check(fits)


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ([3, 0], r"'\[3, 0\]' as an observation, which MultiDiscrete\(\[3 2\]\) lacks"),
        ([-1, 0], "lacks"),
        ([0.5, 0], "lacks"),
        ([np.nan, 0], "lacks"),
        ([0, 0, 0], r"of shape \(3,\)"),
        (["a", "b"], "no numbers"),
    ],
)
def test_numbers_that_a_multi_discrete_space_lacks(seen: list[object], said: str) -> None:
    env = Wrong(seen, 0.0)
    env.observation_space = gym.spaces.MultiDiscrete([3, 2])
    with pytest.raises(WorkError, match=said):
        CheckedEnv(env, "Wrong-v0")._check(seen)
    CheckedEnv(env, "Wrong-v0")._check(np.array([2, 1]))


def test_bits_of_another_shape_than_their_space() -> None:
    env = Wrong([0, 1], 0.0)
    env.observation_space = gym.spaces.MultiBinary(3)
    with pytest.raises(WorkError, match=r"of shape \(2,\), and its space says \(3,\)"):
        CheckedEnv(env, "Wrong-v0")._check([0, 1])
    CheckedEnv(env, "Wrong-v0")._check([0, 1, 1])


@pytest.mark.parametrize(
    ("method", "result", "said"),
    [
        ("reset", OSError("no\nmotor"), "raised OSError: no motor, 0 steps"),
        ("reset", np.zeros(3, np.float32), "raised ValueError"),
        ("reset", (np.zeros(2, np.float32), {}), "of shape (2,)"),
        ("reset", (np.full(3, np.nan, np.float32), {}), "NaN"),
        ("step", (np.zeros(3, np.float32), 0.0, True, {}), "raised ValueError"),
        ("step", (np.zeros(3, np.float32), 0.0, True, False, None), "as its info"),
        ("step", None, "raised TypeError"),
    ],
)
def test_what_goes_wrong_in_either_method(
    method: str, result: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object, **options: object) -> object:
        if isinstance(result, Exception):
            raise result
        return result

    env = CheckedEnv(Wrong(np.zeros(3, np.float32), 0.0), "Wrong-v0")
    monkeypatch.setattr(env.env, method, wrong)
    with pytest.raises(WorkError) as caught:
        env.reset() if method == "reset" else env.step(0)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


PICTURE = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        ([NotImplementedError("no\nscreen")], "raised NotImplementedError: no screen in render(), 0 steps"),
        ([None], "of type NoneType"),
        ([[PICTURE]], "of type list"),
        ([PICTURE.astype(np.float64)], "a picture of float64"),
        ([PICTURE[..., 0]], "a picture of uint8, (4, 6);"),
        ([np.zeros((4, 6, 4), np.uint8)], "(4, 6, 4); render() must return an array of uint8, (height, width, 3)"),
        ([PICTURE[:0]], "(0, 6, 3)"),
        ([PICTURE, PICTURE[:2]], "of shape (2, 6, 3) after one of (4, 6, 3)"),
    ],
)
def test_what_an_environment_may_not_draw(pictures: list[object], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> object:
        picture = pictures[env.env.drawn]
        env.env.drawn += 1
        if isinstance(picture, Exception):
            raise picture
        return picture

    env = CheckedEnv(Wrong(np.zeros(3, np.float32), 0.0), "Wrong-v0")
    env.env.drawn, env.env.render_mode = 0, "rgb_array"
    monkeypatch.setattr(env.env, "render", drawn)
    env.reset()
    for _ in pictures[1:]:
        env.render()
    with pytest.raises(WorkError) as caught:
        env.render()
    assert said in str(caught.value)
    assert "Wrong-v0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_training_is_no_worse_for_an_environment_that_cannot_draw(cli: Cli, tmp_path: Path) -> None:
    drawing = "    metadata = {'render_modes': ['rgb_array'], 'render_fps': 30}\n    render_mode = 'rgb_array'\n"
    drawing += "    def __init__(self, render_mode=None):\n        pass\n"
    drawing += "    def render(self):\n        raise RuntimeError('no screen')\n"
    own = ENVIRONMENT.replace("    def reset", f"{drawing}\n    def reset")
    (tmp_path / "frail.py").write_text(f"ALGO = 'pqn'\n{own}")
    flags = as_flags({**SMALL, "timesteps": 1, "prune_to": 1, "agent_steps": 512, "video_episodes": 1})
    done = cli("train", "frail:Frail-v0", *flags, "--run", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["rows"]
    assert "no video: env = 'frail:Frail-v0': raised RuntimeError: no screen in render()" in done.stderr
    done = cli("render", "run", "--env", "frail:Frail-v0", cwd=tmp_path)
    assert done.returncode == 1
    assert "raised RuntimeError: no screen in render()" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="limits file sizes through POSIX")
def test_a_full_disk_is_told_by_classify_too(cli: Cli, tmp_path: Path) -> None:
    data = write_shades(tmp_path / "images", {"train": 40, "test": 4})
    small = {"width": 0.03125, "ann_epochs": 1, "epochs": 0, "ann_batch_size": 8}
    command = ("classify", "train", "vgg6", "folder", "--data", data, *as_flags(small), "--run", tmp_path / "run")
    done = cli(*command, file_size=5000)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "free some space, then go on with --resume" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["agent", "classifier"])
def test_two_runs_at_once_in_one_folder(tmp_path: Path, kind: str) -> None:
    """Begun at the same moment: one of them trains, the other is refused, and neither mixes with the other."""
    if kind == "agent":
        settings: dict[str, object] = {**SMALL, "report_episodes": 0}
        command = ["train", "cartpole", *as_flags(settings)]
    else:
        data = write_shades(tmp_path / "images", {"train": 20, "test": 2})
        small = {"width": 0.03125, "ann_epochs": 1, "epochs": 0, "ann_batch_size": 8}
        command = ["classify", "train", "vgg6", "folder", "--data", str(data), *as_flags(small)]
    started = [
        subprocess.Popen(
            [*COMMAND, *command, "--seed", str(seed), "--run", str(tmp_path / "run")],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    said = [process.communicate(timeout=200)[1] for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 2], said
    winner, loser = codes.index(0), codes.index(2)
    assert "another process" in said[loser] or "is in use already" in said[loser]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == (1, 2)[winner]
