"""What both learners share: stages of temporal pruning, calibration, safe checkpoints."""

from __future__ import annotations

import io
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict, TrainFreq
from stable_baselines3.common.utils import LinearSchedule, obs_as_tensor
from stable_baselines3.common.vec_env import VecFrameStack, is_vecenv_wrapped

from spiking_rl.agents.config import Precision
from spiking_rl.agents.exploration import EpsilonGreedy
from spiking_rl.agents.imitation import Teacher
from spiking_rl.agents.optimisation import learning_rate, prepare_recording, recorded_as, set_learning_rate
from spiking_rl.agents.policies import SpikingMlpPolicy, SpikingQNetwork
from spiking_rl.agents.ranges import check_ranges
from spiking_rl.agents.spaces import space_from_json, space_to_json
from spiking_rl.checkpoint import load_checkpoint, load_into, save_checkpoint
from spiking_rl.conversion import calibrate_thresholds
from spiking_rl.envs.atari import AtariVecEnv
from spiking_rl.errors import UserError, WorkError
from spiking_rl.graphs import Recorder, can_be_recorded
from spiking_rl.networks import NetworkState, rescale_leaks
from spiking_rl.neurons import LIFState
from spiking_rl.tracking import spoiled_layer


def flat_membranes(state: NetworkState) -> NDArray[np.float32]:
    """Return the membranes of all layers side by side, ``(B, neurons)``."""
    flat: NDArray[np.float32] = torch.cat([layer.membrane.flatten(1) for layer in state], 1).float().cpu().numpy()
    return flat


