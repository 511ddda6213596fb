"""Optical flow as an observation, its storage in bytes, and its picture."""

from __future__ import annotations

from typing import Any, SupportsFloat

import cv2
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from wrappers.backends.flow import FlowEstimator, make_estimator
from wrappers.errors import UserError


class OpticalFlowObservation(gym.Wrapper, RecordConstructorArgs):
    """Adds `flow`, float32 (H, W, 2): how far what is now seen at each pixel moved since the previous frame.

    The unit is pixels per agent step, x to the right, then y down, clipped to ±`bound` (default: 8 pixels in 84, in
    proportion to the width for x and to the height for y); zeros on the first frame of an episode. The attribute
    `bound` is the larger of the two. `estimator` is "dis" (Kroeger et al. 2016),
    "farneback" (Farnebäck 2003), "simulator" (the truth, MuJoCo only) or a `FlowEstimator`. Raises `UserError` where
    there is no `rgb` observation, and for an estimator that is unknown or does not suit the environment; `ResetNeeded`
    from `step` before `reset`.

    >>> from wrappers.pixels import PixelObservation
    >>> env = OpticalFlowObservation(PixelObservation(gym.make("CartPole-v1", render_mode="rgb_array")))
    >>> observation, _ = env.reset(seed=0)
    >>> observation["flow"].shape, float(abs(observation["flow"]).max())
    ((84, 84, 2), 0.0)
    """

    def __init__(self, env: gym.Env, estimator: str | FlowEstimator = "dis", bound: float | None = None) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, estimator=estimator, bound=bound)
        super().__init__(env)
        space = env.observation_space
        self._bounds = bounds_of(space, bound)
        self.bound = float(self._bounds.max())
        self.observation_space = spaces.Dict({**space.spaces, "flow": flow_space(space, self._bounds)})
        self._estimator = make_estimator(estimator) if isinstance(estimator, str) else estimator
        if hasattr(self._estimator, "attach"):
            self._estimator.attach(env)
        self._previous: np.ndarray | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        if hasattr(self._estimator, "reset"):
            self._estimator.reset()
        self._previous = observation["rgb"]
        return observation | {"flow": np.zeros((*self._previous.shape[:2], 2), np.float32)}, info

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], SupportsFloat, bool, bool, dict[str, Any]]:
        if self._previous is None:
            raise gym.error.ResetNeeded("cannot call step() before reset(): there is no frame that flow could begin at")
        observation, reward, terminated, truncated, info = self.env.step(action)
        flow = self._estimator(self._previous, observation["rgb"])
        self._previous = observation["rgb"]
        clipped = np.clip(flow, -self._bounds, self._bounds).astype(np.float32, copy=False)
        return observation | {"flow": clipped}, reward, terminated, truncated, info


def bounds_of(space: spaces.Space, bound: float | None) -> np.ndarray:
    """How far flow goes, float32 (2,): x, y in pixels; raises `UserError` where there is no `rgb`, or no such bound."""
    if not isinstance(space, spaces.Dict) or "rgb" not in space.spaces:
        raise UserError(f"optical flow needs an 'rgb' observation, not {space}: wrap in PixelObservation first")
    height, width, _ = space["rgb"].shape
    bounds = np.array((8.0 * width / 84.0, 8.0 * height / 84.0) if bound is None else (bound, bound), np.float32)
    if not 0.0 < bounds.max() < np.inf:
        raise UserError(f"the bound of the flow must be a positive number of pixels, not {bound!r}")
    return bounds


def flow_space(space: spaces.Dict, bounds: np.ndarray) -> spaces.Box:
    """The space of the flow of a space's `rgb`."""
    highest = np.broadcast_to(bounds, (*space["rgb"].shape[:2], 2))
    return spaces.Box(-highest, highest, dtype=np.float32)


_ZERO, _FULL = 128.0, 127.0  # how flow is stored in bytes: what stands for 0, and how much more for the bound


def encode_flow(flow: np.ndarray, bound: float) -> np.ndarray:
    """Flow of any shape to uint8: 128 is 0, linear to 1 and 255 at ±`bound` (beyond, it is clipped)."""
    return (np.rint(np.clip(flow / bound, -1.0, 1.0) * _FULL) + _ZERO).astype(np.uint8)


def decode_flow(quantised: np.ndarray, bound: float) -> np.ndarray:
    """The float32 flow that `encode_flow` stored, exact to half a step (`bound` / 254) and exactly 0 where it was 0."""
    return (quantised.astype(np.float32) - _ZERO) * np.float32(bound / _FULL)


def relative_flow(stored: Any) -> Any:
    """Stored flow as a share of its bound, in [-1, 1]; `stored`: floats, an array or a tensor of any shape."""
    return (stored - _ZERO) / _FULL


def flow_to_rgb(flow: np.ndarray, bound: float) -> np.ndarray:
    """Flow (H, W, 2) as a picture, uint8 (H, W, 3): direction is hue, length saturation (white: 0, full: `bound`)."""
    length, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1], angleInDegrees=True)
    hsv = np.dstack([angle / 2.0, np.minimum(length / bound, 1.0) * 255.0, np.full_like(length, 255.0)])
    return cv2.cvtColor(np.rint(hsv).astype(np.uint8), cv2.COLOR_HSV2RGB)  # OpenCV keeps half of the hue's degrees
