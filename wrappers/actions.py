"""Continuous actions of any shape and type as one vector, discrete ones as one number."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from wrappers.errors import UserError

MOST_ACTIONS = 1000
"""discrete actions that a learner may be given: a network has an output for each"""


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


class DiscreteAction(gym.ActionWrapper, RecordConstructorArgs):
    """Numbers the actions from 0: Discrete(n, start=s) becomes Discrete(n), and MultiDiscrete the product of its parts.

    Raises `UserError` for other action spaces, and for more than `MOST_ACTIONS` actions.

    >>> from gymnasium.wrappers import TransformAction
    >>> env = gym.make("CartPole-v1")
    >>> env = TransformAction(env, lambda action: int(action == 3), spaces.Discrete(2, start=3))
    >>> DiscreteAction(env).action_space
    Discrete(2)
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        space = env.action_space
        if isinstance(space, spaces.MultiDiscrete):
            self._shape, count = tuple(space.nvec.flat), int(np.prod(space.nvec.astype(float)))
        elif isinstance(space, spaces.Discrete):
            self._shape, count = None, int(space.n)
        else:
            raise UserError(f"DiscreteAction needs a Discrete or MultiDiscrete action space, not {space}")
        if count > MOST_ACTIONS:
            raise UserError(f"{space} has {count} actions, more than {MOST_ACTIONS}: choose among fewer")
        self.action_space = spaces.Discrete(count)

    def action(self, action: int | np.integer) -> Any:
        space = self.env.action_space
        if self._shape is None:
            return space.dtype.type(action + space.start)
        parts = np.array(np.unravel_index(int(action), self._shape), space.dtype)
        return parts.reshape(space.shape) + space.start
