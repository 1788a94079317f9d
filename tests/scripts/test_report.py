"""spiking-rl report: the page is complete in itself, says what the files say, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, Cli, as_flags, last_json

from spiking_rl.runs import RunFolder

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
    assert names.count("desc") == names.count("svg") > 3
    assert "video" in names


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
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
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
    JSON.stringify({width: page.documentElement.scrollWidth, duration: video.duration, title: page.title});
  video.readyState > 0 ? tell() : video.addEventListener("loadedmetadata", tell);
};</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: the page is only parsed")
def test_the_page_fits_a_phone_and_plays_in_a_browser(reported: Path, tmp_path: Path) -> None:
    shutil.copy(reported / "report.html", tmp_path)
    (tmp_path / "probe.html").write_text(PROBE)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
    command = [str(BROWSER), *flags, (tmp_path / "probe.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)[0])
    assert found["width"] <= 390
    assert found["duration"] > 0
    assert "CONSOLE" not in done.stderr
