"""Greedy evaluation on named seeds, with spike rates, energy and latency."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from gymnasium import Env
from stable_baselines3.common.base_class import BaseAlgorithm

from spiking_rl.agents.deployed import DeployedAgent
from spiking_rl.agents.policies import SpikingQNetwork, q_network, sees_scaled
from spiking_rl.encoding import PoissonEncoder
from spiking_rl.energy import SpikeCounter, measured_energy
from spiking_rl.envs.make import make_single
from spiking_rl.errors import UserError
from spiking_rl.networks import Observer
from spiking_rl.neurons import LIFState

SELECTION_SEED = 10_000_000
"""First episode seed of the evaluations that select checkpoints."""

REPORT_SEED = 20_000_000
"""First episode seed of reported scores: disjoint from selection and from training seeds."""

MAX_DECISIONS = 5_000
"""Episodes of an environment without a time limit are cut here: some never end by themselves."""

_PARALLEL = 100  # environments stepped together: one forward pass decides for all of them


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        environment: Gymnasium id.
        timesteps: T; None for a ReLU network.
        episodes: number of episodes.
        mean_return: mean undiscounted return.
        ci95: half width of its 95 % interval, 1.96 s/sqrt(n).
        spike_rate: spikes per neuron per timestep, by layer; None for a ReLU network.
        energy_ratio: energy of the ReLU network over that of this one, per decision.
        decision_ms: median latency of ``model.predict`` on one observation; None if not measured.
        deployed_ms: the same of a :class:`spiking_rl.agents.DeployedAgent`; None where there can be none, or if
            not measured.
        distinct_episodes: episodes with different actions; few where nothing but the start is random
            (Atari without sticky actions).
        returns: return of every episode, in the order of their seeds.
        mean_timesteps: timesteps that a decision took in the mean; None where all took T.
    """

    environment: str
    timesteps: int | None
    episodes: int
    mean_return: float
    ci95: float
    spike_rate: dict[str, float] | None
    energy_ratio: float
    decision_ms: float | None
    deployed_ms: float | None
    distinct_episodes: int
    returns: list[float]
    mean_timesteps: float | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the published fields, without the single returns."""
        row = dict(self.__dict__)
        del row["returns"]
        if self.mean_timesteps is None:
            del row["mean_timesteps"]
        return row


def playing_network(model: BaseAlgorithm) -> SpikingQNetwork:
    """Return the Q-network of a model that is about to play in an environment made for it.

    Raises:
        UserError: the model has none, or learned from observations that the environment does not give.
    """
    if sees_scaled(model):
        remedy = "learned behind VecNormalize, and an environment made here has none; use SB3's evaluate_policy"
        raise UserError("model", type(model).__name__, remedy)
    return q_network(model)


def require_id(env: object) -> None:
    """Refuse an environment that is not named: it is made here, as often as it is wanted."""
    if not isinstance(env, str):
        raise UserError("env", str(env), "name the environment by its id, or use SB3's evaluate_policy")


def require_spaces(q_net: SpikingQNetwork, env: Env[Any, Any], env_id: str) -> None:
    """Refuse an environment of other spaces than the agent's.

    Raises:
        UserError: naming both.
    """
    ours = q_net.observation_space, q_net.action_space
    shape, wanted = (tuple(getattr(space, "shape", None) or ()) for space in (env.observation_space, ours[0]))
    if len(shape) == 3 and shape[2:] + shape[:2] == wanted != shape:
        remedy = "gives images with their channels last, which were turned for the agent; wrap it to give them first"
        raise UserError("env", env_id, remedy)
    if (env.observation_space, env.action_space) != ours:
        raise UserError("env", env_id, f"has other spaces than the agent: {ours[0]}, {ours[1]}")


def check_episodes(episodes: int, seed: int) -> None:
    """Refuse a number of episodes, or a first seed, that cannot be played.

    Raises:
        UserError: naming ``episodes`` or ``seed``.
    """
    if isinstance(episodes, bool) or not isinstance(episodes, Integral) or episodes < 1:
        raise UserError("episodes", episodes, "must be a whole number of at least 1")
    if seed < 0:
        raise UserError("seed", seed, "must not be negative")


def evaluate(
    model: BaseAlgorithm,
    env: str,
    *,
    episodes: int = 100,
    seed: int = REPORT_SEED,
    timesteps: int | None = None,
    measure_latency: bool = True,
    exit_margin: float | None = None,
) -> Evaluation:
    """Play greedy episodes; episode k is reset with ``seed + k``, whatever runs beside it.

    Where the environment sets no time limit, episodes are cut after :data:`MAX_DECISIONS` decisions.

    Args:
        model: a SpikingDQN or SpikingPQN.
        env: Gymnasium id.
        episodes: how many, >= 1.
        seed: of the first episode.
        timesteps: T to play with; default the model's own. The model is left as it was.
        measure_latency: also time single decisions.
        exit_margin: let a stateless agent decide as soon as its best action is so far ahead
            (:meth:`spiking_rl.networks.LayeredNetwork.set_exit_margin`); None: after all T timesteps.

    Raises:
        UserError: a bad number, an unknown environment, a foreign model, a margin for an agent that cannot
            stop early.
    """
    check_episodes(episodes, seed)
    q_net = playing_network(model)
    require_id(env)
    own = q_net.network.timesteps
    if exit_margin is not None and (q_net.stateful or not q_net.network.spiking):
        kind = "a stateful agent, whose membranes need all timesteps" if q_net.stateful else "a ReLU network"
        raise UserError("exit_margin", exit_margin, f"cannot be used with {kind}; leave it out")
    if timesteps is not None:
        q_net.network.set_timesteps(timesteps)
    try:
        counter = SpikeCounter()
        q_net.network.set_exit_margin(exit_margin)
        returns, distinct, decisions = _play(q_net, env, [seed + k for k in range(episodes)], counter)
        spiking = q_net.network.spiking
        rates = counter.rates if spiking else None
        used: float = q_net.network.timesteps
        if exit_margin is not None:
            used = counter.timesteps(q_net.network, decisions)
        return Evaluation(
            environment=env,
            timesteps=q_net.network.timesteps if spiking else None,
            episodes=episodes,
            mean_return=float(np.mean(returns)),
            ci95=1.96 * float(np.std(returns, ddof=1)) / math.sqrt(episodes) if episodes > 1 else 0.0,
            spike_rate=rates,
            energy_ratio=measured_energy(q_net.network, counter, used).ratio,
            decision_ms=decision_latency_ms(model) if measure_latency else None,
            deployed_ms=_deployed_ms(model) if measure_latency and exit_margin is None else None,
            distinct_episodes=distinct,
            returns=returns,
            mean_timesteps=None if exit_margin is None else used,
        )
    finally:
        q_net.network.set_exit_margin(None)
        if timesteps is not None and q_net.network.spiking:
            q_net.network.set_timesteps(own)


@torch.no_grad()
def _play(
    q_net: SpikingQNetwork, env_id: str, seeds: Sequence[int], counter: SpikeCounter
) -> tuple[list[float], int, int]:
    """Play one episode per seed, many side by side; what several of them have seen alike is decided once.

    Returns:
        The returns in the order of the seeds, the number of episodes that differ in their actions, and the number
        of decisions.
    """
    q_net.set_training_mode(False)
    waiting = list(enumerate(seeds))
    envs = [make_single(env_id) for _ in range(min(_PARALLEL, len(seeds)))]
    try:
        require_spaces(q_net, envs[0], env_id)
    except UserError:
        for env in envs:
            env.close()
        raise
    endless = envs[0].spec is None or envs[0].spec.max_episode_steps is None
    returns = [0.0] * len(seeds)
    lengths = [0] * len(seeds)
    played = [0] * len(seeds)  # a running hash of each episode's actions
    seen = [0] * len(seeds)  # and of its observations: where they are equal, so are the membranes
    playing: list[tuple[Any, int, Any]] = []  # environment, index of its episode, observation
    for env in envs:
        episode, seed = waiting.pop(0)
        playing.append((env, episode, env.reset(seed=seed)[0]))
    state = q_net.network.initial_state(len(playing)) if q_net.stateful else None
    while playing:
        for _, episode, observation in playing:
            before = seen[episode] if q_net.stateful else 0
            seen[episode] = hash((before, np.asarray(observation).tobytes()))
        groups: dict[int, int] = {}
        # Rows that stop early cannot be counted for others, and spikes that are drawn differ.
        if q_net.network.exit_margin is not None or isinstance(q_net.network.encoder, PoissonEncoder):
            seen = list(range(len(seeds)))
        group = [groups.setdefault(seen[episode], len(groups)) for _, episode, _ in playing]
        first = [group.index(g) for g in range(len(groups))]
        stacked = torch.as_tensor(np.stack([playing[row][2] for row in first]), device=q_net.device)
        starts = None
        if state is not None:
            opens = [lengths[playing[row][1]] == 0 for row in first]
            starts = torch.tensor(opens, device=q_net.device)
            state = tuple(LIFState(layer.membrane[first]) for layer in state)
        values, state = q_net.q_values(stacked, state, starts, observer=_weighted(counter, group))
        actions = values.argmax(1).cpu().numpy()[group]
        if state is not None:
            state = tuple(LIFState(layer.membrane[group]) for layer in state)
        still, rows = [], []
        for row, ((env, episode, _), action) in enumerate(zip(playing, actions, strict=True)):
            observation, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += float(reward)
            lengths[episode] += 1
            played[episode] = hash((played[episode], int(action)))
            if terminated or truncated or (endless and lengths[episode] >= MAX_DECISIONS):
                if not waiting:
                    continue
                episode, seed = waiting.pop(0)
                observation = env.reset(seed=seed)[0]
            still.append((env, episode, observation))
            rows.append(row)
        if state is not None and len(rows) < len(playing):
            state = tuple(LIFState(layer.membrane[rows]) for layer in state)
        playing = still
    for env in envs:
        env.close()
    return returns, len(set(played)), sum(lengths)


def _weighted(counter: SpikeCounter, group: list[int]) -> Observer:
    """Return an observer that counts every row as often as it stands in ``group``."""
    if len(set(group)) == len(group):
        return counter

    def observe(layer: str, output: torch.Tensor, potential: torch.Tensor) -> None:
        counter(layer, output[:, group], potential)

    return observe


@torch.no_grad()
def typical_gap(model: BaseAlgorithm, env_id: str) -> float:
    """Return the median gap between the two highest Q-values along one greedy episode, after all timesteps.

    The episode is of a selection seed: margins that are chosen by it owe nothing to the reported episodes.
    """
    q_net = playing_network(model)
    q_net.set_training_mode(False)
    env = make_single(env_id)
    gaps: list[float] = []
    done = False
    try:
        observation = env.reset(seed=SELECTION_SEED)[0]
        while not done and len(gaps) < MAX_DECISIONS:
            values = q_net.q_values(torch.as_tensor(np.asarray(observation)[None], device=q_net.device))[0]
            best = values[0].topk(2).values
            gaps.append(float(best[0] - best[1]))
            observation, _, terminated, truncated, _ = env.step(int(values.argmax()))
            done = terminated or truncated
    finally:
        env.close()
    return float(np.median(gaps))


def decision_latency_ms(model: BaseAlgorithm | DeployedAgent, decisions: int = 200) -> float:
    """Return the median time of ``model.predict`` on a single observation, in milliseconds."""
    observation = np.asarray(model.observation_space.sample())
    if np.issubdtype(observation.dtype, np.floating):
        observation = np.nan_to_num(observation).clip(-1, 1)
    times = []
    for _ in range(decisions + 20):
        start = time.perf_counter()
        model.predict(observation, deterministic=True)
        times.append(time.perf_counter() - start)
    return float(np.median(times[20:])) * 1e3


def _deployed_ms(model: BaseAlgorithm) -> float | None:
    try:
        return decision_latency_ms(DeployedAgent(model))
    except UserError:  # a ReLU network, or a code
        return None
