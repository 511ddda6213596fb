"""Meta-World's episodes from their seeds."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs


class SeededMetaWorld(gym.Wrapper, RecordConstructorArgs):
    """Makes `reset(seed=...)` true for a Meta-World `env`: it determines the goal and the objects' places too.

    Meta-World ignores the seed given to `reset` and draws goals from a fixed list of tasks, or from NumPy's global
    generator; here each reset draws them from the environment's own seeded generator. It needs nothing of Meta-World
    itself: `SeededMetaWorld(gym.make("Meta-World/MT1", env_name="reach-v3", seed=0, render_mode="rgb_array"))`.
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Resets with a goal drawn from `seed`, or from where the generator stands."""
        inner = self.unwrapped
        inner._freeze_rand_vec = False
        inner.seeded_rand_vec = True
        if seed is not None:
            inner.seed(seed)
            self.np_random = np.random.default_rng(seed)
        return self.env.reset(seed=seed, options=options)
