"""What the embedded models say of scenes that they were not trained on: that they do not know them."""

import logging

import pytest

from semore_bench.envs import EnvConfig, make_env
from wrappers.backends.embedded import UNFAMILIAR, EmbeddedAnnotator

FRAMES = EmbeddedAnnotator.frames_to_check


TASKS = [
    # kinds that training had no example of
    ("highway_env:racetrack-v1", 2),
    ("LunarLander-v3", 1),
    ("Pendulum-v1", 1),
    ("MiniGrid-Empty-5x5-v0", 1),
    ("ALE/Pong-v5", 4),
    # kinds that it had: other frames of them
    ("CartPole-v1", 1),
    ("MountainCar-v0", 1),
    ("CarRacing-v3", 4),
]


@pytest.mark.parametrize(("env_id", "action_repeat"), TASKS)
def test_other_scenes_are_said_to_be_unfamiliar_and_nothing_is_named(env_id, action_repeat, caplog):
    env = make_env(env_id, EnvConfig(image_size=64, action_repeat=action_repeat, flow=None))
    frames = [env.reset(seed=0)[0]["rgb"]]
    env.action_space.seed(0)
    while len(frames) < FRAMES:
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        frames.append(observation["rgb"] if not (terminated or truncated) else env.reset()[0]["rgb"])
    env.close()
    with caplog.at_level(logging.WARNING):
        annotations = EmbeddedAnnotator("cpu").annotate(frames, range(FRAMES))
    assert any("does not know this kind of scene" in record.message for record in caplog.records)
    assert {annotation.caption for annotation in annotations} == {UNFAMILIAR}
    assert not any(annotation.objects for annotation in annotations), "semore_sac then sees pixels"
