"""A deployed agent acts as the agent that it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from identity_envs import Identity
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy

from spiking_rl import UserError
from spiking_rl.agents import (
    DeployedAgent,
    SpikingActorCriticPolicy,
    SpikingCnnPolicy,
    SpikingMlpPolicy,
    SpikingPQN,
    SpikingQRMlpPolicy,
    evaluate,
    load_agent,
)
from spiking_rl.agents.policies import q_network
from spiking_rl.envs import make_vectorised


def play(agent: Any, env: str, decisions: int, games: int = 4) -> list[np.ndarray]:
    """Return the actions of greedy games side by side, with membranes where the agent has them."""
    games_of = make_vectorised(env, games, seed=5)
    observations, starts, state, actions = games_of.reset(), np.ones(games, dtype=bool), None, []
    try:
        for _ in range(decisions):
            action, state = agent.predict(observations, state, starts, deterministic=True)
            observations, _, starts, _ = games_of.step(action)
            actions.append(action)
    finally:
        games_of.close()
    return actions


@pytest.mark.parametrize(("name", "decisions"), [("cartpole", 600), ("cartpole-masked", 600), ("pong-stateful", 30)])
def test_it_plays_the_same_games(name: str, decisions: int) -> None:
    """Over the ends of episodes."""
    agent = load_agent(name)
    deployed = DeployedAgent(agent.model)
    assert deployed.stateful == agent.model.stateful
    ours, theirs = (play(player, agent.environment, decisions) for player in (deployed, agent.model))
    assert len({tuple(actions) for actions in theirs}) > 1
    np.testing.assert_array_equal(ours, theirs)


def test_sb3_evaluates_it() -> None:
    agent = load_agent("cartpole-masked")
    games = make_vectorised(agent.environment, 3, seed=1)
    deployed: Any = DeployedAgent(agent.model)
    score, _ = evaluate_policy(deployed, games, n_eval_episodes=6, warn=False)
    assert score > 400
    forgetful, _ = evaluate_policy(Forgetful(deployed), games, n_eval_episodes=6, warn=False)  # type: ignore[arg-type]
    assert forgetful < 200, "it needs its membranes"


class Forgetful:
    """Gives no membranes on."""

    def __init__(self, agent: DeployedAgent) -> None:
        self.agent = agent

    def predict(self, observation: np.ndarray, **_: object) -> tuple[np.ndarray, None]:
        return self.agent.predict(observation)[0], None


@pytest.mark.parametrize(("algorithm", "images"), [(DQN, False), (DQN, True), (QRDQN, False)])
def test_policies_in_an_algorithm_of_sb3_too(algorithm: Any, images: bool) -> None:
    """Images ``(H, W, C)``, whose channels SB3 moves to the front; one observation, and a batch."""
    policy = {DQN: SpikingCnnPolicy if images else SpikingMlpPolicy, QRDQN: SpikingQRMlpPolicy}[algorithm]
    options: Any = {"policy_kwargs": {"timesteps": 2}, "buffer_size": 200, "learning_starts": 10, "seed": 0}
    model = algorithm(policy, Identity(images), **options)
    model.learn(200)
    torch.nn.init.normal_(q_network(model).network.readout.weight)
    deployed = DeployedAgent(model)
    draw = np.random.default_rng(0)
    every = draw.integers(0, 256, (50, 36, 36, 1), np.uint8) if images else draw.random((50, 4), np.float32)
    wanted, _ = model.predict(every, deterministic=True)
    actions, membranes = deployed.predict(every)
    assert membranes is None
    assert len(set(wanted)) > 1
    np.testing.assert_array_equal(actions, wanted)
    for one, action in zip(every, wanted, strict=True):
        alone, _ = deployed.predict(one)
        assert alone.shape == ()
        assert alone == action
    with pytest.raises(ValueError, match="Unexpected observation shape"):
        deployed.predict(every[:, :2])


def test_what_is_learned_later_does_not_reach_it() -> None:
    """Neither weights nor the statistics that scale observations."""
    model = SpikingPQN("MlpPolicy", make_vectorised("CartPole-v1", 4, 0), seed=0)
    model.learn(512)
    deployed = DeployedAgent(model)
    observations = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    before = model.predict(observations, deterministic=True)[0]
    model.learn(4096, reset_num_timesteps=False)
    assert (model.predict(observations, deterministic=True)[0] != before).any()
    np.testing.assert_array_equal(deployed.predict(observations)[0], before)


def test_it_stays_on_the_device_of_its_model() -> None:
    """Shown by one that has no values: all that fails is to bring actions back from there."""
    model = load_agent("cartpole", device="cpu").model
    model.policy.to("meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        DeployedAgent(model).predict(np.zeros(4, np.float32))


def test_arrays_of_any_layout_are_taken() -> None:
    agent = DeployedAgent(load_agent("cartpole").model)
    observations = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    mirrored = observations[:, ::-1]
    wanted, _ = agent.predict(mirrored.copy())
    assert len(set(wanted)) == 2
    np.testing.assert_array_equal(agent.predict(mirrored)[0], wanted)
    observations.flags.writeable = False
    agent.predict(observations)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"learning_rate": -1.0}, ValueError),
        ({"policy_kwargs": {"optimizer_kwargs": {"eps": -1.0}}}, ValueError),
        ({"policy_kwargs": {"optimizer_kwargs": {"momentum": 0.9}}}, TypeError),
    ],
)
def test_settings_that_no_optimiser_takes_are_told_at_once(options: dict[str, Any], error: type[Exception]) -> None:
    """Though it is made when it is first needed."""
    with pytest.raises(error):
        DQN(SpikingMlpPolicy, "CartPole-v1", **options)


def test_what_cannot_be_deployed_is_told() -> None:
    relu = SpikingPQN(
        "MlpPolicy", make_vectorised("CartPole-v1", 2, 0), policy_kwargs={"network_kwargs": {"neuron": "relu"}}
    )
    with pytest.raises(UserError, match="no spiking neurons"):
        DeployedAgent(relu)
    with pytest.raises(UserError, match="has no spiking Q-network"):
        DeployedAgent(PPO(SpikingActorCriticPolicy, "CartPole-v1", n_steps=8, batch_size=8))
    assert evaluate(relu, "CartPole-v1", episodes=1).deployed_ms is None
    assert evaluate(load_agent("cartpole").model, "CartPole-v1", episodes=1).deployed_ms is not None
