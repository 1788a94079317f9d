"""spiking-rl report: the page is complete in itself, says what the files say, and works in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, Cli, as_flags, last_json

from spiking_rl.runs import RunFolder
from spiking_rl.scripts.charts import Line, chart
from spiking_rl.scripts.page import page
from spiking_rl.scripts.report import _task, control_rows, read_facts

HOSTILE = "</style><script>document.title='owned'</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Collects tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def reported(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("report") / "run"
    done = cli("train", "cartpole", *as_flags({**SMALL, "video_episodes": 1}), "--run", run)
    assert done.returncode == 0, done.stderr
    done = cli("report", run, "--controls", run, "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout) == {"report": str(run / "report.html"), "missing": []}
    return run


def test_the_page_needs_no_other_file(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert not re.search(r"https?://|@import|url\(", text)
    sources = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert sources
    assert all(str(source).startswith("data:") for source in sources)
    assert "script" not in names
    assert ("html", {"lang": "en"}) in page.tags
    assert names.count("caption") == names.count("table") > 4
    drawn = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    assert names.count("desc") == len(drawn) > 3
    assert "video" in names
    (picture,) = (attrs["src"] for tag, attrs in page.tags if tag == "img")
    assert picture == dict(page.tags)["video"]["poster"]
    assert base64.b64decode(str(picture).removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"


def test_of_one_t_no_chart_is_drawn_over_t(reported: Path) -> None:
    facts = read_facts(RunFolder(reported))
    assert len(facts.rows) > 1
    over_t = ("Spikes by layer as T falls", "How many times less energy")
    assert all(title in page(facts) for title in over_t)
    alone = page(replace(facts, rows=facts.rows[:1]))
    assert not any(title in alone for title in over_t)
    assert all(f"{rate:.4f}" in alone for rate in facts.rows[0]["spike_rate"].values())


def test_the_numbers_of_the_results_are_on_the_page(reported: Path) -> None:
    text = Page((reported / "report.html").read_text()).text
    results = json.loads((reported / "results.json").read_text())
    assert results["command"] in text
    for row in results["rows"]:
        assert f"{row['mean_return']:,.2f}" in text
        assert f"{row['energy_ratio']:.2f}" in text
        assert all(f"{rate:.4f}" in text for rate in row["spike_rate"].values())
    assert "Mean threshold of each layer" in text
    row = RunFolder(reported).read_progress()[0]
    assert row["threshold_layer1"] > 0
    assert 0 < row["leak_layer2"] <= 1
    assert row["ci95"] >= 0
    rates = (row["spike_rate_layer1"], row["spike_rate_layer2"])
    assert sum(rates) / 2 == pytest.approx(row["spike_rate"])


def test_what_comes_from_files_is_escaped(reported: Path, cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "hostile"
    shutil.copytree(reported, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "env": HOSTILE, HOSTILE: HOSTILE}))
    results = json.loads((run / "results.json").read_text())
    results["rows"][0]["mean_return"] = HOSTILE
    results["rows"][0]["spike_rate"] = {HOSTILE: 0.5}
    (run / "results.json").write_text(json.dumps({**results, "machine": HOSTILE}))
    assert cli("report", run).returncode == 0
    page = Page((run / "report.html").read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(str(attrs["src"]).startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert page.text.count("document.title") > 3, "as text"


def test_an_unfinished_run_says_what_is_missing(reported: Path, cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "unfinished"
    run.mkdir()
    shutil.copy(reported / "config.yaml", run)
    output = tmp_path / "deep" / "page.html"
    made = last_json(cli("report", run, "--output", output, "--json").stdout)
    assert [text.split(":")[0] for text in made["missing"]] == [
        "learning curves",
        "scores at every T, energy and latency",
        "a video",
    ]
    assert all(text in Page(output.read_text()).text for text in made["missing"])


def test_mistakes_are_told_before_anything_is_written(reported: Path, cli: Cli, tmp_path: Path) -> None:
    for arguments, words in (
        ((tmp_path,), "holds no run"),
        ((reported, "--output", tmp_path / "page.pdf"), "must end with .html"),
        ((reported, "--output", tmp_path / "page.html", "--controls", tmp_path), "holds no run"),
        ((reported, "--output", tmp_path / "page.html", "--results", reported / "results.json"), "holds no control"),
    ):
        refused = cli("report", *arguments)
        assert refused.returncode == 2
        assert words in refused.stderr
    assert not list(tmp_path.iterdir())


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PROBE = """<body style="margin:0"><pre id="found"></pre>
<iframe id="phone" style="border:0;width:390px;height:800px" src="report.html"></iframe><script>
document.getElementById("phone").onload = event => {
  const page = event.target.contentDocument, video = page.querySelector("video");
  const tell = () => document.getElementById("found").textContent =
    JSON.stringify({width: page.documentElement.scrollWidth, duration: video && video.duration, title: page.title});
  !video || video.readyState > 0 ? tell() : video.addEventListener("loadedmetadata", tell);
};</script></body>"""


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page is only parsed")


def browse(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page in headless Chromium."""
    own = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    command = [str(BROWSER), *own, f"--user-data-dir={profile}", "--virtual-time-budget=10000", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def on_a_phone(folder: Path) -> dict[str, Any]:
    """Return width, title and duration of the film of a folder's report.html in a frame as wide as a phone."""
    (folder / "probe.html").write_text(PROBE)
    done = browse(folder / "probe.html", folder / "profile", "--dump-dom")
    assert "CONSOLE" not in done.stderr, "no error, and nothing that the page's policy refuses"
    found: dict[str, Any] = json.loads(re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)[0])
    return found


