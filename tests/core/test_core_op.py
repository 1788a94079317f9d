"""The scan as an operation of torch's own: the same bits, for what is plain; all else goes the longer way."""

from __future__ import annotations

import copy
import pickle
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from spiking_rl import LIF, build_network, compiling, fused_fresh
from spiking_rl.fused_fresh import FreshScan


def learnt(lif: LIF, current: Tensor, timesteps: int, repeat: int) -> list[Tensor]:
    """Return spikes and gradients."""
    given = current.detach().requires_grad_()
    spikes = lif.fresh(given, timesteps, repeat)
    arriving = torch.randn(spikes.shape, generator=torch.Generator().manual_seed(1)).to(spikes.dtype)
    parameters = [lif.threshold] if timesteps == 1 else [lif.threshold, lif.leak]
    return [spikes, *torch.autograd.grad((spikes * arriving).sum(), [given, *parameters])]


def laid_out(tensor: Tensor) -> list[int]:
    """Return the strides that mean something."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@pytest.mark.usefixtures("operation")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    neurons=st.sampled_from([(), (1,), (700,), (6, 4, 5), (40, 1, 1), (32, 11, 9)]),
    timesteps=st.integers(1, 7),
    lasts=st.booleans(),
    batch=st.integers(1, 5),
    per_channel=st.booleans(),
    channels_last=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_gives_the_same_bits(
    neurons: tuple[int, ...],
    timesteps: int,
    lasts: bool,
    batch: int,
    per_channel: bool,
    channels_last: bool,
    half: bool,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    repeat = timesteps if lasts else 1
    current = torch.randn(timesteps // repeat * batch, *neurons, generator=draw)
    current = current.bfloat16() if half else current
    if channels_last and len(neurons) == 3:
        current = current.to(memory_format=torch.channels_last)
    lif = LIF(neurons[0] if per_channel and neurons else None, max(len(neurons) - 1, 0))
    for parameter in (lif.leak, lif.threshold):
        torch.nn.init.uniform_(parameter, 0.2, 1, generator=draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_fresh, "built_op", lambda: None)
        fused_fresh._fresh.cache_clear()
        longer = learnt(copy.deepcopy(lif), current, timesteps, repeat)
        fused_fresh._fresh.cache_clear()
    shorter = learnt(lif, current, timesteps, repeat)
    assert "FusedFresh" in str(longer[0].grad_fn)
    assert "FusedFresh" not in str(shorter[0].grad_fn)
    for one, other in zip(longer, shorter, strict=True):
        assert torch.equal(one, other)
        assert laid_out(one) == laid_out(other)
        assert one.dtype is other.dtype
    with torch.no_grad():
        assert torch.equal(lif.fresh(current, timesteps, repeat), longer[0])
        assert torch.equal(lif.fresh(current.clone(), timesteps, repeat, spare=True), longer[0])


@pytest.mark.usefixtures("operation")
def test_a_gradient_that_nobody_else_holds_is_written_over() -> None:
    def made(*, held: bool) -> int:
        """Return how many tensors like the current the way back makes."""
        current = torch.randn(8, 16, requires_grad=True)
        spikes = LIF().fresh(current, 2)
        score = spikes.square().sum()
        kept: list[Tensor] = []
        if held:
            spikes.register_hook(kept.append)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            score.backward()
        return sum(event.name == "aten::empty_like" for event in profile.events())

    assert made(held=True) == made(held=False) + 1


@pytest.mark.usefixtures("scanning")
def test_gradients_that_lie_otherwise_are_moved() -> None:
    torch.manual_seed(0)
    lif = LIF(leak=0.5)
    plain = torch.randn(6, 5, 4, 4)
    weight = torch.randn(6, 80)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        current = plain.to(memory_format=layout).requires_grad_()
        (grad,) = torch.autograd.grad((lif.fresh(current, 3).flatten(1) * weight).sum(), current)
        found.append(grad)
    assert bool(found[0].any())
    assert torch.equal(*found)


class Squared(torch.nn.Module):
    """Computed anew at every call."""

    def forward(self, root: Tensor) -> Tensor:
        """Return the square."""
        return root.square()


class Marked(Tensor):
    """A subclass that does nothing."""


class Watching(TorchFunctionMode):
    """A mode that does nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


