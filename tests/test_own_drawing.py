"""MuJoCo environments that draw by themselves: what their render() shows is what is seen."""

import logging

import cv2
import gymnasium as gym
import gymnasium_robotics
import numpy as np
import pytest
import shimmy  # noqa: F401  (registers dm_control's ids)
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.wrappers import AddWhiteNoise

from wrappers import OpticalFlowObservation, PixelObservation, UserError
from wrappers.backends.mujoco import Renderer
from wrappers.backends.simulation import drawn_by_itself, find_simulation

gym.register_envs(gymnasium_robotics)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Beacon(HalfCheetahEnv):
    """Moves something into place for the picture alone."""

    def render(self):
        before = self.model.geom_rgba.copy()
        self.model.geom_rgba[:, :3] = (1, 0, 0)
        picture = super().render()
        self.model.geom_rgba[:] = before
        return picture


class Nested(gym.Env):
    """A simulation that belongs to an environment inside."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.inner = HalfCheetahEnv(render_mode=render_mode, camera_name="side")
        self.render_mode, self.model, self.data = render_mode, self.inner.model, self.inner.data
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.inner.reset(seed=seed)

    def step(self, action):
        return self.inner.step(action)

    def render(self):
        return self.inner.mujoco_renderer.render("rgb_array")


def own_camera_picture(env: gym.Env, render: np.ndarray) -> np.ndarray:
    """What our renderer draws in the size of a picture that the environment drew, from the same camera."""
    drawer = getattr(env.unwrapped, "mujoco_renderer", None)
    camera = (drawer.camera_id if drawer.camera_id != -1 else drawer.viewer.cam) if drawer else None
    renderer = Renderer(find_simulation(env), *render.shape[:2], camera, "reference")
    picture = renderer.rgb()
    renderer.close()
    return picture


def most_different_patch(first: np.ndarray, second: np.ndarray) -> float:
    """In grey levels, of patches an eightieth of the picture's width."""
    small = [cv2.resize(picture, (80, 80), interpolation=cv2.INTER_AREA).astype(float) for picture in (first, second)]
    return float(np.abs(small[0] - small[1]).max())


ROBOTICS = ["FetchReach-v4", "HandReach-v3", "HandManipulateBlock-v1", "FrankaKitchen-v1", "PointMaze_UMaze-v3"]


@pytest.mark.parametrize("env_id", ROBOTICS)
def test_goals_and_cameras_of_robotics_are_seen(env_id, caplog):
    env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
    with caplog.at_level(logging.WARNING):
        pixels = PixelObservation(env, 64)
    assert "draws by itself" in caplog.text
    assert pixels.renderer is pixels.camera is None
    seen = []
    for seed in (0, 1):
        rgb = pixels.reset(seed=seed)[0]["rgb"]
        assert np.array_equal(rgb, cv2.resize(env.render(), (64, 64), interpolation=cv2.INTER_AREA))
        seen.append(rgb)
    if env_id in ("FetchReach-v4", "HandReach-v3", "HandManipulateBlock-v1"):
        assert not np.array_equal(*seen), "where the goal is shows"
    pixels.close()


def test_without_a_render_mode_the_goals_would_not_show():
    env = gym.make("FetchReach-v4")
    with pytest.raises(UserError, match=r"FetchReach-v4 draws by itself .*render_mode='rgb_array'.*or name a camera"):
        PixelObservation(env)
    env.close()


def test_a_camera_that_was_named_is_used_with_a_warning(caplog):
    env = gym.make("FetchReach-v4", render_mode="rgb_array")
    pixels = PixelObservation(env, 64, camera="head_camera_rgb")
    assert "may not see all" in caplog.text
    assert pixels.camera == "head_camera_rgb"
    OpticalFlowObservation(pixels, "simulator").close()


@pytest.mark.parametrize(
    ("make", "way"),
    [
        (lambda: Beacon(render_mode="rgb_array"), "Beacon.render"),
        (lambda: Nested(render_mode="rgb_array"), "Nested.render"),
        (lambda: AddWhiteNoise(gym.make("HalfCheetah-v5", render_mode="rgb_array"), 0.5), "AddWhiteNoise.render"),
        (lambda: HalfCheetahEnv(render_mode="rgb_array", visual_options={0: True}), "MujocoRenderer"),
        (
            lambda: gym.make("dm_control/walker-walk-v0", render_mode="rgb_array", render_kwargs={"overlays": ()}),
            r"render_kwargs \['overlays'\]",
        ),
    ],
)
def test_other_ways_of_drawing_are_noticed(make, way, caplog):
    env = make()
    pixels = PixelObservation(env, 64)
    assert pixels.renderer is None
    assert way.replace("\\", "") in caplog.text
    env.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda **kwargs: gym.make("dm_control/cartpole-swingup-v0", **kwargs),
        lambda **kwargs: gym.make("dm_control/walker-walk-v0", **kwargs),
        lambda **kwargs: gym.make("HalfCheetah-v5", **kwargs),
        lambda **kwargs: gym.make("Ant-v5", camera_name="track", **kwargs),
        lambda **kwargs: gym.make("Pusher-v5", **kwargs),
        lambda **kwargs: gym.make("Reacher-v5", **kwargs),
        lambda **kwargs: gym.make("Meta-World/MT1", env_name="push-v3", seed=0, **kwargs),
        lambda **kwargs: gym.make("AdroitHandDoor-v1", **kwargs),
    ],
)
def test_what_we_draw_ourselves_is_what_render_shows(make, dm_control_renders):
    """From the same camera: which one is ours may be another, see `default_camera`."""
    import metaworld  # noqa: F401  (registers its ids)

    from wrappers.backends import opengl

    opengl.prepare_native()
    env = make(render_mode="rgb_array")
    assert drawn_by_itself(env) == ""
    pixels = PixelObservation(env, 64)
    assert pixels.renderer is not None
    pixels.reset(seed=0)
    for _ in range(3):
        pixels.step(env.action_space.sample())
    with opengl.without_display():
        theirs = env.render()
    assert most_different_patch(own_camera_picture(env, theirs), theirs) < 4
    assert most_different_patch(np.roll(theirs, 9, axis=1), theirs) > 20, "there is something to see"
    pixels.close()


def test_the_camera_that_dm_control_was_made_with():
    env = gym.make("dm_control/walker-walk-v0", render_mode="rgb_array", render_kwargs={"camera_id": 1})
    pixels = PixelObservation(env, 64)
    assert pixels.camera == 1
    pixels.close()


def test_triton_comes_before_what_an_environment_draws_with(monkeypatch):
    from wrappers.backends import opengl

    monkeypatch.setattr(opengl, "preload_triton", lambda: loaded.append(True))
    for env, expected in (
        (gym.make("HalfCheetah-v5", render_mode="rgb_array"), [True]),
        (gym.make("HalfCheetah-v5"), []),
    ):
        loaded = []
        PixelObservation(env, 64, renderer="native" if expected else "auto")
        assert loaded == expected
