"""ActionRepeat: sums of rewards, ends of episodes, and the count of simulator steps."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from wrappers import ActionRepeat, UserError


class Countdown(gym.Env):
    """Gives reward 1, 2, 3, ... and ends (or is cut) after `length` steps."""

    observation_space = spaces.Box(0, 1000, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 10, truncate: bool = False) -> None:
        self.length, self.truncate = length, truncate

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {"from": "env"}

    def step(self, action):
        assert self.count < self.length, "stepped after the end"
        self.count += 1
        ended = self.count == self.length
        observation = np.full(1, self.count, np.float32)
        return observation, float(self.count), ended and not self.truncate, ended and self.truncate, {"from": "env"}


@given(length=st.integers(1, 20), n=st.integers(1, 8), truncate=st.booleans())
def test_an_episode_in_larger_steps_is_the_same_episode(length, n, truncate):
    env = ActionRepeat(Countdown(length, truncate), n)
    for _ in range(2):  # the second episode counts from 0 again
        _, info = env.reset()
        assert info == {"from": "env", "env_step": 0}
        rewards, steps = [], []
        terminated = truncated = False
        while not (terminated or truncated):
            observation, reward, terminated, truncated, info = env.step(0)
            rewards.append(reward)
            steps.append(info["env_step"])
            assert observation == steps[-1]
        assert sum(rewards) == length * (length + 1) / 2
        assert steps == [min(n * i, length) for i in range(1, -(-length // n) + 1)]
        assert (terminated, truncated) == (not truncate, truncate)


def test_first_step_sums_n_rewards():
    env = ActionRepeat(Countdown(), 4)
    env.reset()
    assert env.step(0)[1] == 1 + 2 + 3 + 4


def test_the_infos_of_the_environment_are_not_changed():
    class Remembers(Countdown):
        info = {"mine": 1}

        def step(self, action):
            return *super().step(action)[:4], self.info

    env = ActionRepeat(Remembers(), 2)
    env.reset()
    assert env.step(0)[4] == {"mine": 1, "env_step": 2}
    assert Remembers.info == {"mine": 1}


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None])
def test_wrong_n_is_explained(n):
    with pytest.raises(UserError, match="action repeat must be a whole number"):
        ActionRepeat(Countdown(), n)


def test_check_env_and_spec():
    env = ActionRepeat(gym.make("CartPole-v1"), 3)
    check_env(env, skip_render_check=True)
    rebuilt = gym.make(env.spec)
    assert isinstance(rebuilt, ActionRepeat)
    assert rebuilt.n == 3
