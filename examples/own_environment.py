"""An environment of your own: register it, and every agent and command takes it as `module:id`.

PYTHONPATH=. python agents/drq_dqn.py --env-id examples.own_environment:Catch-v0 --action-repeat 1 --fresh

Run by itself, this file checks that the wrappers understand it.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env


class Catch(gym.Env):
    """A ball falls; the paddle must be where it lands. The picture is the observation: nothing is rendered."""

    metadata = {"render_modes": []}  # noqa: RUF012
    observation_space = spaces.Box(0, 255, (48, 48, 3), np.uint8)
    action_space = spaces.Discrete(3)  # left, stay, right

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, int(self.np_random.integers(12)), 5
        return self._picture(), {}

    def step(self, action: int):
        self.paddle = int(np.clip(self.paddle + action - 1, 0, 11))
        self.row += 1
        landed = self.row == 11
        caught = landed and abs(self.paddle - self.column) <= 1
        # `success` in info becomes the columns success_any and success_last of every table
        return self._picture(), float(caught), landed, False, {"success": float(caught)}

    def _picture(self) -> np.ndarray:
        board = np.full((12, 12, 3), 30, np.uint8)
        board[11, max(0, self.paddle - 1) : self.paddle + 2] = (80, 160, 255)
        board[self.row, self.column] = (255, 160, 0)
        return board.repeat(4, 0).repeat(4, 1)


gym.register("Catch-v0", Catch, max_episode_steps=20)


if __name__ == "__main__":
    from semore_bench.envs import EnvConfig, make_env

    env = make_env("examples.own_environment:Catch-v0", EnvConfig(image_size=48, action_repeat=1))
    check_env(env, skip_render_check=True)
    print("understood:", {name: space.shape for name, space in env.observation_space.spaces.items()}, env.action_space)
