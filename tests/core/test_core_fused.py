"""The compiled scan: the same values as the plain loop, gradients to rounding, and what happens without it."""

from __future__ import annotations

import copy
import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spiking_rl import LIF, LIFState, build_network, compiling, fused_fresh, fused_plan, lif_scan, lif_scan_reference
from spiking_rl.surrogate import fire

needs_compiler = pytest.mark.skipif(compiling.built_loops() is None, reason="no C compiler here")


@pytest.fixture
def no_library() -> Iterator[None]:
    """Forget what was built, before and after."""
    compiling.built_loops.cache_clear()
    yield
    compiling.built_loops.cache_clear()


def values(scan: object, tensors: dict[str, Tensor | None], arriving: list[Tensor], **options: object) -> list[Tensor]:
    """Return spikes, potentials, membranes, then the gradients of all tensors that can have one."""
    leaves = {
        k: t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for k, t in tensors.items()
    }
    state = None if leaves["membrane"] is None else LIFState(leaves["membrane"])
    args = (leaves["current"], state, leaves["leak"], leaves["threshold"], leaves["starts"])
    found = scan(*args, trace=True, **options)  # type: ignore[operator]
    outputs = [found.spikes, found.potential, found.state.membrane]
    sum((output * weight).sum() for output, weight in zip(outputs, arriving, strict=True)).backward()  # type: ignore[union-attr]
    return [*outputs, *(leaf.grad for leaf in leaves.values() if leaf is not None and leaf.grad is not None)]


