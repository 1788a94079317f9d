"""One factory for every environment that is trained in, evaluated in or filmed."""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
import sys
import warnings
from collections.abc import Iterable
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.error import DependencyNotInstalled
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from spiking_rl.envs.atari import AtariGame, AtariVecEnv, parse_atari
from spiking_rl.envs.checked import CheckedEnv
from spiking_rl.errors import UserError, WorkError


def make_single(env_id: str, *, render: bool = False) -> gym.Env[Any, Any]:
    """Make one environment, its episode returns recorded in ``info``.

    Args:
        env_id: a Gymnasium id; ``module:EnvId`` imports the module first. Atari ids may have options,
            see :func:`spiking_rl.envs.atari.parse_atari`.
        render: give RGB frames from ``render()``.

    Raises:
        UserError: the environment is unknown or something that it needs is not installed.
    """
    if render:
        # pygame must not look for a screen that a server does not have: frames are drawn in memory.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    atari = parse_atari(env_id)
    if atari is not None:
        return Monitor(AtariGame(atari, "rgb_array" if render else None))
    if env_id not in gym.registry:
        with contextlib.suppress(ImportError):
            import ale_py  # noqa: F401  # its import registers further ids, those that show memory for example
    try:
        with warnings.catch_warnings():
            # "The environment X is out of date" is a matter of taste, and the id is reported with
            # every result.
            warnings.filterwarnings("ignore", message=".*(is out of date|unversioned).*")
            # Environments of one's own often take no render_mode at all.
            options: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
            env = gym.make(env_id, disable_env_checker=True, **options)
    except DependencyNotInstalled as error:
        raise UserError("env", env_id, f"needs a package that is not installed: {_one_line(error)}") from None
    except ModuleNotFoundError as error:
        raise UserError("env", env_id, f"{error}; install it or correct the module's name") from None
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as error:
        raise UserError("env", env_id, _suggestion(env_id, error)) from None
    except Exception as error:
        if type(error) is gym.error.Error or ":" in env_id.partition(":")[2] or env_id.startswith(":"):
            raise UserError("env", env_id, _suggestion(env_id, error)) from None  # no well-formed id
        # Whatever an environment's own constructor raises, the user reads which one and why.
        raise UserError(
            "env", env_id, f"could not be made ({type(error).__name__}: {_one_line(error)[:200]})"
        ) from None
    return Monitor(CheckedEnv(env, env_id))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _suggestion(env_id: str, error: Exception) -> str:
    if isinstance(error, gym.error.DeprecatedEnv):
        return _one_line(error)
    named: dict[str, str] = {}
    for key in sorted(gym.registry, key=lambda key: "/" not in key):  # an id of no namespace last: it wins
        older = not key.startswith("ALE/") and str(gym.registry[key].entry_point).startswith("ale_py")
        if not older:
            short = key.lower().rpartition("/")[2]
            named |= {key.lower(): key, short: key, short.rpartition("-v")[0] or short: key}
    close = difflib.get_close_matches(env_id.lower(), named, n=1, cutoff=0.7)
    hint = f"did you mean {named[close[0]]!r}?" if close else "see gymnasium.pprint_registry() for the ids"
    return f"no such environment; {hint} (your own: module:EnvId)"


def module_of(env_id: str) -> str | None:
    """Return the module that making this environment imports; None for an id that stands alone."""
    module, colon, _ = env_id.partition(":")
    return module if colon else None


def require_named(env_id: str, named: Iterable[str] = ()) -> None:
    """Refuse an environment id out of a file that would import, and so run, a module that nobody here has named.

    Args:
        env_id: as the file has it.
        named: ids that the user has given; their modules are trusted, and so is what is imported already.

    Raises:
        UserError: telling how to name it.
    """
    module = module_of(env_id)
    if module is None or module in sys.modules or module in map(module_of, named):
        return
    raise UserError(
        "env",
        env_id,
        f"stands in a file, and making it would run the module {module!r}; if that is yours, say so: "
        f"--env {shlex.quote(env_id)}, or import it first",
    )


