"""Tiny environments of one idea: name what is shown. The reward is 1 for the matching action."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

CHOICES = 4
STEPS = 10
"""Per episode: chance earns STEPS / CHOICES = 2.5, knowing it all 10."""


class Identity(gym.Env[np.ndarray, int]):
    """Observations are one-hot vectors, or 36 x 36 images with one bright quadrant."""

    action_space = spaces.Discrete(CHOICES)

    def __init__(self, images: bool = False) -> None:
        self.images = images
        self.observation_space = (
            spaces.Box(0, 255, (36, 36, 1), np.uint8) if images else spaces.Box(0, 1, (CHOICES,), np.float32)
        )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = STEPS
        return self._look(), {}

    def _look(self) -> np.ndarray:
        self.shown = int(self.np_random.integers(CHOICES))
        return picture(self.shown) if self.images else np.eye(CHOICES, dtype=np.float32)[self.shown]

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.shown)
        self.left -= 1
        return self._look(), reward, self.left == 0, False, {}


def picture(shown: int) -> np.ndarray:
    """Return an image ``(36, 36, 1)`` whose quadrant ``shown`` is bright."""
    image = np.zeros((2, 18, 2, 18, 1), dtype=np.uint8)
    image[shown // 2, :, shown % 2] = 255
    return image.reshape(36, 36, 1)


def everything(images: bool) -> np.ndarray:
    """Return every observation, the one to be answered with action i at row i."""
    return np.stack([picture(i) for i in range(CHOICES)]) if images else np.eye(CHOICES, dtype=np.float32)
