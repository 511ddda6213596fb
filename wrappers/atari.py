"""Atari's conventions, frame by frame: pictures without flicker, and lost lives."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from wrappers.errors import UserError


class BrightestOfTwoFrames(gym.Wrapper, RecordConstructorArgs):
    """Observes the brighter of this and the previous frame at each pixel, uint8 of the env's shape (Mnih et al. 2015).

    Atari draws some sprites in every other frame alone. Under `ActionRepeat` the last two frames of each agent step
    count, as in Gymnasium's `AtariPreprocessing`. Raises `UserError` where the observation is no picture.
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) < 2:
            raise UserError(f"the brightest of two frames needs pictures in uint8, not {space}")
        self._previous: np.ndarray | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._previous, info = self.env.reset(seed=seed, options=options)
        return self._previous, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        frame, *rest = self.env.step(action)
        brightest, self._previous = np.maximum(self._previous, frame), frame
        return brightest, *rest


class LifeLoss(gym.Wrapper, RecordConstructorArgs):
    """Says in `info["life_lost"]`, a bool, whether this step cost a life, where `info["lives"]` counts them.

    The episode goes on until the game is over, so that returns are whole games'; learners may treat what follows a
    lost life as worth nothing, which `AtariPreprocessing(terminal_on_life_loss=True)` says by ending the episode.
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        self._lives = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._lives = int(info.get("lives", 0))
        return observation, info

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "lives" in info:
            lives = int(info["lives"])
            info = info | {"life_lost": lives < self._lives}
            self._lives = lives
        return observation, reward, terminated, truncated, info
