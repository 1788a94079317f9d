"""The page of ``report``: HTML with its style, charts and video inside; everything from files is escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from spiking_rl.scripts.charts import Line, chart
from spiking_rl.scripts.published import is_number

Row = Mapping[str, Any]


@dataclass
class Facts:
    """What a page tells about a run.

    Attributes:
        name: of the run.
        settings: as config.yaml has them.
        provenance: versions, commit, date and machine of its start, and what was changed as it went on.
        progress: rows of progress.csv.
        results: results.json without interpretation; empty where there is none.
        rows: its rows, one per T, highest first.
        controls: rows of other runs.
        video: an mp4 to embed.
        still: a picture of it (PNG), which is shown before it plays, and printed.
        missing: what the run does not have, one sentence each.
    """

    name: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    progress: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    controls: list[dict[str, Any]] = field(default_factory=list)
    video: Path | None = None
    still: bytes | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def classifies(self) -> bool:
        """Whether the run holds an image classifier."""
        return self.settings.get("kind") == "classify"

    @property
    def title(self) -> str:
        """What was trained, in a line."""
        first, second = ("network", "dataset") if self.classifies else ("env", "algo")
        parts = [self.settings.get(first), self.settings.get(second), f"seed {self.settings.get('seed')}"]
        return ", ".join(str(part) for part in parts)


def page(facts: Facts) -> str:
    """Return the page of a run as HTML that needs no other file."""
    sections = [
        _summary(facts),
        _section("Learning curve", _curve(facts)),
        _section("Scores at every T", _scores(facts)),
        _section("Controls", _controls(facts)),
        _section("Spike rates", _rates(facts)),
        _section("Thresholds and leaks over training", _neurons(facts)),
        _section("Energy and latency", _energy(facts)),
        _section("An episode", _video(facts)),
        _section("Settings", _settings(facts)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "media-src data:; style-src 'unsafe-inline'\">"
        '<link rel="icon" href="data:,">'
        f"<title>{escape(facts.title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main></body></html>\n"
    )


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>\n{body}</section>" if body else ""


def _table(caption: str, header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in others) + "</tr>"
        for first, *others in body
    ]
    kind = ' class="facts"' if len(header) == 2 else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table{kind}>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _number(value: Any, digits: int) -> str:
    if not is_number(value):
        return "" if value is None else str(value)
    return f"{value:,.{digits}f}"


def _stage(timesteps: Any) -> str:
    return "ReLU network" if timesteps is None else f"T={timesteps}"


def _summary(facts: Facts) -> str:
    made = {**facts.provenance, **{k: v for k, v in facts.results.items() if k != "rows"}}
    versions = made.pop("versions", None)
    if isinstance(versions, dict):
        made["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    changes = made.pop("changes", None)
    if changes is not None:
        made["changes"] = "; ".join(map(str, changes)) if isinstance(changes, list) else changes
    names = {"changes": "changed as it went on", "train_seconds": "training, seconds", "peak_rss_mb": "peak memory, MB"}
    missing = "".join(f"<li>{escape(text)}</li>" for text in facts.missing)
    notice = f'<div class="notice"><strong>Not here yet</strong><ul>{missing}</ul></div>' if missing else ""
    body = [(names.get(key, key), str(value)) for key, value in made.items() if value is not None]
    kind = "Image classifier" if facts.classifies else "Agent"
    return (
        f'<header><p class="kind">{kind}, run {escape(facts.name)}</p><h1>{escape(facts.title)}</h1></header>\n'
        f"{_headline(facts)}{notice}" + _table("How it was made", ("fact", "value"), body)
    )


def _headline(facts: Facts) -> str:
    spiking = [row for row in facts.rows if row.get("timesteps") is not None]
    if not spiking:
        return ""
    last = min(spiking, key=lambda row: row["timesteps"])
    unit = "% of test images right" if facts.classifies else "return per episode"
    score = _number(last.get(_score_name(facts)), 2)
    tiles = [(score, f"{unit} at T={last['timesteps']}")]
    if last.get("spike_rate"):
        rates = list(last["spike_rate"].values())
        tiles.append((_number(sum(rates) / len(rates), 3), "spikes per neuron per timestep"))
    tiles.append((f"{_number(last.get('energy_ratio'), 1)}x", "less compute energy than the ReLU network"))
    cells = "".join(f"<li><b>{escape(value)}</b><span>{escape(text)}</span></li>" for value, text in tiles)
    return f'<ul class="tiles">{cells}</ul>'


def _score_name(facts: Facts) -> str:
    return "top1" if facts.classifies else "mean_return"


def _place(facts: Facts, index: int) -> float:
    """Return where a row of progress.csv stands: at its agent steps, a classifier's at its epochs so far."""
    return float(index + 1 if facts.classifies else facts.progress[index]["agent_steps"])


