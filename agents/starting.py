"""Start a learner from a trained agent: a ReLU network is converted, a spiking one is taken over."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.imitation import Teacher
from spiking_rl.agents.loading import load_agent
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.checkpoint import load_into
from spiking_rl.conversion import convert
from spiking_rl.envs.atari import AtariVecEnv
from spiking_rl.envs.make import make_vectorised
from spiking_rl.errors import UserError
from spiking_rl.networks import rescale_leaks

_ENVIRONMENTS = 16
_STEPS = 256  # in each of them: long enough to leave the opening of a game
_EPSILON = 0.1  # so that greedy games differ
_INPUTS = 512  # as many set thresholds; the papers' number


def start_from(model: SpikingPQN | SpikingDQN, agent: str, env: str, seed: int) -> None:
    """Give a fresh learner the weights of a trained agent.

    A ReLU network is converted on observations of its own play (:func:`spiking_rl.conversion.convert`).
    A spiking network is taken over with its thresholds and leaks, whatever its T; a stateful one's
    leaks follow T where the learner's ``rescale_leak`` says so. A learner that sees single frames can start
    from a ReLU network that sees several stacked, from what it makes of a game that stands still.

    Args:
        model: a learner that has not been trained.
        agent: a run, a checkpoint or the name of a pretrained agent.
        env: environment id to play in for the conversion.
        seed: of that play.

    Raises:
        UserError: the agent is missing, damaged, or has other spaces, layers or kind of memory.
    """
    try:
        loaded = load_agent(agent, device=str(model.device))
    except UserError as error:
        raise UserError("start_from", agent, f"cannot be loaded: {error}") from None
    source = loaded.model
    theirs, ours = source.policy.q_net, model.policy.q_net
    network = ours.network
    to_memory = ours.stateful and not theirs.network.spiking
    frames = _frames(source.observation_space, model.observation_space)
    if (
        frames == 0
        or (frames > 1 and theirs.network.spiking == network.spiking)
        or source.action_space != model.action_space
    ):
        raise UserError("start_from", agent, f"was trained on other spaces than those of {env}")
    if theirs.network.spiking and not network.spiking:
        raise UserError("start_from", agent, "is a spiking network; a ReLU network cannot start from it")
    if theirs.stateful != ours.stateful and not to_memory:
        kinds = ("stateful", "stateless") if theirs.stateful else ("stateless", "stateful")
        raise UserError("start_from", agent, f"is {kinds[0]}, and a {kinds[1]} agent cannot start from it")
    _require_same_network(agent, source, model)
    if theirs.network.spiking == network.spiking:
        load_into(ours, theirs.state_dict(), agent)
        if model.stateful and model.rescale_leak:
            rescale_leaks(network, network.timesteps / theirs.network.timesteps)
    else:
        if ours.norm is not None and theirs.norm is not None:
            ours.norm.load_state_dict(theirs.norm.state_dict())
        length = _INPUTS // _ENVIRONMENTS
        wanted = range(_STEPS - length, _STEPS) if ours.stateful else range(0, _STEPS, _STEPS // length)
        seen, starts = _played(source, env if frames == 1 else loaded.environment, seed, wanted)
        newest = seen if frames == 1 else seen[:, :, -(seen.shape[2] // frames) :]
        with torch.no_grad():
            inputs = ours.features(newest.flatten(0, 1))
            if ours.stateful:
                inputs = inputs.reshape(*starts.shape, *inputs.shape[1:])
                convert(theirs.network, network, inputs, model.firing_rate, starts)
            else:
                convert(theirs.network, network, inputs, None if frames == 1 else model.firing_rate)
    if model.policy.has_target:
        model.policy.q_net_target.load_state_dict(ours.state_dict())
    model.calibrated = True


def imitate(model: SpikingPQN | SpikingDQN, agent: str, part: float) -> None:
    """Let a learner learn a trained agent's Q-values on its own play, in the first part of every stage.

    Dense and noiseless targets: a network is near its teacher after a fraction of the agent steps that
    returns would take (DAgger: Ross et al. 2011; policy distillation: Rusu et al. 2016).

    Args:
        model: the learner.
        agent: a run, a checkpoint or the name of a pretrained agent, stateless, with the same actions. Its
            observations are the learner's, or several of them stacked (for SpikingDQN only with a memory: it
            replays single observations otherwise).
        part: of each stage, from 0 to 1.

    Raises:
        UserError: the agent is missing or damaged, or cannot teach this learner.
    """
    with torch.random.fork_rng():  # a resumed run loads its teacher again, and must draw what the other draws
        try:
            source = load_agent(agent, device=str(model.device)).model
        except UserError as error:
            raise UserError("teacher", agent, f"cannot be loaded: {error}") from None
    if source.stateful:
        raise UserError("teacher", agent, "is stateful; only a stateless agent can be asked about any frame")
    theirs, ours = source.observation_space, model.observation_space
    frames = _frames(theirs, ours)
    if not frames:
        raise UserError("teacher", agent, f"was trained on observations {theirs}, which {ours} cannot make up")
    if frames > 1 and not model.stateful and isinstance(model, SpikingDQN):
        raise UserError("teacher", agent, f"sees {frames} frames, and SpikingDQN replays single ones; add --stateful")
    if frames > 1 and not isinstance(model.env, AtariVecEnv):
        # A save of Atari games cuts them; elsewhere the frames to look back on would be missing after a resume.
        raise UserError("teacher", agent, f"sees {frames} frames, which are stacked for it in Atari games only")
    if source.action_space != model.action_space:
        raise UserError("teacher", agent, f"was trained on {source.action_space}, not on {model.action_space}")
    model.teacher, model.imitation = Teacher(source.policy.q_net, frames), part


def _require_same_network(agent: str, source: SpikingPQN | SpikingDQN, model: SpikingPQN | SpikingDQN) -> None:
    theirs, ours = (m.policy.q_net_kwargs["network_kwargs"] for m in (source, model))
    names = ["hidden", "layer_norm", "first_layer_norm"]
    if source.policy.q_net.network.spiking:
        names.append("per_channel")
    for name in names:
        if name in theirs and name in ours and theirs[name] != ours[name]:
            flag = name.replace("_", "-")
            raise UserError(
                "start_from",
                agent,
                f"was built with {name} = {theirs[name]}, not {ours[name]}; match it with --{flag}",
            )


def _frames(theirs: spaces.Space[Any], ours: spaces.Space[Any]) -> int:
    """Return how many of our observations, stacked, make one of theirs: 1 for equal ones, 0 if none do."""
    if theirs == ours:
        return 1
    assert theirs.shape is not None
    assert ours.shape is not None
    if len(theirs.shape) != 3 or len(ours.shape) != 3 or theirs.dtype != ours.dtype:
        return 0
    frames = theirs.shape[0] // ours.shape[0]
    if frames > 1 and ours.shape[0] != 1:
        return 0  # stacks that overlap make no stack
    return frames if theirs.shape == (frames * ours.shape[0], *ours.shape[1:]) else 0


def _played(source: SpikingPQN | SpikingDQN, env: str, seed: int, wanted: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the observations of some play of a stateless agent at the wanted steps, and where games open.

    Shapes are ``(len(wanted), _ENVIRONMENTS, *obs)`` and ``(len(wanted), _ENVIRONMENTS)``.
    """
    random = np.random.default_rng(seed)
    venv = make_vectorised(env, _ENVIRONMENTS, seed)
    kept, opened = [], []
    starts = np.ones(_ENVIRONMENTS, dtype=bool)
    try:
        observations = venv.reset()
        for step in range(_STEPS):
            assert isinstance(observations, np.ndarray)
            if step in wanted:
                kept.append(observations.copy())
                opened.append(starts)
            greedy, _ = source.predict(observations, deterministic=True)
            noise = random.integers(source.action_space.n, size=_ENVIRONMENTS)  # type: ignore[attr-defined]
            actions = np.where(random.random(_ENVIRONMENTS) < _EPSILON, noise, greedy)
            observations, _, starts, _ = venv.step(actions)
    finally:
        venv.close()
    return torch.as_tensor(np.stack(kept), device=source.device), torch.as_tensor(
        np.stack(opened), device=source.device
    )
