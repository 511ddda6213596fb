"""The vectorised wrappers see what single ones would, with every autoreset mode, in this process and in others."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import tests.toy_env  # noqa: F401  (registers Toy-v0)
from tests.fakes import fake_annotator
from tests.toy_vectors import N, assert_equal, make_toy
from wrappers import CaptionObservation as SingleCaptionObservation
from wrappers import OpticalFlowObservation as SingleOpticalFlowObservation
from wrappers import UserError
from wrappers.backends.flow import DISFlow
from wrappers.vector import CaptionObservation, OpticalFlowObservation


class Counting(DISFlow):
    """DIS with a `batch`, which counts its calls."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def batch(self, previous, current):
        self.sizes.append(len(previous))
        return np.stack([self(*pair) for pair in zip(previous, current, strict=True)])


def make_single() -> gym.Env:
    return SingleCaptionObservation(SingleOpticalFlowObservation(make_toy()), annotator=fake_annotator(), every=4)


def make_both(vectorised, mode: AutoresetMode, estimator="dis"):
    """Vectorised ones in vector wrappers, and single wrappers that are vectorised."""
    settings = {"autoreset_mode": mode} | ({"context": "spawn"} if vectorised is AsyncVectorEnv else {})
    ours = OpticalFlowObservation(vectorised([make_toy] * N, **settings), estimator)
    ours = CaptionObservation(ours, fake_annotator(), every=4)
    return ours, SyncVectorEnv([make_single] * N, autoreset_mode=mode)


@pytest.mark.parametrize("vectorised", [SyncVectorEnv, AsyncVectorEnv])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_observations_and_infos_are_those_of_single_wrappers(vectorised, mode):
    ours, theirs = make_both(vectorised, mode)
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.observation_space == theirs.observation_space
    ours.action_space.seed(0)
    first, infos = ours.reset(seed=1)
    assert_equal((first, infos), theirs.reset(seed=1))
    assert not first["flow"].any()
    ended, ends, moved = np.zeros(N, bool), 0, False
    for _ in range(60):
        actions = ours.action_space.sample()
        if mode == AutoresetMode.DISABLED and ended.any():
            options = {"reset_mask": ended}
            mine, other = ours.reset(options=options), theirs.reset(options={"reset_mask": ended.copy()})
            assert_equal(mine, other)
            assert not mine[0]["flow"][ended].any()
        mine, other = ours.step(actions), theirs.step(actions)
        assert_equal(mine, other)
        assert mine[0] in ours.observation_space
        now = mine[2] | mine[3]
        first = {AutoresetMode.NEXT_STEP: ended, AutoresetMode.SAME_STEP: now}.get(mode, np.zeros(N, bool))
        assert not mine[0]["flow"][first].any()
        if mode == AutoresetMode.SAME_STEP and now.any():
            moved |= any(mine[4]["final_obs"][index]["flow"].any() for index in np.flatnonzero(now))
        ended, ends = now, ends + now.sum()
    assert ends >= 2 * N
    assert moved == (mode == AutoresetMode.SAME_STEP)
    ours.close()


def test_all_environments_are_one_call():
    estimator = Counting()
    envs = OpticalFlowObservation(SyncVectorEnv([make_toy] * N), estimator)
    envs.reset(seed=0)
    for _ in range(3):
        envs.step(np.zeros((N, 2), np.float32))
    assert estimator.sizes == [N] * 3


def test_what_was_given_out_stays_as_it_was():
    envs = OpticalFlowObservation(SyncVectorEnv([make_toy] * N, copy=False))
    envs.reset(seed=0)
    envs.action_space.seed(0)
    one, *_ = envs.step(envs.action_space.sample())
    kept = one["flow"].copy()
    two, *_ = envs.step(envs.action_space.sample())
    assert np.array_equal(one["flow"], kept)
    two["flow"][:], two["rgb"][:] = 99, 99
    assert np.abs(envs.step(envs.action_space.sample())[0]["flow"]).max() <= envs.bound


def test_wrong_arguments_are_explained():
    with pytest.raises(UserError, match="wrap them one by one"):
        OpticalFlowObservation(SyncVectorEnv([make_toy]), "simulator")
    with pytest.raises(UserError, match="needs an 'rgb' observation"):
        OpticalFlowObservation(SyncVectorEnv([lambda: gym.make("Toy-v0")]))
    with pytest.raises(UserError, match="positive number of pixels"):
        OpticalFlowObservation(SyncVectorEnv([make_toy]), bound=0)
