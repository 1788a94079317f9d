"""Run folders that strangers made: settings, training states, tables and results, shown or continued or refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import SMALL
from hostile import ABSURD, bounded, changed, clear, damaged, few, places
from hypothesis import given
from hypothesis import strategies as st

from spiking_rl import UserError, save_checkpoint
from spiking_rl.agents.building import build_model
from spiking_rl.agents.config import load_config, load_recipe, recipes, save_config
from spiking_rl.agents.resume import load_training_state
from spiking_rl.agents.session import TrainingSession
from spiking_rl.agents.training import replace_settings, start_run
from spiking_rl.checkpoint import read_json
from spiking_rl.runs import RunFolder
from spiking_rl.scripts import inspection
from spiking_rl.scripts.page import page
from spiking_rl.scripts.plot import draw_run
from spiking_rl.scripts.report import control_rows, read_facts
from spiking_rl.settings import read_yaml
from spiking_rl.state import hashes_of
from spiking_rl.vision import config as vision
from spiking_rl.vision.building import build, facts_of
from spiking_rl.vision.config import ClassifyConfig
from spiking_rl.vision.data.datasets import Dataset
from spiking_rl.vision.evaluation import check_predictions
from spiking_rl.vision.training import Trainer

TINY = {**SMALL, "hidden": (8, 8), "num_envs": 2, "agent_steps": 600, "prune_steps": 128, "save_every": 128}
RUNS = {
    "pqn": {"n_minibatches": 1, "stateful": True},
    "dqn": {"learning_starts": 256, "buffer_size": 512},
    "dqn, stateful": {"learning_starts": 256, "buffer_size": 512, "stateful": True, "burn_in": 2, "sequence_length": 4},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train agents that end in the middle of their second stage, and make a classifier's run without training."""
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in RUNS.items():
        config = replace_settings(load_recipe("cartpole", name.split(",")[0])[1], {**TINY, **settings})
        start_run(config, RunFolder(folder / name), device="cpu").run()
    classifier(folder / "classifier")
    return folder


