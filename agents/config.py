"""What a training run is made of: typed settings, recipes as YAML, and their checks."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from spiking_rl.agents.ranges import check_ranges
from spiking_rl.envs.atari import parse_atari
from spiking_rl.errors import UserError
from spiking_rl.initialisation import check_time_constants
from spiking_rl.pruning import check_pruning
from spiking_rl.settings import load_settings, recipes_of, save_settings, settings_from_dict

Neuron = Literal["lif", "relu"]
Encoding = Literal["direct", "hybrid", "poisson"]
Precision = Literal["float32", "bfloat16"]

ANN_FRAMES = 4
"""Frames of a game that the ReLU network sees from which a stateful agent starts."""


@dataclass(kw_only=True)
class MainSettings:
    """The settings that one changes first."""

    env: str = "CartPole-v1"
    """Gymnasium id, to use a recipe's settings elsewhere."""
    timesteps: int = 5
    """Timesteps T of the first stage."""
    prune_to: int = 1
    """Timesteps of the last stage; equal to timesteps: no pruning."""
    seed: int = 0
    """Seed of every random generator."""
    agent_steps: int = 200_000
    """Agent steps of the first stage."""
    ann_steps: int = 0
    """Agent steps of a ReLU network that is trained first and then converted; 0: none."""
    prune_steps: int = 50_000
    """Agent steps of each later stage."""
    num_envs: int = 16
    """Environments played side by side."""
    stateful: bool = False
    """Carry the membranes through the episode: a memory."""
    neuron: Neuron = "lif"
    """lif: spiking; relu: the control network of the same shape."""
    start_from: str | None = None
    """Agent to start from (no random play): a run, checkpoint or pretrained one; a ReLU network is converted."""


