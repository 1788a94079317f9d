"""Train an agent through all stages of temporal pruning: evaluated, kept, resumable."""

from __future__ import annotations

import dataclasses
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import LinearSchedule, get_device

from spiking_rl.agents.config import (
    DQNConfig,
    PQNConfig,
    TrainConfig,
    config_from_dict,
    load_config,
    load_recipe,
    save_config,
)
from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.evaluation import SELECTION_SEED, evaluate
from spiking_rl.agents.policies import check_spaces
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.agents.progress import Progress
from spiking_rl.agents.provenance import provenance
from spiking_rl.agents.resume import has_training_state, load_training_state, save_training_state
from spiking_rl.agents.runs import RunFolder, checkpoint_name
from spiking_rl.agents.tensorboard import ResumableTensorBoard
from spiking_rl.checkpoint import load_checkpoint, load_into
from spiking_rl.energy import odd_layers
from spiking_rl.envs.make import check_environment, make_vectorised
from spiking_rl.errors import UserError
from spiking_rl.neurons import LIF
from spiking_rl.pruning import Next, Stay, TemporalPruning


class Interrupted(Exception):
    """Training stopped early, with its state saved.

    Attributes:
        reason: "interrupt" (Ctrl-C or SIGTERM) or "time" (the hours given are over).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def resolve_device(device: str) -> torch.device:
    """Return the torch device, "auto" meaning a GPU where there is one.

    Raises:
        UserError: unknown, or not on this machine.
    """
    try:
        found = torch.device("cpu") if device == "cpu" else get_device(device)
    except RuntimeError:
        raise UserError("device", device, "is no torch device; use auto, cpu or cuda") from None
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
    common: dict[str, Any] = {
        "env": venv,
        "learning_rate": LinearSchedule(config.learning_rate, config.final_learning_rate, 1.0),
        "gamma": config.gamma,
        "exploration_fraction": config.exploration_fraction,
        "exploration_final_eps": config.exploration_final_eps,
        "exploration_repeat": config.exploration_repeat,
        "reward_scale": config.reward_scale,
        "max_grad_norm": config.max_grad_norm,
        "firing_rate": config.firing_rate,
        "seed": config.seed,
        "device": torch_device,
        "policy_kwargs": {
            "timesteps": config.timesteps,
            "network_kwargs": {
                "neuron": config.neuron,
                "hidden": list(config.hidden),
                "per_channel": config.per_channel,
                "leak": config.leak,
                "gamma": config.surrogate_gamma,
            },
        },
    }
    model: SpikingPQN | SpikingDQN
    if isinstance(config, PQNConfig):
        model = SpikingPQN(**common, **_pick(config, "n_steps", "n_epochs", "n_minibatches", "lam"))
    else:
        assert isinstance(config, DQNConfig)
        names = ("buffer_size", "learning_starts", "batch_size", "gradient_steps", "target_update_interval")
        freq = max(1, config.train_freq // config.num_envs)
        model = SpikingDQN(
            **common, train_freq=freq, n_steps=config.return_steps, **{n: getattr(config, n) for n in names}
        )
    model.prune_lr_factor = config.prune_lr_factor
    return model


def _pick(config: TrainConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


class _BetweenRollouts(BaseCallback):
    """Calls the session where the learner's state is complete: before each rollout."""

    def __init__(self, session: TrainingSession) -> None:
        super().__init__()
        self.session = session

    def _on_rollout_start(self) -> None:
        self.session.between_rollouts()

    def _on_step(self) -> bool:
        return True


