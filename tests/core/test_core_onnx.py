"""ONNX models give in ONNX Runtime what the networks give in PyTorch."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from spiking_rl import LIF, NETWORKS, LayeredNetwork, UserError, build_network, calibrate_thresholds
from spiking_rl.neurons import LIFState
from spiking_rl.onnx_model import Observation, onnx_model

SHAPES = [(6,), (3, 32, 32), (4, 36, 36)]
EVERY = pytest.mark.parametrize("name", sorted(NETWORKS))
NEAR = 1e-5  # of its threshold, where another rounding may make another spike


def built(name: str, timesteps: int, neuron: str = "lif", **options: object) -> LayeredNetwork:
    torch.manual_seed(0)
    if "width" in inspect.signature(NETWORKS[name]).parameters:
        options = {"width": 1 / 8, "batch_norm": True, **options}
    for shape in SHAPES:
        try:
            network = build_network(name, shape, 4, timesteps=timesteps, neuron=neuron, **options).eval()
            network.neuron_shapes()
            break
        except (RuntimeError, ValueError):
            continue
    if network.spiking:
        calibrate_thresholds(network, torch.randn(64, *network.input_shape), 0.2)
    for module in network.modules():
        if isinstance(module, LIF):
            nn.init.constant_(module.leak, 0.8)
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.normal_(module.weight)
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    return network


class Nearest:
    """Observes how near each decision's currents come to their thresholds."""

    def __init__(self, network: LayeredNetwork, batch: int) -> None:
        self.network = network
        self.distance = torch.full((batch,), torch.inf)

    def __call__(self, layer: str, _: Tensor, potential: Tensor) -> None:
        neuron = self.network.neurons[int(layer.removeprefix("layer")) - 1]
        if isinstance(neuron, LIF):
            nearest = (potential - neuron.threshold).abs().flatten(2).amin((0, 2))
            self.distance = torch.minimum(self.distance, nearest)


def run(model: bytes, feed: dict[str, Tensor]) -> dict[str, Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert {value.name for value in session.get_inputs()} == set(feed)
    names = [value.name for value in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in feed.items()})
    return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}


@EVERY
@pytest.mark.parametrize(("timesteps", "neuron"), [(1, "lif"), (3, "lif"), (1, "relu")])
def test_stateless(name: str, timesteps: int, neuron: str) -> None:
    network = built(name, timesteps, neuron)
    inputs = torch.randn(32, *network.input_shape)
    nearest = Nearest(network, 32)
    with torch.no_grad():
        expected = network(inputs.unsqueeze(0), observer=nearest)[0].squeeze(0)
    assert len(expected.unique(dim=0)) > 16
    clear = nearest.distance > NEAR
    assert clear.sum() > 8
    model = onnx_model(network)
    got = run(model, {"observation": inputs})["q_values"]
    torch.testing.assert_close(got[clear], expected[clear], rtol=1e-4, atol=1e-4)
    alone = run(model, {"observation": inputs[clear][:1]})["q_values"]
    torch.testing.assert_close(alone, expected[clear][:1], rtol=1e-4, atol=1e-4)


@EVERY
@pytest.mark.parametrize("timesteps", [1, 2])
def test_stateful(name: str, timesteps: int) -> None:
    """Membranes go in and come out; an episode's start zeroes those of its row."""
    network = built(name, timesteps)
    inputs, starts = torch.randn(32, *network.input_shape), torch.arange(32) % 3 == 0
    state = tuple(LIFState(torch.randn(32, *shape) * 0.2) for shape in network.neuron_shapes())
    nearest = Nearest(network, 32)
    with torch.no_grad():
        expected, after = network(inputs.unsqueeze(0), state, starts.unsqueeze(0), nearest)
    assert after is not None
    clear = nearest.distance > NEAR
    assert (clear & starts).any()
    assert (clear & ~starts).any()
    feed = {"observation": inputs, "episode_start": starts}
    got = run(
        onnx_model(network, stateful=True), feed | {f"membrane{i}": s.membrane for i, s in enumerate(state, start=1)}
    )
    torch.testing.assert_close(got["q_values"][clear], expected[0][clear], rtol=1e-4, atol=1e-4)
    for i, layer in enumerate(after, start=1):
        membrane = got[f"membrane{i}_after"]
        torch.testing.assert_close(membrane[clear], layer.membrane[clear], rtol=1e-4, atol=1e-4)


