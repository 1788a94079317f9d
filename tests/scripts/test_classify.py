"""spiking-rl classify, through the real command line on small images."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from conftest import Cli, as_flags, copy_run, curves_of, last_json, write_shades
from test_report import needs_browser, on_a_phone

from spiking_rl import load_checkpoint
from spiking_rl.runs import RunFolder
from spiking_rl.vision.building import load_classifier
from spiking_rl.vision.config import load_config
from spiking_rl.vision.data import load_dataset, normalise

SMALL = {
    "width": 0.03125,
    "timesteps": 2,
    "ann_epochs": 3,
    "epochs": 2,
    "prune_epochs": 4,
    "learning_rate": 0.003,
    "ann_optimizer": "adam",
    "ann_learning_rate": 0.003,
    "ann_batch_size": 8,
    "batch_size": 8,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write dark and light images, sorted into a folder per class."""
    return write_shades(tmp_path_factory.mktemp("images"), {"train": 160, "test": 20})


@pytest.fixture(scope="module")
def finished(cli: Cli, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    run = tmp_path_factory.mktemp("runs") / "shades"
    done = cli("classify", "train", "vgg6", "folder", "--data", data, *as_flags(SMALL), "--run", run, "--json")
    assert done.returncode == 0, done.stderr
    return run, last_json(done.stdout)


def test_one_command_trains_prunes_and_scores(finished: tuple[Path, dict[str, object]]) -> None:
    run, printed = finished
    results = json.loads((run / "results.json").read_text())
    assert printed["rows"] == results["rows"]
    assert [row["timesteps"] for row in results["rows"]] == [2, 1, None]
    assert all(row["top1"] > 90 for row in results["rows"]), results
    assert set(results["rows"][0]) >= {"dataset", "network", "timesteps", "top1", "spike_rate", "energy_ratio"}
    assert results["rows"][0]["images"] == 40
    for name in (
        "config.yaml",
        "progress.csv",
        "figures/learning_curve.png",
        "figures/timesteps.png",
        "resume/state.json",
        "checkpoints/T1/model.safetensors",
    ):
        assert (run / name).stat().st_size > 0


def test_tensorboard_has_the_curves_of_the_run(finished: tuple[Path, dict[str, object]]) -> None:
    run, _ = finished
    rows = dict(enumerate(RunFolder(run).read_progress(), 1))
    tags = {"score": "val/accuracy", "loss": "train/loss", "learning_rate": "train/learning_rate"}
    expected = {tag: {step: row[column] for step, row in rows.items()} for column, tag in tags.items()}
    tags = {"energy_ratio": "val/energy_ratio", "accumulates_per_mac": "val/accumulates_per_mac"}
    for i in range(1, 6):
        tags |= {f"spike_rate_layer{i}": f"spikes/layer{i}"}
        tags |= {f"{quantity}_layer{i}": f"{quantity}/layer{i}" for quantity in ("threshold", "leak")}
    spiking = {step: row for step, row in rows.items() if row["timesteps"]}
    assert len(rows) > len(spiking) > 1
    expected |= {tag: {step: row[column] for step, row in spiking.items()} for column, tag in tags.items()}
    found = curves_of(run)
    assert set(found) == set(expected)
    for tag, curve in expected.items():
        assert found[tag] == pytest.approx(curve, rel=1e-6), tag


@pytest.mark.parametrize("which", ["T1", "relu"])
def test_a_classifier_becomes_an_onnx_model_of_raw_images(
    finished: tuple[Path, dict[str, object]], cli: Cli, data: Path, tmp_path: Path, which: str
) -> None:
    run, _ = finished
    path = tmp_path / "classifier.onnx"
    done = cli("export", run / "checkpoints" / which, "--format", "onnx", "--output", path, "--json")
    assert done.returncode == 0, done.stderr
    assert (last_json(done.stdout)["inputs"], last_json(done.stdout)["outputs"]) == (["image"], ["logits"])
    config, images = load_config(run / "config.yaml"), load_dataset("folder", data, size=32)
    network = load_classifier(run / "checkpoints" / which, config, images)
    with torch.no_grad():
        inputs = normalise(images.test_images, images.mean, images.std)
        expected = network(inputs.unsqueeze(0))[0][0].numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images.test_images.numpy()})
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert len(np.unique(logits.argmax(1))) == 2
    (stored,) = [prop for prop in onnx.load(path).metadata_props if prop.key == "classes"]
    assert json.loads(stored.value) == ["dark", "light"]