def _stages(facts: Facts) -> list[tuple[float, str]]:
    """Return where T changes, and to what."""
    rows = facts.progress
    marks = [(0.0, _stage(rows[0]["timesteps"]))]
    for i, (a, b) in enumerate(pairwise(rows)):
        if a["timesteps"] != b["timesteps"]:
            marks.append((_place(facts, i), _stage(b["timesteps"])))
    return [(place, text.removesuffix(" network")) for place, text in marks]


def _across(facts: Facts) -> str:
    return "epochs" if facts.classifies else "agent steps"


def _column(facts: Facts, name: str) -> list[tuple[float, float]]:
    found = [(_place(facts, i), row.get(name)) for i, row in enumerate(facts.progress)]
    return [(place, value) for place, value in found if value is not None]


def _curve(facts: Facts) -> str:
    rows = facts.progress
    if not rows:
        return ""
    up = "validation accuracy (%)" if facts.classifies else "return per episode"
    scores = _column(facts, "score")
    known = all(row.get("ci95") is not None for row in rows)
    low = [row["score"] - row["ci95"] for row in rows] if known else []
    high = [row["score"] + row["ci95"] for row in rows] if known else []
    name = "validation images" if facts.classifies else "greedy evaluation"
    lines = [Line(f"{name}, with 95 % interval" if known else name, scores, low, high)]
    lines.append(Line("training episodes", _column(facts, "train_return")))
    return chart("Score while it learned", _across(facts), up, lines, marks=_stages(facts))


def _scores(facts: Facts) -> str:
    if not facts.rows:
        return ""
    if facts.classifies:
        body = [
            [_stage(r.get("timesteps")), _number(r.get("top1"), 2), _number(r.get("images"), 0)] for r in facts.rows
        ]
        return _table("Test accuracy of the kept best at every T", ("stage", "top-1, %", "images"), body)
    header = ("stage", "return", "95 % interval", "at stage end", "episodes", "distinct", "agent steps")
    body = [
        [
            _stage(r.get("timesteps")),
            _number(r.get("mean_return"), 2),
            f"± {_number(r.get('ci95'), 2)}",
            _number(r.get("end_return"), 2),
            _number(r.get("episodes"), 0),
            _number(r.get("distinct_episodes"), 0),
            _number(r.get("agent_steps"), 0),
        ]
        for r in facts.rows
    ]
    text = _table("Greedy return on episodes that selected nothing", header, body)
    elsewhere = [
        [
            str(other.get("environment")),
            _stage(r.get("timesteps")),
            _number(other.get("mean_return"), 2),
            f"± {_number(other.get('ci95'), 2)}",
        ]
        for r in facts.rows
        for other in r.get("also") or []
    ]
    if elsewhere:
        text += _table("In other environments", ("environment", "stage", "return", "95 % interval"), elsewhere)
    return text


def _controls(facts: Facts) -> str:
    score = _score_name(facts)
    own = [{**r, "run": "this run"} for r in facts.rows]
    controls = [r for r in own if r.get("timesteps") is None] + list(facts.controls)
    if not controls:
        return "<p>None here. A ReLU network or a T=1 trained directly is named with <code>--controls RUN</code>.</p>"
    spiking = [r for r in own if r.get("timesteps") is not None]
    rows = controls + sorted(spiking, key=lambda r: int(r["timesteps"]))[:1]
    body = [
        [
            str(r.get("run") or r.get("method") or "published"),
            _stage(r.get("timesteps")) + (f", {r['method']}" if r.get("method") else ""),
            _number(r.get(score), 2) + ("" if r.get("ci95") is None else f" ± {_number(r['ci95'], 2)}"),
            f"{_number(r.get('energy_ratio'), 2)}x",
        ]
        for r in rows
    ]
    unit = "top-1, %" if facts.classifies else "return, 95 % interval"
    caption = "What it is compared with, and this run at its lowest T"
    return _table(caption, ("run", "stage", unit, "energy ANN / SNN"), body)


