"""Start, resume and prune runs: what the command line and Python callers use."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first

from spiking_rl.agents.building import build_model, resolve_device
from spiking_rl.agents.config import TrainConfig, load_config, load_recipe, save_config
from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.model_settings import require_settings, settings_of
from spiking_rl.agents.policies import CHOSEN_NETWORKS, check_spaces, sees_scaled
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.agents.resume import has_training_state
from spiking_rl.agents.session import TrainingSession
from spiking_rl.agents.starting import imitate, start_from
from spiking_rl.checkpoint import load_checkpoint, load_into
from spiking_rl.envs.make import check_environment, make_vectorised, require_named
from spiking_rl.errors import UserError
from spiking_rl.provenance import provenance
from spiking_rl.pruning import TemporalPruning
from spiking_rl.runs import RunFolder, checkpoint_name
from spiking_rl.settings import changed_settings, continued, settings_from_dict
from spiking_rl.stopping import check_hours

CHANGEABLE = ("agent_steps", "prune_steps", "last_steps", "report_episodes", "video_episodes", "threads")
"""Settings of a run under way that may change: how long stages train, what its end shows, and threads."""


def start_run(
    config: TrainConfig, folder: RunFolder, *, device: str = "auto", hours: float | None = None, progress: bool = False
) -> TrainingSession:
    """Check everything, make the run folder, and return a session ready to run.

    Raises:
        UserError: before anything is written, where an input cannot work.
    """
    config.check()
    check_hours(hours)
    folder.require_free()  # before a start is loaded and played
    observations, actions = check_environment(config.env)
    check_spaces(observations, actions, CHOSEN_NETWORKS[is_image_space(observations)])
    if is_image_space(observations) and not is_image_space_channels_first(observations):  # type: ignore[arg-type]
        raise UserError(
            "env",
            config.env,
            f"gives images of shape {observations.shape}, channels last; wrap it to give (channels, height, width), "
            "and name Atari games as 'ALE/Pong-v5'",
        )
    for other in config.also_reported():
        if check_environment(other) != (observations, actions):
            raise UserError(
                "report_also", other, f"has other spaces than {config.env}; name environments with the same"
            )
    if config.trains_ann:
        try:
            config.of_ann().check()
        except UserError as error:
            field = "ann_steps" if error.field == "agent_steps" else error.field
            raise UserError(
                field, error.value, f"for the ReLU network that is trained first, {error.problem}"
            ) from None
    resolve_device(device)
    model = _new_model(config, device)  # before anything is written: the replay may be too large
    _begin(folder, config)
    ann = _ann_session(config, folder, device, hours, progress)
    return TrainingSession(config, folder, model, hours, progress, ann)


def _begin(folder: RunFolder, config: TrainConfig) -> None:
    """Make the folder of a new run, with its settings."""
    folder.create()
    with folder.locked():
        folder.require_free()  # once more: another process may have begun in it at this moment
        save_config(folder.config, config, provenance())


def resume_run(
    folder: RunFolder,
    *,
    device: str = "auto",
    hours: float | None = None,
    progress: bool = False,
    named: str | None = None,
) -> TrainingSession:
    """Return a session that goes on where the run was left.

    Args:
        folder: of the run.
        device: "auto", "cpu" or "cuda".
        hours: stop, with everything saved, after so many.
        progress: show progress on standard error.
        named: the environment id that the user gave; only its module is imported.

    Raises:
        UserError: no run there, one that cannot be continued, or one whose environment is of a module not named.
    """
    check_hours(hours)
    folder.require()
    config = load_config(folder.config)
    config.check()
    for env in (config.env, *config.also_reported()):
        require_named(env, [] if named is None else [named])
    begun = has_training_state(folder.resume)
    model = build_model(config, device) if begun else _new_model(config, device)
    ann = None if begun else _ann_session(config, folder, device, hours, progress)
    session = TrainingSession(config, folder, model, hours, progress, ann)
    session.restore()
    return session


def _ann_session(
    config: TrainConfig, run: RunFolder, device: str, hours: float | None, progress: bool
) -> TrainingSession | None:
    """Return the session of the ReLU network that is trained first, new or as it was left; None where there is none."""
    if not config.trains_ann:
        return None
    folder = RunFolder(run.path / "ann")
    if folder.config.is_file():
        return resume_run(folder, device=device, hours=hours, progress=progress, named=config.env)
    return start_run(config.of_ann(), folder, device=device, hours=hours, progress=progress)


def _new_model(config: TrainConfig, device: str) -> SpikingPQN | SpikingDQN:
    model = build_model(config, device)
    if config.start_from is not None:
        start_from(model, config.start_from, config.env, config.seed)
    teacher = config.teacher or config.start_from
    if teacher is not None and config.imitation and config.neuron == "lif":
        imitate(model, teacher, config.imitation)
    return model


def extend_run(
    session: TrainingSession, to: int, agent_steps: int | None = None, rescale_leak: bool | None = None
) -> None:
    """Lower T further in a finished run: ``session.run()`` then trains the new stages.

    Args:
        session: of the run.
        to: timesteps to end with.
        agent_steps: of each stage; None: as the run has it.
        rescale_leak: change whether a stateful agent's leaks follow T; None: as the run has it.

    Raises:
        UserError: the run is not finished, is no spiking run, or is at ``to`` already.
    """
    folder = session.folder
    if session.config.neuron != "lif":
        raise UserError("run", str(folder.path), "holds a ReLU network, which has no timesteps to prune")
    if not session.pruning.finished:
        raise UserError("run", str(folder.path), "has not finished training; continue it first with train --resume")
    if agent_steps is not None:
        if agent_steps < 1:
            raise UserError("agent_steps", agent_steps, "must be at least 1")
        session.config.prune_steps, session.config.last_steps = agent_steps, 0
    if rescale_leak is not None:
        session.config.rescale_leak = session.model.rescale_leak = rescale_leak
    session.begin(session.pruning.extend(to, agent_steps))
    session.config.prune_to = to
    # First the state: killed before the settings are written, a run goes on as extended, in stages of its old length.
    session.save()
    save_config(folder.config, session.config, continued(folder.config, session.config, "by prune"))


def change_run(session: TrainingSession, changes: Mapping[str, Any]) -> None:
    """Change settings of a run under way; ``session.run()`` then goes on with them.

    Learning rate and exploration go on from where a stage of the new length has them.

    Args:
        session: of the run.
        changes: new values by setting, of :data:`CHANGEABLE`.

    Raises:
        UserError: naming the setting: it cannot change, its stage is over or has taken as many steps, or a number is
            out of range. Nothing has changed then.
    """
    folder, before = session.folder, session.config
    config = changed_settings(before, changes, CHANGEABLE, str(folder.path))
    config.check()
    names = {"agent_steps": "first_budget", "prune_steps": "stage_budget", "last_steps": "last_budget"}
    new = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(before, name)}
    if new:
        if session.pruning.finished:
            remedy = "cannot change where training is finished; without it --resume scores the run, prune goes on"
            raise UserError(next(iter(new)), next(iter(new.values())), remedy)
        spent = 0 if session.ann is not None else session.model.num_timesteps - session.model.stage_start
        budget = session.pruning.budget
        try:
            session.pruning.change_budgets(spent, {names[name]: value or None for name, value in new.items()})
        except UserError as error:
            raise error.renamed({field: name for name, field in names.items()}) from None
        if session.pruning.budget != budget:
            session.catch_up()
    when = f"{session.checkpoint_name() if session.ann is None else 'relu'} after {session.agent_steps} agent steps"
    session.config = config  # what is saved of the run takes its lengths from there
    save_config(folder.config, config, continued(folder.config, config, when))
    if session.ann is not None and config.threads != before.threads:
        change_run(session.ann, {"threads": config.threads})


PRUNING_SETTINGS = (
    "average_decay",
    "eval_episodes",
    "eval_every",
    "goal",
    "imitation",
    "last_steps",
    "num_envs",
    "prune_lr_factor",
    "report_also",
    "report_episodes",
    "rescale_leak",
    "save_every",
    "seed",
    "teacher",
    "threads",
    "video_episodes",
)
"""Settings that :func:`prune` takes."""


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
        env: a recipe's name, or the Gymnasium id to go on training in.
        to: timesteps to end with.
        agent_steps: of each stage.
        run: folder that keeps the run; None keeps nothing but the model.
        progress: show progress on standard error.
        settings: fields of the config that :data:`PRUNING_SETTINGS` names, such as ``eval_every``. What else decides on
            learning is the model's own.

    Returns:
        The same model, with the best weights at ``to``.

    Raises:
        UserError: an input that cannot work, before training.
    """
    _, config = load_recipe(env, model.algo)
    now = model.policy.timesteps
    own = settings_of(model, config)
    for name in settings.keys() & {field.name for field in dataclasses.fields(config)}:
        if name not in PRUNING_SETTINGS and (name not in own or settings[name] != own[name]):
            is_there = f", there {own[name]!r}" if name in own else ""
            raise UserError(name, settings[name], f"is the model's own{is_there}; give it where that is made")
    # A recipe's way to its first stage is behind the model.
    own |= {"ann_steps": 0, "start_from": None, "imitation": 0.0, "teacher": None}
    own |= {"timesteps": now, "prune_to": to, "prune_steps": agent_steps, "last_steps": 0}
    if not model.plays_only:
        own["num_envs"] = model.n_envs
    config = replace_settings(config, {**own, **settings})
    config.check()
    if to >= now:
        raise UserError("to", to, f"the model is at T={now} already; choose a smaller number")
    if config.num_envs != model.n_envs and not model.plays_only:
        raise UserError("num_envs", config.num_envs, f"the model has {model.n_envs}; load it with as many environments")
    if check_environment(config.env) != (model.observation_space, model.action_space):
        raise UserError("env", config.env, "has other spaces than the model")
    if model.get_vec_normalize_env() is not None or sees_scaled(model):
        remedy = "learned behind VecNormalize, and the environments here have none; use TemporalPruningCallback"
        raise UserError("model", type(model).__name__, remedy)
    if run is not None:
        require_settings(model, run)
    model.teacher, model.imitation = None, 0.0
    if config.imitation and config.teacher is not None:
        imitate(model, config.teacher, config.imitation)
    with _run_folder(run) as folder:
        _begin(folder, config)
        model.set_env(make_vectorised(config.env, config.num_envs, config.seed))
        model.set_random_seed(config.seed)
        session = TrainingSession(config, folder, model, progress=progress)
        model.prune_lr_factor, model.average_decay = config.prune_lr_factor, config.average_decay
        model.rescale_leak = config.rescale_leak
        with folder.locked():
            session.pruning = TemporalPruning.trained(now, agent_steps, config.goal, config.last_steps or None)
            model.save_checkpoint(folder.checkpoints / checkpoint_name(now), environment=config.env)
            session.begin(session.pruning.extend(to))
            session.run()
            return _with_best_weights(session)


