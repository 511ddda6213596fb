"""What the embedded models say of scenes that they were not trained on: that they do not know them."""

import logging

import pytest

from semore_bench.envs import EnvConfig, make_env
from wrappers.backends.embedded import UNFAMILIAR, EmbeddedAnnotator

FRAMES = EmbeddedAnnotator.frames_to_check


@pytest.mark.parametrize("env_id", ["CarRacing-v3", "highway_env:racetrack-v1"])
def test_driving_is_said_to_be_unfamiliar(env_id, caplog):
    env = make_env(env_id, EnvConfig(image_size=64, action_repeat=2, flow=None))
    frames = [env.reset(seed=0)[0]["rgb"]]
    env.action_space.seed(0)
    while len(frames) < FRAMES:
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        frames.append(observation["rgb"] if not (terminated or truncated) else env.reset()[0]["rgb"])
    env.close()
    with caplog.at_level(logging.WARNING):
        annotations = EmbeddedAnnotator("cpu").annotate(frames, range(FRAMES))
    assert any("unfamiliar" in record.message or "not know" in record.message for record in caplog.records)
    named = [annotation for annotation in annotations if annotation.objects]
    unknown = [annotation for annotation in annotations if UNFAMILIAR in annotation.caption]
    print(env_id, len(named), len(unknown), {thing.name for note in named for thing in note.objects})
