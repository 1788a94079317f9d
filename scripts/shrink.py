"""Pack one network of a classification run into a small archive, its weights rounded, to start other runs from.

python -m spiking_rl.scripts.shrink runs/vgg16 --checkpoint relu --output vgg16-relu.tar.xz
"""

from __future__ import annotations

import io
import lzma
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from spiking_rl.checkpoint import CONFIG, WEIGHTS, load_checkpoint, save_checkpoint
from spiking_rl.errors import UserError
from spiking_rl.files import write_atomically
from spiking_rl.runs import RunFolder
from spiking_rl.scripts.options import parse, script
from spiking_rl.vision.config import load_config

DESCRIPTION = """Pack one network of a run into a small archive: a run folder with that checkpoint alone.

Weights are rounded, row by row, to few values and stored in bfloat16; thresholds, leaks and batch norm stay as they
are. Unpack it with tar; --start-from FOLDER, and classify evaluate, take the folder that comes out.

Example: python -m spiking_rl.scripts.shrink runs/vgg16 --checkpoint T1 --output vgg16-T1.tar.xz"""

_CLIPPED = torch.linspace(0.3, 1, 15)  # parts of a row's largest weight at which rounding may cut off
# Every other byte is alike: the upper halves of numbers of one row.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lp": 1, "lc": 3, "pb": 1}]


@dataclass(kw_only=True)
class Options:
    """What to pack, and how small."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a classification run."""
    output: Path
    """Archive to write, .tar.xz; the folder in it has its name."""
    checkpoint: str = "relu"
    """Which network: relu, or T5 and the like."""
    bits: int = 6
    """Of the weights of convolutions."""
    dense_bits: int = 4
    """Of the weights of fully connected layers, which are many and matter little."""

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UserError: naming the first bad field.
        """
        for name in ("bits", "dense_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise UserError(name, getattr(self, name), "must be from 2 to 8; bfloat16 has no more")
        if not self.output.name.endswith(".tar.xz") or self.output.name == ".tar.xz":
            raise UserError("output", str(self.output), "must end in .tar.xz")
        if not self.output.absolute().parent.is_dir():
            raise UserError("output", str(self.output), "lies in a folder that is not there; make it first")
        if self.output.exists():
            raise UserError("output", str(self.output), "is there already; name another file")


@torch.no_grad()
def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return a weight whose rows have at most ``2**bits - 1`` values each, evenly spaced, in bfloat16.

    Args:
        weight: ``(rows, ...)``; where a row is cut off is chosen by the mean square of what rounding changes.
        bits: at least 2.
    """
    rows = weight.float().flatten(1)
    most = 2 ** (bits - 1) - 1
    best, least = torch.zeros_like(rows), torch.full((len(rows), 1), torch.inf)
    for part in _CLIPPED:
        step = (rows.abs().amax(1, keepdim=True) * part / most).clamp(min=1e-30)
        found = (rows / step).round().clamp(-most, most) * step
        error = (found - rows).square().mean(1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best.reshape(weight.shape).bfloat16()


def main() -> None:
    """Write the archive."""
    options = parse(Options, "shrink", sys.argv[1:], DESCRIPTION)
    options.check()
    folder = RunFolder(options.run)
    folder.require()
    load_config(folder.config)  # a classifier's
    tensors, about = load_checkpoint(folder.checkpoints / options.checkpoint)
    bits = {4: options.bits, 2: options.dense_bits}
    small = {n: rounded(t, bits[t.dim()]) if t.dim() in bits else t for n, t in tensors.items()}
    name = options.output.name.removesuffix(".tar.xz")
    inside = f"checkpoints/{options.checkpoint}"
    packed = io.BytesIO()
    about = {key: value for key, value in about.items() if key != "val_accuracy"}  # of the weights as they were
    about |= {"bits": options.bits, "dense_bits": options.dense_bits}
    with tempfile.TemporaryDirectory() as made, lzma.open(packed, "wb", filters=_FILTERS) as stream:
        save_checkpoint(Path(made) / inside, small, about)
        (Path(made) / "config.yaml").write_bytes(folder.config.read_bytes())
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for part in ("config.yaml", f"{inside}/{CONFIG}", f"{inside}/{WEIGHTS}"):
                content = (Path(made) / part).read_bytes()
                member = tarfile.TarInfo(f"{name}/{part}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    write_atomically(options.output, packed.getvalue())
    print(f"{len(packed.getvalue()) / 2**20:.1f} MiB: {options.output}")


if __name__ == "__main__":
    script(main)