@needs_compiler
@settings(max_examples=120, deadline=None)
@given(
    neurons=st.sampled_from([(), (1,), (5,), (700,), (6, 4, 5), (40, 1, 1), (32, 11, 9), (3, 17, 19)]),
    steps=st.integers(1, 4),
    repeat=st.integers(1, 3),
    batch=st.integers(1, 5),
    shared=st.sampled_from(["both", "leak", "neither"]),
    channels_last=st.booleans(),
    carried=st.booleans(),
    reset=st.booleans(),
    once=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_plain_loop(
    neurons: tuple[int, ...],
    steps: int,
    repeat: int,
    batch: int,
    shared: str,
    channels_last: bool,
    carried: bool,
    reset: bool,
    once: bool,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    current = torch.randn(steps * batch, *neurons, generator=draw)
    if channels_last and len(neurons) == 3:
        current = current.to(memory_format=torch.channels_last)
    per_channel = (*neurons[:1], *[1] * (len(neurons) - 1))
    tensors = {
        "current": current.unflatten(0, (steps, batch)),
        "membrane": torch.randn(batch, *neurons, generator=draw) if carried else None,
        "leak": torch.rand(() if shared != "neither" else per_channel, generator=draw),
        "threshold": torch.rand(() if shared == "both" else per_channel, generator=draw) + 0.2,
        "starts": torch.rand(steps * repeat, batch, generator=draw) < 0.3 if reset else None,
    }
    assert fused_plan.plan(tensors["current"], tensors["leak"], tensors["threshold"]) is not None  # type: ignore[arg-type]
    shapes = [(steps * repeat, batch, *neurons)] * 2 + [(batch, *neurons)]
    arriving = [torch.randn(shape, generator=draw) for shape in shapes]
    once = once and not carried and not reset  # the loops do the rest
    options = {"repeat": repeat, "gamma": 0.7, "single_spike": once}
    expected = values(lif_scan_reference, tensors, arriving, **options)
    found = values(lif_scan, tensors, arriving, **options)
    assert all(map(torch.equal, found[:3], expected[:3])), "the forward pass must not round otherwise"
    torch.testing.assert_close(found[3:], expected[3:], rtol=2e-4, atol=1e-3)  # thousands of terms of either sign
    # Without a gradient nothing is saved, and the spikes are the same.
    with torch.no_grad():
        state = LIFState(tensors["membrane"]) if carried else None  # type: ignore[arg-type]
        args = (tensors["current"], state, tensors["leak"], tensors["threshold"], tensors["starts"])
        bare = lif_scan(*args, repeat=repeat, single_spike=once)  # type: ignore[arg-type]
    assert torch.equal(bare.spikes, found[0])
    assert torch.equal(bare.state.membrane, found[2])


@needs_compiler
@settings(max_examples=80, deadline=None)
@given(
    neurons=st.sampled_from([(), (1,), (5,), (700,), (6, 4, 5), (40, 1, 1), (32, 11, 9), (3, 17, 19)]),
    timesteps=st.integers(1, 5),
    lasts=st.booleans(),
    batch=st.integers(1, 5),
    per_channel=st.booleans(),
    channels_last=st.booleans(),
    other_gradient=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_short_way_from_rest_is_the_plain_loop(
    neurons: tuple[int, ...],
    timesteps: int,
    lasts: bool,
    batch: int,
    per_channel: bool,
    channels_last: bool,
    other_gradient: bool,
    half: bool,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    repeat = timesteps if lasts else 1
    stored = torch.bfloat16 if half else torch.float32
    current = torch.randn(timesteps // repeat * batch, *neurons, generator=draw).to(stored)
    if channels_last and len(neurons) == 3:
        current = current.to(memory_format=torch.channels_last)
    channels = neurons[0] if per_channel and neurons else None
    lif = LIF(channels, max(0, len(neurons) - 1), gamma=0.7)
    with torch.no_grad():
        lif.leak.copy_(torch.rand(lif.leak.shape, generator=draw))
        lif.threshold.copy_(torch.rand(lif.threshold.shape, generator=draw) + 0.2)
    arriving = torch.randn(timesteps * batch, *neurons, generator=draw).to(stored)
    if other_gradient and len(neurons) == 3:  # arrives otherwise than the current lies
        arriving = arriving.to(memory_format=torch.contiguous_format if channels_last else torch.channels_last)
    found = []
    for way in (
        lambda leaf: lif.fresh(leaf, timesteps, repeat),
        lambda leaf: lif_scan_reference(
            leaf.float().unflatten(0, (-1, batch)), None, lif.leak, lif.threshold, gamma=0.7, repeat=repeat
        ).spikes.flatten(0, 1),
    ):
        leaf = current.clone().requires_grad_()
        lif.zero_grad()
        spikes = way(leaf)
        spikes.backward(arriving.to(spikes.dtype))
        of_leak = torch.zeros_like(lif.leak) if lif.leak.grad is None else lif.leak.grad  # nothing leaks in one step
        found.append([spikes.detach(), leaf.grad, of_leak, lif.threshold.grad])
    assert found[0][0].dtype == stored
    assert torch.equal(found[0][0].float(), found[1][0]), "the forward pass must not round otherwise"
    # Both round a current's gradient once, at the end; a tie may go either way.
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-2 if half else 2e-4, atol=2e-4)
    torch.testing.assert_close(found[0][2:], found[1][2:], rtol=2e-4, atol=1e-3)  # thousands of terms of either sign
    with torch.no_grad():
        assert torch.equal(lif.fresh(current, timesteps, repeat), found[0][0])
        own = current.clone(memory_format=torch.preserve_format)
        inside = lif.fresh(own, timesteps, repeat, spare=True)
        assert torch.equal(inside, found[0][0])
        if repeat == 1 and stored is torch.float32:  # as many currents as spikes
            assert inside.data_ptr() == own.data_ptr(), "in the current's place"
    lif.fresh(current, timesteps, repeat, spare=True)
    assert torch.equal(current, leaf.detach()), "a gradient needs it"


@needs_compiler
@pytest.mark.parametrize("channels_last", [False, True])
def test_firing_alone_is_the_loop_too(channels_last: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    potential = torch.randn(7, 8, 5, 5, generator=draw)
    if channels_last:
        potential = potential.to(memory_format=torch.channels_last)
    found = {}
    for dtype in (torch.float32, torch.float64):  # double precision goes the other way
        u = potential.clone().to(dtype).requires_grad_()
        threshold = (torch.arange(8).reshape(8, 1, 1) / 8 + 0.1).to(dtype).requires_grad_()
        spikes = fire(u, threshold, 0.9)
        spikes.backward(torch.linspace(-1, 1, spikes.numel(), dtype=dtype).reshape(spikes.shape))
        found[dtype] = [spikes.detach().double(), u.grad, threshold.grad]
    assert found[torch.float32][0].sum() > 0
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


@needs_compiler
def test_currents_in_bfloat16_with_a_state() -> None:
    """Only currents and spikes are rounded: membranes and potentials are those of the same currents in 32 bits."""
    draw = torch.Generator().manual_seed(5)
    current = torch.randn(6, 3, 8, 5, 5, generator=draw).bfloat16()
    membrane, starts = torch.randn(3, 8, 5, 5, generator=draw), torch.rand(6, 3, generator=draw) < 0.3
    leak, threshold = torch.rand(8, 1, 1, generator=draw), torch.rand(8, 1, 1, generator=draw) + 0.2
    weights = [torch.randn(6, 3, 8, 5, 5, generator=draw), torch.randn(3, 8, 5, 5, generator=draw)]
    found = []
    for scan, dtype in ((lif_scan, torch.bfloat16), (lif_scan_reference, torch.float32)):
        leaves = [t.clone().requires_grad_() for t in (current.to(dtype), membrane, leak, threshold)]
        result = scan(leaves[0], LIFState(leaves[1]), leaves[2], leaves[3], starts, trace=True)
        arriving = weights[0].bfloat16().to(dtype)
        ((result.spikes * arriving).sum().float() + (result.state.membrane * weights[1]).sum()).backward()  # type: ignore[union-attr]
        found.append([result, [leaf.grad for leaf in leaves]])
    (ours, gradients), (plain, expected) = found
    assert ours.spikes.dtype == torch.bfloat16
    assert ours.potential.dtype == ours.state.membrane.dtype == torch.float32
    assert torch.equal(ours.spikes.float(), plain.spikes)
    assert torch.equal(ours.potential, plain.potential)
    assert torch.equal(ours.state.membrane, plain.state.membrane)
    torch.testing.assert_close(gradients[0].float(), expected[0], rtol=2e-2, atol=2e-4)
    torch.testing.assert_close(gradients[1:], expected[1:], rtol=2e-4, atol=2e-4)


@needs_compiler
def test_what_is_no_number_stays_none_in_bfloat16() -> None:
    current = torch.tensor([[0.9, 0.9, 0.1]]).bfloat16().requires_grad_()
    lif = LIF(threshold=0.5)
    lif.fresh(current, 1).backward(torch.tensor([[torch.nan, 1.0, torch.inf]]).bfloat16())
    assert current.grad is not None
    assert current.grad[0, 0].isnan()
    assert current.grad[0, 1].isfinite()


@needs_compiler
def test_what_is_no_number_stays_none_over_several_timesteps() -> None:
    current = torch.full((3, 1, 2), 0.45).requires_grad_()
    arriving = torch.tensor([torch.nan, 1.0]).expand(3, 1, 2)
    lif_scan(current, None, torch.tensor(0.9), torch.tensor(0.4)).spikes.backward(arriving)
    assert current.grad is not None
    assert current.grad[..., 0].isnan().all(), "else an agent that has diverged goes on as if nothing were"
    assert current.grad[..., 1].isfinite().all()


@needs_compiler
def test_starts_may_lie_in_memory_as_they_like() -> None:
    draw = torch.Generator().manual_seed(0)
    current, starts = torch.randn(6, 4, 8, generator=draw), torch.rand(4, 6, generator=draw).t() < 0.3
    leak, threshold = torch.tensor(0.9), torch.tensor(0.4)
    assert not starts.is_contiguous()
    found = lif_scan(current, None, leak, threshold, starts)
    assert torch.equal(found.spikes, lif_scan_reference(current, None, leak, threshold, starts).spikes)


@needs_compiler
def test_threads_that_plan_together_keep_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes an address along, which is kept for as long as the plan: it must not be that of a loser."""
    both = threading.Barrier(2, timeout=10)

    class Slow(fused_plan.Shape):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            both.wait()

    monkeypatch.setattr(fused_plan, "Shape", Slow)
    parameter = torch.tensor(0.5)
    made = fused_plan.plan(torch.zeros(2, 3, 23), parameter, parameter)
    assert made is not None
    made.kept.clear()
    with ThreadPoolExecutor(2) as pool:
        addresses = set(pool.map(lambda _: fused_plan.sizes_of(made, 2, 1, 1), range(2)))
    assert addresses == {ctypes.addressof(kept) for kept in made.kept.values()}


@needs_compiler
def test_parameters_that_were_shared_with_another_process_are_found_where_they_are() -> None:
    scan, current = fused_fresh.FreshScan(torch.tensor(0.9), torch.tensor(0.5), 2, 1), torch.randn(6, 4)
    expected = scan(current)
    scan.leak.share_memory_()  # moves them, as to send them does
    scan.threshold.share_memory_()
    others = [torch.full((), 1e9) for _ in range(10_000)]  # take the place
    assert torch.equal(scan(current), expected), len(others)  # type: ignore[arg-type]


@pytest.mark.parametrize("repeat", [0, 2, 4])
def test_currents_last_one_timestep_or_all(repeat: int) -> None:
    """Else there are fewer of them than timesteps to read them at."""
    with pytest.raises(ValueError, match=f"repeat is {repeat}"):
        LIF().fresh(torch.randn(3, 5), 3, repeat)
    parameter = torch.tensor(0.5)
    assert fused_fresh.fused_fresh(torch.randn(3, 5), parameter, parameter, 0.3, 3, repeat) is None


@needs_compiler
def test_tensors_that_are_not_on_the_cpu_are_not_taken_for_the_last() -> None:
    scan = fused_fresh.FreshScan(torch.tensor(0.9), torch.tensor(0.5), 2, 1)
    assert scan(torch.randn(6, 4)) is not None
    assert scan(torch.randn(6, 4, device="meta")) is None


@needs_compiler
def test_membranes_may_have_been_stored_in_half_precision() -> None:
    current, membrane = torch.randn(3, 2, 8), torch.randn(2, 8).half()
    leak, threshold = torch.tensor(0.9), torch.tensor(0.4)
    found = lif_scan(current, LIFState(membrane), leak, threshold)
    expected = lif_scan_reference(current, LIFState(membrane.float()), leak, threshold)
    assert torch.equal(found.spikes, expected.spikes)
    assert torch.equal(found.state.membrane, expected.state.membrane)


@needs_compiler
def test_any_number_of_threads_gives_the_same_gradients() -> None:
    draw = torch.Generator().manual_seed(3)
    tensors = {
        "current": torch.randn(12, 32, 15, 15, generator=draw).unflatten(0, (3, 4)),
        "membrane": None,
        "leak": torch.rand(32, 1, 1, generator=draw),
        "threshold": torch.tensor(0.5),
        "starts": None,
    }
    arriving = [torch.randn(3, 4, 32, 15, 15, generator=draw)] * 2 + [torch.randn(4, 32, 15, 15, generator=draw)]
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(values(lif_scan, tensors, arriving))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("current", "threshold"),
    [
        (torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)),
        (torch.randn(2, 3, 4).bfloat16(), torch.tensor(0.5).bfloat16()),
        (torch.randn(2, 3, 4, 2, 2), torch.rand(4, 2, 2)),  # one threshold per neuron of a picture
    ],
    ids=["double", "bfloat16", "per-neuron"],
)
def test_what_it_cannot_do_the_loops_do(current: Tensor, threshold: Tensor) -> None:
    leak = torch.tensor(0.75, dtype=current.dtype)
    assert fused_plan.plan(current, leak, threshold) is None
    found = lif_scan(current, None, leak, threshold)
    assert torch.equal(found.spikes, lif_scan_reference(current, None, leak, threshold).spikes)


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize(
    "variable", [{compiling.SWITCH: "0"}, {"CC": "false"}, {"PATH": ""}], ids=["off", "broken", "none"]
)
def test_without_a_compiler_a_network_learns_all_the_same(
    variable: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def learn() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        network = build_network("mlp", (4,), 2, timesteps=3)
        torch.nn.init.normal_(network.readout.weight)
        outputs, _ = network(torch.randn(1, 16, 4))
        outputs.square().sum().backward()
        gradient = network.neurons[0].threshold.grad
        assert isinstance(gradient, Tensor)
        return outputs.detach(), gradient

    expected = learn()
    compiling.built_loops.cache_clear()
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiling.built_loops() is None
    torch.testing.assert_close(learn(), expected, rtol=1e-3, atol=1e-4)


@needs_compiler
@pytest.mark.usefixtures("no_library")
def test_it_is_built_once_and_only_where_nobody_else_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiling.built_loops() is not None
    (built,) = (tmp_path / "spiking-rl").glob("*.so")
    made = built.stat().st_mtime_ns
    compiling.built_loops.cache_clear()
    assert compiling.built_loops() is not None
    assert built.stat().st_mtime_ns == made
    os.chmod(tmp_path / "spiking-rl", 0o777)
    compiling.built_loops.cache_clear()
    assert compiling.built_loops() is None, "a library that others can replace must not be loaded"


class _Squared(torch.nn.Module):
    def forward(self, root: Tensor) -> Tensor:
        return root.square()


@needs_compiler
@pytest.mark.usefixtures("scanning")
def test_a_layer_that_has_changed_since_its_last_scan_is_looked_at_again() -> None:
    torch.manual_seed(0)
    lif = LIF(leak=0.5)
    current = torch.randn(6, 5, 4, 4)

    def check(given: Tensor = current, timesteps: int = 3) -> None:
        spikes = lif.fresh(given, timesteps)
        steps = given.unflatten(0, (timesteps, -1))
        wanted = lif_scan_reference(steps, None, lif.leak, lif.threshold).spikes.flatten(0, 1)
        torch.testing.assert_close(spikes, wanted, rtol=0, atol=0)

    check()
    check(timesteps=2)
    check(current.to(memory_format=torch.channels_last))
    check(current[:, :2])
    lif.threshold = torch.nn.Parameter(torch.rand(5, 1, 1) + 0.1)
    check()
    check(current.double())
    lif.double()
    check(current.double())
    lif.float()
    torch.nn.utils.parametrize.register_parametrization(lif, "threshold", _Squared())
    check()
    twin = copy.deepcopy(lif)
    assert torch.equal(twin.fresh(current, 3), lif.fresh(current, 3))


@needs_compiler
@pytest.mark.usefixtures("scanning")
def test_transforms_of_functions_see_the_scan() -> None:
    neurons, currents = LIF(gamma=1.0), torch.rand(5, 4, 3)  # of five samples, each near its threshold

    def spikes(current: torch.Tensor) -> torch.Tensor:
        return neurons.fresh(current, 2)

    def total(current: torch.Tensor) -> torch.Tensor:
        return (spikes(current) * torch.arange(3.0)).sum()

    with torch.no_grad():
        assert torch.equal(torch.func.vmap(spikes)(currents), torch.stack([spikes(c) for c in currents]))
    each = torch.func.vmap(torch.func.grad(total))(currents)
    for got, current in zip(each, currents, strict=True):
        leaf = current.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(total(leaf), leaf)
        torch.testing.assert_close(got, wanted)
        assert wanted.any()


@needs_compiler
@pytest.mark.parametrize("timesteps", [1, 3])
def test_gradients_of_single_samples(timesteps: int) -> None:
    """Of a whole network's parameters, by ``torch.func``, and one by one."""
    network = build_network("mlp", (4,), 2, timesteps=timesteps, hidden=[8, 8], layer_norm=True)
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    inputs = torch.randn(6, 4)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(network, parameters, (x.reshape(1, 1, 4),))[0].square().sum()

    with torch.no_grad():
        network.readout.weight.normal_()
        parameters = {name: p.detach().clone() for name, p in network.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
    for i, x in enumerate(inputs):
        names, leaves = zip(*network.named_parameters(), strict=True)
        wanted = torch.autograd.grad(
            network(x.reshape(1, 1, 4))[0].square().sum(), leaves, allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(names, wanted, strict=True):
            torch.testing.assert_close(each[name][i], gradient, rtol=1e-4, atol=1e-5, msg=name)


@needs_compiler
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("sizes", [(1, 8), (8, 1)])
def test_one_timestep_reads_no_leak(sizes: tuple[int, int], learning: bool) -> None:
    """Whatever is read beyond a parameter's end would be other memory; here it is the rest of a larger tensor."""
    leaks, thresholds = (torch.full((8,), 0.5)[:n].reshape(() if n == 1 else (n,)) for n in sizes)
    current = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    way = fused_fresh._find(current, leaks, thresholds, 1, 1)
    assert way is not None
    told = ctypes.cast(way.sizes, ctypes.POINTER(fused_plan.Shape)).contents
    assert told.leaks == told.thresholds == sizes[1]
    with torch.set_grad_enabled(learning):
        spikes = fused_fresh.fused_fresh(current, leaks, thresholds, 1.0, 1, 1)
    assert spikes is not None
    assert torch.equal(spikes, (current > 0.5).float())
