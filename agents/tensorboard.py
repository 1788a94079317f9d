"""TensorBoard output that a resumed run continues without doubled points."""

from __future__ import annotations

from stable_baselines3.common.logger import TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter


class ResumableTensorBoard(TensorBoardOutputFormat):
    """SB3's writer, told from which agent step on older points are void.

    Args:
        folder: receives the event files.
        agent_steps: where this session starts; points above it came from a session that died.
    """

    def __init__(self, folder: str, agent_steps: int) -> None:
        self.writer = SummaryWriter(log_dir=folder, purge_step=agent_steps + 1)
        self._is_closed = False
