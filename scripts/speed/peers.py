"""The LIF neurons of other libraries, each as a function of a whole layer's current over time.

Where their models can be brought to coincide with ours they are: leak, threshold, subtraction of the threshold in
the same step. Their surrogates are their own fastest; leak and threshold are constants there, Parameters here.

- SpikingJelly, ``LIFNode`` in multi-step mode: its registered operator for CPUs; the same spikes.
- snnTorch, ``Leaky``, one call per timestep (``LeakyParallel`` and ``StateLeaky`` do not reset). It subtracts the
  threshold one timestep later, after the leak instead of before: the same spikes at T=1 and at a leak of 1 only.
  (``reset_delay=False`` is slower and differs too, where a potential exceeds twice the threshold.)
- Norse, ``lif_box_feed_forward_step`` in its ``SNN`` loop with ``reset_subtract``; the box model has no synaptic
  delay. Its input is scaled by ``1 - leak``: the same spikes at a threshold scaled alike.
- Sinabs, ``LIF`` with ``SingleSpike`` and without input normalisation: the same spikes. Batches come first there.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Neuron = Callable[[Tensor], Tensor]
"""Spikes of a current, from membranes at rest: ``(T, B, *N)``, but ``(B, T, *N)`` where :func:`time_axis` is 1."""


def _spikingjelly(threshold: float, leak: float) -> Neuron:
    from spikingjelly.activation_based import neuron, surrogate

    node = neuron.LIFNode(
        tau=1 / (1 - leak),
        decay_input=False,
        v_threshold=threshold,
        v_reset=None,
        surrogate_function=surrogate.PiecewiseQuadratic(),
        detach_reset=True,
        step_mode="m",
    )

    def scan(current: Tensor) -> Tensor:
        node.reset()
        spikes: Tensor = node(current)
        return spikes

    return scan


def _snntorch(threshold: float, leak: float) -> Neuron:
    import snntorch

    node = snntorch.Leaky(beta=leak, threshold=threshold, spike_grad=snntorch.surrogate.fast_sigmoid())

    def scan(current: Tensor) -> Tensor:
        membrane = torch.zeros_like(current[0])
        spikes = []
        for now in current:
            spike, membrane = node(now, membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    return scan


def _norse(threshold: float, leak: float) -> Neuron:
    from norse.torch.functional.lif_box import LIFBoxFeedForwardState, LIFBoxParameters, lif_box_feed_forward_step
    from norse.torch.functional.reset import reset_subtract
    from norse.torch.module.snn import SNN

    parameters = LIFBoxParameters(
        tau_mem_inv=torch.tensor(1 - leak), v_th=torch.tensor((1 - leak) * threshold), reset_method=reset_subtract
    )
    rest = LIFBoxFeedForwardState(v=parameters.v_leak)
    node = SNN(lif_box_feed_forward_step, lambda _: rest, parameters, dt=1.0)

    def scan(current: Tensor) -> Tensor:
        spikes: Tensor = node(current)[0]
        return spikes

    return scan


def _sinabs(threshold: float, leak: float) -> Neuron:
    from sinabs.activation import SingleSpike
    from sinabs.layers import LIF

    node = LIF(
        tau_mem=-1 / math.log(leak), spike_threshold=torch.tensor(threshold), spike_fn=SingleSpike, norm_input=False
    )
    node.requires_grad_(False)

    def scan(current: Tensor) -> Tensor:
        node.reset_states()
        spikes: Tensor = node(current)
        return spikes

    return scan


_FACTORIES: dict[str, Callable[[float, float], Neuron]] = {
    "spikingjelly": _spikingjelly,
    "snntorch": _snntorch,
    "norse": _norse,
    "sinabs": _sinabs,
}

PEERS = tuple(_FACTORIES)
"""Names of the other libraries, which are their packages' names too."""


def is_installed(name: str) -> bool:
    """Say whether a library can be imported."""
    return importlib.util.find_spec(name) is not None


def time_axis(name: str) -> int:
    """Return where a library has its timesteps: ahead of the batch (0) or behind it (1)."""
    return 1 if name == "sinabs" else 0


def peer_neuron(name: str, threshold: float, leak: float) -> Neuron:
    """Return a layer's neurons as a library has them.

    Args:
        name: one of :data:`PEERS`, installed.
        threshold: > 0, in units of the current.
        leak: membrane retained per timestep, in (0, 1); for snnTorch 1 too.
    """
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # SpikingJelly asks for it, on a CPU too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports: deprecations that are theirs to mend
        return _FACTORIES[name](threshold, leak)


def versions() -> dict[str, Any]:
    """Return the version of every library that is installed."""
    from importlib import metadata

    return {name: metadata.version(name) for name in PEERS if is_installed(name)}
