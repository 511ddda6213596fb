"""TorchRL collects rollouts of pixels and optical flow as TensorDicts, ready for its replay buffers and losses.

pip install torchrl
"""

import argparse

import gymnasium as gym
from torchrl.envs import Compose, GymWrapper, PermuteTransform, StepCounter, ToTensorImage, TransformedEnv

from wrappers import ActionRepeat, OpticalFlowObservation, PixelObservation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--env-id", default="Pendulum-v1")
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

env = gym.make(args.env_id, render_mode="rgb_array")
env = OpticalFlowObservation(PixelObservation(ActionRepeat(env, 2), size=64))
env = TransformedEnv(
    GymWrapper(env),
    Compose(
        ToTensorImage(in_keys=["rgb"]),  # float, channels first
        PermuteTransform(dims=(-1, -3, -2), in_keys=["flow"]),
        StepCounter(),
    ),
)
rollout = env.rollout(args.steps)
for key in ("rgb", "flow"):
    print(key, tuple(rollout[key].shape), rollout[key].dtype)
print(f"reward {rollout['next', 'reward'].mean():.2f} on average")
env.close()
