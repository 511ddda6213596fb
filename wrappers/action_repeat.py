"""One agent step is several simulator steps."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from wrappers.errors import UserError

SUCCESS_KEYS = ("success", "is_success")
"""what environments call success in `info`; the first that says anything counts"""


class ActionRepeat(gym.Wrapper, RecordConstructorArgs):
    """Applies each action `n` times, or until the episode ends, and returns the sum of the rewards.

    `info` is that of the last simulator step, with two additions: `env_step` counts simulator steps since the reset of
    the episode (0 at reset), and `success_any`, where the environment reports success, says whether it did at any of
    the steps. Raises `UserError` unless `n` is a whole number from 1 on.

    >>> env = ActionRepeat(gym.make("CartPole-v1"), 4)
    >>> _, info = env.reset(seed=0)
    >>> _, reward, _, _, info = env.step(0)
    >>> float(reward), info["env_step"]
    (4.0, 4)
    """

    def __init__(self, env: gym.Env, n: int) -> None:
        RecordConstructorArgs.__init__(self, n=n)
        super().__init__(env)
        if not isinstance(n, int) or n < 1:
            raise UserError(f"action repeat must be a whole number from 1 on, not {n!r}")
        self.n = n
        self._env_step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._env_step = 0
        return observation, info | {"env_step": 0}

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        total, successes = 0.0, []
        for _ in range(self.n):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            self._env_step += 1
            if (success := success_of(info)) is not None:
                successes.append(success > 0)
            if terminated or truncated:
                break
        added = {"env_step": self._env_step} | ({"success_any": any(successes)} if successes else {})
        return observation, total, terminated, truncated, info | added


def success_of(info: dict[str, Any]) -> float | None:
    """The success that `info` reports under one of `SUCCESS_KEYS`: a bool, a number or an array of one; None if none.

    What is of another kind is not understood, and counts as no report.
    """
    for key in SUCCESS_KEYS:
        value = info.get(key)
        if isinstance(value, (list, tuple)) and len(value) == 1:
            (value,) = value
        if isinstance(value, (int, float, np.generic, np.ndarray)) and np.size(value) == 1:
            value = np.asarray(value)
            if value.dtype.kind in "biuf":
                return float(value.item())
    return None
