"""The trainer of classifiers: it learns, resumes bit for bit, and goes from ReLU to one timestep."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from spiking_rl import UserError, arithmetic, build_network, load_checkpoint, save_checkpoint
from spiking_rl.conversion import calibrate_spike_time
from spiking_rl.energy import accumulate_weights, macs_per_layer
from spiking_rl.errors import WorkError
from spiking_rl.networks import LayeredNetwork
from spiking_rl.neurons import LIF
from spiking_rl.runs import RunFolder
from spiking_rl.settings import read_settings
from spiking_rl.stopping import Interrupted
from spiking_rl.vision import continuing, predicting
from spiking_rl.vision.building import build
from spiking_rl.vision.config import ClassifyConfig, load_config, load_recipe, recipes, save_config
from spiking_rl.vision.continuing import change_run, convert_run, extend_run
from spiking_rl.vision.data import Dataset, normalise
from spiking_rl.vision.evaluation import check_predictions, evaluate, save_predictions
from spiking_rl.vision.feeding import Batch
from spiking_rl.vision.optimising import optimiser_of, rate_factor
from spiking_rl.vision.predicting import images_per_pass, predict
from spiking_rl.vision.training import Trainer

SMALL = ClassifyConfig(
    network="vgg6",
    width=1 / 32,
    timesteps=2,
    ann_epochs=2,
    epochs=2,
    prune_epochs=1,
    ann_batch_size=32,
    batch_size=32,
    firing_rate=0.2,
    surrogate_gamma=1.0,
    learning_rate=3e-3,
)
CPU = torch.device("cpu")


def stripes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy images ``(count, 3, 32, 32)`` of horizontal, vertical or diagonal stripes, and which they are."""
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=count)
    y, x = np.mgrid[:32, :32]
    phases = random.integers(8, size=(count, 1, 1))
    places = np.stack([y, x, x + y])[labels] + phases
    images = np.where(places % 8 < 4, 60, 190)[:, None] + random.normal(0, 25, (count, 3, 32, 32))
    return torch.as_tensor(images.clip(0, 255).astype(np.uint8)), torch.as_tensor(labels)


def dataset() -> Dataset:
    parts = [stripes(count, seed) for seed, count in enumerate((512, 128, 128))]
    flat = [tensor for part in parts for tensor in part]
    return Dataset(*flat, ["horizontal", "vertical", "diagonal"], (0.49,) * 3, (0.27,) * 3)


