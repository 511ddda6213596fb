"""A small environment with pixels, early ends and no time limit of its own; `tests.toy_env:Toy-v0`."""

import os
import sys

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import DiscretizeAction


class Toy(gym.Env):
    """A square that the action moves; the episode terminates at the border, with the reward being closeness to it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        render_mode=None,
        nan_at: int = -1,
        crash_at: int = -1,
        discrete: bool = False,
        still: bool = False,
        longest: int = 1000,
    ):
        self.render_mode, self.nan_at, self.crash_at = render_mode, nan_at, crash_at
        self.still, self.longest = still, longest
        self.observation_space = spaces.Box(0, 255, (40, 40, 3), np.uint8)
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-2, 2, (2,), np.float32)
        self.count = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-0.2, 0.2, 2)
        self.steps_left = self.np_random.integers(1, self.longest, endpoint=True)
        return self._observe(), {}

    def step(self, action):
        self.count += 1
        if self.count == self.crash_at:
            os._exit(9)
        if not self.still:
            self._move(action)
        self.steps_left -= 1
        terminated = bool(np.abs(self.position).max() > 0.8) or self.steps_left == 0
        reward = float("nan") if self.count == self.nan_at else float(np.abs(self.position).max())
        return self._observe(), reward, terminated, False, {"success": float(terminated)}

    def _move(self, action):
        self.position = self.position + 0.05 * np.asarray(action) + self.np_random.normal(0, 0.02, 2)

    def loaded_modules(self):
        return sorted(sys.modules)

    def _observe(self):
        image = np.zeros((40, 40, 3), np.uint8)
        y, x = (20 + 18 * self.position.clip(-1, 1)).astype(int)
        image[max(0, y - 4) : y + 4, max(0, x - 4) : x + 4] = (255, 128, 0)
        return image

    def render(self):
        return self._observe()


class Blind(gym.Env):
    """Neither has nor renders pixels."""

    metadata = {"render_modes": ["human"]}  # noqa: RUF012
    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 0.0, False, False, {}


class Blinking(gym.Env):
    """Two lamps that light up in turn; every third step costs one of three lives."""

    metadata = {"render_modes": []}  # noqa: RUF012
    observation_space = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.actions = 0, []
        return self._frame(), {"lives": 3}

    def step(self, action):
        self.count += 1
        self.actions.append(action)
        return self._frame(), 1.0, self.count >= 9, False, {"lives": 3 - self.count // 3}

    def _frame(self):
        frame = np.zeros((40, 40, 3), np.uint8)
        frame[:, 20 * (self.count % 2) :][:, :20] = 200
        return frame


def discrete_pendulum(render_mode=None) -> gym.Env:
    """A MuJoCo scene, which has named things: pushed to the left, not at all, or to the right."""
    return DiscretizeAction(gym.make("InvertedPendulum-v5", render_mode=render_mode), bins=3)


gym.register("Toy-v0", Toy, max_episode_steps=25)
gym.register("ToyShort-v0", Toy, max_episode_steps=25, kwargs={"longest": 5})
gym.register("ToyNaN-v0", Toy, max_episode_steps=25, kwargs={"nan_at": 130})
gym.register("ToyCrash-v0", Toy, max_episode_steps=25, kwargs={"crash_at": 130})
gym.register("ToyDiscrete-v0", Toy, max_episode_steps=25, kwargs={"discrete": True})
gym.register("DiscretePendulum-v0", discrete_pendulum, max_episode_steps=100)
gym.register("Blinking-v0", Blinking)
gym.register("Blind-v0", Blind, max_episode_steps=25)
