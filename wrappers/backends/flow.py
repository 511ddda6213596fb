"""Optical flow between two frames: estimated from the pixels, or computed from the simulator's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import cv2
import gymnasium as gym
import numpy as np

from wrappers.errors import UserError

if TYPE_CHECKING:
    from wrappers.backends.mujoco import Geometry, Renderer


MARGIN = 20  # pixels around what changed that DISFlow looks at


class FlowEstimator(Protocol):
    """Two uint8 (H, W, 3) frames to a float (H, W, 2) flow in pixels: x to the right, then y down.

    It is anchored on the current frame: what is now seen at (x, y) was at (x, y) - flow[y, x]. An estimator may also
    define `attach(env)`, called once, and `reset()`, called after each reset of the environment; and `batch`, which
    takes frames (N, H, W, 3) of N environments and returns their flows (N, H, W, 2).
    """

    def __call__(self, previous_rgb: np.ndarray, current_rgb: np.ndarray) -> np.ndarray: ...


def flows(estimator: FlowEstimator, previous: np.ndarray, current: np.ndarray) -> np.ndarray:
    """The flows (N, H, W, 2) between frames (N, H, W, 3): in one call of `batch`, where the estimator has it."""
    if hasattr(estimator, "batch"):
        return estimator.batch(previous, current)
    return np.stack([estimator(*pair) for pair in zip(previous, current, strict=True)])


class DISFlow:
    """Dense inverse search (Kroeger et al., ECCV 2016, arXiv 1603.03590), set up for small pictures.

    Matching at full resolution finds limbs a few pixels wide, which OpenCV's presets lose. OpenCV has fast code for
    patches of 8 pixels; refining their flow would take as long again and save a tenth of the error. Pictures whose
    light is constant need no normalisation.
    """

    def __init__(self) -> None:
        self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._dis.setFinestScale(0)
        self._dis.setPatchSize(8)
        self._dis.setPatchStride(4)
        self._dis.setGradientDescentIterations(12)
        self._dis.setUseMeanNormalization(False)
        self._dis.setVariationalRefinementIterations(0)

    def __reduce__(self) -> tuple[type, tuple[()]]:  # OpenCV's object cannot be copied, and holds nothing to keep
        return type(self), ()

    def __call__(self, previous_rgb: np.ndarray, current_rgb: np.ndarray) -> np.ndarray:
        previous, current = _grey(previous_rgb), _grey(current_rgb)
        flow = np.zeros((*current.shape, 2), np.float32)
        left, top, width, height = cv2.boundingRect(cv2.absdiff(previous, current))
        if width:  # where a picture is what it was, nothing moved: look at the rest, and around it
            seen = np.s_[max(0, top - MARGIN) : top + height + MARGIN, max(0, left - MARGIN) : left + width + MARGIN]
            previous, current = (np.ascontiguousarray(picture[seen]) for picture in (previous, current))
            flow[seen] = -self._dis.calc(current, previous, None)
        return flow


class FarnebackFlow:
    """Polynomial expansion (Farnebäck, SCIA 2003), set up for small pictures."""

    def __call__(self, previous_rgb: np.ndarray, current_rgb: np.ndarray) -> np.ndarray:
        return -cv2.calcOpticalFlowFarneback(_grey(current_rgb), _grey(previous_rgb), None, 0.5, 3, 9, 5, 5, 1.1, 0)


class SimulatorFlow:
    """The true flow, from MuJoCo's depth, labels and poses at the two moments.

    Each pixel of the current frame is taken back to the world point that it shows, moved back with the shape that the
    point belongs to, and seen through the camera as it was. The sky is infinitely far away: only rotation moves it.
    What deforms (skins, flexible bodies, a string that goes slack) counts as standing still; mirror images and shadows
    count as the surface that they lie on. The backdrop of a `Distraction` counts as standing still, whatever it shows.
    """

    def attach(self, env: gym.Env) -> None:
        """Finds the renderer of the `PixelObservation` below; raises `UserError` where there is no MuJoCo renderer."""
        self._renderer: Renderer | None = env.get_wrapper_attr("renderer") if env.has_wrapper_attr("renderer") else None
        if self._renderer is None:
            raise UserError(
                "the flow estimator 'simulator' needs a MuJoCo environment in PixelObservation(renderer='auto'): "
                "choose 'dis' or 'farneback' for others, and name a camera where an environment draws by itself"
            )

    def reset(self) -> None:
        self._previous = self._renderer.geometry()

    def __call__(self, previous_rgb: np.ndarray, current_rgb: np.ndarray) -> np.ndarray:
        previous, self._previous = self._previous, self._renderer.geometry()
        return flow_between(previous, self._previous)


def flow_between(previous: Geometry, current: Geometry) -> np.ndarray:
    """The flow (H, W, 2) that takes what `previous` shows to where `current` shows it, anchored on `current`."""
    height, width = current.depth.shape
    now, then = current.camera, previous.camera
    pixels = np.dstack([*np.meshgrid(np.arange(width), np.arange(height)), np.ones((height, width))])
    rays = pixels @ np.linalg.inv(now.matrix).T @ now.rotation  # to depth 1, in the axes of the world
    points = now.position + rays * current.depth[..., None]
    moved = points.copy()
    shapes_then = {shape.key: shape for shape in previous.shapes.values()}
    for label, shape in current.shapes.items():
        if (origin := shapes_then.get(shape.key)) is not None:
            seen = current.label == label
            moved[seen] = (points[seen] - shape.position) @ shape.rotation @ origin.rotation.T + origin.position
    nowhere = current.label == -1
    directions = np.where(nowhere[..., None], rays, moved - then.position)
    x, y, z = np.moveaxis(directions @ then.rotation.T @ then.matrix.T, -1, 0)
    z = np.maximum(z, 1e-6)  # what was behind the camera
    flow = pixels[..., :2] - np.dstack([x / z, y / z])
    if current.has_backdrop:
        flow[nowhere] = 0.0
    return flow


def _grey(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)


ESTIMATORS: dict[str, Callable[[], FlowEstimator]] = {
    "dis": DISFlow,
    "farneback": FarnebackFlow,
    "simulator": SimulatorFlow,
}


def make_estimator(name: str) -> FlowEstimator:
    """The estimator called `name`; raises `UserError` if there is none."""
    if name not in ESTIMATORS:
        raise UserError(f"unknown flow estimator {name!r}: expected one of {sorted(ESTIMATORS)}")
    return ESTIMATORS[name]()
