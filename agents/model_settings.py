"""The settings with which a run would rebuild a learner that a caller has made."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.type_aliases import TrainFreq
from stable_baselines3.common.type_aliases import TrainFrequencyUnit as Unit

from spiking_rl.agents.config import TrainConfig
from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.policies import CHOSEN_NETWORKS
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.errors import UserError
from spiking_rl.registry import NETWORKS
from spiking_rl.surrogate import DEFAULT_GAMMA

_NETWORK = (
    *("hidden", "neuron", "layer_norm", "first_layer_norm", "per_channel", "leak", "time_constants"),
    *("encoding", "single_spike", "kappa"),
)
_WITHOUT_SETTING = ("gamma", "threshold", "input_span")  # gamma is told as surrogate_gamma; the others lie in weights


def settings_of(model: SpikingPQN | SpikingDQN, config: TrainConfig) -> dict[str, Any]:
    """Return what decides on a model's learning, by the names that settings have.

    Args:
        model: a learner.
        config: settings of its algorithm.
    """
    own = {name: getattr(model, name) for name in model.hyperparameters if hasattr(config, name)}
    kwargs = model.policy.q_net_kwargs
    parameters = inspect.signature(NETWORKS[kwargs["network"]]).parameters.values()
    network = {p.name: p.default for p in parameters if p.default is not p.empty} | kwargs["network_kwargs"]
    own |= {name: network[name] for name in _NETWORK if name in network}
    own |= {"stateful": model.stateful, "surrogate_gamma": network.get("gamma", DEFAULT_GAMMA)}
    own |= {"precision": model.precision, "spike_precision": model.spike_precision}
    first, final = float(model.lr_schedule(1.0)), float(model.lr_schedule(0.0))
    if first > 0:  # one that begins at 0 cannot be told in settings
        own |= {"learning_rate": first, "final_learning_rate": final}
    if isinstance(model, SpikingDQN):
        own["return_steps"] = model.n_steps
        frequency = model.train_freq
        if isinstance(frequency, TrainFreq) and frequency.unit is Unit.STEP:
            own["train_freq"] = frequency.frequency * model.n_envs
    return own


def require_settings(model: SpikingPQN | SpikingDQN, run: Path | str) -> None:
    """Refuse to keep a run that its settings would not rebuild: resumed, it would be another.

    Raises:
        UserError: naming what has no setting.
    """
    kwargs = model.policy.q_net_kwargs
    foreign = sorted(kwargs["network_kwargs"].keys() - {*_NETWORK, *_WITHOUT_SETTING})
    if kwargs["network"] not in CHOSEN_NETWORKS:
        foreign.append("network")
    optimizer = torch.optim.RAdam if isinstance(model, SpikingPQN) else torch.optim.Adam
    if model.policy.optimizer_class is not optimizer or "optimizer_kwargs" in model.policy_kwargs:
        foreign.append("optimizer_class")
    if isinstance(model, SpikingDQN):
        frequency = model.train_freq
        if isinstance(frequency, TrainFreq) and frequency.unit is not Unit.STEP:
            foreign.append("train_freq in episodes")
        if model.tau != 1:
            foreign.append("tau")
    if foreign:
        remedy = f"cannot be kept, as settings do not tell {', '.join(foreign)} of this model; leave run out"
        raise UserError("run", str(run), f"{remedy}, and save what comes of it with save_checkpoint")
