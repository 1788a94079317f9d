"""The loss of a batch, against its formula written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from spiking_rl.energy import SpikeCost
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF
from spiking_rl.registry import build_network
from spiking_rl.vision.config import ClassifyConfig
from spiking_rl.vision.objective import Objective

IMAGES = cast(Any, SimpleNamespace(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)))


def _network(neuron: str, seed: int) -> LayeredNetwork:
    torch.manual_seed(seed)
    network = build_network("vgg6", (3, 32, 32), 10, neuron=neuron, timesteps=2, width=0.125)
    # Fresh networks answer 0 to everything: labels and teacher would be as far away as each other.
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter)
    for cell in network.neurons:
        if isinstance(cell, LIF):
            torch.nn.init.constant_(cell.threshold, 0.05)
    return network.eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (6,))


@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("distill", [None, 0.0, 0.7, 1.0])
def test_labels_teacher_and_spikes_add_up(batch: tuple[Tensor, Tensor], distill: float | None, penalty: float) -> None:
    images, labels = batch
    network, teacher = _network("lif", 0), None if distill is None else _network("relu", 1)
    part = distill or 0.0
    config = ClassifyConfig(distill=part, spike_penalty=penalty, label_smoothing=0.1)
    objective = Objective(network, config, IMAGES, teacher)
    found = objective(images, labels)

    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGES.mean, IMAGES.std))
    inputs = ((images / 255 - mean) / std).unsqueeze(0)
    cost = SpikeCost(network)
    logits, _ = network(inputs, observer=cost)
    likely = logits[0].log_softmax(1)
    smooth = 0.9 * torch.eye(10)[labels] + 0.1 / 10
    expected = (1 - part) * -(smooth * likely).sum(1).mean()
    if teacher is not None:
        expected = expected - part * (teacher(inputs)[0][0].softmax(1) * likely).sum(1).mean()
    expected = expected + penalty * cost.total
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cost.total > 0, "a network that does not fire would show no price"
    assert logits.std() > 0.1, "equal scores would show no teacher"
    torch.testing.assert_close(objective(images, labels), found)  # a batch leaves nothing behind for the next


def test_a_relu_network_pays_nothing_and_a_teacher_learns_nothing(batch: tuple[Tensor, Tensor]) -> None:
    config = ClassifyConfig(distill=0.5, spike_penalty=5.0)
    relu, teacher = _network("relu", 0), _network("relu", 1)
    assert Objective(relu, config, IMAGES, None).cost is None
    Objective(relu, config, IMAGES, teacher)(*batch).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in relu.parameters())
