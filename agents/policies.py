"""Spiking Q-networks as Stable-Baselines3 policies."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor, nn

from spiking_rl.agents.optimisation import equip_optimizer
from spiking_rl.errors import UserError
from spiking_rl.networks import NetworkState, Observer
from spiking_rl.neurons import LIFState
from spiking_rl.registry import build_network

CHOSEN_NETWORKS = ("mlp", "nature_cnn")
"""What policies take where no network is named, for vectors and for images."""
SIMPLE_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
"""Of observations that a network takes as a vector or as an image: whole numbers become one-hot."""

_OPTIMIZERS = (torch.optim.Adam, torch.optim.RAdam)  # ours and SB3's, with options of ours
_ACTORS = (
    "PPO and A2C take SpikingActorCriticPolicy (images: SpikingActorCriticCnnPolicy), SAC and TD3 "
    "SpikingFeaturesExtractor in policy_kwargs"
)
TIME_CONSTANTS = (0.2, 8.0)
"""Of a stateful agent's membranes, shortest and longest, in decisions."""


class RunningNorm(nn.Module):
    """Scale observations to zero mean and unit variance by running statistics.

    They are buffers named ``running_*``, which SB3 copies to the target network with the weights.

    Attributes:
        follow: fold every batch seen in training mode into the statistics, as batch normalisation
            does: stock SB3 has nobody else to do it. Learners that call :meth:`update` switch it off.
    """

    running_mean: Tensor
    running_var: Tensor
    running_count: Tensor

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0) -> None:
        super().__init__()
        self.clip = clip
        self.follow = True
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        self.register_buffer("running_count", torch.zeros(()))

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Fold a batch ``(B, *shape)`` into the statistics (Chan et al. 1979)."""
        batch = observations.shape[0]
        mean = observations.mean(0)
        var = observations.var(0, unbiased=False)
        total = self.running_count + batch
        delta = mean - self.running_mean
        self.running_var.copy_(
            (self.running_var * self.running_count + var * batch) / total
            + delta.square() * self.running_count * batch / total.square()
        )
        self.running_mean.add_(delta * batch / total)
        self.running_count.copy_(total)

    def forward(self, observations: Tensor) -> Tensor:
        """Return observations ``(B, *shape)`` scaled and clipped to +-clip."""
        if self.training and self.follow:
            self.update(observations)
        scaled = (observations - self.running_mean) * torch.rsqrt(self.running_var + 1e-8)
        return scaled.clamp(-self.clip, self.clip)


class SpikingQNetwork(BasePolicy):
    """Q-values of a discrete-action environment from a network of spiking neurons.

    Vectors are scaled by running statistics; images keep their shape and are divided by 255 instead.

    Args:
        observation_space: a Box, Discrete, MultiDiscrete or MultiBinary space.
        action_space: Discrete.
        network: name of a registered network.
        network_kwargs: its options.
        timesteps: T per decision.
        stateful: membranes are meant to be carried through the episode (by whoever plays).
        normalize_images: divide image observations by 255.
        outputs_per_action: outputs of the network for each action.
    """

    action_space: spaces.Discrete

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        network: str = "mlp",
        network_kwargs: dict[str, Any] | None = None,
        timesteps: int = 5,
        stateful: bool = False,
        normalize_images: bool = True,
        outputs_per_action: int = 1,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=FlattenExtractor(observation_space),
            normalize_images=normalize_images,
        )
        self.stateful = stateful
        self.norm, shape = observation_scaling(observation_space, network, normalize_images)
        outputs = int(action_space.n) * outputs_per_action
        self.network = build_network(network, shape, outputs, timesteps=timesteps, **(network_kwargs or {}))

    def features(self, observations: PyTorchObs) -> Tensor:
        """Return the network's input ``(B, *input_shape)`` for raw observations ``(B, *obs)``."""
        prepared = preprocess_obs(observations, self.observation_space, normalize_images=self.normalize_images)
        assert isinstance(prepared, Tensor)
        if self.norm is None:
            return prepared
        flat: Tensor = self.norm(prepared.flatten(1))
        return flat

    def of_actions(self, outputs: Tensor) -> Tensor:
        """Return Q-values ``(B, A)`` of what the network gives, ``(B, outputs)``: here they are just that."""
        return outputs

    def update_norm(self, observations: Tensor) -> None:
        """Fold raw observations ``(B, *obs)`` into the running statistics (images have none)."""
        if self.norm is None:
            return
        prepared = preprocess_obs(observations, self.observation_space, normalize_images=self.normalize_images)
        assert isinstance(prepared, Tensor)
        self.norm.update(prepared.flatten(1))

    def forward(self, obs: PyTorchObs) -> Tensor:
        """Return Q-values ``(B, A)`` of independent observations ``(B, *obs)`` (fresh membranes)."""
        return self.q_values(obs)[0]

    def q_values(
        self,
        obs: PyTorchObs,
        state: NetworkState | None = None,
        episode_start: Tensor | None = None,
        observer: Observer | None = None,
    ) -> tuple[Tensor, NetworkState | None]:
        """Return Q-values ``(B, A)`` of one decision per row, and the membranes after it.

        Args:
            obs: raw observations ``(B, *obs)``.
            state: membranes before the decision; None for fresh ones.
            episode_start: bool ``(B,)``, rows whose membrane starts at zero.
            observer: sees the hidden layers.
        """
        outputs, after = self.outputs(obs, state, episode_start, observer)
        return self.of_actions(outputs), after

    def outputs(
        self,
        obs: PyTorchObs,
        state: NetworkState | None = None,
        episode_start: Tensor | None = None,
        observer: Observer | None = None,
    ) -> tuple[Tensor, NetworkState | None]:
        """Return what the network gives, ``(B, outputs)``, and the membranes after it; see :meth:`q_values`."""
        inputs = self.features(obs).unsqueeze(0)
        starts = None if episode_start is None else episode_start.unsqueeze(0)
        outputs, after = self.network(inputs, state, starts if state is not None else None, observer)
        return outputs.squeeze(0), after

    def q_sequence(self, obs: Tensor, state: NetworkState, starts: Tensor) -> Tensor:
        """Return Q-values ``(L, B, A)`` along sequences; see :meth:`sequence`."""
        return self.sequence(obs, state, starts)[0]

    def sequence(self, obs: Tensor, state: NetworkState, starts: Tensor) -> tuple[Tensor, NetworkState]:
        """Return Q-values ``(L, B, A)`` along sequences of raw observations, and the membranes after them.

        Args:
            obs: raw observations ``(L, B, *obs)``.
            state: membranes before the first decision.
            starts: bool ``(L, B)``, true where a decision opens an episode.
        """
        inputs = self.features(obs.flatten(0, 1))
        values, after = self.network(inputs.reshape(*obs.shape[:2], *inputs.shape[1:]), state, starts)
        return values, after

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        greedy: Tensor = self(observation).argmax(dim=1)  # called, not .forward: a compiled network is used
        return greedy.reshape(-1)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        raise NotImplementedError("save the policy that holds this network")


