"""PixelObservation: pixels from any environment, and the whole stack of wrappers on many of them."""

import os
import subprocess
import sys

import cv2
import gymnasium as gym
import numpy as np
import pytest
import shimmy  # noqa: F401  (registers dm_control's ids)
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from wrappers import ActionRepeat, OpticalFlowObservation, PixelObservation, UserError


class ImageEnv(gym.Env):
    """Observes random pictures in whatever `observation_space` says, drawing each into the same memory."""

    action_space = spaces.Discrete(2)

    def __init__(self, observation_space: spaces.Space) -> None:
        self.observation_space = observation_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.last = self._draw(self.observation_space)
        return self.last, {}

    def step(self, action):
        self._redraw(self.last)
        return self.last, 0.0, False, False, {}

    def _draw(self, space):
        if isinstance(space, spaces.Dict):
            return {key: self._draw(subspace) for key, subspace in space.items()}
        if space.dtype == np.uint8:
            return self.np_random.integers(0, 256, space.shape, np.uint8)
        return np.zeros(space.shape, space.dtype)

    def _redraw(self, observation):
        for array in observation.values() if isinstance(observation, dict) else [observation]:
            array[...] = 255 - array


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def stack(env: gym.Env, size: int = 84, **settings) -> gym.Env:
    return OpticalFlowObservation(PixelObservation(ActionRepeat(env, 2), size, **settings))


def episode(env: gym.Env, steps: int, seed: int = 3) -> list[dict[str, np.ndarray]]:
    observations = [env.reset(seed=seed)[0]]
    env.action_space.seed(seed)
    for _ in range(steps):
        observations.append(env.step(env.action_space.sample())[0])
    return observations


def test_colour_image_is_resized_by_area():
    env = ImageEnv(image(96, 128, 3))
    frame = PixelObservation(env, (48, 32)).reset(seed=0)[0]["rgb"]
    assert np.array_equal(frame, cv2.resize(env.last, (32, 48), interpolation=cv2.INTER_AREA))
    assert frame.mean() == pytest.approx(env.last.mean(), abs=0.5)  # area interpolation keeps the brightness


def test_image_of_the_right_size_is_kept_and_not_shared():
    env = ImageEnv(image(84, 84, 3))
    pixels = PixelObservation(env)
    first = pixels.reset(seed=0)[0]["rgb"]
    assert np.array_equal(first, env.last)
    kept = first.copy()
    pixels.step(0)  # draws into the same memory
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("shape", [(84, 84), (84, 84, 1)])
def test_grey_image_becomes_rgb(shape):
    env = ImageEnv(image(*shape))
    frame = PixelObservation(env).reset(seed=0)[0]["rgb"]
    assert frame.shape == (84, 84, 3)
    assert all(np.array_equal(frame[..., channel], env.last.reshape(84, 84)) for channel in range(3))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [(["camera"], "camera"), (["camera", "image"], "image"), (["image", "pixels", "rgb"], "rgb")],
)
def test_image_in_a_dict(names, chosen):
    state = {"state": spaces.Box(-1, 1, (5,), np.float32), "mask": spaces.Box(0, 1, (84, 84), np.float32)}
    env = ImageEnv(spaces.Dict({**{name: image(84, 84, 3) for name in names}, **state}))
    observation, _ = PixelObservation(env).reset(seed=0)
    assert set(observation) == {"rgb"}  # the state does not leak
    assert np.array_equal(observation["rgb"], env.last[chosen])


def test_rendered_environment():
    env = gym.make("CartPole-v1", render_mode="rgb_array")
    pixels = PixelObservation(env, 64)
    observation, info = pixels.reset(seed=0)
    assert set(observation) == {"rgb"}
    assert info == {}
    assert pixels.renderer is None
    expected = cv2.resize(env.render(), (64, 64), interpolation=cv2.INTER_AREA)
    assert np.array_equal(observation["rgb"], expected)


def test_mujoco_environment_uses_our_renderer_without_touching_gl_before_the_first_reset(monkeypatch):
    from wrappers.backends import opengl

    with monkeypatch.context() as patch:
        patch.setattr(opengl, "run", lambda job: pytest.fail("rendered at construction"))
        env = PixelObservation(gym.make("dm_control/cartpole-swingup-v0"), camera="lookatcart")
    observation, info = env.reset(seed=0)
    assert env.camera == "lookatcart"
    assert np.array_equal(observation["rgb"], env.renderer.rgb())
    assert not np.array_equal(observation["rgb"], PixelObservation(env.env).reset(seed=0)[0]["rgb"])  # another camera
    assert not any(np.size(value) > 10 for value in info.values() if isinstance(value, np.ndarray))
    env.close()


