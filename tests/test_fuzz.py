"""Files that strangers made: whatever is in them, an agent loads or one clear error comes, soon and within memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hostile import ABSURD, bounded, changed, clear, few, places
from hypothesis import given
from hypothesis import strategies as st

from spiking_rl import UserError
from spiking_rl.agents import SpikingPQN, load_agent
from spiking_rl.agents.config import TrainConfig, load_config, load_recipe, save_config
from spiking_rl.checkpoint import CONFIG, WEIGHTS


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agents")
    for name, stateful in (("stateless", False), ("stateful", True)):
        kwargs = {"timesteps": 2, "network_kwargs": {"hidden": [8, 8]}}
        model = SpikingPQN(
            "MlpPolicy", "CartPole-v1", n_minibatches=1, stateful=stateful, policy_kwargs=kwargs, seed=0, device="cpu"
        )
        model.save_checkpoint(folder / name, environment="CartPole-v1")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for a trainer that might be replacing the checkpoint: there is none."""
    monkeypatch.setattr("spiking_rl.checkpoint.time.sleep", lambda seconds: None)


def attempt(folder: Path) -> bool:
    """Load and play one decision; tell whether it came so far. Anything but a UserError is a failure."""
    with bounded():
        try:
            model = load_agent(folder, device="cpu").model
            model.predict(np.zeros(model.observation_space.shape or (), model.observation_space.dtype))
        except UserError as error:
            clear(error)
            return False
    return True


def with_hash(folder: Path, blob: bytes, config: dict[str, Any]) -> None:
    (folder / WEIGHTS).write_bytes(blob)
    (folder / CONFIG).write_text(json.dumps({**config, "sha256": hashlib.sha256(blob).hexdigest()}))


@few
@given(st.data())
def test_absurd_settings_in_a_checkpoint(agents: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("case") / "agent"
    shutil.copytree(agents / data.draw(st.sampled_from(["stateless", "stateful"])), folder)
    config = json.loads((folder / CONFIG).read_text())
    path = data.draw(st.sampled_from(list(places(config))))
    config = changed(config, path, data.draw(st.sampled_from(ABSURD)))
    (folder / CONFIG).write_text(json.dumps(config))
    attempt(folder)


@few
@given(st.data())
def test_damaged_weights_whose_hash_fits(agents: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("case") / "agent"
    shutil.copytree(agents / "stateless", folder)
    config = json.loads((folder / CONFIG).read_text())
    blob = bytearray((folder / WEIGHTS).read_bytes())
    length = int.from_bytes(blob[:8], "little")
    kind = data.draw(st.sampled_from(["cut", "flip", "header", "length", "noise"]))
    if kind == "cut":
        blob = blob[: data.draw(st.integers(0, len(blob)))]
    elif kind == "flip":
        for place in data.draw(st.lists(st.integers(0, 8 * min(len(blob), length + 64) - 1), min_size=1, max_size=5)):
            blob[place // 8] ^= 1 << place % 8
    elif kind == "header":
        header = json.loads(blob[8 : 8 + length])
        path = data.draw(st.sampled_from(list(places(header))))
        encoded = json.dumps(changed(header, path, data.draw(st.sampled_from(ABSURD)))).encode()
        blob = bytearray(len(encoded).to_bytes(8, "little") + encoded + blob[8 + length :])
    elif kind == "length":
        blob[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    else:
        blob = bytearray(data.draw(st.binary(max_size=300)))
    with_hash(folder, bytes(blob), config)
    attempt(folder)


@few
@given(st.data())
def test_absurd_settings_of_a_run(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("case") / "config.yaml"
    save_config(path, load_recipe(data.draw(st.sampled_from(["cartpole", "pong-stateful"])))[1], {})
    values = yaml.safe_load(path.read_text())
    place = data.draw(st.sampled_from(list(places(values))))
    values = changed(values, place, data.draw(st.sampled_from(ABSURD)))
    path.write_text(yaml.safe_dump(values))
    with bounded():
        try:
            config = load_config(path)
            config.check()
        except UserError as error:
            clear(error)
            return
    assert isinstance(config, TrainConfig)


@few
@given(st.binary(max_size=400))
def test_noise_in_place_of_every_file(agents: Path, tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    folder = tmp_path_factory.mktemp("case") / "agent"
    shutil.copytree(agents / "stateless", folder)
    (folder / CONFIG).write_bytes(noise)
    assert not attempt(folder)
    (folder / "config.yaml").write_bytes(noise)
    with bounded(), pytest.raises(UserError):
        load_config(folder / "config.yaml")


def test_what_was_not_touched_loads(agents: Path) -> None:
    assert attempt(agents / "stateless")
    assert attempt(agents / "stateful")


@pytest.mark.parametrize(
    "wanted",
    [
        {"timesteps": 10**9},
        {"network_kwargs": {"hidden": [30_000, 30_000]}},
        {"network_kwargs": {"hidden": [8] * 100_000}},
        {"network": "nature_cnn", "network_kwargs": {"features": 10**6}},
        {"network": "vgg16", "network_kwargs": {"width": 16}},
        {"stateful": True, "network_kwargs": {"hidden": [8, 8], "time_constants": [1e-300, 1e300]}},
    ],
    ids=str,
)
def test_settings_that_agree_with_each_other_and_ask_for_too_much(agents: Path, tmp_path: Path, wanted: Any) -> None:
    folder = tmp_path / "agent"
    shutil.copytree(agents / "stateless", folder)
    config = json.loads((folder / CONFIG).read_text())
    config["policy"] |= wanted
    config["timesteps"] = config["policy"]["timesteps"]
    if config["policy"]["network"] != "mlp":
        pixels = {"type": "Box", "shape": [3, 64, 64], "dtype": "uint8", "low": 0, "high": 255}
        config["observation_space"] = pixels
    (folder / CONFIG).write_text(json.dumps(config))
    assert not attempt(folder)
