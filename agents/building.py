"""Build a learner from settings."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import LinearSchedule, get_device

from spiking_rl.agents.config import DQNConfig, PQNConfig, TrainConfig
from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.envs.make import make_vectorised
from spiking_rl.errors import UserError

_SPAN = 2.0  # standard deviations of a vector's entries, beyond which a code tells nothing apart


def resolve_device(device: str) -> torch.device:
    """Return the torch device, "auto" meaning a GPU where there is one.

    Raises:
        UserError: unknown, or not on this machine.
    """
    try:
        found = torch.device("cpu") if device == "cpu" else get_device(device)
    except RuntimeError:
        raise UserError("device", device, "is no torch device; use auto, cpu or cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError("device", device, "is no device that agents and classifiers are trained on; use cpu or cuda")
    if device.startswith("cuda") and found.type != "cuda":
        raise UserError("device", device, "no CUDA GPU is available here; use --device cpu")
    return found


def build_model(config: TrainConfig, device: str = "auto") -> SpikingPQN | SpikingDQN:
    """Build the learner and its environments from checked settings.

    Raises:
        UserError: an environment or a device that cannot be used.
    """
    torch_device = resolve_device(device)
    venv = make_vectorised(config.env, config.num_envs, config.seed)
    images = is_image_space(venv.observation_space)
    network_kwargs: dict[str, Any] = {
        "neuron": config.neuron,
        "layer_norm": config.layer_norm,
        "per_channel": config.per_channel,
        "leak": config.leak,
        "gamma": config.surrogate_gamma,
        "time_constants": list(config.time_constants) if config.stateful and config.time_constants else None,
    }
    network_kwargs |= config.coding()
    if not images:
        if config.coding():
            network_kwargs["input_span"] = _SPAN
        network_kwargs["hidden"] = list(config.hidden)
        first = config.first_layer_norm
        network_kwargs["first_layer_norm"] = not config.stateful if first is None else first
    common: dict[str, Any] = {
        "policy": "CnnPolicy" if images else "MlpPolicy",
        "env": venv,
        "learning_rate": LinearSchedule(config.learning_rate, config.final_learning_rate, 1.0),
        "gamma": config.gamma,
        "exploration_fraction": config.exploration_fraction,
        # Whoever starts from a trained agent need not begin with random play.
        "exploration_initial_eps": config.exploration_final_eps if config.starts_trained else 1.0,
        "exploration_final_eps": config.exploration_final_eps,
        "exploration_repeat": config.exploration_repeat,
        "reward_scale": config.reward_scale,
        "max_grad_norm": config.max_grad_norm,
        "firing_rate": config.firing_rate,
        "seed": config.seed,
        "device": torch_device,
        "policy_kwargs": {
            "timesteps": config.timesteps,
            "network_kwargs": network_kwargs,
            "stateful": config.stateful,
        },
    }
    model: SpikingPQN | SpikingDQN
    if isinstance(config, PQNConfig):
        model = SpikingPQN(**common, **_pick(config, "n_steps", "n_epochs", "n_minibatches", "lam"))
    else:
        assert isinstance(config, DQNConfig)
        names = (
            "buffer_size",
            "learning_starts",
            "gradient_steps",
            "target_update_interval",
            "burn_in",
            "sequence_length",
        )
        freq = max(1, config.train_freq // config.num_envs)
        model = SpikingDQN(
            **common,
            n_steps=config.return_steps,
            train_freq=freq,
            # Sequences of neighbours say less than as many transitions from everywhere.
            batch_size=config.batch_size or (256 if config.stateful else 64),
            **_pick(config, *names),
        )
    model.prune_lr_factor = config.prune_lr_factor
    model.average_decay = config.average_decay
    model.rescale_leak = config.rescale_leak
    model.precision = config.precision
    model.spike_precision = config.spike_precision
    return model


def _pick(config: TrainConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
