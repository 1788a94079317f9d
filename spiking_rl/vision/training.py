"""Train a classifier: a ReLU network, its conversion, and spiking stages with fewer and fewer timesteps.

Everything random follows from the seed, the stage, the epoch and the batch, so that a run resumes
between any two batches, bit for bit on the same machine.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from spiking_rl.arithmetic import slow_arithmetic
from spiking_rl.checkpoint import Checkpoint, load_checkpoint, load_into, read_json, save_checkpoint
from spiking_rl.energy import SpikeCounter
from spiking_rl.errors import UserError, WorkError
from spiking_rl.files import being_replaced, recover_folder, replace_folder
from spiking_rl.folding import fold_batch_norm
from spiking_rl.lowering import lower_timesteps, measuring_norms
from spiking_rl.networks import LayeredNetwork, evaluating
from spiking_rl.neurons import LIF, clamp_after_step
from spiking_rl.provenance import memory_columns
from spiking_rl.pruning import Next, Stay
from spiking_rl.runs import RunFolder
from spiking_rl.state import (
    REMEDY,
    generators,
    hashes_of,
    pack_optimiser,
    read_tensors,
    restore_generators,
    seed_generator,
    unpack_optimiser,
    verify,
)
from spiking_rl.stopping import Interrupted, check_hours, stopping_on_signals
from spiking_rl.tracking import odd_thresholds, spoiled_layer
from spiking_rl.vision.building import (
    build,
    convert,
    load_relu,
    load_spiking,
    origin_of,
    require_same_images,
    set_thresholds,
)
from spiking_rl.vision.config import ClassifyConfig
from spiking_rl.vision.data import normalise
from spiking_rl.vision.feeding import Batch, Images, feed_of
from spiking_rl.vision.objective import Objective
from spiking_rl.vision.optimising import autocast, optimiser_of, rate_factor
from spiking_rl.vision.parallel import Team
from spiking_rl.vision.predicting import PIXELS, predict
from spiking_rl.vision.record import Record
from spiking_rl.vision.stages import Stages

_WATCHED = 4  # images, at least, of each batch that is scored: their spikes are counted
_WATCHED_IN_ALL = 256  # at least: rates of a few images say little of a layer
_BALANCED = 512  # that set the thresholds: the papers' number; for firing rates as many as four passes take
_ALONE = Team()
_MOST_EPOCHS = 2**20  # of a stage


class Trainer:
    """One classification run on disk, from its first batch or from where it was left.

    Args:
        config: checked settings.
        folder: the run folder; it exists and is held by this process.
        images: the data set.
        device: to train on.
        hours: stop, with everything saved, after so many hours of this session.
        note: told a line of text per epoch.
        team: the processes that train together.
        shown: show a progress bar of every epoch on standard error.
    """

    def __init__(
        self,
        config: ClassifyConfig,
        folder: RunFolder,
        images: Images,
        device: torch.device,
        hours: float | None = None,
        note: Any = None,
        team: Team = _ALONE,
        shown: bool = False,
    ) -> None:
        check_hours(hours)
        self.stages = Stages(config)
        self.folder = folder
        self.images = images
        self.device = device
        self.deadline = None if hours is None else time.monotonic() + 3600 * hours
        self.team = team
        remedy = "--percentile and --threshold-scale" if config.firing_rate is None else "--firing-rate"
        self.record = Record(folder, note if team.leads else None, shown and team.leads, remedy)
        self.batches = 0  # of this stage
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # of the epoch under way
        self.best: float | None = None  # of the ReLU network, or on rates
        self.seconds = 0.0
        self._started = time.monotonic()
        self._saved = time.monotonic()
        self.stop_requested = False
        self._agreed = (False, False)  # on stopping, with the other processes: asked to, out of time
        torch.manual_seed(config.seed)
        self.feed = feed_of(images, config, device, team)
        self.mean, self.std = images.mean, images.std
        if team.leads:
            recover_folder(folder.resume)
        team.told(None)
        begun = (folder.resume / "state.json").is_file()  # then the network is that of the saved state
        self._taken: Checkpoint | None = None  # the ReLU network of another run
        if config.start_from is not None and not begun:
            self._begin(self._started_network(config.start_from))
            return
        self._begin(build(config, images, spiking=self.stages.spiking))
        if self.stages.spiking and not begun:
            set_thresholds(self.network, config, self._some_inputs())

    def _started_network(self, start_from: str) -> LayeredNetwork:
        """Return the network to start from: another run's ReLU network, converted, or one of its spiking ones."""
        run, checkpoint = origin_of(start_from)
        if checkpoint is None:
            relu, self._taken = load_relu(run, self.config, self.images)
            return convert(relu.to(self.device), self.config, self.images, self._some_inputs())
        if RunFolder(run).checkpoint(None).is_dir():
            _, self._taken = load_relu(run, self.config, self.images)  # to learn from, and to be scored beside
        elif self.config.distill:
            remedy = f"needs a ReLU network to learn from, and {run} has none; 0 without one"
            raise UserError("distill", self.config.distill, remedy)
        follow = " and follow T where it is lower" if self.config.rescale_thresholds else ""
        self.record.note(f"thresholds are those of {start_from}{follow}: firing_rate and percentile set none")
        return load_spiking(checkpoint, self.config, self.images, self._some_inputs())

    @property
    def config(self) -> ClassifyConfig:
        """Settings of the run."""
        return self.stages.config

    # -- stages ----------------------------------------------------------------------------------

    def _begin(self, network: LayeredNetwork) -> None:
        """Take a network for the stage that begins, with a fresh optimiser."""
        config = self.config
        self.network = network.to(self.device)
        self.network.set_rates(self.stages.on_rates)
        teacher = self._teacher() if self.stages.spiking and config.distill else None
        self.objective = Objective(self.network, config, self.images, teacher)
        for neuron in network.neurons:
            if isinstance(neuron, LIF):
                neuron.threshold.requires_grad_(config.train_threshold)
                neuron.leak.requires_grad_(config.train_leak)
        if network.spike_time is not None:
            network.spike_time.threshold.requires_grad_(config.train_threshold)
        self.optimizer, self.highest_rate = optimiser_of(network, config, self.device, spikes=self.stages.on_spikes)
        clamp_after_step(self.optimizer, network)
        self.batches = 0
        self.record.warn(odd_thresholds(self.network))

    def _teacher(self) -> LayeredNetwork:
        """Return the trained ReLU network, this run's own or the one it started from."""
        # It looks at every batch: folded, it takes less time.
        teacher, _ = load_relu(self._relu_run(), self.config, self.images)
        with suppress(UserError):  # a network of somebody's own, with a batch norm elsewhere
            teacher = fold_batch_norm(teacher)
        return teacher.to(self.device)

    def _relu_run(self) -> Path:
        """Return the run that has the ReLU network: this one, or as long as it has none the one it starts from."""
        own = self.folder.checkpoint(None)
        if own.is_dir() or being_replaced(own) or self.config.start_from is None:
            return self.folder.path
        return origin_of(self.config.start_from)[0]

    def _take_relu(self) -> None:
        """Keep the ReLU network that a new run starts from: from then on it needs the other run no more."""
        if self._taken is not None and self.team.leads:
            save_checkpoint(self.folder.checkpoint(None), *self._taken)
        self._taken = None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train; without ``epochs`` that is so after the ReLU network."""
        if self.stages.spiking or self.config.epochs:
            return self.stages.pruning.finished
        return self.batches >= self.stages.epochs * self.batches_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Updates per epoch; the last, smaller batch is left out."""
        return max(1, self.feed.count // self.stages.batch_size)

    def run(self) -> None:
        """Train until temporal pruning is done.

        Raises:
            Interrupted: stopped early; the state is saved.
            OSError: the disk is full or gone; what was saved stays.
        """
        self._started = time.monotonic()
        slow = slow_arithmetic(self.config.precision, self.device, "precision")
        for warning in [*([slow] if slow else []), *self.config.unusual()]:
            self.record.note(warning)
        self.team.alike(self.network)
        self._take_relu()
        threads = torch.get_num_threads()
        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        if self.team.leads:
            self.record.open()
        try:
            with stopping_on_signals(self._request_stop):
                while not self.finished:
                    self._epoch()
                if self.stop_requested and self.team.size == 1:
                    raise Interrupted("interrupt")
        finally:
            self.record.close()
            torch.set_num_threads(threads)
            self.seconds = self._seconds_so_far()
            self._started = time.monotonic()

    def _epoch(self) -> None:
        """Train to the end of the epoch under way, score, and move on where the stage is over."""
        epoch = self.batches // self.batches_per_epoch
        first, trained = self.batches % self.batches_per_epoch, 0
        ending = (epoch + 1) * self.batches_per_epoch
        number = self.stages.number * _MOST_EPOCHS + epoch  # a stream draws another order from every number
        title = f"{self.stages.label} epoch {epoch + 1}/{self.stages.epochs}"
        bar = tqdm(
            desc=title,
            total=self.batches_per_epoch,
            initial=first,
            unit="batch",
            leave=False,
            disable=not self.record.shown,
        )
        batches = iter(self.feed.batches(number, self._generator(epoch), self.stages.batch_size, first))
        begun = time.monotonic()
        with bar:
            while (loss := self._update(next(batches, None), self._generator(epoch, first + trained))) is not None:
                self.loss_sum += loss
                self.batches, trained = self.batches + 1, trained + 1
                bar.update()
                if self.batches < ending and self._save_where_due():  # an epoch is over with its score
                    done, seconds = first + trained, (time.monotonic() - begun) / trained
                    self.record.progress(title, done, self.batches_per_epoch, float(self.loss_sum) / done, seconds)
        trained += first
        if not trained:
            remedy = "no process has a batch for every other; use fewer processes or workers, or smaller batches"
            raise WorkError("batch_size", self.stages.batch_size, f"leaves no update in an epoch: {remedy}")
        self.batches = ending  # workers may leave out a batch
        self.team.average_statistics(self.network)
        score, counter = self._score() if self.team.leads else (None, None)
        score = self.team.told(score)
        mean_loss = float(self.loss_sum) / max(1, trained)
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self._require_number(mean_loss)
        if self.team.leads:
            self._write(title, score, mean_loss, counter)
        if self.stages.on_spikes:
            self._report(score, epoch + 1)
        else:
            name = self.stages.name
            if self.best is None or score >= self.best:
                self.best = score
                self._keep(name, score)
            if epoch + 1 == self.stages.epochs:
                self._keep(f"{name}-end", score)
                if self.stages.on_rates:
                    self._leave_rates()
                elif self.config.epochs:
                    self.begin_spikes()
        self.save()
        if not self.finished:
            self._save_where_due()

    def _report(self, score: float, epochs: int) -> None:
        name = self.stages.name
        decision = self.stages.pruning.report(score, epochs)
        if decision.improved:
            self._keep(name, score)
        if isinstance(decision, Stay):
            return
        self._keep(f"{name}-end", score)
        if isinstance(decision, Next):
            self.next_stage(decision)

    def begin_spikes(self) -> None:
        """Go on with spikes, from the ReLU network's best weights."""
        self._load_best("relu")
        inputs = self._some_inputs()
        self.stages.spiking, self.best = True, None
        self.stages.on_rates = self.config.rate_epochs > 0
        self._begin(convert(self.network, self.config, self.images, inputs))
        self.team.alike(self.network)

    def _load_best(self, name: str) -> None:
        """Take the weights of a stage's best checkpoint into the network."""
        folder = self.folder.checkpoints / name
        self.team.told(None)  # the first process has written it
        load_into(self.network, load_checkpoint(folder).tensors, folder)

    def _leave_rates(self) -> None:
        """Go on with spikes, from the best weights on rates."""
        self._load_best("rates")
        inputs = self._some_inputs()
        self.stages.on_rates = False
        self._begin(self.network)
        # Currents of spikes vary more than their means.
        with torch.no_grad(), evaluating(self.network), measuring_norms(self.network):
            self.network(inputs.unsqueeze(0))
        self.team.alike(self.network)

    def next_stage(self, decision: Next) -> None:
        """Begin a stage from the best checkpoint of the one above."""
        self._load_best(decision.checkpoint)
        if self.config.rescale_thresholds:
            lower_timesteps(self.network, decision.timesteps, self._some_inputs())
            self.team.alike(self.network)
        self.network.set_timesteps(decision.timesteps)
        self._begin(self.network)

    def _some_inputs(self) -> Tensor:
        """Return the inputs on which thresholds are set."""
        count = _BALANCED
        if self.config.firing_rate is not None:  # currents of all timesteps are held; percentiles see one by one
            count = min(count, 4 * PIXELS // (self.config.timesteps * math.prod(self.images.input_shape[1:])))
        return normalise(self.feed.some(max(2, count), self._generator(-1)), self.mean, self.std)

    def _generator(self, *path: int) -> torch.Generator:
        """Return the random generator of a place in the run, the same whenever it is reached."""
        mixed = self.config.seed
        for number in (self.stages.number, *path):
            mixed = (mixed * 1_000_003 + number + 1) % 2**63
        return torch.Generator().manual_seed(mixed)

    # -- one batch -------------------------------------------------------------------------------

    def _update(self, batch: Batch | None, generator: torch.Generator) -> Tensor | None:
        """Make one update on a batch of training images; return the loss.

        None where there is no batch any more, in this process or another: then nobody updates.
        """
        if batch is None and self.team.size == 1:
            return None
        config = self.config
        self.network.train()
        self.optimizer.zero_grad()
        seed = int(torch.randint(2**31, (1,), generator=generator))
        seed_generator(seed + self.team.rank, self.device)  # dropout draws from it
        total = torch.zeros((), device=self.device)
        for images, labels in batch.parts(config.accumulate, generator) if batch else ():
            if not len(labels):
                continue  # of a small part not every process has a share
            with autocast(self.device, config.precision), _enough_images(config.accumulate):
                loss = self.objective(images, labels)
            assert batch is not None
            share = len(labels) / len(batch)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * share
        if self.team.size > 1 and not self._share(total, out=batch is None):
            return None
        progress = self.batches / (self.stages.epochs * self.batches_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.highest_rate * rate_factor(progress, self.stages.milestones)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.max_grad_norm)
        self.optimizer.step()
        return total

    def _share(self, loss: Tensor, *, out: bool) -> bool:
        """Add up gradients and loss over the processes; tell whether all of them had a batch.

        Who is asked to stop, or is out of time, tells the others here: they stop at the same batch.
        """
        trained = [p for p in self.network.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        late = self._late()
        said = torch.tensor([float(out), float(self.stop_requested), float(late)], device=self.device)
        self.team.sum([*(p.grad for p in trained if p.grad is not None), loss, said])
        self._agreed = bool(said[1] > 0), bool(said[2] > 0)
        return not said[0] > 0

    def _score(self) -> tuple[float, SpikeCounter | None]:
        """Return the accuracy on the validation images in percent, and the spikes of some of them.

        In the arithmetic of training, as it only selects; watched neurons take their time, so a tenth is.
        """
        counter = SpikeCounter(graded=self.stages.on_rates) if self.stages.spiking else None
        right, count = 0, 0
        with autocast(self.device, self.config.precision):
            for images, labels in self.images.validation():
                # From everywhere: images of a folder lie class by class.
                watched = torch.zeros(len(labels), dtype=torch.bool)
                some = max(_WATCHED, len(labels) // 10, _WATCHED_IN_ALL - count)
                watched[:: max(1, len(labels) // some)] = True
                for observer, part in ((counter, watched), (None, ~watched)):
                    if part.any():
                        found = predict(self.network, images[part], self.mean, self.std, observer)
                        right += int((found == labels[part].cpu()).sum())
                count += len(labels)
        return 100 * right / count, counter

    # -- what is kept ----------------------------------------------------------------------------

    def _keep(self, name: str, score: float) -> None:
        if not self.team.leads:
            return
        config = self.config
        about = {
            "kind": "classifier",
            "network": config.network,
            "dataset": config.dataset,
            "timesteps": self.network.timesteps if self.stages.spiking else None,
            "val_accuracy": score,
            "mean": list(self.images.mean),
            "std": list(self.images.std),
            "classes": list(self.images.classes),
            "seed": config.seed,
        }
        save_checkpoint(self.folder.checkpoints / name, self.network.state_dict(), about)

    def _write(self, title: str, score: float, loss: float, counter: SpikeCounter | None) -> None:
        row = {
            "epoch": self.batches // self.batches_per_epoch,
            "seconds": round(self._seconds_so_far(), 3),
            "timesteps": self.network.timesteps if self.stages.spiking else None,
            **({"on_rates": int(self.stages.on_rates)} if self.config.rate_epochs else {}),
            "score": score,
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **memory_columns(self.device),
        }
        self.record.epoch(title, row, self.network, counter)

    def _seconds_so_far(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _save_where_due(self) -> bool:
        """Save if it is time to; return whether it was."""
        # Several processes stop at the batch on which they have agreed.
        stop, late = (self.stop_requested, self._late()) if self.team.size == 1 else self._agreed
        due = stop or late or time.monotonic() - self._saved > 60 * self.config.save_every
        if due:
            self.save()
        if stop or late:
            raise Interrupted("interrupt" if stop else "time")
        return due

    def _require_number(self, loss: float) -> None:
        spoiled = spoiled_layer(self.network)
        if not math.isfinite(loss) or spoiled:
            where = f" and the {spoiled} no number any more" if spoiled else ""
            text = f"is too high: the loss is {loss}{where}; start again with a lower one"
            raise WorkError(self.stages.rate_setting, self.highest_rate, text)

    def save(self, beside: Callable[[Path], None] | None = None) -> None:
        """Save everything that continuing needs, atomically.

        Args:
            beside: writes more into the folder that is being made.

        Raises:
            WorkError: the loss is no longer a number; the last good state stays.
        """
        if not self.team.leads:
            self._saved = time.monotonic()
            return
        self._require_number(float(self.loss_sum))
        optimiser, scalars = pack_optimiser(self.optimizer)
        network = {f"network.{name}": t.cpu().contiguous() for name, t in self.network.state_dict().items()}
        with replace_folder(self.folder.resume) as partial:
            (partial / "tensors.safetensors").write_bytes(safetensors.torch.save({**network, **optimiser}))
            state = {
                **self.stages.state_dict(),
                "images": {name: list(getattr(self.images, name)) for name in ("classes", "mean", "std")},
                "batches": self.batches,
                "best": self.best,
                "loss_sum": float(self.loss_sum),
                "rows": self.record.rows,
                "seconds": self._seconds_so_far(),
                "optimiser": scalars,
                "generators": generators(),
                "sha256": hashes_of(partial),
            }
            (partial / "state.json").write_text(json.dumps(state))
            if beside is not None:
                beside(partial)
        self._saved = time.monotonic()

    def restore(self) -> None:
        """Go back to the last saved state; a run that died before its first save starts again.

        Raises:
            UserError: the state is damaged, or of another network.
        """
        folder = self.folder.resume  # whole again since this trainer was made
        if not (folder / "state.json").is_file():
            return
        state = read_json(folder / "state.json", "resume")
        try:
            verify(folder, state["sha256"])
            require_same_images(state.get("images") or {}, self.images, self.folder.path)
            tensors = read_tensors(folder / "tensors.safetensors")
            had_spikes = self.stages.spiking
            self.stages.load_state_dict(state)
            if self.stages.spiking and not had_spikes:
                self.network = build(self.config, self.images, spiking=True)
            self.network.set_timesteps(self.stages.pruning.timesteps if self.stages.spiking else 1)
            self._begin(self.network)
            own = {n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")}
            load_into(self.network, own, folder)
            unpack_optimiser(self.optimizer, tensors, state["optimiser"])
            self.batches = int(state["batches"])
            self.best = None if state["best"] is None else float(state["best"])
            if not 0 <= self.batches <= self.stages.epochs * self.batches_per_epoch:
                raise ValueError("it has trained more batches than there are")
            if not self.stages.epochs and not self.finished:
                raise ValueError("it is in a stage that trains no epochs")
            self.loss_sum.fill_(float(state["loss_sum"]))
            self.record.restore(state["rows"])
            self.seconds = float(state["seconds"])
            restore_generators(state["generators"])
        except (LookupError, TypeError, ValueError, RuntimeError, OSError, AttributeError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError("resume", str(folder), f"cannot be continued ({reason}); {REMEDY}") from None

    def _request_stop(self) -> None:
        self.stop_requested = True
        self.record.note("stopping: saving the run (again to stop at once)")


@contextmanager
def _enough_images(accumulate: int) -> Iterator[None]:
    """Name what is wrong where batch norm has one image of one pixel to learn from."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        remedy = "leaves one image to a pass, too few for batch norm behind the last pool; lower it, or enlarge batches"
        raise WorkError("accumulate", accumulate, remedy) from None
