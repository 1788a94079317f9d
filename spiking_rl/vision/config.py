"""What a classification run is made of: typed settings and the papers' recipes as YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spiking_rl.encoding import ENCODINGS
from spiking_rl.errors import UserError
from spiking_rl.pruning import MAX_TIMESTEPS, check_pruning
from spiking_rl.settings import load_settings, recipes_of, save_settings, settings_from_dict

Optimizer = Literal["adam", "sgd", "muon"]
Precision = Literal["auto", "float32", "bfloat16"]
Encoding = Literal["direct", "hybrid", "poisson"]


LARGEST_IMAGE = 1024
"""Pixels a side: a forward pass on more would take all memory."""

USUAL_RATES: dict[str, tuple[float, float]] = {"sgd": (2e-3, 1), "adam": (1e-6, 0.01), "muon": (3e-3, 0.3)}
"""Learning rates that networks are trained with, by optimiser."""


@dataclass(kw_only=True)
class MainSettings:
    """The settings that one changes first."""

    width: float = 1.0
    """Multiplies the channels of the network."""
    timesteps: int = 5
    """Timesteps T of the first spiking stage."""
    prune_to: int = 1
    """Timesteps of the last stage; equal to timesteps: no pruning."""
    seed: int = 0
    """Seed of every random generator."""
    ann_epochs: int = 40
    """Epochs of the ReLU network that the spiking one starts from; 0: spikes from the start (with distill 0)."""
    epochs: int = 15
    """Epochs of the first spiking stage; 0: stop after the ReLU network."""
    prune_epochs: int = 8
    """Epochs of each later stage."""
    start_from: str | None = None
    """Run whose ReLU network to start from; or a spiking network, as a checkpoint of a run (RUN/checkpoints/T1)."""


@dataclass(kw_only=True)
class ClassifyConfig(MainSettings):
    """Settings of a run: a ReLU network, its conversion, and stages from T = timesteps down to prune_to."""

    network: str = "vgg16"
    """A registered network; `spiking-rl list` names them."""
    dataset: str = "cifar10"
    """cifar10, cifar100, tiny-imagenet-32, imagenet (read from disk), or folder: images in a folder per class."""
    image_size: int = 0
    """Side in pixels to which images of imagenet or a folder are brought; 0: 224, and 32 for a folder."""
    workers: int = 2
    """Processes that decode the images of imagenet; 0: this one."""
    rate_epochs: int = 0
    """Epochs on firing rates, before spikes: one pass for all T, with the ReLU network's optimiser and batches."""
    last_epochs: int = 0
    """Epochs of the last stage, where it is not the first; 0: as prune_epochs."""
    ann_optimizer: Optimizer = "sgd"
    """Of the ReLU network; sgd: Nesterov momentum 0.9; muon: orthogonal updates, Adam for vectors, large batches."""
    ann_learning_rate: float = 0.05
    """Highest learning rate of the ReLU network."""
    ann_weight_decay: float = 5e-4
    """Weight decay of the ReLU network."""
    ann_batch_size: int = 128
    """Images per update of the ReLU network."""
    ann_milestones: tuple[float, ...] = ()
    """Parts of the training after which its learning rate is divided by 5; none: one cycle, up and then down to 0."""
    optimizer: Optimizer = "adam"
    """Optimiser of the spiking stages; adam is AMSGrad, muon as for the ReLU network (rates of about 0.02)."""
    learning_rate: float = 1e-3
    """Highest learning rate of the spiking stages."""
    weight_decay: float = 0.0
    """Weight decay of the spiking stages; never of thresholds and leaks."""
    batch_size: int = 128
    """Images per update of the spiking stages."""
    milestones: tuple[float, ...] = ()
    """As ann_milestones, for every spiking stage."""
    accumulate: int = 1
    """Parts into which each batch is cut where memory is short."""
    label_smoothing: float = 0.0
    """Of the cross-entropy."""
    distill: float = 0.0
    """Part of the spiking loss that pulls to the ReLU network's class probabilities (Hinton et al. 2015)."""
    spike_penalty: float = 0.0
    """This many times the accumulates per multiply-accumulate behind the first layer are added to the spiking loss."""
    max_grad_norm: float = 5.0
    """Gradient clipping."""
    precision: Precision = "auto"
    """Arithmetic of training and selection; auto: bfloat16 on a GPU. Test scores are counted in float32."""
    batch_norm: bool = True
    """Train with batch normalisation, which costs nothing in the end: it folds into the weights."""
    fold_first: bool = False
    """Fold it before the conversion, as the papers do, instead of training the spiking network with it."""
    dropout: float = 0.0
    """Of the convolutions' outputs, one mask for all timesteps."""
    dense_dropout: float = 0.0
    """Of the fully connected layers' outputs."""
    firing_rate: float | None = None
    """Spikes per neuron and timestep that the thresholds are set for; none: by the percentile, as the papers do."""
    percentile: float = 90.0
    """Of a layer's current over a batch of images, directly encoded: its threshold, where there is no firing rate."""
    threshold_scale: float = 1.0
    """Multiplies the thresholds that a percentile set."""
    calibration_timesteps: int = 100
    """Timesteps over which it sets them."""
    leak: float | None = None
    """Initial leak (1 = none); none: 1, or what the neurons have that a run starts from."""
    train_threshold: bool = True
    """Train the thresholds."""
    train_leak: bool = True
    """Train the leaks."""
    rescale_thresholds: bool = False
    """Begin a stage of fewer timesteps with thresholds at which each layer goes on firing, instead of those it had."""
    encoding: Encoding = "direct"
    """direct: the image at every timestep; hybrid: at the first, then a spike per value; poisson: random ones."""
    single_spike: bool = False
    """Let every hidden neuron fire at most once per image."""
    kappa: float = 0.0
    """Weight of the output neurons' first-spike times in the scores of the classes."""
    surrogate_gamma: float = 0.3
    """Height of the surrogate gradient."""
    crop: int = 4
    """Pixels by which training images are shifted at random."""
    flip: bool = True
    """Mirror training images at random."""
    cutout: int = 0
    """Side of a square that is cut out of each training image."""
    save_every: float = 10.0
    """Minutes between saves to resume from."""
    threads: int = 0
    """Torch threads; 0: torch's own choice."""

    @property
    def trains_ann(self) -> bool:
        """Whether a ReLU network is trained first."""
        return self.ann_epochs > 0 and self.start_from is None

    @property
    def stages(self) -> int:
        """Spiking stages."""
        return self.timesteps - self.prune_to + 1

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: naming the first bad field.
        """
        check_pruning(self.timesteps, self.prune_to)
        for name in ("prune_epochs", "ann_batch_size", "batch_size", "accumulate", "calibration_timesteps"):
            if getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "must be at least 1")
        epochs = ("ann_epochs", "rate_epochs", "epochs", "last_epochs")
        others = ("seed", "crop", "cutout", "threads", "image_size", "workers", "ann_weight_decay", "weight_decay")
        for name in ("ann_batch_size", "batch_size"):
            if self.accumulate > getattr(self, name):
                raise UserError("accumulate", self.accumulate, f"must be at most {name}, {getattr(self, name)}")
        if self.calibration_timesteps > MAX_TIMESTEPS:
            raise UserError("calibration_timesteps", self.calibration_timesteps, f"must be at most {MAX_TIMESTEPS}")
        if self.image_size > LARGEST_IMAGE:
            raise UserError("image_size", self.image_size, f"must be at most {LARGEST_IMAGE}")
        for name in (*epochs, *others):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(name, getattr(self, name), "must be 0 or positive, and finite")
        if self.image_size and self.dataset not in ("imagenet", "folder"):
            raise UserError("image_size", self.image_size, f"cannot be chosen for {self.dataset}; leave it 0")
        if self.workers > 256:
            raise UserError("workers", self.workers, "must be at most 256")
        positive = ("width", "ann_learning_rate", "learning_rate", "max_grad_norm", "threshold_scale", "save_every")
        for name in (*positive, "surrogate_gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(name, getattr(self, name), "must be positive and finite")
        for name in ("label_smoothing", "dropout", "dense_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(name, getattr(self, name), "must be at least 0 and below 1")
        for name in ("kappa", "spike_penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(name, getattr(self, name), "must be 0 or positive, and finite")
        if self.encoding not in ENCODINGS:
            raise UserError("encoding", self.encoding, f"must be one of {', '.join(ENCODINGS)}")
        if not 0 <= self.distill <= 1:
            raise UserError("distill", self.distill, "must lie between 0 and 1")
        if self.distill and not (self.trains_ann or self.start_from):
            remedy = "needs a ReLU network to learn from; 0 without one (see ann_epochs, start_from)"
            raise UserError("distill", self.distill, remedy)
        if self.rate_epochs:
            self._check_rates()
        if self.firing_rate is not None and not 0 < self.firing_rate < 1:
            raise UserError("firing_rate", self.firing_rate, "must lie strictly between 0 and 1")
        if self.leak is not None and not 0 <= self.leak <= 1:
            raise UserError("leak", self.leak, "must lie between 0 and 1")
        if not 0 < self.percentile <= 100:
            raise UserError("percentile", self.percentile, "must be above 0 and at most 100")
        for name in ("ann_milestones", "milestones"):
            if not all(0 < part < 1 for part in getattr(self, name)):
                raise UserError(name, getattr(self, name), "must be parts of the training, each between 0 and 1")
        if not self.trains_ann and not self.epochs:
            raise UserError("epochs", 0, "leaves nothing to train without a ReLU network to train")
        if self.seed >= 10_000_000:
            raise UserError("seed", self.seed, "must be below 10000000")
        if self.threads > 1024:
            raise UserError("threads", self.threads, "must be at most 1024")
        if self.width > 16:
            raise UserError("width", self.width, "must be at most 16")
        if self.fold_first and self.firing_rate is not None:
            raise UserError("firing_rate", self.firing_rate, "sets no thresholds with fold_first; use the percentile")
        if self.fold_first and not (self.batch_norm and (self.trains_ann or self.start_from)):
            raise UserError("fold_first", True, "has nothing to fold without batch_norm and a trained ReLU network")

    def _check_rates(self) -> None:
        if not self.epochs:
            raise UserError("rate_epochs", self.rate_epochs, "needs epochs on spikes behind them; see epochs")
        if self.timesteps < 2:
            raise UserError("rate_epochs", self.rate_epochs, "needs at least 2 timesteps; of one, spikes are rates")
        if self.encoding != "direct" or self.single_spike or self.kappa:
            remedy = "needs direct encoding, without single_spike and kappa: rates know no time"
            raise UserError("rate_epochs", self.rate_epochs, remedy)
        if self.fold_first or not self.batch_norm:
            remedy = "needs batch_norm, whose statistics take rates to spikes, and no fold_first"
            raise UserError("rate_epochs", self.rate_epochs, remedy)

    def unusual(self) -> list[str]:
        """Return a line of warning for each learning rate of another optimiser, and each setting that means nothing."""
        rates = []
        if self.trains_ann or self.rate_epochs:
            rates.append(("ann_learning_rate", self.ann_optimizer, self.ann_learning_rate))
        if self.epochs:
            rates.append(("learning_rate", self.optimizer, self.learning_rate))
        found = []
        for field, optimizer, rate in rates:
            lowest, highest = USUAL_RATES[optimizer]
            if not lowest <= rate <= highest:
                text = f"{field} is {rate:g}; for {optimizer} it is usually between {lowest:g} and {highest:g}"
                found.append(f"warning: {text}, see --{field.replace('_', '-')}")
        if self.dataset == "imagenet" and (self.crop != ClassifyConfig.crop or not self.flip or self.cutout):
            text = "crop, flip and cutout mean nothing for imagenet, which is cropped and mirrored as it is decoded"
            found.append(f"warning: {text}")
        found += [f"warning: {line}" for line in self._idle()]
        if self.firing_rate is None and (self.encoding != "direct" or self.single_spike or self.kappa):
            text = "a percentile sets thresholds as for direct encoding and neurons that fire again"
            found.append(f"warning: {text}; see --firing-rate, which sets them as they will be used")
        return found

    def _idle(self) -> list[str]:
        """Return what settings that were changed mean nothing beside the others."""
        found = []
        if self.firing_rate is not None:
            for name in ("percentile", "threshold_scale", "calibration_timesteps"):
                if getattr(self, name) != getattr(ClassifyConfig, name):
                    found.append(f"{name} means nothing where a firing rate sets the thresholds, see --firing-rate")
        if not self.epochs:
            for name in ("spike_penalty", "kappa", "single_spike"):
                if getattr(self, name):
                    found.append(f"{name} means nothing without epochs on spikes, see --epochs")
        if self.timesteps == 1 and self.leak is not None:
            found.append("leak means nothing at one timestep, after which nothing is kept")
        if self.rate_epochs and self.leak not in (None, 1.0):
            found.append(f"rates are those of neurons that do not leak; with leak {self.leak:g} spikes are fewer")
        if self.dense_dropout and self.network.startswith("resnet"):
            found.append(f"dense_dropout means nothing for {self.network}, whose only dense layer is the readout")
        if self.workers != ClassifyConfig.workers and self.dataset != "imagenet":
            found.append(f"workers means nothing for {self.dataset}: they decode imagenet, the rest lies in memory")
        lower = self.prune_to < self.timesteps or self.start_from is not None
        if self.rescale_thresholds and not lower:
            found.append("rescale_thresholds means nothing where T stays as it is, see --prune-to")
        return found


def recipes() -> dict[str, dict[str, Any]]:
    """Return every recipe of the package by name."""
    return recipes_of("spiking_rl.vision")


def load_recipe(name: str) -> ClassifyConfig:
    """Return the settings of a recipe.

    Raises:
        UserError: unknown, or with a mistake in it.
    """
    known = recipes()
    if name not in known:
        raise UserError("recipe", name, f"unknown; choose one of {', '.join(sorted(known))}")
    return settings_from_dict(ClassifyConfig, known[name], f"recipe {name}")


def save_config(path: Path, config: ClassifyConfig, provenance: dict[str, Any]) -> None:
    """Write the settings of a run and where it was made."""
    save_settings(path, {"kind": "classify", **dataclasses.asdict(config), "provenance": provenance})


def classifies(path: Path) -> bool:
    """Tell whether a run's config.yaml is that of a classifier.

    Raises:
        UserError: missing or damaged.
    """
    return bool(load_settings(path).get("kind") == "classify")


def load_config(path: Path) -> ClassifyConfig:
    """Read the settings of a run.

    Raises:
        UserError: missing, damaged, or no classification run.
    """
    values = load_settings(path)
    if values.pop("kind", None) != "classify":
        raise UserError("run", str(path.parent), "holds an agent, no classifier; use train, prune and evaluate for it")
    config = settings_from_dict(ClassifyConfig, values, str(path))
    config.check()
    return config
