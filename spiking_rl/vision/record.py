"""What a classifier tells of its training: a row per epoch, TensorBoard's curves, lines of text and warnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from spiking_rl.energy import SpikeCounter, measured_energy, odd_layers
from spiking_rl.networks import LayeredNetwork
from spiking_rl.runs import RunFolder
from spiking_rl.tracking import layer_columns, layer_scalars, odd_thresholds


class Record:
    """Rows, curves and words of one run.

    Args:
        folder: the run's.
        note: told a line of text; None: nobody is.
        shown: a progress bar shows every epoch, so that no line needs to.
        remedy: the settings that a warning points at.
    """

    def __init__(self, folder: RunFolder, note: Callable[[str], Any] | None, shown: bool, remedy: str) -> None:
        self.folder = folder
        self.note: Callable[[str], Any] = note or (lambda text: None)
        self.shown = shown
        self.remedy = remedy
        self.rows: list[dict[str, Any]] = []
        self.board: SummaryWriter | None = None

    def restore(self, rows: Any) -> None:
        """Go on behind the rows of an earlier session.

        Raises:
            TypeError: they are none.
        """
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise TypeError("its rows are no rows of a table")
        self.rows = list(rows)

    def open(self) -> None:
        """Open TensorBoard's file; steps of epochs behind the rows that are there are taken back."""
        self.board = SummaryWriter(str(self.folder.tensorboard), purge_step=len(self.rows) + 1)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.board is not None:
            self.board.close()
            self.board = None

    def epoch(self, title: str, row: dict[str, Any], network: LayeredNetwork, counter: SpikeCounter | None) -> None:
        """Write down an epoch.

        Args:
            title: of its line of text.
            row: its first columns, ``score`` (%), ``loss`` and ``learning_rate`` among them.
            network: as it was scored.
            counter: its spikes; None: it has none.
        """
        rates = {} if counter is None else counter.rates
        energy = measured_energy(network, counter or SpikeCounter())
        columns = layer_columns(network, rates)
        row = {
            **row,
            "spike_rate": sum(rates.values()) / len(rates) if rates else None,
            "energy_ratio": energy.ratio,
            "accumulates_per_mac": energy.accumulates_per_mac,
            **columns,
        }
        self.rows.append(row)
        self.folder.write_progress(self.rows)
        spikes = "" if counter is None else f"  spikes={row['spike_rate']:.3f}  energy={energy.ratio:.1f}x less"
        self.note(f"{title}  accuracy={row['score']:.2f}  loss={row['loss']:.3f}{spikes}")
        self.warn([*odd_layers(rates), *odd_thresholds(network)])
        scalars = {"val/accuracy": row["score"], "train/loss": row["loss"], "train/learning_rate": row["learning_rate"]}
        if energy.accumulates_per_mac is not None:
            scalars |= {"val/energy_ratio": energy.ratio, "val/accumulates_per_mac": energy.accumulates_per_mac}
        if self.board is not None:
            for tag, value in (scalars | layer_scalars(columns)).items():
                self.board.add_scalar(tag, value, len(self.rows))

    def progress(self, title: str, done: int, of: int, loss: float, seconds: float) -> None:
        """Tell, where no bar does, that a long epoch goes on.

        Args:
            title: of the line of text.
            done: batches of the epoch.
            of: batches that it has.
            loss: their mean so far.
            seconds: that a batch takes.
        """
        if not self.shown:
            left = seconds * (of - done) / 60
            self.note(f"{title}  batch {done}/{of}  loss={loss:.3f}  {left:.0f} min to go in this epoch")

    def warn(self, warnings: list[str]) -> None:
        """Tell each warning, and which settings it may be about."""
        for warning in warnings:
            self.note(f"warning: {warning}; see {self.remedy}, and --learning-rate")
