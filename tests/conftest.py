"""What several tests need: one small trained run, the real command line, one torch thread."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from forking import Forker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spiking_rl import compiling, fused_fresh
from spiking_rl.agents.config import load_recipe
from spiking_rl.agents.training import replace_settings, start_run
from spiking_rl.runs import RunFolder

torch.set_num_threads(1)  # small networks; the suite may share two cores

SMALL = {
    "timesteps": 3,
    "prune_to": 2,
    "agent_steps": 1664,
    "prune_steps": 512,
    "num_envs": 4,
    "hidden": (16, 16),
    "eval_every": 512,
    "eval_episodes": 2,
    "save_every": 256,
    "report_episodes": 2,
    "video_episodes": 0,
}
"""Settings of a run that takes seconds."""

_LONG = (
    *("test_parallel.py", "test_resume.py", "test_classify.py", "test_core_vision_disasters.py", "test_cli.py"),
    *("test_core_vision_training.py", "test_stateful.py", "test_readme.py", "test_atari.py", "test_imitation.py"),
    *("test_determinism.py", "test_disasters.py", "test_recorded.py", "test_fuzz_runs.py", "test_learners.py"),
    *("test_stock_pruning.py", "test_stock_zoo.py", "test_wrong_numbers.py", "test_deployed.py", "test_envs_atari.py"),
    *("test_core_allocator.py", "test_core_vision.py", "test_stock_policies.py", "test_layers.py", "test_benchmark.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first: whoever is given one of them last keeps everybody waiting."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))


Cli = Callable[..., subprocess.CompletedProcess[str]]


def as_flags(settings: dict[str, object]) -> list[str]:
    """Return settings as command-line options."""
    flags: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def environment() -> dict[str, str]:
    """Return the environment of a subprocess: no display, one thread."""
    return os.environ | {"SDL_VIDEODRIVER": "dummy", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


COMMAND = [sys.executable, "-m", "spiking_rl.scripts"]


@pytest.fixture(scope="session")
def script() -> Iterator[Cli]:
    """Run a module as ``python -m`` does, in a process of its own, where possible without torch's import."""
    forker = Forker(environment()) if sys.platform == "linux" else None

    def call(
        module: str, *args: object, cwd: Path | None = None, file_size: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        words = list(map(str, args))
        shared = {"timeout": 240, "cwd": cwd}
        if forker is not None:
            return forker.run(module, words, environment=environment(), file_size=file_size, **shared)
        if file_size is not None:
            shared["preexec_fn"] = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_size, file_size))
        command, text = [sys.executable, "-m", module, *words], {"text": True, "capture_output": True}
        return subprocess.run(command, env=environment(), check=False, **text, **shared)

    yield call
    if forker is not None:
        forker.close()


@pytest.fixture(scope="session")
def cli(script: Cli) -> Cli:
    """Run the real command line likewise."""
    return partial(script, COMMAND[-1])


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one small run; tests only read it."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "small")
    config = replace_settings(load_recipe("cartpole")[1], SMALL)
    session = start_run(config, folder, device="cpu")
    with folder.locked():
        session.run()
    return folder.path


def write_shades(
    folder: Path, counts: dict[str, int], classes: Sequence[str] = ("dark", "light"), ending: str = "png", more: int = 1
) -> Path:
    """Write noisy images, dark and light, into a folder per split and class.

    Args:
        folder: to write into.
        counts: images per class, by split.
        classes: name of the dark ones, and of the light ones.
        ending: of the files, and so their format.
        more: so many different heights, from 32 pixels up.
    """
    random = np.random.default_rng(0)
    for split, count in counts.items():
        for name, level in zip(classes, (40, 170), strict=True):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = level + random.integers(0, 40, (32 + k % more, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{k:04}.{ending}")
    return folder


def last_json(text: str) -> dict[str, object]:
    """Return the JSON object that a command printed."""
    loaded = json.loads(text)
    assert isinstance(loaded, dict)
    return loaded


def curves_of(run: Path) -> dict[str, dict[int, float]]:
    """Return a run's TensorBoard curves, step to value, by tag."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def copy_run(run: Path, to: Path, **settings: object) -> Path:
    """Copy a run's settings and curve, with other settings."""
    to.mkdir(parents=True)
    shutil.copy(run / "progress.csv", to)
    loaded = yaml.safe_load((run / "config.yaml").read_text())
    (to / "config.yaml").write_text(yaml.safe_dump({**loaded, **settings}))
    return to


@pytest.fixture(scope="session")
def built_operation() -> ModuleType:
    """Return the scan as an operation of torch's own, built."""
    compiling.build_op()
    compiling.built_op.cache_clear()
    module = compiling.built_op()
    if module is None:
        pytest.skip("no C++ compiler here, or no headers")
    return module


@pytest.fixture
def operation(built_operation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scan with it."""
    monkeypatch.setattr(fused_fresh, "built_op", lambda: built_operation)
    fused_fresh._fresh.cache_clear()
    yield
    fused_fresh._fresh.cache_clear()


@pytest.fixture
def scan_in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Get to the same loops by way of Python."""
    monkeypatch.setattr(fused_fresh, "built_op", lambda: None)
    fused_fresh._fresh.cache_clear()
    yield
    fused_fresh._fresh.cache_clear()


@pytest.fixture(params=["scan_in_python", "operation"])
def scanning(request: pytest.FixtureRequest) -> None:
    """Scan in one way, then in the other."""
    request.getfixturevalue(request.param)
