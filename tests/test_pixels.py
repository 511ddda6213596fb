"""PixelObservation: pixels from any environment, and the whole stack of wrappers on many of them."""

import os
import subprocess
import sys

import cv2
import gymnasium as gym
import minigrid  # noqa: F401  (registers its ids)
import numpy as np
import pytest
import shimmy  # noqa: F401  (registers dm_control's ids)
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from tests import odd_envs
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
    state |= {"board": image(7, 7, 3), "depth": image(84, 84, 1)}
    env = ImageEnv(spaces.Dict({**{name: image(84, 84, 3) for name in names}, **state}))
    observation, _ = PixelObservation(env).reset(seed=0)
    assert set(observation) == {"rgb"}  # the state does not leak
    assert np.array_equal(observation["rgb"], env.last[chosen])


@pytest.mark.parametrize("kind", odd_envs.PICTURES)
def test_pictures_of_every_kind_become_rgb(kind):
    env = odd_envs.Odd(kind)
    expected_channels = [0, 0, 0] if "grey" in kind else [0, 1, 2]
    pixels = PixelObservation(env, (40, 48))
    for see in (lambda: pixels.reset(seed=0), lambda: pixels.step(np.zeros(2, np.float32))):
        observation = see()[0]
        assert observation in pixels.observation_space
        assert np.array_equal(observation["rgb"], env.render()[..., expected_channels])


@pytest.mark.parametrize("kind", odd_envs.PICTURES)
def test_rendered_pictures_of_every_kind_become_rgb(kind):
    """Of floats, those to 255 are ambiguous: render() has no space that says so."""

    class Drawn(odd_envs.Odd):
        def render(self):
            return odd_envs.PICTURES[kind][1](self._rgb())

    env = Drawn(render_mode="rgb_array")
    pixels = PixelObservation(env, (40, 48), source="render")
    if kind == "float-255":
        with pytest.raises(UserError, match="float32 from 2.0 to 250.0: expected 0 to 1"):
            pixels.reset(seed=0)
        return
    rgb = pixels.reset(seed=0)[0]["rgb"]
    assert np.array_equal(rgb, env._rgb()[..., [0, 0, 0] if "grey" in kind else [0, 1, 2]])


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "None"),
        (np.zeros((3, 40, 40, 3), np.uint8), "uint8 \\("),
        (np.full((40, 40, 3), np.nan), "from nan"),
        (np.full((40, 40, 3), 300), "from 300 to 300: expected 0 to 255"),
        (np.zeros((40, 40, 2), np.uint8), "uint8 \\("),
        (np.zeros((40, 40, 3), bool), "bool \\("),
    ],
)
def test_what_is_drawn_and_is_no_picture_is_explained(picture, message):
    class Drawn(odd_envs.Odd):
        def render(self):
            return picture

    with pytest.raises(UserError, match=rf"render\(\) of Drawn gave .*{message}") as failure:
        PixelObservation(Drawn(render_mode="rgb_array"), source="render").reset(seed=0)
    assert "\n" not in str(failure.value)


def test_what_is_not_as_its_space_says_is_understood_or_explained():
    class Loose(ImageEnv):
        def reset(self, *, seed=None, options=None):
            return self.given, {}

    env = Loose(image(40, 40, 3))
    for white, given in ((255, [[[255] * 3] * 40] * 40), (255, np.ones((40, 40, 3))), (0, np.zeros((40, 40, 3)))):
        env.given = given
        assert (PixelObservation(env).reset()[0]["rgb"] == white).all()
    for given in (None, np.full((40, 40, 3), 2.0)):
        env.given = given
        with pytest.raises(UserError, match="the observation gave"):
            PixelObservation(env).reset()


def test_a_board_of_symbols_is_drawn_unless_it_is_asked_for():
    env = gym.make("MiniGrid-Empty-5x5-v0", render_mode="rgb_array")
    drawn, asked = PixelObservation(env, 64), PixelObservation(env, 64, source="observation")
    rgb = drawn.reset(seed=0)[0]["rgb"]
    assert np.array_equal(rgb, cv2.resize(env.render(), (64, 64), interpolation=cv2.INTER_AREA))
    assert rgb.max() > 200
    assert asked.reset(seed=0)[0]["rgb"].max() < 20


