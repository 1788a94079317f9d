"""Learners on Atari games: calibration, cuts and refusals; what they learn is measured elsewhere."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch

from spiking_rl import UserError
from spiking_rl.agents import SpikingDQN, SpikingPQN, evaluate, load_agent
from spiking_rl.agents.building import build_model
from spiking_rl.agents.config import load_recipe
from spiking_rl.agents.frame_replay import FrameReplayBuffer
from spiking_rl.agents.replay import SequenceReplay
from spiking_rl.agents.resume import load_training_state, save_training_state
from spiking_rl.agents.training import replace_settings, start_run
from spiking_rl.envs import make_vectorised
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.train import _go_on


@pytest.mark.parametrize("name", ["pong", "pong-stateful"])
def test_calibration_on_more_images_than_it_needs(name: str) -> None:
    """65 observations of 16 games, as the recipes see them: whole sequences for a memory."""
    config = replace_settings(load_recipe(name)[1], {"timesteps": 1})
    model = build_model(config, "cpu")
    stack = model.observation_space.shape[0]
    images = torch.randint(0, 256, (65, 16, stack, 84, 84), dtype=torch.uint8)
    starts = torch.zeros(65, 16, dtype=torch.bool)
    starts[0] = True
    model.calibrate(images, starts)
    rates: dict[str, float] = {}
    q_net = model.policy.q_net
    with torch.no_grad():
        few, opens = images[:, :2], starts[:, :2]
        if model.stateful:
            state = q_net.network.initial_state(2)
            inputs = q_net.features(few.flatten(0, 1)).reshape(65, 2, stack, 84, 84)
            q_net.network(inputs, state, opens, observer=lambda layer, s, _: rates.update({layer: float(s.mean())}))
        else:
            q_net.q_values(few.flatten(0, 1), observer=lambda layer, s, _: rates.update({layer: float(s.mean())}))
    assert len(rates) == 4
    assert all(0.1 < rate < 0.3 for rate in rates.values()), rates


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("new_games", ["learn", "set_env"])
def test_games_that_begin_anew_are_no_sequel(stateful: bool, new_games: str) -> None:
    """A second learn, or another environment: stacks, returns and membranes do not run across."""
    env_id = f"ALE/Pong-v5?frame_stack={1 if stateful else 4}"
    kwargs = {"burn_in": 1, "sequence_length": 2} if stateful else {}
    model = SpikingDQN(
        "CnnPolicy",
        make_vectorised(env_id, 2, 0),
        stateful=stateful,
        buffer_size=200,
        learning_starts=10_000,
        n_steps=2,
        policy_kwargs={"timesteps": 1},
        seed=0,
        device="cpu",
        **kwargs,
    )
    model.learn(8)
    if new_games == "set_env":
        model.set_env(make_vectorised(env_id, 2, 5))
        model.learn(8, reset_num_timesteps=False)
    else:
        model.learn(8)
    replay = model.replay_buffer
    assert isinstance(replay, SequenceReplay if stateful else FrameReplayBuffer)
    assert replay.written.tolist() == [9, 9], "four decisions, where they were left, four decisions"
    assert replay.starts[:9].any(1).tolist() == [True, *[False] * 4, True, *[False] * 3]
    assert replay.decisions[:9].all(1).tolist() == [*[True] * 4, False, *[True] * 4]


def test_a_checkpoint_keeps_n_and_loads_with_frames_kept_once(tmp_path: Path) -> None:
    config = replace_settings(load_recipe("pong", "dqn")[1], {"timesteps": 1, "return_steps": 3, "num_envs": 2})
    model = build_model(config, "cpu")
    assert isinstance(model.replay_buffer, FrameReplayBuffer)
    assert model.replay_buffer.n_steps == model.n_steps == 3
    model.save_checkpoint(tmp_path / "agent", environment=config.env)
    again = SpikingDQN.load_checkpoint(tmp_path / "agent", env=make_vectorised(config.env, 2, 0))
    assert isinstance(again.replay_buffer, FrameReplayBuffer)
    assert again.replay_buffer.n_steps == again.n_steps == 3


def test_learning_waits_until_there_is_something_to_sample() -> None:
    settings = {"timesteps": 1, "num_envs": 4, "learning_starts": 2, "train_freq": 4, "buffer_size": 400}
    config = replace_settings(load_recipe("pong", "dqn")[1], {**settings, "gradient_steps": 1, "batch_size": 4})
    build_model(config, "cpu").learn(24)


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, config = load_recipe("pong", "dqn")
    with pytest.raises(UserError, match=r"buffer_size.*GiB"):
        start_run(replace_settings(config, {"buffer_size": 10**9}), RunFolder(run), device="cpu")
    with pytest.raises(UserError, match=r"channels last.*ALE/Pong-v5"):
        start_run(replace_settings(config, {"env": "Pong-v4"}), RunFolder(run), device="cpu")
    assert not run.exists()


def test_the_way_to_go_on_can_be_pasted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    session = start_run(replace_settings(load_recipe("pong")[1], {"num_envs": 1}), RunFolder(run), device="cpu")
    told = shlex.split(_go_on(session.folder, session.config))
    assert told == ["spiking-rl", "train", session.config.env, "--run", str(run), "--resume"]
    assert load_recipe(told[2])[0] == "pong"


def test_membranes_of_images_are_saved_and_restored(tmp_path: Path) -> None:
    few = {"timesteps": 1, "num_envs": 2, "n_steps": 8, "n_minibatches": 1, "n_epochs": 1}
    config = replace_settings(load_recipe("pong-stateful")[1], few)
    model = build_model(config, "cpu")
    model.calibration_steps = 8
    model.learn(32)
    save_training_state(tmp_path / "resume", model, {})
    other = build_model(config, "cpu")
    load_training_state(tmp_path / "resume", other)
    assert model.membranes is not None
    assert other.membranes is not None
    for saved, loaded in zip(model.membranes, other.membranes, strict=True):
        assert saved.membrane.abs().max() > 0
        assert torch.equal(saved.membrane, loaded.membrane)


def test_another_action_set_is_told_on_resume(tmp_path: Path) -> None:
    few = {"timesteps": 1, "num_envs": 2, "buffer_size": 200, "learning_starts": 100}
    pong = replace_settings(load_recipe("pong", "dqn")[1], few)
    model = build_model(pong, "cpu")
    model.learn(4)
    save_training_state(tmp_path / "resume", model, {})
    breakout = build_model(dataclasses.replace(pong, env="ALE/Breakout-v5?sticky_actions=0&frame_stack=4"), "cpu")
    with pytest.raises(UserError, match="was saved with other observations or actions; start the run again"):
        load_training_state(tmp_path / "resume", breakout)


def test_a_resumed_dqn_on_images_updates_every_weight_alike(tmp_path: Path) -> None:
    """Moments come back in plain order, convolutions learn in channels-last."""
    few = {"timesteps": 1, "num_envs": 2, "buffer_size": 200, "learning_starts": 40, "batch_size": 4}
    config = replace_settings(load_recipe("pong", "dqn")[1], few)

    def step(learner: SpikingPQN | SpikingDQN) -> list[torch.Tensor]:
        """Take one step along gradients that every call draws alike; return the weights after it."""
        parameters = list(learner.policy.q_net.parameters())
        for i, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        learner.policy.optimizer.param_groups[0]["lr"] = 1e-3
        learner.policy.optimizer.step()
        return [p.detach().clone() for p in parameters]

    model = build_model(config, "cpu")
    model.learn(4)
    before = step(model)
    save_training_state(tmp_path / "resume", model, {})
    other = build_model(config, "cpu")
    load_training_state(tmp_path / "resume", other)
    for old, a, b in zip(before, step(model), step(other), strict=True):
        assert not torch.equal(old, a)
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "frames"), [("pong", 4), ("pong-stateful", 1)])
def test_the_pretrained_agents_win_at_pong_with_one_timestep(name: str, frames: int) -> None:
    agent = load_agent(name, device="cpu")
    assert agent.model.policy.timesteps == 1
    assert agent.model.observation_space.shape == (frames, 84, 84)
    assert agent.model.stateful == (frames == 1)
    assert evaluate(agent.model, agent.environment, episodes=1, measure_latency=False).mean_return >= 15


def test_the_agent_of_single_frames_wins_by_its_memory() -> None:
    agent = load_agent("pong-stateful", device="cpu")
    agent.model.policy.q_net.stateful = False
    assert evaluate(agent.model, agent.environment, episodes=1, measure_latency=False).mean_return < 15