class TrainingSession:
    """One run on disk, from its first agent step or from where it was left.

    Args:
        config: checked settings.
        folder: the run folder; it exists and is held by this process.
        model: a learner on resumable environments.
        hours: stop, with everything saved, after so many hours of this session.
        progress: show progress on standard error.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        model: SpikingPQN | SpikingDQN,
        hours: float | None = None,
        progress: bool = False,
    ) -> None:
        self.config = config
        self.folder = folder
        self.model = model
        self.deadline = None if hours is None else time.monotonic() + hours * 3600
        self.shown = progress
        self.stop_requested = False
        start, stop = (config.timesteps, config.prune_to) if config.neuron == "lif" else (1, 1)
        self.pruning = TemporalPruning(start, stop, config.agent_steps, config.prune_steps)
        self.rows: list[dict[str, Any]] = []
        self.next_eval = config.eval_every
        self.next_save = config.save_every
        self.warned: list[str] = []
        self.seconds = 0.0
        self._started = time.monotonic()

    # -- where the state lives -------------------------------------------------------------------

    def save(self) -> None:
        """Save everything that continuing needs."""
        extra = {
            "pruning": self.pruning.state_dict(),
            "rows": self.rows,
            "next_eval": self.next_eval,
            "next_save": self.next_save,
            "seconds": self.seconds + time.monotonic() - self._started,
        }
        save_training_state(self.folder.resume, self.model, extra)

    def restore(self) -> None:
        """Go back to the last saved state; a run that died before its first save starts again."""
        if not has_training_state(self.folder.resume):
            return
        extra = load_training_state(self.folder.resume, self.model)
        try:
            self.pruning = TemporalPruning.from_state_dict(extra["pruning"])
            self.rows = list(extra["rows"])
            self.next_eval, self.next_save = int(extra["next_eval"]), int(extra["next_save"])
            self.seconds = float(extra["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError("resume", str(self.folder.resume), f"is incomplete ({error!r})") from None

    def _checkpoint_name(self) -> str:
        return checkpoint_name(self.pruning.timesteps if self.model.policy.q_net.network.spiking else None)

    # -- training --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until temporal pruning is done.

        Raises:
            Interrupted: stopped early; the state is saved.
            OSError: the disk is full or gone; what was saved stays.
        """
        torch.set_num_threads(self.config.threads)
        self._started = time.monotonic()
        board = ResumableTensorBoard(str(self.folder.tensorboard), self.model.num_timesteps)
        self.model.set_logger(Logger(None, [board]))
        self.progress = Progress(self._total_steps(), self.model.num_timesteps, self.shown)
        try:
            with self._stopping_on_signals():
                while not self.pruning.finished:
                    self._stage()
        finally:
            self.progress.close()
            board.close()
            self.seconds += time.monotonic() - self._started
            self._started = time.monotonic()

    def _total_steps(self) -> int:
        later = self.pruning.start - self.pruning.stop
        return int(self.pruning.first_budget + later * self.pruning.stage_budget)

    def _stage(self) -> None:
        """Train at one T until its budget is spent, then move on as pruning says."""
        end = self.model.stage_start + int(self.pruning.budget)
        if self.model.num_timesteps < end:
            self.model.learn(
                end - self.model.num_timesteps,
                callback=_BetweenRollouts(self),
                reset_num_timesteps=False,
            )
        name = self._checkpoint_name()
        decision = self._evaluate()
        # The end of the stage is kept beside its best: what training gave without selection.
        self._keep(f"{name}-end")
        assert not isinstance(decision, Stay)
        if isinstance(decision, Next):
            self.begin(decision)
        self.save()

    def begin(self, decision: Next) -> None:
        """Start a stage from the best checkpoint of the stage above."""
        folder = self.folder.checkpoints / decision.checkpoint
        load_into(self.model.policy.q_net, load_checkpoint(folder).tensors, folder)
        self.model.begin_stage(decision.timesteps)
        self.next_eval = self.model.num_timesteps + self.config.eval_every

    def between_rollouts(self) -> None:
        """Evaluate and save where due; stop where asked. The learner's state is complete here."""
        steps = self.model.num_timesteps
        self.progress.step(steps)
        if steps >= self.next_eval:
            self.next_eval = steps + self.config.eval_every
            self._evaluate()
        late = self.deadline is not None and time.monotonic() > self.deadline
        if self.stop_requested or late or steps >= self.next_save:
            # The same agent steps save whether or not the run is stopped, so that both go on alike.
            if steps >= self.next_save:
                self.next_save = steps + self.config.save_every
            self.save()
        if self.stop_requested or late:
            raise Interrupted("interrupt" if self.stop_requested else "time")

    def _evaluate(self) -> Any:
        """Score the current weights on the selection seeds, keep them if best, write progress."""
        model, config = self.model, self.config
        result = evaluate(model, config.env, episodes=config.eval_episodes, seed=SELECTION_SEED, measure_latency=False)
        name = self._checkpoint_name()
        decision = self.pruning.report(result.mean_return, model.num_timesteps - model.stage_start)
        returns = [e["r"] for e in model.ep_info_buffer or []]
        rates = result.spike_rate
        row = {
            "agent_steps": model.num_timesteps,
            "timesteps": result.timesteps,
            "score": result.mean_return,
            "train_return": float(np.mean(returns)) if returns else None,
            "epsilon": float(model.exploration_rate),
            "learning_rate": model.policy.optimizer.param_groups[0]["lr"],
            "loss": model.last_loss,
            "spike_rate": sum(rates.values()) / len(rates) if rates else None,
        }
        self.rows.append(row)
        self.folder.write_progress(self.rows)
        if decision.improved:
            self._keep(name, score=result.mean_return)
        self._log(row, rates or {})
        return decision

    def _keep(self, name: str, **info: Any) -> None:
        self.model.save_checkpoint(
            self.folder.checkpoints / name, environment=self.config.env, seed=self.config.seed, **info
        )

    def _log(self, row: dict[str, Any], rates: dict[str, float]) -> None:
        self.progress.evaluated(row)
        logger = self.model.logger
        logger.record("eval/mean_return", row["score"])
        for layer, rate in rates.items():
            logger.record(f"spikes/{layer}", rate)
        for i, neuron in enumerate(self.model.policy.q_net.network.neurons):
            if isinstance(neuron, LIF):
                logger.record(f"threshold/layer{i + 1}", neuron.threshold.detach().mean().item())
                logger.record(f"leak/layer{i + 1}", neuron.leak.detach().mean().item())
        logger.record("train/timesteps_T", row["timesteps"] or 1)
        logger.dump(row["agent_steps"])
        for warning in odd_layers(rates):
            layer = warning.split()[0]
            if layer not in self.warned:
                self.warned.append(layer)
                self.progress.note(f"warning: {warning} at T={row['timesteps']}; see --firing-rate, --learning-rate")

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a stop at the next rollout; the second one kills."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def request(number: int, frame: FrameType | None) -> None:
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            self.progress.note("stopping: saving the run (again to stop at once)")

        old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def start_run(
    config: TrainConfig, folder: RunFolder, *, device: str = "auto", hours: float | None = None, progress: bool = False
) -> TrainingSession:
    """Check everything, make the run folder, and return a session ready to run.

    Raises:
        UserError: before anything is written, where an input cannot work.
    """
    config.check()
    _check_hours(hours)
    check_spaces(*check_environment(config.env))
    resolve_device(device)
    folder.create()
    save_config(folder.config, config, provenance())
    return TrainingSession(config, folder, build_model(config, device), hours, progress)


