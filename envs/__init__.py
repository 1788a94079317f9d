"""Environments: one factory for training, evaluation and video; knows no agent."""

from spiking_rl.envs.cartpole import MASKED_CARTPOLE
from spiking_rl.envs.make import ReplayableEnv, check_environment, make_single, make_vectorised

__all__ = ["MASKED_CARTPOLE", "ReplayableEnv", "check_environment", "make_single", "make_vectorised"]