def new_run(path: Path, config: ClassifyConfig = SMALL) -> Trainer:
    folder = RunFolder(path)
    folder.create()
    save_config(folder.config, config, {})
    return Trainer(config, folder, dataset(), CPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Train one run from nothing to T=1; tests only read it."""
    trainer = new_run(tmp_path_factory.mktemp("runs") / "whole")
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def with_muon(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The same with Muon in both stages, and thresholds that follow T."""
    rates = {"ann_learning_rate": 0.2, "learning_rate": 0.1, "ann_weight_decay": 0.01, "weight_decay": 0.01}
    config = dataclasses.replace(SMALL, ann_optimizer="muon", optimizer="muon", rescale_thresholds=True, **rates)
    trainer = new_run(tmp_path_factory.mktemp("runs") / "muon", config)
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def with_rates(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The same, on firing rates first."""
    config = dataclasses.replace(SMALL, timesteps=4, prune_to=4, rate_epochs=2, epochs=1)
    trainer = new_run(tmp_path_factory.mktemp("runs") / "rates", config)
    trainer.run()
    return trainer


@pytest.mark.parametrize("trainer", ["whole", "with_muon"])
def test_a_classifier_learns_and_keeps_what_it_can_at_every_t(trainer: str, request: pytest.FixtureRequest) -> None:
    whole: Trainer = request.getfixturevalue(trainer)
    config = load_config(whole.folder.config)
    assert config == whole.config
    for timesteps in (None, 2, 1):
        row = evaluate(whole.folder, config, dataset(), timesteps, CPU)
        assert row["top1"] > 85, f"chance is 33 at T={timesteps}"
        assert row["timesteps"] == timesteps
        if timesteps is None:
            assert row["energy_ratio"] == 1
        else:
            assert all(0 < rate < 1 for rate in row["spike_rate"].values())
    stages = [(row["timesteps"], row["epoch"]) for row in whole.folder.read_progress()]
    assert stages == [(None, 1), (None, 2), (2, 1), (2, 2), (1, 1)]
    assert {p.name for p in whole.folder.checkpoints.iterdir()} == {"relu", "relu-end", "T2", "T2-end", "T1", "T1-end"}


@pytest.mark.parametrize(
    ("unbroken", "stop_at"),
    [
        *(("whole", update) for update in (5, 16, 20, 40, 70)),
        *(("with_muon", update) for update in (60, 70)),
        *(("with_rates", update) for update in (16, 40, 64, 70)),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    unbroken: str, request: pytest.FixtureRequest, tmp_path: Path, stop_at: int
) -> None:
    """In the first epoch and at its end, later in the ReLU network, on rates, with spikes, and at the lower T."""
    whole: Trainer = request.getfixturevalue(unbroken)
    trainer = new_run(tmp_path / "run", whole.config)
    updates = 0
    update = trainer._update

    def counted(batch: Batch | None, generator: torch.Generator) -> torch.Tensor | None:
        nonlocal updates
        updates += batch is not None
        trainer.stop_requested = updates == stop_at
        return update(batch, generator)

    trainer._update = counted  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.run()
    torch.manual_seed(stop_at)  # what others draw meanwhile does not matter
    again = Trainer(load_config(trainer.folder.config), trainer.folder, dataset(), CPU)
    again.restore()
    again.run()
    names = sorted(folder.name for folder in whole.folder.checkpoints.iterdir())
    assert names == sorted(folder.name for folder in again.folder.checkpoints.iterdir())
    for kept in names:
        mine, theirs = (load_checkpoint(t.folder.checkpoints / kept).tensors for t in (whole, again))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), kept
    scores = [[(row["score"], row["loss"]) for row in t.folder.read_progress()] for t in (whole, again)]
    assert scores[0] == scores[1]


def stopped_after(path: Path, updates: int, config: ClassifyConfig = SMALL) -> Trainer:
    """Return the trainer of a run that was asked to stop after so many updates, and is opened again."""
    trainer = new_run(path, config)
    update, made = trainer._update, 0

    def counted(batch: Batch | None, generator: torch.Generator) -> torch.Tensor | None:
        nonlocal made
        loss = update(batch, generator)
        made += loss is not None
        trainer.stop_requested = made >= updates
        return loss

    trainer._update = counted  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        trainer.run()
    return opened(trainer)


def opened(trainer: Trainer) -> Trainer:
    again = Trainer(load_config(trainer.folder.config), trainer.folder, dataset(), CPU)
    again.restore()
    return again


def test_stages_to_come_may_get_other_lengths(tmp_path: Path) -> None:
    """Changed in the ReLU stage, the run ends as one that began so."""
    longer = {"epochs": 1, "prune_epochs": 2}
    begun = new_run(tmp_path / "begun", dataclasses.replace(SMALL, **longer))
    begun.run()
    changed = stopped_after(tmp_path / "changed", 20)
    change_run(changed, longer)
    opened(changed).run()
    for name in ("relu", "T2", "T1-end"):
        mine, theirs = (load_checkpoint(t.folder.checkpoints / name).tensors for t in (begun, changed))
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert load_config(changed.folder.config) == begun.config


def test_the_stage_under_way_may_become_shorter_or_longer(tmp_path: Path) -> None:
    run = stopped_after(tmp_path / "run", 2 * 16 + 20)  # in the second epoch at T=2
    change_run(run, {"epochs": 4})
    told = read_settings(run.folder.config)["provenance"]["changes"]
    assert [line.partition(";")[0] for line in told] == ["epochs: 2 to 4, T=2 after 1.25 of 2 epochs"]
    again = opened(run)
    change_run(again, {"epochs": 3, "prune_epochs": 2, "threads": 1})
    told = read_settings(run.folder.config)["provenance"]["changes"]
    three = ("epochs: 4 to 3", "prune_epochs: 1 to 2", "threads: 0 to 1")
    assert [line.partition(";")[0] for line in told[1:]] == [f"{name}, T=2 after 1.25 of 4 epochs" for name in three]
    last = opened(again)
    last.run()
    rows = last.folder.read_progress()
    stages = [(row["timesteps"], row["epoch"]) for row in rows]
    assert stages == [(None, 1), (None, 2), (2, 1), (2, 2), (2, 3), (1, 1), (1, 2)]
    assert rows[3]["learning_rate"] == pytest.approx(SMALL.learning_rate * rate_factor(31 / 48, ())), "of three epochs"
    over = opened(last)
    with pytest.raises(UserError, match="prune_epochs = 3: cannot change where training is finished"):
        change_run(over, {"prune_epochs": 3})
    change_run(over, {"threads": 2})
    assert load_config(over.folder.config).threads == 2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Trainer]:
    """Stop a run after so many updates, once for all tests that leave it as it is."""

    @functools.cache
    def after(updates: int) -> Trainer:
        config = dataclasses.replace(SMALL, rate_epochs=1, epochs=3)
        return stopped_after(tmp_path_factory.mktemp("stopped") / "run", updates, config)

    return after


@pytest.mark.parametrize(
    ("updates", "changes", "words"),
    [
        (20, {"ann_epochs": 1}, r"ann_epochs = 1: 1\.25 epochs are trained"),
        (20, {"epochs": -1}, r"epochs = -1: must be 0 or positive"),
        (20, {"prune_epochs": 0}, r"prune_epochs = 0: must be at least 1"),
        (70, {"ann_epochs": 3}, r"ann_epochs = 3: that stage is over, or never was; keep 2"),
        (70, {"rate_epochs": 3}, r"rate_epochs = 3: that stage is over, or never was; keep 1"),
        (70, {"epochs": 0}, r"rate_epochs = 1: needs epochs on spikes"),
        (70, {"last_epochs": 2, "prune_epochs": 2}, r"prune_epochs = 2: no stage is left that it is for; keep 1"),
        (70, {"learning_rate": 0.1}, r"learning_rate = 0\.1: cannot change in a run under way"),
        (70, {"epochs": 4.5}, r"epochs = 4\.5: must be of type int"),
        (90, {"epochs": 1}, r"epochs = 1: the stage at T=2 has spent 2\.625 already"),
        (40, {"rate_epochs": 0}, r"rate_epochs = 0: 0\.5 epochs are trained"),
    ],
)
def test_a_length_that_cannot_be_changes_nothing(
    stopped: Callable[[int], Trainer], updates: int, changes: dict[str, int], words: str
) -> None:
    run = stopped(updates)
    before = run.folder.config.read_bytes(), run.stages.pruning.state_dict(), run.config
    with pytest.raises(UserError, match=words):
        change_run(run, changes)
    assert (run.folder.config.read_bytes(), run.stages.pruning.state_dict(), run.config) == before


def test_rates_come_before_spikes(with_rates: Trainer) -> None:
    rows = with_rates.folder.read_progress()
    stages = [(row["timesteps"], row["on_rates"], row["epoch"]) for row in rows]
    assert stages == [(None, 0, 1), (None, 0, 2), (4, 1, 1), (4, 1, 2), (4, 0, 1)]
    assert all(0 < row["spike_rate_layer1"] < 1 for row in rows[2:])
    names = {folder.name for folder in with_rates.folder.checkpoints.iterdir()}
    assert names == {"relu", "relu-end", "rates", "rates-end", "T4", "T4-end"}
    assert evaluate(with_rates.folder, with_rates.config, dataset(), 4, CPU)["top1"] > 85
    assert with_rates.folder.checkpoint_timesteps() == [4, None], "rates are no network to use"


def test_spikes_begin_where_rates_ended(with_rates: Trainer, tmp_path: Path) -> None:
    """Batch norm's statistics are measured on spikes: before any update the network knows what it knew on rates."""
    config = dataclasses.replace(with_rates.config, start_from=str(with_rates.folder.path))
    trainer = new_run(tmp_path / "run", config)
    assert trainer.stages.name == "rates"
    update = trainer._update
    found: list[float] = []

    def watched(batch: Batch | None, generator: torch.Generator) -> torch.Tensor | None:
        if trainer.stages.on_spikes and not found:
            images, labels = stripes(128, 3)
            predicted = predict(trainer.network, images, (0.49,) * 3, (0.27,) * 3)
            found.append(100 * float((predicted == labels).float().mean()))
            on_rates = load_checkpoint(trainer.folder.checkpoints / "rates").tensors
            own = trainer.network.state_dict()
            changed = {name for name in own if not torch.equal(own[name], on_rates[name])}
            assert changed
            assert all("running" in name or "num_batches" in name for name in changed)
            grown = [float((own[n] / on_rates[n]).median()) for n in own if n.endswith("running_var")]
            assert grown[0] == pytest.approx(1, abs=0.2), "an image lasts"
            assert grown[1] > 1.2, "single timesteps vary more than their mean"
        return update(batch, generator)

    trainer._update = watched  # type: ignore[method-assign]
    trainer.run()
    assert found[0] > 60, "chance is 33"


def test_the_last_stage_may_be_longer(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, timesteps=3, epochs=2, prune_epochs=1, last_epochs=4)
    assert new_run(tmp_path / "run", config).stages.pruning.remaining == 2 + 1 + 4


def test_step_by_step_gives_what_one_command_gives(whole: Trainer, tmp_path: Path) -> None:
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, epochs=0))
    trainer.run()
    assert trainer.folder.checkpoint_timesteps() == [None]
    with pytest.raises(UserError, match="see classify convert"):
        extend_run(trainer, 1, None)
    convert_run(trainer, 2, 2, SMALL.epochs)
    trainer.run()
    assert trainer.folder.checkpoint_timesteps() == [2, None]
    with pytest.raises(UserError, match="has spikes already"):
        convert_run(trainer, 2, 2, 1)
    extend_run(trainer, 1, None)
    trainer.run()
    tensors = [load_checkpoint(t.folder.checkpoint(1)).tensors for t in (whole, trainer)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_a_death_between_the_state_and_the_settings_loses_neither(
    whole: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, epochs=0))
    trainer.run()
    for change in (
        partial(convert_run, timesteps=2, prune_to=2, epochs=SMALL.epochs),
        partial(extend_run, to=1, epochs=1),
    ):
        before = trainer.folder.config.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(continuing, "settle", lambda folder: None)  # dead
            change(trainer)
        assert trainer.folder.config.read_bytes() == before
        for _ in range(2):  # once more: dead in the middle of that, too
            continuing.settle(trainer.folder)  # as who opens the run does
            trainer = opened(trainer)
        trainer.run()
    tensors = [load_checkpoint(t.folder.checkpoint(1)).tensors for t in (whole, trainer)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    told = read_settings(trainer.folder.config)["provenance"]["changes"]
    assert [line.partition(",")[0] for line in told] == ["prune_to: 1 to 2", "epochs: 0 to 2", "prune_to: 2 to 1"]


@pytest.mark.parametrize("changes", [{"fold_first": True, "firing_rate": None}, {"batch_norm": False}])
def test_the_papers_ways_of_starting_train_too(tmp_path: Path, changes: dict[str, object]) -> None:
    config = dataclasses.replace(SMALL, **changes, ann_learning_rate=0.05, prune_to=2, calibration_timesteps=5)  # type: ignore[arg-type]
    trainer = new_run(tmp_path / "run", config)
    trainer.run()
    scores = [row["score"] for row in trainer.folder.read_progress() if row["timesteps"] == 2]
    assert max(scores) > 60, "chance is 33"


def test_thresholds_and_leaks_stay_where_they_are_not_trained(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, ann_epochs=0, epochs=1, prune_to=2, train_threshold=False, train_leak=False)
    trainer = new_run(tmp_path / "run", config)
    before = [n.threshold.detach().clone() for n in trainer.network.neurons if isinstance(n, LIF)]
    weight = next(p for p in trainer.network.parameters() if p.dim() == 4).detach().clone()
    trainer.run()
    neurons = [n for n in trainer.network.neurons if isinstance(n, LIF)]
    assert all(torch.equal(old, n.threshold) for old, n in zip(before, neurons, strict=True))
    assert all(bool((n.leak == 1).all()) for n in neurons)
    assert not torch.equal(weight, next(p for p in trainer.network.parameters() if p.dim() == 4))


@pytest.mark.parametrize("follow", [True, False])
def test_thresholds_follow_t_where_they_are_told_to(whole: Trainer, tmp_path: Path, follow: bool) -> None:
    """From stage to stage, and from a checkpoint of another run at more timesteps."""
    plain = dataclasses.replace(SMALL, ann_epochs=0, epochs=1, train_threshold=False, rescale_thresholds=follow)
    trainer = new_run(tmp_path / "stages", plain)
    trainer.run()
    first, second = (load_checkpoint(trainer.folder.checkpoint(t)).tensors for t in (2, 1))
    names = [name for name in first if name.endswith("threshold")]
    changed = [float(second[name] / first[name]) for name in names]
    assert all(0.5 <= factor < 1 for factor in changed) if follow else set(changed) == {1.0}
    config = dataclasses.replace(plain, timesteps=1, start_from=str(whole.folder.checkpoint(2)))
    started = new_run(tmp_path / "started", config).network
    theirs = load_checkpoint(whole.folder.checkpoint(2)).tensors
    taken = [float(started.state_dict()[name] / theirs[name]) for name in names]
    assert started.timesteps == 1
    if follow:
        other = dataclasses.replace(config, encoding="hybrid")
        with pytest.raises(UserError, match=r"rescale_thresholds = True.*encoding"):
            new_run(tmp_path / "other", other)
    assert all(0.5 <= factor < 1.2 for factor in taken) and min(taken) < 0.9 if follow else set(taken) == {1.0}


def test_parts_of_a_batch_add_up_to_it(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, crop=0, flip=False, batch_norm=False, ann_epochs=0)
    grads = []
    for accumulate in (1, 4):
        trainer = new_run(tmp_path / str(accumulate), dataclasses.replace(config, accumulate=accumulate))
        generator = torch.Generator().manual_seed(0)
        trainer._update(next(trainer.feed.batches(0, generator, 32, 0)), generator)
        grads.append([p.grad for p in trainer.network.parameters() if p.grad is not None])
    for one, parts in zip(*grads, strict=True):
        torch.testing.assert_close(one, parts, rtol=1e-3, atol=1e-6)


def test_leaks_without_a_gradient_so_far_may_have_one_after_a_resume(tmp_path: Path) -> None:
    """At T=1 they have none; where several processes go on with the run, they add up zeros."""
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, ann_epochs=0, timesteps=1, optimizer="sgd"))
    generator = torch.Generator().manual_seed(0)
    batch = next(trainer.feed.batches(0, generator, 32, 0))
    trainer._update(batch, generator)
    trainer.save()
    again = Trainer(load_config(trainer.folder.config), trainer.folder, dataset(), CPU)
    again.restore()
    trainer._update(batch, torch.Generator().manual_seed(1))
    for parameter in again.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    zero_grad = again.optimizer.zero_grad
    again.optimizer.zero_grad = lambda: zero_grad(set_to_none=False)  # type: ignore[method-assign]
    again._update(batch, torch.Generator().manual_seed(1))
    for mine, theirs in zip(trainer.network.parameters(), again.network.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_learning_rate_follows_one_cycle_or_the_papers_milestones() -> None:
    assert rate_factor(0.0, ()) == pytest.approx(0.1)
    assert rate_factor(0.25, ()) == pytest.approx(1.0)
    assert rate_factor(1.0, ()) == pytest.approx(0.0, abs=1e-9)
    rising = [rate_factor(p, ()) for p in np.linspace(0, 0.25, 9)]
    falling = [rate_factor(p, ()) for p in np.linspace(0.25, 1, 9)]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    steps = [rate_factor(p, (0.6, 0.8, 0.9)) for p in (0, 0.59, 0.6, 0.85, 0.95)]
    assert steps == pytest.approx([1, 1, 0.2, 0.04, 0.008])


def test_a_predictions_file_is_counted_again(whole: Trainer, tmp_path: Path) -> None:
    images = dataset()
    row = evaluate(whole.folder, SMALL, images, 1, CPU)
    path = tmp_path / "predictions.json"
    save_predictions(path, [row], seed=0)
    (checked,) = check_predictions(path, images, "cifar10")
    assert checked["top1"] == row["top1"]
    for change, words in (
        ({"top1": row["top1"] + 1}, "claims"),
        ({"predicted": row["predicted"][1:]}, "has 127 classes for 128 images"),
        ({"predicted": [3, *row["predicted"][1:]]}, "outside 0 to 2"),
        ({"predicted": [[found] for found in row["predicted"]]}, "is damaged"),
        ({"timesteps": "1: 99.99 %, as claimed"}, "is damaged"),
    ):
        save_predictions(path, [{**row, **change}], seed=0)
        with pytest.raises(UserError, match=words):
            check_predictions(path, images, "cifar10")
    path.write_text('{"format": "spiking-rl predictions"}')
    with pytest.raises(UserError, match="is damaged"):
        check_predictions(path, images, "cifar10")
    path.write_text('{"format": "spiking-rl predictions", "rows": {}}')
    with pytest.raises(UserError, match="holds no rows"):
        check_predictions(path, images, "cifar10")
    save_predictions(path, [row], seed=0)
    with pytest.raises(UserError, match="is not that of"):
        check_predictions(path, images, "cifar100")


def test_a_damaged_state_is_refused(whole: Trainer, tmp_path: Path) -> None:
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, ann_epochs=1, epochs=0))
    trainer.run()
    weights = trainer.folder.resume / "tensors.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated or altered"):
        trainer.restore()