class SpikingMlpPolicy(DQNPolicy):
    """SB3 policy with a spiking Q-network and its target, for vector observations.

    For SB3's own ``DQN`` and for :class:`spiking_rl.agents.SpikingDQN`. Thresholds start at
    ``network_kwargs["threshold"]`` (0.5); our own learners set them from data.

    Args:
        observation_space: a Box, Discrete, MultiDiscrete or MultiBinary space.
        action_space: Discrete.
        lr_schedule: learning rate against progress remaining.
        timesteps: T per decision.
        network: name of a registered network; default ``"mlp"``.
        network_kwargs: its options, such as ``hidden`` or ``neuron``.
        stateful: carry the membranes through the episode: ``predict(obs, state, episode_start)``
            returns them as its state, one array ``(n_envs, neurons)`` per layer. Neurons then get
            time constants from 0.2 to 8 decisions unless ``network_kwargs`` says otherwise.
        optimizer_class: torch optimiser.
        optimizer_kwargs: its options besides the learning rate.
        normalize_images: divide image observations by 255.
        foreign: options of SB3's own policies, such as ``net_arch``, which are refused by name.

    Raises:
        UserError: a space that a spiking Q-network cannot serve, a state that nobody carries, or a foreign option.
    """

    q_net: SpikingQNetwork  # type: ignore[assignment]
    _optimizer: torch.optim.Optimizer | None
    _first_rate: float
    q_net_target: SpikingQNetwork  # type: ignore[assignment]
    has_target = True
    default_network: ClassVar[str] = "mlp"
    gives: ClassVar[str] = "Q-values, for SpikingDQN, SpikingPQN and SB3's DQN"
    carries_state = False
    """Whether the algorithm that this policy is for carries membranes through the episode."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        *,
        timesteps: int = 5,
        network: str | None = None,
        network_kwargs: dict[str, Any] | None = None,
        stateful: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        **foreign: Any,
    ) -> None:
        if "use_sde" in foreign:  # which only algorithms with an actor hand over
            raise UserError("policy", type(self).__name__, f"gives {self.gives}; {_ACTORS}")
        for name, value in foreign.items():
            raise UserError(name, value, "is no option of spiking policies; network_kwargs describes their layers")
        network = network or self.default_network
        self.has_own_optimizer = optimizer_kwargs is not None or optimizer_class not in _OPTIMIZERS
        check_spaces(observation_space, action_space, network, normalize_images)
        if optimizer_kwargs is None and optimizer_class is torch.optim.Adam:
            optimizer_kwargs = {"fused": True}  # a third of a small network's update is Adam's many small steps
        if optimizer_kwargs is None and optimizer_class is torch.optim.RAdam:
            optimizer_kwargs = {"foreach": True}  # likewise, and RAdam has no fused form
        if stateful and not self.carries_state:
            raise UserError(
                "stateful",
                stateful,
                f"{type(self).__name__} serves algorithms that carry no state, as Stable-Baselines3's own; use "
                "SpikingDQN or SpikingPQN with MlpPolicy",
            )
        network_kwargs = dict(network_kwargs or {})
        for name, plain in (("encoding", "direct"), ("single_spike", False), ("kappa", 0.0)):
            if stateful and network_kwargs.get(name, plain) != plain:
                raise UserError(name, network_kwargs[name], "is for fresh membranes; use it without stateful")
        if stateful and network_kwargs.get("neuron") != "relu":
            network_kwargs.setdefault("time_constants", TIME_CONSTANTS)
            if network == "mlp":
                network_kwargs.setdefault("first_layer_norm", False)
        self.stateful = stateful
        self.q_net_kwargs: dict[str, Any] = {
            "network": network,
            "network_kwargs": network_kwargs,
            "timesteps": timesteps,
            "stateful": stateful,
            "normalize_images": normalize_images,
        }
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            normalize_images=normalize_images,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        self.q_net = self.make_q_net()
        if self.has_target:
            self.q_net_target = self.make_q_net()
            self.q_net_target.load_state_dict(self.q_net.state_dict())
            self.q_net_target.set_training_mode(False)
        self.rebuild_optimizer(lr_schedule(1))

    def make_q_net(self) -> SpikingQNetwork:  # type: ignore[override]
        """Build one Q-network."""
        assert isinstance(self.action_space, spaces.Discrete)
        return SpikingQNetwork(self.observation_space, self.action_space, **self.q_net_kwargs).to(self.device)

    def rebuild_optimizer(self, learning_rate: float) -> None:
        """Start a fresh optimiser, thresholds and leaks kept in range after each of its steps."""
        self._optimizer, self._first_rate = None, learning_rate
        if self.has_own_optimizer or not learning_rate >= 0:
            _ = self.optimizer  # what it does not take is told at once, and not in the middle of learning

    def __getattr__(self, name: str) -> Any:
        """As of any module, but say what is wrong where ``QRDQN`` looks for quantiles."""
        if name == "quantile_net":
            raise AttributeError(
                f"{type(self).__name__} has no quantile_net; QRDQN takes SpikingQRMlpPolicy, SpikingQRCnnPolicy"
            )
        return super().__getattr__(name)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, made when it is first asked for.

        A process's first one imports torch's compiler, which takes longer than all else that a loaded agent needs.
        """
        if self._optimizer is None:
            try:
                self._optimizer = self.optimizer_class(
                    self.q_net.parameters(),
                    lr=self._first_rate,  # type: ignore[call-arg]
                    **self.optimizer_kwargs,
                )
            except AttributeError as error:  # which a module takes for a property that it does not have
                raise RuntimeError(f"{self.optimizer_class.__name__} cannot be made: {error}") from error
            equip_optimizer(self._optimizer, self.q_net)
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = optimizer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled policy; optimisers lose their hooks on the way."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._optimizer is not None:
            equip_optimizer(self._optimizer, self.q_net)

    @property
    def timesteps(self) -> int:
        """Timesteps T per decision."""
        return self.q_net.network.timesteps

    def predict(
        self,
        observation: np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]],
        state: tuple[np.ndarray[Any, Any], ...] | None = None,
        episode_start: np.ndarray[Any, Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray[Any, Any], tuple[np.ndarray[Any, Any], ...] | None]:
        """Return greedy actions and the membranes after them (None when stateless).

        Args:
            observation: one observation, or a batch of them.
            state: membranes returned by the last call, ``(n_envs, *neurons)`` per layer; None at the
                start.
            episode_start: bool ``(n_envs,)``, true where the observation opens an episode.
            deterministic: greedy either way; SB3's algorithms add the exploration.
        """
        if not self.stateful:
            return super().predict(observation, state, episode_start, deterministic)
        self.set_training_mode(False)
        obs, vectorised = self.obs_to_tensor(observation)
        assert isinstance(obs, Tensor)
        before = self.q_net.network.initial_state(len(obs)) if state is None else as_state(state, self.device)
        starts = torch.zeros(len(obs), dtype=torch.bool, device=self.device)
        if episode_start is not None:
            starts = torch.as_tensor(episode_start, dtype=torch.bool, device=self.device).reshape(-1)
        with torch.no_grad():
            values, after = self.q_net.q_values(obs, before, starts)
        assert after is not None
        actions = values.argmax(1).cpu().numpy()
        return (actions if vectorised else actions.squeeze(0)), as_arrays(after)

    def set_timesteps(self, timesteps: int) -> None:
        """Change T in the Q-network and its target; ``model.save`` takes it from ``model.policy_kwargs``."""
        self.q_net.network.set_timesteps(timesteps)
        if self.has_target:
            self.q_net_target.network.set_timesteps(timesteps)
        self.q_net_kwargs["timesteps"] = timesteps

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            **self.q_net_kwargs,
        }


