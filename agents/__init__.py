"""Spiking agents on Stable-Baselines3: learners, policies, training, evaluation."""

from spiking_rl.agents.actor_critic_policies import SpikingActorCriticCnnPolicy, SpikingActorCriticPolicy
from spiking_rl.agents.callbacks import TemporalPruningCallback
from spiking_rl.agents.cnn_policies import SpikingCnnPolicy
from spiking_rl.agents.config import DQNConfig, PQNConfig
from spiking_rl.agents.deployed import DeployedAgent
from spiking_rl.agents.dqn import SpikingDQN
from spiking_rl.agents.evaluation import Evaluation, evaluate
from spiking_rl.agents.features import SpikingFeaturesExtractor
from spiking_rl.agents.loading import load_agent
from spiking_rl.agents.policies import SpikingMlpPolicy
from spiking_rl.agents.pqn import SpikingPQN
from spiking_rl.agents.quantile_policies import SpikingQRCnnPolicy, SpikingQRMlpPolicy
from spiking_rl.agents.recording import Recording, record
from spiking_rl.agents.training import prune, train

__all__ = [
    "DQNConfig",
    "DeployedAgent",
    "Evaluation",
    "PQNConfig",
    "Recording",
    "SpikingActorCriticCnnPolicy",
    "SpikingActorCriticPolicy",
    "SpikingCnnPolicy",
    "SpikingDQN",
    "SpikingFeaturesExtractor",
    "SpikingMlpPolicy",
    "SpikingPQN",
    "SpikingQRCnnPolicy",
    "SpikingQRMlpPolicy",
    "TemporalPruningCallback",
    "evaluate",
    "load_agent",
    "prune",
    "record",
    "train",
]
