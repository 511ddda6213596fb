"""Annotations from the simulator's own state: what a perfect vision-language model would say (privileged)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import gymnasium as gym
import mujoco
import numpy as np

from wrappers.backends.annotation import (
    DEFAULT_GRID,
    Annotation,
    HashingTextEncoder,
    Motion,
    SceneObject,
    TextEncoder,
    clean_text,
    relevance_map,
)
from wrappers.backends.mujoco import Geometry, Renderer
from wrappers.backends.scenes import Scene, find_scene
from wrappers.backends.simulation import Simulation, find_simulation
from wrappers.errors import UserError

# Eight directions in the image, clockwise from the right, then along the line of sight.
_POINTS = (
    "to the right",
    "down and to the right",
    "straight down",
    "down and to the left",
    "to the left",
    "up and to the left",
    "straight up",
    "up and to the right",
    "away from the camera",
    "towards the camera",
)
_LEANS = (
    "lying to the right",
    "tipped over to the right",
    "upside down",
    "tipped over to the left",
    "lying to the left",
    "leaning left",
    "upright",
    "leaning right",
    "with its top away from the camera",
    "with its top towards the camera",
)
_SLANTS = ("horizontal", "slanting down to the right", "vertical", "slanting up to the right")
_RELATIONS = (
    "right of",
    "below and right of",
    "below",
    "below and left of",
    "left of",
    "above and left of",
    "above",
    "above and right of",
)
_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "centre", "right")
_FINE_COLUMNS = ("at the far left", "left of the centre", "in the centre", "right of the centre", "at the far right")

_MOVES = (("moving right", "moving left"), ("moving down", "moving up"), ("moving away", "moving closer"))

_MAX_LENGTH = 200  # characters
_STILL = 0.05  # image widths per second: slower is still
_TURNING = 0.5  # radians per second: slower is not turning
_FINER = 2  # at least, than the observation
_PIXELS_PER_PATCH = 4  # per side, at least
_TOGETHER = 0.06  # image widths: parts that are closer are at the same place
_NEAR = 1e-3  # metres: what is nearer to the camera, or behind it, is treated as if at this depth
_ALONG_SIGHT = 0.85  # share of a vector along the line of sight from which on it points that way


class SeenPart:
    """A part of a scene as the camera sees it at one moment; its attributes are words, made for `str.format`."""

    def __init__(self, view: View, index: int):
        self._view = view
        self._part = view.scene.parts[index]
        self._bodies = view.scene.bodies[index]
        self._anchor = view.scene.anchors[index]
        self._pixels = np.argwhere(view.classes == index)

    @property
    def where(self) -> str:
        """Which ninth of the image it is in."""
        if not len(self._pixels):
            return self._why_unseen()
        y, x = self._centre()
        words = [_ROWS[int(3 * y)], _COLUMNS[int(3 * x)]]
        side = " ".join(word for word in words if word not in ("middle", "centre"))
        return f"at the {side}" if side else "in the centre"

    @property
    def column(self) -> str:
        """Which fifth of the image's width it is in."""
        return _FINE_COLUMNS[int(5 * self._centre()[1])] if len(self._pixels) else self._why_unseen()

    def __getitem__(self, other: str) -> str:
        """Where it is in the image as seen from another part: "above and left of" it, or "at" it."""
        offset = self._view.project(self.position) - self._view.project(self._view.parts[other].position)
        return "at" if np.hypot(*offset) < _TOGETHER else _RELATIONS[_octant(offset)]

    @property
    def points(self) -> str:
        """Where its forward axis points."""
        return _POINTS[self._direction(self._forward())]

    @property
    def leans(self) -> str:
        """How its body's upward axis stands."""
        return _LEANS[self._direction(self._axes()[:, 2])]

    @property
    def slants(self) -> str:
        """How it lies, for a thing whose two ends look the same."""
        return _SLANTS[_octant(self._view.project_vector(self.position, self._forward())) % 4]

    @property
    def moves(self) -> str:
        """Where it moves, as an observer at rest would say, whether the camera follows or not."""
        motion = self._view.project_vector(self.position, self._velocity()[3:])
        axis = int(np.abs(motion).argmax())
        return "still" if np.linalg.norm(motion) < _STILL else _MOVES[axis][int(motion[axis] < 0)]

    @property
    def turns(self) -> str:
        """How it turns in the image plane."""
        speed = (self._view.camera.rotation @ self._velocity()[:3])[2]
        if abs(speed) < _TURNING:
            return "not turning"
        return "turning clockwise" if speed > 0 else "turning counterclockwise"

    @property
    def position(self) -> np.ndarray:
        """World position of its anchor (3,), metres."""
        kind, number = self._anchor
        data = self._view.data
        return (data.geom_xpos if kind == mujoco.mjtObj.mjOBJ_GEOM else data.site_xpos)[number]

    @property
    def motion(self) -> Motion:
        """Whether any of its bodies moves or turns."""
        if not self._bodies:  # a tendon or a skin
            return "unknown"
        return "moving" if any(map(self._view.is_moving, self._bodies)) else "still"

    def _centre(self) -> np.ndarray:
        return (self._pixels.mean(0) + 0.5) / self._view.classes.shape

    def _why_unseen(self) -> str:
        inside = (abs(self._view.project(self.position) - 0.5) < 0.5).all()
        return "hidden" if inside else "out of view"

    def _forward(self) -> np.ndarray:
        if self._part.forward is None:
            return self.position - self._view.data.xpos[self._body()]
        return self._axes()[:, self._part.forward]

    def _direction(self, vector: np.ndarray) -> int:
        projected = self._view.project_vector(self.position, vector)
        if abs(projected[2]) > _ALONG_SIGHT * np.linalg.norm(projected):
            return 8 if projected[2] > 0 else 9
        return _octant(projected)

    def _body(self) -> int:
        kind, number = self._anchor
        model = self._view.model
        return int((model.geom_bodyid if kind == mujoco.mjtObj.mjOBJ_GEOM else model.site_bodyid)[number])

    def _axes(self) -> np.ndarray:
        return self._view.data.xmat[self._body()].reshape(3, 3)

    def _velocity(self) -> np.ndarray:
        return self._view.velocity(*self._anchor)


