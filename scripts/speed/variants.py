"""One pass of a case, as every library does it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spiking_rl.deploy import deploy
from spiking_rl.networks import LayeredNetwork
from spiking_rl.scripts.speed.cases import Case
from spiking_rl.scripts.speed.peers import PEERS, is_installed
from spiking_rl.scripts.speed.plain import Limit, PeerNetwork, ReLUNetwork

Pass = Callable[[], object]

OURS, RELU, LIMIT = "spiking-rl", "torch-relu", "limit"
DEPLOYED = f"{OURS} deployed"


def libraries(case: Case, device: torch.device) -> list[str]:
    """Return who runs a case at every T: us, also deployed, the limit, and the other libraries that are installed.

    Deployed networks are event-driven on CPUs alone.
    """
    deployed = [] if case.backward or device.type != "cpu" else [DEPLOYED]
    return [OURS, *deployed, LIMIT, *(name for name in PEERS if is_installed(name))]


def build_pass(library: str, case: Case, network: LayeredNetwork, inputs: Tensor, precision: str = "float32") -> Pass:
    """Return a function that runs a library's network once, forward and where the case says so backward.

    Args:
        library: :data:`OURS`, :data:`DEPLOYED`, :data:`RELU`, :data:`LIMIT` or one of the peers.
        case: tells whether there is a backward pass.
        network: our network; the others share its weights.
        inputs: ``(B, *input_shape)``.
        precision: arithmetic of a forward and backward pass of a network, ``float32`` or ``bfloat16``.
    """
    module, forward = _forward(library, network, inputs)
    if not case.backward:
        return torch.inference_mode()(forward)

    def train() -> None:
        module.zero_grad(set_to_none=True)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = forward()
        outputs.float().square().mean().backward()  # type: ignore[no-untyped-call]

    def train_limit() -> None:
        assert isinstance(module, Limit)
        module.zero_grad(set_to_none=True)
        module.start.grad = None
        first, outputs = module(inputs)
        torch.autograd.backward([first, outputs.square().mean()], [current_gradient, None])

    if library != LIMIT:
        return train
    with torch.no_grad():
        current_gradient = torch.rand_like(network.maps[0](inputs))
    return train_limit


def _forward(library: str, network: LayeredNetwork, inputs: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    if library == OURS:
        sequence = inputs.unsqueeze(0)
        return network, lambda: network(sequence)[0]
    if library == DEPLOYED:
        deployed = deploy(network)
        return network, lambda: deployed(inputs)
    module: nn.Module
    if library == LIMIT:
        module = limit = Limit(network, inputs)
        return module, lambda: limit(inputs)[1]
    module = ReLUNetwork(network) if library == RELU else PeerNetwork(network, library)
    return module, lambda: module(inputs)


@torch.no_grad()
def differing_spikes(peer: str, network: LayeredNetwork, inputs: Tensor) -> float:
    """Return the fraction of all neurons and timesteps at which a library's network does not fire as ours does."""
    ours: list[Tensor] = []
    network(inputs.unsqueeze(0), observer=lambda _, spikes, __: ours.append(spikes))
    theirs: list[Tensor] = []
    PeerNetwork(network, peer)(inputs, observer=theirs.append)
    differing = sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True))
    return differing / sum(spikes.numel() for spikes in ours)
