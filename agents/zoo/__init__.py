"""Spiking policies by name, and hyper-parameters, in the conventions of rl_zoo3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spiking_rl.agents.actor_critic_policies import SpikingActorCriticCnnPolicy, SpikingActorCriticPolicy
from spiking_rl.agents.cnn_policies import SpikingCnnPolicy
from spiking_rl.agents.policies import SpikingMlpPolicy
from spiking_rl.agents.quantile_policies import SpikingQRCnnPolicy, SpikingQRMlpPolicy

_ACTOR_CRITIC = {"SpikingMlpPolicy": SpikingActorCriticPolicy, "SpikingCnnPolicy": SpikingActorCriticCnnPolicy}

POLICIES: dict[str, dict[str, type[Any]]] = {
    "dqn": {"SpikingMlpPolicy": SpikingMlpPolicy, "SpikingCnnPolicy": SpikingCnnPolicy},
    "qrdqn": {"SpikingMlpPolicy": SpikingQRMlpPolicy, "SpikingCnnPolicy": SpikingQRCnnPolicy},
    "ppo": _ACTOR_CRITIC,
    "a2c": _ACTOR_CRITIC,
}
"""By rl_zoo3's name of an algorithm: the names that ``policy`` may have in its YAML file."""


def algorithms(known: Mapping[str, type[Any]]) -> dict[str, type[Any]]:
    """Return subclasses of the known algorithms that take our policies by name.

    Args:
        known: algorithms by rl_zoo3's names, such as its ``ALGOS``.

    Returns:
        Those of ``known`` that a spiking policy exists for. They keep SB3's own names too; SB3's
        classes are not changed.
    """
    return {
        name: type(known[name].__name__, (known[name],), {"policy_aliases": known[name].policy_aliases | policies})
        for name, policies in POLICIES.items()
        if name in known
    }
