"""An agent whose membranes are its memory, played by hand. Usage: stateful.py [AGENT_STEPS]."""

import sys

import gymnasium as gym

from spiking_rl.agents import SpikingPQN

agent_steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500_000
env_id = "spiking_rl/CartPoleMasked-v1"  # CartPole without its velocities
model = SpikingPQN("MlpPolicy", env_id, stateful=True, policy_kwargs={"timesteps": 1}, seed=0)
model.learn(agent_steps)
env = gym.make(env_id)
observation, _ = env.reset(seed=0)
membranes, episode_start, total, over = None, [True], 0.0, False
while not over:
    action, membranes = model.predict(observation, membranes, episode_start, deterministic=True)
    observation, reward, terminated, truncated, _ = env.step(action)
    episode_start, total, over = [False], total + reward, terminated or truncated
print(f"{env_id} after {agent_steps} agent steps: return {total:g}")
