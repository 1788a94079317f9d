"""Learning from a trained agent: it is asked about what it was trained to see, and its choices are learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import Cli, as_flags, last_json

from spiking_rl import UserError, load_checkpoint
from spiking_rl.agents import SpikingPQN, evaluate, prune, train
from spiking_rl.agents.config import PQNConfig, load_config
from spiking_rl.agents.imitation import Teacher, imitation_loss
from spiking_rl.agents.policies import SpikingQNetwork
from spiking_rl.agents.starting import imitate
from spiking_rl.envs import make_vectorised

PONG = "ALE/Pong-v5?sticky_actions=0&frame_stack={}"


class Parrot(torch.nn.Module):
    """Answers with the first two pixels' columns of what it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def set_training_mode(self, mode: bool) -> None:
        self.train(mode)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        self.seen.append(obs)
        return obs.flatten(1)[:, :2].float()


def asked(frames: int) -> tuple[Teacher, Parrot]:
    parrot = Parrot()
    return Teacher(cast(SpikingQNetwork, parrot), frames), parrot


def test_a_teacher_is_shown_exactly_the_frames_that_its_own_environment_stacks() -> None:
    """Pong, twice from one seed, over the end of a game; rollouts of two lengths."""
    single, stacked = (make_vectorised(PONG.format(k), 2, seed=3) for k in (1, 4))
    teacher, parrot = asked(4)
    random = np.random.default_rng(0)
    seen, wanted = single.reset(), stacked.reset()
    starts, ended = np.ones(2, dtype=bool), 0
    try:
        for length in [1, 2, *[97] * 10]:
            frames, opened, stacks = [], [], []
            for _ in range(length):
                frames.append(seen)
                opened.append(starts)
                stacks.append(wanted)
                actions = random.integers(6, size=2)
                seen, _, starts, _ = single.step(actions)
                wanted = stacked.step(actions)[0]
                ended += int(starts.sum())
            parrot.seen.clear()
            teacher.values(torch.as_tensor(np.stack(frames)), torch.as_tensor(np.stack(opened)))
            torch.testing.assert_close(torch.cat(parrot.seen), torch.as_tensor(np.concatenate(stacks)))
    finally:
        single.close()
        stacked.close()
    assert ended, "no game came to its end"


def test_a_teacher_that_sees_the_same_is_shown_the_same() -> None:
    teacher, parrot = asked(1)
    rollout = torch.rand(5, 3, 2)
    values = teacher.values(rollout, torch.zeros(5, 3, dtype=torch.bool))
    assert values.shape == (5, 3, 2)
    torch.testing.assert_close(values, rollout)
    torch.testing.assert_close(torch.cat(parrot.seen), rollout.flatten(0, 1))


def test_a_wrong_choice_costs_more_than_as_wrong_a_level() -> None:
    taught = torch.tensor([[0.2, 0.1, 0.0], [0.1, 0.3, 0.2]])
    assert float(imitation_loss(taught, taught)) == pytest.approx(0, abs=1e-6)
    level = imitation_loss(taught + 0.1, taught)
    swapped = taught[:, [1, 0, 2]]
    assert (swapped - taught).abs().mean() < 0.11
    assert imitation_loss(swapped, taught) > 2 * level > 0


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_choices_matter_alike_whatever_rewards_are_worth(scale: float) -> None:
    """The temperature follows the teacher: its share of the loss scales with its values."""
    taught = torch.tensor([[0.2, 0.1, 0.0], [0.1, 0.3, 0.2]])
    wrong = taught.flip(1)
    choice, scaled = (
        imitation_loss(k * wrong, k * taught) - 0.5 * (k * (wrong - taught)).square().mean() for k in (1, scale)
    )
    assert float(scaled) == pytest.approx(scale * float(choice), rel=1e-4)


def test_values_without_any_preference_can_be_imitated() -> None:
    values = torch.zeros(4, 2, requires_grad=True)
    imitation_loss(values, torch.ones(4, 2)).backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.isfinite().all()
    assert (values.grad < 0).all()