@needs_browser
def test_the_page_fits_a_phone_and_plays_in_a_browser(reported: Path, tmp_path: Path) -> None:
    shutil.copy(reported / "report.html", tmp_path)
    found = on_a_phone(tmp_path)
    assert found["width"] <= 390
    assert found["duration"] > 0


@needs_browser
def test_a_printed_page_has_a_picture_of_the_film_and_all_settings(reported: Path, tmp_path: Path) -> None:
    page, pages = reported / "report.html", {}
    for name, text in (("whole", page.read_text()), ("folded", re.sub(r"details::[^}]*}", "", page.read_text()))):
        (tmp_path / f"{name}.html").write_text(text)
        flag = f"--print-to-pdf={tmp_path / name}.pdf"
        browse(tmp_path / f"{name}.html", tmp_path / "profile", flag, "--no-pdf-header-footer")
        pdf = (tmp_path / f"{name}.pdf").read_bytes()
        assert b"/Subtype /Image" in pdf
        pages[name] = len(re.findall(rb"/Type /Page\b", pdf))
    assert pages["whole"] > pages["folded"], "paper cannot unfold the settings"


def test_lines_beyond_the_six_colours_are_told_apart() -> None:
    drawn = chart("t", "x", "y", [Line(f"layer{i}", [(0, i), (1, i)]) for i in range(15)])
    samples = re.findall(r'<li class="(c\d)">.*?<path class="line" d="M0 2H26"(.*?)/>', drawn)
    assert len(set(samples)) == len(samples) == 15


def test_what_cannot_be_drawn_is_left_out() -> None:
    wild = Line("wild", [(0, 1), (1, float("nan")), (2, float("inf")), (3, -1e308), (4, 2)], [0.0] * 5, [3.0] * 5)
    drawn = chart("t", "x", "y", [wild, Line("gone", [(0, float("nan"))])])
    assert drawn.count("<circle") == 2
    assert "gone" not in drawn
    assert "nan" not in drawn
    assert chart("t", "x", "y", [Line("gone", [(0, float("inf"))])]) == ""


def test_scores_of_another_environment_are_no_controls(cli: Cli, reported: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(reported, other)
    results = json.loads((other / "results.json").read_text())
    for row in results["rows"]:
        row |= {"environment": "Acrobot-v1", "method": "direct"}
    (other / "results.json").write_text(json.dumps(results))
    before = (reported / "report.html").read_bytes()
    for flags in (("--controls", other), ("--results", other / "results.json")):
        done = cli("report", reported, *flags)
        assert done.returncode == 2
        assert "is of Acrobot-v1, and the run of CartPole-v1" in done.stderr
    assert (reported / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("ALE/Pong-v5?sticky_actions=0&frame_stack=4", "ALE/Pong-v5", True),
        ("ALE/Pong-v5", "PongNoFrameskip-v4?sticky_actions=0.25", True),
        ("ALE/Pong-v5", "ALE/Breakout-v5", False),
        ("my_env:MyEnv-v0", "MyEnv-v0", True),
        ("cifar10", "cifar100", False),
    ],
)
def test_what_is_the_same_task(one: str, other: str, same: bool) -> None:
    assert (_task(one) == _task(other)) is same


def test_a_control_says_that_it_was_trained_directly(reported: Path, tmp_path: Path) -> None:
    shutil.copytree(reported, tmp_path / "direct")
    path = tmp_path / "direct" / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "timesteps": 2, "prune_to": 2}))
    folder = RunFolder(tmp_path / "direct")
    results = json.loads(folder.results.read_text())
    folder.write_results({**results, "rows": results["rows"][-1:]})
    rows = control_rows(folder)
    assert [(row["run"], row["method"]) for row in rows] == [("direct", "trained directly")]
    assert "T=2, trained directly" in page(replace(read_facts(RunFolder(reported)), controls=rows))
    assert all("method" not in row for row in control_rows(RunFolder(reported)))
