"""spiking-rl list: what there is to choose from."""

from __future__ import annotations

from typing import Any

from spiking_rl.agents.config import recipes
from spiking_rl.agents.loading import pretrained
from spiking_rl.agents.policies import CHOSEN_NETWORKS
from spiking_rl.errors import UserError
from spiking_rl.registry import NETWORKS
from spiking_rl.vision import config as vision
from spiking_rl.vision.data import DATASETS


def run(args: list[str]) -> dict[str, Any]:
    """Print recipes, pretrained agents and networks."""
    if args and args[0] not in ("-h", "--help"):
        raise UserError("arguments", " ".join(args), "list takes none; see list --help")
    if args:
        print(
            "usage: spiking-rl list [--json]\n\nList recipes, pretrained agents and networks. Example: spiking-rl list"
        )
        return {}
    found = {name: recipe.get("env", "") for name, recipe in sorted(recipes().items())}
    found.pop("default")
    networks = sorted(NETWORKS)
    agents = sorted(pretrained())
    print("recipes (spiking-rl train NAME):")
    for name, env in found.items():
        print(f"  {name:22}{env}")
    print("  ...                   any other Gymnasium id")
    print(f"pretrained agents (spiking-rl render NAME): {', '.join(agents)}")
    of_agents = [name for name in networks if name in CHOSEN_NETWORKS]
    print(f"networks of agents: {', '.join(of_agents)}")
    print(f"networks of images: {', '.join(name for name in networks if name not in of_agents)}")
    images = sorted(vision.recipes())
    print(f"image recipes (spiking-rl classify train NETWORK DATASET --recipe NAME): {', '.join(images)}")
    print(f"data sets: {', '.join((*DATASETS, 'imagenet'))}")
    return {
        "recipes": found,
        "pretrained": agents,
        "networks": networks,
        "image_recipes": images,
        "datasets": [*DATASETS, "imagenet"],
    }
