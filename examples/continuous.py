"""Continuous actions: SAC with spiking actor and critics, pruned to T=1.

Usage: continuous.py [AGENT_STEPS] [SEED] [EPISODES]
"""

import sys

import gymnasium as gym
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from spiking_rl import TemporalPruning
from spiking_rl.agents import SpikingFeaturesExtractor, TemporalPruningCallback

agent_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 16_000
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
episodes = int(sys.argv[3]) if len(sys.argv) > 3 else 100
policy_kwargs = {
    "features_extractor_class": SpikingFeaturesExtractor,
    "features_extractor_kwargs": {"timesteps": 4, "network_kwargs": {"hidden": [64, 64]}},
    "net_arch": {"pi": [], "qf": [64, 64]},  # the action joins the critics behind their spikes, and needs layers there
}
env = Monitor(gym.make("Pendulum-v1"))
starts = min(500, agent_steps // 8)
model = SAC("MlpPolicy", env, policy_kwargs=policy_kwargs, learning_rate=1e-3, learning_starts=starts, seed=seed)
pruning = TemporalPruning(4, 1, first_budget=agent_steps // 2, stage_budget=agent_steps // 6)
play = Monitor(gym.make("Pendulum-v1"))
play.reset(seed=seed)
callback = TemporalPruningCallback(pruning, eval_env=play, eval_episodes=min(10, episodes))
model.learn(2 * agent_steps, callback=callback)
for stage in pruning.stages:
    print(f"T={stage.timesteps}: {stage.best:.1f}, the best mean return while it learned")
mean, deviation = evaluate_policy(model, play, n_eval_episodes=episodes)
print(f"Pendulum-v1 after {model.num_timesteps} agent steps, T={pruning.timesteps}: {mean:.1f} +- {deviation:.1f}")
