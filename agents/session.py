"""One training run on disk: evaluated, kept, resumable, from its first agent step to its last."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from spiking_rl.agents.config import TrainConfig
from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.evaluation import SELECTION_SEED, evaluate
from spiking_rl.agents.optimisation import learning_rate
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.agents.progress import Progress
from spiking_rl.agents.resume import has_training_state, load_training_state, save_training_state
from spiking_rl.agents.starting import imitate, start_from
from spiking_rl.agents.tensorboard import ResumableTensorBoard
from spiking_rl.checkpoint import load_checkpoint, load_into
from spiking_rl.energy import odd_layers
from spiking_rl.errors import UserError
from spiking_rl.files import replace_folder
from spiking_rl.provenance import memory_columns
from spiking_rl.pruning import Decision, Next, Stay, TemporalPruning
from spiking_rl.runs import RunFolder, checkpoint_name
from spiking_rl.stopping import Interrupted, stopping_on_signals
from spiking_rl.tracking import layer_columns, layer_scalars, odd_thresholds


class _StageOver(Exception):
    """Leaves the learner's loop between two rollouts: the stage has reached its goal."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision


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
        ann: trains the ReLU network that ``model`` starts from; None where it starts otherwise, or has.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        model: SpikingPQN | SpikingDQN,
        hours: float | None = None,
        progress: bool = False,
        ann: TrainingSession | None = None,
    ) -> None:
        self.ann = ann
        self.config = config
        self.folder = folder
        self.model = model
        self.deadline = None if hours is None else time.monotonic() + hours * 3600
        self.shown = progress
        self.stop_requested = False
        start, stop = (config.timesteps, config.prune_to) if config.neuron == "lif" else (1, 1)
        self.pruning = TemporalPruning(start, stop, goal=config.goal, **self._budgets)
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
            "seconds": self._seconds_so_far(),
        }
        save_training_state(self.folder.resume, self.model, extra)

    @property
    def agent_steps(self) -> int:
        """Agent steps taken so far, those of the ReLU network included."""
        return self.model.num_timesteps if self.ann is None else self.ann.agent_steps

    def _seconds_so_far(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def restore(self) -> None:
        """Go back to the last saved state; a run that died before its first save starts again."""
        if not has_training_state(self.folder.resume):
            own = "T*-end" if self.config.neuron == "lif" else "relu-end"
            if any(self.folder.checkpoints.glob(own)):
                # Training again from zero would replace what this run has kept.
                raise UserError("resume", str(self.folder.resume), "is missing, but the run got further: start another")
            return
        extra = load_training_state(self.folder.resume, self.model)
        try:
            self.pruning = TemporalPruning.from_state_dict(extra["pruning"])
            if not self.pruning.finished:
                self.pruning.set_budgets(**self._budgets)
            self.rows = list(extra["rows"])
            if not all(isinstance(row, dict) for row in self.rows):
                raise TypeError("a row is no mapping")
            self.next_eval, self.next_save = int(extra["next_eval"]), int(extra["next_save"])
            self.seconds = float(extra["seconds"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError("resume", str(self.folder.resume), f"is incomplete ({error!r})") from None

    def checkpoint_name(self) -> str:
        """Return the name of the current stage's best checkpoint."""
        return checkpoint_name(self.pruning.timesteps if self.model.policy.q_net.network.spiking else None)

    # -- training --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until temporal pruning is done.

        Raises:
            Interrupted: stopped early; the state is saved.
            OSError: the disk is full or gone; what was saved stays.
        """
        if self.ann is not None:
            self._train_ann(self.ann)
        self._imitate()
        threads = torch.get_num_threads()
        torch.set_num_threads(self.config.threads)
        self._started = time.monotonic()
        board = ResumableTensorBoard(str(self.folder.tensorboard), self.model.num_timesteps)
        self.model.set_logger(Logger(None, [board]))
        self.progress = Progress(self._last_step(), self.model.num_timesteps, self.shown)
        try:
            with stopping_on_signals(self._request_stop):
                while not self.pruning.finished:
                    self._stage()
                if self.stop_requested:
                    raise Interrupted("interrupt")
        finally:
            self.progress.close()
            board.close()
            torch.set_num_threads(threads)
            self.seconds += time.monotonic() - self._started
            self._started = time.monotonic()

    def _train_ann(self, ann: TrainingSession) -> None:
        """Train the ReLU network, keep it beside the stages to come, and convert it."""
        ann.run()
        for name in ("relu-end", "relu"):
            with replace_folder(self.folder.checkpoints / name) as partial:
                shutil.copytree(ann.folder.checkpoints / name, partial, dirs_exist_ok=True)
        if self.shown:
            print("converting: thresholds are set on the network's own play ...", file=sys.stderr, flush=True)
        start_from(self.model, str(self.folder.checkpoints / "relu"), self.config.env, self.config.seed)
        # One account of samples, time and scores.
        self.model.num_timesteps = self.model.stage_start = ann.model.num_timesteps
        self.next_eval += ann.model.num_timesteps
        self.next_save += ann.model.num_timesteps
        self.rows = list(ann.rows)
        self.seconds = ann.seconds
        self.ann = None

    def _imitate(self) -> None:
        """Give the learner its teacher, where the settings say so."""
        config = self.config
        if config.imitation and config.neuron == "lif" and self.model.teacher is None:
            agent = config.teacher or config.start_from or str(self.folder.checkpoints / "relu")
            imitate(self.model, agent, config.imitation)

    @property
    def _budgets(self) -> dict[str, Any]:
        """Agent steps of the stages as :class:`spiking_rl.TemporalPruning` calls them."""
        config = self.config
        last = config.last_steps or None
        return {"first_budget": config.agent_steps, "stage_budget": config.prune_steps, "last_budget": last}

    def catch_up(self) -> None:
        """Let learning rate and exploration be where the stage under way, of another length now, has them."""
        end = self.model.stage_start + int(self.pruning.budget)
        self.model._update_current_progress_remaining(self.model.num_timesteps, end)

    def _last_step(self) -> int:
        """Return the agent steps at which the last stage will end."""
        return self.model.stage_start + int(self.pruning.remaining)

    def _stage(self) -> None:
        """Train at one T until its budget is spent or its goal reached, then move on as pruning says."""
        end = self.model.stage_start + int(self.pruning.budget)
        name = self.checkpoint_name()
        self.progress.expect(self._last_step())
        try:
            if self.model.num_timesteps < end:
                self.model.learn(
                    end - self.model.num_timesteps,
                    callback=_BetweenRollouts(self),
                    reset_num_timesteps=False,
                )
            decision = self._evaluate()
        except _StageOver as over:
            decision = over.decision
        # The end of the stage is kept beside its best: what training gave without selection.
        with self.model.averaged_weights():
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
            decision = self._evaluate()
            if not isinstance(decision, Stay):
                raise _StageOver(decision)
        late = self.deadline is not None and time.monotonic() > self.deadline
        if self.stop_requested or late or steps >= self.next_save:
            # The same agent steps save whether or not the run is stopped, so that both go on alike.
            if steps >= self.next_save:
                self.next_save = steps + self.config.save_every
            self.save()
        if self.stop_requested or late:
            raise Interrupted("interrupt" if self.stop_requested else "time")

    def _evaluate(self) -> Decision:
        """Score the current weights on the selection seeds, keep them if best, write progress."""
        model, config = self.model, self.config
        with model.averaged_weights():
            result = evaluate(
                model, config.env, episodes=config.eval_episodes, seed=SELECTION_SEED, measure_latency=False
            )
            name = self.checkpoint_name()
            decision = self.pruning.report(result.mean_return, model.num_timesteps - model.stage_start)
            if decision.improved:
                self._keep(name, score=result.mean_return)
            columns = layer_columns(model.policy.q_net.network, result.spike_rate)
        returns = [e["r"] for e in model.ep_info_buffer or []]
        rates = result.spike_rate
        row = {
            "agent_steps": model.num_timesteps,
            "seconds": round(self._seconds_so_far(), 3),
            "timesteps": result.timesteps,
            "score": result.mean_return,
            "ci95": result.ci95,
            "train_return": float(np.mean(returns)) if returns else None,
            "epsilon": float(model.exploration_rate),
            "learning_rate": learning_rate(model.policy.optimizer),
            "loss": model.last_loss,
            **memory_columns(self.model.device),
            "spike_rate": sum(rates.values()) / len(rates) if rates else None,
            "energy_ratio": result.energy_ratio,
            **columns,
        }
        self.rows.append(row)
        self.folder.write_progress(self.rows)
        self._log(row, columns, rates or {})
        return decision

    def _keep(self, name: str, **info: Any) -> None:
        self.model.save_checkpoint(
            self.folder.checkpoints / name, environment=self.config.env, seed=self.config.seed, **info
        )

    def _log(self, row: dict[str, Any], columns: dict[str, float], rates: dict[str, float]) -> None:
        self.progress.evaluated(row)
        logger = self.model.logger
        logger.record("eval/mean_return", row["score"])
        logger.record("eval/energy_ratio", row["energy_ratio"])
        for tag, value in layer_scalars(columns).items():
            logger.record(tag, value)
        logger.record("train/timesteps_T", row["timesteps"] or 1)
        logger.dump(row["agent_steps"])
        for warning in [*odd_layers(rates), *odd_thresholds(self.model.policy.q_net.network)]:
            layer = warning.split()[0]
            if layer not in self.warned:
                self.warned.append(layer)
                self.progress.note(f"warning: {warning} at T={row['timesteps']}; see --firing-rate, --learning-rate")

    def _request_stop(self) -> None:
        self.stop_requested = True
        self.progress.note("stopping: saving the run (again to stop at once)")
