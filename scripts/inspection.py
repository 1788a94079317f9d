"""spiking-rl inspect: what a checkpoint is made of, layer by layer, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spiking_rl.checkpoint import read_json
from spiking_rl.describing import LayerFacts, Spread, describe
from spiking_rl.energy import FLOAT32, membrane_traffic
from spiking_rl.errors import UserError
from spiking_rl.runs import checkpoint_name
from spiking_rl.scripts.loading import Loaded, load
from spiking_rl.scripts.options import first_argument, parse
from spiking_rl.scripts.published import checked_rows
from spiking_rl.settings import read_settings

DESCRIPTION = """Show what a checkpoint is made of: every layer, its thresholds and leaks, MACs, energy, provenance.

CHECKPOINT is a run folder of an agent or a classifier, one of its checkpoints, or a pretrained agent
(see `spiking-rl list`). Nothing is played and no data set is read.

Example: spiking-rl inspect runs/cartpole-seed0 --timesteps 1"""

_MEASURED = ("episodes", "images", "mean_return", "ci95", "top1", "spike_rate", "energy_ratio", "energy_ratio_int32")
_FROM_CHECKPOINT = ("algo", "environment", "network", "dataset", "seed", "agent_steps", "score", "val_accuracy")
_RIGHT = (4, 5)  # columns of the table that hold whole numbers
_FROM_RUN = ("versions", "commit", "date", "machine")


@dataclass(kw_only=True)
class Options:
    """What to show."""

    timesteps: int | None = None
    """T of the run; none: its lowest."""


def run(args: list[str]) -> dict[str, Any]:
    """Print the tables; return what they say."""
    name, rest = first_argument(args, "checkpoint", "a run or checkpoint folder, or a pretrained agent")
    options = parse(Options, "inspect CHECKPOINT", rest, DESCRIPTION)
    assert name is not None
    loaded = load(name, options.timesteps)
    layers = describe(loaded.network)
    _require_numbers(layers, loaded.checkpoint)
    facts = {**_totals(loaded, layers), "provenance": _provenance(loaded), "layers": [asdict(x) for x in layers]}
    for layer in facts["layers"]:
        layer["output_shape"] = list(layer["output_shape"])
    print(f"{loaded.checkpoint}\n\n{_layer_table(layers)}\n\n{_lines(_shown(facts))}\n\n{_lines(_origin(facts))}")
    return facts


def _require_numbers(layers: Sequence[LayerFacts], origin: Path) -> None:
    for layer in layers:
        for spread in (layer.threshold, layer.leak):
            if spread is not None and not math.isfinite(spread.min + spread.max):
                raise UserError("checkpoint", str(origin), f"{layer.name} holds a threshold or leak that is no number")


def _totals(loaded: Loaded, layers: Sequence[LayerFacts]) -> dict[str, Any]:
    """Return everything about the network as a whole."""
    network, macs = loaded.network, sum(layer.macs for layer in layers)
    measured = _measured(loaded)
    return {
        "checkpoint": str(loaded.checkpoint),
        "run": None if loaded.run is None else str(loaded.run.path),
        "kind": "classifier" if loaded.config.get("kind") == "classifier" else "agent",
        "timesteps": network.timesteps if network.spiking else None,
        "stateful": loaded.stateful,
        "encoding": "direct" if network.encoder is None else network.encoder.name,
        "single_spike": network.single_spike,
        "kappa": 0.0 if network.spike_time is None else network.spike_time.kappa,
        "input_shape": list(network.input_shape),
        "parameters": sum(layer.parameters for layer in layers),
        "macs": macs,
        "membrane_traffic": membrane_traffic(network, stateful=loaded.stateful),
        "ann_energy_nj": macs * FLOAT32.mac / 1e3,
        "measured": measured,
        "measure_with": None if measured else loaded.measure or None,
    }


def _measured(loaded: Loaded) -> dict[str, Any] | None:
    """Return the run's results of exactly these weights, None where there are none.

    Raises:
        UserError: results.json is damaged.
    """
    if loaded.run is None or not loaded.run.results.is_file():
        return None
    timesteps, path = loaded.config.get("timesteps"), loaded.run.results
    for row in checked_rows(read_json(path, "results"), path):
        weights = row.get("weights_sha256", row.get("sha256"))
        # Older rows know no hash: they are of the kept best, not of a stage's end.
        same = weights == loaded.config["sha256"] if weights else loaded.checkpoint.name == checkpoint_name(timesteps)
        if same and row["timesteps"] == timesteps:
            kept: dict[str, Any] = _plain({name: row[name] for name in _MEASURED if row.get(name) is not None})
            rates = kept.pop("spike_rate", None)
            if not all(map(_is_number, (*kept.values(), *(rates or {}).values()))):
                raise UserError("results", str(path), f"holds a row of T={timesteps} with no numbers; score it again")
            return {**kept, "spike_rate": rates}
    return None


def _is_number(value: Any) -> bool:
    """Tell whether this is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) < 1e300