def test_a_stateful_agent_learns_from_a_stateless_one(tmp_path: Path) -> None:
    """From play without any reward, and from nothing: no start is given."""
    settings: dict[str, Any] = {"stateful": True, "timesteps": 2, "prune_to": 1, "agent_steps": 6000}
    settings |= {"prune_steps": 3000, "eval_every": 3000, "eval_episodes": 5, "report_episodes": 0}
    settings |= {"video_episodes": 0, "reward_scale": 1e-9, "hidden": (64, 64), "n_minibatches": 4, "seed": 1}
    settings |= {"average_decay": 0.0}
    student = train("CartPole-v1", teacher="cartpole", imitation=1.0, **settings)
    assert student.policy.timesteps == 1
    assert evaluate(student, "CartPole-v1", episodes=10).mean_return > 100


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("nowhere", "teacher = 'nowhere': cannot be loaded"),
        ("cartpole-masked", "is stateful"),
        ("cartpole", "cannot make up"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_written(
    tmp_path: Path, teacher: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        train("MountainCar-v0", teacher=teacher, imitation=1.0, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_other_actions_is_refused() -> None:
    model = SpikingPQN("MlpPolicy", make_vectorised("CartPole-v1", 2, 0))
    model.action_space.n += 1  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"not on Discrete\(3\)"):
        imitate(model, "cartpole", 1.0)


@pytest.mark.parametrize("stateful", [False, True])
def test_dqn_imitates_on_what_it_replays(stateful: bool) -> None:
    """Again without any reward and from nothing."""
    settings: dict[str, Any] = {"timesteps": 1, "prune_to": 1, "agent_steps": 5000, "eval_every": 5000, "seed": 1}
    settings |= {"report_episodes": 0, "video_episodes": 0, "reward_scale": 1e-9, "stateful": stateful}
    settings |= {"eval_episodes": 5, "hidden": (64, 64), "average_decay": 0.0}
    student = train("CartPole-v1", algo="dqn", teacher="cartpole", imitation=1.0, **settings)
    assert evaluate(student, "CartPole-v1", episodes=10).mean_return > 150


@pytest.fixture
def short_games(monkeypatch: pytest.MonkeyPatch) -> None:
    """A game of Pong is lost after a thousand decisions: end it after fifty, and convert on even fewer."""
    monkeypatch.setattr("spiking_rl.envs.atari.MAX_FRAMES", 200)
    monkeypatch.setattr("spiking_rl.agents.starting._STEPS", 32)
    monkeypatch.setattr("spiking_rl.agents.starting._ENVIRONMENTS", 4)
    monkeypatch.setattr("spiking_rl.agents.starting._INPUTS", 128)


@pytest.mark.usefixtures("short_games")
def test_an_agent_of_single_frames_starts_from_one_of_several(tmp_path: Path) -> None:
    stacked, single = (PONG.format(k) for k in (4, 1))
    hardly: dict[str, Any] = {"timesteps": 1, "prune_to": 1, "agent_steps": 1, "num_envs": 2, "ann_steps": 0}
    hardly |= {"eval_episodes": 1, "report_episodes": 0, "video_episodes": 0}
    once = {"n_steps": 2, "n_minibatches": 1}
    relu = tmp_path / "relu"
    train(stacked, neuron="relu", run=relu, **hardly, **once, imitation=0.0)
    kernels = load_checkpoint(relu / "checkpoints" / "relu").tensors["network.maps.0.0.weight"]
    for stateful in (True, False):
        taught = {"stateful": stateful, "start_from": str(relu), "imitation": 1.0, "learning_rate": 1e-12}
        student = train(single, **taught, **hardly, **once, average_decay=0.0)
        assert student.stateful == stateful
        torch.testing.assert_close(
            student.policy.q_net.state_dict()["network.maps.0.0.weight"],
            kernels.sum(1, keepdim=True),
            rtol=1e-4,
            atol=1e-6,
        )
    replay = {"learning_starts": 2, "buffer_size": 100, "agent_steps": 3}
    alone = {**hardly, **replay, "start_from": None}
    with pytest.raises(UserError, match="replays single ones"):
        train(single, algo="dqn", stateful=False, teacher=str(relu), imitation=1.0, **alone)
    with pytest.raises(UserError, match="other spaces"):
        train(single, stateful=False, neuron="relu", start_from=str(relu), **hardly, **once, imitation=0.0)


TINY: dict[str, Any] = {"timesteps": 2, "prune_to": 1, "agent_steps": 8, "prune_steps": 8, "num_envs": 2, "n_steps": 4}
TINY |= {"n_minibatches": 1, "eval_episodes": 1, "video_episodes": 0, "eval_every": 8}


@pytest.mark.slow  # a minute of games that are lost
def test_one_command_takes_single_frame_pong_from_its_relu_network_to_the_table(cli: Cli, tmp_path: Path) -> None:
    """The ReLU network sees four frames, its games are others, and the table has them too."""
    settings = {**TINY, "timesteps": 1, "ann_steps": 8, "report_episodes": 1, "threads": 1}
    run = tmp_path / "run"
    done = cli("train", "pong-stateful", *as_flags(settings), "--run", run, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["timesteps"]: row for row in last_json(done.stdout)["rows"]}  # type: ignore[attr-defined]
    assert rows[None]["environment"] == PONG.format(4)
    assert rows[None]["also"][0]["environment"] == "ALE/Pong-v5?sticky_actions=0.25&frame_stack=4"
    assert rows[1]["also"][0]["environment"] == "ALE/Pong-v5?sticky_actions=0.25&frame_stack=1"


def test_nobody_is_imitated_once_training_is_over(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**TINY, "ann_steps": 64, "agent_steps": 64, "imitation": 1.0, "report_episodes": 0}
    settings |= {"prune_to": 2, "learning_rate": 0.002, "surrogate_gamma": 0.7}
    model = train("CartPole-v1", **settings)
    assert (model.teacher, model.imitated()) == (None, None)
    run = tmp_path / "run"
    prune(model, "CartPole-v1", to=1, agent_steps=64, run=run, eval_episodes=1, report_episodes=0, video_episodes=0)
    assert model.imitated() is None
    config = load_config(run / "config.yaml")
    assert isinstance(config, PQNConfig)
    found = config.imitation, config.n_steps, config.learning_rate, config.surrogate_gamma
    assert found == (0.0, 4, 0.002, 0.7), "what the model has, and no recipe's"


@pytest.mark.usefixtures("short_games")
def test_a_model_can_be_pruned_in_python_on_a_game_whose_recipe_imitates() -> None:
    model = train(PONG.format(4), ann_steps=0, imitation=0.0, report_episodes=0, **{**TINY, "prune_to": 2})
    quick = {name: TINY[name] for name in ("n_steps", "n_minibatches", "eval_episodes", "video_episodes", "eval_every")}
    pruned = prune(model, PONG.format(4), to=1, agent_steps=8, report_episodes=0, **quick)
    assert pruned.policy.timesteps == 1


@pytest.mark.parametrize(
    ("env", "settings", "words"),
    [
        (
            "cartpole-masked",
            {"start_from": "cartpole-masked", "imitation": 1.0},
            "teacher = 'cartpole-masked': is stateful",
        ),
        ("cartpole", {"algo": "dqn", "ann_steps": 500}, "ann_steps = 500: .*for the ReLU network"),
        ("ALE/Pong-v5?frame_stack=3", {"stateful": True, "ann_steps": 500, "algo": "pqn"}, "frame_stack = 3"),
        ("ALE/Pong-v5?frame_stack=2", {"teacher": "pong", "imitation": 1.0, "ann_steps": 0}, "cannot make up"),
        ("cartpole", {"neuron": "relu", "teacher": "cartpole", "imitation": 1.0}, "is for spiking agents"),
    ],
)
def test_a_way_that_cannot_be_gone_is_refused_at_its_beginning(
    tmp_path: Path, env: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        train(env, run=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
