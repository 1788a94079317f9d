"""The same network in plain PyTorch: with ReLU, with another library's neurons, and without any: the limit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF
from spiking_rl.scripts.speed.peers import Neuron, peer_neuron, time_axis


class ReLUNetwork(nn.Sequential):
    """The maps of a network with ReLU between them."""

    def __init__(self, network: LayeredNetwork) -> None:
        layers = [layer for m in network.maps for layer in (m, nn.ReLU(inplace=True))]
        super().__init__(*layers, network.readout)


class PeerNetwork(nn.Module):
    """The maps of a network with another library's neurons, layer by layer: whole maps over all timesteps.

    As in our network the first map runs once, since its input is the same at all timesteps, and the mean over
    timesteps is taken ahead of the readout. The libraries leave both to their user.

    Args:
        network: gives maps, readout, thresholds and leaks, and T.
        peer: the library's name.
    """

    def __init__(self, network: LayeredNetwork, peer: str) -> None:
        super().__init__()
        self.maps, self.readout = network.maps, network.readout
        self.timesteps, self.axis = network.timesteps, time_axis(peer)
        self.scans: list[Neuron] = []
        for neuron in network.neurons:
            assert isinstance(neuron, LIF)
            with neuron.leak.device:
                self.scans.append(peer_neuron(peer, neuron.threshold.item(), neuron.leak.item()))

    def forward(self, inputs: Tensor, observer: Callable[[Tensor], None] | None = None) -> Tensor:
        """Return outputs ``(B, n)``; an observer is called with every layer's spikes ``(T, B, *N)``."""
        frames = (self.timesteps, -1) if self.axis == 0 else (-1, self.timesteps)
        x = inputs
        for i, (layer, scan) in enumerate(zip(self.maps, self.scans, strict=True)):
            current = layer(x)
            if i == 0:
                repeats = [-1] * (current.dim() + 1)
                repeats[self.axis] = self.timesteps
                current = current.unsqueeze(self.axis).expand(repeats)
            else:
                current = current.reshape(*frames, *current.shape[1:])
            spikes = scan(current)
            if observer is not None:
                observer(spikes.transpose(0, self.axis))
            x = spikes.flatten(0, 1)
        mean = spikes.mean(self.axis) if self.timesteps > 1 else x
        outputs: Tensor = self.readout(mean)
        return outputs


class Limit(nn.Module):
    """The maps alone: the first on B frames, then a chain of the others on T*B frames, and the readout on B.

    No spiking network of this shape can do with less on dense kernels.

    Args:
        network: gives maps, readout and T.
        inputs: ``(B, *input_shape)``; the first map's output on them tells the shape that the chain starts with.
    """

    def __init__(self, network: LayeredNetwork, inputs: Tensor) -> None:
        super().__init__()
        self.maps, self.readout, self.timesteps = network.maps, network.readout, network.timesteps
        with torch.no_grad():
            current = self.maps[0](inputs)
            frames = torch.cat([current] * self.timesteps)  # keeps the memory format: nothing is converted on the way
        self.start = (torch.rand_like(frames) < 0.2).to(frames.dtype).requires_grad_()  # dense kernels do not care

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first map's current, whose gradient is a constant, and outputs ``(B, n)``."""
        current = self.maps[0](inputs)
        x = self.start
        for layer in list(self.maps)[1:]:
            x = layer(x)
        mean = x.reshape(self.timesteps, -1, *x.shape[1:]).mean(0) if self.timesteps > 1 else x
        return current, self.readout(mean)
