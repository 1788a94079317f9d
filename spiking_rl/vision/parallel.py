"""Training in several processes: each takes its share of every batch, and all make the same update.

Started by torchrun, on one machine or on several that share the run folder:

    torchrun --nproc_per_node 2 -m -- spiking_rl.scripts classify train vgg16 cifar10 ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spiking_rl.errors import UserError

_PATIENCE = timedelta(hours=2)  # while the first process scores, the others wait


@dataclass(frozen=True)
class Team:
    """The processes of a run.

    Attributes:
        rank: of this one; 0 writes, prints and scores.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes, prints and scores."""
        return self.rank == 0

    def command(self) -> list[str]:
        """Return how to start the command line in as many processes again; on several machines add what says so."""
        if self.size == 1:
            return ["spiking-rl"]
        here = os.environ.get("LOCAL_WORLD_SIZE", str(self.size))
        return ["torchrun", "--nproc_per_node", here, "-m", "--", "spiking_rl.scripts"]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of floating point by their sums over all processes.

        Raises:
            UserError: another process died.
        """
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
        self._together(lambda: dist.all_reduce(flat))
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def average_statistics(self, network: nn.Module) -> None:
        """Replace running statistics, which every process kept of its share, by their means."""
        if self.size > 1:
            statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
            self.sum(statistics)
            for buffer in statistics:
                buffer /= self.size

    def alike(self, network: nn.Module) -> None:
        """Give all processes the weights and statistics of the first."""
        if self.size > 1:
            for tensor in [*network.parameters(), *network.buffers()]:
                whole = tensor.detach().contiguous()
                self._together(partial(dist.broadcast, whole, 0))
                tensor.detach().copy_(whole)

    def told(self, number: float | None) -> float:
        """Return the number that the first process gives; the others' is ignored."""
        given = torch.tensor([0.0 if number is None else number], dtype=torch.float64)
        if self.size > 1:
            self._together(lambda: dist.broadcast(given, 0))
        return float(given)

    def _together(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            remedy = f"one of them died or is out of reach ({reason}); what was saved is intact, go on with --resume"
            raise UserError("processes", self.size, remedy) from None


def join() -> Team:
    """Return the processes that torchrun started, or this one alone.

    Raises:
        UserError: torchrun's variables make no sense, or the others cannot be reached.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Team()
    if not dist.is_initialized():
        try:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # Both: --device cpu may be asked for beside a GPU, and a number is told from the CPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            problem = f"cannot be joined ({reason}); see torchrun"
            raise UserError("processes", os.environ["WORLD_SIZE"], problem) from None
    return Team(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """End what :func:`join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
