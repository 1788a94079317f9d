"""spiking-rl list: what there is to choose from."""

from __future__ import annotations

from typing import Any

from spiking_rl.agents.config import recipes
from spiking_rl.networks import NETWORKS


def run(args: list[str]) -> dict[str, Any]:
    """Print recipes and networks."""
    if args:
        print("usage: spiking-rl list [--json]\n\nList recipes and networks. Example: spiking-rl list")
        return {}
    found = {name: recipe.get("env", "any other environment") for name, recipe in sorted(recipes().items())}
    networks = sorted(NETWORKS)
    print("recipes (spiking-rl train NAME):")
    for name, env in found.items():
        print(f"  {name:20}{env}")
    print(f"networks: {', '.join(networks)}")
    return {"recipes": found, "networks": networks}
