"""Learners that are saved, loaded, moved and set to learn on are those that they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from spiking_rl.agents import SpikingDQN, SpikingPQN, evaluate, load_agent, prune, record, train
from spiking_rl.agents.filming import film
from spiking_rl.agents.frame_replay import FrameReplayBuffer
from spiking_rl.envs import make_vectorised
from spiking_rl.errors import UserError

SMALL: dict[str, Any] = {"timesteps": 1, "network_kwargs": {"hidden": [8]}}
QUICK: dict[str, Any] = {
    "hidden": [8],
    "eval_every": 512,
    "eval_episodes": 1,
    "report_episodes": 0,
    "video_episodes": 0,
}


def dqn(**options: Any) -> SpikingDQN:
    options = {"learning_starts": 50, "buffer_size": 500, "policy_kwargs": SMALL, "seed": 0, **options}
    return SpikingDQN("MlpPolicy", options.pop("env", "CartPole-v1"), **options)


def pqn(**options: Any) -> SpikingPQN:
    options = {"calibration_steps": 64, "policy_kwargs": SMALL, "seed": 0, **options}
    return SpikingPQN("MlpPolicy", options.pop("env", "CartPole-v1"), **options)


class Watching(BaseCallback):
    """Notes something of the model at the beginning of every rollout."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what, self.seen = what, []  # type: ignore[var-annotated]

    def _on_rollout_start(self) -> None:
        self.seen.append(self.what(self.model))

    def _on_step(self) -> bool:
        return True


def test_a_checkpoint_keeps_how_its_agent_learned(tmp_path: Path) -> None:
    dqn(learning_rate=3e-4, train_freq=(7, "step"), tau=0.5).save_checkpoint(tmp_path / "a", environment="CartPole-v1")
    again = SpikingDQN.load_checkpoint(tmp_path / "a", env=gym.make("CartPole-v1"))
    assert again.lr_schedule(1.0) == again.lr_schedule(0.0) == 3e-4
    assert (again.train_freq.frequency, again.tau) == (7, 0.5)  # type: ignore[union-attr]
    pqn(learning_rate=lambda left: 1e-4 + 1e-3 * left).save_checkpoint(tmp_path / "b", environment="CartPole-v1")
    loaded = load_agent(tmp_path / "b").model
    assert [loaded.lr_schedule(left) for left in (1.0, 0.5, 0.0)] == pytest.approx([1.1e-3, 6e-4, 1e-4])


def test_numbers_of_numpy_are_saved(tmp_path: Path) -> None:
    model = pqn(gamma=np.float32(0.5), policy_kwargs={"timesteps": 1, "network_kwargs": {"hidden": [np.int64(8)]}})
    model.save_checkpoint(tmp_path / "agent", environment="CartPole-v1")
    config = json.loads((tmp_path / "agent" / "config.json").read_text())
    assert (config["hyperparameters"]["gamma"], config["policy"]["network_kwargs"]["hidden"]) == (0.5, [8])


@pytest.mark.parametrize("stateful", [False, True])
def test_a_loaded_agent_waits_for_as_much_play_as_a_new_one(tmp_path: Path, stateful: bool) -> None:
    model = dqn(stateful=stateful, learning_starts=100).learn(200)
    model.save_checkpoint(tmp_path / "agent", environment="CartPole-v1")
    again = SpikingDQN.load_checkpoint(tmp_path / "agent", env=gym.make("CartPole-v1"))
    watching = Watching(lambda m: (m.replay_buffer.size(), m._n_updates))
    again.learn(160, watching, reset_num_timesteps=False)
    assert {updates for size, updates in watching.seen if size < 100} == {0}
    assert again._n_updates > 5


def test_a_second_call_of_learn_explores_from_the_beginning() -> None:
    watching = Watching(lambda model: model.exploration_progress())
    model = pqn().learn(512)
    model.learn(512, watching)
    assert watching.seen[0] == 1.0


def test_exploration_may_be_at_its_end_from_the_beginning() -> None:
    model = pqn(exploration_fraction=0.0)
    watching = Watching(lambda model: model.exploration_rate)
    model.learn(512, watching)
    assert watching.seen[2:] == [0.05] * (len(watching.seen) - 2) != []  # the first is random play


@pytest.mark.parametrize(("envs", "asked"), [(9, 4), (5, 4), (3, 64)])
def test_there_are_as_many_minibatches_as_asked_for(envs: int, asked: int) -> None:
    stateful = asked <= envs
    model = pqn(env=make_vec_env("CartPole-v1", envs), stateful=stateful, n_minibatches=asked, n_steps=8, n_epochs=1)
    updates, learn_from = [], model.learn_from

    def counted(*args: Any) -> torch.Tensor:
        updates.append(args)
        return learn_from(*args)

    model.learn_from = counted  # type: ignore[method-assign, assignment]
    rollouts = Watching(lambda model: None)
    model.learn(64 * envs, rollouts)
    made = asked if stateful else min(asked, 8 * envs)
    trained = len(rollouts.seen) - 1  # the first is random play, to calibrate on
    assert len(updates) == model._n_updates == trained * made > 0