def test_sources_and_keys():
    views = {"front": image(40, 40, 3), "wrist": spaces.Box(0, 1, (40, 40, 3), np.float32)}
    env = ImageEnv(spaces.Dict(cameras=spaces.Dict(views), depth=image(40, 40)))
    for key, picture in (
        ("cameras/front", lambda seen: seen["cameras"]["front"]),
        ("depth", lambda seen: seen["depth"]),
    ):
        rgb = PixelObservation(env, 40, key=key).reset(seed=0)[0]["rgb"]
        assert np.array_equal(rgb[..., 0], picture(env.last).reshape(40, 40, -1)[..., 0])
    grey = ImageEnv(spaces.Dict(grey=image(40, 40), colour=image(40, 40, 3)))
    assert np.array_equal(PixelObservation(grey, 40).reset(seed=0)[0]["rgb"], grey.last["colour"])


def test_a_float_picture_comes_before_depth():
    space = spaces.Dict(depth=image(40, 40), rgb=spaces.Box(0, 1, (40, 40, 3), np.float32))
    env = ImageEnv(space)
    pixels = PixelObservation(env, 40)
    env.reset = lambda **_: ({"depth": np.zeros((40, 40), np.uint8), "rgb": np.full((40, 40, 3), 0.2, np.float32)}, {})
    assert (pixels.reset()[0]["rgb"] == 51).all()


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
            lambda: PixelObservation(ImageEnv(spaces.Dict(a=image(40, 40), b=image(40, 40)))),
            r"several images, \['a', 'b'\].*key=",
        ),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), camera=0), "camera=0 needs a MuJoCo"),
        (lambda: PixelObservation(gym.make("Reacher-v5"), camera="moon"), "no camera 'moon'"),
        (lambda: PixelObservation(gym.make("Reacher-v5"), quality="best"), "quality 'best'"),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), 0), "size must be"),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), (8, 8, 3)), "size must be"),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), 84.0), "size must be"),
        (lambda: PixelObservation(ImageEnv(image(8, 8)), renderer="fast"), "unknown renderer 'fast'"),
        (lambda: PixelObservation(ImageEnv(image(40, 40)), source="screen"), "unknown source 'screen'"),
        (lambda: PixelObservation(ImageEnv(image(40, 40)), source="render", key="rgb"), "choose"),
        (lambda: PixelObservation(gym.make("Reacher-v5"), source="observation", camera=0), "choose"),
        (lambda: PixelObservation(gym.make("Reacher-v5"), source="observation"), "no image.*leave source='obs"),
        (lambda: PixelObservation(ImageEnv(spaces.Dict(a=image(40, 40))), key="b"), r"no observation 'b'.*\['a'\]"),
        (lambda: PixelObservation(ImageEnv(spaces.Dict(a=spaces.Discrete(2))), key="a"), "'a' is no picture.*Discrete"),
        *(
            (lambda space=space: PixelObservation(ImageEnv(spaces.Dict(view=space))), f"'view' .*{message}")
            for space, message in (
                (image(7, 7, 3), r"uint8 \(7, 7, 3\).*symbols.*source='observation'"),
                (image(4, 84, 84), "stack of frames.*after PixelObservation"),
                (image(3, 84, 84, 3), "stack of frames"),
                (image(84, 84, 9), r"expected \(H, W, 3\)"),
                (spaces.Box(-1, 1, (84, 84, 3), np.float32), "from -1 to 1, expected 0 to 255"),
                (spaces.Box(0, np.inf, (84, 84, 3), np.float32), "from 0 to inf"),
                (spaces.Box(0, 9, (84, 84, 3), np.uint8), "from 0 to 9"),
            )
        ),
        (lambda: PixelObservation(ImageEnv(spaces.Dict(depth=image(84, 84)))), "something else.*key='depth'"),
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
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=os.getcwd(), timeout=300
    )
    assert result.stdout == "[]\n", result.stderr
