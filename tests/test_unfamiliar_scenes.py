"""What the embedded models say of scenes that they were not trained on: that they do not know them."""

import logging

from semore_bench.envs import EnvConfig, make_env
from wrappers.backends.embedded import UNFAMILIAR, EmbeddedAnnotator

FRAMES = EmbeddedAnnotator.frames_to_check


def test_lane_keeping_is_said_to_be_unfamiliar_and_nothing_is_named(caplog):
    env = make_env("highway_env:racetrack-v1", EnvConfig(image_size=64, action_repeat=2, flow=None))
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