def split_membranes(flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> NetworkState:
    """Undo :func:`flat_membranes` for layers of the given shapes."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes], 1)
    return tuple(LIFState(part.reshape(-1, *shape)) for part, shape in zip(parts, shapes, strict=True))


_IMAGES = 512  # that set thresholds; the papers' number, and all currents of a layer must fit in memory

# What building an agent from settings that make none can raise.
_MISFITS = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError, MemoryError)

_SMALL = 100_000  # numbers that may be allocated unseen
_DEEP = 1_000  # layers: building more takes seconds

SelfStaged = TypeVar("SelfStaged", bound="StagedAlgorithm")


def own_policy_kwargs(given: dict[str, Any] | None, stateful: bool) -> dict[str, Any]:
    """Return a copy of a policy's options, as stages change them, with ``stateful`` where it is asked for.

    Raises:
        UserError: the options say otherwise.
    """
    options = dict(given or {})
    if stateful and not options.setdefault("stateful", True):
        raise UserError("policy_kwargs", options, "says stateful=False beside stateful=True; leave it out there")
    return options


class StagedAlgorithm(BaseAlgorithm):
    """An SB3 algorithm whose schedules run per stage, each stage at one number of timesteps.

    The learning rate falls over the current stage. Exploration falls over the first stage only and
    then stays at its final value, also in the stages after it.

    Attributes:
        policy: holds the Q-network, its target where there is one, and the optimiser.
        exploration_rate: current epsilon.
        firing_rate: spikes per neuron and timestep that calibration aims at.
        exploration_repeat: mean number of steps that a random action is held.
        explorer: chooses between greedy and random actions.
        calibrated: observation scaling and thresholds have been set from data.
        scaled_outside: it learned from observations that VecNormalize had scaled, which no environment of ours does.
        stage: index of the current stage, 0 before temporal pruning begins.
        stage_start: agent steps at which it began.
        last_loss: mean loss of the latest training, None before it.
        algo: short name of the algorithm.
        hyperparameters: constructor arguments that a checkpoint keeps as they are. Of the learning rate it keeps the
            first and the last value.
        precision: arithmetic in which a ReLU network is trained.
        spike_precision: arithmetic in which a spiking network is trained; it plays in float32.
        average_decay: decay of the weight average per training; 0 keeps none.
        average: averaged weights and buffers of the Q-network by name, None before the first training.
        prune_lr_factor: multiplies the learning rate in every stage after the first.
        teacher: whose Q-values are learned in the first part of every stage.
        imitation: that part, from 0 to 1.
        rescale_leak: a stateful agent's leaks follow T, so that its memory lasts as many decisions.
        plays_only: loaded to predict, without room for what is replayed; ``set_env`` changes that.
        membranes: of the training environments after their latest decision; None before the first
            or when stateless.
        episode_starts: which of them open an episode with their next decision, ``(n_envs,)``.
    """

    algo: ClassVar[str]
    hyperparameters: ClassVar[tuple[str, ...]]
    policy: SpikingMlpPolicy
    exploration_rate: float
    firing_rate: float
    exploration_repeat: float
    explorer: EpsilonGreedy
    last_loss: float | None = None
    calibrated = False
    scaled_outside = False
    plays_only = False
    stage = 0
    stage_start = 0
    prune_lr_factor = 1.0
    teacher: Teacher | None = None
    imitation = 0.0
    rescale_leak = True
    precision: Precision = "float32"
    spike_precision: Precision = "float32"
    average_decay = 0.0
    average: dict[str, torch.Tensor] | None = None
    membranes: NetworkState | None = None
    episode_starts: NDArray[np.bool_]
    max_grad_norm: float
    gamma: float
    _recorder: Recorder | None = None
    _recorded_by: tuple[Any, ...] = ()  # what its recordings hold

    @property
    def stateful(self) -> bool:
        """Whether membranes are carried through the episode."""
        return self.policy.stateful

    def imitated(self) -> Teacher | None:
        """Return whom to learn from now; None where returns are."""
        return self.teacher if 1.0 - self._current_progress_remaining <= self.imitation else None

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "teacher", "_recorder", "_recorded_by"]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """As in Stable-Baselines3, which pickles; a machine without this one's device can load it."""
        held = self.average, self.membranes
        self._move_held("cpu")
        try:
            super().save(path, exclude, include)
        finally:
            self.average, self.membranes = held

    def _move_held(self, device: torch.device | str) -> None:
        """Move the tensors that are no part of the policy."""
        if self.average is not None:
            self.average = {name: tensor.to(device) for name, tensor in self.average.items()}
        if self.membranes is not None:
            self.membranes = tuple(LIFState(layer.membrane.to(device)) for layer in self.membranes)

    def arithmetic(self) -> AbstractContextManager[object]:
        """Return the context of a training pass."""
        spiking = self.policy.q_net.network.spiking
        if (self.spike_precision if spiking else self.precision) == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def act_values(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """Return Q-values ``(n_envs, A)`` of the training environments' observations.

        A stateful agent's membranes advance: exactly one call for every step of the environments,
        whatever action is taken then.
        """
        obs = obs_as_tensor(observations, self.device)
        assert isinstance(obs, torch.Tensor)
        with torch.no_grad():
            if not self.stateful:
                (values,) = self._launch("act", lambda obs: (self.policy.q_net(obs),), obs)
            else:
                before = (layer.membrane for layer in self.current_membranes())
                starts = torch.as_tensor(self.episode_starts, device=self.device)
                values, *after = self._launch("act", self._act, obs, starts, *before)
                self.membranes = tuple(LIFState(membrane) for membrane in after)
        result: NDArray[np.float32] = values.float().cpu().numpy()
        return result

    def _act(self, obs: torch.Tensor, starts: torch.Tensor, *membranes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return Q-values and the membranes after the decision."""
        values, after = self.policy.q_net.q_values(obs, tuple(LIFState(m) for m in membranes), starts)
        assert after is not None
        return values, *(layer.membrane for layer in after)

    def learn_from(
        self, loss: Callable[..., torch.Tensor], *tensors: torch.Tensor, record: bool = True
    ) -> torch.Tensor:
        """Update the Q-network once; on a GPU the update is one CUDA graph where the optimiser allows it.

        Args:
            loss: function of the tensors, known by its name.
            tensors: of a batch.
            record: the loss decides nothing by the values of tensors, and reads no others but the network's.

        Returns:
            The loss, detached.
        """
        optimizer = self.policy.optimizer

        def update(*tensors: torch.Tensor) -> tuple[torch.Tensor]:
            value = loss(*tensors)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.policy.q_net.parameters(), self.max_grad_norm)
            optimizer.step()
            return (value.detach(),)

        if not record or not can_be_recorded(self.device) or not prepare_recording(optimizer):
            return update(*tensors)[0]
        return self._launch(loss.__name__, update, *tensors)[0]

    def _launch(
        self, name: str, function: Callable[..., tuple[torch.Tensor, ...]], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Call a function, by its recording on a GPU."""
        q_net = self.policy.q_net
        if not can_be_recorded(self.device) or q_net.network.exit_margin is not None:
            return function(*tensors)
        if self._recorder is None:
            self._recorder = Recorder()
        optimizer = self.policy.optimizer
        by = (
            *(optimizer, recorded_as(optimizer), q_net.network.timesteps, self.precision, self.spike_precision),
            *(self.gamma, self.max_grad_norm),
        )
        if self._recorded_by != by:
            self._recorder.forget()
            self._recorded_by = by
        return self._recorder(name, function, *tensors)

    def current_membranes(self) -> NetworkState:
        """Return the membranes before the next decision, at rest if there was none yet."""
        if self.membranes is None or len(self.membranes[0].membrane) != self.n_envs:
            self.membranes = self.policy.q_net.network.initial_state(self.n_envs)
            self.episode_starts = np.ones(self.n_envs, dtype=bool)
        return self.membranes

    def end_episodes(self) -> None:
        """Cut all running episodes: the environments are about to begin new ones."""
        self.episode_starts = np.ones(self.n_envs, dtype=bool)
        self.explorer.end_episodes(self.episode_starts)

    def predict(
        self,
        observation: NDArray[Any] | dict[str, NDArray[Any]],
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Return actions and, from a stateful agent, the membranes to pass to the next call.

        Epsilon-greedy unless ``deterministic``; random actions advance the membranes like others.
        """
        actions, state = self.policy.predict(observation, state, episode_start, deterministic)
        if not deterministic:
            chance = np.random.rand(*np.shape(actions)) < self.exploration_rate
            noise = np.random.randint(self.action_space.n, size=np.shape(actions))  # type: ignore[attr-defined]
            actions = np.where(chance, noise, actions)
        return actions, state

    def check_settings(self) -> None:
        """Refuse settings out of their range.

        Raises:
            UserError: naming one.
        """
        check_ranges({name: getattr(self, name) for name in self.hyperparameters})

    def _finish_setup(self) -> None:
        """Set up what the learners share, with the policy made."""
        assert isinstance(self.action_space, spaces.Discrete)
        gives = getattr(self.policy, "gives", "no Q-values")
        if gives != SpikingMlpPolicy.gives:
            raise UserError("policy", type(self.policy).__name__, f"gives {gives}; use MlpPolicy or CnnPolicy")
        self._move_held(self.device)  # those of a zip lie on the CPU
        self.explorer = EpsilonGreedy(self.n_envs, int(self.action_space.n), self.exploration_repeat)
        if self.policy.q_net.norm is not None:
            self.policy.q_net.norm.follow = False  # the learners update it, each observation once
        self._warn_of_stacked_frames()

    def _warn_of_stacked_frames(self) -> None:
        if self.stateful and self.env is not None:
            stacked = is_vecenv_wrapped(self.env, VecFrameStack)
            stacked |= isinstance(self.env, AtariVecEnv) and self.observation_space.shape[0] > 1  # type: ignore[index]
            if stacked or any(self.env.env_is_wrapped(FrameStackObservation)):
                warnings.warn(
                    "the environment stacks frames, which a stateful agent does without: it remembers them itself, "
                    "and every stacked frame makes its first, analog layer dearer",
                    stacklevel=3,
                )

    def record_loss(self, losses: list[torch.Tensor]) -> None:
        """Note the losses of one training.

        Raises:
            WorkError: one of them, or a parameter, is no number any more; the message names the layer.
        """
        self.last_loss = torch.stack(losses).mean().item()
        self.logger.record("train/loss", self.last_loss)
        spoiled = spoiled_layer(self.policy.q_net.network)
        if not math.isfinite(self.last_loss) or spoiled:
            rate = learning_rate(self.policy.optimizer)
            where = f" and the {spoiled} no number any more" if spoiled else ""
            raise WorkError(
                "learning_rate",
                rate,
                f"is too high: after {self.num_timesteps} agent steps the loss is {self.last_loss}{where}; start again "
                "with a lower one, or smaller rewards (reward_scale)",
            )

    def update_average(self) -> None:
        """Move the weight average towards the current weights; the learners call it after training.

        Q-learning on binary activations flips between policies from one update to the next; the
        average does not (Polyak averaging; Izmailov et al. 2018).
        """
        if not self.average_decay:
            return
        weights = self.policy.q_net.state_dict()
        if self.average is None:
            self.average = {name: tensor.clone() for name, tensor in weights.items()}
            return
        for name, tensor in weights.items():
            if "running_" in name or not tensor.is_floating_point():
                self.average[name].copy_(tensor)
            else:
                self.average[name].lerp_(tensor, 1 - self.average_decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights into the Q-network for a while (no change where there are none)."""
        if self.average is None:
            yield
            return
        q_net = self.policy.q_net
        current = {name: tensor.clone() for name, tensor in q_net.state_dict().items()}
        q_net.load_state_dict(self.average)
        try:
            yield
        finally:
            q_net.load_state_dict(current)

    def begin_stage(self, timesteps: int) -> None:
        """Go on at another number of timesteps: fresh optimiser, exploration at its final value."""
        self.average = None
        if self.teacher is not None:
            self.teacher.forget()
        if self.stateful and self.rescale_leak:
            rescale_leaks(self.policy.q_net.network, timesteps / self.policy.timesteps)
        self.policy.set_timesteps(timesteps)
        self.policy_kwargs["timesteps"] = timesteps
        self.policy.rebuild_optimizer(self.lr_schedule(1.0))
        self.stage += 1
        self.stage_start = self.num_timesteps
        self._current_progress_remaining = 1.0

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As in Stable-Baselines3; episodes in the environments left behind are cut.

        An agent that was loaded to play takes any number of environments, and can learn on.
        """
        left = self._last_obs
        with self._as_it_was_if_refused():
            if self.plays_only:
                env = self._wrap_env(env, self.verbose)
                self.n_envs = env.num_envs
            super().set_env(env, force_reset)
            if self.plays_only:
                self.plays_only = False
                learned = self.policy.state_dict()
                self._setup_model()
                self.policy.load_state_dict(learned)
        if left is not None and force_reset:
            self._last_obs = left
            self.end_episodes()
            self._last_obs = None

    @contextmanager
    def _as_it_was_if_refused(self) -> Iterator[None]:
        """Undo what was replaced in this agent where the body raises: a refused environment costs nothing."""
        held = dict(self.__dict__)
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(held)
            raise

    def set_parameters(
        self,
        load_path_or_dict: str | TensorDict,
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """As in Stable-Baselines3; thresholds and scaling that come with the weights are not set anew by ``learn``."""
        before = self._set_from_data()
        super().set_parameters(load_path_or_dict, exact_match, device)
        after = self._set_from_data()
        if any(not torch.equal(tensor, after[name]) for name, tensor in before.items()):
            self.calibrated = True

    def _set_from_data(self) -> dict[str, torch.Tensor]:
        """Return a copy of what calibration sets."""
        state = self.policy.q_net.state_dict()
        return {n: t.clone() for n, t in state.items() if n.endswith("threshold") or n.startswith("norm.")}

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any
    ) -> tuple[int, BaseCallback]:
        if reset_num_timesteps and self._last_obs is not None:
            self.end_episodes()  # Stable-Baselines3 is about to reset the environments
        total, callback = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args)
        outside = self.get_vec_normalize_env()
        self.scaled_outside = outside is not None and outside.norm_obs
        # A user's own `learn` on a pruned model counts from zero again: so must the stage's schedules.
        self.stage_start = min(self.stage_start, self.num_timesteps)
        if reset_num_timesteps:
            self._current_progress_remaining = 1.0  # not that of the end of an earlier call
        return total, callback

    def exploration_progress(self) -> float:
        """Return the progress remaining as exploration sees it (0 once the first stage is over)."""
        return self._current_progress_remaining if self.stage == 0 else 0.0

    def calibrate(self, observations: torch.Tensor, starts: torch.Tensor) -> None:
        """Set observation scaling and thresholds from play, explicitly.

        The target network, where there is one, is made equal afterwards.

        Args:
            observations: raw, ``(L, N, *obs)`` of N environments.
            starts: bool ``(L, N)``, true where an observation opens an episode.
        """
        q_net = self.policy.q_net
        q_net.update_norm(observations.flatten(0, 1))
        if q_net.network.spiking:
            if q_net.norm is None:
                observations, starts = _some_images(observations, starts, self.stateful)
            with torch.no_grad():
                inputs = q_net.features(observations.flatten(0, 1))
                if self.stateful:
                    sequences = inputs.reshape(*observations.shape[:2], *inputs.shape[1:])
                    calibrate_thresholds(q_net.network, sequences, self.firing_rate, starts)
                else:
                    calibrate_thresholds(q_net.network, inputs, self.firing_rate)
        if self.policy.has_target:
            self.policy.q_net_target.load_state_dict(q_net.state_dict())
        self.calibrated = True

    def _update_learning_rate(self, optimizers: list[torch.optim.Optimizer] | torch.optim.Optimizer) -> None:
        factor = self.prune_lr_factor if self.stage else 1.0
        rate = factor * self.lr_schedule(self._current_progress_remaining)
        self.logger.record("train/learning_rate", rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            set_learning_rate(optimizer, rate)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        done = num_timesteps - self.stage_start
        remaining = 1.0 - done / max(1, total_timesteps - self.stage_start)
        self._current_progress_remaining = min(1.0, max(0.0, remaining))

    def save_checkpoint(self, folder: pathlib.Path | str, **info: Any) -> None:
        """Save the agent as safetensors + JSON (``save`` is SB3's zip, which pickles).

        Args:
            folder: replaced atomically.
            info: JSON-serialisable facts kept in ``config.json``, such as a score; ``environment``, by which
                :func:`~spiking_rl.agents.load_agent` knows where it plays, is that of the model where it is left out.

        An optimiser of one's own is not kept, which a warning says (SB3's ``save`` keeps it).

        Raises:
            UserError: something else than a checkpoint is in the folder, which would be lost; a fact that the agent
                states itself.
            OSError: the folder cannot be written; an older checkpoint stays.
        """
        kwargs = self.policy.q_net_kwargs
        if self.policy.has_own_optimizer:
            warnings.warn(
                "a checkpoint does not keep optimizer_class and optimizer_kwargs; who loads it to learn on gives them "
                "again, or uses SB3's save",
                stacklevel=2,
            )
        if info.get("environment") is None:
            info = {**info, "environment": self._environment_id()}
        own: dict[str, Any] = {
            "kind": "agent",
            "algo": self.algo,
            "timesteps": self.policy.timesteps if self.policy.q_net.network.spiking else None,
            "agent_steps": self.num_timesteps,
            "calibrated": self.calibrated,
            **({"scaled_outside": True} if self.scaled_outside else {}),
            "observation_space": space_to_json(self.observation_space),
            "action_space": space_to_json(self.action_space),
            "policy": kwargs,
            "hyperparameters": {**{name: getattr(self, name) for name in self.hyperparameters}, **self._schedules()},
        }
        taken = sorted(own.keys() & info.keys())
        if taken:
            raise UserError(taken[0], info[taken[0]], "is stated by the agent itself; give this fact another name")
        save_checkpoint(folder, self.policy.q_net.state_dict(), own | info)

    def _environment_id(self) -> str | None:
        """Return the Gymnasium id of the environment that the model has, if there is one."""
        try:
            spec = self.env.get_attr("spec", 0)[0] if self.env is not None else None
        except AttributeError:  # a vector environment of somebody's own
            return None
        return getattr(spec, "id", None)

    def _schedules(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the learning rate, which it takes for linear, and of when to train."""
        kept: dict[str, Any] = {"learning_rate": [float(self.lr_schedule(1.0)), float(self.lr_schedule(0.0))]}
        frequency = getattr(self, "train_freq", None)
        if isinstance(frequency, TrainFreq):
            kept["train_freq"] = [frequency.frequency, frequency.unit.value]
        return kept

    @classmethod
    def load_checkpoint(
        cls: type[SelfStaged], folder: pathlib.Path | str, env: Any = None, device: str | torch.device = "auto"
    ) -> SelfStaged:
        """Load an agent saved by :meth:`save_checkpoint`; nothing in the file is executed.

        Args:
            folder: a checkpoint folder.
            env: environment to train on; None to predict only.
            device: torch device or "auto".

        Raises:
            UserError: damaged, foreign, of another algorithm, or not fitting ``env``.
        """
        tensors, config = load_checkpoint(folder)
        if config.get("algo") != cls.algo:
            raise UserError(
                "checkpoint", str(folder), f"holds algo {config.get('algo')!r}, not {cls.algo!r}; use load_agent"
            )
        try:
            observation_space = space_from_json(config["observation_space"])
            action_space = space_from_json(config["action_space"])
            saved = config["hyperparameters"]
            options = {name: value for name, value in saved.items() if name in cls.hyperparameters}
            if "learning_rate" in saved:  # not of older checkpoints
                first, final = map(float, saved["learning_rate"])
                options["learning_rate"] = LinearSchedule(first, final, 1.0)
            if "train_freq" in saved:
                options["train_freq"] = tuple(saved["train_freq"])
            options |= {"policy_kwargs": dict(config["policy"]), "_init_setup_model": False}
            numbers = sum(tensor.numel() for tensor in tensors.values())
            _require_room(config["policy"], observation_space, action_space, numbers)
            model = cls(env=env, device=device, **options)
            if env is not None and (observation_space, action_space) != (model.observation_space, model.action_space):
                raise UserError(
                    "env", str(env), f"has other spaces than the agent: {observation_space}, {action_space}"
                )
            model.observation_space, model.action_space = observation_space, action_space
            if env is None:
                model.n_envs = 1
                model.plays_only = True
            model._setup_model()
            if model.policy.q_net.network.spiking and model.policy.timesteps != config["timesteps"]:
                raise ValueError(f"timesteps {config['timesteps']} and {model.policy.timesteps} contradict")
            model.calibrated = bool(config["calibrated"])
            model.scaled_outside = bool(config.get("scaled_outside", False))
            model.num_timesteps = int(config["agent_steps"])
        except UserError:
            raise
        except _MISFITS as error:
            reason = " ".join(repr(error).split())[:200]
            raise UserError("checkpoint", str(folder), f"its config.json makes no agent ({reason})") from None
        load_into(model.policy.q_net, tensors, folder)
        if model.policy.has_target:
            model.policy.q_net_target.load_state_dict(model.policy.q_net.state_dict())
        model.exploration_rate = 0.0  # a loaded agent plays what it learned, as SB3's DQN does
        return model


def _some_images(
    observations: torch.Tensor, starts: torch.Tensor, sequences: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return about ``_IMAGES`` of the images ``(L, N, *obs)``: whole sequences, or spread over all."""
    length, envs = observations.shape[:2]
    if sequences:
        length = min(length, _IMAGES)
        some = slice(-length, None), slice(max(1, _IMAGES // length))
        return observations[some], starts[some]
    every = -(-length * envs // _IMAGES)
    return observations.flatten(0, 1)[::every].unsqueeze(0), starts.flatten()[::every].unsqueeze(0)


def _require_room(policy: dict[str, Any], observations: spaces.Space[Any], actions: Any, numbers: int) -> None:
    """Refuse settings of a network far larger than its weights, before memory is taken for it.

    Args:
        policy: the settings.
        observations: observation space.
        actions: action space.
        numbers: in the weights.

    Raises:
        ValueError: the network would be larger.
    """
    kwargs = policy.get("network_kwargs") or {}
    if len(kwargs.get("hidden") or []) <= _DEEP:
        with torch.device("meta"):  # shapes without numbers
            network = SpikingQNetwork(observations, actions, **policy)
        wanted = sum(tensor.numel() for tensor in network.state_dict().values())
        if wanted == numbers or wanted < _SMALL:
            return
    raise ValueError("its weights are not those of the network that its settings describe")