@pytest.mark.parametrize("algo", ["pqn", "dqn"])
@pytest.mark.parametrize("stateful", [False, True])
def test_observations_that_are_numbers(algo: str, stateful: bool) -> None:
    make = pqn if algo == "pqn" else dqn
    options = {"n_minibatches": 2} if algo == "pqn" else {}
    model = make(env=make_vec_env("FrozenLake-v1", 3), stateful=stateful, **options)
    model.learn(600)
    assert model._n_updates > 0
    assert 0 <= evaluate(model, "FrozenLake-v1", episodes=3).mean_return <= 1


def test_a_converted_agent_may_see_numbers() -> None:
    model = train("FrozenLake-v1", timesteps=1, prune_to=1, ann_steps=600, agent_steps=600, **QUICK)
    assert model.policy.q_net.network.spiking


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_epochs", 0), ("n_minibatches", 0), ("n_steps", -1), ("exploration_repeat", 0.5), ("lam", 7.0), ("gamma", 3.0)],
)
def test_settings_out_of_range_are_named_when_a_learner_is_made(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} = {value}"):
        pqn(**{name: value})
    if name in ("n_steps", "exploration_repeat", "gamma"):
        with pytest.raises(UserError, match=f"{name} = {value}"):
            dqn(**{name: value})


@pytest.mark.parametrize("make", [pqn, dqn])
def test_options_that_contradict_are_refused(make: Any) -> None:
    with pytest.raises(UserError, match="stateful"):
        make(stateful=True, policy_kwargs={**SMALL, "stateful": False})


def test_options_of_a_replay_that_has_others_are_refused() -> None:
    with pytest.raises(UserError, match="replay_buffer_kwargs"):
        dqn(stateful=True, replay_buffer_kwargs={"handle_timeout_termination": False})
    with pytest.raises(UserError, match="optimize_memory_usage"):
        dqn(stateful=True, optimize_memory_usage=True)


def test_a_zip_may_be_loaded_with_other_returns_and_with_its_own_options(tmp_path: Path) -> None:
    for make in (pqn, dqn):
        make().save(tmp_path / "model")
        type(make()).load(tmp_path / "model", policy_kwargs=SMALL)
    again = SpikingDQN.load(tmp_path / "model", env=gym.make("CartPole-v1"), n_steps=5)
    assert (again.n_steps, again.replay_buffer.n_steps) == (5, 5)  # type: ignore[union-attr]


def test_a_zip_of_games_may_be_loaded_with_other_returns(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    games = make_vectorised("ALE/Pong-v5?frame_stack=2", 1, 0)
    SpikingDQN("CnnPolicy", games, n_steps=3, buffer_size=100, policy_kwargs={"timesteps": 1}).save(tmp_path / "model")
    again = SpikingDQN.load(tmp_path / "model", env=games, n_steps=5)
    assert isinstance(again.replay_buffer, FrameReplayBuffer)
    assert again.replay_buffer.n_steps == 5
    assert not [w for w in recwarn if "n_steps" in str(w.message)]
    with pytest.raises(UserError, match="replay_buffer_kwargs"):
        SpikingDQN("CnnPolicy", games, n_steps=3, replay_buffer_kwargs={"n_steps": 2}, policy_kwargs={"timesteps": 1})


def test_games_go_on_where_a_callback_ended_learning() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 40

    games = make_vectorised("ALE/Pong-v5?frame_stack=2", 1, 0)
    model = SpikingDQN("CnnPolicy", games, learning_starts=500, buffer_size=200, policy_kwargs={"timesteps": 1})
    model.learn(100, Stop())
    model.learn(20, reset_num_timesteps=False)
    assert model.replay_buffer is not None
    assert model.replay_buffer.size() == 60


def test_a_replay_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = dqn(stateful=True, sequence_length=16).learn(60)
    model.save_replay_buffer(tmp_path / "replay")
    with pytest.raises(UserError, match="has span 25, this agent 17"):
        dqn(stateful=True, sequence_length=8).load_replay_buffer(tmp_path / "replay")
    wider = dqn(stateful=True, policy_kwargs={"timesteps": 1, "network_kwargs": {"hidden": [9]}})
    with pytest.raises(UserError, match="8 neurons, this agent 9"):
        wider.load_replay_buffer(tmp_path / "replay")
    dqn(n_steps=3, gamma=0.9).save_replay_buffer(tmp_path / "returns")
    with pytest.raises(UserError, match="has n_steps 3, this agent 5"):
        dqn(n_steps=5, gamma=0.9).load_replay_buffer(tmp_path / "returns")
    model.save_checkpoint(tmp_path / "agent", environment="CartPole-v1")
    with pytest.raises(UserError, match="loaded to play"):
        load_agent(tmp_path / "agent").model.load_replay_buffer(tmp_path / "replay")  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [pqn, dqn])
