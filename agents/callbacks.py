"""Temporal pruning inside anyone's ``learn``, as a Stable-Baselines3 callback."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, Protocol, cast

import gymnasium as gym
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecMonitor,
    VecNormalize,
    is_vecenv_wrapped,
    sync_envs_normalization,
)

from spiking_rl.agents.features import ExtractorStages
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.agents.staged import StagedAlgorithm
from spiking_rl.errors import UserError
from spiking_rl.pruning import Next, TemporalPruning


class _StagedPolicy(Protocol):
    """What the policies of this package offer beyond SB3's."""

    @property
    def timesteps(self) -> int: ...
    def set_timesteps(self, timesteps: int) -> None: ...
    def rebuild_optimizer(self, learning_rate: float) -> None: ...


class TemporalPruningCallback(BaseCallback):
    """Lower the timesteps T stage by stage while an algorithm learns.

    Works with every policy of this package, in SB3's DQN, PPO and A2C, ``sb3_contrib.QRDQN`` and our
    own learners, and with every algorithm whose ``features_extractor_class`` is
    :class:`SpikingFeaturesExtractor`, such as SAC and TD3. Weights are scored between rollouts; the
    best of a stage are kept in memory. The next stage starts from them, in the target network too,
    with T lowered in the networks and in ``model.policy_kwargs`` and with a fresh optimiser; a replay
    buffer stays. SAC's entropy coefficient goes with the weights. After the last stage
    the best weights are loaded and training stops: give ``learn`` at least ``pruning.remaining`` agent
    steps and, as stages end with a rollout and a finished episode, a rollout and an episode more for each.
    If ``learn`` ends earlier the model keeps its latest weights, a warning says so, and another ``learn``
    with the same callback goes on with the stage.

    Args:
        pruning: decides; its budgets are in agent steps, its ``start`` is the policy's T.
        eval_env: environment for greedy evaluation; None scores by the mean return of the last
            training episodes of the stage, which costs nothing but lags behind the weights and
            contains the exploration.
        eval_episodes: episodes per evaluation.
        report_every: agent steps between scores.
        verbose: 1 prints each change of T.

    Raises:
        UserError: a number below 1 or, when learning starts, a policy without timesteps, another T
            than ``pruning.timesteps``, no episode returns to score by, an ``eval_env`` without the
            normalisation of the training environment, or ``learning_starts`` behind the end of the stage.
    """

    def __init__(
        self,
        pruning: TemporalPruning,
        *,
        eval_env: gym.Env[Any, Any] | VecEnv | None = None,
        eval_episodes: int = 10,
        report_every: int = 1000,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        for field, value in (("eval_episodes", eval_episodes), ("report_every", report_every)):
            if value < 1:
                raise UserError(field, value, "must be at least 1")
        if isinstance(eval_env, str):
            raise UserError("eval_env", eval_env, f"must be an environment: gymnasium.make({eval_env!r})")
        self.pruning = pruning
        self.eval_env = DummyVecEnv([lambda: Monitor(eval_env)]) if isinstance(eval_env, gym.Env) else eval_env
        self.eval_episodes = eval_episodes
        self.report_every = report_every
        self._extractors: ExtractorStages | None = None  # of a policy that has no timesteps of its own
        self._best: dict[str, torch.Tensor] = {}
        self._best_temperature: torch.Tensor | None = None
        self._spent = 0  # agent steps of the current stage
        self._reported = 0  # of them, when the latest score was taken
        self._seen = 0  # model.num_timesteps when _spent was brought up to date

    @property
    def _timesteps(self) -> int:
        return (self._extractors or cast(_StagedPolicy, self.model.policy)).timesteps

    def _on_training_start(self) -> None:
        policy = self.model.policy
        self._extractors = None
        if not hasattr(policy, "set_timesteps"):
            if not ExtractorStages.fits(policy):
                remedy = "use a spiking policy of this package, or its SpikingFeaturesExtractor"
                raise UserError("policy", type(policy).__name__, f"has no timesteps to prune; {remedy}")
            self._extractors = ExtractorStages(self.model)
        if self._timesteps != self.pruning.timesteps:
            raise UserError(
                "timesteps",
                self._timesteps,
                f"the pruning expects T={self.pruning.timesteps}; make both start at the same T",
            )
        env = self.training_env
        if self.eval_env is None and not (is_vecenv_wrapped(env, VecMonitor) or all(env.env_is_wrapped(Monitor))):
            raise UserError("eval_env", None, "give one, or wrap the training environment in a Monitor or VecMonitor")
        normalised = self.model.get_vec_normalize_env() is not None
        if normalised and self.eval_env is not None and not is_vecenv_wrapped(self.eval_env, VecNormalize):
            raise UserError(
                "eval_env", str(self.eval_env), "wrap it in VecNormalize, as the training environment is wrapped"
            )
        self._leave_time_to_learn()
        self._seen = self.model.num_timesteps
        shapes = {name: tensor.shape for name, tensor in policy.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in self._best.items()}:  # none, or those of another model
            self._keep()  # so that a pruning which goes on from earlier scores has weights to fall back on

    def _leave_time_to_learn(self) -> None:
        """Let random play take half of the stage that it opens at most, or say that it takes all of it.

        Raises:
            UserError: ``learning_starts`` lies behind the end of the stage.
        """
        budget = int(self.pruning.budget)
        if isinstance(self.model, SpikingPQN) and not self.model.calibrated:
            self.model.calibration_steps = max(1, min(self.model.calibration_steps, budget // 2))
        starts: int = getattr(self.model, "learning_starts", 0)
        begins = self.pruning.timesteps == self.pruning.start and not self._spent
        if begins and not self.pruning.finished and 0 < budget <= starts - self.model.num_timesteps:
            remedy = f"leaves nothing of the {budget} agent steps of the first stage to learn in; lower it"
            raise UserError("learning_starts", starts, remedy)

    def _on_step(self) -> bool:
        return not self.pruning.finished

    def _on_rollout_start(self) -> None:
        # Only here: a change inside a rollout would leave PPO with probabilities of other weights.
        self._report_if_due()

    def _on_training_end(self) -> None:
        self._count()
        if self.pruning.timesteps == self.pruning.stop:
            self._report_if_due()  # an earlier stage waits: the next one would begin with nobody to train it
        if not self.pruning.finished:
            left = self.pruning.remaining - min(self._spent, self.pruning.budget)  # what is overspent is this stage's
            at = f"the model is at T={self._timesteps} of {self.pruning.stop}"
            remedy = f"call learn again: {left:.0f} agent steps are left, and a stage ends with an episode of its own"
            warnings.warn(f"temporal pruning is not finished: {at}; {remedy}", stacklevel=2)

    def _count(self) -> None:
        self._spent += self.model.num_timesteps - self._seen
        self._seen = self.model.num_timesteps

    def _report_if_due(self) -> None:
        self._count()
        over = self._spent >= self.pruning.budget
        if self.pruning.finished or (self._spent - self._reported < self.report_every and not over):
            return
        score = self._score()
        if score is None:
            return  # no episode of this stage has ended yet
        self._reported = self._spent
        decision = self.pruning.report(score, self._spent)
        self.logger.record("pruning/score", score)
        self.logger.record("pruning/timesteps", self._timesteps)
        if decision.improved:
            self._keep()
        if isinstance(decision, Next):
            self._begin_stage(decision.timesteps)
        elif self.pruning.finished:
            self._load_best()

    def _score(self) -> float | None:
        """Return the score of the current weights, None where there is nothing to tell it from."""
        if self.eval_env is None:
            episodes = self.model.ep_info_buffer
            return float(safe_mean([e["r"] for e in episodes])) if episodes else None
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        with self._evaluated_weights():
            mean, _ = evaluate_policy(self.model, self.eval_env, n_eval_episodes=self.eval_episodes)
        assert isinstance(mean, float)
        return mean

    def _evaluated_weights(self) -> Any:
        """Return a context with the weights that are scored and kept: our own learners' running average."""
        return self.model.averaged_weights() if isinstance(self.model, StagedAlgorithm) else nullcontext()

    def _keep(self) -> None:
        with self._evaluated_weights():
            self._best = {name: tensor.clone() for name, tensor in self.model.policy.state_dict().items()}
        temperature = getattr(self.model, "log_ent_coef", None)  # which SAC learns beside its policy
        self._best_temperature = None if temperature is None else temperature.detach().clone()

    def _load_best(self) -> None:
        self.model.policy.load_state_dict(self._best)
        if self._best_temperature is not None:
            self.model.log_ent_coef.data.copy_(self._best_temperature)  # type: ignore[attr-defined]
        for name in ("q_net", "quantile_net", "actor", "critic"):
            online, target = (getattr(self.model.policy, n, None) for n in (name, f"{name}_target"))
            if online is not None and target is not None:
                target.load_state_dict(online.state_dict())

    def _begin_stage(self, timesteps: int) -> None:
        self._load_best()
        if isinstance(self.model, StagedAlgorithm):
            self.model.begin_stage(timesteps)
        elif self._extractors is not None:
            self._extractors.begin(self.model, timesteps)
        else:
            policy = cast(_StagedPolicy, self.model.policy)
            policy.set_timesteps(timesteps)
            self.model.policy_kwargs = {**self.model.policy_kwargs, "timesteps": timesteps}  # not the caller's own
            remaining = self.model._current_progress_remaining
            policy.rebuild_optimizer(self.model.lr_schedule(remaining))
        self._spent = self._reported = 0
        if self.eval_env is None and self.model.ep_info_buffer is not None:
            self.model.ep_info_buffer.clear()  # the scores of this stage are of its own episodes
        if self.verbose:
            print(f"temporal pruning: T={timesteps} from {self.model.num_timesteps} agent steps on")