class SpikingDQNPolicy(SpikingMlpPolicy):
    """The same policy for SpikingDQN, which can carry membranes through the episode."""

    carries_state = True


class SpikingPQNPolicy(SpikingMlpPolicy):
    """The same policy for SpikingPQN: without a target network, with membranes if wanted."""

    has_target = False
    carries_state = True


def observation_scaling(
    observation_space: spaces.Space[Any], network: str, normalize_images: bool = True
) -> tuple[RunningNorm | None, tuple[int, ...]]:
    """Return what scales preprocessed observations, and the shape ``(*input_shape)`` of one of them.

    Images that are not meant for a perceptron keep their shape and need no scaling (None); all else
    is a vector, scaled by running statistics.
    """
    if network != "mlp" and is_image_space(observation_space, normalized_image=not normalize_images):
        assert observation_space.shape is not None
        return None, observation_space.shape
    shape = (get_flattened_obs_dim(observation_space),)
    return RunningNorm(shape), shape


def check_spaces(
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    network: str = "mlp",
    normalize_images: bool = True,
) -> None:
    """Refuse spaces that a spiking Q-network cannot serve.

    Raises:
        UserError: naming the space and what to do.
    """
    if not isinstance(action_space, spaces.Discrete):
        raise UserError(
            "action_space",
            str(action_space),
            "spiking Q-networks take a Discrete space; for continuous actions SAC and TD3 take "
            "SpikingFeaturesExtractor in policy_kwargs, PPO SpikingActorCriticPolicy; or wrap the environment",
        )
    if action_space.start != 0:
        raise UserError("action_space", str(action_space), "must count from 0; wrap the environment to shift it")
    check_observation_space(observation_space, network, normalize_images)


