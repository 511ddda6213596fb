"""Discrete actions: environments that have them, Atari's conventions, and what the replay makes of lost lives."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import AtariPreprocessing, TransformAction
from hypothesis import given, settings
from hypothesis import strategies as st

from semore_bench.envs import EnvConfig, make_env
from semore_bench.replay import Replay
from semore_bench.transitions import Step
from semore_bench.workers import Workers
from tests import odd_envs
from tests.toy_env import Blinking
from wrappers import BrightestOfTwoFrames, DiscreteAction, LifeLoss, UserError

ROOT = Path(__file__).parents[1]

DISCRETE = EnvConfig(image_size=36, action_repeat=2, flow=None, actions="discrete")


def odd(actions: spaces.Space) -> gym.Env:
    env = odd_envs.Odd()
    env.action_space = actions
    return env


@pytest.mark.parametrize(
    ("space", "count", "last"),
    [
        (spaces.Discrete(3), 3, 2),
        (spaces.Discrete(3, start=-1), 3, 1),
        (spaces.MultiDiscrete([3, 2]), 6, [2, 1]),
        (spaces.MultiDiscrete([3, 2], start=[1, 5]), 6, [3, 6]),
        (spaces.MultiDiscrete([[2, 2], [2, 3]]), 24, [[1, 1], [1, 2]]),
    ],
)
def test_every_action_is_taken_under_a_number_from_0(space, count, last):
    env = DiscreteAction(odd(space))
    assert env.action_space == spaces.Discrete(count)
    env.reset(seed=0)
    for action in range(count):
        env.step(np.int64(action))  # which checks that it is of its own space
    taken = env.unwrapped.taken
    assert len({str(np.asarray(action).tolist()) for action in taken}) == count
    assert np.array_equal(taken[-1], last)


@pytest.mark.parametrize("space", [spaces.Box(0, 1, (2,)), spaces.MultiBinary(3), spaces.MultiDiscrete([100, 100])])
def test_other_actions_are_no_numbers(space):
    with pytest.raises(UserError, match=r"Discrete or MultiDiscrete|choose among fewer"):
        DiscreteAction(odd(space))


@pytest.mark.parametrize(
    ("env_id", "actions", "expected"),
    [
        ("CartPole-v1", "continuous", "Discrete actions and this agent needs continuous ones"),
        ("tests.odd_envs:OddAction8-v0", "continuous", "for discrete ones take agents/semore_dqn.py or agents/drq_dqn"),
        ("Pendulum-v1", "discrete", "Box actions and this agent needs discrete ones; for continuous ones take agents/"),
    ],
)
def test_an_agent_of_the_other_kind_is_refused_and_the_right_ones_named(env_id, actions, expected):
    with pytest.raises(UserError, match=expected) as refusal:
        Workers(env_id, EnvConfig(image_size=36, actions=actions))
    named = [word.strip(",;") for word in str(refusal.value).split() if word.startswith("agents/")]
    assert len(named) > 1
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize("env_id", ["tests.odd_envs:OddAction7-v0", "tests.odd_envs:OddAction8-v0", "FrozenLake-v1"])
def test_workers_take_numbers(env_id):
    with Workers(env_id, DISCRETE, 2) as workers:
        workers.reset([1, 2])
        workers.send(np.array([0, workers.action_space.n - 1]))
        steps = workers.receive()
    assert [step.action for step in steps] == [0, workers.action_space.n - 1]
    assert all(isinstance(step.action, np.int64) for step in steps)


# ---- Atari ----


def test_frames_and_rewards_are_those_of_gymnasiums_atari_preprocessing():
    import ale_py

    gym.register_envs(ale_py)
    config = EnvConfig(action_repeat=4, flow=None, actions="discrete", sticky_actions=0.0, life_loss=True)
    ours = make_env("ALE/SpaceInvaders-v5", config)
    theirs = gym.make("ALE/SpaceInvaders-v5", frameskip=1, repeat_action_probability=0.0)
    theirs = AtariPreprocessing(theirs, noop_max=0, frame_skip=4, grayscale_obs=False, terminal_on_life_loss=True)
    seen, _ = ours.reset(seed=3)
    expected, _ = theirs.reset(seed=3)
    assert np.array_equal(seen["rgb"], expected)
    rng, rewards = np.random.default_rng(0), 0.0
    for _ in range(600):
        action = int(rng.integers(6))
        seen, reward, over, _, info = ours.step(action)
        expected, same_reward, loses, _, _ = theirs.step(action)
        rewards += reward
        assert reward == same_reward
        assert info["life_lost"] == loses
        if loses:  # theirs ends its episode here, perhaps before its fourth frame; our game goes on
            break
        assert np.array_equal(seen["rgb"], expected)
    assert rewards > 0
    assert loses
    assert not over
    assert info["lives"] == 2
    ours.close()
    theirs.close()


def test_a_decision_on_atari_is_as_many_frames_as_the_action_is_repeated():
    """Not four times as many, as ids of version 5 have it; and an episode may last half an hour of play."""
    env = make_env("ALE/Pong-v5", EnvConfig(action_repeat=4, flow=None))
    assert env.spec.max_episode_steps == 108_000
    env.reset(seed=0)
    env.step(0)
    assert env.unwrapped.ale.getEpisodeFrameNumber() - 1 <= 4
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0.25
    assert make_env("ALE/Pong-v5", EnvConfig(flow=None, sticky_actions=0.5)).unwrapped.ale.getFloat(
        "repeat_action_probability"
    ) == pytest.approx(0.5)


def test_what_blinks_is_seen_in_every_frame():
    env = BrightestOfTwoFrames(Blinking())
    assert (env.reset(seed=0)[0] > 0).mean() == 0.5
    assert all((env.step(0)[0] > 0).all() for _ in range(4))
    assert (env.reset(seed=0)[0] > 0).mean() == 0.5, "nothing of the episode before"
    with pytest.raises(UserError, match="needs pictures"):
        BrightestOfTwoFrames(gym.make("CartPole-v1"))


def test_lost_lives_are_told_and_cross_to_the_learner():
    env = LifeLoss(Blinking())
    for _ in range(2):
        _, info = env.reset(seed=0)
        assert "life_lost" not in info
        assert [env.step(0)[4]["life_lost"] for _ in range(9)] == [False, False, True] * 3
    config = EnvConfig(image_size=36, action_repeat=1, flow=None, actions="discrete", life_loss=True)
    with Workers("tests.toy_env:Blinking-v0", config) as workers:
        workers.reset([0])
        told = []
        for _ in range(6):
            workers.send(np.zeros(1, int))
            told.append(workers.receive()[0].info.get("life_lost"))
    assert told == [False, False, True] * 2


def test_sticky_actions_repeat_the_one_before():
    config = EnvConfig(image_size=36, action_repeat=1, flow=None, actions="discrete", sticky_actions=0.5)
    taken = []
    for _ in range(2):
        env = make_env("tests.odd_envs:OddAction7-v0", config)
        env.reset(seed=1)
        for number in range(11):
            env.step(number % 3)
        taken.append(env.unwrapped.taken)
    assert taken[0] == taken[1], "seeded with the episode"
    assert 2 <= sum(action != number % 3 for number, action in enumerate(taken[0])) <= 9


# ---- the replay ----


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(["goes on", "life", "end", "cut"]), min_size=4, max_size=30),
    st.integers(1, 4),
)
def test_returns_end_where_a_life_is_lost(tmp_path_factory, fates, n_step):
    """Against a plain sum over what happened, transition by transition."""
    space = spaces.Dict({"rgb": spaces.Box(0, 255, (4, 4, 3), np.uint8)})
    replay = Replay(tmp_path_factory.mktemp("replay"), space, None, capacity=100, n_step=n_step, discount=0.5)

    def frame(number):
        return {"rgb": np.full((4, 4, 3), number, np.uint8)}

    shown, happened = 0, {}  # number of the frame before a step -> action, reward, fate, number of the frame after it
    replay.begin(0, frame(0), {})
    for number, fate in enumerate(fates):
        happened[shown] = (number % 3, float(number), fate, shown + 1)
        following = (frame(shown + 2), {}) if fate in ("end", "cut") else None
        info = {"life_lost": fate == "life"}
        step = (np.int64(number % 3), float(number), fate == "end", fate == "cut", frame(shown + 1), info, following)
        replay.add([Step(*step)])
        shown += 1 if following is None else 2

    expected = {}
    for first in happened:
        value, weight, at, taken, ended = 0.0, 1.0, first, 0, False
        while taken < n_step and at in happened and not ended:
            _, reward, fate, at = happened[at]
            value, weight, taken, ended = value + weight * reward, weight * 0.5, taken + 1, fate != "goes on"
            if fate in ("life", "end"):
                weight = 0.0
        if taken == n_step or ended:  # otherwise what is summed up is not complete yet
            expected[first] = (happened[first][0], value, weight, at)
    if not expected:
        return
    drawn = {}
    for _ in range(60):
        batch = replay.sample(32)
        assert batch.action.dtype == np.int64
        assert batch.action.shape == (32,)
        first, last = batch.rgb[:, -1, 0, 0, 0].tolist(), batch.next_rgb[:, -1, 0, 0, 0].tolist()
        rows = zip(batch.action.tolist(), batch.reward.tolist(), batch.discount.tolist(), last, strict=True)
        drawn |= dict(zip(first, rows, strict=True))
    assert drawn == expected


def test_actions_of_the_running_episode_are_numbers_again_after_a_checkpoint(tmp_path):
    space = spaces.Dict({"rgb": spaces.Box(0, 255, (4, 4, 3), np.uint8)})
    replays = [Replay(tmp_path, space, None, capacity=20) for _ in range(2)]
    frame = {"rgb": np.zeros((4, 4, 3), np.uint8)}
    replays[0].begin(0, frame, {})
    for action in (2, 0, 1):
        replays[0].add([Step(np.int64(action), 0.0, False, False, frame, {})])
    replays[1].load_state_dict(replays[0].state_dict())
    for replay in replays:
        assert replay.episode_actions == [[2, 0, 1]]
        assert all(hash(action) is not None for action in replay.episode_actions[0])  # some environments look them up


def test_actions_that_do_not_begin_at_0_are_made_to():
    reached = []
    env = gym.make("CartPole-v1")
    env = TransformAction(
        env, lambda action: reached.append(int(action)) or int(action) - 3, spaces.Discrete(2, start=3)
    )
    env = DiscreteAction(env)
    assert env.action_space == spaces.Discrete(2)
    env.reset(seed=0)
    for action in (0, 1):
        env.step(action)
    assert reached == [3, 4]
