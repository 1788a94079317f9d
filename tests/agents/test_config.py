"""Settings: recipes, YAML, and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from spiking_rl import UserError
from spiking_rl.agents.config import CONFIGS, load_config, load_recipe, recipes, save_config
from spiking_rl.agents.training import replace_settings


@pytest.mark.parametrize("name", sorted(recipes()))
@pytest.mark.parametrize("algo", sorted(CONFIGS))
def test_every_recipe_is_sound(name: str, algo: str) -> None:
    _, config = load_recipe(name, algo)
    config.check()
    assert config.algo == algo


def test_an_environment_id_finds_its_recipe() -> None:
    assert load_recipe("CartPole-v1") == load_recipe("cartpole")
    short, config = load_recipe("my_module:My/Env-v0")
    assert short == "My-Env-v0"
    assert config.env == "my_module:My/Env-v0"


def test_an_atari_score_stands_beside_the_one_with_other_stickiness() -> None:
    _, pong = load_recipe("pong")
    assert pong.also_reported() == (pong.env.replace("sticky_actions=0&", "sticky_actions=0.25&"),)
    elsewhere = dataclasses.replace(pong, env="ALE/Breakout-v5?frame_stack=3")
    assert elsewhere.also_reported() == ("ALE/Breakout-v5?sticky_actions=0&frame_stack=3",)
    assert dataclasses.replace(pong, report_also=()).also_reported() == ()
    assert load_recipe("cartpole")[1].also_reported() == ()


def test_another_atari_game_gets_the_settings_of_pong() -> None:
    short, config = load_recipe("ALE/Breakout-v5?frame_stack=3")
    _, pong = load_recipe("pong")
    assert short == "breakout-sticky0.25-stack3"
    assert config.env == "ALE/Breakout-v5?sticky_actions=0.25&frame_stack=3"
    assert config.goal is None
    assert dataclasses.replace(config, env=pong.env, goal=pong.goal) == pong
    assert load_recipe("ALE/Pong-v5")[1].goal == pong.goal
    for spelled in ("ALE/Pong-v5?frame_stack=1&sticky_actions=0", "ALE/Pong-v5?sticky_actions=0.0&frame_stack=1"):
        assert load_recipe(spelled) == load_recipe("pong-stateful")
    assert load_recipe("ALE/Pong-v5")[0] != load_recipe("pong")[0], "another game: actions stick"


@pytest.mark.parametrize("algo", sorted(CONFIGS))
def test_a_saved_config_comes_back(tmp_path: Path, algo: str) -> None:
    for goal in (None, 500):
        changes = {"seed": 7, "hidden": [8], "learning_rate": 1, "goal": goal}
        config = replace_settings(load_recipe("cartpole", algo)[1], changes)
        save_config(tmp_path / "config.yaml", config, {"commit": None})
        assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("algo: pqn\nsede: 1\n", ["sede", "seed"]),
        ("algo: pqn\nseed: one\n", ["seed", "one", "int"]),
        ("algo: pqn\nneuron: izhikevich\n", ["neuron", "lif"]),
        ("algo: pqn\nhidden: [1.5]\n", ["hidden"]),
        ("algo: pqn\ngoal: high\n", ["goal", "high", "float"]),
        ("algo: sac\n", ["algo", "sac"]),
        ("- 1\n", ["config"]),
        ("a: [\n", ["config", "YAML"]),
        ("!!python/object/apply:os.system ['true']\n", ["config", "YAML"]),
    ],
)
def test_a_mistake_in_a_config_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "config.yaml")
    for word in words:
        assert word in str(caught.value)


def test_a_relu_network_is_trained_first_only_where_spikes_start_from_it() -> None:
    config = dataclasses.replace(load_recipe("cartpole")[1], ann_steps=1000)
    config.check()
    assert config.trains_ann
    for change in ({"ann_steps": 0}, {"neuron": "relu"}, {"start_from": "cartpole"}):
        other = dataclasses.replace(config, **change)
        other.check()
        assert not other.trains_ann
    with pytest.raises(UserError, match="no memory to hand on"):
        dataclasses.replace(config, stateful=True).check()
    # Frames of a game can be stacked for it.
    game = dataclasses.replace(config, stateful=True, env="ALE/Pong-v5?sticky_actions=0&frame_stack=1")
    game.check()
    assert game.of_ann().env == "ALE/Pong-v5?sticky_actions=0&frame_stack=4"
    assert (game.of_ann().neuron, game.of_ann().stateful, game.of_ann().agent_steps) == ("relu", False, 1000)


def test_imitation_needs_somebody_to_imitate() -> None:
    config = dataclasses.replace(load_recipe("cartpole")[1], imitation=0.5)
    with pytest.raises(UserError, match="whom to imitate"):
        config.check()
    for change in ({"ann_steps": 1000}, {"start_from": "cartpole"}, {"teacher": "cartpole"}):
        dataclasses.replace(config, **change).check()
    dataclasses.replace(config, teacher="cartpole", stateful=True).check()
    with pytest.raises(UserError, match="teaches nothing with imitation 0"):
        dataclasses.replace(config, teacher="cartpole", imitation=0.0).check()
    with pytest.raises(UserError, match="imitation = 2: must lie between 0 and 1"):
        dataclasses.replace(config, teacher="cartpole", imitation=2).check()