def test_an_agent_loaded_to_play_takes_any_number_of_environments(tmp_path: Path, make: Any) -> None:
    make().learn(200).save_checkpoint(tmp_path / "agent", environment="CartPole-v1")
    model = load_agent(tmp_path / "agent").model
    seen = torch.randn(20, 4)
    before = model.policy.q_net(seen)
    model.set_env(make_vec_env("CartPole-v1", 4))
    assert torch.equal(model.policy.q_net(seen), before)
    model.learn(400)
    assert model._n_updates > 0
    with pytest.raises(AssertionError):
        model.set_env(make_vec_env("CartPole-v1", 3))  # as in Stable-Baselines3


def test_observations_behind_a_wrapper_that_scales_are_not_taken_for_others(tmp_path: Path) -> None:
    scaled = VecNormalize(make_vec_env("CartPole-v1", 1))
    model = pqn(env=scaled, policy_kwargs={**SMALL, "timesteps": 2}).learn(200)
    for use in (
        lambda: evaluate(model, "CartPole-v1", episodes=1),
        lambda: record(model, "CartPole-v1", decisions=1),
        lambda: film(model, "CartPole-v1", tmp_path / "film.mp4"),
        lambda: prune(model, "CartPole-v1", to=1),
    ):
        with pytest.raises(UserError, match="VecNormalize"):
            use()
    remembering = dqn(stateful=True)
    with pytest.raises(UserError, match="VecNormalize"):
        remembering.set_env(VecNormalize(make_vec_env("CartPole-v1", 1)))


def test_recording_refuses_other_spaces() -> None:
    with pytest.raises(UserError, match="env = 'Acrobot-v1': has other spaces"):
        record(pqn(), "Acrobot-v1")


def pruned(model: Any, tmp_path: Path, **settings: Any) -> dict[str, torch.Tensor]:
    model.save_checkpoint(tmp_path / "before", environment="CartPole-v1")
    again = load_agent(tmp_path / "before").model
    quick = {name: value for name, value in QUICK.items() if name != "hidden"}
    weights = prune(again, "cartpole", agent_steps=512, num_envs=4, **quick, **settings).policy.q_net.state_dict()
    return {name: tensor.clone() for name, tensor in weights.items()}


def test_pruning_is_decided_by_its_seed(tmp_path: Path) -> None:
    model = pqn(policy_kwargs={**SMALL, "timesteps": 2}).learn(256)
    torch.manual_seed(1)
    first = pruned(model, tmp_path, seed=5)
    torch.manual_seed(2)
    second = pruned(model, tmp_path, seed=5)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_whose_settings_would_make_another_agent_is_not_kept(tmp_path: Path) -> None:
    two = {**SMALL, "timesteps": 2}
    for model, named in (
        (pqn(policy_kwargs={**two, "optimizer_class": torch.optim.Adam}), "optimizer_class"),
        (dqn(policy_kwargs=two, tau=0.5), "tau"),
    ):
        with pytest.raises(UserError, match=f"run = .*{named}"):
            prune(model, "CartPole-v1", run=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_run_keeps_how_its_model_learns(tmp_path: Path) -> None:
    model = dqn(policy_kwargs={**SMALL, "timesteps": 2}, train_freq=16, learning_rate=2e-4).learn(100)
    quick = {name: value for name, value in QUICK.items() if name != "hidden"}
    prune(model, "CartPole-v1", agent_steps=512, run=tmp_path / "run", **quick)
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "train_freq: 16\n" in text
    assert "learning_rate: 0.0002\n" in text


def test_coded_inputs_are_recorded_too() -> None:
    coded = {
        "timesteps": 3,
        "network_kwargs": {"hidden": [8], "encoding": "hybrid", "single_spike": True, "kappa": 0.5},
    }
    play = record(pqn(policy_kwargs=coded), "CartPole-v1", decisions=5)
    assert play.spikes["input"].shape == (5, 3, 4)
    assert play.potentials.keys() == {"layer1"}


def test_what_is_no_id_and_what_is_called_otherwise_is_told() -> None:
    with pytest.raises(UserError, match="name the environment by its id"):
        train(gym.make("CartPole-v1"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="agent_steps"):
        train("CartPole-v1", total_timesteps=100)


@pytest.mark.parametrize("make", [pqn, dqn])
def test_codes_carry_no_membranes(make: Any) -> None:
    with pytest.raises(UserError, match="encoding = 'hybrid'"):
        make(stateful=True, policy_kwargs={"network_kwargs": {"encoding": "hybrid"}})
