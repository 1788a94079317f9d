"""A spiking policy in a Stable-Baselines3 script: only the policy changes. Usage: stock_dqn.py [AGENT_STEPS]."""

import sys

from stable_baselines3 import DQN
from stable_baselines3.common.evaluation import evaluate_policy

from spiking_rl.agents import SpikingMlpPolicy

agent_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
settings = {"learning_rate": 2.3e-3, "batch_size": 64, "learning_starts": 1000, "target_update_interval": 10}
settings |= {"train_freq": 256, "gradient_steps": 128, "exploration_fraction": 0.16, "exploration_final_eps": 0.04}
model = DQN(SpikingMlpPolicy, "CartPole-v1", policy_kwargs={"timesteps": 4}, seed=0, **settings)
model.learn(agent_steps)
mean, deviation = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
print(f"CartPole-v1 after {agent_steps} agent steps, T=4: {mean:.1f} +- {deviation:.1f}")
