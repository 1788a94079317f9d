"""Spiking actor-critic policies for Stable-Baselines3's PPO and A2C."""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar

from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from spiking_rl.agents.features import SpikingFeaturesExtractor
from spiking_rl.agents.optimisation import equip_optimizer
from spiking_rl.errors import UserError

_SB3 = frozenset(signature(ActorCriticPolicy.__init__).parameters)
_OURS = ("net_arch", "activation_fn", "ortho_init", "features_extractor_class", "features_extractor_kwargs")

_OF_OTHERS = {
    "q_net": "it is for PPO and A2C; DQN takes SpikingMlpPolicy (images: SpikingCnnPolicy)",
    "quantile_net": "it is for PPO and A2C; QRDQN takes SpikingQRMlpPolicy (images: SpikingQRCnnPolicy)",
    "lstm_actor": "it is for PPO and A2C; RecurrentPPO takes SpikingFeaturesExtractor in policy_kwargs",
    "actor": "it is for PPO and A2C; SAC and TD3 take SpikingFeaturesExtractor in policy_kwargs",
}


class SpikingActorCriticPolicy(ActorCriticPolicy):
    """Action and value heads that read the spikes of hidden layers, for vector observations.

    For SB3's own ``PPO`` and ``A2C``. The heads are the readouts: they start at zero, so that every
    action is as likely as another. Actor and critic have hidden layers of their own, as in SB3's
    perceptron policy: with shared ones the critic's gradient drowns the actor's (PPO on CartPole-v1,
    T=4, 100k agent steps, one seed: 500 against 45). Images share theirs, as in SB3.

    Args:
        observation_space: a Box, Discrete, MultiDiscrete or MultiBinary space, or a Dict of such without
            images.
        action_space: any that the algorithm takes.
        lr_schedule: learning rate against progress remaining.
        timesteps: T per decision.
        network: name of a registered network; default ``"mlp"``.
        network_kwargs: its options, such as ``hidden`` or ``neuron``.
        normalize_images: divide image observations by 255.
        share_features_extractor: hidden layers common to actor and critic; default False, True for
            images.
        kwargs: what else SB3's ``ActorCriticPolicy`` takes, such as ``optimizer_class`` or
            ``log_std_init``.

    Raises:
        UserError: observations that the network cannot take, or an option that ``network_kwargs``
            replaces or that nobody knows.
    """

    features_extractor: SpikingFeaturesExtractor
    default_network: ClassVar[str] = "mlp"
    shares_by_default: ClassVar[bool] = False

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        timesteps: int = 5,
        network: str | None = None,
        network_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        share_features_extractor: bool | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in kwargs.items():
            if name in _OURS:
                raise UserError(name, value, "leave it out; network_kwargs describes the spiking layers")
            if name not in _SB3:
                taken = "timesteps, network, network_kwargs, share_features_extractor, or one of ActorCriticPolicy's"
                raise UserError(name, value, f"is no option of {type(self).__name__}; name {taken}")
        self.network_options = {
            "timesteps": timesteps,
            "network": network or self.default_network,
            "network_kwargs": dict(network_kwargs or {}),
        }
        share = self.shares_by_default if share_features_extractor is None else share_features_extractor
        self._sb3_options = kwargs | {"share_features_extractor": share}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,  # it would overwrite the spiking layers' initialisation
            features_extractor_class=SpikingFeaturesExtractor,
            features_extractor_kwargs={**self.network_options, "normalize_images": normalize_images},
            normalize_images=normalize_images,
            **self._sb3_options,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        for head in (self.action_net, self.value_net):
            if isinstance(head, nn.Linear):
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
        equip_optimizer(self.optimizer, self)

    def rebuild_optimizer(self, learning_rate: float) -> None:
        """Start a fresh optimiser, thresholds and leaks kept in range after each of its steps."""
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=learning_rate,  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )
        equip_optimizer(self.optimizer, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled policy; optimisers lose their hooks on the way."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        equip_optimizer(self.optimizer, self)

    def __getattr__(self, name: str) -> Any:
        """As of any module, but say what is wrong where an algorithm looks for what this policy cannot have."""
        if name in _OF_OTHERS:
            raise AttributeError(f"{type(self).__name__} has no {name}: {_OF_OTHERS[name]}")
        return super().__getattr__(name)

    @property
    def timesteps(self) -> int:
        """Timesteps T per decision."""
        return self.features_extractor.timesteps

    def set_timesteps(self, timesteps: int) -> None:
        """Change T in the hidden layers, the critic's too; ``model.save`` takes it from ``model.policy_kwargs``."""
        for extractor in {self.pi_features_extractor, self.vf_features_extractor}:
            assert isinstance(extractor, SpikingFeaturesExtractor)
            extractor.set_timesteps(timesteps)
        self.network_options["timesteps"] = timesteps
        self.features_extractor_kwargs["timesteps"] = timesteps

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "normalize_images": self.normalize_images,
            **self.network_options,
            **self._sb3_options,
        }


class SpikingActorCriticCnnPolicy(SpikingActorCriticPolicy):
    """The same for images, with a spiking Nature-CNN; see :class:`SpikingCnnPolicy`."""

    default_network: ClassVar[str] = "nature_cnn"
    shares_by_default: ClassVar[bool] = True
