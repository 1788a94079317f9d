"""The run folder: where everything about one training run is kept.

config.yaml  progress.csv  tensorboard/  checkpoints/T5/ ... T1/  resume/  results.json
figures/  videos/
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from spiking_rl.errors import UserError
from spiking_rl.files import read_bounded, write_atomically, write_table

_SEED_ALONE = re.compile(r"(seed|s)?[-_.]?\d+")
_MAX_PROGRESS_BYTES = 64 * 2**20
_MOST = 10**15
_WHOLE = ("agent_steps", "timesteps", "epoch", "images")  # columns of progress.csv that count


def _is_content(path: Path) -> bool:
    """Tell what a run has written from what says that one may begin, here or in another process."""
    return path.name != ".lock" and not path.name.startswith(".writable-")


class RunFolder:
    """Paths of a run folder, and reading and writing what lies in it.

    Args:
        path: the folder; nothing is created yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.progress = self.path / "progress.csv"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.resume = self.path / "resume"
        self.results = self.path / "results.json"
        self.report = self.path / "report.json"
        self.figures = self.path / "figures"
        self.videos = self.path / "videos"

    @property
    def name(self) -> str:
        """The folder's own name, also where the path is ``.``; a mere seed's with the folder around it, ``a/seed0``."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.name}" if _SEED_ALONE.fullmatch(path.name) else path.name

    def require_free(self) -> None:
        """Refuse a folder in which a new run cannot begin.

        Raises:
            UserError: a run or something else is there already.
        """
        if self.path.exists() and (not self.path.is_dir() or any(map(_is_content, self.path.iterdir()))):
            raise UserError(
                "run", str(self.path), "is in use already; add --resume to go on with it, or name another --run"
            )

    def create(self) -> None:
        """Make the folder for a new run.

        Raises:
            UserError: a run or something else is there already, or it cannot be written to.
        """
        try:
            self.require_free()
            self.path.mkdir(parents=True, exist_ok=True)
            trial = self.path / f".writable-{os.getpid()}"
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise UserError(
                "run", str(self.path), f"cannot be written to ({error.strerror}); name another folder with --run"
            ) from None

    def require(self) -> None:
        """Refuse a folder that holds no run.

        Raises:
            UserError: no config.yaml in it.
        """
        if not self.config.is_file():
            raise UserError("run", str(self.path), "holds no run (no config.yaml); name the folder that train printed")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            UserError: another process trains in it.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                "run", str(self.path), "another process is training in it; wait for it, or name another --run"
            ) from None
        except OSError as error:
            raise UserError("run", str(self.path), f"cannot be locked ({error.strerror})") from None
        try:
            yield
        finally:
            lock.release()

    def checkpoint_timesteps(self) -> list[int | None]:
        """Return T of every kept checkpoint, highest first; None stands for a ReLU network."""
        found = {p.name for p in self.checkpoints.glob("*") if (p / "config.json").is_file()}
        spiking = sorted((int(n[1:]) for n in found if n[:1] == "T" and n[1:].isdigit()), reverse=True)
        return [*spiking, *([None] if "relu" in found else [])]

    def checkpoint(self, timesteps: int | None) -> Path:
        """Return the folder of the best checkpoint at T (None: the ReLU network's)."""
        return self.checkpoints / checkpoint_name(timesteps)

    def write_progress(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace progress.csv; its columns are the keys of all rows, gaps where a row has none of a key."""
        write_table(self.progress, rows)

    def read_progress(self) -> list[dict[str, Any]]:
        """Return the rows of progress.csv with numbers as numbers and gaps as None.

        Raises:
            UserError: missing or damaged.
        """
        try:
            text = read_bounded(self.progress, _MAX_PROGRESS_BYTES).decode()
            raw = list(csv.DictReader(io.StringIO(text, newline="")))
            rows: list[dict[str, Any]] = [
                {k: None if v == "" else int(v) if k in _WHOLE else float(v) for k, v in row.items()} for row in raw
            ]
            for row in rows:
                whole = [row[name] for name in _WHOLE if row.get(name) is not None]
                if row.get("score") is None or "timesteps" not in row or any(abs(v) > _MOST for v in whole):
                    raise ValueError("a line without score or timesteps, or with an absurd number")
            return rows
        except (OSError, ValueError, TypeError, csv.Error) as error:
            raise UserError("run", str(self.progress), f"cannot be read ({error}); wait for an evaluation") from None

    def write_report(self, report: Mapping[str, Any]) -> None:
        """Replace report.json: results under way."""
        write_atomically(self.report, json.dumps(report, indent=2, allow_nan=False) + os.linesep)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Replace results.json."""
        write_atomically(self.results, json.dumps(results, indent=2, allow_nan=False) + os.linesep)


def checkpoint_name(timesteps: int | None) -> str:
    """Return the name of the checkpoint at T: ``T5``, or ``relu`` for the control."""
    return "relu" if timesteps is None else f"T{timesteps}"
