"""Networks by name: everybody can register builders of their own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

from spiking_rl.errors import UserError
from spiking_rl.networks import LayeredNetwork
from spiking_rl.surrogate import DEFAULT_GAMMA

_CODING = ("encoding", "single_spike", "kappa", "input_zero", "input_span")

NETWORKS: dict[str, Callable[..., LayeredNetwork]] = {}
"""Registered builders by name."""


def register_network(name: str) -> Callable[[Callable[..., LayeredNetwork]], Callable[..., LayeredNetwork]]:
    """Register ``builder(input_shape, outputs, *, timesteps, neuron, **options)`` under a name."""

    def add(builder: Callable[..., LayeredNetwork]) -> Callable[..., LayeredNetwork]:
        if name in NETWORKS:
            raise ValueError(f"network {name!r} is registered already")
        NETWORKS[name] = builder
        return builder

    return add


def build_network(name: str, input_shape: Sequence[int], outputs: int, **options: Any) -> LayeredNetwork:
    """Build a registered network.

    Args:
        name: a key of :data:`NETWORKS`.
        input_shape: shape of one input.
        outputs: number of actions or classes.
        options: passed to the builder; ``encoding``, ``single_spike``, ``kappa``, ``input_zero`` and ``input_span``
            to :meth:`LayeredNetwork.set_coding`.

    Raises:
        UserError: unknown name, sizes below 1, or an option that the builder refuses.
    """
    if name not in NETWORKS:
        close = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(sorted(NETWORKS))}"
        raise UserError("network", name, f"unknown; {hint}")
    for field, sizes in (("outputs", (outputs,)), ("input_shape", tuple(input_shape))):
        if not sizes or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in sizes):
            given = outputs if field == "outputs" else sizes
            raise UserError(field, given, "must be whole numbers of at least 1")
    coding = {option: options.pop(option) for option in _CODING if option in options}
    known = inspect.signature(NETWORKS[name]).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for option, value in options.items():
        if option not in known and not takes_any:
            raise UserError(option, value, f"is no option of network {name!r}; it has {', '.join(list(known)[2:])}")
    network = NETWORKS[name](tuple(input_shape), outputs, **options)
    if coding:
        network.set_coding(**coding, gamma=options.get("gamma", DEFAULT_GAMMA))
    return network