def check_observation_space(
    observation_space: spaces.Space[Any], network: str = "mlp", normalize_images: bool = True
) -> None:
    """Refuse observations that a registered network cannot take.

    Raises:
        UserError: naming the space and what to do.
    """
    shown = str(observation_space)
    if not isinstance(observation_space, SIMPLE_SPACES):
        raise UserError(
            "observation_space",
            shown,
            "must be a Box, Discrete, MultiDiscrete or MultiBinary space; flatten it with "
            "gymnasium.wrappers.FlattenObservation",
        )
    check_vector(observation_space, shown)
    if network == "mlp" and is_image_space(observation_space):
        raise UserError(
            "observation_space",
            shown,
            "images need a convolutional network; use the Cnn policy of the same kind, SpikingCnnPolicy for DQN, "
            "SpikingActorCriticCnnPolicy for PPO",
        )
    if network == "nature_cnn" and not is_image_space(observation_space, normalized_image=not normalize_images):
        raise UserError(
            "observation_space",
            shown,
            "is no image (uint8, 0 to 255, three axes); use an Mlp policy such as SpikingMlpPolicy, or "
            "normalize_images=False where the pixels are scaled already",
        )


def check_vector(space: spaces.Space[Any], shown: str) -> None:
    """Refuse what SB3 makes no vector of: whole numbers that do not count from 0 or lie along two axes, and nothing.

    Raises:
        UserError: showing the space so.
    """
    if np.any(getattr(space, "start", 0)):
        raise UserError("observation_space", shown, "must count from 0; wrap the environment to shift it")
    several = isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1
    if several or (isinstance(space, spaces.Box) and not math.prod(space.shape or (0,))):
        raise UserError("observation_space", shown, "is no vector; wrap the environment to reshape it")


