"""Functions recorded as CUDA graphs: the same results, on a stand-in for the device and on one where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recording_device import Tape, recording_device  # noqa: F401
from torch import Tensor, nn

from spiking_rl import graphs
from spiking_rl.graphs import GraphedFunction

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def learner(device: str) -> tuple[Callable[..., tuple[Tensor, ...]], nn.Linear]:
    """Return an update of a map, and the map."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=torch.tensor(0.1, device=device), capturable=True, fused=True)

    def update(inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        loss = (layer(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    return update, layer


def agree(device: str) -> None:
    """Compare twelve recorded updates, of two sizes in turn, with plain ones."""
    (plain, expected), (function, layer) = learner(device), learner(device)
    recorded = GraphedFunction(function)
    batches = [torch.randn(5 + k % 2, 7, generator=torch.Generator().manual_seed(k)).to(device) for k in range(12)]
    losses = [(plain(b[:, :4], b[:, 4:]), recorded(b[:, :4], b[:, 4:])) for b in batches]
    for (wanted,), (loss,) in losses:
        torch.testing.assert_close(loss, wanted)
    assert len({float(loss) for _, (loss,) in losses}) == len(batches)
    for ours, theirs in zip(layer.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("recording_device")
def test_replayed_updates_are_plain_updates() -> None:
    agree("cpu")
    assert Tape.replays == 6, "two shapes, six calls each, three of them before the recording"


@needs_cuda
def test_replayed_updates_are_plain_updates_on_a_gpu() -> None:
    agree("cuda")


@pytest.mark.usefixtures("recording_device")
def test_the_function_itself_runs_four_times() -> None:
    calls = []

    def double(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(x)
        return (2 * x,)

    recorded = GraphedFunction(double)
    for k in range(9):
        assert recorded(torch.full((2,), float(k)))[0].tolist() == [2 * k, 2 * k]
    assert len(calls) == 4


@pytest.mark.usefixtures("recording_device")
def test_what_cannot_be_recorded_is_called() -> None:
    recorded = GraphedFunction(lambda x: (x * float(x.sum()),))
    plain = [recorded(torch.tensor([float(k)]))[0].item() for k in range(3)]
    with pytest.warns(UserWarning, match="no CUDA graph can be made.*capturing"):
        plain += [recorded(torch.tensor([3.0]))[0].item()]
    plain += [recorded(torch.tensor([float(k)]))[0].item() for k in range(4, 6)]
    assert plain == [0, 1, 4, 9, 16, 25]


@pytest.mark.usefixtures("recording_device")
def test_the_number_of_recordings_is_limited() -> None:
    recorded = GraphedFunction(lambda x: (x + 1,))
    for rows in range(1, 20):
        for _ in range(5):
            assert torch.equal(recorded(torch.zeros(rows))[0], torch.ones(rows))
    assert Tape.replays == 2 * graphs._MOST


@pytest.mark.usefixtures("recording_device")
def test_a_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKING_RL_GRAPHS", "0")
    agree("cpu")
    assert Tape.replays == 0


def test_elsewhere_functions_are_just_called() -> None:
    agree("cpu")
