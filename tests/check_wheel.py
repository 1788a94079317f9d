"""Check what is inside a built wheel: python tests/check_wheel.py WHEEL."""

from __future__ import annotations

import sys
import zipfile


def check(path: str) -> None:
    names = zipfile.ZipFile(path).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"spiking_rl"}, f"top level holds {sorted(top)}, not spiking_rl alone"
    for wanted in (
        "spiking_rl/py.typed",
        "spiking_rl/lif_scan.c",
        "spiking_rl/lif_loops.h",
        "spiking_rl/lif_op.cpp",
        "spiking_rl/events.c",
        "spiking_rl/event_lists.h",
        "spiking_rl/event_rows.h",
        "spiking_rl/stored.h",
        "spiking_rl/agents/recipes/cartpole.yaml",
        "spiking_rl/agents/recipes/default.yaml",
        "spiking_rl/agents/pretrained/cartpole-masked/model.safetensors",
        "spiking_rl/agents/pretrained/cartpole-masked/config.json",
        "spiking_rl/agents/pretrained/pong/model.safetensors",
        "spiking_rl/agents/pretrained/pong-stateful/model.safetensors",
        "spiking_rl/agents/zoo/dqn.yml",
        "spiking_rl/vision/backbones.py",
        "spiking_rl/vision/recipes/fast.yaml",
        "spiking_rl/vision/recipes/diet-snn.yaml",
        "spiking_rl/vision/data/datasets.py",
        "spiking_rl/envs/make.py",
        "spiking_rl/scripts/main.py",
    ):
        assert wanted in names, f"{wanted} is missing"
    print(f"wheel: {len(names)} files, one package")


if __name__ == "__main__":
    check(sys.argv[1])
