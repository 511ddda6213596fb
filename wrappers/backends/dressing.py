"""A distraction in a MuJoCo scene: changes what was collected for drawing, never the model or the state."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import mujoco
import numpy as np

from wrappers.backends.scenes import Scene, find_scene
from wrappers.backends.visuals import Visuals

# At hard; other difficulties have their share of it. The camera's are those of the Distracting Control Suite.
COLOUR = 0.6
"""change of red, green and blue, of 0-1"""
AZIMUTH, ELEVATION, ROLL = np.radians((27.0, 27.0, 27.0))
NEARER, FARTHER = 0.15, 0.45
"""shares of the camera's distance"""
BRIGHTNESS, TINT, TILT = 0.6, 0.3, np.radians(45.0)

_IN_VIEW = 0.95  # of the way from the middle of the picture to its border: as far out as what was in view may get
_SCENERY = ("floor", "wall")


class Dresser:
    """Dresses the scenes of one model as `visuals` say."""

    def __init__(self, model: mujoco.MjModel, visuals: Visuals) -> None:
        self._model, self._visuals = model, visuals
        scene = find_scene(model)
        self._scenery = _scenery(model, scene)
        things = [number for (kind, number), index in scene.shape_class.items() if _is_thing(scene, kind, index)]
        self._things = np.array(things or range(model.ngeom), np.int64)
        kinds = mujoco.mjtObj
        starts = np.cumsum((0, model.nmat, model.ngeom, model.nsite, model.ntendon))
        self._colour_of = dict(zip((kinds.mjOBJ_GEOM, kinds.mjOBJ_SITE, kinds.mjOBJ_TENDON), starts[1:], strict=False))
        self._colours = int(starts[-1])
        self._is_textured = (model.mat_texid >= 0).reshape(model.nmat, -1).any(1)

    def dress(self, data: mujoco.MjData, scene: mujoco.MjvScene) -> None:
        """Changes a scene that was just collected."""
        kinds = self._visuals.kinds
        if "background" in kinds:
            self._clear_scenery(scene)
        if "colour" in kinds:
            self._recolour(scene)
        if "camera" in kinds:
            self._move_camera(data, scene)
        if "light" in kinds:
            self._relight(data, scene)

    def textures(self) -> dict[int, np.ndarray]:
        """Those of the model's textures that are drawn, in the episode's colours: number and texels, as `tex_data`."""
        model, visuals = self._model, self._visuals
        shifts = 255.0 * COLOUR * visuals.share * visuals.fixed("texture", model.ntex, 3)
        painted = {}
        for number, channels in enumerate(model.tex_nchannel):
            is_covered = "background" in visuals.kinds and model.tex_type[number] == mujoco.mjtTexture.mjTEXTURE_SKYBOX
            if channels >= 3 and not is_covered:
                texels = model.tex_data[texture_slice(model, number)].reshape(1, -1, channels)
                mean = np.array(cv2.mean(texels)[:3])
                painted[number] = cv2.add(texels, (*_kept_grey(mean, shifts[number]), 0.0)).ravel()
        return painted

    def _clear_scenery(self, scene: mujoco.MjvScene) -> None:
        """Leaves the sky to the backdrop, and from easy to hard more and more of floors, walls and tables."""
        scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = False
        seen = min(1.0, 1.5 * (1.0 - self._visuals.share))  # how much of the scenery
        if seen == 1.0:
            return
        for shape in scene.geoms[: scene.ngeom]:
            if (shape.objtype, shape.objid) not in self._scenery:
                continue
            if seen == 0.0:
                shape.type, shape.segid = mujoco.mjtGeom.mjGEOM_LABEL, -1  # an empty one: nothing is drawn
            else:  # blending over nothing squares alpha: see `_Context._draw_backdrop`
                shape.rgba *= np.float32(np.sqrt(seen))

    def _recolour(self, scene: mujoco.MjvScene) -> None:
        """Shifts the colours of materials, and of shapes without one; textures have colours of their own."""
        shifts = COLOUR * self._visuals.share * self._visuals.drift("colour", self._colours, 3)
        for shape in scene.geoms[: scene.ngeom]:
            material = shape.matid
            if material >= 0 and self._is_textured[material]:
                continue
            if (start := self._colour_of.get(shape.objtype)) is None and material < 0:
                continue
            shift = shifts[material if material >= 0 else start + shape.objid]
            shape.rgba[:3] = np.clip(shape.rgba[:3] + shift, 0.0, 1.0)

    def _move_camera(self, data: mujoco.MjData, scene: mujoco.MjvScene) -> None:
        """Turns the camera around the point that it looks at, as far away as things are, and keeps these in view."""
        azimuth, elevation, roll, zoom = self._visuals.share * self._visuals.drift("camera", 4)
        things, pose = data.geom_xpos[self._things], _Pose.of(scene)
        sideways, up, forward = pose.axes
        distance = float((things.mean(0) - pose.position) @ forward)
        if distance <= 0.0:  # it looks elsewhere
            distance = float(self._model.stat.extent)
        pivot = pose.position + distance * forward
        height = np.arcsin(np.clip(-forward[2], -1.0, 1.0))
        lift = max(elevation * ELEVATION, -0.8 * max(height, 0.0))  # not below the floor
        turn = _rotation(np.array((0.0, 0.0, 1.0)), azimuth * AZIMUTH)
        # What stands behind the pivot goes up as the camera turns down, unless it is upside down.
        turn = turn @ _rotation(sideways, -lift if up[2] >= 0.0 else lift) @ _rotation(forward, roll * ROLL)
        dolly = 1.0 - NEARER * zoom if zoom > 0.0 else 1.0 - FARTHER * zoom
        wanted = np.maximum(pose.reach(things, scene), _IN_VIEW)
        wanted[wanted > 1.0] = np.inf  # was not in view before
        for _ in range(8):
            turned = _Pose(pivot + dolly * (turn @ (pose.position - pivot)), pose.axes @ turn.T)
            if (turned.reach(things, scene) <= wanted).all():
                break
            dolly *= 1.1
        for camera in scene.camera:
            camera.pos = pivot + dolly * (turn @ (camera.pos - pivot))
            camera.forward, camera.up = turn @ camera.forward, turn @ camera.up
        for light in scene.lights[: scene.nlight]:
            if light.headlight:
                light.pos, light.dir = turned.position, turned.axes[2]

    def _relight(self, data: mujoco.MjData, scene: mujoco.MjvScene) -> None:
        """Changes how bright and of what colour light is, and where it comes from."""
        numbers = self._visuals.share * self._visuals.drift("light", 6)
        factor = ((1.0 + BRIGHTNESS * numbers[0]) * (1.0 + TINT * numbers[1:4])).astype(np.float32)
        tilt = _rotation(np.array((1.0, 0.0, 0.0)), numbers[4] * TILT) @ _rotation(
            np.array((0.0, 1.0, 0.0)), numbers[5] * TILT
        )
        middle = data.geom_xpos[self._things].mean(0)
        for light in scene.lights[: scene.nlight]:
            light.ambient, light.diffuse = light.ambient * factor, light.diffuse * factor
            if not light.headlight:
                light.pos, light.dir = middle + tilt @ (light.pos - middle), tilt @ light.dir


