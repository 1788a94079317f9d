"""Atari games on ale-py's native vector environment: one preprocessing for training, evaluation and video.

84 x 84 grey frames, the brighter of each two, every action held for 4 frames, up to 30 no-ops and the
fire button at reset (Mnih et al. 2015; Machado et al. 2018). A single game and row k of a vector give the same bytes
for the same seed and actions, and so does the RGB twin that is filmed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, SupportsFloat
from urllib.parse import parse_qsl

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from spiking_rl.errors import UserError

if TYPE_CHECKING:
    from ale_py.vector_env import AtariVectorEnv

FRAMES_PER_DECISION = 4
MAX_FRAMES = 108_000
"""Frames after which a game is cut: half an hour of play."""

_TRAINING_SEEDS = 10_000_000  # those of evaluations begin here
_LARGEST_SEED = 2**31 - 1  # of the emulator
_ID = re.compile(r"(?:ALE/(?P<v5>\w+)-v5|(?P<v4>\w+)NoFrameskip-v4)(?:\?(?P<options>.*))?")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class AtariId:
    """What an Atari environment id names.

    Attributes:
        name: the id without its options, ``ALE/Pong-v5``.
        game: name of the ROM, ``pong``.
        sticky_actions: probability that the emulator repeats the last action; 0.25 for ``ALE/...-v5``, 0
            for ``...NoFrameskip-v4``, as in Gymnasium.
        frame_stack: frames per observation.
        episodic_life: learners see a lost life as the end of an episode, so that what comes after it is no
            part of an action's value. The game goes on, and scores are of whole games either way.
    """

    name: str
    game: str
    sticky_actions: float
    frame_stack: int = 4
    episodic_life: bool = False

    def __str__(self) -> str:
        """Return the whole id: it says everything that training and score depend on."""
        life = "&episodic_life=1" if self.episodic_life else ""
        return f"{self.name}?sticky_actions={self.sticky_actions:g}&frame_stack={self.frame_stack}{life}"


@cache
def _games() -> dict[str, str]:
    """Return the ROM of every game by its title in lower case."""
    from ale_py import roms  # only who plays Atari waits for it

    return {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}


def parse_atari(env_id: str) -> AtariId | None:
    """Return what an id such as ``ALE/Pong-v5?sticky_actions=0&frame_stack=1`` names; None if no Atari game.

    Raises:
        UserError: a game that is not there, an option that is unknown or out of range, or ale-py is missing.
    """
    found = _ID.fullmatch(env_id)
    if not found:
        return None
    title = found["v5"] or found["v4"]
    try:
        games = _games()
    except ImportError as error:
        raise UserError("env", env_id, f"needs ale-py, which does not import ({error}); pip install ale-py") from None
    game = games.get(title.lower())
    if game is None:
        close = difflib.get_close_matches(title.lower(), games, n=1)
        known = "".join(part.capitalize() for part in games[close[0]].split("_")) if close else None
        hint = f"did you mean 'ALE/{known}-v5'?" if known else "see gymnasium.pprint_registry() for the games"
        raise UserError("env", env_id, f"no such Atari game; {hint}")
    made = AtariId(env_id.partition("?")[0], game, 0.25 if found["v5"] else 0.0)
    for option, text in parse_qsl(found["options"] or "", keep_blank_values=True):
        if option == "sticky_actions":
            made = replace(made, sticky_actions=_number(env_id, option, text, float))
        elif option == "frame_stack":
            made = replace(made, frame_stack=_number(env_id, option, text, int))
        elif option == "episodic_life":
            if text not in ("0", "1"):
                raise UserError("episodic_life", text, "must be 0 or 1")
            made = replace(made, episodic_life=text == "1")
        else:
            known = "sticky_actions, frame_stack and episodic_life"
            raise UserError("env", env_id, f"has no option {option!r}; there are {known}")
    if not 0 <= made.sticky_actions < 1:
        raise UserError("sticky_actions", made.sticky_actions, "must be at least 0 and below 1")
    if made.frame_stack < 1:
        raise UserError("frame_stack", made.frame_stack, "must be at least 1")
    return made


def _number(env_id: str, option: str, text: str, kind: type[Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError("env", env_id, f"{option} = {text!r} is no number") from None


def _native(
    atari: AtariId, num_envs: int, mode: AutoresetMode, *, film: bool = False, lives: bool = False
) -> AtariVectorEnv:
    """Make the emulators; filmed, they give the whole colour picture instead of what the agent sees.

    With ``lives`` a lost life is reported as termination, and the game goes on.
    """
    from ale_py.vector_env import AtariVectorEnv

    picture: dict[str, Any] = {"grayscale": False, "img_height": 210, "img_width": 160} if film else {}
    return AtariVectorEnv(
        atari.game,
        num_envs,
        # Its defaults are clipped rewards and no sticky actions, whatever the id says.
        reward_clipping=False,
        repeat_action_probability=atari.sticky_actions,
        stack_num=1 if film else atari.frame_stack,
        frameskip=FRAMES_PER_DECISION,
        max_num_frames_per_episode=MAX_FRAMES,
        autoreset_mode=mode,
        num_threads=1 if num_envs == 1 else 0,
        life_loss_info=lives,
        **picture,
    )


def _possible(actions: NDArray[np.int64], space: Any) -> NDArray[np.int64]:
    """Refuse actions that the emulator does not have: it would wait for ever."""
    if len(actions) and (actions.min() < 0 or actions.max() >= space.n):
        raise UserError("action", actions.tolist(), f"must lie between 0 and {space.n - 1}")
    return actions


class AtariGame(gym.Env[Pixels, int]):
    """One game, rewards unclipped.

    Observations are uint8 ``(frame_stack, 84, 84)``, oldest frame first; the stack is zero before the
    first frame.

    Args:
        atari: which game, and how it is played.
        render_mode: ``"rgb_array"`` gives the colour picture from a twin that plays along.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60 // FRAMES_PER_DECISION}  # noqa: RUF012

    def __init__(self, atari: AtariId, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self._game = _native(atari, 1, AutoresetMode.NEXT_STEP)
        self._twin = _native(atari, 1, AutoresetMode.NEXT_STEP, film=True) if render_mode else None
        self._picture: Pixels | None = None
        self.observation_space = self._game.single_observation_space
        self.action_space = self._game.single_action_space
        # The emulator sets the limit: no wrapper is wanted, but whoever plays shall know of it.
        self.spec = EnvSpec(atari.name, max_episode_steps=MAX_FRAMES // FRAMES_PER_DECISION)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Pixels, dict[str, Any]]:
        """Begin a game; without a seed the generator draws one."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(_TRAINING_SEEDS))
        elif seed > _LARGEST_SEED:  # Gymnasium takes any; the emulator does not
            seed = int(np.random.SeedSequence(seed).generate_state(1)[0]) & _LARGEST_SEED
        seeds = np.array([seed])
        observations, _ = self._game.reset(seed=seeds)
        if self._twin is not None:
            self._picture = self._twin.reset(seed=seeds)[0][0, 0]
        return observations[0].copy(), {}

    def step(self, action: int) -> tuple[Pixels, SupportsFloat, bool, bool, dict[str, Any]]:
        """Hold an action for four frames."""
        actions = _possible(np.array([action], dtype=np.int64), self.action_space)
        observations, rewards, terminated, truncated, _ = self._game.step(actions)
        if self._twin is not None:
            pictures, seen, *_ = self._twin.step(actions)
            self._picture = pictures[0, 0]
            if seen[0] != rewards[0]:
                raise RuntimeError("the filmed game and the played one have come apart")
        return observations[0].copy(), float(rewards[0]), bool(terminated[0]), bool(truncated[0]), {}

    def render(self) -> Pixels | None:
        """Return the colour picture, ``(210, 160, 3)``."""
        return None if self._picture is None else self._picture.copy()

    def get_action_meanings(self) -> list[str]:
        """Return the names of the actions, such as ``NOOP`` and ``FIRE``."""
        return [action.name for action in self._game.ale.get_action_set()]


class AtariVecEnv(VecEnv):
    """Many games side by side for a Stable-Baselines3 learner, emulated on all cores.

    Rewards are clipped to -1, 0 and 1 for learning; ``info["episode"]`` has the unclipped return of a whole game,
    also where the id says that an episode ends with every life.
    Emulators cannot be saved: :meth:`restart` begins new games whose seeds follow from the run's seed and
    the number of restarts. Every save of a run restarts, so that a run resumed from it plays like the one
    that went on.

    Args:
        atari: which game, and how it is played.
        num_envs: games.
        seed: of the run.
    """

    def __init__(self, atari: AtariId, num_envs: int, seed: int) -> None:
        self._games = _native(atari, num_envs, AutoresetMode.SAME_STEP, lives=atari.episodic_life)
        self._seed = seed
        self.restarts = 0
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, dtype=np.int64)
        self._frames = np.zeros(num_envs, dtype=np.int64)  # of the game so far, no-ops included
        self._actions: NDArray[np.int64] | None = None
        self.render_mode = None
        super().__init__(num_envs, self._games.single_observation_space, self._games.single_action_space)

    def reset(self) -> Pixels:
        """Begin new games everywhere."""
        self._returns[:] = 0
        self._lengths[:] = 0
        seeds = np.random.SeedSequence((self._seed, self.restarts)).generate_state(self.num_envs) % _TRAINING_SEEDS
        observations: Pixels
        observations, info = self._games.reset(seed=seeds.astype(np.int64))
        self._frames = info["episode_frame_number"].copy()
        return observations.copy()

    def restart(self) -> Pixels:
        """Begin new games with new seeds, as after a checkpoint."""
        self.restarts += 1
        return self.reset()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Remember the actions, ``(N,)``."""
        self._actions = _possible(np.asarray(actions, dtype=np.int64), self.action_space)

    def step_wait(self) -> tuple[Pixels, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Play one decision everywhere."""
        assert self._actions is not None
        observations, rewards, terminated, truncated, info = self._games.step(self._actions)
        self._returns += rewards
        self._lengths += 1
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for row in np.flatnonzero(done):
            infos[row] = {
                "terminal_observation": info["final_obs"][row].copy(),
                "TimeLimit.truncated": bool(truncated[row] and not terminated[row]),
            }
            # A game that goes on after a lost life has more frames behind it than before.
            if info["episode_frame_number"][row] > self._frames[row]:
                continue
            infos[row]["episode"] = {"r": float(self._returns[row]), "l": int(self._lengths[row]), "t": 0.0}
            self._returns[row] = 0
            self._lengths[row] = 0
        self._frames = info["episode_frame_number"].copy()
        return observations.copy(), np.sign(rewards).astype(np.float32), done, infos

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Take another run's seed, from the next reset on."""
        if seed is not None:
            self._seed, self.restarts = seed, 0
        return [self._seed] * self.num_envs

    def close(self) -> None:
        """End the emulators."""
        self.__dict__.pop("_games", None)  # a second time as well

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute, the same for all games."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: emulators have no attributes of their own."""
        raise UserError(attr_name, value, "cannot be set on Atari games")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Refused: emulators have no methods of their own."""
        raise UserError("method", method_name, "cannot be called on Atari games")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Return False for every game."""
        return [False] * len(list(self._get_indices(indices)))
