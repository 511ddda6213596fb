"""Continuous actions of any shape and type as one vector."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from wrappers.errors import UserError


class VectorAction(gym.ActionWrapper, RecordConstructorArgs):
    """Presents a Box action space of any shape and type as a vector of floats, shape (A,).

    What it is given is clipped to the environment's bounds and brought into its shape and type. Integers get equal
    shares of the range: 0, 1 and 2 are what [-0.5, 0.5], [0.5, 1.5] and [1.5, 2.5] are rounded to. Raises `UserError`
    where the actions are no Box, or unbounded.

    >>> from gymnasium.wrappers import RescaleAction
    >>> env = VectorAction(gym.make("Pendulum-v1"))
    >>> RescaleAction(env, -1.0, 1.0).action_space
    Box(-1.0, 1.0, (1,), float32)
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        box = env.action_space
        if not isinstance(box, spaces.Box):
            raise UserError(f"VectorAction needs a Box action space, not {box}")
        if not box.is_bounded() or np.prod(box.shape) == 0:
            raise UserError(f"actions must be bounded and at least one number, not {box}: wrap the environment so")
        self._whole = not np.issubdtype(box.dtype, np.floating)
        dtype = np.promote_types(box.dtype, np.float32)  # float64 for integers that float32 cannot hold
        margin = 0.5 if self._whole else 0.0
        low, high = (np.asarray(bound, dtype).reshape(-1) for bound in (box.low, box.high))
        self.action_space = spaces.Box(low - margin, high + margin, dtype=dtype.type)

    def action(self, action: np.ndarray) -> np.ndarray:
        box = self.env.action_space
        action = np.reshape(action, box.shape)
        if self._whole:
            action = np.rint(np.asarray(action, np.float64))
        return np.asarray(np.clip(action, box.low, box.high)).astype(box.dtype)