def test_a_score_is_evaluated_again_and_its_predictions_checked(
    finished: tuple[Path, dict[str, object]], cli: Cli, data: Path, tmp_path: Path
) -> None:
    run, _ = finished
    path = tmp_path / "predictions.json"
    own = ("--data", data, "--timesteps", 1, "--predictions", path, "--json")
    done = cli("classify", "evaluate", run, *own)
    assert done.returncode == 0, done.stderr
    (row,) = last_json(done.stdout)["rows"]
    assert row["top1"] == json.loads((run / "results.json").read_text())["rows"][1]["top1"]
    checked = cli("classify", "evaluate", path, "--data", data, "--dataset", "folder", "--json")
    assert checked.returncode == 0, checked.stderr
    assert last_json(checked.stdout)["rows"] == [{"timesteps": 1, "top1": row["top1"], "claimed": row["top1"]}]
    content = json.loads(path.read_text())
    content["rows"][0]["predicted"] = [1 - c for c in content["rows"][0]["predicted"]]
    path.write_text(json.dumps(content))
    refused = cli("classify", "evaluate", path, "--data", data, "--dataset", "folder")
    assert refused.returncode == 2
    assert "claims" in refused.stderr
    for what, flags, words in (
        (path, ("--timesteps", 1), "timesteps = 1: is for a run"),
        (path, ("--predictions", tmp_path / "never.json"), "predictions = "),
        (run, ("--dataset", "cifar10"), "dataset = 'cifar10': is folder in"),
    ):
        refused = cli("classify", "evaluate", what, "--data", data, *flags)
        assert refused.returncode == 2
        assert words in refused.stderr
    assert not (tmp_path / "never.json").exists()


