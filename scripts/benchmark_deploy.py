"""Latency of one decision against the plain ReLU network: as trained, deployed, and at T=1 in ONNX Runtime.

python -m spiking_rl.scripts.benchmark_deploy --output results/deploy-speed.json
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spiking_rl.agents.loading import load_agent
from spiking_rl.conversion import calibrate_thresholds
from spiking_rl.deploy import SparseLinear, deploy
from spiking_rl.envs.make import make_vectorised
from spiking_rl.events import EventMap, runs_on_events
from spiking_rl.networks import LayeredNetwork
from spiking_rl.onnx_graph import require
from spiking_rl.onnx_model import onnx_model
from spiking_rl.registry import build_network
from spiking_rl.scripts.options import parse, script
from spiking_rl.scripts.published import write_results

DESCRIPTION = """Time one decision (batch 1) of the Nature-CNN and of CartPole's perceptron, at T=1 and with ReLU.

The Nature-CNN runs at T=4 too. Inputs are observations that the shipped agents pong and cartpole meet, scaled. Compared
with nn.Sequential of the same layers with ReLU and without normalisation; ONNX Runtime with that network exported the
same way. VGG16 sees random images, one and 32 at a time, with thresholds set for several firing rates.

Example: python -m spiking_rl.scripts.benchmark_deploy --output results/deploy-speed.json"""

_PRETRAINED = {"nature_cnn": "pong", "mlp": "cartpole"}
_RATE = 0.1  # spikes per neuron in the networks that are not trained
_WARM_UP = 5
_TIMESTEPS = 4  # of the networks that are not pruned
_VGG_RATES = (0.05, 0.1, 0.2)  # at T=1
_VGG_SEEN = 4  # images of a round
_VGG_BATCHES = {1: 5, 32: 20}  # and by which number its rounds are divided

Decision = Callable[[Tensor], Any]
Networks = list[tuple[str, LayeredNetwork]]


@dataclass(kw_only=True)
class Options:
    """How to measure."""

    threads: tuple[int, ...] = (1, 2)
    """Threads of PyTorch and of ONNX Runtime, one measurement each."""
    rounds: int = 100
    """Rounds; each times every variant once, in random order, so that a slow moment meets all of them."""
    observations: int = 32
    """Different observations, met in turn."""
    output: Path | None = None
    """Results as JSON."""


@dataclass(frozen=True)
class Variant:
    """What is timed.

    Attributes:
        network: the layers.
        way: how they are run.
        maker: whose code that is.
        timesteps: T for spikes, None for ReLU.
        decide: the function of inputs ``(B, *input_shape)``.
        rate: spikes per neuron and timestep that the thresholds were set for.
    """

    network: str
    way: str
    maker: str
    timesteps: int | None
    decide: Decision
    rate: float | None = None


def main() -> None:
    """Measure, print, write."""
    options = parse(Options, "benchmark_deploy", sys.argv[1:], DESCRIPTION)
    rows: list[dict[str, Any]] = []
    for kind in _PRETRAINED:
        networks, inputs = _networks(kind, options.observations)
        for threads in options.threads:
            torch.set_num_threads(threads)
            pruned = [(name, network) for name, network in networks if network.timesteps == 1]
            for made in (_pytorch(networks), _onnxruntime(pruned, threads)):
                _keep(rows, _measured(list(made), inputs, options.rounds), threads)
    images, variants = _vgg_variants()
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch, fewer in _VGG_BATCHES.items():
            inputs = images[: max(_VGG_SEEN, batch)]
            _keep(rows, _measured(variants, inputs, -(-options.rounds // fewer), batch), threads)
    if options.output is not None:
        write_results(options.output, "benchmark_deploy", rows)


def _keep(rows: list[dict[str, Any]], measured: Iterator[dict[str, Any]], threads: int) -> None:
    """Add rows as they come, and print them."""
    for row in measured:
        rows.append(row | {"threads": threads})
        print(_line(rows[-1]), flush=True)


def _line(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    name = f"{row['network']}, {'ReLU' if row['timesteps'] is None else 'T=' + str(row['timesteps'])}"
    if row["spike_rate"] is not None:
        name += f", rate {row['spike_rate']}"
    if row["batch"] > 1:
        name += f", batch {row['batch']}"
    return (
        f"{row['threads']} threads  {name:45} {row['pass']:28} {row['ms']:.4f} ms ({low:.4f} to {high:.4f})  "
        f"{row['ratio_to_relu']:.2f} x ReLU"
    )


def _networks(kind: str, observations: int) -> tuple[Networks, Tensor]:
    """Return the networks by name, the plain ReLU one first, and inputs ``(N, *input_shape)``."""
    agent = load_agent(_PRETRAINED[kind], device="cpu")
    q_net = agent.model.policy.q_net
    trained = q_net.network
    seen, venv = [], make_vectorised(agent.environment, 1, seed=0)
    observation = venv.reset()
    for _ in range(observations):
        for _ in range(8):  # neighbours look alike
            assert isinstance(observation, np.ndarray)
            action, _ = agent.model.predict(observation, deterministic=True)
            observation = venv.step(action)[0]
        with torch.no_grad():
            seen.append(q_net.features(torch.as_tensor(observation)))
    venv.close()
    inputs = torch.cat(seen)
    torch.manual_seed(0)
    shape, actions = trained.input_shape, q_net.action_space.n
    options: dict[str, Any] = {"layer_norm": False}
    plain = build_network(kind, shape, int(actions), neuron="relu", **options)
    spiking = build_network(kind, shape, int(actions), timesteps=1, **options)
    calibrate_thresholds(spiking, inputs, _RATE)
    control, relu_norm = "", build_network(kind, shape, int(actions), neuron="relu")
    if kind == "nature_cnn":  # its activity is that of a network that has learned
        control, relu_norm = " (pong-relu)", load_agent("pong-relu", device="cpu").model.policy.q_net.network
    named = [
        (kind, plain),
        (f"{kind}, normalised{control}", relu_norm),
        (kind, spiking),
        (f"{kind}, normalised ({_PRETRAINED[kind]})", trained),
    ]
    if kind == "nature_cnn":
        longer = build_network(kind, shape, int(actions), timesteps=_TIMESTEPS, **options)
        calibrate_thresholds(longer, inputs, _RATE)
        named.append((kind, longer))
    return [(name, network.eval()) for name, network in named], inputs


def _vgg_variants() -> tuple[Tensor, list[Variant]]:
    """Return images ``(N, 3, 32, 32)``, and VGG16 with ReLU first, then deployed at several firing rates."""
    torch.manual_seed(0)
    shape, classes = (3, 32, 32), 10
    images = torch.randn(max(_VGG_BATCHES), *shape)
    plain = build_network("vgg16", shape, classes, neuron="relu", bias=True).eval()
    variants = [Variant("vgg16", "forward", "pytorch", None, _inference(_sequential(plain)))]
    for timesteps, rates in ((1, _VGG_RATES), (_TIMESTEPS, (_RATE,))):
        for rate in rates:
            network = build_network("vgg16", shape, classes, timesteps=timesteps, bias=True).eval()
            calibrate_thresholds(network, images[:8], rate)
            if rate == _RATE:
                variants.append(Variant("vgg16", "forward", "spiking-rl", timesteps, _forward(network), rate))
            variants.append(Variant("vgg16", "deployed", "spiking-rl", timesteps, deploy(network), rate))
    return images, variants


def _pytorch(networks: Networks) -> Iterator[Variant]:
    for name, network in networks:
        timesteps = network.timesteps if network.spiking else None
        if network.spiking:
            yield Variant(name, "forward", "spiking-rl", timesteps, _forward(network))
            yield Variant(name, "deployed", "spiking-rl", timesteps, deploy(network))
        else:
            yield Variant(name, "forward", "pytorch", timesteps, _inference(_sequential(network)))
            if name.startswith("nature_cnn"):
                yield Variant(name, "silent inputs skipped", "pytorch", timesteps, _inference(_skipping(network)))


def _onnxruntime(networks: Networks, threads: int) -> Iterator[Variant]:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else idle sessions slow the timed one
    for name, network in networks:
        session = runtime.InferenceSession(onnx_model(network), options, providers=["CPUExecutionProvider"])

        def decide(x: Tensor, session: Any = session) -> object:
            return session.run(None, {"observation": x.numpy()})

        yield Variant(name, "onnx", "onnxruntime", 1 if network.spiking else None, decide)


def _sequential(relu: LayeredNetwork) -> nn.Sequential:
    """Return a ReLU network as anyone would write it."""
    layers = [part for pair in zip(relu.maps, relu.neurons, strict=True) for part in pair]
    return nn.Sequential(*layers, relu.readout)


def _skipping(relu: LayeredNetwork) -> Decision:
    """Return a ReLU network with our tricks for spikes: silent inputs are skipped by all maps but the first."""
    parts = [part for layer in _sequential(relu) for part in (layer if isinstance(layer, nn.Sequential) else [layer])]
    steps: list[Decision] = [parts[0]]
    for part in parts[1:]:
        step: Decision = part
        if isinstance(part, nn.Linear) and part is not parts[-1]:
            step = SparseLinear(part, False)
        if isinstance(part, (nn.Conv2d, nn.Linear)) and part is not parts[-1] and runs_on_events(part):
            step = EventMap(part, step)
        steps.append(step)

    def decide(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return decide


def _inference(module: Decision) -> Decision:
    return torch.inference_mode()(module)


def _forward(network: LayeredNetwork) -> Decision:
    return _inference(lambda x: network(x.unsqueeze(0)))


def _measured(
    variants: Sequence[Variant], inputs: Tensor, rounds: int, batch_size: int = 1
) -> Iterator[dict[str, Any]]:
    """Yield a row per variant; the first one is the ReLU network that the others are compared with."""
    batches = torch.split(inputs, batch_size)
    times: list[list[float]] = [[] for _ in variants]
    order = list(range(len(variants)))
    generator = random.Random(0)
    warm_up = min(rounds, _WARM_UP)
    for number in range(rounds + warm_up):
        generator.shuffle(order)
        for i in order:
            decide = variants[i].decide
            decide(batches[-1])  # what ran before has left the caches to itself
            start = time.perf_counter()
            for batch in batches:
                decide(batch)
            if number >= warm_up:
                times[i].append((time.perf_counter() - start) / len(batches) * 1e3)
    for variant, values in zip(variants, times, strict=True):
        low, median, high = np.percentile(values, [25, 50, 75])
        yield {
            "network": variant.network,
            "pass": variant.way,
            "library": variant.maker,
            "timesteps": variant.timesteps,
            "batch": batch_size,
            "spike_rate": variant.rate,
            "ratio_to_relu": round(float(median / np.median(times[0])), 3),
            "extra_mb": None,
            "ms": round(float(median), 5),
            "quartiles": [round(float(low), 5), round(float(high), 5)],
        }


if __name__ == "__main__":
    script(main)
