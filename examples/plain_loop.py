"""A plain Gymnasium loop: pixels, optical flow and captions of any environment, and nothing else of this project."""

import argparse

import gymnasium as gym

from wrappers import ActionRepeat, CaptionObservation, OpticalFlowObservation, PixelObservation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--env-id", default="shimmy:dm_control/cartpole-balance-v0")
parser.add_argument("--annotator", default="simulator", help="embedded for what MuJoCo does not simulate")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

env = gym.make(args.env_id, render_mode="rgb_array")
env = OpticalFlowObservation(PixelObservation(ActionRepeat(env, 2), size=84))
env = CaptionObservation(env, annotator=args.annotator, every=8)

observation, info = env.reset(seed=0)
for _ in range(args.steps):
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    if info["annotations"]:
        moving = abs(observation["flow"]).max()
        print(f"step {info['frame_step']}: {info['caption']}; at most {moving:.1f} pixels from frame to frame")
    if terminated or truncated:
        observation, info = env.reset()
env.close()