def test_image_in_the_observation_comes_before_the_simulation_unless_a_camera_is_named():
    class Dark(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = image(84, 84, 3)

        def observation(self, observation):
            return np.zeros((84, 84, 3), np.uint8)

    env = Dark(gym.make("HalfCheetah-v5"))
    assert PixelObservation(env).reset(seed=0)[0]["rgb"].max() == 0
    seen = PixelObservation(env, camera="track")
    assert seen.reset(seed=0)[0]["rgb"].max() > 0
    seen.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PixelObservation(gym.make("CartPole-v1")),
            r"render mode is None.*make\('CartPole-v1', render_mode='rgb",
        ),
        (lambda: PixelObservation(ImageEnv(spaces.Box(0, 1, (3,)))), r"ImageEnv has no image.*\(of \[\]\)"),
        (lambda: PixelObservation(gym.make("Reacher-v5"), renderer="native"), "render_mode='rgb_array'"),
        (
            lambda: PixelObservation(ImageEnv(spaces.Dict(a=image(8, 8), b=image(8, 8)))),
            r"several images, \['a', 'b'\]",
        ),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), camera=0), "camera=0 needs a MuJoCo"),
        (lambda: PixelObservation(gym.make("Reacher-v5"), camera="moon"), "no camera 'moon'"),
        (lambda: PixelObservation(gym.make("Reacher-v5"), quality="best"), "quality 'best'"),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), 0), "size must be"),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), (8, 8, 3)), "size must be"),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), 84.0), "size must be"),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), renderer="fast"), "unknown renderer 'fast'"),
    ],
)
def test_what_is_wrong_is_explained(make, message):
    with pytest.raises(UserError, match=message) as failure:
        make()
    assert "\n" not in str(failure.value)


STACKS = {
    "dm_control": lambda: stack(gym.make("dm_control/cartpole-swingup-v0")),
    "gymnasium-mujoco": lambda: stack(gym.make("HalfCheetah-v5"), 64),
    "car-racing": lambda: stack(gym.make("CarRacing-v3")),
    "rendered": lambda: stack(gym.make("CartPole-v1", render_mode="rgb_array")),
    "image-in-dict": lambda: stack(ImageEnv(spaces.Dict(view=image(40, 40, 3), state=spaces.Box(-1, 1, (2,))))),
    "grey": lambda: stack(ImageEnv(image(50, 70)), size=64),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_check_env_on_the_stack(name):
    env = STACKS[name]()
    check_env(env, skip_render_check=True)


@pytest.mark.parametrize("name", STACKS)
def test_same_seed_same_frames_and_exact_spaces(name):
    first, second = STACKS[name](), STACKS[name]()
    for one, other in zip(episode(first, 5), episode(second, 5), strict=True):
        assert one in first.observation_space
        assert set(one) == {"rgb", "flow"}
        assert all(np.array_equal(one[key], other[key]) for key in one)
    first.close()
    second.close()


@pytest.mark.parametrize("name", ["dm_control", "gymnasium-mujoco", "car-racing", "rendered"])
def test_spec_rebuilds_the_stack(name):
    env = STACKS[name]()
    rebuilt = gym.make(env.spec)
    assert rebuilt.observation_space == env.observation_space
    assert np.array_equal(episode(rebuilt, 1)[1]["rgb"], episode(env, 1)[1]["rgb"])
    env.close()
    rebuilt.close()


def make_worker_env() -> gym.Env:
    return STACKS["dm_control"]()


def test_works_in_a_spawned_worker_with_shared_memory():
    vector = AsyncVectorEnv(
        [make_worker_env], shared_memory=True, context="spawn", autoreset_mode=AutoresetMode.DISABLED
    )
    here = make_worker_env()
    there, _ = vector.reset(seed=[5])
    expected, _ = here.reset(seed=5)
    assert np.array_equal(there["rgb"][0], expected["rgb"])
    action = here.action_space.sample()
    there = vector.step(action[None])[0]
    expected = here.step(action)[0]
    assert np.array_equal(there["rgb"][0], expected["rgb"])
    assert np.array_equal(there["flow"][0], expected["flow"])
    vector.close()
    here.close()


def test_importing_the_wrappers_is_light():
    heavy = "torch", "mujoco", "dm_control", "transformers", "open_clip", "pandas", "matplotlib", "OpenGL"
    script = f"import sys, wrappers; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=os.getcwd(), timeout=60)
    assert result.stdout == "[]\n", result.stderr