def resume_run(
    folder: RunFolder, *, device: str = "auto", hours: float | None = None, progress: bool = False
) -> TrainingSession:
    """Return a session that goes on where the run was left.

    Raises:
        UserError: no run there, or one that cannot be continued.
    """
    _check_hours(hours)
    folder.require()
    config = load_config(folder.config)
    config.check()
    session = TrainingSession(config, folder, build_model(config, device), hours, progress)
    session.restore()
    return session


def _check_hours(hours: float | None) -> None:
    if hours is not None and not hours > 0:
        raise UserError("hours", hours, "must be positive")


def extend_run(session: TrainingSession, to: int) -> None:
    """Lower T further in a finished run: ``session.run()`` then trains the new stages.

    Raises:
        UserError: the run is not finished, is no spiking run, or is at ``to`` already.
    """
    folder = session.folder
    if session.config.neuron != "lif":
        raise UserError("run", str(folder.path), "holds a ReLU network, which has no timesteps to prune")
    if not session.pruning.finished:
        raise UserError("run", str(folder.path), "has not finished training; continue it first with train --resume")
    session.begin(session.pruning.extend(to))
    session.config.prune_to = to
    save_config(folder.config, session.config, provenance())
    session.save()


def train(
    env: str = "cartpole",
    *,
    algo: str | None = None,
    run: Path | str | None = None,
    device: str = "auto",
    progress: bool = False,
    **settings: Any,
) -> SpikingPQN | SpikingDQN:
    """Train an agent, as ``spiking-rl train`` does.

    Args:
        env: a recipe's name or a Gymnasium id.
        algo: "pqn" or "dqn"; default the recipe's choice.
        run: folder that keeps the run; None keeps nothing but the returned model.
        device: "auto", "cpu" or "cuda".
        progress: show progress on standard error.
        settings: any field of :class:`PQNConfig` or :class:`DQNConfig`.

    Returns:
        The learner with the best weights of its last stage.

    Raises:
        UserError: an input that cannot work, before training.
    """
    _, config = load_recipe(env, algo)
    config = replace_settings(config, settings)
    with _run_folder(run) as folder:
        session = start_run(config, folder, device=device, progress=progress)
        with folder.locked():
            session.run()
            return _with_best_weights(session)