def _ticks(rows: Sequence[Row]) -> list[tuple[float, str]]:
    """Return the marks of T, which falls to the right."""
    return [(float(-r["timesteps"]), str(r["timesteps"])) for r in rows]


def _rates(facts: Facts) -> str:
    rows = [r for r in facts.rows if r.get("spike_rate") and r.get("timesteps") is not None]
    if not rows:
        return ""
    layers = list(rows[0]["spike_rate"])
    drawn = ""
    if len(rows) > 1:  # of one T the table says as much
        lines = [Line(n, [(float(-r["timesteps"]), float(r["spike_rate"].get(n, 0.0))) for r in rows]) for n in layers]
        drawn = chart("Spikes by layer as T falls", "timesteps T", "spike rate", lines, ticks=_ticks(rows))
    body = [[n, *(_number(r["spike_rate"].get(n), 4) for r in rows)] for n in layers]
    caption = "Spikes per neuron per timestep, measured on the scored episodes"
    if facts.classifies:
        caption = "Spikes per neuron per timestep, measured on the test images"
    return drawn + _table(caption, ["layer", *(_stage(r["timesteps"]) for r in rows)], body)


def _neurons(facts: Facts) -> str:
    text = ""
    for kind, up in (("threshold", "threshold"), ("leak", "leak (1 = none)")):
        names = [n for n in dict.fromkeys(n for row in facts.progress for n in row) if n.startswith(f"{kind}_layer")]
        lines = [Line(n.removeprefix(f"{kind}_"), _column(facts, n)) for n in names]
        if any(line.points for line in lines):
            text += chart(f"Mean {kind} of each layer", _across(facts), up, lines, marks=_stages(facts))
    if not text and any(row.get("timesteps") is not None for row in facts.progress):
        return "<p>This run was made before progress.csv recorded them; its TensorBoard has them.</p>"
    return text


def _energy(facts: Facts) -> str:
    if not facts.rows:
        return ""
    latency = "image_ms" if facts.classifies else "decision_ms"
    names = {
        "energy_ratio": ("energy ANN / SNN", 2),
        "energy_ratio_int32": ("the same, 32-bit integers", 2),
        "energy_ratio_of_rates": ("as the papers count, without pools", 2),
        "accumulates_per_mac": ("additions per MAC", 3),
        "membrane_traffic": ("membrane reads and writes", 0),
        latency: ("ms per image" if facts.classifies else "ms per decision", 3),
        "deployed_ms": ("the same, deployed", 3),
    }
    shown = [n for n in names if any(r.get(n) is not None for r in facts.rows)]
    body = [[_stage(r.get("timesteps")), *(_number(r.get(n), names[n][1]) for n in shown)] for r in facts.rows]
    rows = [r for r in facts.rows if r.get("timesteps") is not None and is_number(r.get("energy_ratio"))]
    drawn = ""
    if len(rows) > 1:
        lines = [
            Line("spiking network", [(float(-r["timesteps"]), float(r["energy_ratio"])) for r in rows]),
            Line("ReLU network", [(float(-r["timesteps"]), 1.0) for r in rows], dashed=True),
        ]
        title = "How many times less energy than the ReLU network"
        drawn = chart(title, "timesteps T", "energy ANN / SNN", lines, ticks=_ticks(rows))
    note = (
        "<p>Compute energy at 45 nm, 32-bit float: a multiply-accumulate 4.6 pJ, an addition 0.9 pJ "
        "(Horowitz 2014), from the measured spike rates. Memory traffic is not in it.</p>"
    )
    return drawn + _table("Energy and latency at every T", ["stage", *(names[n][0] for n in shown)], body) + note


def _video(facts: Facts) -> str:
    if facts.video is None:
        return ""
    data = base64.b64encode(facts.video.read_bytes()).decode()
    label = f"Greedy play of {facts.title}, {facts.video.stem}"
    poster = image = ""
    if facts.still is not None:
        picture = f"data:image/png;base64,{base64.b64encode(facts.still).decode()}"
        poster = f' poster="{picture}"'
        image = f'<img class="still" src="{picture}" alt="A picture of the video">'
    return (
        f'<figure class="film"><video controls muted playsinline preload="auto" aria-label="{escape(label)}"{poster} '
        f'src="data:video/mp4;base64,{data}"></video>{image}<figcaption>{escape(label)}</figcaption></figure>'
    )