def test_a_state_in_a_stage_of_no_epochs_is_refused(whole: Trainer, tmp_path: Path) -> None:
    """As in a state of spikes that says it has none, of a run without a ReLU network."""
    shutil.copytree(whole.folder.path, tmp_path / "run")
    trainer = Trainer(dataclasses.replace(SMALL, ann_epochs=0), RunFolder(tmp_path / "run"), dataset(), CPU)
    state = tmp_path / "run/resume/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "spiking": False, "batches": 0}))
    with pytest.raises(UserError, match="cannot be continued"):
        trainer.restore()


def test_a_loss_that_is_no_number_ends_the_run_with_a_remedy(tmp_path: Path) -> None:
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, ann_learning_rate=1e38, batch_norm=False))
    with pytest.raises(UserError, match="ann_learning_rate = 1e"):
        trainer.run()


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_every_recipe_can_be_built(recipe: str) -> None:
    config = load_recipe(recipe)
    config.check()
    for name in ("vgg6", "resnet12"):
        small = dataclasses.replace(config, network=name, width=1 / 32)
        for spiking in (False, True):
            network = build(small, dataset(), spiking=spiking)
            assert network.spiking == spiking
            assert network.timesteps == (config.timesteps if spiking else 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0, "ann_epochs": 0}, "nothing to train"),
        ({"fold_first": True, "batch_norm": False, "firing_rate": None}, "nothing to fold"),
        ({"fold_first": True}, "firing_rate"),
        ({"milestones": (1.5,)}, "milestones"),
        ({"percentile": 0.0}, "percentile"),
        ({"leak": 1.5}, "leak"),
        ({"firing_rate": 1.0}, "firing_rate"),
        ({"dropout": 1.0}, "dropout"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"prune_to": 6}, "prune_to"),
        ({"rate_epochs": -1}, "rate_epochs"),
        ({"rate_epochs": 1, "epochs": 0}, "epochs on spikes"),
        ({"rate_epochs": 1, "timesteps": 1}, "at least 2 timesteps"),
        ({"rate_epochs": 1, "encoding": "hybrid"}, "direct encoding"),
        ({"rate_epochs": 1, "single_spike": True}, "single_spike"),
        ({"rate_epochs": 1, "fold_first": True, "firing_rate": None}, "fold_first"),
        ({"rate_epochs": 1, "batch_norm": False}, "batch_norm"),
    ],
)
def test_a_setting_that_cannot_work_is_named(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SMALL, **change).check()  # type: ignore[arg-type]


