"""A network as an ONNX model: one timestep, several unrolled, or a decision that takes and gives membranes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import nn

from spiking_rl.deploy import Step, check_plain, check_waits, fold_thresholds
from spiking_rl.errors import UserError
from spiking_rl.folding import fold_batch_norm
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF
from spiking_rl.onnx_graph import Graph, MapWriter, require

_STEEPEST = 3e38  # reaches 1 at the smallest normal number


class Observation(NamedTuple):
    """What goes into the graph, and how it becomes the network's input.

    Attributes:
        shape: of one observation.
        dtype: of its numbers.
        scaling: ONNX operators and their second operand, in order, such as ``("Div", 255)``; they broadcast
            against ``(B, *input_shape)``.
        name: of the graph's input.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike = np.float32
    scaling: Sequence[tuple[str, float | NDArray[np.float32]]] = ()
    name: str = "observation"


def onnx_model(
    network: LayeredNetwork,
    observation: Observation | None = None,
    *,
    output: str = "q_values",
    stateful: bool = False,
    about: Mapping[str, str] | None = None,
) -> bytes:
    """Return a network as an ONNX model, checked.

    The batch is free. Stateless, the graph has one input and one output. Stateful, ``membraneK`` ``(B, *N)`` of
    every hidden layer K and ``episode_start`` (bool, ``(B,)``; true zeroes the row's membranes) go in too, and
    ``membraneK_after`` comes out.

    Args:
        network: ReLU, or LIF neurons under direct encoding at any T, in evaluation mode or not; it stays as it is.
        observation: None for the network's own input.
        output: name of the outputs ``(B, n)``.
        stateful: one decision that goes on from membranes.
        about: facts to store with the model.

    Raises:
        UserError: onnx is not installed, or the network has a part that cannot be exported or, stateless at more than
            one timestep, an exit margin.
    """
    onnx = require("onnx")
    check_plain(network)
    if network.timesteps > 1 and not stateful:
        check_waits(network)
    plain = network.spiking and not stateful and network.timesteps == 1
    ready = fold_thresholds(network) if plain else fold_batch_norm(network).eval()
    observation = observation or Observation(network.input_shape)
    graph = Graph(onnx)
    x = graph.input(observation.name, observation.dtype, observation.shape)
    if np.dtype(observation.dtype) != np.float32:
        x = graph.cast(x)
    if observation.shape != network.input_shape:
        x = graph.op("Reshape", x, graph.constant(np.array([-1, *network.input_shape])))
    for operator, operand in observation.scaling:
        x = graph.op(operator, x, graph.constant(np.asarray(operand, np.float32)))
    outputs = _Unrolled(graph, ready, stateful).decide(x)
    graph.output(output, outputs, (_outputs(network),))
    model = graph.model(about or {})
    onnx.checker.check_model(model, full_check=True)
    blob: bytes = model.SerializeToString()
    return blob


def _outputs(network: LayeredNetwork) -> int:
    last = [m for m in network.readout.modules() if isinstance(m, nn.Linear)][-1:]
    if not last:
        raise UserError("network", type(network.readout).__name__, "this readout cannot be exported to ONNX")
    return last[0].out_features


class _Unrolled:
    """Writes a network's decision into a graph, timestep after timestep."""

    def __init__(self, graph: Graph, network: LayeredNetwork, stateful: bool) -> None:
        self.graph, self.network, self.stateful = graph, network, stateful
        self.shapes = network.neuron_shapes()

    def decide(self, x: str) -> str:
        """Add one decision on the network's input; return its outputs."""
        graph, network = self.graph, self.network
        membranes = self._membranes()
        first = MapWriter(graph, self.shapes[0]).add(network.maps[0], x)  # the same at every timestep
        last: list[str] = []
        for _ in range(network.timesteps):
            spikes: list[str] = []
            for i, neuron in enumerate(network.neurons):
                layer = MapWriter(graph, self.shapes[i])
                current = first if i == 0 else layer.add(network.maps[i], spikes[-1])
                if i in network.sources:
                    beside = layer.add(network.shortcuts[str(i)], spikes[network.sources[i]])
                    current = graph.op("Add", current, beside)
                fired, membranes[i] = self._neuron(neuron, current, membranes[i])
                spikes.append(fired)
            last.append(spikes[-1])
        if self.stateful:
            for i, membrane in enumerate(membranes):
                assert membrane is not None
                graph.output(f"membrane{i + 1}_after", membrane, self.shapes[i])
        mean = last[0]
        if len(last) > 1:
            mean = graph.op("Mean", *last)
        return MapWriter(graph, ()).add(network.readout, mean)

    def _membranes(self) -> list[str | None]:
        """Return the membranes before the decision; None where they are at rest."""
        if not self.stateful:
            return [None] * len(self.shapes)
        graph = self.graph
        starts = graph.input("episode_start", np.bool_, ())
        before: list[str | None] = []
        rest = graph.constant(np.zeros((), np.float32))
        for i, shape in enumerate(self.shapes):
            membrane = graph.input(f"membrane{i + 1}", np.float32, shape)
            opens = graph.op("Reshape", starts, graph.constant(np.array([-1] + [1] * len(shape))))
            before.append(graph.op("Where", opens, rest, membrane))
        return before

    def _neuron(self, neuron: nn.Module, current: str, membrane: str | None) -> tuple[str, str | None]:
        """Add one timestep of a layer's neurons; return what they give, and the membrane after it."""
        graph = self.graph
        if isinstance(neuron, nn.ReLU):
            return graph.op("Relu", current), None
        if isinstance(neuron, Step):
            if neuron.threshold is not None:
                return graph.cast(graph.op("Greater", current, graph.constant(neuron.threshold))), None
            # 1 above 0, else 0: a ramp as steep as float32 allows. Runtimes compute it inside the convolution or
            # matrix product before it, as they do ReLU; a comparison and a cast would be passes of their own.
            return graph.op("HardSigmoid", current, alpha=_STEEPEST, beta=0.0), None
        assert isinstance(neuron, LIF)
        if membrane is not None:
            current = graph.op("Add", graph.op("Mul", membrane, graph.constant(neuron.leak)), current)
        threshold = graph.constant(neuron.threshold)
        spikes = graph.cast(graph.op("Greater", current, threshold))
        return spikes, graph.op("Sub", current, graph.op("Mul", spikes, threshold))
