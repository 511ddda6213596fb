"""Environments of every family, and of every kind of picture, action and info, behind the same wrappers."""

import copy
import importlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from semore_bench.envs import EnvConfig, make_env
from semore_bench.workers import ACTION_SPACES, _Maker
from tests import odd_envs

ROOT = Path(__file__).parents[1]

SIZE = 36
CONFIG = EnvConfig(image_size=SIZE, action_repeat=2, flow="dis")
FAMILIES = [
    "dm_control/cartpole-swingup-v0",
    "dm_control/fish-swim-v0",
    "Meta-World/reach-v3",
    "HalfCheetah-v5",
    "Reacher-v5",
    "gymnasium_robotics:FetchReach-v4",
    "CartPole-v1",
    "Pendulum-v1",
    "Acrobot-v1",
    "MountainCarContinuous-v0",
    "LunarLander-v3",
    "BipedalWalker-v3",
    "CarRacing-v3",
    "FrozenLake-v1",
    "CliffWalking-v1",
    "MiniGrid-Empty-5x5-v0",
    "BabyAI-GoToObj-v0",
    "MiniWorld-Hallway-v0",
    "ALE/Pong-v5",
    "highway_env:racetrack-v1",
    "highway_env:parking-v0",
]
OWN = "examples.own_environment:Catch-v0"
MADE_UP = [f"tests.odd_envs:{name}" for name in odd_envs.IDS]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]


def episode(env: gym.Env, steps: int = 3, seed: int = 3) -> list[dict[str, np.ndarray]]:
    observations = [env.reset(seed=seed)[0]]
    env.action_space.seed(seed)  # which highway-env makes anew in reset
    for _ in range(steps):
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        observations.append(observation)
        if terminated or truncated:
            break
    return observations


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() == {"rgb", "flow"}
        assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("env_id", FAMILIES + MADE_UP)
def test_any_environment(env_id):
    env = make_env(env_id, CONFIG)
    # The same environment again, as it describes itself.
    twin = gym.make(EnvSpec.from_json(env.spec.to_json()) if _speaks_json(env) else env.spec)
    assert twin.observation_space == env.observation_space
    assert twin.action_space == env.action_space
    check_env(env, skip_render_check=True)

    seen = episode(env)
    assert all(observation in env.observation_space for observation in seen)
    assert seen[0]["rgb"].std() > 1, "there is something to see"
    assert not seen[0]["flow"].any()
    shown = _shown(env)
    episode(twin, seed=8)  # another episode before does not matter
    assert_same(seen, episode(twin))
    first_again = env.reset(seed=9)[0]
    assert not first_again["flow"].any()
    assert_same([first_again], [twin.reset(seed=9)[0]])
    if shown is not None:
        assert np.abs(seen[-1]["rgb"].astype(float) - shown).mean() < 2, "some draw a ray more each time"
    twin.close()

    for make_copy in (copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))):
        if (copied := _copied(env, make_copy)) is not None:
            assert_same(seen, episode(copied))
            copied.close()

    env.close()


