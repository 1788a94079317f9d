"""Disasters in the middle of a training: named, told by layer, and survived by the last good state."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_resume import assert_same_end, session_in

from spiking_rl import LayeredNetwork, load_checkpoint
from spiking_rl.agents.session import TrainingSession
from spiking_rl.agents.training import resume_run
from spiking_rl.errors import WorkError
from spiking_rl.runs import RunFolder

AT = 1300  # agent steps: in the first stage, after two saves


@pytest.fixture(scope="module", params=["pqn", "dqn"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Train a run to which nothing happens."""
    path = tmp_path_factory.mktemp("whole") / request.param
    session_in(path, request.param).run()
    return request.param, path


def strike(session: TrainingSession, disaster: Callable[[LayeredNetwork], object]) -> None:
    """Let something happen to the network before every rollout from ``AT`` on."""
    between = session.between_rollouts

    def struck() -> None:
        if session.model.num_timesteps >= AT:
            with torch.no_grad():
                disaster(session.model.policy.q_net.network)
        between()

    session.between_rollouts = struck  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("disaster", "named"),
    [
        (lambda network: network.neurons[1].threshold.fill_(torch.nan), "threshold of layer2"),
        (lambda network: network.neurons[0].leak.fill_(torch.nan), "leak of layer1"),
        (lambda network: network.readout.weight.fill_(torch.inf), "of readout"),
    ],
    ids=["threshold", "leak", "weights"],
)
def test_a_layer_that_is_no_number_any_more_is_named(
    whole: tuple[str, Path], tmp_path: Path, disaster: Callable[[LayeredNetwork], object], named: str
) -> None:
    """The last update of a training spoils one parameter, when the loss was still a number."""
    algo, expected = whole
    session = session_in(tmp_path / "run", algo)
    average = session.model.update_average

    def spoiled() -> None:
        average()
        if session.model.num_timesteps >= AT:
            with torch.no_grad():
                disaster(session.model.policy.q_net.network)

    session.model.update_average = spoiled  # type: ignore[method-assign]
    with pytest.raises(WorkError) as caught:
        session.run()
    assert named in str(caught.value)
    assert "learning_rate" in str(caught.value)
    resume_run(RunFolder(tmp_path / "run"), device="cpu").run()
    assert_same_end(expected, tmp_path / "run")


@pytest.mark.parametrize(
    ("disaster", "told"),
    [
        (
            lambda network: network.neurons[1].threshold.fill_(1e6),
            ["layer2's threshold has exploded", "layer2 has fallen silent"],
        ),
        (lambda network: network.maps[0][1].bias.fill_(100.0), ["layer1 is saturated"]),
        (lambda network: network.maps[0][1].bias.fill_(-100.0), ["layer1 has fallen silent"]),
    ],
    ids=["exploded", "saturated", "silent"],
)
def test_a_dead_layer_is_told_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], disaster: Callable[[LayeredNetwork], object], told: list[str]
) -> None:
    session = session_in(tmp_path / "run", "pqn")
    session.shown = True
    strike(session, disaster)
    session.run()
    said = capsys.readouterr().err
    for words in told:
        assert said.count(words) == 1, "once per layer, not at every evaluation"


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let every file end after so many bytes, as on a disk that is full: the kernel refuses the rest of a write."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.name != "posix", reason="limits file sizes through POSIX")
@pytest.mark.parametrize("room", [0, 1500, 12_000])
def test_a_disk_that_is_full_in_the_middle_of_a_save(whole: tuple[str, Path], tmp_path: Path, room: int) -> None:
    algo, expected = whole
    session = session_in(tmp_path / "run", algo)
    save = session.save

    def failing() -> None:
        if session.model.num_timesteps < AT:
            return save()
        with full_disk(room):
            return save()

    session.save = failing  # type: ignore[method-assign]
    with pytest.raises(OSError, match="File too large") as caught:
        session.run()
    assert caught.value.errno == errno.EFBIG
    assert not list((tmp_path / "run").rglob("*.partial"))
    for kept in (tmp_path / "run" / "checkpoints").iterdir():
        load_checkpoint(kept)
    resume_run(RunFolder(tmp_path / "run"), device="cpu").run()
    assert_same_end(expected, tmp_path / "run")
