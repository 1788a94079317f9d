"""The table's bookkeeping; what it trains goes through the real command line elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from spiking_rl.scripts import table


class Trainer:
    """Stands for the command line: writes what a run leaves, or dies half way."""

    def __init__(self) -> None:
        self.called: list[list[str]] = []
        self.dies_at: str | None = None

    def __call__(self, run: Path, arguments: list[str]) -> None:
        self.called.append(arguments)
        run.mkdir(parents=True, exist_ok=True)
        to = 1 if arguments[0] == "prune" else 5
        if not (run / "config.yaml").is_file() or arguments[0] == "prune":
            (run / "config.yaml").write_text(yaml.safe_dump({"algo": "pqn", "prune_to": to}))
        if arguments[0] == self.dies_at:
            self.dies_at = None
            raise KeyboardInterrupt
        stages = range(5, yaml.safe_load((run / "config.yaml").read_text())["prune_to"] - 1, -1)
        rows = ", ".join(f'{{"timesteps": {t}, "mean_return": {t}}}' for t in stages)
        (run / "results.json").write_text(f'{{"rows": [{rows}]}}')


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    monkeypatch.setattr(table, "_call", made)
    return made


def rows_of(options: table.Options, method: str) -> list[int]:
    return [row["timesteps"] for row in table._line(options, 3, "pqn", method)]


def test_two_methods_share_their_first_stage(trainer: Trainer, tmp_path: Path) -> None:
    options = table.Options(recipe="cartpole-masked", runs=tmp_path)
    assert rows_of(options, "rescaled") == rows_of(options, "fixed-leak") == [5, 4, 3, 2, 1]
    first, rescaled, fixed = trainer.called
    assert first[first.index("--prune-to") + 1] == "5"
    assert rescaled[-2:] == ["--rescale-leak", "True"]
    assert fixed[-2:] == ["--rescale-leak", "False"]
    assert rows_of(options, "rescaled") == [5, 4, 3, 2, 1]
    assert len(trainer.called) == 3, "a finished run is not repeated"


@pytest.mark.parametrize("dies_at", ["train", "prune"])
def test_an_interrupted_line_is_finished_the_next_time(trainer: Trainer, tmp_path: Path, dies_at: str) -> None:
    options = table.Options(recipe="cartpole-masked", runs=tmp_path)
    trainer.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        rows_of(options, "rescaled")
    assert rows_of(options, "rescaled") == [5, 4, 3, 2, 1]
    resumed = trainer.called[1 if dies_at == "train" else 2]
    assert resumed[0] == "train"
    assert "--resume" in resumed


def test_a_copy_that_was_cut_short_is_no_run(trainer: Trainer, tmp_path: Path) -> None:
    options = table.Options(recipe="cartpole-masked", runs=tmp_path)
    rows_of(options, "first")
    torn = tmp_path / ".cartpole-masked-pqn-rescaled-seed3.partial"
    torn.mkdir()
    (torn / "results.json").write_text('{"rows": []}')
    assert rows_of(options, "rescaled") == [5, 4, 3, 2, 1]
    assert not torn.exists()