@dataclass(kw_only=True)
class TrainConfig(MainSettings):
    """Settings that every algorithm shares."""

    hidden: tuple[int, ...] = (256, 256)
    """Neurons per hidden layer; for vector observations."""
    last_steps: int = 0
    """Agent steps of the last stage, where it is not the first; 0: as prune_steps."""
    layer_norm: bool = True
    """Normalise each layer's current before its neurons."""
    first_layer_norm: bool | None = None
    """The first layer's current too; none: unless stateful; for vector observations."""
    per_channel: bool = False
    """One threshold and leak per neuron instead of per layer."""
    leak: float = 1.0
    """Initial leak (1 = none)."""
    time_constants: tuple[float, float] | None = (0.2, 8.0)
    """Shortest and longest membrane time constant of a stateful agent, in agent steps; none: leak."""
    rescale_leak: bool = True
    """Let a stateful agent's leaks follow T, so that its memory lasts as long."""
    imitation: float = 0.0
    """Part of every stage, from its beginning, in which a teacher's Q-values are learned instead of returns."""
    teacher: str | None = None
    """Trained agent to imitate, one that sees more frames too; none: the one that it starts from."""
    encoding: Encoding = "direct"
    """direct: the observation at every timestep; hybrid: at the first, then a spike per input; poisson: random ones."""
    single_spike: bool = False
    """Let every hidden neuron fire at most once per decision."""
    kappa: float = 0.0
    """Weight of the outputs' first-spike times in the Q-values."""
    surrogate_gamma: float = 0.3
    """Height of the surrogate gradient."""
    firing_rate: float = 0.2
    """Spikes per neuron and timestep that the threshold calibration aims at."""
    learning_rate: float = 1e-3
    """Learning rate; falls linearly over each stage."""
    final_learning_rate: float = 0.0
    """Learning rate at the end of a stage."""
    prune_lr_factor: float = 0.3
    """Multiplies the learning rate in the stages after the first."""
    average_decay: float = 0.95
    """Decay per training of the weight average that is evaluated and kept; 0: none."""
    gamma: float = 0.99
    """Discount."""
    exploration_fraction: float = 0.3
    """Part of the first stage over which epsilon falls."""
    exploration_final_eps: float = 0.05
    """Epsilon afterwards."""
    exploration_repeat: float = 1.0
    """Mean number of steps that a random action is held."""
    reward_scale: float = 0.1
    """Rewards are multiplied by it for learning."""
    max_grad_norm: float = 10.0
    """Gradient clipping."""
    eval_every: int = 10_000
    """Agent steps between evaluations (they select the kept checkpoint)."""
    eval_episodes: int = 25
    """Episodes of each of them."""
    goal: float | None = None
    """A stage ends early once three evaluations in a row reach this score."""
    report_episodes: int = 100
    """Episodes of the final table, on other seeds; 0 leaves it out."""
    report_also: tuple[str, ...] | None = None
    """Further environments for the final table; none: for Atari the same game with, or without, sticky actions."""
    video_episodes: int = 1
    """Episodes on the final video; 0 leaves it out."""
    save_every: int = 20_000
    """Agent steps between saves to resume from."""
    precision: Precision = "float32"
    """Arithmetic in which a ReLU network is trained; bfloat16 is faster where the processor has it."""
    spike_precision: Precision = "float32"
    """Arithmetic that trains spiking networks; bfloat16 rounds currents: a few neurons fire otherwise than in play."""
    threads: int = 1
    """Torch threads; small networks gain nothing from more."""

    algo = ""

    @property
    def trains_ann(self) -> bool:
        """Whether a ReLU network is trained first: not where the agent is one, or starts from another."""
        return self.ann_steps > 0 and self.neuron == "lif" and self.start_from is None

    @property
    def starts_trained(self) -> bool:
        """Whether the agent begins with what another one has learned."""
        return self.trains_ann or self.start_from is not None

    def of_ann(self) -> TrainConfig:
        """Return the settings of the ReLU network that is trained first: it needs stacked frames to see motion."""
        atari = parse_atari(self.env)
        own: dict[str, Any] = {"imitation": 0.0, "teacher": None, "agent_steps": self.ann_steps}
        if self.stateful and atari is not None:
            own |= {"env": str(replace(atari, frame_stack=ANN_FRAMES)), "report_also": None}
        return replace(self, neuron="relu", stateful=False, **own)

    def coding(self) -> dict[str, Any]:
        """Return the network's options of encoding and firing once, without those left at their defaults."""
        asked = {"encoding": self.encoding, "single_spike": self.single_spike, "kappa": self.kappa}
        if self.neuron == "relu":
            return {}
        return {name: value for name, value in asked.items() if value not in ("direct", False, 0.0)}

    def also_reported(self) -> tuple[str, ...]:
        """Return the further environments of the final table."""
        atari = parse_atari(self.env)
        if self.report_also is not None or atari is None:
            return self.report_also or ()
        # Sticky actions make a slower game, in which every episode differs: each score stands beside the other.
        return (str(replace(atari, sticky_actions=0.0 if atari.sticky_actions else 0.25)),)

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the first bad field.
        """
        check_pruning(self.timesteps, self.prune_to)
        positive = ("agent_steps", "prune_steps", "num_envs", "eval_every", "eval_episodes", "save_every", "threads")
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "must be at least 1")
        for name in ("seed", "ann_steps", "last_steps", "report_episodes", "video_episodes"):
            if getattr(self, name) < 0:
                raise UserError(name, getattr(self, name), "must not be negative")
        if self.seed >= 10_000_000:
            raise UserError("seed", self.seed, "must be below 10000000, where the seeds of evaluations begin")
        if not 0 <= self.final_learning_rate < float("inf"):
            raise UserError("final_learning_rate", self.final_learning_rate, "must be 0 or positive, and finite")
        check_ranges(dataclasses.asdict(self))
        for name in ("leak", "imitation"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(name, getattr(self, name), "must lie between 0 and 1")
        for name in ("learning_rate", "surrogate_gamma", "prune_lr_factor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(name, getattr(self, name), "must be positive and finite")
        if not 0 <= self.kappa < float("inf"):
            raise UserError("kappa", self.kappa, "must be 0 or positive, and finite")
        for name, value in self.coding().items():
            if self.stateful:
                raise UserError(name, value, "is for fresh membranes; use it with --no-stateful")
        if self.stateful and self.neuron == "relu":
            raise UserError("stateful", True, "a ReLU network has no membrane to carry; use --no-stateful")
        if self.trains_ann and self.stateful:
            atari = parse_atari(self.env)
            if atari is None:
                raise UserError(
                    "ann_steps", self.ann_steps, "a ReLU network has no memory to hand on; with stateful leave it 0"
                )
            if atari.frame_stack != 1:
                raise UserError(
                    "frame_stack", atari.frame_stack, "a stateful agent starts from a ReLU network with frame_stack=1"
                )
        if self.teacher is not None and self.neuron == "relu":
            raise UserError("teacher", self.teacher, "is for spiking agents; a ReLU network learns from returns")
        if self.imitation and self.neuron == "lif" and not self.starts_trained and self.teacher is None:
            raise UserError("imitation", self.imitation, "needs a teacher, ann_steps or start_from: whom to imitate")
        if self.teacher is not None and not self.imitation:
            raise UserError("teacher", self.teacher, "teaches nothing with imitation 0; set it, to 1 for whole stages")
        if self.time_constants is not None:
            check_time_constants(self.time_constants)
        if self.goal is not None and math.isnan(self.goal):
            raise UserError("goal", self.goal, "must be a score to reach, or none")
        if not 0 <= self.average_decay < 1:
            raise UserError("average_decay", self.average_decay, "must be at least 0 and below 1")
        if not self.hidden or min(self.hidden) < 1:
            raise UserError("hidden", self.hidden, "must list at least one width, each at least 1")


@dataclass(kw_only=True)
class PQNConfig(TrainConfig):
    """Settings of SpikingPQN."""

    n_steps: int = 32
    """Agent steps per environment and rollout."""
    n_epochs: int = 4
    """Passes over each rollout."""
    n_minibatches: int = 4
    """Minibatches per pass."""
    lam: float = 0.9
    """Lambda of the returns."""

    algo = "pqn"


@dataclass(kw_only=True)
class DQNConfig(TrainConfig):
    """Settings of SpikingDQN."""

    buffer_size: int = 100_000
    """Transitions kept for replay."""
    learning_starts: int = 1_000
    """Random agent steps before learning; calibration uses them."""
    batch_size: int | None = None
    """Transitions per update; none: 64, stateful 256."""
    train_freq: int = 32
    """Environment steps (of all environments together) between trainings."""
    gradient_steps: int = 8
    """Updates per training."""
    target_update_interval: int = 500
    """Agent steps between copies to the target network."""
    return_steps: int = 3
    """n of the n-step returns."""
    burn_in: int = 8
    """Frames on which a stateful agent's stored membranes are brought up to date."""
    sequence_length: int = 16
    """Frames that a stateful agent then learns from."""

    algo = "dqn"

    def check(self) -> None:
        """As in :class:`TrainConfig`."""
        super().check()
        names = ("buffer_size", "batch_size", "train_freq", "gradient_steps", "target_update_interval", "return_steps")
        for name in names:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "must be at least 1")
        if not 2 <= self.learning_starts < self.buffer_size:
            raise UserError("learning_starts", self.learning_starts, "must lie between 2 and buffer_size")
        if self.learning_starts >= self.agent_steps:
            raise UserError("agent_steps", self.agent_steps, f"must be above learning_starts = {self.learning_starts}")


