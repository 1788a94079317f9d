"""The speed benchmark: who takes part, what is timed, and what the rows say."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, as_flags
from torch import Tensor, nn

from spiking_rl import UserError, lif_scan
from spiking_rl.networks import LayeredNetwork
from spiking_rl.registry import build_network
from spiking_rl.scripts import benchmark as measuring
from spiking_rl.scripts.benchmark import main
from spiking_rl.scripts.published import add_results
from spiking_rl.scripts.speed import cases, narrow, rows
from spiking_rl.scripts.speed.cases import CASES, LEAK, Case, build_case
from spiking_rl.scripts.speed.half import half_rows
from spiking_rl.scripts.speed.narrow import make_plain, narrow_rows
from spiking_rl.scripts.speed.peers import PEERS, is_installed, peer_neuron, time_axis
from spiking_rl.scripts.speed.plain import Limit, PeerNetwork, ReLUNetwork
from spiking_rl.scripts.speed.rates import RATES, rates_rows
from spiking_rl.scripts.speed.scan import scan_rows
from spiking_rl.scripts.speed.timing import interleave, median_ratio, times_of
from spiking_rl.scripts.speed.variants import LIMIT, OURS, RELU, build_pass, differing_spikes

SMALL = Case("nature_cnn", (2, 36, 36), 3, 4, (3, 1), True, (("layer_norm", False), ("per_channel", False)))
peers = pytest.mark.parametrize(
    "peer",
    [
        pytest.param(p, marks=pytest.mark.skipif(not is_installed(p), reason=f"{p}: pip install '.[benchmark]'"))
        for p in PEERS
    ],
)
theirs = pytest.mark.filterwarnings("ignore")  # deprecations in the other libraries


def reference_neuron(network: LayeredNetwork, layer: int) -> Any:
    """Return our neurons in the shape of a peer's."""
    neuron = network.neurons[layer]
    return lambda current: lif_scan(current, None, neuron.leak, neuron.threshold).spikes


@theirs
@peers
def test_spikes_of_the_other_libraries_are_ours(peer: str) -> None:
    torch.manual_seed(0)
    # snnTorch subtracts the threshold after the leak: the same without one.
    leak = 1.0 if peer == "snntorch" else LEAK
    current = torch.randn(6, 8, 4, 5, 5)
    ours = lif_scan(current, None, torch.tensor(leak), torch.tensor(0.7)).spikes
    axis = time_axis(peer)
    scan = peer_neuron(peer, 0.7, leak)
    for _ in range(2):  # nothing of the first call is left in the second
        assert torch.equal(scan(current.transpose(0, axis)).transpose(0, axis), ours)
    assert 0.1 < ours.mean() < 0.5


@theirs
@peers
def test_whole_networks_of_the_other_libraries_spike_as_ours(peer: str) -> None:
    for timesteps in (1,) if peer == "snntorch" else (3, 1):
        network, inputs = build_case(SMALL, timesteps)
        assert differing_spikes(peer, network, inputs) < 1e-3  # batches of another order round otherwise
        build_pass(peer, SMALL, network, inputs)()
        assert all(m.grad is not None for m in network.maps.parameters())


