"""Environments of every kind of picture, action and info: `tests.odd_envs:Odd-v0` with what `Odd` says."""

import threading
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

PICTURES: dict[str, tuple[spaces.Box, Any]] = {
    "uint8": (spaces.Box(0, 255, (40, 48, 3), np.uint8), lambda rgb: rgb),
    "float": (spaces.Box(0, 1, (40, 48, 3), np.float32), lambda rgb: (rgb / 255.0).astype(np.float32)),
    "float64": (spaces.Box(0, 1, (40, 48, 3), np.float64), lambda rgb: rgb / 255.0),
    "float-255": (spaces.Box(0, 255, (40, 48, 3), np.float32), lambda rgb: rgb.astype(np.float32)),
    "int32": (spaces.Box(0, 255, (40, 48, 3), np.int32), lambda rgb: rgb.astype(np.int32)),
    "rgba": (
        spaces.Box(0, 255, (40, 48, 4), np.uint8),
        lambda rgb: np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]),
    ),
    "channel-first": (spaces.Box(0, 255, (3, 40, 48), np.uint8), lambda rgb: rgb.transpose(2, 0, 1)),
    "channel-first-float": (
        spaces.Box(0, 1, (3, 40, 48), np.float32),
        lambda rgb: (rgb.transpose(2, 0, 1) / 255.0).astype(np.float32),
    ),
    "grey": (spaces.Box(0, 255, (40, 48), np.uint8), lambda rgb: rgb[..., 0]),
    "grey-last": (spaces.Box(0, 255, (40, 48, 1), np.uint8), lambda rgb: rgb[..., :1]),
    "grey-first": (spaces.Box(0, 255, (1, 40, 48), np.uint8), lambda rgb: rgb[None, ..., 0]),
}
"""observation spaces, and how they show an RGB picture (40, 48, 3)"""

ACTIONS: dict[str, spaces.Space] = {
    "vector": spaces.Box(-2, 2, (2,), np.float32),
    "uneven": spaces.Box(np.float32([0, -0.3]), np.float32([5, 0.4])),
    "float64": spaces.Box(-1, 1, (2,), np.float64),
    "integers": spaces.Box(0, 4, (2,), np.int64),
    "bytes": spaces.Box(0, 255, (3,), np.uint8),
    "matrix": spaces.Box(-1, 1, (2, 3), np.float32),
    "scalar": spaces.Box(-1, 1, (), np.float32),
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
}

LOCK, UNNAMED = threading.Lock(), lambda: None

INFOS: dict[str, Any] = {
    "nothing": lambda step: {},
    "dict": lambda step: {"rewards": {"speed": 1.0, "deeper": {"still": step}}},
    "growing": lambda step: {"path": np.zeros(step), "names": ["a"] * step},
    "unpicklable": lambda step: {"lock": LOCK, "function": UNNAMED},
    "final": lambda step: {"final_info": {"episode": {"r": 1.0}}, "final_obs": {"rgb": np.zeros(3)}},
    "none": lambda step: {"success": None},
    "bool": lambda step: {"success": step >= 3},
    "float": lambda step: {"success": float(step >= 3)},
    "array": lambda step: {"success": np.array([step >= 3])},
    "is-success": lambda step: {"is_success": np.float32(step >= 3)},
    "now-and-then": lambda step: {"success": True, "extra": "word"} if step == 3 else {},
    "array-of-many": lambda step: {"success": np.zeros(3), "env_step": 99},
}
"""what `info` says at each simulator step of an episode, counted from 1; 0 is the reset"""
KINDS = tuple(INFOS.values())
INFOS["everything"] = lambda step: KINDS[step % len(KINDS)](step)


class Odd(gym.Env):
    """A square that moves over a picture of `picture` kind, under actions and with infos of the kinds named.

    It takes seeds that fit in an int32 alone, and actions of its own space alone; it remembers options and actions.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, picture="uint8", actions="vector", infos="nothing", render_mode=None, length=12):
        self.render_mode, self.infos, self.length = render_mode, infos, length
        self.observation_space, self._show = PICTURES[picture]
        self.action_space = ACTIONS[actions]
        self.taken = []

    def reset(self, *, seed=None, options=None):
        np.int32(seed or 0)
        self.options = options
        super().reset(seed=seed)
        self.count, self.place = 0, self.np_random.integers(0, 30, 2)
        return self._show(self._rgb()), INFOS[self.infos](0)

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.taken.append(action)
        self.count += 1
        self.place = (self.place + self.np_random.integers(0, 4, 2)) % 30
        ended = self.count >= self.length
        return self._show(self._rgb()), 1.0, ended, False, INFOS[self.infos](self.count)

    def _rgb(self):
        picture = np.full((40, 48, 3), 30, np.uint8)
        picture[:20] = 120
        y, x = self.place
        picture[y : y + 10, x : x + 10] = (250, 128, 2)
        return picture

    def render(self):
        return self._rgb()


class NoRenderMode(Odd):
    """Its constructor knows no render mode."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self):
        super().__init__()


class HumanAlone(Odd):
    """Its constructor refuses a render mode that it does not know."""

    metadata = {"render_modes": ["human"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        assert render_mode is None or render_mode in self.metadata["render_modes"]
        super().__init__()


IDS = {
    "Odd-v0": (Odd, {}),
    "OddNoRenderMode-v0": (NoRenderMode, {}),
    "OddHumanAlone-v0": (HumanAlone, {}),
    **{f"OddPicture{number}-v0": (Odd, {"picture": name}) for number, name in enumerate(PICTURES)},
    **{f"OddAction{number}-v0": (Odd, {"actions": name}) for number, name in enumerate(ACTIONS)},
    **{f"OddInfo{number}-v0": (Odd, {"infos": name}) for number, name in enumerate(INFOS)},
}
for name, (kind, settings) in IDS.items():
    gym.register(name, f"{kind.__module__}:{kind.__name__}", kwargs=settings)
