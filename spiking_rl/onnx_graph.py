"""ONNX graphs put together node by node: nothing but the package onnx is needed, and no tracer."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, nn

from spiking_rl.errors import UserError
from spiking_rl.group_norm import GroupNorm
from spiking_rl.small_maps import SmallMapConv2d
from spiking_rl.vision.resnet import Head

OPSET = 17  # the first with LayerNormalization
_IR_VERSION = 8  # of its time


def require(package: str) -> ModuleType:
    """Import a package of the extra ``export``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError("format", "onnx", f"needs {package}; pip install 'spiking-rl[export]'") from None


class Graph:
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


class MapWriter:
    """Writes a linear map into a graph.

    Args:
        graph: to write into.
        shape: of the map's output, without the batch.
    """

    def __init__(self, graph: Graph, shape: Sequence[int]) -> None:
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
        if isinstance(module, nn.Conv2d) and _plain(module):
            return self._convolution(module, x)
        if type(module) is nn.AvgPool2d and not module.ceil_mode and module.divisor_override is None:
            sides = {"kernel_shape": _pair(module.kernel_size), "strides": _pair(module.stride)}
            pads = {"pads": _pair(module.padding) * 2, "count_include_pad": int(module.count_include_pad)}
            return graph.op("AveragePool", x, **sides, **pads)
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
            return self._normalise(module, x, module.normalized_shape, axis=-1)
        if isinstance(module, nn.GroupNorm) and type(module) in (nn.GroupNorm, GroupNorm) and module.num_groups == 1:
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
        arrays = (
            np.full(channels, rest, np.float32) if w is None else w.detach().cpu().numpy().reshape(channels)
            for w, rest in ((module.weight, 1), (module.bias, 0))
        )
        scale, shift = (self.graph.constant(np.broadcast_to(array, self.shape)) for array in arrays)
        return self.graph.op("LayerNormalization", x, scale, shift, axis=axis, epsilon=module.eps)


def _plain(module: nn.Conv2d) -> bool:
    known = type(module) in (nn.Conv2d, SmallMapConv2d)
    return known and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