def test_bfloat16_trains_and_is_scored_in_float32(tmp_path: Path) -> None:
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, precision="bfloat16"))
    trainer.run()
    row = evaluate(trainer.folder, trainer.config, dataset(), 1, CPU)
    assert row["top1"] > 60
    kept = load_checkpoint(trainer.folder.checkpoints / "T1")
    assert {tensor.dtype for tensor in kept.tensors.values() if tensor.is_floating_point()} == {torch.float32}
    exact = new_run(tmp_path / "exact")
    exact.run()
    assert trainer.record.rows[0]["loss"] != exact.record.rows[0]["loss"]
    assert trainer.record.rows[0]["loss"] == pytest.approx(exact.record.rows[0]["loss"], rel=0.1)


@pytest.mark.parametrize(
    ("precision", "instructions", "told"),
    [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0), ("auto", False, 0)],
)
def test_an_arithmetic_that_is_emulated_is_told_of(
    precision: str, instructions: bool, told: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "has_bfloat16", lambda device: instructions)
    notes: list[str] = []
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, precision=precision))
    trainer.record.note = notes.append
    trainer.stop_requested = True
    with pytest.raises(Interrupted):
        trainer.run()
    assert sum("no instructions for bfloat16" in note and "--precision" in note for note in notes) == told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimizer": "muon"}, ["learning_rate is 0.001; for muon"]),
        ({"recipe": "muon", "optimizer": "adam"}, ["learning_rate is 0.02; for adam"]),
        (
            {"optimizer": "sgd", "ann_optimizer": "adam"},
            ["ann_learning_rate is 0.05; for adam", "learning_rate is 0.001"],
        ),
        ({"optimizer": "muon", "epochs": 0}, []),
        ({"ann_optimizer": "muon", "ann_epochs": 0}, []),
        ({"ann_optimizer": "adam", "ann_epochs": 0, "rate_epochs": 1}, ["ann_learning_rate is 0.05; for adam"]),
        *(
            ({"dataset": "imagenet", name: value}, ["mean nothing"])
            for name, value in (("crop", 0), ("cutout", 8), ("flip", False))
        ),
        ({"dataset": "imagenet"}, []),
        ({"cutout": 8}, []),
        ({"percentile": 99.7, "threshold_scale": 0.5}, ["percentile means", "threshold_scale means"]),
        ({"percentile": 99.7, "firing_rate": None}, []),
        ({"workers": 4}, ["workers means nothing for cifar10"]),
        ({"workers": 4, "dataset": "imagenet"}, []),
        ({"rescale_thresholds": True}, []),
        ({"spike_penalty": 1.0, "epochs": 0}, ["spike_penalty means nothing without epochs"]),
        ({"leak": 0.5}, []),
        ({"rescale_thresholds": True, "prune_to": 5}, ["rescale_thresholds means nothing"]),
        ({"rescale_thresholds": True, "prune_to": 5, "start_from": "runs/a/checkpoints/T5"}, []),
        *(({"recipe": name}, []) for name in sorted(recipes())),
    ],
)
def test_settings_that_do_not_go_together_are_told_of(changes: dict[str, object], told: list[str]) -> None:
    changes = dict(changes)
    config = load_recipe(str(changes.pop("recipe", "fast")))
    found = dataclasses.replace(config, **changes).unusual()  # type: ignore[arg-type]
    assert len(found) == len(told)
    assert all(
        words in line and ("see --" in line or "imagenet" in line) for words, line in zip(told, found, strict=True)
    )


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize(
    ("changes", "told"),
    [({"classes": ["a", "b", "c"]}, "classes"), ({"mean": (0.49, 0.49, 0.5)}, "mean"), ({"std": (0.3,) * 3}, "std")],
)
def test_a_network_of_other_images_is_none_to_start_from(
    whole: Trainer, tmp_path: Path, checkpoint: int | None, changes: dict[str, object], told: str
) -> None:
    folder = whole.folder.path if checkpoint is None else whole.folder.checkpoint(checkpoint)
    config = dataclasses.replace(SMALL, start_from=str(folder), distill=0.5)
    images = dataset()._replace(**changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"start_from = .*data = .*as .*{told}.* are not those"):
        Trainer(config, RunFolder(tmp_path), images, CPU)