def check_environment(env_id: str) -> tuple[gym.Space[Any], gym.Space[Any]]:
    """Make an environment once, take a step in it, close it, and return its observation and action space.

    Raises:
        UserError: as :func:`make_single`, or what it returns does not fit its spaces.
    """
    env = make_single(env_id)
    try:
        env.reset(seed=0)
        env.step(env.action_space.sample())
    except WorkError as error:
        raise UserError(error.field, error.value, error.problem) from error.__cause__
    finally:
        env.close()
    return env.observation_space, env.action_space


class ReplayableEnv(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose exact state can be saved as JSON: by seed and actions, not by pickling.

    The state is the generator's state before the last reset and the actions since; restoring resets
    and replays. Exact wherever all randomness comes from ``np_random`` (classic control, toy text,
    and most well-behaved environments).
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._seed: int | None = None
        self._generator: dict[str, Any] | None = None
        self._options: dict[str, Any] | None = None
        self._actions: list[NDArray[Any]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, remembering how."""
        self._seed, self._options = seed, options
        self._generator = None if seed is not None else self.unwrapped.np_random.bit_generator.state  # type: ignore[assignment]
        self._actions = []
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step, remembering the action."""
        self._actions.append(np.array(action))  # a copy: the caller may reuse its array
        return self.env.step(action)

    def get_state(self) -> dict[str, Any]:
        """Return the state as JSON-serialisable values."""
        return {
            "seed": self._seed,
            "generator": self._generator,
            "options": self._options,
            "actions": [action.tolist() for action in self._actions],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`get_state`: the next step gives what it would have given."""
        if state["generator"] is not None:
            self.unwrapped.np_random.bit_generator.state = state["generator"]
        self.reset(seed=state["seed"], options=state["options"])
        for action in state["actions"]:
            self.step(np.asarray(action, dtype=self.action_space.dtype)[()])


def make_vectorised(env_id: str, num_envs: int, seed: int) -> VecEnv:
    """Make the training environments, resumable, seeded with ``seed, seed+1, ...`` (Atari: from ``seed``).

    Raises:
        UserError: as :func:`make_single`.
    """
    atari = parse_atari(env_id)
    if atari is not None:
        return AtariVecEnv(atari, num_envs, seed)
    venv = DummyVecEnv([lambda: ReplayableEnv(make_single(env_id)) for _ in range(num_envs)])
    venv.seed(seed)
    return venv


def get_states(venv: VecEnv) -> list[dict[str, Any]]:
    """Return the states of all environments made by :func:`make_vectorised`."""
    if isinstance(venv, AtariVecEnv):
        return [{"restarts": venv.restarts}]
    assert isinstance(venv, DummyVecEnv)
    return [env.get_wrapper_attr("get_state")() for env in venv.envs]


def set_states(venv: VecEnv, states: list[dict[str, Any]]) -> None:
    """Restore the states of all environments.

    Raises:
        UserError: their number differs.
    """
    if isinstance(venv, AtariVecEnv):
        venv.restarts = int(states[0]["restarts"])
        venv.reset()
        return
    assert isinstance(venv, DummyVecEnv)
    if len(states) != len(venv.envs):
        raise UserError("num_envs", len(venv.envs), f"the saved run has {len(states)} environments")
    venv._reset_seeds()  # drop pending seeds: the states bring their own
    for env, state in zip(venv.envs, states, strict=True):
        env.get_wrapper_attr("set_state")(state)


def can_be_saved(venv: VecEnv) -> bool:
    """Tell whether :func:`get_states` gives the whole state; emulators have to begin new games instead."""
    return not isinstance(venv, AtariVecEnv)


def restart(venv: VecEnv) -> NDArray[Any]:
    """Begin new games in environments that cannot be saved; return their observations.

    A run that goes on after a save and one that is resumed from it then play alike. A save that only
    happened because the run was stopped is one restart more.
    """
    assert isinstance(venv, AtariVecEnv)
    return venv.restart()