def known(lif: LIF, current: Tensor, *, timesteps: int = 2) -> Tensor | None:
    """Return what the operation says of a case."""
    assert lif._ways.compiled is not None
    found = lif._ways.compiled.spikes(current, lif.leak, lif.threshold, timesteps, 1, 1.0, False)
    return None if found is None else torch.as_tensor(found)


@pytest.mark.usefixtures("operation")
def test_what_is_another_case_is_left_alone() -> None:
    lif = LIF(6)
    current = torch.randn(8, 6)
    lif.fresh(current, 2)
    assert known(lif, current) is not None
    assert known(lif, current, timesteps=4) is None
    others = {
        "batch": current[:4],
        "strides": torch.randn(6, 8).t(),
        "type": current.double(),
        "device": current.to("meta"),
        "subclass": current.as_subclass(Marked),
        "sparse": current.to_sparse(),
        "negated": torch._neg_view(current),
    }
    assert {name: known(lif, other) for name, other in others.items()} == dict.fromkeys(others)
    torch.func.grad(torch.sum)(current)  # what is over is no reason
    assert known(lif, current) is not None
    with Watching():
        assert known(lif, current) is None
    with FlopCounterMode(display=False):
        assert known(lif, current) is None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert known(lif, current) is None
    torch.set_num_threads(threads)
    assert known(lif, current) is not None
    lif.threshold = torch.nn.Parameter(torch.ones(2, 6)[:, 0])
    assert known(lif, current) is None
    lif.threshold = torch.nn.Parameter(torch.ones(12)[::2])
    assert known(lif, current) is None


@pytest.mark.usefixtures("scanning")
def test_parameters_that_somebody_computes_get_their_gradient() -> None:
    lif = LIF(6, threshold=0.25)
    current = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    lif.fresh(current, 2).sum().backward()
    plain = lif.threshold.grad
    assert plain is not None
    assert bool(plain.any())
    torch.nn.utils.parametrize.register_parametrization(lif, "threshold", Squared())
    root = lif.parametrizations.threshold.original  # type: ignore[union-attr]
    with torch.no_grad():
        root.fill_(0.5)  # type: ignore[operator]
    root.grad = None
    lif.fresh(current, 2).sum().backward()
    torch.testing.assert_close(root.grad, plain)  # 2 * 0.5 times


@pytest.mark.usefixtures("operation")
def test_a_current_that_was_changed_is_noticed() -> None:
    current = torch.randn(8, 6, requires_grad=True) * 1
    spikes = LIF().fresh(current, 2)
    current.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()


@pytest.mark.usefixtures("operation")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_a_network_copies_pickles_and_compiles_after_it() -> None:
    torch.manual_seed(0)
    network = build_network("mlp", (4,), 2, timesteps=3)
    torch.nn.init.normal_(network.readout.weight)
    inputs = torch.randn(1, 16, 4)
    outputs = network(inputs)[0]
    assert all(lif._ways.compiled is not None for lif in network.neurons)
    twins = copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.compile(network, backend="eager")
    for twin in twins:
        assert torch.equal(twin(inputs)[0], outputs)


class Answer:
    """An operation that has one answer."""

    def __init__(self, answer: Tensor | None) -> None:
        self.answer = answer

    def spikes(self, *given: object) -> Tensor | None:
        """Return it."""
        return self.answer


@pytest.mark.usefixtures("operation")
def test_deployed_networks_use_it() -> None:
    torch.manual_seed(0)
    scan = FreshScan(torch.tensor(0.5), torch.tensor(0.3), 4, 1)
    current = torch.randn(8, 6)
    with torch.no_grad():
        first = scan(current)
        assert scan._ways.compiled is not None
        scan._ways.compiled = Answer(first)
        assert scan(current) is first


@pytest.mark.usefixtures("scanning")
@pytest.mark.parametrize("timesteps", [1, 2])
def test_what_hooks_hand_back_in_another_layout_is_moved(timesteps: int) -> None:
    torch.manual_seed(0)
    lif = LIF(5, 2, leak=0.5)
    current = torch.randn(6, 5, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 5, 4, 4)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad((lif.fresh(current, timesteps) * weight).sum(), [current, lif.threshold])

    expected = gradients()
    for change in (Tensor.contiguous, Tensor.double):
        with torch.autograd.graph.saved_tensors_hooks(change, lambda kept: kept):
            found = gradients()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.usefixtures("operation")