def test_a_plain_network_with_our_neurons_is_our_network(monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs = build_case(SMALL, 3)
    monkeypatch.setattr("spiking_rl.scripts.speed.plain.peer_neuron", lambda *_: None)
    plain = PeerNetwork(network, "norse")
    plain.scans = [reference_neuron(network, i) for i in range(len(network.maps))]
    assert torch.allclose(plain(inputs), network(inputs.unsqueeze(0))[0][0], atol=1e-6)
    monkeypatch.setattr("spiking_rl.scripts.speed.variants.PeerNetwork", lambda *_: plain)
    assert differing_spikes("norse", network, inputs) == 0
    plain.scans[2] = lambda current: torch.zeros_like(current)
    assert differing_spikes("norse", network, inputs) > 0


def test_the_relu_network_is_the_registered_one() -> None:
    network, inputs = build_case(SMALL, 1)
    relu = build_network("nature_cnn", (2, 36, 36), 3, neuron="relu", layer_norm=False)
    relu.load_state_dict(network.state_dict(), strict=False)
    assert torch.allclose(ReLUNetwork(network)(inputs), relu(inputs.unsqueeze(0))[0][0], atol=1e-6)


def frames_seen(network: LayeredNetwork, run: Any) -> list[int]:
    """Return how many frames each map and the readout get in one pass."""
    seen: list[int] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
        seen.append(len(args[0]))

    handles = [m.register_forward_hook(hook) for m in [*network.maps, network.readout]]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("library", [OURS, LIMIT])
def test_the_limit_computes_what_we_compute_and_no_neurons(library: str) -> None:
    network, inputs = build_case(SMALL, 3)
    run = build_pass(library, SMALL, network, inputs)
    assert frames_seen(network, run) == [4, 12, 12, 12, 4]  # layer 1 once, the mean ahead of the readout
    weights = [p for n, p in network.named_parameters() if not n.startswith("neurons")]
    assert all(p.grad is not None and bool(p.grad.any()) for p in weights)
    of_neurons = [p.grad for p in network.neurons.parameters()]
    assert all((g is None) == (library == LIMIT) for g in of_neurons)


def test_the_limit_is_differentiated_through_all_its_layers() -> None:
    network, inputs = build_case(SMALL, 3)
    limit = Limit(network, inputs)
    limit(inputs)[1].sum().backward()
    assert limit.start.grad is not None
    assert limit.start.shape == (12, 32, 8, 8)


def test_the_limit_starts_in_the_memory_format_of_its_maps() -> None:
    """Else its convolutions would convert, and it would be no limit."""
    network, inputs = build_case(SMALL, 3)
    assert Limit(network, inputs).start.is_contiguous(memory_format=torch.channels_last)
    network, inputs = build_case(SMALL, 3, channels_last=False)
    assert Limit(network, inputs).start.is_contiguous()


def test_bfloat16_is_told_as_a_multiple_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "vgg16", SMALL)
    rows = half_rows("vgg16", rounds=3, seconds=1)
    variants = [(None, None), *((t, rate) for t in SMALL.timesteps for rate in (0.02, 0.1))]
    assert {(r["timesteps"], r["rate"], r["precision"]) for r in rows} == {
        (*variant, p) for variant in variants for p in ("float32", "bfloat16")
    }
    assert all(r["ratio_to_float32"] == 1 for r in rows if r["precision"] == "float32")
    assert all(r["ratio_to_relu"] == 1 for r in rows if r["timesteps"] is None)


def test_bfloat16_is_left_out_where_it_is_emulated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "has_bfloat16", lambda: False)
    assert measuring._half(measuring.Options()) == []
    assert "no instructions for bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize("halves", [False, True])
def test_a_network_with_plain_convolutions_is_timed_beside(halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "has_bfloat16", lambda: halves)
    small = Case("vgg16", (3, 32, 32), 3, 4, (1,), True, (("width", 0.05),))
    network, inputs = build_case(small, 1)
    expected = network(inputs.unsqueeze(0))[0]
    make_plain(network)
    assert {type(m) for m in network.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert torch.allclose(network(inputs.unsqueeze(0))[0], expected, atol=1e-4)
    rows = narrow_rows(rounds=3, seconds=1, cases=[small])
    assert len(rows) == (8 if halves else 4)
    assert all(r["ratio_to_plain"] == 1 for r in rows if r["maps"] == "nn.Conv2d")


def test_training_passes_are_timed_at_several_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "vgg16", Case("vgg16", (3, 32, 32), 3, 4, (2, 1), True, (("width", 0.1),)))
    rows = rates_rows("vgg16", rounds=3, seconds=1)
    assert [(r["library"], r["timesteps"], r["rate"]) for r in rows] == [
        ("torch-relu", None, None),
        *[("limit", 2, None), *(("spiking-rl", 2, rate) for rate in RATES)],
        *[("limit", 1, None), *(("spiking-rl", 1, rate) for rate in RATES)],
    ]
    ours = [r for r in rows if r["rate"]]
    assert all(r["rate"] / 2 < r["fired"] < 2 * r["rate"] for r in ours)
    assert all(r["ratio_to_relu"] > 0 and r["ratio_to_limit"] > 0 for r in ours)