@pytest.mark.parametrize("ann_epochs", [0, 1])
def test_a_colour_that_never_changes(tmp_path: Path, ann_epochs: int) -> None:
    config = dataclasses.replace(SMALL, ann_epochs=ann_epochs)
    images = dataset()._replace(std=(0.27, 0.0, 0.27))
    with pytest.raises(UserError, match=r"data = .*one that never changes cannot be standardised"):
        Trainer(config, RunFolder(tmp_path), images, CPU)


def test_spikes_start_from_another_run(whole: Trainer, tmp_path: Path) -> None:
    source = str(whole.folder.path)
    config = dataclasses.replace(SMALL, timesteps=1, prune_to=1, epochs=1, start_from=source, train_threshold=False)
    trainer = new_run(tmp_path / "run", config)
    relu = load_checkpoint(whole.folder.checkpoints / "relu").tensors
    own = trainer.network.state_dict()
    kernels = [name for name in own if own[name].dim() == 4]
    assert kernels
    for name in kernels:
        torch.testing.assert_close(own[name], relu[name], rtol=0, atol=0)
    thresholds = [n.threshold.detach().clone() for n in trainer.network.neurons if isinstance(n, LIF)]
    trainer.run()
    assert trainer.folder.checkpoint_timesteps() == [1, None]
    assert [row["timesteps"] for row in trainer.record.rows] == [1]
    theirs, ours = (f.checkpoint(None) for f in (whole.folder, trainer.folder))
    assert load_checkpoint(ours).config["sha256"] == load_checkpoint(theirs).config["sha256"]
    after = [n.threshold.detach() for n in trainer.network.neurons if isinstance(n, LIF)]
    assert all(torch.equal(a, b) for a, b in zip(thresholds, after, strict=True)), "they were not to be trained"
    # Once begun it needs its source no more, not even to learn from.
    gone = dataclasses.replace(config, start_from=str(tmp_path / "gone"), distill=0.5)
    again = Trainer(gone, trainer.folder, dataset(), CPU)
    again.restore()
    assert again.finished
    assert again.objective.teacher is not None
    with pytest.raises(UserError, match=r"start_from = .*holds no run"):
        new_run(tmp_path / "none", gone)
    with pytest.raises(UserError, match=r"start_from = .*width = 0.0625: is 0.03125 there"):
        new_run(tmp_path / "wide", dataclasses.replace(config, width=1 / 16))
    spikes_only = dataclasses.replace(config, start_from=str(trainer.folder.path))
    shutil.rmtree(ours)
    with pytest.raises(UserError, match="start_from = "):
        new_run(tmp_path / "no-relu", spikes_only)