def _shown(env: gym.Env) -> np.ndarray | None:
    """What render() shows now, in our size, where pixels come from there."""
    pixels = env.env
    if pixels.renderer is not None or pixels._observed is not None:
        return None
    return cv2.resize(env.render(), (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def _speaks_json(env: gym.Env) -> bool:
    try:
        json.dumps(env.unwrapped.spec.kwargs)
        return isinstance(env.unwrapped.spec.entry_point, str)
    except TypeError:
        return False


def _copied(env: gym.Env, make_copy) -> gym.Env | None:
    """A copy of an environment; None if it cannot be copied, or becomes another one, without wrappers too."""
    try:
        bare = make_copy(env.unwrapped)
        bare.close()
        make_copy(env.spec)  # kept by every wrapper; Shimmy's holds a function that cannot be pickled
    except Exception:  # each has its own reason
        return None
    return make_copy(env) if bare.action_space == env.unwrapped.action_space else None


def readme_commands() -> list[tuple[str, str]]:
    """Agent and environment of each command in the README's list of families."""
    section = (ROOT / "README.md").read_text().partition("## Environments that work")[2].partition("\n## ")[0]
    return re.findall(r"`(?:PYTHONPATH=. )?python agents/(\w+)\.py --env-id (\S+?)[ `]", section)


@pytest.mark.parametrize(("agent", "env_id"), readme_commands())
def test_the_readme_names_agents_that_fit_the_environments_of_its_list(agent, env_id):
    args = importlib.import_module(f"agents.{agent}").Args()
    args.resolve()
    config = args.env_config()
    env = make_env(env_id, replace(config, annotator="none"))
    assert isinstance(env.action_space, ACTION_SPACES[config.actions])
    env.close()


def test_the_readme_lists_what_is_tested():
    listed = {env_id for _, env_id in readme_commands()}
    assert len(listed) == 11
    assert listed <= {*FAMILIES, "dm_control/cartpole-swingup-v0", "Meta-World/drawer-close-v3", OWN}


def test_pictures_in_the_observation_show_what_render_shows():
    for env_id in ("ALE/Pong-v5", "CarRacing-v3", "MiniWorld-Hallway-v0", "tests.odd_envs:Odd-v0"):
        env = make_env(env_id, CONFIG)
        grey = [episode(env)[-1]["rgb"], cv2.resize(env.render(), (SIZE, SIZE), interpolation=cv2.INTER_AREA)]
        likeness = np.corrcoef(*(picture.mean(axis=-1).ravel() for picture in grey))[0, 1]
        assert likeness > 0.6, env_id
        env.close()


class AnyOf(gym.Env):
    """Whichever environment `reset(options={"env_id": ...})` names, so that one worker serves for all of them."""

    metadata = {"render_modes": []}  # noqa: RUF012
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.observation_space = make_env("tests.odd_envs:Odd-v0", CONFIG).observation_space
        self.env = None

    def reset(self, *, seed=None, options=None):
        if self.env is not None:
            self.env.close()
        self.env = _Maker(options["env_id"], CONFIG, 0)()
        observation, info = self.env.reset(seed=seed)
        self.env.action_space.seed(seed)
        return observation, info

    def step(self, action):
        return self.env.step(self.env.action_space.sample())

    def close(self):
        if self.env is not None:
            self.env.close()


def test_all_of_them_in_vectors():
    """In workers and in this process: the same frames, and infos that can be put together."""
    settings = {"autoreset_mode": AutoresetMode.DISABLED}
    alone, apart = (AsyncVectorEnv([AnyOf] * number, context="spawn", **settings) for number in (1, 2))
    here = SyncVectorEnv([AnyOf], **settings)
    for env_id in FAMILIES + MADE_UP:  # some of the former take a second to be made
        results = []
        for envs, seeds in ((alone, [2]) if env_id in FAMILIES else (apart, [2, 1]), (here, [2])):
            first = envs.reset(seed=seeds, options={"env_id": env_id})
            observations, _, _, _, infos = envs.step(np.zeros(len(seeds), int))
            results.append([first, (observations, infos)])
        for (there, infos), (expected, _) in zip(*results, strict=True):
            assert set(infos) <= {name for key in ("env_step", "success", "success_any") for name in (key, f"_{key}")}
            assert there.keys() == expected.keys()
            assert all(np.array_equal(there[key][:1], expected[key]) for key in there), env_id
    for envs in (alone, apart, here):
        envs.close()


def test_torch_tensors_of_everything_that_is_observed():
    """By Gymnasium's own wrapper, which converts whatever is in info too: captions and annotations stay as they are."""
    import torch
    from gymnasium.wrappers.numpy_to_torch import NumpyToTorch

    env = make_env("dm_control/cartpole-swingup-v0", EnvConfig(image_size=SIZE, annotator="simulator"))
    env = NumpyToTorch(env)
    observation, info = env.reset(seed=0)
    assert all(isinstance(value, torch.Tensor) for value in observation.values())
    assert "cart" in info["caption"]
    assert info["annotations"][0].caption == info["caption"]
    assert "cart" in env.step(torch.zeros(1))[4]["caption"]
    env.close()
