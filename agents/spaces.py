"""Observation and action spaces as JSON, so that a checkpoint needs no pickle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

_LARGE = 2**26  # numbers in an observation, or cases of its whole numbers


def space_to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """Describe a space that an agent can have; infinite bounds become the strings "inf" and "-inf".

    Raises:
        TypeError: another kind of space.
    """
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "dtype": np.dtype(space.dtype).name}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": list(space.n) if isinstance(space.n, tuple) else space.n}
    if isinstance(space, spaces.Box):
        bounds = {name: _compact(getattr(space, name)) for name in ("low", "high")}
        return {"type": "Box", "shape": list(space.shape), "dtype": np.dtype(space.dtype).name, **bounds}
    raise TypeError(f"{space} is none that an agent could have")


def _compact(bound: np.ndarray[Any, Any]) -> Any:
    """Return one number where all are equal (images), else the flat list."""
    flat = [str(v) if np.isinf(v) else v.item() for v in bound.reshape(-1)]
    return flat[0] if len(set(flat)) == 1 else flat


def space_from_json(described: dict[str, Any]) -> spaces.Space[Any]:
    """Rebuild :func:`space_to_json`.

    Raises:
        KeyError, TypeError, ValueError, ArithmeticError: not such a description.
    """
    if described["type"] == "Discrete":
        return spaces.Discrete(int(described["n"]), start=int(described["start"]))
    if described["type"] == "MultiDiscrete":
        counts = [int(n) for n in described["nvec"]]
        if min(counts) < 1 or sum(counts) > _LARGE:
            raise TypeError(f"observation of {len(counts)} numbers, {sum(counts)} cases is not one an agent could have")
        return spaces.MultiDiscrete(counts, dtype=described["dtype"])
    if described["type"] == "MultiBinary":
        n = described["n"]
        return spaces.MultiBinary(_shape(n) if isinstance(n, list) else _shape([n])[0])
    if described["type"] != "Box":
        raise TypeError(f"space type {described['type']!r} is none that an agent could have")
    shape, dtype = _shape(described["shape"]), np.dtype(described["dtype"])
    if dtype.kind not in "fiub":
        raise TypeError(f"observation of dtype {dtype} is not one an agent could have")
    # Large whole numbers are none in floating point.
    stored = dtype if dtype.kind in "iu" else np.dtype(np.float64)
    low, high = (np.asarray(described[name], dtype=stored) for name in ("low", "high"))
    with np.errstate(all="raise"):  # a bound that its dtype cannot hold is none
        return spaces.Box(
            low=np.broadcast_to(low.reshape(shape if low.ndim else ()), shape).astype(dtype),
            high=np.broadcast_to(high.reshape(shape if high.ndim else ()), shape).astype(dtype),
            shape=shape,
            dtype=dtype.type,
        )


def _shape(described: list[Any]) -> tuple[int, ...]:
    shape = tuple(int(n) for n in described)
    if len(shape) > 4 or min(shape, default=1) < 0 or math.prod(shape) > _LARGE:
        raise TypeError(f"observation of shape {shape} is not one an agent could have")
    return shape
