"""What a stranger's run may not do: run code, read without end, say too much."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from spiking_rl import UserError, load_checkpoint
from spiking_rl.agents.config import load_config
from spiking_rl.scripts import main

MODULE = "import pathlib\npathlib.Path('was-run').touch()\n"


@pytest.fixture
def stranger(small_run: Path, tmp_path: Path) -> Path:
    """Return a folder with a run whose environment is of a module that lies beside it."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run, ignore=shutil.ignore_patterns(".lock"))
    (tmp_path / "evil.py").write_text(MODULE)
    for path in (run / "checkpoints").glob("*/config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "environment": "evil:Env-v0"}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "env": "evil:Env-v0"}))
    return tmp_path


@pytest.fixture
def here(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand in the folder with the module, as one who has just unpacked it."""
    monkeypatch.chdir(stranger)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command line looks for modules in the current folder
    yield stranger
    sys.modules.pop("evil", None)


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "run", "--episodes", "1"),
        ("render", "run"),
        ("prune", "run", "--to", "1"),
        ("exit", "run"),
    ],
    ids=lambda command: command[0],
)
def test_a_module_that_only_a_file_names_is_not_run(
    here: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    assert main.run(list(command)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--env evil:Env-v0" in line
    assert not (here / "was-run").exists()


def test_nor_where_the_run_only_reports_in_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = here / "run" / "config.yaml"
    config = {**yaml.safe_load(path.read_text()), "env": "CartPole-v1", "report_also": ["evil:Env-v0"]}
    path.write_text(yaml.safe_dump(config))
    assert main.run(["train", "cartpole", "--run", "run", "--resume"]) == 2
    assert "'evil'" in capsys.readouterr().err
    assert not (here / "was-run").exists()


def test_prune_takes_the_name_of_another_environment_that_the_run_reports_in(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = here / "run" / "config.yaml"
    config = {**yaml.safe_load(path.read_text()), "env": "CartPole-v1", "report_also": ["evil:Env-v0"]}
    path.write_text(yaml.safe_dump(config))
    assert main.run(["prune", "run", "--to", "1"]) == 2
    assert "--env evil:Env-v0" in capsys.readouterr().err
    assert main.run(["prune", "run", "--to", "1", "--env", "evil:Env-v0", "--hours", "0"]) == 2
    assert "is not what the run trains in" not in capsys.readouterr().err
    assert main.run(["prune", "run", "--to", "1", "--env", "evil:Other-v0"]) == 2
    assert "is not what the run trains in" in capsys.readouterr().err


def test_what_needs_no_environment_shows_the_run_all_the_same(here: Path) -> None:
    for command in ("inspect", "report", "plot", "export"):
        assert main.run([command, "run"]) == 0
    assert not (here / "was-run").exists()


def test_a_module_that_the_user_names_is_imported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["evaluate", "run", "--env", "evil:Env-v0"]) == 2
    assert "no such environment" in capsys.readouterr().err, "the module registers none"
    assert (here / "was-run").exists()


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe, and links to devices")
@pytest.mark.parametrize("kind", ["device", "pipe", "sparse"])
@pytest.mark.parametrize("name", ["checkpoints/T2/config.json", "checkpoints/T2/model.safetensors", "config.yaml"])
def test_a_file_without_an_end_is_refused(small_run: Path, tmp_path: Path, kind: str, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run, ignore=shutil.ignore_patterns(".lock"))
    (run / name).unlink()
    if kind == "device":
        (run / name).symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(run / name)
    else:
        with (run / name).open("wb") as file:
            file.truncate(2**40)  # a terabyte that takes no room on the disk
    read = load_config if name == "config.yaml" else load_checkpoint
    place = run / name if name == "config.yaml" else run / "checkpoints" / "T2"
    with pytest.raises(UserError):
        read(place)