def test_a_gradient_of_another_size_is_refused() -> None:
    spikes = LIF().fresh(torch.randn(8, 6, requires_grad=True), 1)
    with pytest.raises(RuntimeError, match="was given"):
        spikes.grad_fn(torch.ones(1, 6))  # type: ignore[misc, operator]


@pytest.mark.usefixtures("scanning")
@pytest.mark.parametrize("timesteps", [1, 2])
def test_negative_views_count_as_what_they_show(timesteps: int) -> None:
    current = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    lif = LIF(threshold=0.3)
    spikes = lif.fresh(current, timesteps)
    assert torch.equal(lif.fresh(torch._neg_view(current.detach()), timesteps), lif.fresh(-current.detach(), timesteps))
    arriving = torch.randn(8, 6)
    (expected,) = torch.autograd.grad(spikes, current, -arriving, retain_graph=True)
    (found,) = torch.autograd.grad(spikes, current, torch._neg_view(arriving))
    assert bool(found.any())
    assert torch.equal(found, expected)


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def place(built_operation: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a folder of a stand-in for the compiler, which puts in place what was built before, and its log.

    Compiled code goes to ``cache/``. A file ``words`` is what the compiler refuses with; one ``wait`` holds it up.
    """
    script = tmp_path / "compiler"
    copying = f"import shutil, sys; shutil.copy({built_operation.__file__!r}, sys.argv[sys.argv.index('-o') + 1])"
    script.write_text(
        f"#!/bin/sh\ncd {shlex.quote(str(tmp_path))}\necho ran >>log\nwhile [ -e wait ]; do sleep 0.05; done\n"
        f"[ ! -e words ] || {{ cat words >&2; exit 1; }}\n"
        f'exec {shlex.quote(sys.executable)} -c {shlex.quote(copying)} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "built_op", compiling.built_op.__wrapped__)
    return tmp_path


def runs(place: Path) -> int:
    """Return how often the compiler was run."""
    log = place / "log"
    return len(log.read_text().split()) if log.exists() else 0


def test_it_is_built_behind_ones_back_by_one_at_a_time(place: Path) -> None:
    (place / "wait").touch()
    assert compiling.built_op() is None
    wait_for(lambda: runs(place) == 1)
    assert compiling.built_op() is None
    path, command = compiling._op_command()
    assert compiling._is_busy(path)
    compiling._build_op(path, command)  # as by one who looked a moment earlier
    (place / "wait").unlink()
    compiling.build_op()
    assert compiling.built_op() is not None
    assert runs(place) == 1
    assert not list(place.glob("cache/*/*.part*"))


def test_a_builder_that_died_leaves_nothing_in_the_way(place: Path) -> None:
    (place / "wait").touch()
    assert compiling.built_op() is None
    wait_for(lambda: runs(place) == 1)
    path, _ = compiling._op_command()
    found = [process for process in psutil.process_iter() if str(path) in _words(process)]
    for process in found:
        process.kill()
    assert found
    wait_for(lambda: not compiling._is_busy(path))
    (place / "wait").unlink()
    compiling.build_op()
    assert compiling.built_op() is not None


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize(
    ("words", "final"),
    [
        ("fatal error: torch.h: No such file", True),
        ("fatal error: Killed signal terminated program cc1plus", False),
        ("", False),
    ],
)
def test_what_a_compiler_refuses_is_not_tried_again(words: str, final: bool, place: Path) -> None:
    (place / "words").write_text(words)
    path, _ = compiling._op_command()
    for _ in range(2):
        compiling.build_op()
        assert compiling.built_op() is None
        wait_for(lambda: not compiling._is_busy(path))
    assert runs(place) == (1 if final else 4)
    told = path.with_suffix(".failed")
    assert (told.read_text() if told.exists() else None) == (words if final else None)
    lif = LIF()
    assert fused_fresh.fused_fresh(torch.randn(4, 3), lif.leak, lif.threshold, 1.0, 2, 1, ways=lif._ways) is not None


@pytest.mark.parametrize("variable", [{"SPIKING_RL_COMPILE": "0"}, {"CXX": "/nowhere", "PATH": "/nowhere"}])
def test_without_a_compiler_nothing_is_built(
    variable: dict[str, str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiling, "built_loops", compiling.built_loops.__wrapped__)
    compiling.build_op()
    assert compiling.built_op() is None
    assert not list(place.glob("cache/*/lif_op*"))
