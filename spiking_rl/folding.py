"""Batch normalisation folded into the weights before it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from spiking_rl.errors import UserError
from spiking_rl.event_layers import is_plain
from spiking_rl.networks import LayeredNetwork, evaluating

_BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d)


def fold_batch_norm(network: LayeredNetwork) -> LayeredNetwork:
    """Return an equal network without batch norm, ready for conversion.

    In evaluation a batch norm is ``(y - mean) * weight / sqrt(variance + eps) + bias`` with constant
    mean and variance: a scale of the weights before it, and a bias that they get if they had none. The
    outputs in evaluation mode are the same to rounding. VGGs and ResNets built with ``bias=True``
    instead of ``batch_norm=True`` have the parameters of a folded one, by name and shape.

    Args:
        network: as trained; it stays as it is. Each batch norm stands in an ``nn.Sequential``,
            directly behind an ``nn.Conv2d`` or ``nn.Linear``.

    Raises:
        UserError: a batch norm elsewhere, or one that keeps no running statistics.
    """
    folded = copy.deepcopy(network)
    channels_first = _of_channels_first(folded)
    with evaluating(folded):  # the fusion below asks for it
        for chain in folded.modules():
            if type(chain) is nn.Sequential and is_plain(chain):  # what another one does with its modules is not known
                _fold_chain(chain, channels_first)
    left = [name for name, module in folded.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        raise UserError("network", left[0], "a batch norm must stand directly behind a convolution or linear layer")
    for module in folded.modules():
        module.train(network.training)
    return folded


@torch.no_grad()
def _of_channels_first(network: LayeredNetwork) -> set[nn.Module]:
    """Return the batch norms of ``(B, C, L)``: they scale the first axis, and a linear map makes the last."""
    found: set[nn.Module] = set()

    def look(module: nn.Module, args: Any) -> None:
        if args[0].dim() > 2:
            found.add(module)

    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm1d)]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    x = next(network.parameters()).new_zeros(2, *network.input_shape)  # one has no variance
    with evaluating(network):
        for layer in [*network.maps, network.readout] if norms else []:
            x = layer(x)
    for handle in handles:
        handle.remove()
    return found


def _fold_chain(chain: nn.Sequential, channels_first: set[nn.Module]) -> None:
    for i in range(len(chain) - 1, 0, -1):
        linear, norm = chain[i - 1], chain[i]
        if not (is_plain(linear) and is_plain(norm)) or getattr(norm, "running_mean", 0) is None:
            continue
        if isinstance(linear, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            chain[i - 1] = fuse_conv_bn_eval(linear, norm)
            del chain[i]
        elif isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and norm not in channels_first:
            chain[i - 1] = fuse_linear_bn_eval(linear, norm)
            del chain[i]