def prune(
    model: SpikingPQN | SpikingDQN,
    env: str,
    *,
    to: int = 1,
    agent_steps: int = 50_000,
    run: Path | str | None = None,
    progress: bool = False,
    **settings: Any,
) -> SpikingPQN | SpikingDQN:
    """Lower the timesteps of a trained agent step by step, training on at each T.

    Args:
        model: a trained spiking agent; it is changed in place.
        env: Gymnasium id to go on training in.
        to: timesteps to end with.
        agent_steps: of each stage.
        run: folder that keeps the run; None keeps nothing but the model.
        progress: show progress on standard error.
        settings: fields of the config that govern evaluation, such as ``eval_every``.

    Returns:
        The same model, with the best weights at ``to``.

    Raises:
        UserError: an input that cannot work, before training.
    """
    _, config = load_recipe(env, model.algo)
    now = model.policy.timesteps
    changes = {"timesteps": now, "prune_to": now, "prune_steps": agent_steps, "num_envs": model.n_envs, **settings}
    config = replace_settings(config, changes)
    config.check()
    if to >= now:
        raise UserError("to", to, f"the model is at T={now} already; choose a smaller number")
    with _run_folder(run) as folder:
        folder.create()
        save_config(folder.config, config, provenance())
        model.set_env(make_vectorised(config.env, config.num_envs, config.seed))
        session = TrainingSession(config, folder, model, progress=progress)
        with folder.locked():
            session.pruning.first_budget = 1
            session.pruning.report(0.0, 1)  # the model as given is the finished first stage
            model.save_checkpoint(folder.checkpoints / checkpoint_name(now), environment=config.env)
            session.begin(session.pruning.extend(to))
            session.run()
            return _with_best_weights(session)


def replace_settings(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """Return the config with some fields changed, types checked as in a recipe.

    Raises:
        UserError: unknown name or wrong type.
    """
    return config_from_dict(type(config), {**dataclasses.asdict(config), **settings}, "the arguments")


@contextmanager
def _run_folder(run: Path | str | None) -> Iterator[RunFolder]:
    if run is not None:
        yield RunFolder(run)
        return
    with tempfile.TemporaryDirectory(prefix="spiking-rl-") as temporary:
        yield RunFolder(temporary)


def _with_best_weights(session: TrainingSession) -> SpikingPQN | SpikingDQN:
    folder = session.folder.checkpoints / session._checkpoint_name()
    load_into(session.model.policy.q_net, load_checkpoint(folder).tensors, folder)
    return session.model