def classifier(folder: Path) -> None:
    config = ClassifyConfig(network="vgg6", dataset="cifar10", width=1 / 32, timesteps=2)
    about = {"kind": "classifier", "network": "vgg6", "timesteps": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
    about["classes"] = [f"class {k}" for k in range(10)]
    network = build(config, facts_of(config, about, folder), spiking=True)
    save_checkpoint(folder / "checkpoints" / "T2", network.state_dict(), about)
    vision.save_config(folder / "config.yaml", config, {})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spiking_rl.checkpoint.time.sleep", lambda seconds: None)


TRICKS = [
    "a: !!python/object/apply:os.system ['touch was-run']\n",
    "a: &a [1, 1]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: [*c, *c, *c, *c]\n",
    "a: &a\n  <<: *a\n",
    "timesteps: !!bool maybe\n",
    "timesteps: !!int five\n",
    "timesteps: !!timestamp soon\n",
    "timesteps: 2026-99-99\n",
    "timesteps: " + "9" * 5000 + "\n",
    "[" * 5000,
    "{" * 5000,
    "? [1]\n: 2\n",
    "algo: pqn\nalgo: dqn\n",
    "hidden: !!binary Zm9v\n",
    "%YAML 9.9\n---\n",
    "a: \x00",
    "- " * 3000,
    "'" * 60_000,
    "x: 1\n" * 13_000,
]


def _read_settings(path: Path) -> None:
    """Read as agents' and classifiers' commands do; what is read must be checked without another error."""
    for read in (load_config, vision.load_config):
        with bounded():
            try:
                read(path).check()
            except UserError as error:
                clear(error)


@pytest.mark.parametrize("text", TRICKS, ids=range(len(TRICKS)))
def test_tricks_that_yaml_knows(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    for own in ("", (runs / "pqn" / "config.yaml").read_text(), (runs / "classifier" / "config.yaml").read_text()):
        (tmp_path / "config.yaml").write_text(own + text)
        _read_settings(tmp_path / "config.yaml")
    assert not (tmp_path / "was-run").exists()


@few
@given(st.data())
def test_damaged_settings(runs: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("case") / "config.yaml"
    raw = (runs / data.draw(st.sampled_from(["pqn", "dqn", "classifier"])) / "config.yaml").read_bytes()
    path.write_bytes(damaged(data, raw))
    _read_settings(path)


@few
@given(st.data())
def test_damaged_recipes(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """As if a recipe of the package, or one that somebody contributes, were damaged or absurd."""
    folder = Path(str(resources.files("spiking_rl.agents"))) / "recipes"
    path = data.draw(st.sampled_from(sorted(folder.glob("*.yaml"))))
    if data.draw(st.booleans()):
        text = damaged(data, path.read_bytes()).decode(errors="replace")
    else:
        values = yaml.safe_load(path.read_text())
        place = data.draw(st.sampled_from(list(places(values))))
        text = yaml.safe_dump(changed(values, place, data.draw(st.sampled_from(ABSURD))))
    with bounded(), pytest.MonkeyPatch.context() as patch:
        try:
            found = {**recipes(), path.stem: read_yaml(text, path.stem)}
            patch.setattr("spiking_rl.agents.config.recipes", lambda: found)
            load_recipe("CartPole-v1" if path.stem == "default" else path.stem)[1].check()
        except UserError as error:
            clear(error)


@few
@given(st.data())
def test_an_absurd_classifier(runs: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("case") / "run"
    shutil.copytree(runs / "classifier", folder)
    path = folder / data.draw(st.sampled_from(["config.yaml", "checkpoints/T2/config.json"]))
    values = yaml.safe_load(path.read_text())
    values = changed(values, data.draw(st.sampled_from(list(places(values)))), data.draw(st.sampled_from(ABSURD)))
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    with bounded(), contextlib.redirect_stdout(io.StringIO()):
        try:
            inspection.run([str(folder)])
        except UserError as error:
            clear(error)


def tamper(data: Any, folder: Path) -> None:
    """Change something in a training state, and fit the hashes, as whoever tampers can."""
    state = json.loads((folder / "state.json").read_text())
    what = data.draw(st.sampled_from(["state", "state", "array", "tensors", "bytes"]))
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "state.json")
    arrays = [p for p in files if p.suffix == ".npy"]
    if what == "state":
        # The random generators' thousands of numbers would be hit nearly always.
        found = [p for p in places(state) if not (p[0] == "generators" and len(p) > 2)]
        state = changed(state, data.draw(st.sampled_from(found)), data.draw(st.sampled_from(ABSURD)))
    elif what == "array" and arrays:
        path = data.draw(st.sampled_from(arrays))
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        kind = data.draw(st.sampled_from(["f4", "f8", "i8", "?", "u1", "c8", "U3", "M8[s]"]))
        np.save(path, np.zeros(shape, kind))
    elif what == "tensors":
        path = folder / "tensors.safetensors"
        tensors = safetensors.torch.load(path.read_bytes())
        key = data.draw(st.sampled_from(sorted(tensors)))
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        wrong = [None, torch.zeros(shape), torch.full(shape, torch.nan), torch.ones(shape).long()]
        wrong += [torch.full_like(tensors[key], torch.nan, dtype=torch.float32), tensors[key].to(torch.complex64)]
        wrong += [tensors[key].half()]
        new = data.draw(st.sampled_from(wrong))
        tensors = {k: v for k, v in tensors.items() if k != key} | ({} if new is None else {key: new})
        path.write_bytes(safetensors.torch.save(tensors))
    else:
        path = data.draw(st.sampled_from(files))
        path.write_bytes(damaged(data, path.read_bytes()))
    (folder / "state.json").unlink()
    if what != "state":
        state["sha256"] = hashes_of(folder)
    (folder / "state.json").write_text(json.dumps(state))


@few
@given(st.data())
def test_a_training_state_that_was_tampered_with(
    runs: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Refused, or gone on with."""
    name = data.draw(st.sampled_from(sorted(RUNS)))
    folder = tmp_path_factory.mktemp("case") / "resume"
    shutil.copytree(runs / name / "resume", folder)
    tamper(data, folder)
    config = load_config(runs / name / "config.yaml")
    session = TrainingSession(config, RunFolder(folder.parent), build_model(config, "cpu"))
    with bounded():
        try:
            session.restore()
            session.model.learn(96, reset_num_timesteps=False)
            assert session.pruning.finished or session.pruning.report(1.0, 1.0)
        except UserError as error:
            clear(error)


SMALL_CLASSIFIER = ClassifyConfig(
    network="vgg6", dataset="folder", width=1 / 32, timesteps=2, epochs=1, prune_epochs=1, threads=1
)


def trainer_in(path: Path, optimizer: str) -> Trainer:
    """Return a classifier's trainer, of a ReLU network (sgd) or of spikes from the start (adam), on 64 images."""
    folder = RunFolder(path)
    folder.path.mkdir(exist_ok=True)
    config = replace(SMALL_CLASSIFIER, ann_epochs=2 if optimizer == "sgd" else 0, ann_batch_size=32, batch_size=32)
    if optimizer == "sgd":
        config = replace(config, epochs=0)
    pixels = torch.arange(64 * 3072).reshape(64, 3, 32, 32).mul(7).remainder(256).to(torch.uint8)
    labels = torch.arange(64) % 2
    parts = (pixels, labels, pixels[:8], labels[:8], pixels[:8], labels[:8])
    return Trainer(config, folder, Dataset(*parts, ["a", "b"], (0.5,) * 3, (0.3,) * 3), torch.device("cpu"))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stop classifiers after their first epoch."""
    folder = tmp_path_factory.mktemp("classifiers")
    for optimizer in ("sgd", "adam"):
        trainer = trainer_in(folder / optimizer, optimizer)
        trainer.team.alike(trainer.network)
        trainer._epoch()
    return folder


@few
@given(st.data())
def test_a_classifiers_state_that_was_tampered_with(
    classifiers: Path, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    optimizer = data.draw(st.sampled_from(["sgd", "adam"]))
    folder = tmp_path_factory.mktemp("case") / "run"
    shutil.copytree(classifiers / optimizer, folder)
    tamper(data, folder / "resume")
    with bounded():
        try:
            trainer = trainer_in(folder, optimizer)
            trainer.restore()
            if not trainer.finished:
                trainer._epoch()
        except UserError as error:
            clear(error)


@pytest.mark.parametrize("rows", ["lif", ["lif"], None, [[]]])
def test_a_classifiers_rows_that_are_none(classifiers: Path, tmp_path: Path, rows: object) -> None:
    shutil.copytree(classifiers / "adam", tmp_path / "run")
    path = tmp_path / "run" / "resume" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": rows}))
    with pytest.raises(UserError, match="its rows are no rows of a table"):
        trainer_in(tmp_path / "run", "adam").restore()


RESULTS = {
    "command": "spiking-rl train cartpole",
    "date": "2026-11-24",
    "versions": {"torch": "2.13.0"},
    "rows": [
        {
            **{"timesteps": timesteps, "mean_return": 100.0, "ci95": 1.5, "end_return": 99.0, "top1": 61.5},
            **{"episodes": 10, "distinct_episodes": 10, "agent_steps": 500, "energy_ratio": 3.5, "decision_ms": 0.5},
            **{"spike_rate": {"layer1": 0.2, "layer2": 0.1}, "images": 100, "energy_ratio_int32": 9.0},
            **{"also": [{"environment": "CartPole-v1", "mean_return": 1.0, "ci95": 0.5}]},
        }
        for timesteps in (2, 1, None)
    ],
}


@few
@given(st.data())
def test_absurd_results_and_progress(runs: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("case") / "run")
    folder.path.mkdir()
    shutil.copy(runs / data.draw(st.sampled_from(["pqn", "classifier"])) / "config.yaml", folder.path)
    shutil.copy(runs / "pqn" / "progress.csv", folder.path)
    results: Any = RESULTS
    what = data.draw(st.sampled_from(["results", "bytes", "progress", "cell", "settings"]))
    if what == "results":
        place = data.draw(st.sampled_from(list(places(RESULTS))))
        results = changed(RESULTS, place, data.draw(st.sampled_from(ABSURD)))
    folder.results.write_text(json.dumps(results))
    if what == "bytes":
        folder.results.write_bytes(damaged(data, folder.results.read_bytes()))
    elif what == "progress":
        folder.progress.write_bytes(damaged(data, folder.progress.read_bytes()))
    elif what == "cell":
        lines = [line.split(",") for line in folder.progress.read_text().splitlines()]
        line = data.draw(st.sampled_from(lines))
        line[data.draw(st.integers(0, len(line) - 1))] = str(data.draw(st.sampled_from(ABSURD)))[:1000]
        folder.progress.write_text("\n".join(",".join(line) for line in lines) + "\n")
    elif what == "settings":
        values = yaml.safe_load(folder.config.read_text())
        place = data.draw(st.sampled_from(list(places(values))))
        folder.config.write_text(yaml.safe_dump(changed(values, place, data.draw(st.sampled_from(ABSURD)))))
    for show in (lambda: page(read_facts(folder)), lambda: control_rows(folder)):
        with bounded():
            try:
                show()
            except UserError as error:
                clear(error)
    if data.draw(st.integers(0, 9)) == 0:  # figures take their time
        try:
            draw_run(folder)
        except UserError as error:
            clear(error)


@few
@given(st.data())
def test_absurd_predictions(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("case") / "predictions.json"
    row = {"dataset": "cifar10", "timesteps": 1, "top1": 100.0, "sha256": "00", "predicted": [0, 1, 2, 3]}
    content: Any = {"format": "spiking-rl predictions", "rows": [row]}
    if data.draw(st.booleans()):
        place = data.draw(st.sampled_from(list(places(content))))
        content = changed(content, place, data.draw(st.sampled_from(ABSURD)))
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(damaged(data, json.dumps(content).encode()))
    none = torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    labels, rest = torch.arange(4), (["a", "b", "c", "d"], (0.5,) * 3, (0.5,) * 3)
    images = Dataset(none, labels[:0], none, labels[:0], none, labels, *rest)
    with bounded():
        try:
            checked = check_predictions(path, images, "cifar10")
        except UserError as error:
            clear(error)
            return
    assert all(row["top1"] == row["claimed"] for row in checked)


def test_json_without_end(tmp_path: Path) -> None:
    for text in (
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": ' + "9" * 10_000 + "}",
        '{"a": "' + "x" * (17 * 2**20) + '"}',
    ):
        (tmp_path / "results.json").write_text(text)
        with bounded(), pytest.raises(UserError):
            read_json(tmp_path / "results.json")


def test_what_was_not_touched_goes_on(runs: Path, tmp_path: Path) -> None:
    for name in RUNS:
        model = build_model(load_config(runs / name / "config.yaml"), "cpu")
        assert load_training_state(runs / name / "resume", model)["rows"]
        model.learn(96, reset_num_timesteps=False)
    with contextlib.redirect_stdout(io.StringIO()):
        assert inspection.run([str(runs / "classifier")])["timesteps"] == 2
    shutil.copytree(runs / "pqn", tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    folder.results.write_text(json.dumps(RESULTS))
    assert "T=2" in page(read_facts(folder))
    assert len(control_rows(folder)) == 3
    assert draw_run(folder)
    save_config(folder.config, load_config(folder.config), {})