def _settings(facts: Facts) -> str:
    body = [(str(k), ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for k, v in facts.settings.items()]
    return f"<details><summary>All settings</summary>{_table('config.yaml', ('setting', 'value'), body)}</details>"


_STYLE = """
:root{--paper:#fff;--ink:#1a202c;--faint:#5a6576;--line:#d9dfe7;--soft:#f5f7fa;
--c0:#2b6cb0;--c1:#c05621;--c2:#2f855a;--c3:#6b46c1;--c4:#c53030;--c5:#0a7480}
@media(prefers-color-scheme:dark){:root{--paper:#14181f;--ink:#e6eaf0;--faint:#a3adbb;--line:#343c48;--soft:#1d232c;
--c0:#63a8ee;--c1:#f0934e;--c2:#57c08a;--c3:#b294f5;--c4:#f58080;--c5:#4cc4d0}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:56rem;margin:0 auto;padding:1rem 1.25rem 3rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;padding-top:1rem;border-top:1px solid var(--line)}
.kind{color:var(--faint);margin:1rem 0 .2rem;overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:.75rem;padding:0;margin:0 0 1.25rem;list-style:none}
.tiles li{flex:1 1 11rem;background:var(--soft);border-radius:.5rem;padding:.7rem 1rem}
.tiles b{display:block;font-size:1.6rem;line-height:1.2}.tiles span{color:var(--faint);font-size:.9rem}
.notice{border-left:4px solid var(--c1);background:var(--soft);padding:.6rem 1rem;margin:0 0 1.25rem}
.notice ul{margin:.3rem 0 0;padding-left:1.2rem}
.wide{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums;min-width:60%}
caption{text-align:left;color:var(--faint);padding-bottom:.35rem}
th,td{padding:.3rem .9rem .3rem 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--faint);font-weight:500}
th:first-child{text-align:left;font-weight:500}
.facts{width:100%}.facts td,.facts th{text-align:left}.facts td{overflow-wrap:anywhere}
.facts th:first-child{white-space:nowrap;color:var(--faint)}
figure{margin:1rem 0}figcaption{color:var(--faint);font-size:.92rem}
svg{width:100%;height:auto;display:block}svg text{fill:var(--ink);font-size:13px;font-family:inherit}
.grid{stroke:var(--line);fill:none}.mark{stroke:var(--faint);stroke-dasharray:4 4;fill:none}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.line{stroke:var(--c);fill:none;stroke-width:2;stroke-linejoin:round}.dot{fill:var(--c)}
.band{fill:var(--c);opacity:.18}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.2rem 0;font-size:.92rem}
.sample{display:inline-block;width:26px;height:4px;margin-right:.4rem;vertical-align:middle}
video{width:100%;max-width:60rem;border:1px solid var(--line);border-radius:.4rem;background:var(--soft)}
.still{display:none;width:100%;border:1px solid var(--line)}
summary{cursor:pointer}:focus-visible{outline:2px solid var(--c0);outline-offset:2px}
@media(max-width:40rem){main{padding:.5rem .9rem 2rem}svg text{font-size:19px}h1{font-size:1.35rem}
table{font-size:.85rem}td,th{padding-right:.55rem}}
@media print{:root{--paper:#fff;--ink:#000;--faint:#444;--line:#bbb;--soft:#f4f4f4;
--c0:#2b6cb0;--c1:#c05621;--c2:#2f855a;--c3:#6b46c1;--c4:#c53030;--c5:#0a7480}
body{font-size:13px}main{max-width:none;padding:0}figure,tr,.tiles,section>.wide{break-inside:avoid}.wide{overflow:visible}
h2,caption{break-after:avoid}h2{margin-top:1.2rem}.tiles li{border:1px solid var(--line)}
figure{max-width:38rem}svg text{font-size:13px}video{display:none}.still{display:block}
details::details-content{display:block;content-visibility:visible;block-size:auto}summary{list-style:none}
details td,details th{padding:0 .9rem 0 0;font-size:.85rem}
summary::-webkit-details-marker{display:none}}
"""