def replace_settings(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """Return the config with some fields changed, types checked as in a recipe.

    Raises:
        UserError: unknown name or wrong type.
    """
    if "total_timesteps" in settings:
        remedy = "is called agent_steps here; timesteps are those of the spiking network"
        raise UserError("total_timesteps", settings["total_timesteps"], remedy)
    return settings_from_dict(type(config), {**dataclasses.asdict(config), **settings}, "the arguments")


@contextmanager
def _run_folder(run: Path | str | None) -> Iterator[RunFolder]:
    if run is not None:
        yield RunFolder(run)
        return
    with tempfile.TemporaryDirectory(prefix="spiking-rl-") as temporary:
        yield RunFolder(temporary)


def _with_best_weights(session: TrainingSession) -> SpikingPQN | SpikingDQN:
    folder = session.folder.checkpoints / session.checkpoint_name()
    model = session.model
    load_into(model.policy.q_net, load_checkpoint(folder).tensors, folder)
    if model.policy.has_target:
        model.policy.q_net_target.load_state_dict(model.policy.q_net.state_dict())
    model.average = None
    model.teacher, model.imitation = None, 0.0  # a later `learn` learns from returns
    model._custom_logger = False  # the run's TensorBoard is closed: a later `learn` makes its own logger
    return model