@pytest.mark.parametrize("fold_first", [False, True])
def test_spikes_start_from_the_spikes_of_another_run(whole: Trainer, tmp_path: Path, fold_first: bool) -> None:
    """The network at T=1 goes on as it is; with more timesteps and another code it keeps all that it has learned."""
    source = whole.folder.checkpoint(1)
    first = {"timesteps": 1, "prune_to": 1, "epochs": 1, "ann_epochs": 0, "start_from": str(source)}
    config = dataclasses.replace(SMALL, **first, fold_first=fold_first, firing_rate=None)  # type: ignore[arg-type]
    trainer = new_run(tmp_path / "run", config)
    images = dataset().test_images
    theirs = whole.network.state_dict()
    for name, tensor in trainer.network.state_dict().items():
        if not fold_first or "threshold" in name or "leak" in name:
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    found, wanted = (predict(t.network, images, t.mean, t.std) for t in (trainer, whole))
    assert (found == wanted).float().mean() > 0.98, "folding rounds"
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in trainer.network.modules()) or not fold_first
    trainer.run()
    assert trainer.folder.checkpoint_timesteps() == [1, None], "the ReLU network is scored beside it"
    later = {**first, "timesteps": 2, "prune_to": 2, "encoding": "hybrid", "single_spike": True, "distill": 0.5}
    higher = new_run(tmp_path / "higher", dataclasses.replace(config, **later, leak=0.25))  # type: ignore[arg-type]
    assert higher.network.timesteps == 2
    assert {float(n.leak.detach()) for n in higher.network.neurons if isinstance(n, LIF)} == {0.25}
    assert higher.objective.teacher is not None
    higher.run()
    assert evaluate(higher.folder, higher.config, dataset(), 2, CPU)["top1"] > 60, "chance is 33"
    leaks = [float(n.leak.detach()) for n in higher.network.neurons if isinstance(n, LIF)]
    assert leaks != [0.25] * len(leaks), "they are trained"
    third = dataclasses.replace(higher.config, start_from=str(higher.folder.checkpoint(2)), leak=None)
    taken = new_run(tmp_path / "third", third).network
    best = load_checkpoint(higher.folder.checkpoint(2)).tensors
    assert all(torch.equal(tensor, best[name]) for name, tensor in taken.state_dict().items()), "leaks are taken over"
    # Once begun it needs its source no more.
    gone = dataclasses.replace(higher.config, start_from=str(tmp_path / "gone" / "checkpoints" / "T1"))
    again = Trainer(gone, higher.folder, dataset(), CPU)
    again.restore()
    assert again.finished
    assert again.objective.teacher is not None


def test_a_run_goes_on_without_the_one_it_started_from(whole: Trainer, tmp_path: Path) -> None:
    """Though it died between the two steps in which its state takes the place of the one before."""
    source = shutil.copytree(whole.folder.path, tmp_path / "source")
    config = dataclasses.replace(SMALL, start_from=str(source), epochs=1, timesteps=1, prune_to=1)
    trainer = new_run(tmp_path / "run", config)
    trainer._take_relu()
    trainer.save()
    shutil.rmtree(source)
    trainer.folder.resume.rename(trainer.folder.resume.with_name(".resume.ready"))
    again = Trainer(config, trainer.folder, dataset(), CPU)
    again.restore()
    again.run()
    assert again.finished


def test_of_large_images_fewer_are_scored_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(dataclasses.replace(SMALL, timesteps=5), dataset(), spiking=True)
    assert images_per_pass(network, (32, 32)) == 500
    assert images_per_pass(network, (224, 224)) == 10
    assert images_per_pass(network, (5000, 5000)) == 1
    sizes = []
    whole = type(network).forward
    monkeypatch.setattr(
        type(network), "forward", lambda self, x, **options: sizes.append(x.shape[1]) or whole(self, x, **options)
    )
    monkeypatch.setattr(predicting, "PIXELS", 5 * 32 * 32 * 50)
    found = predict(network, dataset().test_images, (0.49,) * 3, (0.27,) * 3)
    assert len(found) == 128
    assert sizes == [50, 50, 28]


