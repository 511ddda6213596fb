"""The toy environment for vectorised wrappers, and what they and single ones return compared."""

import gymnasium as gym
import numpy as np

from wrappers import PixelObservation

N = 3


def make_toy() -> gym.Env:
    return PixelObservation(gym.make("tests.toy_env:Toy-v0"), size=40)


def assert_equal(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert set(ours) == set(theirs)
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if ours.dtype == object:
            assert_equal(tuple(ours), tuple(theirs))
        else:
            assert np.array_equal(ours, theirs)
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal(mine, other)
    else:
        assert ours == theirs
