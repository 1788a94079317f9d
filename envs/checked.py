"""An environment that is watched: what it raises or returns wrongly is named, where it happens."""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np

from spiking_rl.errors import UserError, WorkError


class CheckedEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Stops at the first observation or reward that would spoil a training.

    One NaN in an observation makes every weight NaN after the next update, and an agent of NaNs plays on as if nothing
    had happened.

    Args:
        env: to watch.
        name: its id, for the message.
    """

    def __init__(self, env: gym.Env[Any, Any], name: str) -> None:
        super().__init__(env)
        self._name = name
        space = env.observation_space
        arrays = (gym.spaces.Box, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
        self._shape = space.shape if isinstance(space, arrays) else None
        self._whole = space if isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete)) else None
        self._floats = self._shape is not None and np.issubdtype(space.dtype, np.floating)
        self._steps = 0  # of the episode
        self._picture: tuple[int, ...] | None = None  # shape of the first

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset.

        Raises:
            WorkError: the environment raises, or returns what is no observation of its.
        """
        self._steps = 0
        try:
            observation, info = self.env.reset(seed=seed, options=options)
        except UserError:
            raise
        except Exception as error:
            raise self._wrong(f"raised {_told(error)}") from error
        self._check(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step.

        Raises:
            WorkError: as :meth:`reset`, or the reward is not finite, or the info no dictionary.
        """
        self._steps += 1
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except UserError:
            raise
        except Exception as error:
            raise self._wrong(f"raised {_told(error)}") from error
        self._check(observation)
        try:
            finite = math.isfinite(reward)
        except (TypeError, ValueError, OverflowError):
            raise self._wrong(f"returned {str(reward)[:100]!r} as a reward, which is no number") from None
        if not finite:
            raise self._wrong(f"returned a reward of {float(reward)}")
        if not isinstance(info, dict):
            raise self._wrong(f"returned {str(info)[:100]!r} as its info, which must be a dictionary")
        return observation, reward, terminated, truncated, info

    def render(self) -> Any:
        """Render.

        Raises:
            WorkError: the environment raises, or an RGB picture is no array of bytes ``(H, W, 3)``, or of another size
                than the first.
        """
        try:
            picture = self.env.render()
        except UserError:
            raise
        except Exception as error:
            raise self._wrong(f"raised {_told(error)} in render()") from error
        if self.render_mode == "rgb_array":
            self._check_picture(picture)
        return picture

    def _check_picture(self, picture: Any) -> None:
        wanted = "render() must return an array of uint8, (height, width, 3)"
        if not isinstance(picture, np.ndarray):
            raise self._wrong(f"returned a picture of type {type(picture).__name__}; {wanted}")
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise self._wrong(f"returned a picture of {picture.dtype}, {picture.shape}; {wanted}")
        if self._picture is None:
            self._picture = picture.shape
        if picture.shape != self._picture:
            raise self._wrong(f"returned a picture of shape {picture.shape} after one of {self._picture}")

    def _check(self, observation: Any) -> None:
        if self._shape is not None:
            self._check_array(observation, self._shape)
        if self._whole is not None and _lacks(self._whole, observation):
            raise self._wrong(f"returned {str(observation)[:100]!r} as an observation, which {self._whole} lacks")

    def _check_array(self, observation: Any, wanted: tuple[int, ...]) -> None:
        try:
            shape, kind = np.shape(observation), np.asarray(observation).dtype
        except ValueError:
            raise self._wrong("returned an observation of uneven lists") from None
        if shape != wanted:
            raise self._wrong(f"returned an observation of shape {shape}, and its space says {wanted}")
        if not (np.issubdtype(kind, np.number) or np.issubdtype(kind, np.bool_)):
            raise self._wrong(f"returned an observation of type {kind}, which are no numbers")
        if self._floats and not np.isfinite(observation).all():
            raise self._wrong("returned an observation with NaN or infinity in it")

    def _wrong(self, what: str) -> WorkError:
        return WorkError("env", self._name, f"{what}, {self._steps} steps after a reset; mend the environment")


def _lacks(space: gym.spaces.Discrete | gym.spaces.MultiDiscrete, observation: Any) -> bool:
    first, count = np.asarray(space.start), np.asarray(space.nvec if hasattr(space, "nvec") else space.n)
    try:
        numbers = np.asarray(observation, dtype=np.float64)
    except (TypeError, ValueError):
        return True
    fits = (first <= numbers) & (numbers < first + count) & (numbers == np.floor(numbers))
    return numbers.size != count.size or not fits.all()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