def test_one_of_a_runs_networks_is_scored_alone(finished: tuple[Path, dict[str, object]], cli: Cli, data: Path) -> None:
    run, _ = finished
    done = cli("classify", "evaluate", run, "--data", data, "--timesteps", "relu", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = last_json(done.stdout)["rows"]
    assert row["timesteps"] is None
    assert row["top1"] == json.loads((run / "results.json").read_text())["rows"][-1]["top1"]
    refused = cli("classify", "evaluate", run, "--data", data, "--timesteps", 7)
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("holds 2, 1, relu")


def test_a_network_packed_small_is_one_to_start_from(
    finished: tuple[Path, dict[str, object]], script: Cli, cli: Cli, data: Path, tmp_path: Path
) -> None:
    run, _ = finished
    shrink = partial(script, "spiking_rl.scripts.shrink", run)
    packed = tmp_path / "small.tar.xz"
    done = shrink("--checkpoint", "T1", "--output", packed)
    assert done.returncode == 0, done.stderr
    own = run / "checkpoints" / "T1"
    assert packed.stat().st_size < (own / "model.safetensors").stat().st_size / 3
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    before, after = (load_checkpoint(folder) for folder in (own, tmp_path / "small" / "checkpoints" / "T1"))
    assert before.tensors.keys() == after.tensors.keys()
    assert "val_accuracy" not in after.config, "the rounded weights were not scored"
    assert (after.config["bits"], after.config["dense_bits"]) == (6, 4)
    for name, tensor in before.tensors.items():
        if tensor.dim() not in (2, 4):
            assert torch.equal(after.tensors[name], tensor), name
            continue
        rows = after.tensors[name].flatten(1)
        assert max(len(row.unique()) for row in rows) <= (63 if tensor.dim() == 4 else 15)
        error = (after.tensors[name] - tensor).square().mean() / tensor.square().mean()
        assert error < (0.003 if tensor.dim() == 4 else 0.03), "Gaussian weights leave 0.001 and 0.013"
    scored = cli("classify", "evaluate", tmp_path / "small", "--data", data, "--json")
    assert scored.returncode == 0, scored.stderr
    assert [(row["timesteps"], row["top1"] > 90) for row in last_json(scored.stdout)["rows"]] == [(1, True)]  # type: ignore[attr-defined]

    for flags, words in (
        (("--output", packed), "is there already"),
        (("--output", tmp_path / "a.zip"), ".tar.xz"),
        (("--output", tmp_path / "nowhere" / "a.tar.xz"), "a folder that is not there"),
        (("--output", tmp_path / "a.tar.xz", "--bits", 9), "bits = 9"),
        (("--output", tmp_path / "a.tar.xz", "--checkpoint", "T7"), "T7"),
    ):
        refused = shrink(*flags)
        assert refused.returncode == 2
        assert words in refused.stderr
    assert not list(tmp_path.glob("a.*"))


def test_inspect_needs_no_images(finished: tuple[Path, dict[str, object]], cli: Cli, tmp_path: Path) -> None:
    run, printed = finished
    done = cli("inspect", run, "--json")
    assert done.returncode == 0, done.stderr
    facts = last_json(done.stdout)
    assert (facts["kind"], facts["timesteps"], facts["input_shape"]) == ("classifier", 1, [3, 32, 32])
    row = printed["rows"][1]  # type: ignore[index]
    assert facts["measured"]["top1"] == row["top1"]  # type: ignore[index]
    assert facts["macs"] == row["macs"]
    assert facts["layers"][1]["kind"] == "pool, conv 3x3, batch norm"  # type: ignore[index]
    assert facts["layers"][-1]["output_shape"] == [2]  # type: ignore[index]
    relu = last_json(cli("inspect", run / "checkpoints" / "relu", "--json").stdout)
    assert relu["timesteps"] is None
    assert relu["layers"][0]["threshold"] is None  # type: ignore[index]
    assert relu["measured"]["energy_ratio"] == 1  # type: ignore[index]
    alone = tmp_path / "T1"
    shutil.copytree(run / "checkpoints" / "T1", alone)
    refused = cli("inspect", alone)
    assert refused.returncode == 2
    assert "away from its run" in refused.stderr
    wide = tmp_path / "wide"
    shutil.copytree(run, wide, ignore=shutil.ignore_patterns("resume", "relu*"))
    (wide / "config.yaml").write_text((wide / "config.yaml").read_text().replace("width: 0.03125", "width: 16"))
    refused = cli("inspect", wide)
    assert refused.returncode == 2
    assert "no match" in refused.stderr


@pytest.mark.parametrize(("begun", "pruned"), [([], ["--rescale-thresholds"]), (["--rescale-thresholds"], [])])
def test_the_steps_can_be_taken_one_by_one(
    begun: list[str], pruned: list[str], cli: Cli, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    where = ("--data", data, "--device", "cpu")
    flags = as_flags({**SMALL, "epochs": 0, "ann_epochs": 1})
    assert cli("classify", "train", "vgg6", "folder", "--data", data, *flags, *begun, "--run", run).returncode == 0
    assert cli("classify", "prune", run, *where).returncode == 2
    spikes = ("--rate-epochs", 1, "--epochs", 1)  # T as the run was begun with, and no pruning
    done = cli("classify", "convert", run, *where, *spikes)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if " epoch 1/1 " in line] == ["rates", "T=2"]
    done = cli("classify", "prune", run, *where, "--to", 1, "--epochs", 1, *pruned)
    assert done.returncode == 0, done.stderr
    assert load_config(run / "config.yaml").rescale_thresholds
    provenance = yaml.safe_load((run / "config.yaml").read_text())["provenance"]
    assert any(line.startswith("prune_to: 2 to 1, by classify prune; 20") for line in provenance["changes"])
    assert "torch" in provenance["versions"]
    first, second = (load_checkpoint(run / "checkpoints" / name).tensors for name in ("T2", "T1"))
    changed = [float(second[name] / first[name]) for name in first if name.endswith("threshold")]
    assert min(changed) < 0.95, "by more than an epoch of training does"
    assert [r["timesteps"] for r in json.loads((run / "results.json").read_text())["rows"]] == [2, 1, None]


def test_a_run_out_of_time_goes_on_with_resume(cli: Cli, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = ("classify", "train", "vgg6", "folder", "--data", data, *as_flags(SMALL), "--run", run)
    stopped = cli(*own, "--hours", 1e-9)
    assert stopped.returncode == 0
    told = stopped.stderr.partition("Go on with: spiking-rl ")[2]
    assert shlex.split(told)[-1] == "--resume"
    assert not (run / "results.json").exists()
    again = cli(*own)
    assert again.returncode == 2
    assert "add --resume" in again.stderr
    other = cli("classify", "train", "vgg9", "folder", "--data", data, "--run", run, "--resume")
    assert other.returncode == 2
    assert "was started with 'vgg6'" in other.stderr
    changed = cli(*own, "--resume", "--weight-decay", 0.1)
    assert changed.returncode == 2
    assert "weight_decay = 0.1" in changed.stderr
    changed = cli(*own, "--resume", "--no_flip")
    assert changed.returncode == 2
    assert "flip = False" in changed.stderr
    other = cli(*own, "--resume", "--recipe", "temporal-pruning", "--hours", 1e-9)
    assert other.returncode == 0, other.stderr
    assert ", fold_first, dropout, " in other.stdout
    assert ": as the run was started, not as the recipe has it" in other.stdout
    changed = cli(*shlex.split(told), "--epochs", 3, "--save-every", 5.5, "--hours", 1e-9)
    assert changed.returncode == 0, changed.stderr
    assert "from here: epochs 3, was 2, save_every 5.5, was 10.0" in changed.stdout
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["epochs"], config["save_every"]) == (3, 5.5)
    assert len(config["provenance"]["changes"]) == 2
    assert cli(*shlex.split(told)).returncode == 0, "the command that was told is one that works"
    assert (run / "results.json").is_file()
    page = tmp_path / "page.html"
    assert cli("report", run, "--output", page).returncode == 0
    assert "changed as it went on</th><td>epochs: 2 to 3, ReLU after " in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "vgg7", "folder"), "network = 'vgg7'"),
        (("train", "vgg6", "cifar11"), "'cifar11'"),
        (("train", "vgg6"), "dataset"),
        (("train", "vgg6", "folder", "--recipe", "slow"), "recipe = 'slow'"),
        (("train", "vgg6", "folder", "--dropout", "2"), "dropout = 2.0"),
        (("train", "vgg6", "folder", "--epochs", "few"), "--epochs: a whole number is wanted, not 'few'"),
        (("train", "vgg5", "folder"), "network = 'vgg5': unknown; did you mean 'vgg"),
        (("train", "vgg6", "folder", "--crop", "32"), "crop = 32"),
        (("train", "vgg6", "folder", "--hours", "0"), "hours = 0.0"),
        (("train", "vgg6", "folder", "--fold-first"), "firing_rate = 0.15"),
        (("train", "vgg6", "folder", "--accumulate", "10" * 20), "must be at most ann_batch_size, 128"),
        (("train", "vgg6", "folder", "--image-size", "10" * 20), "must be at most 1024"),
        (("train", "vgg6", "folder", "--calibration-timesteps", "10" * 20), "must be at most 10000"),
        (("evaluate", "nowhere", "--hours", "1"), "--hours"),
        (("prune", "nowhere"), "holds no run"),
        (("learn",), "choose one of train, convert, prune, evaluate"),
        (("evaluate", "nowhere"), "holds no run"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    cli: Cli, data: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    where = ("--data", data) if arguments[0] != "learn" else ()
    done = cli("classify", *arguments, *where, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_classifier_is_scored_on_images_like_those_it_knows(
    finished: tuple[Path, dict[str, object]], cli: Cli, tmp_path: Path
) -> None:
    """Neither other classes nor other shades, for which inputs would be scaled otherwise."""
    run, _ = finished
    others = write_shades(tmp_path / "others", {"train": 20, "test": 4}, classes=("night", "noon"))
    shades = write_shades(tmp_path / "shades", {"train": 20, "test": 4})
    shutil.rmtree(shades / "train" / "light")
    shutil.copytree(shades / "train" / "dark", shades / "train" / "light")
    for data, words in ((others, "as first classes are not those"), (shades, "as mean of the channels are not those")):
        done = cli("classify", "evaluate", run, "--data", data)
        assert done.returncode == 2
        assert words in done.stderr
    copy = shutil.copytree(run, tmp_path / "copy")
    done = cli("classify", "prune", copy, "--data", others)
    assert done.returncode == 2
    assert "as first classes are not those" in done.stderr


def test_missing_images_are_told_with_what_is_understood(cli: Cli, tmp_path: Path) -> None:
    done = cli("classify", "train", "vgg6", "cifar10", "--data", tmp_path / "none", "--run", tmp_path / "run")
    assert done.returncode == 2
    assert str(tmp_path / "none") in done.stderr
    assert not (tmp_path / "run").exists()


def test_curves_of_several_classifiers_make_one_figure(
    finished: tuple[Path, dict[str, object]], cli: Cli, script: Cli, tmp_path: Path
) -> None:
    other, agent = copy_run(finished[0], tmp_path / "other", seed=1), tmp_path / "agent"
    shutil.copytree(finished[0], agent)
    picture = tmp_path / "several.png"
    done = cli("plot", finished[0], other, "--output", picture)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with picture.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    progress = RunFolder(finished[0]).read_progress()
    assert len(rows) == 2 * len(progress)
    assert (rows[0]["network"], rows[0]["dataset"], rows[-1]["seed"]) == ("vgg6", "folder", "1")
    assert [int(row["epoch"]) for row in rows] == 2 * list(range(1, len(progress) + 1)), "all together, as drawn"
    (agent / "config.yaml").write_text("algo: pqn\nenv: CartPole-v1\nseed: 0\n")
    refused = cli("plot", finished[0], agent)
    assert refused.returncode == 2
    assert "holds an agent, and the first run a classifier; draw them apart" in refused.stderr

    published = tmp_path / "curves.json"
    command = ["spiking_rl.scripts.curves", "--output", published, finished[0]]
    assert script(*command, agent).returncode == 2
    assert script(*command).returncode == 0
    (row,) = json.loads(published.read_text())["rows"]
    assert row["curve"] == progress
    assert row["settings"]["network"] == "vgg6"


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write JPEGs of several sizes as ImageNet lies on disk: train/<class>/ and val/<class>/."""
    names = ("n01440764", "n01443537")
    return write_shades(tmp_path_factory.mktemp("imagenet"), {"train": 300, "val": 10}, names, "JPEG", more=7)


STREAMED = {**SMALL, "image_size": 32, "workers": 1, "ann_batch_size": 12, "batch_size": 12}


def weights(run: Path) -> dict[str, object]:
    return {t: load_checkpoint(run / "checkpoints" / t).tensors for t in ("relu", "T2", "T1")}


def test_imagenet_is_read_from_disk_and_a_stopped_run_ends_alike(cli: Cli, imagenet: Path, tmp_path: Path) -> None:
    command = ("classify", "train", "vgg6", "imagenet", "--data", imagenet, *as_flags(STREAMED))
    done = cli(*command, "--run", tmp_path / "whole", "--json")
    assert done.returncode == 0, done.stderr
    rows = last_json(done.stdout)["rows"]
    assert isinstance(rows, list)
    assert [row["timesteps"] for row in rows] == [2, 1, None]
    assert {row["images"] for row in rows} == {20}, "the published validation images are the test"
    assert min(row["top1"] for row in rows) > 90, rows
    claimed = cli(
        "classify", "evaluate", tmp_path / "whole/predictions.json", "--data", imagenet, "--dataset", "imagenet"
    )
    assert claimed.returncode == 0, claimed.stderr
    stopped = cli(*command, "--run", tmp_path / "stopped", "--hours", 1e-9)
    assert "everything is saved" in stopped.stderr
    assert cli(*command, "--run", tmp_path / "stopped", "--resume").returncode == 0
    torch.testing.assert_close(weights(tmp_path / "stopped"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_a_damaged_image_of_imagenet_is_named_and_the_run_goes_on_without_it(
    cli: Cli, imagenet: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(imagenet, data)
    bad = data / "train/n01443537/0007.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    flags = as_flags({**STREAMED, "ann_epochs": 1, "epochs": 0})
    command = ("classify", "train", "vgg6", "imagenet", "--data", data, *flags, "--run", tmp_path / "run")
    refused = cli(*command)
    assert refused.returncode == 2
    assert str(bad) in refused.stderr
    assert "Traceback" not in refused.stderr
    bad.write_bytes((data / "train/n01443537/0008.JPEG").read_bytes())
    assert cli(*command, "--resume").returncode == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batch-size", 4096), "batch_size = 4096: the 594 training images do not fill a batch"),
        (("--workers", -1), "workers = -1"),
        (("--image-size", 4), "input_shape"),
    ],
)
def test_what_cannot_work_with_imagenet_is_told(
    cli: Cli, imagenet: Path, tmp_path: Path, flags: tuple[object, ...], words: str
) -> None:
    given = as_flags(STREAMED)
    refused = cli(
        "classify", "train", "vgg11", "imagenet", "--data", imagenet, *given, *flags, "--run", tmp_path / "run"
    )
    assert refused.returncode == 2
    assert words in refused.stderr
    assert not (tmp_path / "run").exists()


def test_images_are_timed_against_the_training_that_they_feed(script: Cli, tmp_path: Path) -> None:
    small = {"network": "vgg6", "width": 1 / 16, "large_network": "vgg6", "large_width": 1 / 16, "workers": 0}
    small |= {"batch": 8, "large_batch": 1, "files": 20, "rounds": 1, "output": tmp_path / "speed.json"}
    done = script("spiking_rl.scripts.benchmark_images", *as_flags(small))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    for row in rows:
        assert row["images_per_second"] > 0
        if "ratio_to_training" in row:
            (fed,) = (r for r in rows if r["pass"] == "training, 32 x 32" and r["timesteps"] == row["timesteps"])
            assert row["ratio_to_training"] == pytest.approx(row["images_per_second"] / fed["images_per_second"])
        if "hours_per_epoch" in row:
            assert row["hours_per_epoch"] == pytest.approx(1_281_167 / row["images_per_second"] / 3600)
    assert len({row["pass"] for row in rows}) == 4


def test_a_classifier_is_reported_on_one_page(
    finished: tuple[Path, dict[str, object]], cli: Cli, tmp_path: Path
) -> None:
    run, _ = finished
    page = tmp_path / "page.html"
    done = cli("report", run, "--output", page, "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["missing"] == []
    text = page.read_text()
    for row in json.loads((run / "results.json").read_text())["rows"]:
        assert f"<td>{row['top1']:.2f}</td>" in text
        assert f"<td>{row['energy_ratio_int32']:.2f}</td>" in text
        assert f"<td>{row['energy_ratio_of_rates']:.2f}</td>" in text
    assert "Mean threshold of each layer" in text
    unfinished = tmp_path / "un finished"
    unfinished.mkdir()
    shutil.copy(run / "config.yaml", unfinished)
    missing = last_json(cli("report", unfinished, "--json").stdout)["missing"]
    told = f"go on with spiking-rl classify train vgg6 folder --run '{unfinished}' --resume"
    assert any(told in text for text in missing), missing  # type: ignore[attr-defined]


@needs_browser
def test_its_page_fits_a_phone(finished: tuple[Path, dict[str, object]], cli: Cli, tmp_path: Path) -> None:
    assert cli("report", finished[0], "--output", tmp_path / "report.html").returncode == 0
    found = on_a_phone(tmp_path)
    assert found["width"] <= 390
    assert found["title"].startswith("vgg6")
