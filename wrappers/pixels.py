"""Pixels from any environment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

import cv2
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from wrappers.errors import UserError

if TYPE_CHECKING:  # MuJoCo is loaded for MuJoCo environments alone
    from wrappers.backends.mujoco import Camera, Quality, Renderer

IMAGE_KEYS = ("rgb", "image", "pixels")


class PixelObservation(gym.Wrapper, RecordConstructorArgs):
    """Replaces the observation by `{"rgb": picture}`, uint8 (H, W, 3) from 0 to 255, `size` being H = W or (H, W).

    The picture is the first of these that exists, resized with area interpolation:

    1. an image in the observation (uint8 (H, W, 3), (H, W, 1) or (H, W)); of several in a Dict, the one called
       `rgb`, `image` or `pixels`;
    2. what a `camera` of the MuJoCo simulation sees, drawn by a renderer of our own in `quality` "reference" (what
       dm_control draws) or "fast" (in about half of the time, within 0.1 of 255 grey levels on average); see
       `wrappers.backends.mujoco.Renderer` for what a camera may be and `default_camera` for what None means;
    3. `env.render()`, where the environment was made with `render_mode="rgb_array"`.

    An explicit `camera` prefers the simulation to the observation; `renderer="native"` leaves the simulation out.
    `renderer` and `camera` are then attributes, None where pixels come from elsewhere. Raises `UserError` where there
    is nothing to see, or no such camera.

    >>> env = PixelObservation(gym.make("CartPole-v1", render_mode="rgb_array"), size=64)
    >>> observation, _ = env.reset(seed=0)
    >>> observation["rgb"].shape, observation["rgb"].dtype
    ((64, 64, 3), dtype('uint8'))
    """

    def __init__(
        self,
        env: gym.Env,
        size: int | tuple[int, int] = 84,
        camera: Camera = None,
        quality: Quality = "fast",
        renderer: Literal["auto", "native"] = "auto",
    ) -> None:
        RecordConstructorArgs.__init__(self, size=size, camera=camera, quality=quality, renderer=renderer)
        super().__init__(env)
        if renderer not in ("auto", "native"):
            raise UserError(f"unknown renderer {renderer!r}: expected 'auto' or 'native'")
        self._height, self._width = _height_and_width(size)
        self.observation_space = spaces.Dict({"rgb": spaces.Box(0, 255, (self._height, self._width, 3), np.uint8)})
        self.camera = None
        self.renderer: Renderer | None = None
        self._key, self._observed = _find_image(env.observation_space)
        if renderer == "auto" and (camera is not None or not self._observed):
            self._use_simulation(camera, quality)
        if self.renderer is None and camera is not None:
            raise UserError(f"camera={camera!r} needs a MuJoCo environment and renderer='auto'")
        if self.renderer is None and not self._observed and env.render_mode != "rgb_array":
            raise UserError(_nothing_to_see(env))

    def _use_simulation(self, camera: Camera, quality: Quality) -> None:
        if "mujoco" not in sys.modules:
            return
        from wrappers.backends.mujoco import Renderer, default_camera, find_simulation

        simulation = find_simulation(self.env)
        if simulation is not None:
            self.camera = default_camera(self.env) if camera is None else camera
            self.renderer = Renderer(simulation, self._height, self._width, self.camera, quality)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return {"rgb": self._picture(observation)}, info

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return {"rgb": self._picture(observation)}, reward, terminated, truncated, info

    def close(self) -> None:
        if self.renderer is not None:
            self.renderer.close()
        super().close()

    def _picture(self, observation: Any) -> np.ndarray:
        if self.renderer is not None:
            return self.renderer.rgb()
        if self._observed:
            picture = observation if self._key is None else observation[self._key]
        else:
            picture = self.env.render()
        if picture.ndim == 2 or picture.shape[2] == 1:
            picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
        if picture.shape[:2] == (self._height, self._width):
            return picture.copy()  # the environment may draw the next one into the same memory
        return cv2.resize(picture, (self._width, self._height), interpolation=cv2.INTER_AREA)


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"size must be a number of pixels or (height, width), not {size!r}")
    return sides


def _is_image(space: spaces.Space) -> bool:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[2] in (1, 3))


def _find_image(space: spaces.Space) -> tuple[str | None, bool]:
    """Returns the key of the image in a Dict (None where the observation is the image), and whether there is one."""
    if not isinstance(space, spaces.Dict):
        return None, _is_image(space)
    keys = [key for key, subspace in space.items() if _is_image(subspace)]
    preferred = [key for key in IMAGE_KEYS if key in keys] or keys
    if len(preferred) > 1 and preferred is keys:
        raise UserError(f"the observation has several images, {keys}: call one of them 'rgb'")
    return (preferred[0], True) if preferred else (None, False)


def _nothing_to_see(env: gym.Env) -> str:
    name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
    modes = list(env.metadata.get("render_modes", []))
    problem = f"{name} has no image in its observation, and its render mode is {env.render_mode!r} (of {modes})"
    if "rgb_array" in modes:
        return f"{problem}: make it with gymnasium.make({name!r}, render_mode='rgb_array')"
    return f"{problem}: pixels need a uint8 (H, W, 3) observation, a MuJoCo simulation or the render mode 'rgb_array'"
