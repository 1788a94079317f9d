"""The benchmark of deployed networks measures what it says; how fast they are is not the point here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from spiking_rl.scripts import benchmark_deploy


def test_every_way_of_every_network_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "speed.json"
    options = ["--threads", "1", "--rounds", "2", "--observations", "3", "--output", str(path)]
    monkeypatch.setattr(benchmark_deploy, "_VGG_BATCHES", {1: 2, 2: 2})
    monkeypatch.setattr(sys, "argv", ["benchmark_deploy", *options])
    benchmark_deploy.main()
    results = json.loads(path.read_text())
    assert results["command"].startswith("python -m spiking_rl.scripts.benchmark_deploy --threads 1")
    rows = results["rows"]
    assert all(row["quartiles"][0] <= row["ms"] <= row["quartiles"][1] for row in rows)
    assert all(row["threads"] == 1 for row in rows)
    assert all(row["batch"] == 1 for row in rows if row["network"] != "vgg16")
    for kind, agent in (("nature_cnn", "pong"), ("mlp", "cartpole")):
        of_kind = [row for row in rows if row["network"].startswith(kind)]
        ways = {(row["network"], row["timesteps"], row["pass"]) for row in of_kind}
        for network in (kind, f"{kind}, normalised ({agent})"):
            assert {(network, 1, way) for way in ("forward", "deployed", "onnx")} <= ways
        longer = {(kind, 4, "forward"), (kind, 4, "deployed")} if kind == "nature_cnn" else set()
        assert {row for row in ways if row[1] not in (1, None)} == longer
        assert {(kind, None, way) for way in ("forward", "onnx")} <= ways
        controls = [row for row in of_kind if row["timesteps"] is None and row["network"] == kind]
        assert [row["ratio_to_relu"] for row in controls if row["pass"] in ("forward", "onnx")] == [1.0, 1.0]
    for batch in (1, 2):
        of_vgg = [row for row in rows if row["network"] == "vgg16" and row["batch"] == batch]
        assert {(row["pass"], row["timesteps"], row["spike_rate"]) for row in of_vgg} == {
            ("forward", None, None),
            ("forward", 1, 0.1),
            ("forward", 4, 0.1),
            ("deployed", 4, 0.1),
            *(("deployed", 1, rate) for rate in (0.05, 0.1, 0.2)),
        }
        assert of_vgg[0]["ratio_to_relu"] == 1.0