def _provenance(loaded: Loaded) -> dict[str, Any]:
    """Return where the weights come from; None for what nobody has recorded."""
    config = loaded.config
    policy = config.get("policy")
    facts = {"format_version": config["format_version"], "weights_sha256": config["sha256"]}
    facts |= {name: config[name] for name in _FROM_CHECKPOINT if config.get(name) is not None}
    if isinstance(policy, dict) and "network" in policy:
        facts["network"] = policy["network"]
    made: Any = {}
    if loaded.run is not None:
        made = read_settings(loaded.run.config).get("provenance")
    facts |= {name: made.get(name) if isinstance(made, dict) else None for name in _FROM_RUN}
    plain: dict[str, Any] = _plain(facts)
    return plain


def _plain(value: Any) -> Any:
    """Return a value out of a file as JSON can hold it: dates and what is no number become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def _layer_table(layers: Sequence[LayerFacts]) -> str:
    header = ["layer", "kind", "neuron", "output", "parameters", "MACs", "threshold", "leak"]
    body = [
        [
            layer.name,
            layer.kind,
            layer.neuron or "",
            "x".join(map(str, layer.output_shape)),
            f"{layer.parameters:,}",
            f"{layer.macs:,}",
            _range(layer.threshold),
            _range(layer.leak),
        ]
        for layer in layers
    ]
    body.append(["all", "", "", "", *(f"{sum(getattr(x, n) for x in layers):,}" for n in ("parameters", "macs")), ""])
    body[-1].append("")
    if all(layer.threshold is None for layer in layers):  # a ReLU network
        header, body = header[:-2], [line[:-2] for line in body]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    text = ["  ".join(_pad(line, widths)).rstrip() for line in [header, *body]]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(text)


def _pad(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Bring cells to their columns' widths: numbers stand right."""
    columns = enumerate(zip(cells, widths, strict=True))
    return [cell.rjust(width) if i in _RIGHT else cell.ljust(width) for i, (cell, width) in columns]


def _range(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if spread.count == 1:
        return f"{spread.mean:.3f}"
    return f"{spread.mean:.3f} ({spread.min:.3f}..{spread.max:.3f})"


def _shown(facts: dict[str, Any]) -> dict[str, str]:
    """Return the totals in words."""
    spiking = facts["timesteps"] is not None
    traffic = facts["membrane_traffic"]
    shown = {
        "kind": facts["kind"] if spiking else f"{facts['kind']}, ReLU network",
        "input": "x".join(map(str, facts["input_shape"])),
    }
    if spiking:
        shown |= {
            "timesteps": str(facts["timesteps"]),
            "membranes": "carried from decision to decision" if facts["stateful"] else "fresh at every decision",
            "encoding": facts["encoding"] + (", one spike per neuron at most" if facts["single_spike"] else ""),
            "membrane traffic": f"{traffic:,} reads and writes" if traffic else "none",
        }
    if facts["kappa"]:
        shown["spike-time score"] = f"kappa {facts['kappa']:g}"
    return shown | {"energy of the ANN": f"{facts['ann_energy_nj']:,.1f} nJ"} | _results(facts)


def _results(facts: dict[str, Any]) -> dict[str, str]:
    """Return what was measured, or how to measure it."""
    row = facts["measured"]
    if row is None:
        how = facts["measure_with"]
        remedy = f"measure with: {how}" if how else "classify evaluate scores the kept best, not the end of a stage"
        return {"score, spikes, energy": f"not measured; {remedy}"}
    shown = {}
    if "mean_return" in row:
        around = f" ± {row['ci95']:.1f}" if "ci95" in row else ""
        shown["score"] = f"{row['mean_return']:.1f}{around}" + (
            f", {row['episodes']} episodes" if "episodes" in row else ""
        )
    elif "top1" in row:
        count = f"{row['images']:,} " if "images" in row else ""
        shown["score"] = f"{row['top1']:.2f} % of {count}test images"
    if row["spike_rate"]:
        shown["spikes"] = " ".join(f"{rate:.2f}" for rate in row["spike_rate"].values()) + " per neuron and timestep"
    if "energy_ratio" in row:
        integers = f" (integers: {row['energy_ratio_int32']:.1f}x)" if "energy_ratio_int32" in row else ""
        shown["energy, ANN/SNN"] = f"{row['energy_ratio']:.2f}x{integers}"
    return shown


def _origin(facts: dict[str, Any]) -> dict[str, str]:
    """Return the provenance in words."""
    made = dict(facts["provenance"])
    if isinstance(made["versions"], dict):
        made["versions"] = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    unknown = [name for name in _FROM_RUN if made[name] is None]
    words = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in made.items()}
    shown = {name.replace("_", " "): words[name] for name, value in made.items() if value is not None}
    if unknown:
        shown["not recorded"] = ", ".join(unknown)
    return shown


def _lines(facts: Mapping[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())
