"""Networks that others build, watch, transform or use in their own way are what they say they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spiking_rl import (
    LIF,
    LayeredNetwork,
    SpikeCounter,
    TemporalPruning,
    UserError,
    build_network,
    calibrate_thresholds,
    convert,
    fire,
    fold_batch_norm,
    lif_scan,
    lif_scan_reference,
    load_checkpoint,
    lower_timesteps,
    macs_per_layer,
    measured_energy,
    normalisation_macs,
    register_network,
    save_checkpoint,
    spikes_per_input,
)
from spiking_rl.deploy import deploy, deploy_stateful
from spiking_rl.describing import describe
from spiking_rl.energy import SpikeCost
from spiking_rl.initialisation import scale_channels
from spiking_rl.neurons import LIFScan, LIFState
from spiking_rl.registry import NETWORKS


def mlp(timesteps: int = 3, **options: Any) -> LayeredNetwork:
    torch.manual_seed(0)
    network = build_network("mlp", (4,), 2, hidden=(16, 16), timesteps=timesteps, **options)
    nn.init.normal_(network.readout.weight)  # type: ignore[arg-type]
    if network.spiking:
        calibrate_thresholds(network, torch.randn(64, 4), 0.3)
    return network


def own(maps: list[nn.Module], neurons: list[nn.Module], readout: nn.Module, shape: tuple[int, ...]) -> LayeredNetwork:
    return LayeredNetwork(maps, neurons, readout, input_shape=shape, timesteps=3)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("timesteps", [1, 3])
def test_a_trace_holds_the_scan(timesteps: int) -> None:
    network = mlp(timesteps)
    deployed = deploy(network)

    class Traced(nn.Module):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.network, self.way = network, way

        def forward(self, x: Tensor) -> Tensor:
            if self.way == "stateful":
                return self.network(x, tuple(LIFState(torch.zeros(8, 16)) for _ in range(2)))[0]
            return deployed(x[0]) if self.way == "deployed" else self.network(x)[0]

    x, other = torch.randn(1, 8, 4), torch.randn(1, 8, 4)
    with torch.no_grad():
        for way in ("stateless", "stateful", "deployed"):
            Traced(way)(x)  # once as ever: what is remembered of it must not be used for the trace
            traced = torch.jit.trace(Traced(way), x, check_trace=False)  # type: ignore[no-untyped-call]
            torch.testing.assert_close(traced(other), Traced(way)(other))
            assert float(traced(other).abs().max()) > 0


def test_a_network_of_several_timesteps_can_be_exported() -> None:
    network = mlp(3)
    x = torch.randn(1, 8, 4)
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x)[0], network(x)[0])


def test_thresholds_of_the_first_axis_are_no_bias_of_the_last() -> None:
    torch.manual_seed(0)
    for width in (8, 5):  # 5 channels: where there are as many entries as channels nothing would tell
        lif = LIF(5, 1)
        lif.threshold.data.copy_(torch.linspace(0.05, 1, 5).reshape(5, 1))
        readout = nn.Sequential(nn.Flatten(), nn.Linear(5 * width, 3))
        network = own([nn.Linear(8, width)], [lif], readout, (5, 8))
        network.set_timesteps(1)
        x = torch.randn(16, 5, 8)
        torch.testing.assert_close(deploy(network)(x), network(x.unsqueeze(0))[0][0])


def test_a_batch_norm_of_the_first_axis_is_not_folded_into_the_last() -> None:
    chain = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5))
    network = own([chain], [nn.ReLU()], nn.Sequential(nn.Flatten(), nn.Linear(25, 3)), (5, 8))
    network(torch.randn(1, 64, 5, 8))
    with pytest.raises(UserError, match="batch norm"):
        fold_batch_norm(network)
    without = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(UserError, match="batch norm"):
        fold_batch_norm(own([without], [nn.ReLU()], nn.Linear(5, 3), (8,)))


class Halved(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return 0.5 * super().forward(x)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_a_chain_of_ones_own_and_listeners_are_deployed_as_they_are(timesteps: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    network = own([nn.Linear(8, 16), Halved(nn.Linear(16, 16))], [LIF(), LIF()], nn.Linear(16, 3), (8,))
    network.set_timesteps(timesteps)
    calibrate_thresholds(network, x, 0.3)
    torch.testing.assert_close(deploy(network)(x), network(x.unsqueeze(0))[0][0])
    state = network.initial_state(32)
    torch.testing.assert_close(deploy_stateful(network)(x, state)[0], network(x.unsqueeze(0), state)[0][0])
    network.maps[0].register_forward_hook(lambda module, args, output: output * 3)
    torch.testing.assert_close(deploy(network)(x), network(x.unsqueeze(0))[0][0])


class Silent(LIF):
    """Fires at every second timestep at most."""

    def forward(self, current: Tensor, *args: Any, **kwargs: Any) -> LIFScan:  # type: ignore[override]
        scan = super().forward(current, *args, **kwargs)
        spikes = scan.spikes.clone()
        spikes[1::2] = 0
        return scan._replace(spikes=spikes)


def test_neurons_of_ones_own_scan_with_and_without_a_state() -> None:
    torch.manual_seed(0)
    neurons: list[nn.Module] = [Silent(threshold=0.2), Silent(threshold=0.2)]
    network = own([nn.Linear(4, 16), nn.Linear(16, 16)], neurons, nn.Linear(16, 2), (4,))
    x = torch.randn(1, 32, 4)
    outputs = network(x)[0]
    torch.testing.assert_close(outputs, network(x, network.initial_state(32))[0])
    for layer in neurons:
        layer.__class__ = LIF
    assert not torch.allclose(outputs, network(x)[0])
    calls = []
    network.neurons[0].register_forward_hook(lambda module, args, output: calls.append(output.spikes.shape))
    network(x)
    assert calls == [(3, 32, 16)]
    with pytest.raises(UserError, match="neurons"):
        deploy(network)


def test_a_second_map_of_a_layer_sees_sums() -> None:
    two = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    network = own([nn.Linear(8, 64), two], [LIF(), LIF()], nn.Linear(64, 2), (8,))
    macs = macs_per_layer(network)
    assert macs == [512, 8192, 128]
    rates = {"layer1": 0.1, "layer2": 0.1}
    additions = [r * m for r, m in zip(spikes_per_input(network, rates), macs[1:], strict=True)]
    assert additions == pytest.approx([0.1 * 4096, 0.1 * 128])
    assert normalisation_macs(network) == [0, 4096]


def test_a_map_that_serves_two_layers_is_counted_once_in_each_and_saved(tmp_path: Path) -> None:
    shared = nn.Linear(64, 64)
    network = own([nn.Linear(8, 64), shared, shared], [LIF(), LIF(), LIF()], nn.Linear(64, 2), (8,))
    assert macs_per_layer(network) == [512, 4096, 4096, 128]
    assert sum(layer.parameters for layer in describe(network)) == sum(p.numel() for p in network.parameters())
    save_checkpoint(tmp_path / "saved", network.state_dict(), {})
    loaded = load_checkpoint(tmp_path / "saved").tensors
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())


def test_other_convolutions_and_norms_behind_pools_are_counted() -> None:
    one = own(
        [nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 3, 2)],
        [LIF(), LIF()],
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 7, 2)),
        (2, 8),
    )
    assert macs_per_layer(one) == [4 * 6 * 2 * 3, 4 * 6 * 3 * 2, 42]
    counter = SpikeCounter()
    one(torch.randn(1, 4, 2, 8), observer=counter)
    assert measured_energy(one, counter).ratio > 0
    pooled = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.AvgPool2d(2))
    network = own([pooled], [LIF()], nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, 2)), (1, 8, 8))
    assert normalisation_macs(network) == [3 * 4 * 64]
    without = own([nn.Linear(8, 8), nn.Identity()], [LIF(), LIF()], nn.Linear(8, 2), (8,))
    with pytest.raises(UserError, match="layer2"):
        spikes_per_input(without, {"layer1": 0.1, "layer2": 0.1})


def test_counting_draws_nothing_and_leaves_nothing_behind() -> None:
    network = mlp(3)
    network.set_coding("poisson")
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    macs_per_layer(network)
    assert torch.equal(torch.rand(1), wanted)
    broken = own([nn.Linear(8, 8), nn.Linear(9, 8)], [LIF(), LIF()], nn.Linear(8, 2), (8,))
    with pytest.raises(RuntimeError):
        macs_per_layer(broken)
    assert not broken.maps[0]._forward_hooks


def test_the_cost_of_spikes_follows_t() -> None:
    network = mlp(5)
    cost, x = SpikeCost(network), torch.randn(1, 64, 4)
    network.set_timesteps(1)
    network(x, observer=cost)
    fresh = SpikeCost(network)
    network(x, observer=fresh)
    assert torch.is_tensor(cost.total)
    assert torch.is_tensor(fresh.total)
    assert cost.total.item() == fresh.total.item() > 0


def test_rates_and_codes_exclude_each_other_whichever_comes_first() -> None:
    network = mlp(3)
    network.set_rates(True)
    with pytest.raises(UserError, match="set_rates"):
        network.set_coding("hybrid", single_spike=True)
    with pytest.raises(UserError, match="set_rates"):
        deploy(network)
    with pytest.raises(UserError, match="set_rates"):
        lower_timesteps(network, 1, torch.randn(16, 4))
    network.set_coding()  # the defaults change nothing


def test_halves_are_scanned_in_32_bits_without_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spiking_rl.fused_plan.built_loops", lambda stored=torch.float32: None)
    torch.manual_seed(0)
    for halves in (torch.bfloat16, torch.float16):
        current = torch.randn(5, 64, 32).to(halves)
        wide = lif_scan(current.float(), None, torch.tensor(0.9), torch.tensor(0.4999))
        for scan in (lif_scan, lif_scan_reference):
            found = scan(current, None, torch.tensor(0.9), torch.tensor(0.4999))
            assert found.spikes.dtype is halves
            assert found.state is not None
            assert wide.state is not None
            assert torch.equal(found.spikes.float(), wide.spikes)
            torch.testing.assert_close(found.state.membrane, wide.state.membrane)
    half = torch.tensor([[0.5]], dtype=torch.bfloat16, requires_grad=True)
    spike = fire(half, torch.tensor(0.4999))
    assert float(spike.detach()) == 1.0
    spike.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype is torch.bfloat16


def test_tensors_of_other_devices_are_refused() -> None:
    at = {"leak": torch.tensor(0.9), "threshold": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"state.membrane is on meta, current on cpu"):
        lif_scan(torch.randn(2, 3, 4), LIFState(torch.zeros(3, 4, device="meta")), **at)
    with pytest.raises(ValueError, match="starts is on meta"):
        lif_scan(torch.randn(2, 3, 4), None, starts=torch.zeros(2, 3, dtype=torch.bool, device="meta"), **at)


def test_the_plain_loop_takes_what_the_scan_takes() -> None:
    found = lif_scan_reference(torch.randn(2, 3, 4), None, torch.tensor(0.9), torch.tensor(1.0), carry=False)
    assert found.state is None


def test_a_conversion_that_is_refused_changes_nothing() -> None:
    relu, spiking = mlp(neuron="relu"), mlp(3)
    before = {name: tensor.clone() for name, tensor in spiking.state_dict().items()}
    inputs = torch.randn(3, 10, 4)
    for given, options, named in (
        (torch.randn(10, 5), {"rate": 0.2}, r"inputs = \(10, 5\): must be of shape \(B, 4\)"),
        (inputs, {"rate": 0.2, "starts": torch.zeros(3, 10)}, "starts"),
        (inputs, {"rate": 0.2, "starts": torch.zeros(3, 9, dtype=torch.bool)}, "starts"),
    ):
        with pytest.raises(UserError, match=named):
            convert(relu, spiking, given, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must be of shape"):
        calibrate_thresholds(spiking, torch.randn(10, 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in spiking.state_dict().items())
    spiking.set_coding("hybrid")
    with pytest.raises(UserError, match="direct encoding"):
        calibrate_thresholds(spiking, inputs, 0.2, torch.zeros(3, 10, dtype=torch.bool))


def test_a_gain_goes_into_what_makes_the_current() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
    nn.init.normal_(layer[1].bias)  # type: ignore[arg-type]
    layer[1].running_mean.normal_()  # type: ignore[operator]
    x, gain = torch.randn(16, 4), torch.rand(8)
    before = layer(x)
    scale_channels(layer, gain)
    torch.testing.assert_close(layer(x), before * gain)
    with pytest.raises(UserError, match="LayerNorm"):
        scale_channels(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=False)), gain)


def test_a_builder_may_take_any_option() -> None:
    @register_network("for_this_test")
    def build(input_shape: Any, outputs: int, *, timesteps: int = 1, neuron: str = "lif", **options: Any) -> Any:
        return NETWORKS["mlp"](input_shape, outputs, timesteps=timesteps, neuron=neuron, **options)

    try:
        assert build_network("for_this_test", (4,), 2, hidden=(8,)).neuron_shapes() == [(8,)]
    finally:
        del NETWORKS["for_this_test"]


def test_scores_by_spike_times_have_one_precision() -> None:
    network = mlp(3).double()
    network.set_coding(kappa=0.5)
    network.double().eval()
    x = torch.randn(1, 16, 4, dtype=torch.float64)
    outputs = network(x)[0]
    network.set_exit_margin(1e9)
    assert outputs.dtype is network(x)[0].dtype is torch.float64
    torch.testing.assert_close(network(x)[0], outputs)


def test_a_code_lies_where_its_network_does_and_has_a_number_for_every_channel() -> None:
    network = mlp(3).to("meta")
    network.set_coding("hybrid", kappa=0.5, input_span=np.float32(2))  # type: ignore[arg-type]
    assert {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]} == {"meta"}
    with pytest.raises(UserError, match=r"input_zero = 2: numbers for 4 channels"):
        mlp(3).set_coding("hybrid", input_zero=(0.0, 0.0))


def test_inputs_without_the_axis_of_decisions_are_told() -> None:
    with pytest.raises(ValueError, match=r"inputs have 2 axes; a network takes \(L, B, 4\)"):
        mlp(3)(torch.randn(8, 4))
    with pytest.raises(ValueError, match="no environment steps"):
        mlp(3)(torch.randn(0, 8, 4))
    with pytest.raises(ValueError, match="spiking network"):
        mlp(neuron="relu").currents(torch.randn(1, 8, 4))


def test_pruning_keeps_what_it_can_save_and_refuses_what_is_no_number() -> None:
    json.dumps(TemporalPruning(3, 1, 5, 5, goal_reports=np.int64(3)).state_dict())  # type: ignore[arg-type]
    for options in ({"goal_reports": 2.5}, {"goal": math.nan}):
        with pytest.raises(UserError, match=next(iter(options))):
            TemporalPruning(3, 1, 5, 5, **options)  # type: ignore[arg-type]
    pruning = TemporalPruning(3, 1, 5, 5)
    with pytest.raises(UserError, match="spent"):
        pruning.report(1.0, math.nan)
    with pytest.raises(UserError, match="first_budget"):
        pruning.change_budgets(0, {"first_budget": None})
    assert pruning.timesteps == 3


def test_a_readout_that_only_passes_on_costs_nothing() -> None:
    network = own([nn.Linear(8, 64), nn.Linear(64, 16)], [LIF(), LIF()], nn.Flatten(), (8,))
    counter = SpikeCounter()
    network(torch.randn(1, 16, 8), observer=counter)
    energy = measured_energy(network, counter)
    assert energy.accumulates_per_mac == pytest.approx(3 * counter.rates["layer1"])
    assert energy.ratio > 0
