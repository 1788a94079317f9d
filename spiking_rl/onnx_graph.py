"""A network as an ONNX graph: one timestep, several unrolled, or a decision that takes and gives membranes.

The graph is put together node by node, so that it needs the package onnx and no tracer, and holds nothing but
the network: operators of opset 17, which ONNX Runtime has had since 2022.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from spiking_rl.deploy import Step, check_plain, fold_thresholds
from spiking_rl.errors import UserError
from spiking_rl.folding import fold_batch_norm
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF
from spiking_rl.vision.resnet import Head

OPSET = 17  # the first with LayerNormalization
_IR_VERSION = 8  # of its time


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
    scaling: Sequence[tuple[str, NDArray[np.float32]]] = ()
    name: str = "observation"


def require(package: str) -> ModuleType:
    """Import a package of the extra ``export``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError("format", "onnx", f"needs {package}; pip install 'spiking-rl[export]'") from None


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
        UserError: onnx is not installed, or the network has a part that cannot be exported.
    """
    onnx = require("onnx")
    check_plain(network)
    plain = network.spiking and not stateful and network.timesteps == 1
    ready = fold_thresholds(network) if plain else fold_batch_norm(network).eval()
    observation = observation or Observation(network.input_shape)
    graph = _Graph(onnx)
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


class _Graph:
    """Nodes and constants in the making; values are known by their names."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: dict[bytes, str] = {}
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def _value(self, name: str, dtype: DTypeLike, shape: Sequence[int]) -> Any:
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.onnx.helper.make_tensor_value_info(name, kind, ["batch", *shape])

    def input(self, name: str, dtype: DTypeLike, shape: Sequence[int]) -> str:
        """Add an input ``(B, *shape)``."""
        self.inputs.append(self._value(name, dtype, shape))
        return name

    def output(self, name: str, value: str, shape: Sequence[int]) -> None:
        """Give a value out as ``name``, float32 ``(B, *shape)``."""
        self.nodes.append(self.onnx.helper.make_node("Identity", [value], [name]))
        self.outputs.append(self._value(name, np.float32, shape))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return its value."""
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def cast(self, value: str) -> str:
        """Return a value as float32."""
        return self.op("Cast", value, to=self.onnx.TensorProto.FLOAT)

    def constant(self, array: NDArray[Any] | Tensor) -> str:
        """Return the value of an array; equal ones are stored once."""
        values = np.ascontiguousarray(array.detach().float().cpu().numpy() if isinstance(array, Tensor) else array)
        key = repr((values.shape, values.dtype.name)).encode() + values.tobytes()
        if key not in self.constants:
            self.constants[key] = name = f"constant{len(self.constants)}"
            self.initializers.append(self.onnx.numpy_helper.from_array(values, name))
        return self.constants[key]

    def model(self, about: Mapping[str, str]) -> Any:
        """Return the model."""
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "network", self.inputs, self.outputs, self.initializers)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION, producer_name="spiking-rl")
        helper.set_model_props(model, dict(about))
        return model


class _Unrolled:
    """Writes a network's decision into a graph, timestep after timestep."""

    def __init__(self, graph: _Graph, network: LayeredNetwork, stateful: bool) -> None:
        self.graph, self.network, self.stateful = graph, network, stateful
        self.shapes = network.neuron_shapes()

    def decide(self, x: str) -> str:
        """Add one decision on the network's input; return its outputs."""
        graph, network = self.graph, self.network
        membranes = self._membranes()
        first = _Map(graph, self.shapes[0]).add(network.maps[0], x)  # the same at every timestep
        last: list[str] = []
        for _ in range(network.timesteps):
            spikes: list[str] = []
            for i, neuron in enumerate(network.neurons):
                layer = _Map(graph, self.shapes[i])
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
        return _Map(graph, ()).add(network.readout, mean)

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
            threshold = np.zeros((), np.float32) if neuron.threshold is None else neuron.threshold
            return graph.cast(graph.op("Greater", current, graph.constant(threshold))), None
        assert isinstance(neuron, LIF)
        if membrane is not None:
            current = graph.op("Add", graph.op("Mul", membrane, graph.constant(neuron.leak)), current)
        threshold = graph.constant(neuron.threshold)
        spikes = graph.cast(graph.op("Greater", current, threshold))
        return spikes, graph.op("Sub", current, graph.op("Mul", spikes, threshold))


class _Map:
    """Writes a linear map into a graph.

    Args:
        graph: to write into.
        shape: of the map's output, without the batch.
    """

    def __init__(self, graph: _Graph, shape: Sequence[int]) -> None:
        self.graph, self.shape = graph, tuple(shape)

    def add(self, module: nn.Module, x: str) -> str:
        """Add a module; return its value.

        Raises:
            UserError: ONNX is not written for modules of this kind.
        """
        graph = self.graph
        if type(module) is nn.Sequential:
            for part in module:
                x = self.add(part, x)
            return x
        if type(module) is nn.Identity:
            return x
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return graph.op("Flatten", x, axis=1)
        if type(module) is nn.Linear:
            return self._linear(module, x)
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            return self._convolution(module, x)
        if type(module) is nn.AvgPool2d and not module.ceil_mode and module.divisor_override is None:
            sides = {"kernel_shape": _pair(module.kernel_size), "strides": _pair(module.stride)}
            pads = {"pads": _pair(module.padding) * 2, "count_include_pad": int(module.count_include_pad)}
            return graph.op("AveragePool", x, **sides, **pads)
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            return self._normalise(module, x, module.normalized_shape, axis=-1)
        if type(module) is nn.GroupNorm and module.num_groups == 1:
            return self._normalise(module, x, (module.num_channels, *[1] * (len(self.shape) - 1)), axis=1)
        if type(module) is Head:
            mean = graph.op("ReduceMean", x, axes=[2, 3], keepdims=0) if module.mean else graph.op("Flatten", x, axis=1)
            return self._linear(module, mean)
        raise UserError("network", str(module), "this layer cannot be exported to ONNX")

    def _weights(self, module: nn.Conv2d | nn.Linear) -> list[str]:
        return [self.graph.constant(w) for w in (module.weight, module.bias) if w is not None]

    def _linear(self, module: nn.Linear, x: str) -> str:
        return self.graph.op("Gemm", x, *self._weights(module), transB=1)

    def _convolution(self, module: nn.Conv2d, x: str) -> str:
        pads = _pair(module.padding) * 2  # type: ignore[arg-type]
        return self.graph.op(
            "Conv",
            x,
            *self._weights(module),
            kernel_shape=list(module.kernel_size),
            strides=list(module.stride),
            pads=pads,
            dilations=list(module.dilation),
            group=module.groups,
        )

    def _normalise(self, module: nn.LayerNorm | nn.GroupNorm, x: str, channels: Sequence[int], axis: int) -> str:
        """Normalise over the whole sample. ONNX wants its scale and shift as large as that."""
        scale, shift = (
            self.graph.constant(
                np.broadcast_to((np.float32(rest) if w is None else w.detach().cpu().numpy().reshape(channels)), self.shape)
            )
            for w, rest in ((module.weight, 1), (module.bias, 0))
        )
        return self.graph.op("LayerNormalization", x, scale, shift, axis=axis, epsilon=module.eps)


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