def test_the_scan_is_told_as_a_multiple_of_a_copy() -> None:
    rows = scan_rows(rounds=3, seconds=1, device=torch.device("cpu"), shape=(2, 8, 16, 16))
    assert {(row["pass"], row["timesteps"]) for row in rows} == {
        (way, t) for way in ("forward", "forward+backward") for t in (4, 1)
    }
    assert all(row["ratio_to_copy"] > 0 for row in rows)
    ways = {"forward": 2, "forward+backward": 5}
    for row in rows:
        moved = ways[row["pass"]] * 4 * row["timesteps"] * 2 * 8 * 16 * 16
        assert row["gb_per_second"] == pytest.approx(moved / row["ms"] / 1e6, abs=0.06)


def test_a_device_is_waited_for_before_and_after() -> None:
    order: list[str] = []
    interleave({"a": lambda: order.append("a")}, rounds=1, seconds=1, warm_up=0, settle=lambda: order.append("wait"))
    assert order == ["a", "wait", "a", "wait"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_gpu_is_measured_by_the_same_command(benchmark: Cli, tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    done = benchmark("--device", "cuda", "--cases", "nature", "scan", "half", "--rounds", 3, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "half: left out" in done.stdout
    rows = json.loads(output.read_text())["rows"]
    assert {row["case"] for row in rows} == {"nature", "scan"}
    assert all(row["device"] == "cuda" for row in rows)
    assert all(row["extra_mb"] > 0 for row in rows if row["case"] == "nature")


def test_networks_fire_and_are_the_same_in_every_process() -> None:
    network, inputs = build_case(SMALL, 3)
    again, same = build_case(SMALL, 3, channels_last=False)
    rates: list[float] = []
    with torch.no_grad():
        network(inputs.unsqueeze(0), observer=lambda _, spikes, __: rates.append(float(spikes.mean())))
    assert all(0.1 < rate < 0.3 for rate in rates)
    assert torch.equal(inputs, same)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert same.is_contiguous()


def test_timings_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []
    variants = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleave(variants, rounds=4, seconds=60, warm_up=2, passes=2)
    assert order == ["a", "a", "a", "b", "b", "b"] * 6  # the first of each turn is not timed
    assert [len(t) for t in times.values()] == [4, 4]
    assert [len(t) for t in interleave(variants, rounds=50, seconds=0).values()] == [3, 3]


def test_ratios_are_taken_within_rounds() -> None:
    # The second round met a slow moment: medians of the columns would say 20 / 10.
    assert median_ratio([20, 90, 30], [10, 30, 10]) == 3.0
    assert times_of([1, 2, 3, 4, 5]) == {"ms": 3.0, "quartiles": [2.0, 4.0], "rounds": 5}


def test_rows_say_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.CASES, "small", SMALL)
    monkeypatch.setattr(rows, "libraries", lambda *_: [OURS, LIMIT])
    given = {OURS: [6.0, 12.0, 6.0], LIMIT: [4.0, 4.0, 4.0], RELU: [2.0, 3.0, 2.0]}
    monkeypatch.setattr(rows, "interleave", lambda runs, **_: {key: given[key[0]] for key in runs})
    table = rows.timed_rows("small", rounds=3, seconds=1, channels_last=True)
    by_key = {(row["library"], row["timesteps"]): row for row in table}
    assert set(by_key) == {(RELU, None), (OURS, 3), (OURS, 1), (LIMIT, 3), (LIMIT, 1)}
    ours = by_key[OURS, 3]
    assert ours["ratio_to_relu"] == 3.0
    assert ours["ratio_to_limit"] == 1.5
    assert ours["ratio_quartiles"] == [3.0, 3.5]
    assert (ours["network"], ours["pass"], ours["batch"]) == ("nature_cnn", "forward+backward", 4)
    assert by_key[RELU, None]["ratio_to_limit"] is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_memory_grows_with_what_is_kept() -> None:
    asked = {"channels_last": True, "keep": True, "threads": 1}
    once, more = (rows.extra_mb("latency-nature", OURS, t, **asked) for t in (1, 60))  # type: ignore[arg-type]
    assert once is not None
    assert more is not None
    assert 0 < once < more


@pytest.fixture
def benchmark(script: Cli) -> Cli:
    return partial(script, "spiking_rl.scripts.benchmark")


def test_one_command_times_prints_and_writes_and_parts_add_up(benchmark: Cli, tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    done = benchmark("--cases", "latency-nature", *as_flags({"rounds": 1, "threads": 1, "json": output}))
    assert done.returncode == 0, done.stderr
    for peer in PEERS:
        assert (f"{peer}: not installed, left out" in done.stdout) == (not is_installed(peer))
    done = benchmark("--cases", "latency-cartpole", "--timesteps", 1, "--rounds", 1, "--output", output)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["command"].count("spiking_rl.scripts.benchmark") == 2
    assert {row["case"] for row in results["rows"]} == {"latency-nature", "latency-cartpole"}
    for row in results["rows"]:
        assert {"network", "pass", "library", "timesteps", "batch", "extra_mb"} <= set(row)
        assert row["quartiles"][0] <= row["ms"] <= row["quartiles"][1]
        assert row["ratio_to_relu"] > 0
    assert output.with_suffix(".png").stat().st_size > 5_000


def test_memory_joins_the_rows_that_were_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    timed = {"case": "nature", "allocator": "stock", "network": "nature_cnn", "pass": "forward+backward", "threads": 1}
    timed |= {"batch": 32, "differing_spikes": None, "memory_format": "channels_last", "extra_mb": None, "ms": 2.0}
    timed |= {
        "timesteps": 4,
        "device": "cpu",
        "ratio_to_relu": 2.0,
        "ratio_to_limit": 1.0,
        "quartiles": [1.0, 3.0],
        "library": LIMIT,
    }
    timed |= {"ratio_quartiles": [1.5, 2.5]}
    add_results(output, "benchmark", [timed, timed | {"case": "vgg16"}], same=("case",))
    monkeypatch.setattr(rows, "extra_mb", lambda case, library, timesteps, **_: len(case) + timesteps)
    asked = ["--cases", "nature", "--no-time", "--stock-allocator", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark", *asked])
    main()
    after = json.loads(output.read_text())["rows"]
    assert {row["case"]: row["extra_mb"] for row in after} == {"nature": 10, "vgg16": None}
    assert next(row for row in after if row["case"] == "nature") == timed | {"extra_mb": 10}


def test_rows_of_another_commit_are_not_mixed_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    for made_at, part in (("one", "a"), ("two", "b"), ("two", "c"), ("two", "b")):
        monkeypatch.setattr("spiking_rl.scripts.published.commit", lambda made_at=made_at: made_at)
        everything = add_results(output, "benchmark", [{"case": part}], same=("case",))
    assert [row["case"] for row in everything] == ["c", "b"]
    assert json.loads(output.read_text())["rows"] == everything
    output.write_text("[]")
    with pytest.raises(UserError, match="holds no results"):
        add_results(output, "benchmark", [], same=("case",))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--no-time",), "name their file"),
        (("--cases", "vgg"), "cases = 'vgg': unknown"),
        (("--rounds", 0), "rounds = 0"),
        (("--output", "speed.txt"), "must end with .json"),
        (("--device", "tpu"), "device = 'tpu'"),
    ],
)
def test_mistakes_are_told_in_one_line(benchmark: Cli, flags: tuple[object, ...], words: str) -> None:
    done = benchmark(*flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
