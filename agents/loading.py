"""Find and load an agent by what a user names: a run folder, a checkpoint folder or a pretrained agent."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from stable_baselines3.common.type_aliases import GymEnv

from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.checkpoint import CONFIG, load_checkpoint
from spiking_rl.envs.make import require_named
from spiking_rl.errors import UserError
from spiking_rl.runs import RunFolder

ALGORITHMS: dict[str, type[SpikingPQN] | type[SpikingDQN]] = {"pqn": SpikingPQN, "dqn": SpikingDQN}


@dataclass(frozen=True)
class LoadedAgent:
    """An agent and where it comes from.

    Attributes:
        model: the agent.
        trained_in: id of its environment, as the file has it: not to be made unseen.
        checkpoint: the folder it came from.
        run: that this belongs to, where a run was named.
    """

    model: SpikingPQN | SpikingDQN
    trained_in: str
    checkpoint: Path
    run: RunFolder | None

    @property
    def environment(self) -> str:
        """The environment that it was trained in, to play in.

        Raises:
            UserError: making it would import a module that nobody has named or imported yet.
        """
        require_named(self.trained_in)
        return self.trained_in


def pretrained() -> dict[str, Path]:
    """Return the checkpoint folders of the agents that come with the package, by name."""
    folder = Path(str(resources.files("spiking_rl.agents").joinpath("pretrained")))
    return {path.name: path for path in sorted(folder.iterdir()) if (path / CONFIG).is_file()}


def find_checkpoint(path: Path | str, timesteps: int | None = None) -> tuple[Path, RunFolder | None]:
    """Find the checkpoint that a user means, of an agent or of a classifier.

    Args:
        path: a run folder, one of its ``checkpoints/T…`` folders, or the name of a pretrained agent
            (:func:`pretrained`); an existing path wins.
        timesteps: which T of the run; default the lowest. With a checkpoint folder it must be the
            checkpoint's own.

    Returns:
        The checkpoint's folder, and the run where that was named.

    Raises:
        UserError: nothing there, T not in the run, or a damaged checkpoint.
    """
    shipped = pretrained()
    path = shipped[str(path)] if str(path) in shipped and not Path(path).exists() else Path(path)
    if timesteps is not None and timesteps < 1:
        raise UserError("timesteps", timesteps, "must be a whole number of at least 1")
    run = None
    if (path / "config.yaml").is_file():
        run = RunFolder(path)
        kept = run.checkpoint_timesteps()
        if not kept:
            raise UserError("run", str(path), "holds no checkpoint yet; wait for its first evaluation")
        if timesteps is not None and timesteps not in kept:
            raise UserError("timesteps", timesteps, f"{path} holds {_names(kept)}")
        spiking = [t for t in kept if t is not None]
        path = run.checkpoint(timesteps if timesteps is not None else (min(spiking) if spiking else None))
    elif not (path / CONFIG).is_file():
        names = ", ".join(shipped)
        raise UserError(
            "run",
            str(path),
            f"is neither a run nor a checkpoint; name the folder that train printed, or a pretrained agent: {names}",
        )
    if run is None and timesteps is not None:
        own = load_checkpoint(path).config.get("timesteps")
        if timesteps != own:
            raise UserError("timesteps", timesteps, f"{path} was trained with T={own}; name the run instead")
    return path, run


def load_agent(
    path: Path | str, timesteps: int | None = None, device: str = "auto", env: GymEnv | str | None = None
) -> LoadedAgent:
    """Load an agent to play, or to learn on.

    Args:
        path: as for :func:`find_checkpoint`.
        timesteps: likewise.
        device: torch device or "auto".
        env: environment to learn on in; None to play only (``model.set_env`` may come later).

    Raises:
        UserError: nothing there, T not in the run, a damaged checkpoint, or an environment of other spaces.
    """
    path, run = find_checkpoint(path, timesteps)
    config = load_checkpoint(path).config
    algorithm = ALGORITHMS.get(str(config.get("algo")))
    environment = config.get("environment")
    if algorithm is None:
        raise UserError("checkpoint", str(path), "holds no agent (no known algo in config.json)")
    if not isinstance(environment, str):
        remedy = f"names no environment; save it with environment=..., or use {algorithm.__name__}.load_checkpoint"
        raise UserError("checkpoint", str(path), remedy)
    return LoadedAgent(algorithm.load_checkpoint(path, env, device), environment, path, run)


def _names(kept: list[int | None]) -> str:
    return ", ".join("the ReLU network" if t is None else f"T={t}" for t in kept)