def test_an_epoch_without_an_update_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it ends where some process or worker has no images at all: nobody may train without it."""
    trainer = new_run(tmp_path / "run")
    monkeypatch.setattr(trainer.feed, "batches", lambda *_: iter(()))
    with pytest.raises(WorkError, match="batch_size = 32: leaves no update in an epoch"):
        trainer.run()


def test_what_a_hand_has_spoiled_is_told(whole: Trainer, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(whole.folder.config.read_text().replace("\nbatch_size: 32", "\nbatch_size: 0"))
    with pytest.raises(UserError, match="batch_size = 0: must be at least 1"):
        load_config(path)


def test_percentiles_that_set_thresholds_for_another_code_are_told() -> None:
    plain = dataclasses.replace(SMALL, firing_rate=None)
    assert not plain.unusual()
    for change in ({"encoding": "hybrid"}, {"single_spike": True}, {"kappa": 0.5}):
        other = dataclasses.replace(plain, **change)  # type: ignore[arg-type]
        assert any("--firing-rate" in line for line in other.unusual())
        assert not dataclasses.replace(other, firing_rate=0.1).unusual()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_thresholds_and_leaks_of_channels_do_not_decay(optimizer: str) -> None:
    config = dataclasses.replace(SMALL, optimizer=optimizer, weight_decay=0.1)  # type: ignore[arg-type]
    network = build_network("vgg6", (3, 32, 32), 3, width=1 / 32, per_channel=True)
    made, _ = optimiser_of(network, config, CPU, spikes=True)
    decayed = {id(p) for group in made.param_groups if group["weight_decay"] for p in group["params"]}
    everything = {id(p) for group in made.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert id(parameter) in everything
        assert (id(parameter) in decayed) == (parameter.dim() > 1 and not name.startswith("neurons.")), name


def test_the_outputs_threshold_is_trained_with_the_others(tmp_path: Path) -> None:
    for train in (True, False):
        config = dataclasses.replace(SMALL, ann_epochs=0, kappa=0.5, train_threshold=train, distill=0.0)
        network = new_run(tmp_path / f"run{train}", config).network
        assert network.spike_time is not None
        assert network.spike_time.threshold.requires_grad is train


def test_a_run_from_spikes_says_that_it_sets_no_thresholds(whole: Trainer, tmp_path: Path) -> None:
    for source, silent in ((whole.folder.checkpoint(1), False), (whole.folder.path, True)):
        said: list[str] = []
        config = dataclasses.replace(SMALL, timesteps=1, prune_to=1, start_from=str(source))
        Trainer(config, RunFolder(tmp_path / "run"), dataset(), CPU, note=said.append)
        assert any("firing_rate" in line for line in said) is not silent


@pytest.mark.parametrize(
    ("checkpoint", "changes", "told"),
    [
        ("T9", {}, "holds no config.json"),
        ("relu", {}, "ReLU network; name its run"),
        ("T1", {"width": 1 / 16}, "width = 0.0625: is 0.03125 there"),
        ("T1", {"batch_norm": False}, "batch_norm = False: is True there"),
    ],
)
def test_a_checkpoint_that_cannot_be_started_from(
    whole: Trainer, tmp_path: Path, checkpoint: str, changes: dict[str, object], told: str
) -> None:
    source = str(whole.folder.checkpoints / checkpoint)
    config = dataclasses.replace(SMALL, start_from=source, **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"start_from = .*{told}"):
        new_run(tmp_path / "run", config)


def spiking_source(folder: Path, **changes: object) -> tuple[Path, LayeredNetwork]:
    """Write a checkpoint of a network that nobody has trained, with outputs and thresholds of its own."""
    config = dataclasses.replace(SMALL, ann_epochs=0, **changes)  # type: ignore[arg-type]
    trainer = new_run(folder, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.network.readout.parameters():
            parameter.normal_()
    if trainer.network.spike_time is not None:
        calibrate_spike_time(trainer.network, trainer._some_inputs())
    trainer._keep(trainer.stages.name, 0.0)
    return trainer.folder.checkpoint(config.timesteps), trainer.network


def outputs_of(network: LayeredNetwork) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network.eval()(normalise(dataset().test_images, (0.49,) * 3, (0.27,) * 3)[None])[0][0]
    return found


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_outputs_keep_their_scale_at_other_timesteps(tmp_path: Path, kappa: float) -> None:
    """Where neurons fire at most once, what the readout sums up is divided by T, and its bias is not."""
    once = {"single_spike": True, "kappa": kappa, "firing_rate": 0.2, "batch_norm": False}
    source, network = spiking_source(tmp_path / "source", timesteps=1, prune_to=1, **once)
    wanted = outputs_of(network)
    # With a leak of 0 currents are what they were, a neuron fires at the first timestep or never, and without biases
    # nothing comes after it.
    later = {"timesteps": 3, "prune_to": 3, "encoding": "direct", "leak": 0.0, "start_from": str(source), **once}
    higher = new_run(tmp_path / "higher", dataclasses.replace(SMALL, **later)).network  # type: ignore[arg-type]
    if not kappa:
        torch.testing.assert_close(outputs_of(higher), wanted, rtol=1e-4, atol=1e-4)
    weight, bias = network.readout.weight, network.readout.bias  # type: ignore[union-attr]
    torch.testing.assert_close(higher.readout.weight, 3 * weight)  # type: ignore[union-attr]
    torch.testing.assert_close(higher.readout.bias, bias)  # type: ignore[union-attr]
    if kappa:
        assert higher.spike_time is not None
        assert network.spike_time is not None
        torch.testing.assert_close(higher.spike_time.threshold, 3 * network.spike_time.threshold)


def test_outputs_of_neurons_that_fire_again_are_means_and_keep_their_scale(tmp_path: Path) -> None:
    source, network = spiking_source(tmp_path / "source", timesteps=2, prune_to=2)
    for single in (False, True):
        config = dataclasses.replace(SMALL, timesteps=4, prune_to=4, single_spike=single, start_from=str(source))
        taken = new_run(tmp_path / f"taken-{single}", config).network
        torch.testing.assert_close(taken.readout.weight, network.readout.weight)


def test_outputs_get_a_threshold_where_they_had_none(whole: Trainer, tmp_path: Path) -> None:
    later = {"timesteps": 2, "prune_to": 2, "kappa": 0.5, "start_from": str(whole.folder.checkpoint(1))}
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, **later))  # type: ignore[arg-type]
    network = trainer.network
    assert network.spike_time is not None
    network.eval()
    winners = network.currents(trainer._some_inputs()[None]).sum(0).amax(1).mean()
    assert float(network.spike_time.threshold.detach()) == pytest.approx(float(winners.detach()) / 2, rel=1e-4)


@pytest.mark.parametrize("timesteps", [0, -1, "x", [1], True, 2.5])
def test_absurd_timesteps_of_a_checkpoint_are_one_line(tmp_path: Path, timesteps: object) -> None:
    source, _ = spiking_source(tmp_path / "source", timesteps=1, prune_to=1)
    tensors, about = load_checkpoint(source)
    save_checkpoint(source, tensors, {**about, "timesteps": timesteps})
    with pytest.raises(UserError, match=r"start_from = .*timesteps = "):
        new_run(tmp_path / "run", dataclasses.replace(SMALL, start_from=str(source), single_spike=True))


def test_a_source_without_a_relu_network_teaches_nobody(tmp_path: Path) -> None:
    source, _ = spiking_source(tmp_path / "source", timesteps=1, prune_to=1)
    config = dataclasses.replace(SMALL, start_from=str(source), distill=0.5)
    with pytest.raises(UserError, match=r"distill = 0.5: .*has none; 0 without one"):
        new_run(tmp_path / "run", config)
    new_run(tmp_path / "alone", dataclasses.replace(config, distill=0.0))


def test_a_checkpoint_is_found_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = spiking_source(tmp_path / "source", timesteps=1, prune_to=1)
    (tmp_path / "best").symlink_to(source)
    (source.parent / "T5").mkdir()
    monkeypatch.chdir(source)
    for i, name in enumerate((str(source) + "/", str(tmp_path / "best"), str(source.parent / "T5/../T1"), ".")):
        new_run(tmp_path / f"run-{i}", dataclasses.replace(SMALL, start_from=name))


def test_a_folded_network_stays_folded(whole: Trainer, tmp_path: Path) -> None:
    first = dataclasses.replace(SMALL, timesteps=1, prune_to=1, epochs=1, firing_rate=None, fold_first=True)
    run = new_run(tmp_path / "run", dataclasses.replace(first, start_from=str(whole.folder.checkpoint(1))))
    run.run()
    source = str(run.folder.checkpoint(1))
    again = new_run(tmp_path / "again", dataclasses.replace(first, start_from=source)).network.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in load_checkpoint(source).tensors.items())
    with pytest.raises(UserError, match="fold_first = False: is True there"):
        new_run(tmp_path / "not", dataclasses.replace(first, fold_first=False, start_from=source))


def test_a_score_comes_with_its_cost(whole: Trainer) -> None:
    relu, two, one = (evaluate(whole.folder, whole.config, dataset(), t, CPU) for t in (None, 2, 1))
    assert relu["energy_ratio"] == relu["energy_ratio_int32"] == 1
    assert relu["accumulates_per_mac"] is None
    assert relu["membrane_traffic"] == one["membrane_traffic"] == 0
    neurons = sum(math.prod(shape) for shape in whole.network.neuron_shapes())
    assert two["membrane_traffic"] == 2 * 2 * neurons
    for row in (two, one):
        # All of the first layer, and of the others one addition per spike: the energy told by hand.
        network = build(whole.config, dataset(), spiking=True)
        first, *later = macs_per_layer(network)
        for mac, accumulate, name in ((4.6, 0.9, "energy_ratio"), (3.2, 0.1, "energy_ratio_int32")):
            spikes = row["accumulates_per_mac"] * sum(later)
            assert row[name] == pytest.approx((first + sum(later)) * mac / (first * mac + spikes * accumulate))
        assert row["macs"] == first + sum(later)
        # These pools are averages: their additions, up to four times as many, are not in the papers' count.
        assert row["energy_ratio"] < row["energy_ratio_of_rates"] < 4 * row["energy_ratio"]
    assert 0 < one["image_ms"] < 1000
    assert 0 < one["deployed_ms"] < 1000


def test_the_cost_of_every_epoch_is_kept_and_told(tmp_path: Path) -> None:
    told: list[str] = []
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, ann_epochs=1, rate_epochs=1, epochs=1))
    trainer.record.note = told.append
    trainer.run()
    relu, *spiking = trainer.folder.read_progress()
    assert relu["energy_ratio"] == 1
    assert relu["accumulates_per_mac"] is None
    assert [row["timesteps"] for row in spiking] == [2, 2, 1], "on rates, on spikes, pruned"
    for row in spiking:
        network = build(trainer.config, dataset(), spiking=True)
        network.set_timesteps(row["timesteps"])
        first, *later = macs_per_layer(network)
        weights = accumulate_weights(network)
        added = row["timesteps"] * sum(weight * row[f"spike_rate_{name}"] for name, weight in weights.items())
        assert row["accumulates_per_mac"] == pytest.approx(added)
        energy = first * 4.6 + added * sum(later) * 0.9
        assert row["energy_ratio"] == pytest.approx((first + sum(later)) * 4.6 / energy)
        assert any(f"energy={row['energy_ratio']:.1f}x less" in line for line in told)


def test_a_bar_shows_how_far_an_epoch_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, ann_epochs=1, epochs=0))
    trainer.record.shown = True
    trainer.run()
    shown = capsys.readouterr().err
    assert "ReLU epoch 1/1" in shown
    assert "/16 [" in shown


@pytest.mark.parametrize("shown", [True, False])
def test_a_long_epoch_tells_how_far_it_is_where_no_bar_does(tmp_path: Path, shown: bool) -> None:
    told: list[str] = []
    trainer = new_run(tmp_path / "run", dataclasses.replace(SMALL, ann_epochs=1, epochs=0, save_every=1e-9))
    trainer.record.note, trainer.record.shown = told.append, shown
    trainer.run()
    within = [line for line in told if " batch " in line]
    assert len(within) == (0 if shown else 15), "one per save, and none at the end of the epoch"
    if not shown:
        assert re.fullmatch(r"ReLU epoch 1/1  batch 3/16  loss=[\d.]+  0 min to go in this epoch", within[2])


@pytest.mark.parametrize("own", [True, False])
def test_spikes_learn_from_the_relu_network_where_labels_say_nothing(whole: Trainer, tmp_path: Path, own: bool) -> None:
    """With labels at random in the spiking stage all that can be learned is what the ReLU network knows."""
    config = dataclasses.replace(SMALL, distill=1.0, prune_to=2)
    if own:
        trainer = new_run(tmp_path / "run", dataclasses.replace(config, epochs=0))
        trainer.run()
        convert_run(trainer, 2, 2, 3)
    else:
        trainer = new_run(tmp_path / "run", dataclasses.replace(config, start_from=str(whole.folder.path), epochs=3))
    images = trainer.images
    assert isinstance(images, Dataset)
    labels = images.train_labels
    labels.copy_(labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))])
    trainer.run()
    trainer.network.eval()
    found = predict(trainer.network, images.test_images, images.mean, images.std)
    assert float((found == images.test_labels).float().mean()) > 0.8, "chance is 0.33"


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(UserError, match=r"distill = 0\.5: needs a ReLU network"):
        dataclasses.replace(SMALL, distill=0.5, ann_epochs=0).check()
    with pytest.raises(UserError, match=r"distill = 1\.5"):
        dataclasses.replace(SMALL, distill=1.5).check()


def test_a_penalty_leaves_fewer_spikes(whole: Trainer, tmp_path: Path) -> None:
    counted = []
    for penalty in (0.0, 10.0):
        config = dataclasses.replace(SMALL, start_from=str(whole.folder.path), spike_penalty=penalty)
        trainer = new_run(tmp_path / str(penalty), config)
        trainer.run()
        counted.append(evaluate(trainer.folder, config, dataset(), 2, CPU)["accumulates_per_mac"])
    assert counted[1] < 0.75 * counted[0]
    with pytest.raises(UserError, match="spike_penalty = -1"):
        dataclasses.replace(SMALL, spike_penalty=-1.0).check()