def as_state(membranes: tuple[np.ndarray[Any, Any], ...], device: torch.device) -> NetworkState:
    """Return membranes as a network takes them, of arrays ``(n_envs, *neurons)`` as ``predict`` does."""
    return tuple(LIFState(torch.as_tensor(layer, device=device)) for layer in membranes)


def as_arrays(state: NetworkState) -> tuple[np.ndarray[Any, Any], ...]:
    """Return membranes as ``predict`` gives them."""
    return tuple(layer.membrane.cpu().numpy() for layer in state)


def q_network(model: BaseAlgorithm) -> SpikingQNetwork:
    """Return the Q-network of a model of ours.

    Raises:
        UserError: the model has none.
    """
    _require_model(model)
    if not isinstance(model.policy, SpikingMlpPolicy):
        raise UserError(
            "model", type(model).__name__, "has no spiking Q-network; SB3's evaluate_policy scores any agent"
        )
    return model.policy.q_net


def sees_scaled(model: BaseAlgorithm) -> bool:
    """Tell whether a model learned from observations that VecNormalize scaled, which nobody else does for it."""
    _require_model(model)
    outside = model.get_vec_normalize_env()
    return getattr(model, "scaled_outside", False) if outside is None else outside.norm_obs


def _require_model(model: object) -> None:
    if not isinstance(model, BaseAlgorithm):
        raise UserError("model", type(model).__name__, "is no model; what load_agent returns has it as .model")
