"""Batch normalisation folded into the weights before it."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from spiking_rl.errors import UserError
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
        UserError: a batch norm elsewhere.
    """
    folded = copy.deepcopy(network)
    with evaluating(folded):  # the fusion below asks for it
        for chain in folded.modules():
            if isinstance(chain, nn.Sequential):
                _fold_chain(chain)
    left = [name for name, module in folded.named_modules() if isinstance(module, _BatchNorm)]
    if left:
        raise UserError("network", left[0], "a batch norm must stand directly behind a convolution or linear layer")
    for module in folded.modules():
        module.train(network.training)
    return folded


def _fold_chain(chain: nn.Sequential) -> None:
    for i in range(len(chain) - 1, 0, -1):
        linear, norm = chain[i - 1], chain[i]
        if isinstance(linear, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            chain[i - 1] = fuse_conv_bn_eval(linear, norm)
            del chain[i]
        elif isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
            chain[i - 1] = fuse_linear_bn_eval(linear, norm)
            del chain[i]
