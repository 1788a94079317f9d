"""The panel of a film shows what the network did, the frame that the agent saw, and names that are true."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from spiking_rl import UserError, build_network
from spiking_rl.agents import SpikingPQN, record
from spiking_rl.agents.filming import Film, _frames
from spiking_rl.agents.panel import MAX_NEURONS, Panel, action_names, choose_neurons
from spiking_rl.envs import MASKED_CARTPOLE, make_single, make_vectorised
from spiking_rl.signals import ActionBars, MembraneTraces


def test_the_neurons_with_the_largest_readout_weights_are_shown() -> None:
    network = build_network("mlp", (4,), 2, hidden=(8, 6))
    with torch.no_grad():
        network.readout.weight[:, 4] = torch.tensor([0.0, -3.0])
        network.readout.weight[:, 1] = torch.tensor([2.0, 1.0])
        network.readout.weight[:, 5] = torch.tensor([1.0, 1.0])
    assert choose_neurons(network) == [("layer2", 4), ("layer2", 1), ("layer2", 5)]
    assert len(choose_neurons(build_network("mlp", (4,), 2, hidden=(8, 2)))) == 2


def test_neurons_are_taken_by_name_once_each_and_in_order() -> None:
    network = build_network("mlp", (4,), 2, hidden=(8, 6))
    chosen = choose_neurons(network, ["layer2:5", "layer1:7", "layer2:5", "layer1:0"])
    assert chosen == [("layer2", 5), ("layer1", 7), ("layer1", 0)]
    images = build_network("nature_cnn", (4, 84, 84), 3)
    assert choose_neurons(images, ["layer1:12799"]) == [("layer1", 12799)], "32 maps of 20 x 20"


@pytest.mark.parametrize(
    "name", ["layer1:8", "layer3:0", "layer1", "layer1:", "layer1:x", "layer1:-1", "1:1", "", "layer1:²", "layer1:1:2"]
)
def test_a_neuron_that_is_not_there_is_refused(name: str) -> None:
    network = build_network("mlp", (4,), 2, hidden=(8, 6))
    with pytest.raises(UserError, match=r"layer1:0 to layer1:7, layer2:0 to layer2:5") as caught:
        choose_neurons(network, ["layer2:1", name])
    assert caught.value.field == "neurons"
    assert caught.value.value == name


def test_more_neurons_than_fit_are_refused() -> None:
    network = build_network("mlp", (4,), 2, hidden=(40,))
    names = [f"layer1:{i}" for i in range(MAX_NEURONS + 1)]
    assert len(choose_neurons(network, names[:-1])) == MAX_NEURONS
    with pytest.raises(UserError, match="at most"):
        choose_neurons(network, names)


def test_actions_have_the_names_that_the_environment_gives() -> None:
    pong = make_single("ALE/Pong-v5")
    assert action_names(pong, 6) == ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
    assert action_names(pong, 4) == ["0", "1", "2", "3"], "a list that does not fit is not believed"
    assert action_names(make_single("CartPole-v1"), 2) == ["0", "1"]


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("timesteps", [1, 3])
def test_traces_and_bars_show_what_was_recorded(
    stateful: bool, timesteps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = MASKED_CARTPOLE if stateful else "CartPole-v1"
    policy = {"timesteps": timesteps, "network_kwargs": {"hidden": [12, 8], "per_channel": True}}
    model = SpikingPQN("MlpPolicy", make_vectorised(env, 4, 0), stateful=stateful, policy_kwargs=policy, seed=0)
    model.learn(1500)
    network = model.policy.q_net.network
    played = record(model, env, episodes=1, seed=5)
    traced: list[tuple[Any, Any, bool]] = []
    valued: list[tuple[Any, int]] = []
    captions: list[list[str]] = []
    draw = ActionBars.draw

    def drawn(self: ActionBars, lines: list[str]) -> Any:
        captions.append(lines)
        return draw(self, lines)

    monkeypatch.setattr(MembraneTraces, "push", lambda self, u, s, fresh: traced.append((u, s, fresh)))
    monkeypatch.setattr(ActionBars, "push", lambda self, values, action: valued.append((values, action)))
    monkeypatch.setattr(ActionBars, "draw", drawn)
    neurons = [("layer1", 3), ("layer2", 7)]
    playing = make_single(env, render=True)
    frames = list(_frames(model, playing, 5, 1, neurons, Film("film.mp4")))  # type: ignore[arg-type]
    n = len(played.actions)
    assert len(valued) == len(traced) == n
    assert [action for _, action in valued] == played.actions.tolist()
    np.testing.assert_array_equal([values for values, _ in valued], played.q_values)
    assert [line[0].split()[-1] for line in captions] == [str(a) for a in played.actions]
    for k, (layer, index) in enumerate(neurons):
        lif = network.neurons[network.layer_names.index(layer)]
        threshold = lif.threshold[index].item()
        u = np.concatenate([potentials[:, k] for potentials, _, _ in traced])
        np.testing.assert_allclose(u, played.potentials[layer][:, :, index].flatten() / threshold, rtol=1e-5)
        spikes = np.concatenate([fired[:, k] for _, fired, _ in traced])
        np.testing.assert_array_equal(spikes != 0, played.spikes[layer][:, :, index].flatten())
    # Carried membranes give one line through the episode; fresh ones begin anew where they have a course.
    assert [fresh for _, _, fresh in traced[1:]] == [not stateful and timesteps > 1] * (n - 1)
    assert frames[0].shape[1] == 600 + 360


def test_each_frame_is_the_one_on_which_the_agent_decided() -> None:
    model = SpikingPQN("MlpPolicy", make_vectorised("CartPole-v1", 2, 0), seed=0, n_minibatches=2)
    neurons = choose_neurons(model.policy.q_net.network)
    with_panel, alone = (
        list(_frames(model, make_single("CartPole-v1", render=True), 5, 1, shown, Film("film.mp4")))  # type: ignore[arg-type]
        for shown in (neurons, None)
    )
    assert len(with_panel) == len(alone)
    for a, b in zip(with_panel, alone, strict=True):
        np.testing.assert_array_equal(a[:400, :600], b)
    env = gym.make("CartPole-v1", render_mode="rgb_array")
    env.reset(seed=5)
    np.testing.assert_array_equal(alone[0], env.render())


@pytest.mark.parametrize("size", [(400, 600), (420, 320), (512, 100)])
@pytest.mark.parametrize("neuron", ["lif", "relu"])
@pytest.mark.parametrize("actions", [2, 18])
def test_every_picture_of_an_episode_has_the_same_size(size: tuple[int, int], neuron: str, actions: int) -> None:
    network = build_network("mlp", (4,), actions, hidden=(8, 6), neuron=neuron)
    frame = np.zeros((*size, 3), dtype=np.uint8)
    chosen = choose_neurons(network) if network.spiking else []
    panel = Panel(network, [str(i) for i in range(actions)], chosen, frame)
    shapes = set()
    for seed in range(3):
        inputs = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            values = network(inputs, observer=panel.observe)[0][0, 0].numpy()
        shapes.add(panel.draw(frame, values, int(values.argmax()), ["one", "two"], True).shape)
    (shape,) = shapes
    assert shape[0] >= size[0] + 100
    assert shape[1] == max(320, size[1]) + (360 if network.spiking else 0)
