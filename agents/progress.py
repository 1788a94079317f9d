"""What a person sees while a run goes on: a progress bar, or a line per evaluation in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Progress:
    """A progress bar on a terminal, one line per evaluation elsewhere.

    Args:
        total: agent steps of all stages.
        done: agent steps made before (a resumed run).
        shown: False prints nothing.
    """

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self._shown = shown
        self._total = total
        self._first = done
        self._started = time.monotonic()
        self._latest = ""
        self._bar: tqdm[Any] | None = None
        if shown and sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar:18}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{desc}"
            self._bar = tqdm(total=total, initial=done, unit_scale=True, bar_format=layout, file=sys.stderr)

    def expect(self, total: int) -> None:
        """Change the agent steps of all stages: one that reached its goal early leaves fewer."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total
            self._bar.refresh()

    def step(self, agent_steps: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(agent_steps - self._bar.n)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Show an evaluation, a row of progress.csv."""
        if not self._shown:
            return
        stage = "ReLU" if row["timesteps"] is None else f"T={row['timesteps']}"
        spikes = "" if row["spike_rate"] is None else f" spikes={row['spike_rate']:.2f}"
        text = f"{stage} score={row['score']:.1f} eps={row['epsilon']:.2f}{spikes}"
        if self._bar is not None:
            self._bar.set_description_str("  " + text)
            return
        done = row["agent_steps"]
        rate = (done - self._first) / max(1e-9, time.monotonic() - self._started)
        left = f" {max(0, self._total - done) / rate / 60:.1f} min left" if rate > 0 else ""
        print(f"{done:>9,} agent steps  {text}{left}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Say something without breaking the bar."""
        if self._shown:
            tqdm.write(text, file=sys.stderr) if self._bar is not None else print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
