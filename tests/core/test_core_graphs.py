"""Functions recorded as CUDA graphs: the same results, on a stand-in for the device and on one where there is one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from recording_device import Tape, recording_device  # noqa: F401
from torch import Tensor, nn

from spiking_rl import graphs
from spiking_rl.graphs import Recorder

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
    recorder = Recorder()
    batches = [torch.randn(5 + k % 2, 7, generator=torch.Generator().manual_seed(k)).to(device) for k in range(12)]
    losses = [(plain(b[:, :4], b[:, 4:]), recorder("update", function, b[:, :4], b[:, 4:])) for b in batches]
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

    recorder = Recorder()
    for k in range(9):
        assert recorder("double", double, torch.full((2,), float(k)))[0].tolist() == [2 * k, 2 * k]
    assert len(calls) == 4


@pytest.mark.usefixtures("recording_device")
def test_what_cannot_be_recorded_is_called() -> None:
    waits("cpu")


def waits(device: str) -> None:
    """Call a function that waits for the device six times."""
    recorder = Recorder()

    def square(x: float) -> float:
        return recorder("square", lambda x: (x * float(x.sum()),), torch.tensor([x], device=device))[0].item()

    plain = [square(k) for k in range(3)]
    with pytest.warns(UserWarning, match="no CUDA graph can be made.*captur"):
        plain += [square(3)]
    plain += [square(k) for k in range(4, 6)]
    assert plain == [0, 1, 4, 9, 16, 25]


@needs_cuda
def test_what_a_gpu_cannot_record_is_called_and_leaves_the_stream_as_it_was() -> None:
    stream = torch.cuda.current_stream()
    waits("cuda")
    assert torch.cuda.current_stream() == stream


@needs_cuda
def test_a_recording_that_is_gone_harms_no_other_on_a_gpu() -> None:
    """Each product keeps scratch memory per stream, which a graph takes along when it is dropped."""
    left = torch.randn(256, 256, device="cuda")
    first, second = Recorder(), Recorder()
    for name in "ab":
        for _ in range(5):
            product = second(name, lambda x: (x @ x,), left)[0]
        for _ in range(5):
            first(name, lambda x: (x @ x,), left)
        first.forget()
        torch.cuda.empty_cache()
        torch.testing.assert_close(second("a", lambda x: (x @ x,), left)[0], product)


@pytest.mark.usefixtures("recording_device")
def test_functions_are_not_kept_and_so_neither_is_whose_they_are() -> None:
    def double(x: Tensor) -> tuple[Tensor, ...]:
        return (2 * x,)

    recorder, known = Recorder(), weakref.ref(double)
    for _ in range(5):
        recorder("double", double, torch.ones(2))
    del double
    assert recorder.names == {"double"}
    assert known() is None


@pytest.mark.usefixtures("recording_device")
def test_a_copy_has_recorded_nothing() -> None:
    recorder = Recorder()
    for _ in range(5):
        recorder("double", lambda x: (2 * x,), torch.ones(2))
    assert recorder.names == {"double"}
    assert copy.deepcopy(recorder).names == set()
    recorder.forget()
    assert recorder.names == set()


@pytest.mark.usefixtures("recording_device")
def test_the_number_of_recordings_is_limited() -> None:
    recorder = Recorder()
    for rows in range(1, 20):
        for _ in range(5):
            assert torch.equal(recorder("more", lambda x: (x + 1,), torch.zeros(rows))[0], torch.ones(rows))
    assert Tape.replays == 2 * graphs._MOST


@pytest.mark.usefixtures("recording_device")
def test_a_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIKING_RL_GRAPHS", "0")
    agree("cpu")
    assert Tape.replays == 0


def test_elsewhere_functions_are_just_called() -> None:
    agree("cpu")
