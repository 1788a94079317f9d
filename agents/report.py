"""The table of a run: every T on the same unseen episodes, the kept best and the end of its stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from spiking_rl.agents.config import TrainConfig, load_config
from spiking_rl.agents.evaluation import evaluate
from spiking_rl.agents.loading import load_agent
from spiking_rl.checkpoint import load_checkpoint, read_json
from spiking_rl.errors import UserError
from spiking_rl.provenance import commit, machine, today
from spiking_rl.runs import RunFolder, checkpoint_name


def evaluate_run(run: RunFolder, episodes: int, command: str, **facts: Any) -> dict[str, Any]:
    """Evaluate every kept checkpoint of a run and write ``results.json``.

    Args:
        run: a run with at least one checkpoint.
        episodes: per checkpoint, on the report seeds.
        command: what made the run, kept with the results.
        facts: further facts kept with them, such as the time that training took.

    Returns:
        ``{"command", "commit", "date", "machine", ..., "rows"}``, one row per T, highest first, with the
        fields of :class:`spiking_rl.agents.Evaluation` and ``algo, seed, agent_steps, end_return,
        weights_sha256``, and under ``also`` the scores in the environments of the run's ``report_also``.
    """
    config = load_config(run.config)
    results: dict[str, Any] = {"command": command, "commit": commit(), "date": today(), "machine": machine()}
    # Hundreds of Atari games take an hour: what was measured before a stop with the same code is not played again.
    same = {**{key: results[key] for key in ("commit", "date", "machine")}, "episodes": episodes}
    rows = _measured(run, same)
    for timesteps in run.checkpoint_timesteps():
        weights = load_checkpoint(run.checkpoint(timesteps)).config["sha256"]
        if any(row["weights_sha256"] == weights and row["timesteps"] == timesteps for row in rows):
            continue
        rows.append({**_row(run, config, timesteps, episodes), "weights_sha256": weights})
        run.write_report({**same, "rows": rows})
    rows.sort(key=lambda row: -(row["timesteps"] or 0))
    results |= {**facts, "rows": rows}
    run.write_results(results)
    run.report.unlink(missing_ok=True)
    return results


def _measured(run: RunFolder, same: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a report that was cut short, where it was made alike."""
    try:
        begun = read_json(run.report, "report")
    except UserError:
        return []
    rows = begun.pop("rows", None)
    return rows if begun == same and isinstance(rows, list) else []


def _row(run: RunFolder, config: TrainConfig, timesteps: int | None, episodes: int) -> dict[str, Any]:
    """Score the kept best at T and, where it is another network, the end of its stage."""
    agent = load_agent(run.checkpoint(timesteps), device="cpu")
    row = evaluate(agent.model, agent.environment, episodes=episodes).as_row()
    row |= {"algo": config.algo, "seed": config.seed, "agent_steps": agent.model.num_timesteps}
    end = run.checkpoints / f"{checkpoint_name(timesteps)}-end"
    row["end_return"] = None
    if end.is_dir():
        last = load_agent(end, device="cpu")
        row["end_return"] = row["mean_return"]
        if not _same_weights(agent.model, last.model):
            score = evaluate(last.model, last.environment, episodes=episodes, measure_latency=False)
            row["end_return"] = score.mean_return
    # The ReLU network of a stateful run sees stacked frames: its games are others.
    played = config.of_ann() if timesteps is None and config.trains_ann else config
    also = [_score(agent.model, env, episodes) for env in played.also_reported()]
    return {**row, "also": also} if also else row


def _same_weights(one: BaseAlgorithm, other: BaseAlgorithm) -> bool:
    """Tell whether the best of a stage is what stood at its end."""
    mine, its = one.policy.state_dict(), other.policy.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def _score(model: BaseAlgorithm, env: str, episodes: int) -> dict[str, Any]:
    row = evaluate(model, env, episodes=episodes, measure_latency=False).as_row()
    return {key: row[key] for key in ("environment", "mean_return", "ci95", "distinct_episodes")}


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay result rows out as a text table."""
    header = ["T", "return", "95 %", "at stage end", "spikes/neuron/timestep", "energy ANN/SNN", "ms/decision"]
    body = [
        [
            _name(r),
            f"{r['mean_return']:.1f}",
            f"± {r['ci95']:.1f}",
            "" if r.get("end_return") is None else f"{r['end_return']:.1f}",
            "" if r["spike_rate"] is None else " ".join(f"{v:.2f}" for v in r["spike_rate"].values()),
            f"{r['energy_ratio']:.1f}x",
            "" if r["decision_ms"] is None else f"{r['decision_ms']:.2f}",
        ]
        for r in rows
    ]
    if any(r.get("deployed_ms") is not None for r in rows):
        header.append("deployed")
        for line, r in zip(body, rows, strict=True):
            line.append("" if r.get("deployed_ms") is None else f"{r['deployed_ms']:.2f}")
    if any(r["distinct_episodes"] < r["episodes"] for r in rows):
        header.append("distinct games")
        for line, r in zip(body, rows, strict=True):
            line.append(f"{r['distinct_episodes']} of {r['episodes']}")
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in [header, *body]]
    lines.insert(1, "-" * len(lines[0]))
    elsewhere: dict[str, list[str]] = {}
    for r in rows:
        for other in r.get("also", []):
            name = _name(r) if r["timesteps"] is None else f"T={_name(r)}"
            score = f"{name} {other['mean_return']:.1f} ± {other['ci95']:.1f}"
            elsewhere.setdefault(other["environment"], []).append(score)
    return "\n".join([*lines, *(f"in {env}: {', '.join(scores)}" for env, scores in elsewhere.items())])


def _name(row: dict[str, Any]) -> str:
    return "ReLU" if row["timesteps"] is None else str(row["timesteps"])
