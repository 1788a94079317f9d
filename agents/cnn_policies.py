"""Spiking Q-networks for images as Stable-Baselines3 policies."""

from __future__ import annotations

from typing import ClassVar

from spiking_rl.agents.policies import SpikingDQNPolicy, SpikingMlpPolicy, SpikingPQNPolicy


class SpikingCnnPolicy(SpikingMlpPolicy):
    """SB3 policy with a spiking Nature-CNN and its target, for image observations.

    Images are uint8 ``(C, H, W)``, at least 36 x 36, and are divided by 255; SB3 moves the channels
    of ``(H, W, C)`` images to the front by itself. Arguments and errors are those of
    :class:`SpikingMlpPolicy`; ``network`` is ``"nature_cnn"`` by default.
    """

    default_network: ClassVar[str] = "nature_cnn"


class SpikingDQNCnnPolicy(SpikingDQNPolicy):
    """The same policy for SpikingDQN, which can carry membranes through the episode."""

    default_network: ClassVar[str] = "nature_cnn"


class SpikingPQNCnnPolicy(SpikingPQNPolicy):
    """The same policy without a target network."""

    default_network: ClassVar[str] = "nature_cnn"
