"""Classifiers trained by two processes, started by torchrun as a person would."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Cli, as_flags, environment, write_shades
from forking import Forker

from spiking_rl import load_checkpoint
from spiking_rl.runs import RunFolder

SETTINGS = {
    "width": 0.0625,
    "timesteps": 2,
    "ann_epochs": 2,
    "epochs": 2,
    "prune_epochs": 2,
    "ann_batch_size": 16,
    "batch_size": 16,
    "learning_rate": 0.001,
    "save_every": 0.0001,
    "threads": 1,
    "device": "cpu",
}
Quickly = Callable[[list[str]], tuple[list[int], str]]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shades(tmp_path_factory.mktemp("images"), {"train": 80, "test": 10})


def command(data: Path, run: Path, *flags: object, dataset: str = "folder", **changes: object) -> list[str]:
    train = ["classify", "train", "vgg6", dataset, "--data", data, *as_flags({**SETTINGS, **changes}), "--run", run]
    train += ["--no-batch-norm"] if dataset == "folder" else []
    return [str(word) for word in (*TORCHRUN, "spiking_rl.scripts", *train, *flags)]


def together(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def quickly() -> Iterator[Quickly]:
    """Start both processes as torchrun does, but without its own start, and return the exit codes and all errors.

    It is not torchrun: where one process dies nobody ends the other.
    """
    if sys.platform != "linux":
        pytest.skip("processes are forked as Linux does")
    forkers = [Forker(environment()) for _ in range(2)]

    def run(rank: int, words: list[str], meeting: dict[str, str]) -> subprocess.CompletedProcess[str]:
        own = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return forkers[rank].run("spiking_rl.scripts", words, timeout=240, environment=environment() | own)

    def both(words: list[str]) -> tuple[list[int], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(partial(run, words=words[len(TORCHRUN) + 1 :], meeting=meeting), (0, 1)))
        return [process.returncode for process in done], "".join(process.stderr for process in done)

    yield both
    for forker in forkers:
        forker.close()


def tensors(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / name).tensors


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pair") / "run"
    done = together(command(data, run))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("T=1 epoch 2/2  accuracy") == 1, "one process speaks"
    return run


def test_two_processes_learn_what_one_learns(pair: Path, cli: Cli, data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    flags = [*as_flags(SETTINGS), "--no-batch-norm"]
    assert cli("classify", "train", "vgg6", "folder", "--data", data, *flags, "--run", alone).returncode == 0
    # Sums in another order differ in the last bits, which training carries on; a threshold makes steps of them.
    one, two = tensors(alone, "relu"), tensors(pair, "relu")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    first, second = (RunFolder(run).read_progress() for run in (alone, pair))
    assert [row["timesteps"] for row in first] == [row["timesteps"] for row in second]
    for mine, its in zip(first, second, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=0.1)
        assert mine["learning_rate"] == pytest.approx(its["learning_rate"], rel=1e-6)
    rows = json.loads((pair / "results.json").read_text())["rows"]
    assert min(row["top1"] for row in rows) > 90


def test_a_killed_process_is_told_and_the_run_goes_on(quickly: Quickly, pair: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = subprocess.Popen(
        command(data, run), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (run / "resume" / "state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [p for p in psutil.Process(started.pid).children(recursive=True) if "spiking_rl.scripts" in p.cmdline()]
    assert len(workers) == 2
    follower = next(p for p in workers if p.environ()["RANK"] == "1")
    follower.send_signal(signal.SIGKILL)
    _, said = started.communicate(timeout=120)
    assert started.returncode != 0
    assert "spiking-rl: processes = 2: one of them died" in said or "SIGKILL" in said
    assert not (run / "results.json").exists()
    codes, errors = quickly(command(data, run, "--resume"))
    assert codes == [0, 0], errors
    for name in ("relu", "T2", "T1"):
        torch.testing.assert_close(tensors(run, name), tensors(pair, name), rtol=0, atol=0)


def test_running_out_of_time_stops_all_at_one_batch(quickly: Quickly, pair: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes, errors = quickly(command(data, run, "--hours", "1e-9"))
    assert codes == [0, 0], errors
    assert errors.count("everything is saved") == 1
    again = next(line for line in errors.splitlines() if line.startswith("Go on with: "))
    assert again.startswith(
        "Go on with: torchrun --nproc_per_node 2 -m -- spiking_rl.scripts classify train vgg6 folder"
    )
    given = shlex.split(again)
    assert quickly([*TORCHRUN, *given[given.index("spiking_rl.scripts") :]])[0] == [0, 0]
    torch.testing.assert_close(tensors(run, "T1"), tensors(pair, "T1"), rtol=0, atol=0)


def test_what_one_process_refuses_all_refuse_and_one_tells(quickly: Quickly, pair: Path, data: Path) -> None:
    codes, errors = quickly(command(data, pair))
    assert codes == [2, 2]
    assert errors.count("is in use already") == 1


def test_parts_may_be_smaller_than_the_number_of_processes(quickly: Quickly, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes, errors = quickly(command(data, run, ann_epochs=1, epochs=0, accumulate=16))
    assert codes == [0, 0], errors
    assert all(0 < float(row["loss"]) < 10 for row in RunFolder(run).read_progress())


def test_images_from_disk_are_shared_out(quickly: Quickly, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train").symlink_to(data / "train")
    (folder / "val").symlink_to(data / "test")
    run = tmp_path / "run"
    changes = {"image_size": 32, "workers": 0, "ann_epochs": 3, "epochs": 1, "prune_epochs": 1}
    codes, errors = quickly(command(folder, run, dataset="imagenet", **changes))
    assert codes == [0, 0], errors
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["timesteps"] for row in rows] == [2, 1, None]
    assert rows[-1]["top1"] > 90
    codes, errors = quickly(command(folder, tmp_path / "odd", dataset="imagenet", **{**changes, "batch_size": 15}))
    assert codes == [2, 2]
    assert errors.count("must be a multiple of the 2 processes") == 1


def test_who_meets_a_damaged_image_names_it(quickly: Quickly, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data / "train", folder / "train")
    (folder / "val").symlink_to(data / "test")
    changes = {"image_size": 32, "workers": 0, "ann_epochs": 4, "epochs": 0}
    met = set()
    for path in sorted((folder / "train" / "dark").iterdir())[:4]:
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        codes, errors = quickly(command(folder, tmp_path / path.stem, dataset="imagenet", **changes))
        path.write_bytes(whole)
        assert codes == [2, 2]
        assert path.name in errors
        assert "cannot be decoded" in errors
        met.add("process 1: data" in errors)
    assert met == {False, True}


def test_every_process_has_an_image_for_batch_norm(quickly: Quickly, data: Path, tmp_path: Path) -> None:
    words = command(data, tmp_path / "run", ann_epochs=1, epochs=0, accumulate=16)
    codes, errors = quickly([word for word in words if word != "--no-batch-norm"])
    assert codes == [2, 2]
    assert errors.count("accumulate = 16: leaves parts of ann_batch_size without an image") == 1


def test_rates_come_before_spikes_in_both(quickly: Quickly, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes = {"ann_epochs": 1, "rate_epochs": 3, "epochs": 3, "prune_to": 2}
    words = [word for word in command(data, run, **changes) if word != "--no-batch-norm"]
    codes, errors = quickly([*words, "--hours", "1e-9"])
    assert codes == [0, 0], errors
    words[words.index("--epochs") + 1] = "4"
    assert quickly([*words, "--resume"])[0] == [0, 0]
    rows = RunFolder(run).read_progress()
    assert [(row["timesteps"], row["on_rates"]) for row in rows] == [(None, 0), *[(2, 1)] * 3, *[(2, 0)] * 4]
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert min(row["top1"] for row in rows if row["timesteps"]) > 90