def test_neurons_fire_strictly_above_their_threshold() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    readout = nn.Linear(1, 1, bias=False)
    nn.init.ones_(readout.weight)
    network = LayeredNetwork([layer], [LIF(threshold=0.7)], readout, input_shape=(1,))
    at = np.float32(0.7)
    currents = np.array([at, np.nextafter(at, np.float32(1)), np.nextafter(at, np.float32(0)), 1e30, -1e30, 0], "f4")
    got = run(onnx_model(network), {"observation": torch.from_numpy(currents)[:, None]})
    assert got["q_values"].flatten().tolist() == [0, 1, 0, 1, 0, 0]


def test_scaling_names_and_facts() -> None:
    network = built("mlp", 1)
    scale = np.linspace(1, 2, 6, dtype=np.float32)
    raw = Observation((2, 3), np.uint8, [("Div", 255.0), ("Sub", scale), ("Mul", scale)], "frame")
    model = onnx_model(network, raw, output="logits", about={"made": "here"})
    frames = torch.randint(256, (20, 2, 3), dtype=torch.uint8)
    scaled = (frames.float() / 255).flatten(1).sub(torch.from_numpy(scale)).mul(torch.from_numpy(scale))
    with torch.no_grad():
        expected = network(scaled.unsqueeze(0))[0][0]
    torch.testing.assert_close(run(model, {"frame": frames})["logits"], expected, rtol=1e-4, atol=1e-4)
    read = onnx.load_model_from_string(model)
    assert [(prop.key, prop.value) for prop in read.metadata_props] == [("made", "here")]


def test_constants_are_stored_once() -> None:
    network = built("nature_cnn", 1, layer_norm=False)
    weights = sum(p.numel() for p in network.parameters()) * 4
    assert len(onnx_model(network)) < weights * 1.05
    network.set_timesteps(4)
    assert len(onnx_model(network)) < weights * 1.05


def test_what_cannot_be_exported_is_named() -> None:
    strange = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    network = LayeredNetwork([strange], [LIF()], nn.Linear(5, 2), input_shape=(6,))
    with pytest.raises(UserError, match="Tanh"):
        onnx_model(network)
    for options in ({"encoding": "hybrid"}, {"encoding": "poisson"}, {"single_spike": True}, {"kappa": 0.5}):
        with pytest.raises(UserError, match="deployed"):
            onnx_model(build_network("mlp", (6,), 2, timesteps=3, **options))


def test_one_timestep_of_a_hybrid_code_is_the_input_alone() -> None:
    network = build_network("mlp", (6,), 2, timesteps=1, encoding="hybrid", single_spike=True)
    images = torch.randn(7, 6)
    found = run(onnx_model(network), {"observation": images})["q_values"]
    torch.testing.assert_close(found, network(images.unsqueeze(0))[0][0])


def test_early_decisions_are_refused_where_there_are_any() -> None:
    network = build_network("mlp", (4,), 2, timesteps=2)
    network.set_exit_margin(0.5)
    with pytest.raises(UserError, match=r"exit_margin = 0.5: .*set it to None"):
        onnx_model(network)
    onnx_model(network, stateful=True)  # with membranes all timesteps are waited for
    network.set_timesteps(1)
    onnx_model(network)


def test_a_missing_onnx_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    network: Any = built("mlp", 1)
    with pytest.raises(UserError, match=r"pip install 'spiking-rl\[export\]'"):
        onnx_model(network)
