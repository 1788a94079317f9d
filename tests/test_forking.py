"""The processes that commands are forked into are what fresh ones would be, and never one another's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import environment
from forking import Forker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker(environment())
    yield forker
    forker.close()


@pytest.fixture
def run(forker: Forker, tmp_path: Path) -> Run:
    """Run code as a module of the current folder."""

    def call(code: str, timeout: float = 60, **more: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "mine.py").write_text(f"import os, sys\n{code}")
        variables = environment() | more
        return forker.run("mine", ["an argument"], timeout=timeout, environment=variables, cwd=tmp_path)

    return call


@pytest.mark.parametrize(
    ("code", "status"),
    [("", 0), ("sys.exit(3)", 3), ("1 / 0", 1), ("os.kill(os.getpid(), 11)", -11), ("sys.exit('no')", 1)],
)
def test_exit_codes(run: Run, code: str, status: int) -> None:
    assert run(code).returncode == status


def test_output_and_place(run: Run, tmp_path: Path) -> None:
    done = run("print(os.getcwd(), sys.argv[1:], __name__); print('broken', file=sys.stderr)")
    assert done.stdout.strip() == f"{tmp_path} ['an argument'] __main__"
    assert done.stderr == "broken\n"
    assert "ZeroDivisionError" in run("1 / 0").stderr


def test_a_variable_that_is_gone_is_gone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "print(os.environ.get('HERE'), os.environ['SDL_VIDEODRIVER'], len(os.environ.get('LONG', '')))"
    monkeypatch.setenv("SDL_VIDEODRIVER", "wayland")
    assert run(code, HERE="yes", LONG="x" * 300_000).stdout.split() == ["yes", "dummy", "300000"]
    assert run(code).stdout.split() == ["None", "dummy", "0"]


def test_threads_and_exit_functions_are_waited_for(run: Run) -> None:
    code = """
import atexit, pathlib, threading, time
atexit.register(lambda: print("atexit"))
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
threading.Thread(target=time.sleep, args=(50,), daemon=True).start()
import concurrent.futures
pool = sys.pool = concurrent.futures.ThreadPoolExecutor(1)
pool.submit(print, "pool").result()
print("main")
"""
    done = run(code, timeout=30)
    assert done.stdout.split() == ["pool", "main", "thread", "atexit"]
    assert done.returncode == 0


def test_a_module_that_was_rewritten_is_run_as_it_is(run: Run) -> None:
    assert [run(f"print({name!r})").stdout.strip() for name in ("a", "b", "c", "d")] == ["a", "b", "c", "d"]


def test_a_limit_of_files_leaves_nothing_for_the_next_command(forker: Forker, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import spiking_rl, pathlib\npathlib.Path('big').write_bytes(bytes(9000))")
    limited = forker.run("mine", [], timeout=60, environment=environment(), cwd=tmp_path, file_size=5000)
    assert limited.returncode == 1
    assert "File too large" in limited.stderr
    whole = forker.run("mine", [], timeout=60, environment=environment(), cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr


def test_unseeded_commands_differ(run: Run) -> None:
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = (run(code).stdout.split() for _ in range(2))
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_a_command_that_takes_too_long_is_killed_and_the_next_one_has_its_own_answer(run: Run, tmp_path: Path) -> None:
    code = "import time, pathlib; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(50)"
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run(code, timeout=1)
    assert time.monotonic() - began < 40
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert run("print('well'); sys.exit(4)").returncode == 4