class _Pose(NamedTuple):
    """Where a camera is, and its axes in rows: to the right, up and forward."""

    position: np.ndarray
    axes: np.ndarray

    @classmethod
    def of(cls, scene: mujoco.MjvScene) -> _Pose:
        """The scene's camera: a stereo pair, of which a mono picture shows the mean."""
        position, forward, up = (
            sum(getattr(camera, name) for camera in scene.camera) / 2.0 for name in ("pos", "forward", "up")
        )
        return cls(position, np.stack([np.cross(forward, up), up, forward]))

    def reach(self, points: np.ndarray, scene: mujoco.MjvScene) -> np.ndarray:
        """How far from the middle of the picture points are, 1 at the upper border; infinite behind the camera."""
        camera = scene.camera[0]
        right, above, away = self.axes @ (points - self.position).T
        slope = camera.frustum_top / camera.frustum_near
        return np.where(away > 0.0, np.maximum(abs(right), abs(above)) / np.maximum(away, 1e-6) / slope, np.inf)


def texture_slice(model: mujoco.MjModel, number: int) -> slice:
    """Where in `tex_data` a texture is."""
    start = model.tex_adr[number]
    return slice(start, start + model.tex_height[number] * model.tex_width[number] * model.tex_nchannel[number])


def _is_thing(scene: Scene, kind: int, index: int) -> bool:
    return kind == mujoco.mjtObj.mjOBJ_GEOM and index < len(scene.parts)


def _scenery(model: mujoco.MjModel, scene: Scene) -> frozenset[tuple[int, int]]:
    """What a backdrop may cover: floors, walls and tables; nothing that has a part in the task."""
    covered = set()
    for (kind, number), index in scene.shape_class.items():
        if kind != mujoco.mjtObj.mjOBJ_GEOM or index < len(scene.parts):
            continue
        name = f"{model.body(model.geom_bodyid[number]).name} {model.geom(number).name}".lower()
        if scene.class_names[index] in _SCENERY or "table" in name:
            covered.add((int(kind), number))
    return frozenset(covered)


def _kept_grey(mean: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The shift, or as much of it as takes no mean, 0-255, to where a pattern would be lost in black or white."""
    return np.clip(mean + shift, np.minimum(mean, 40.0), np.maximum(mean, 215.0)) - mean


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """The matrix (3, 3) of a right-handed turn around a unit axis."""
    x, y, z = axis
    cross = np.array(((0.0, -z, y), (z, 0.0, -x), (-y, x, 0.0)))
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross
