"""spiking-rl classify: images instead of games, on the same networks and the same pruning."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from spiking_rl.agents.building import resolve_device
from spiking_rl.errors import UserError
from spiking_rl.provenance import commit, machine, peak_rss_mb, provenance, today
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.main import Stopped
from spiking_rl.scripts.options import (
    AsTheRun,
    changes_of,
    first_argument,
    kept_instead,
    parse,
    parse_over_run,
    parse_settings,
    told,
)
from spiking_rl.scripts.plot import draw_run
from spiking_rl.stopping import Interrupted, check_hours
from spiking_rl.vision.config import ClassifyConfig, MainSettings, load_config, load_recipe, recipes, save_config
from spiking_rl.vision.continuing import CHANGEABLE, change_run, convert_run, extend_run, settle
from spiking_rl.vision.data import StreamedDataset, load_dataset
from spiking_rl.vision.evaluation import check_predictions, evaluate, save_predictions
from spiking_rl.vision.feeding import Images
from spiking_rl.vision.parallel import join, leave
from spiking_rl.vision.training import Trainer

USAGE = """usage: spiking-rl classify COMMAND ...

  train NETWORK DATASET    ReLU network, conversion, spiking stages T=5 to 1, score
  convert RUN              go on with a run that has only its ReLU network
  prune RUN --to 1         continue a finished run to fewer timesteps
  evaluate RUN             score on the test images; or check a file of predicted classes

  spiking-rl classify COMMAND --help    options of a command

example:
  spiking-rl classify train vgg16 cifar10 --data ~/data --recipe fast
  spiking-rl classify evaluate runs/vgg16-cifar10-seed0 --data ~/data"""

TRAIN = """Train a classifier: a ReLU network, its conversion to spikes, temporal pruning, the table.

NETWORK is one that `spiking-rl list` names; DATASET is cifar10, cifar100, tiny-imagenet-32, imagenet (read from disk
while it trains), or folder for images sorted into a folder per class.

Recipes: {recipes}. Every flag overrides the recipe's value.

Example: spiking-rl classify train vgg16 cifar10 --data ~/data --seed 1

`spiking-rl classify train NETWORK DATASET --help-all` shows every setting."""


CONVERT = """Go on from a run's ReLU network with spikes.

Example: spiking-rl classify convert runs/vgg16-cifar10-seed0 --data ~/data --epochs 20"""

PRUNE = """Lower the timesteps of a finished run.

Example: spiking-rl classify prune runs/vgg16-cifar10-seed0 --data ~/data --to 1"""

EVALUATE = """Score a classifier on the test images.

Example: spiking-rl classify evaluate runs/vgg16-cifar10-seed0 --data ~/data --timesteps 1"""


@dataclass(kw_only=True)
class Place:
    """Where the images are, and where to compute; nothing here changes what is learned."""

    data: Path | None = None
    """Folder of the images; none: the environment variable SPIKING_RL_DATA."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(kw_only=True)
class Where(Place):
    """Where and how to train."""

    hours: float | None = None
    """Save and stop after so many hours."""


@dataclass(kw_only=True)
class RunOptions(Where):
    """Which recipe and which folder."""

    recipe: str = "fast"
    """Recipe whose values the flags override."""
    run: Path | None = None
    """Run folder; none: runs/NETWORK-DATASET-seedN."""
    resume: bool = False
    """Go on with the run in that folder; epochs, threads and save_every may be others from there."""


@dataclass(kw_only=True)
class MainOptions(RunOptions, MainSettings):
    """What ``train --help`` shows; ``--help-all`` shows every setting."""


@dataclass(kw_only=True)
class TrainOptions(RunOptions, ClassifyConfig):
    """Options of ``classify train``."""


@dataclass(kw_only=True)
class ConvertOptions(Where):
    """How to go on from the ReLU network."""

    rate_epochs: int = 0
    """Epochs on firing rates, before the first spiking stage."""
    epochs: int = 12
    """Epochs of the first spiking stage."""
    timesteps: int | None = None
    """Its timesteps; none: as the run has it."""
    prune_to: int | None = None
    """Timesteps to end with; none: those it begins with."""


@dataclass(kw_only=True)
class PruneOptions(Where):
    """How far, and how."""

    to: int = 1
    """Timesteps to end with."""
    epochs: int | None = None
    """Epochs of each stage; none: as it was trained."""
    rescale_thresholds: AsTheRun = False
    """Begin stages with thresholds at which each layer goes on firing."""


@dataclass(kw_only=True)
class EvaluateOptions(Place):
    """What to measure."""

    timesteps: int | Literal["relu"] | None = None
    """T of the run to score, or relu for its ReLU network; none: everything it holds."""
    predictions: Path | None = None
    """Also write the predicted classes of every T there."""
    dataset: str | None = None
    """Of a file of predicted classes; none: cifar10."""


def run(args: list[str]) -> dict[str, Any]:
    """Serve one of the commands of ``classify``."""
    commands = {"train": _train, "convert": _convert, "prune": _prune, "evaluate": _evaluate}
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return {}
    if not args or args[0] not in commands:
        known = f"choose one of {', '.join(commands)}; see classify --help"
        raise UserError("command", args[0] if args else None, f"{'unknown' if args else 'is missing'}; {known}")
    team = join()
    try:
        result = commands[args[0]](args[1:])
        if not team.leads:
            sys.exit(0)  # the first process has said it all
        return result
    except (UserError, Stopped) as error:
        if team.leads:
            raise
        if isinstance(error, Stopped):
            sys.exit(error.code)
        if error.field in ("data", "workers"):  # of this process's share, or of this machine
            print(f"spiking-rl: process {team.rank}: {error}", file=sys.stderr)
        sys.exit(2)  # what else is wrong the first process says
    finally:
        leave()


def _train(args: list[str]) -> dict[str, Any]:
    network, rest = first_argument(args, "network", "a network")
    dataset: str | None = None
    if network is not None:
        dataset, rest = first_argument(rest, "dataset", "a data set")
    recipe = load_recipe(_recipe(rest))
    if network is not None and dataset is not None:
        recipe = dataclasses.replace(recipe, network=network, dataset=dataset)
    usage, text = "classify train NETWORK DATASET", TRAIN.format(recipes=", ".join(sorted(recipes())))
    options = parse_settings(TrainOptions, MainOptions, recipe, usage, rest, text)
    config = ClassifyConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(ClassifyConfig)})
    folder = RunFolder(options.run or Path("runs") / f"{config.network}-{config.dataset}-seed{config.seed}")
    command = shlex.join(["spiking-rl", "classify", "train", *args])
    if options.resume:
        return _go_on(folder, options, command, config, rest)
    config.check()
    check_hours(options.hours)
    team = join()
    if team.leads:
        folder.require_free()
    images, device = _images(config, options.data), resolve_device(options.device)
    # A network that cannot be is refused here.
    trainer = Trainer(config, folder, images, device, options.hours, print, team, sys.stderr.isatty())
    if team.leads:
        folder.create()
        with folder.locked():
            folder.require_free()  # once more: another process may have begun in it at this moment
            save_config(folder.config, config, provenance())
    with _held(folder):
        return _finish(trainer, command, options)


def _images(config: ClassifyConfig, data: Path | None) -> Images:
    """Open the data set of a run."""
    if config.dataset == "imagenet":
        return StreamedDataset(data, size=config.image_size or 224, seed=config.seed)
    return load_dataset(config.dataset, data, size=config.image_size or 32)


def _recipe(args: list[str]) -> str:
    """Return the recipe that is asked for: the other flags override its values."""
    found = TrainOptions.recipe
    for i, arg in enumerate(args):  # the last one holds, as of every flag
        if arg.startswith("--recipe="):
            found = arg.partition("=")[2]
        elif arg == "--recipe" and i + 1 < len(args):
            found = args[i + 1]
    return found


def _open(folder: RunFolder, where: Where) -> Trainer:
    """Return the trainer of a run, where it was left."""
    config = load_config(folder.config)
    images = _images(config, where.data)
    trainer = Trainer(
        config, folder, images, resolve_device(where.device), where.hours, print, join(), sys.stderr.isatty()
    )
    trainer.restore()
    return trainer


def _go_on(folder: RunFolder, where: Where, command: str, asked: ClassifyConfig, args: list[str]) -> dict[str, Any]:
    folder.require()
    with _held(folder):
        saved = load_config(folder.config)
        changes = changes_of(folder, saved, asked, args, ("network", "dataset"), CHANGEABLE)
        trainer = _open(folder, where)
        if kept := kept_instead(saved, asked, args):
            trainer.record.note(f"{', '.join(kept)}: as the run was started, not as the recipe has it")
        if changes:
            change_run(trainer, changes)
            trainer.record.note(told(saved, changes))
        return _finish(trainer, command, where)


def _convert(args: list[str]) -> dict[str, Any]:
    name, rest = first_argument(args, "run", "a run folder")
    options = parse(ConvertOptions, "classify convert RUN", rest, CONVERT)
    folder = RunFolder(Path(str(name)))
    folder.require()
    with _held(folder):
        trainer = _open(folder, options)
        timesteps = trainer.config.timesteps if options.timesteps is None else options.timesteps
        prune_to = timesteps if options.prune_to is None else options.prune_to
        convert_run(trainer, timesteps, prune_to, options.epochs, options.rate_epochs)
        return _finish(trainer, shlex.join(["spiking-rl", "classify", "convert", *args]), options)


def _prune(args: list[str]) -> dict[str, Any]:
    name, rest = first_argument(args, "run", "a run folder")
    folder = RunFolder(Path(str(name)))
    options = parse_over_run(PruneOptions, "classify prune RUN", rest, PRUNE, lambda: _own_of_prune(folder))
    with _held(folder):
        trainer = _open(folder, options)
        extend_run(trainer, options.to, options.epochs, options.rescale_thresholds)
        return _finish(trainer, shlex.join(["spiking-rl", "classify", "prune", *args]), options)


def _own_of_prune(folder: RunFolder) -> PruneOptions:
    """Return the options as the run has them."""
    folder.require()
    return PruneOptions(rescale_thresholds=load_config(folder.config).rescale_thresholds)


def _evaluate(args: list[str]) -> dict[str, Any]:
    name, rest = first_argument(args, "run", "a run folder or a file of predicted classes")
    options = parse(EvaluateOptions, "classify evaluate RUN", rest, EVALUATE)
    path = Path(str(name))
    if join().size > 1:
        raise UserError("processes", join().size, "score in one process; run classify evaluate without torchrun")
    if path.suffix == ".json":
        for name in ("timesteps", "predictions"):
            if getattr(options, name) is not None:
                remedy = "is for a run; a file of predicted classes is counted as it stands, leave it out"
                raise UserError(name, getattr(options, name), remedy)
        dataset = options.dataset or ClassifyConfig.dataset
        # Labels are all that counts: images of a folder may be of any size.
        images = _images(ClassifyConfig(dataset=dataset, image_size=int(dataset == "folder")), options.data)
        checked = check_predictions(path, images, dataset)
        for row in checked:
            print(f"T={row['timesteps'] or 'ReLU'}: {row['top1']:.2f} %, as claimed")
        return {"dataset": dataset, "rows": checked}
    folder = RunFolder(path)
    folder.require()
    if options.predictions is not None and not options.predictions.absolute().parent.is_dir():
        raise UserError("predictions", str(options.predictions), "lies in no folder that is there; make that first")
    config = load_config(folder.config)
    if options.dataset not in (None, config.dataset):
        raise UserError("dataset", options.dataset, f"is {config.dataset} in {path}; leave it out")
    rows = _rows(folder, config, _images(config, options.data), resolve_device(options.device), options)
    return {"rows": [_without_classes(row) for row in rows]}


def _rows(
    folder: RunFolder, config: ClassifyConfig, images: Images, device: torch.device, options: EvaluateOptions
) -> list[dict[str, Any]]:
    kept = {"relu" if t is None else t: t for t in folder.checkpoint_timesteps()}
    if options.timesteps is not None and options.timesteps not in kept:
        held = ", ".join(map(str, kept)) or "nothing yet"
        raise UserError("timesteps", options.timesteps, f"{folder.path} holds {held}")
    chosen = list(kept.values()) if options.timesteps is None else [kept[options.timesteps]]
    if not chosen:
        raise UserError("run", str(folder.path), "holds no checkpoint yet; wait for its first epoch")
    rows = [evaluate(folder, config, images, t, device) for t in chosen]
    for row in rows:
        name = "ReLU" if row["timesteps"] is None else f"T={row['timesteps']}"
        rates = row["spike_rate"]
        mean = "" if rates is None else f"  {sum(rates.values()) / len(rates):.3f} spikes/neuron/timestep"
        print(f"{name:>5}  {row['top1']:.2f} %{mean}  energy ANN/SNN {row['energy_ratio']:.1f}x")
    if options.predictions is not None:
        save_predictions(options.predictions, rows, config.seed)
        print(f"predicted classes: {options.predictions}")
    return rows


def _without_classes(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "predicted"}


@contextmanager
def _held(folder: RunFolder) -> Iterator[None]:
    """Hold the run for these processes, its settings in their place."""
    team = join()
    with folder.locked() if team.leads else nullcontext():
        if team.leads:
            settle(folder)
        team.told(None)  # nobody reads them before
        yield


def _finish(trainer: Trainer, command: str, where: Where) -> dict[str, Any]:
    """Train to the end, then score every T on the test images."""
    folder, config = trainer.folder, trainer.config
    trainer.record.note(f"run folder: {folder.path}")
    trainer.record.note(f"{trainer.feed.count} training images of {len(trainer.images.classes)} classes")
    for name in ("ann_batch_size",) * config.trains_ann + ("batch_size",) * (config.epochs > 0):
        if getattr(config, name) > trainer.feed.count:
            count = trainer.feed.count
            trainer.record.note(f"warning: {name} is {getattr(config, name)} and there are {count} training images")
    try:
        trainer.run()
    except Interrupted as stop:
        again = [*trainer.team.command(), "classify", "train", config.network, config.dataset]
        again += ["--run", str(folder.path)]
        again += [] if where.data is None else ["--data", str(where.data)]
        again += [] if where.device == Where.device else ["--device", where.device]
        text = f"stopped, everything is saved.\nGo on with: {shlex.join([*again, '--resume'])}"
        raise Stopped(text, 130 if stop.reason == "interrupt" else 0) from None
    if not trainer.team.leads:
        return {}
    rows = _rows(folder, config, trainer.images, trainer.device, EvaluateOptions())
    save_predictions(folder.path / "predictions.json", rows, config.seed)
    results: dict[str, Any] = {"command": command, "commit": commit(), "date": today(), "machine": machine()}
    results |= {"train_seconds": round(trainer.seconds, 1), "peak_rss_mb": peak_rss_mb()}
    results |= {"rows": [{"seed": config.seed, **_without_classes(row)} for row in rows]}
    folder.write_results(results)
    for figure in draw_run(folder):
        print(f"figure: {figure}")
    return {"run": str(folder.path), **results}
