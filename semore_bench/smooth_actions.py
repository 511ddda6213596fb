"""Random actions that move what they move visibly, to look at an environment."""

from typing import Any

import numpy as np
from gymnasium import spaces

SMOOTHING = 0.85  # of the previous action that the next one keeps: about six steps of memory


def smooth_action(space: spaces.Space, previous: Any, random: np.random.Generator) -> Any:
    """A random action near the `previous` one (None at first), so that what moves moves visibly."""
    if isinstance(space, spaces.Box):
        middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
        previous = middle if previous is None else previous
        noise = random.normal(scale=np.sqrt(1 - SMOOTHING**2), size=space.shape) * half * 0.7
        action = middle + SMOOTHING * (previous - middle) + noise
        return np.clip(action, space.low, space.high).astype(space.dtype)
    if previous is not None and random.random() < SMOOTHING:
        return previous
    return space.sample()
