"""Pixels from any environment."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, get_args

import cv2
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from wrappers.backends import opengl
from wrappers.backends.visuals import find_visuals
from wrappers.errors import UserError
from wrappers.pictures import Picture, find_picture, to_rgb

if TYPE_CHECKING:  # MuJoCo is loaded for MuJoCo environments alone
    from wrappers.backends.mujoco import Quality, Renderer
    from wrappers.backends.simulation import Camera

logger = logging.getLogger(__name__)

Source = Literal["auto", "observation", "render"]


class PixelObservation(gym.Wrapper, RecordConstructorArgs):
    """Replaces the observation by `{"rgb": picture}`, uint8 (H, W, 3) from 0 to 255, `size` being H = W or (H, W).

    The picture is the first of these that exists, resized with area interpolation; frames of other proportions are
    squeezed into the size, as the field does with Atari's:

    1. a picture in the observation; `wrappers.pictures.find_picture` says what counts as one, and which of several is
       taken unless `key` names it;
    2. what a `camera` of the MuJoCo simulation sees, drawn by a renderer of our own in `quality` "reference" (what
       dm_control draws) or "fast" (in about half of the time, within 0.1 of 255 grey levels on average); see
       `wrappers.backends.mujoco.Renderer` for what a camera may be and `default_camera` for what None means. An
       environment with a way of drawing of its own (see `drawn_by_itself`) is left to it: 3.;
    3. `env.render()`, where the environment was made with `render_mode="rgb_array"`.

    `source="observation"` takes 1. alone, small boards and depth included, and `source="render"` never. An explicit
    `camera` prefers the simulation to all else; `renderer="native"` leaves it out. `renderer` and `camera` are then
    attributes, None where pixels come from elsewhere. Raises `UserError` where there is nothing to see, or no such
    camera or key, and from `reset` or `step` where a picture is not what was promised.

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
        source: Source = "auto",
        key: str | None = None,
    ) -> None:
        settings = {"camera": camera, "quality": quality, "renderer": renderer, "source": source, "key": key}
        RecordConstructorArgs.__init__(self, size=size, **settings)
        super().__init__(env)
        if renderer not in ("auto", "native"):
            raise UserError(f"unknown renderer {renderer!r}: expected 'auto' or 'native'")
        if source not in get_args(Source):
            raise UserError(f"unknown source {source!r}: expected one of {', '.join(map(repr, get_args(Source)))}")
        if key is not None and source == "auto":
            source = "observation"
        if (source == "observation" and camera is not None) or (source == "render" and key is not None):
            raise UserError(
                "key and source='observation' take a picture that is there, camera and source='render' draw one: choose"
            )
        self._height, self._width = _height_and_width(size)
        self.observation_space = spaces.Dict({"rgb": spaces.Box(0, 255, (self._height, self._width, 3), np.uint8)})
        self.camera: Camera = None
        self.renderer: Renderer | None = None
        self._observed: Picture | None = None
        self._visuals = find_visuals(env)
        near = ""
        if source != "render":
            self._observed, near = find_picture(env.observation_space, key, asked=source == "observation")
        if renderer == "auto" and source != "observation" and (camera is not None or self._observed is None):
            self._use_simulation(camera, quality)
        if self.renderer is None and camera is not None:
            raise UserError(f"camera={camera!r} needs a MuJoCo environment and renderer='auto'")
        if self.renderer is None and self._observed is None:
            if source == "observation" or env.render_mode != "rgb_array":
                raise UserError(_nothing_to_see(env, near, source))
            opengl.prepare_native()
        if self.renderer is None and self._visuals is not None:
            self._visuals.check_pixels(name_of(env))

    def _use_simulation(self, camera: Camera, quality: Quality) -> None:
        if "mujoco" not in sys.modules:
            return
        from wrappers.backends.mujoco import Renderer
        from wrappers.backends.simulation import default_camera, drawn_by_itself, find_simulation

        simulation = find_simulation(self.env)
        if simulation is None:
            return
        if (what := drawn_by_itself(self.env)) and self._leave_to_itself(what, camera):
            return
        self.camera = default_camera(self.env) if camera is None else camera
        self.renderer = Renderer(simulation, self._height, self._width, self.camera, quality)

    def _leave_to_itself(self, what: str, camera: Camera) -> bool:
        name, modes = name_of(self.env), self.env.metadata.get("render_modes") or []
        if camera is not None:
            logger.warning("%s draws by itself (%s): camera %r may not see all that it draws", name, what, camera)
        elif self.env.render_mode == "rgb_array":
            logger.warning("%s draws by itself (%s): its render() is used", name, what)
            return True
        elif "rgb_array" in modes:
            raise UserError(
                f"{name} draws by itself ({what}): make it with gymnasium.make({name!r}, render_mode='rgb_array'), or "
                "name a camera"
            )
        return False

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
        if self._observed is not None:
            picture = self._observed.rgb(observation)
        else:
            with opengl.without_display():
                picture = to_rgb(self.env.render(), source=f"render() of {name_of(self.env)}")
        if picture.shape[:2] == (self._height, self._width):
            picture = picture.copy()  # the environment may draw the next one into the same memory
        else:
            picture = cv2.resize(picture, (self._width, self._height), interpolation=cv2.INTER_AREA)
        return picture if self._visuals is None else self._visuals.on_pixels(picture)


def name_of(env: gym.Env) -> str:
    """The id of an environment, or its class where it has none."""
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"size must be a number of pixels or (height, width), not {size!r}")
    return sides


def _nothing_to_see(env: gym.Env, near: str, source: Source) -> str:
    name, modes = name_of(env), list(env.metadata.get("render_modes") or [])
    problem = f"{name} has no image in its observation{f' ({near})' * bool(near)}"
    if source == "observation":
        return f"{problem}: leave source='observation' out, or give it one of uint8 (H, W, 3)"
    problem += f", and its render mode is {env.render_mode!r} (of {modes})"
    if "rgb_array" in modes:
        return f"{problem}: make it with gymnasium.make({name!r}, render_mode='rgb_array')"
    return f"{problem}: pixels need a uint8 (H, W, 3) observation, a MuJoCo simulation or the render mode 'rgb_array'"