CONFIGS: dict[str, type[TrainConfig]] = {"pqn": PQNConfig, "dqn": DQNConfig}


def recipes() -> dict[str, dict[str, Any]]:
    """Return every recipe of the package by name."""
    return recipes_of("spiking_rl.agents")


def load_recipe(name: str, algo: str | None = None) -> tuple[str, TrainConfig]:
    """Return the short name of a run and its settings.

    Args:
        name: a recipe, the environment id of a recipe, or any other Gymnasium id, which gets the
            recipe ``default``; another Atari game gets that of Pong.
        algo: "pqn" or "dqn"; default the recipe's own choice.

    Raises:
        UserError: unknown algorithm, or a recipe with a mistake in it.
    """
    if not isinstance(name, str):
        remedy = "name the environment by its id; of your own register one (gymnasium.register), wrappers included"
        raise UserError("env", str(name), remedy)
    known = recipes()
    by_env = {str(r.get("env")): n for n, r in known.items()}
    atari = None if name in known else parse_atari(name)
    env = name if atari is None else str(atari)  # options in their order, defaults spelled out
    chosen = name if name in known and name != "default" else by_env.get(env, "default")
    recipe = dict(known[chosen])
    short = chosen if chosen != "default" else name.split(":")[-1].replace("/", "-")
    if atari is not None and chosen == "default":
        recipe = {**known["pong"], "env": env}
        if atari.game != "pong":
            recipe["goal"] = None  # what is perfect there says nothing here
        short = f"{atari.game}-sticky{atari.sticky_actions:g}-stack{atari.frame_stack}"
    recipe.setdefault("env", name)
    default_algo = recipe.pop("algo", "pqn")
    algo = default_algo if algo is None else algo
    if algo not in tuple(CONFIGS):  # a recipe may hold what cannot be looked up
        raise UserError("algo", algo, f"must be one of {', '.join(CONFIGS)}")
    sections = {key: recipe.pop(key, {}) for key in CONFIGS}
    if not isinstance(sections[algo], dict):
        raise UserError(algo, sections[algo], f"must hold settings by name in recipe {chosen}")
    config = settings_from_dict(CONFIGS[algo], {**recipe, **sections[algo]}, f"recipe {chosen}")
    return short, config


def save_config(path: Path, config: TrainConfig, provenance: dict[str, Any]) -> None:
    """Write the merged settings of a run and where it was made."""
    save_settings(path, {"algo": config.algo, **dataclasses.asdict(config), "provenance": provenance})


def load_config(path: Path) -> TrainConfig:
    """Read the settings of a run.

    Raises:
        UserError: missing or damaged.
    """
    values = load_settings(path)
    algo = values.pop("algo", None)
    if not isinstance(algo, str) or algo not in CONFIGS:
        raise UserError("algo", algo, f"in {path} must be one of {', '.join(CONFIGS)}")
    return settings_from_dict(CONFIGS[algo], values, str(path))
