"""Stable-Baselines3's PPO on pixels and optical flow: its own networks take our observations as they are.

pip install stable-baselines3
"""

import argparse

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from wrappers import ActionRepeat, OpticalFlowObservation, PixelObservation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--env-id", default="CartPole-v1")
parser.add_argument("--steps", type=int, default=50_000)
parser.add_argument("--rollout", type=int, default=128, help="steps per environment between two updates")
args = parser.parse_args()


def make_env() -> gym.Env:
    env = gym.make(args.env_id, render_mode="rgb_array")
    return OpticalFlowObservation(PixelObservation(ActionRepeat(env, 2), size=48))


envs = make_vec_env(make_env, n_envs=2)
model = PPO("MultiInputPolicy", envs, n_steps=args.rollout, batch_size=2 * args.rollout, n_epochs=2, device="cpu")
model.learn(args.steps)
returns = [episode["r"] for episode in model.ep_info_buffer]
print(
    f"{model.num_timesteps} steps, mean return of the last {len(returns)} episodes: {sum(returns) / len(returns):.1f}"
)
