"""Hyper-parameters for rl_zoo3 fit the algorithms, and the examples run."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import types
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env

from spiking_rl.agents import SpikingMlpPolicy, zoo

ALGOS: dict[str, type[Any]] = {"a2c": A2C, "dqn": DQN, "ppo": PPO, "qrdqn": QRDQN}
EXAMPLES = Path(__file__).parents[2] / "examples"
ZOO_ONLY = {"n_timesteps", "n_envs", "policy"}
"""Keys that rl_zoo3 takes for itself."""


def settings_of(algo: str) -> dict[str, dict[str, Any]]:
    text = resources.files(zoo).joinpath(f"{algo}.yml").read_text()
    loaded = yaml.safe_load(text)
    assert isinstance(loaded, dict)
    return loaded


def test_every_algorithm_with_a_spiking_policy_has_settings() -> None:
    files = {p.name for p in resources.files(zoo).iterdir() if p.name.endswith(".yml")}
    assert files == {f"{algo}.yml" for algo in ALGOS} == {f"{algo}.yml" for algo in zoo.POLICIES}


@pytest.mark.parametrize("algo", ALGOS)
def test_settings_build_the_algorithm(algo: str) -> None:
    kind = zoo.algorithms(ALGOS)[algo]
    settings = settings_of(algo)["CartPole-v1"]
    known = inspect.signature(ALGOS[algo]).parameters
    assert set(settings) - set(known) <= ZOO_ONLY
    assert int(settings["n_timesteps"]) > 0
    rest = {k: v for k, v in settings.items() if k not in ZOO_ONLY}
    rest["policy_kwargs"] = eval(rest["policy_kwargs"], {"dict": dict})
    for name in ("learning_rate", "clip_range"):
        if isinstance(rest.get(name), str):
            kind_of_schedule, start = rest[name].split("_")
            assert kind_of_schedule == "lin"
            rest[name] = float(start)
    env = make_vec_env("CartPole-v1", settings.get("n_envs", 1))
    model = kind(settings["policy"], env, device="cpu", seed=0, **rest)
    assert model.policy.timesteps == 4
    assert isinstance(model, ALGOS[algo])


def test_names_are_added_to_subclasses_only() -> None:
    made = zoo.algorithms({"dqn": DQN})
    assert list(made) == ["dqn"]
    assert made["dqn"].policy_aliases["SpikingMlpPolicy"] is SpikingMlpPolicy
    assert made["dqn"].policy_aliases["MlpPolicy"] is DQN.policy_aliases["MlpPolicy"]
    assert "SpikingMlpPolicy" not in DQN.policy_aliases


def test_the_plugin_registers_with_rl_zoo3_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    # rl_zoo3 is no dependency: these stand for its modules.
    trained: list[bool] = []
    package, train, utils = (types.ModuleType(f"rl_zoo3{m}") for m in ("", ".train", ".utils"))
    train.train = lambda: trained.append(True)  # type: ignore[attr-defined]
    utils.ALGOS = dict(ALGOS)  # type: ignore[attr-defined]
    for module in (package, train, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    source = (EXAMPLES / "rl_zoo3_plugin.py").read_text()
    exec(compile(source, "rl_zoo3_plugin.py", "exec"), {"__name__": "__main__"})
    assert trained == [True]
    assert all("SpikingMlpPolicy" in kind.policy_aliases for kind in utils.ALGOS.values())  # type: ignore[attr-defined]


def run(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs() -> None:
    assert "after 1100 agent steps, T=4: " in run(sys.executable, str(EXAMPLES / "stock_dqn.py"), "1100")


def test_the_stateful_example_runs() -> None:
    assert "after 1500 agent steps: return " in run(sys.executable, str(EXAMPLES / "stateful.py"), "1500")


def test_the_example_of_continuous_actions_runs() -> None:
    told = run(sys.executable, str(EXAMPLES / "continuous.py"), "300", "0", "1")
    assert re.search(r"Pendulum-v1 after \d+ agent steps, T=1: -\d+", told)


def test_agents_import_without_sb3_contrib() -> None:
    run(sys.executable, "-c", "import sys; sys.modules['sb3_contrib'] = None; import spiking_rl.agents.zoo")
