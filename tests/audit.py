"""Ask for known vulnerabilities of the pinned dependencies: python tests/audit.py PIP_AUDIT CONSTRAINTS.

One that is known fails. A vulnerability service that is out of reach does not: that is said in one line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

_SECONDS = 180


def audited(report: str) -> tuple[int, int, list[str]]:
    """Count what pip-audit says, in its JSON format.

    Returns:
        How many packages there are, how many of them could be checked, and a line for each vulnerability.

    Raises:
        ValueError: it is no such report.
    """
    packages = json.loads(report)["dependencies"]
    checked = [p for p in packages if "skip_reason" not in p]
    found = [
        f"{p['name']} {p['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'no version yet'}"
        for p in checked
        for v in p["vulns"]
    ]
    return len(packages), len(checked), found


def verdict(reports: Sequence[str]) -> tuple[int, list[str]]:
    """Return the exit code and what to print, from the report of each service that was asked (empty: no answer)."""
    answers = []
    for report in reports:
        try:
            answers.append(audited(report))
        except (ValueError, KeyError, TypeError):
            continue
    if found := sorted({line for _, _, lines in answers for line in lines}):
        return 1, ["audit: known vulnerabilities", *found]
    total, checked, _ = max(answers, key=lambda answer: answer[1], default=(0, 0, []))
    if not checked:
        return 0, ["audit: no vulnerability service in reach; nothing was checked"]
    return 0, [f"audit: no known vulnerability in {checked} of {total} packages"]


def main() -> None:
    """Ask both services that know Python packages, the second where the first does not know them all."""
    pip_audit, constraints = sys.argv[1:]
    reports = []
    for service in ("pypi", "osv"):
        command = [pip_audit, "-r", constraints, "--no-deps", "--disable-pip", "-s", service, "-f", "json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        reports.append(done.stdout)
        if verdict(reports)[0]:
            break
    code, lines = verdict(reports)
    print("\n".join(lines))
    sys.exit(code)


if __name__ == "__main__":
    main()