def _octant(vector: np.ndarray) -> int:
    """Which of eight directions an image vector (right, down, ...) is nearest to: clockwise, 0 is to the right."""
    return round(np.arctan2(vector[1], vector[0]) / (np.pi / 4)) % 8


class View:
    """What a camera sees of the simulation at one moment.

    Attributes:
        classes: int (H, W), the class that each pixel shows, an index into `scene.class_names`.
        parts: the scene's parts by name.
    """

    def __init__(self, simulation: Simulation, scene: Scene, geometry: Geometry):
        self.model, self.data = simulation.model, simulation.data
        self.scene, self.camera = scene, geometry.camera
        other, sky = (scene.class_names.index(name, len(scene.parts)) for name in ("background", "sky"))
        nothing = other if geometry.has_backdrop else sky
        class_of = np.full(max(geometry.shapes, default=-1) + 2, nothing)  # the last entry is that of label -1
        for label, shape in geometry.shapes.items():
            class_of[label] = scene.shape_class.get(shape.key[:2], other)
        self.classes = class_of[geometry.label]
        self.parts = {part.name: SeenPart(self, index) for index, part in enumerate(scene.parts)}

    def project(self, point: np.ndarray) -> np.ndarray:
        """Image position of a world point: (right, down), 0-1 within the image."""
        x, y, depth = self.camera.matrix @ self.camera.rotation @ (point - self.camera.position)
        height, width = self.classes.shape
        return (np.array([x, y]) / max(depth, _NEAR) + 0.5) / (width, height)

    def project_vector(self, point: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """A world vector at a point: (right, down, away), image widths, to first order in the vector's length."""
        (x, y, depth), (dx, dy, away) = (self.camera.rotation @ v for v in (point - self.camera.position, vector))
        depth = max(depth, _NEAR)
        focal_length = self.camera.matrix[0, 0] / self.classes.shape[1]
        return focal_length / depth * np.array([dx - away * x / depth, dy - away * y / depth, away])

    def velocity(self, kind: int, number: int) -> np.ndarray:
        """World velocity of a MuJoCo object: angular (3,) rad/s, then linear (3,) m/s."""
        velocity = np.empty(6)
        mujoco.mj_objectVelocity(self.model, self.data, kind, number, velocity, 0)
        return velocity

    def is_moving(self, body: int) -> bool:
        """Whether a body moves or turns fast enough to be called moving."""
        velocity = self.velocity(mujoco.mjtObj.mjOBJ_BODY, body)
        shift = self.project_vector(self.data.xipos[body], velocity[3:])
        return bool(np.linalg.norm(shift) >= _STILL or np.linalg.norm(velocity[:3]) >= _TURNING)

    def patch_probabilities(self, grid: int) -> np.ndarray:
        """The share of each class in each patch, float32 (K, grid, grid), exact whatever the image's size."""
        one_hot = self.classes == np.arange(len(self.scene.class_names))[:, None, None]
        rows, columns = (_pooling(size, grid) for size in self.classes.shape)
        return rows @ one_hot.astype(np.float32) @ columns.T


@lru_cache
def _pooling(size: int, grid: int) -> np.ndarray:
    """Row g: the share of each of `size` pixels in the g-th of `grid` equal intervals, float32 (grid, size)."""
    edges = np.linspace(0, size, grid + 1)[:, None]
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (overlap.clip(0) * grid / size).astype(np.float32)


def finer_renderer(simulation: Simulation, renderer: Renderer, grid: int) -> Renderer:
    """Draws what `renderer` does, at least twice as fine, and four times as fine as a grid of class maps."""
    finer = max(_FINER, -(-_PIXELS_PER_PATCH * grid // min(renderer.height, renderer.width)))
    return Renderer(simulation, finer * renderer.height, finer * renderer.width, renderer.camera, renderer.quality)


class SimulatorAnnotator:
    """Annotates a MuJoCo environment from its state: exact masks, and captions whose words are true of the image.

    The objects' masks come from the renderer's segmentation with the observation's camera, at least twice as fine as
    the observation (a pole is one or two of its pixels wide) and four times as fine as the grid. Captions say where
    parts are in the image, how they point and how they move, in words of a small vocabulary. The main `dm_control`
    domains and Meta-World have phrases of their own; every other model is described by its body names.
    This is privileged information: it stands for a perfect vision-language model.

    Args:
        text_encoder: embeds captions and class names; `HashingTextEncoder()` by default.
        grid: patches per side, of any number.
        motion: False leaves motion out, so that a single frame is enough to tell the caption.

    Example:
        >>> import gymnasium as gym
        >>> from wrappers import PixelObservation
        >>> env = PixelObservation(gym.make("InvertedPendulum-v5", render_mode="rgb_array"), size=64)
        >>> annotator = SimulatorAnnotator(motion=False)
        >>> annotator.attach(env)
        >>> observation, info = env.reset(seed=0)
        >>> [annotation] = annotator.annotate([observation["rgb"]], [0])
        >>> annotation.class_names
        ('cart', 'pole', 'floor', 'sky', 'wall', 'background')
        >>> annotation.patch_probabilities.shape
        (6, 16, 16)

    Raises:
        UserError: If the grid has no patches.
    """

    source = "simulator"

    def __init__(self, text_encoder: TextEncoder | None = None, grid: int = DEFAULT_GRID, motion: bool = True):
        if grid < 1:
            raise UserError(f"the grid of annotations must have at least 1 patch per side, got {grid}")
        self.grid, self.motion = grid, motion
        self._encoder = text_encoder or HashingTextEncoder()
        self.embedding_dim = self._encoder.dim
        self._embeddings: dict[str, np.ndarray] = {}
        self._model: mujoco.MjModel | None = None

    def __deepcopy__(self, memo: dict) -> SimulatorAnnotator:
        return SimulatorAnnotator(self._encoder, self.grid, self.motion)  # for another env: `env.spec` copies arguments

    def attach(self, env: gym.Env) -> None:
        """Says which environment to look at, and through whose camera.

        Raises:
            UserError: If it is not simulated by MuJoCo, or no `PixelObservation` draws the simulation.
        """
        simulation = find_simulation(env)
        if simulation is None:
            raise UserError(
                f"{env.unwrapped} is not simulated by MuJoCo, which annotator 'simulator' needs; "
                "use a VLM annotator instead, or none"
            )
        renderer = env.get_wrapper_attr("renderer") if env.has_wrapper_attr("renderer") else None
        if not isinstance(renderer, Renderer):
            raise UserError(
                "annotator 'simulator' needs the camera of a PixelObservation that draws the simulation itself; "
                "wrap the env in PixelObservation(env, renderer='auto') first"
            )
        self._renderer = finer_renderer(simulation, renderer, self.grid)
        self._simulation, self._model = simulation, None

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation | None]:
        """Annotates the one frame that the environment shows now.

        Raises:
            ValueError: If there is not exactly one frame: the simulator's past states are gone.
        """
        if len(frames) != 1 or len(frame_steps) != 1:
            raise ValueError(f"the simulator can annotate its present frame alone, got {len(frames)} frames")
        if self._simulation.model is not self._model:
            self._model = self._simulation.model
            self._scene = find_scene(self._model)
        view = View(self._simulation, self._scene, self._renderer.geometry())
        objects = tuple(
            SceneObject(part.name, part.relevance, view.parts[part.name].motion if self.motion else "unknown")
            for part in self._scene.parts
        )
        caption = clean_text(self._scene.domain.caption(view.parts, self.motion), _MAX_LENGTH)
        probabilities = view.patch_probabilities(self.grid)
        return [
            Annotation(
                caption=caption,
                objects=objects,
                caption_embedding=self._embed([caption])[0],
                class_names=self._scene.class_names,
                class_embeddings=self._embed(self._scene.class_names),
                patch_probabilities=probabilities,
                relevance=relevance_map(objects, probabilities),
                frame_step=frame_steps[0],
                source=self.source,
            )
        ]

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        new = [text for text in texts if text not in self._embeddings]
        if new:
            self._embeddings.update(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._embeddings[text] for text in texts])
