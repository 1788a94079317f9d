"""The table's bookkeeping; what it trains goes through the real command line elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from spiking_rl.agents.config import load_recipe
from spiking_rl.errors import UserError
from spiking_rl.scripts import table


class Trainer:
    """Stands for the command line: writes what a run leaves, or dies half way."""

    def __init__(self) -> None:
        self.called: list[list[str]] = []
        self.dies_at: str | None = None
        self.stages: list[None] | None = None  # of every run, instead of those that it is asked for

    def __call__(self, run: Path, arguments: list[str]) -> None:
        self.called.append(arguments)
        run.mkdir(parents=True, exist_ok=True)
        asked = arguments[arguments.index("--prune-to") + 1] if "--prune-to" in arguments else "5"
        to = 1 if arguments[0] == "prune" else int(asked)
        if not (run / "config.yaml").is_file() or arguments[0] == "prune":
            (run / "config.yaml").write_text(yaml.safe_dump({"algo": "pqn", "prune_to": to}))
        if arguments[0] == self.dies_at:
            self.dies_at = None
            raise KeyboardInterrupt
        stages = self.stages or range(5, yaml.safe_load((run / "config.yaml").read_text())["prune_to"] - 1, -1)
        algo, seed = "pqn", int(run.name[-1])
        shared = {
            "environment": load_recipe("cartpole-masked")[1].env,
            "ci95": 0.0,
            "spike_rate": {"layer1": 0.1},
            "energy_ratio": 2.0,
        }
        rows = [{"timesteps": t, "mean_return": t or 0.0, "algo": algo, "seed": seed, **shared} for t in stages]
        (run / "results.json").write_text(json.dumps({"rows": rows}))


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
    assert rescaled[rescaled.index("--agent-steps") + 1] == str(load_recipe("cartpole-masked")[1].prune_steps)
    assert rescaled[-1] == "--rescale-leak"
    assert fixed[-1] == "--no-rescale-leak"
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


def test_lines_of_an_unfinished_table_are_kept(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "table.json"

    def run(*arguments: str) -> list[str]:
        shared = ["--recipe", "cartpole-masked", "--algos", "pqn", "--runs", str(tmp_path / "runs")]
        monkeypatch.setattr("sys.argv", ["table", *shared, "--output", str(output), *arguments])
        table.main()
        rows = json.loads(output.read_text())["rows"]
        return list(dict.fromkeys(f"{row['method']} {row['seed']}" for row in rows))

    assert run("--methods", "direct", "--seeds", "3") == ["direct 3"]
    shutil.rmtree(tmp_path / "runs")  # another machine has the table but not the runs
    assert run("--methods", "direct", "one-leak", "--seeds", "3", "--extend") == ["direct 3", "one-leak 3"]
    assert run("--methods", "direct", "--seeds", "4", "--extend") == ["direct 3", "one-leak 3", "direct 4"]
    assert len(trainer.called) == 3
    with pytest.raises(UserError, match="holds other lines, such as pqn, direct, seed 3; --extend keeps them"):
        run("--methods", "direct", "--seeds", "4")
    with pytest.raises(UserError, match="is no table of CartPole-v1"):
        run("--recipe", "cartpole", "--methods", "direct", "--seeds", "4", "--extend")
    output.unlink()
    assert run("--methods", "direct", "--seeds", "4") == ["direct 4"], "finished runs are not repeated"
    assert len(trainer.called) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "first"], "methods = 'first': unknown"),
        (["--methods", "direct", "foo"], "methods = 'foo': unknown; choose of converted, direct"),
        (["--jobs", "0"], "jobs = 0: must be at least 1"),
        (["--output", "table.txt"], "output = 'table.txt': must end with .json"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["table", "--algos", "pqn", *flags])
    with pytest.raises(UserError, match=said):
        table.main()
    assert not trainer.called
    assert not list(tmp_path.iterdir())


def test_a_table_of_relu_networks_alone_has_no_figure(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "stages", [None])
    monkeypatch.setattr("sys.argv", ["table", "--recipe", "cartpole-masked", "--algos", "pqn", "--methods", "relu"])
    table.main()
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["cartpole-masked.json"]
