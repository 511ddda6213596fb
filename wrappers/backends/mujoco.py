"""Offscreen rendering of any MuJoCo environment: colour, depth, segmentation and the camera they share."""

from __future__ import annotations

import atexit
import copy
import ctypes
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import mujoco
import numpy as np

from wrappers.backends import opengl
from wrappers.backends.dressing import Dresser, texture_slice
from wrappers.backends.simulation import Camera, Simulation, Viewpoint
from wrappers.errors import UserError

Quality = Literal["fast", "reference"]

# In software, rendering time goes into shadow maps (dm_control: 2048 texels a side, Meta-World: 4096), into vertices
# (spheres and capsules have 28 slices and 16 stacks) and, on tasks with a slack string, into the 30 capsules that it is
# drawn with. Sparing these changes a picture of 84 pixels by less than 0.1 grey levels on average, on Meta-World and on
# dm_control's suite (but 0.11 on humanoid_CMU and 0.13 on swimmer). Sparing slices would show.
FAST_SHADOW_SIZE, FAST_STACKS = 1 / 2, 3 / 4
FAST_STRING_PIECES = 5  # drawn as one


@contextmanager
def _visual_settings(model: mujoco.MjModel, width: int, height: int, quality: Quality) -> Iterator[None]:
    """Sets, while a context is created, what MuJoCo reads then and never again."""
    size, visual = model.vis.global_, model.vis.quality
    before = size.offwidth, size.offheight, visual.shadowsize, visual.numstacks
    size.offwidth, size.offheight = width, height
    if quality == "fast":
        visual.shadowsize = int(visual.shadowsize * FAST_SHADOW_SIZE)
        visual.numstacks = int(visual.numstacks * FAST_STACKS)
    try:
        yield
    finally:
        size.offwidth, size.offheight, visual.shadowsize, visual.numstacks = before


class _Context:
    """An OpenGL context and what MuJoCo keeps in it."""

    def __init__(self, model: mujoco.MjModel, width: int, height: int, quality: Quality) -> None:
        self._rectangle = mujoco.MjrRect(0, 0, width, height)
        opengl.run(lambda: self._create(model, quality))
        # Exit handlers run in reverse order: registered now, this one precedes the one that shuts EGL down.
        atexit.register(self.free)

    def _create(self, model: mujoco.MjModel, quality: Quality) -> None:
        width, height = self._rectangle.width, self._rectangle.height
        with _visual_settings(model, width, height, quality):
            self._gl, self._mujoco = opengl.create_context(
                width, height, lambda: mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
            )
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mujoco)
        self._mujoco.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR  # keeps the precision of distant points
        self._height_fields = model.hfield_data.copy()
        self.painted: tuple[int, ...] | None = None

    def draw(
        self,
        model: mujoco.MjModel,
        scene: mujoco.MjvScene,
        rgb: np.ndarray,
        depth: np.ndarray | None = None,
        backdrop: np.ndarray | None = None,
    ) -> None:
        """Draws `scene` and fills `rgb` and `depth`, whose first row is the bottom of the image.

        `backdrop`, of the same size and orientation, shows where nothing else does, in the picture alone.
        """
        opengl.run(lambda: self._draw(model, scene, rgb, depth, backdrop))

    def paint(self, model: mujoco.MjModel, textures: dict[int, np.ndarray], episode: tuple[int, ...]) -> None:
        """Draws with other texels, by the texture's number, from now on; `painted` is then the `episode`."""
        opengl.run(lambda: self._paint(model, textures))
        self.painted = episode

    def _paint(self, model: mujoco.MjModel, textures: dict[int, np.ndarray]) -> None:
        self._gl.make_current()
        for number, texels in textures.items():
            place = texture_slice(model, number)
            own = model.tex_data[place].copy()
            model.tex_data[place] = texels  # MuJoCo uploads what the model has
            try:
                mujoco.mjr_uploadTexture(model, self._mujoco, number)
            finally:
                model.tex_data[place] = own

    def _draw(
        self,
        model: mujoco.MjModel,
        scene: mujoco.MjvScene,
        rgb: np.ndarray,
        depth: np.ndarray | None,
        backdrop: np.ndarray | None,
    ) -> None:
        self._gl.make_current()
        if not np.array_equal(self._height_fields, model.hfield_data):  # some tasks make a new terrain per episode
            self._height_fields = model.hfield_data.copy()
            for number in range(model.nhfield):
                mujoco.mjr_uploadHField(model, self._mujoco, number)
        mujoco.mjr_render(self._rectangle, scene, self._mujoco)
        if backdrop is not None:
            _draw_behind(backdrop)
        mujoco.mjr_readPixels(rgb, depth, self._rectangle, self._mujoco)

    def free(self) -> None:
        atexit.unregister(self.free)
        opengl.clean_up(self._free)

    def _free(self) -> None:
        if self._gl is None:  # an exit handler may come before the one that closes the environment
            return
        # MuJoCo deletes its OpenGL objects by number in whichever context is current: it must be their own.
        self._gl.make_current()
        self._mujoco.free()
        self._gl.free()
        self._gl = None


def _draw_behind(picture: np.ndarray) -> None:
    """Fills what MuJoCo left empty in the current framebuffer, uint8 (H, W, 3) from the bottom up.

    MuJoCo clears depth to 0, the farthest, and colour to transparent black. Drawn at that depth, and under what alpha
    says is there, a picture shows through where a shape is translucent or covers a part of a pixel alone.
    """
    from OpenGL import GL
    from OpenGL.raw.GL.VERSION import GL_1_0, GL_1_4  # without the checks of types, which take longer than the drawing

    GL_1_0.glPushAttrib(GL.GL_ALL_ATTRIB_BITS)
    for state in (GL.GL_LIGHTING, GL.GL_FOG, GL.GL_TEXTURE_2D, GL.GL_TEXTURE_CUBE_MAP):
        GL_1_0.glDisable(state)
    GL_1_0.glEnable(GL.GL_DEPTH_TEST)
    GL_1_0.glDepthMask(False)
    GL_1_0.glEnable(GL.GL_BLEND)
    GL_1_0.glBlendFunc(GL.GL_ONE_MINUS_DST_ALPHA, GL.GL_ONE)
    GL_1_0.glPixelStorei(GL.GL_UNPACK_ALIGNMENT, 1)
    GL_1_4.glWindowPos3f(0.0, 0.0, 0.0)
    height, width = picture.shape[:2]
    GL_1_0.glDrawPixels(width, height, GL.GL_RGB, GL.GL_UNSIGNED_BYTE, picture.ctypes.data_as(ctypes.c_void_p))
    GL_1_0.glPopAttrib()


class CameraPose(NamedTuple):
    """A pinhole camera in OpenCV's convention: x to the right, y down, z along the optical axis.

    A world point p is seen at pixel `matrix @ rotation @ (p - position)` (divided by its last entry), where pixel
    (0, 0) is the centre of the image's top left pixel.
    """

    position: np.ndarray  # (3,) metres
    rotation: np.ndarray  # (3, 3) world to camera
    matrix: np.ndarray  # (3, 3) intrinsics in pixels


class Shape(NamedTuple):
    """A rigid piece of the scene; `key` tells which one it is at any time."""

    key: tuple[int, int, int]  # MuJoCo's type and id of the object, and a number because a tendon has several pieces
    position: np.ndarray  # (3,) metres
    rotation: np.ndarray  # (3, 3) from the shape to the world


class Geometry(NamedTuple):
    """What each pixel shows at one moment."""

    depth: np.ndarray  # (H, W) float32, metres along the optical axis
    label: np.ndarray  # (H, W) int32, key of `shapes`, -1 for the sky
    shapes: dict[int, Shape]
    camera: CameraPose
    has_backdrop: bool = False  # a picture that keeps its place on the screen is where the sky would be


class Renderer:
    """Draws what a camera of a MuJoCo simulation sees, without changing model, state or another renderer.

    `camera` is a name or number of one of the model's cameras, a `mujoco.MjvCamera`, a `Viewpoint`, or None for the
    free camera. `quality="reference"` draws exactly what dm_control draws; `"fast"` takes about half of the time and
    differs by about 0.05 of 255 grey levels on average. The context is created when the first image is asked for, and
    again when the environment recompiled its model. Raises `UserError` for a camera that does not exist, and where no
    OpenGL library works.
    """

    def __init__(
        self,
        simulation: Simulation,
        height: int,
        width: int,
        camera: Camera = None,
        quality: Quality = "fast",
    ) -> None:
        if quality not in ("fast", "reference"):
            raise UserError(f"unknown render quality {quality!r}: expected 'fast' or 'reference'")
        self.height, self.width = height, width
        self.camera, self.quality = camera, quality
        self._simulation = simulation
        self._model: mujoco.MjModel | None = None
        self._context: _Context | None = None
        self._finalizer: weakref.finalize | None = None
        self._find_camera(simulation.model)

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes a context of its own when it is used."""
        made_later = {"_model": None, "_context": None, "_finalizer": None}
        in_memory = ("_view", "_scene", "_options", "_dresser")
        kept = {name: value for name, value in vars(self).items() if name not in in_memory}
        return kept | made_later

    def rgb(self) -> np.ndarray:
        """Returns the picture: uint8 (H, W, 3)."""
        self._collect_scene()
        return self._read_rgb()

    def depth(self) -> np.ndarray:
        """Returns the distance along the optical axis in metres: float32 (H, W), the far clipping plane for the sky."""
        self._collect_scene()
        return self._draw_geometry()[0]

    def segmentation(self) -> np.ndarray:
        """Returns the id of the geom at each pixel: int32 (H, W), -1 where there is none (sky, sites, tendons)."""
        self._collect_scene()
        geom_ids = np.full(self._scene.ngeom + 1, -1, np.int32)  # the last entry answers for label -1
        for shape in self._labelled():
            if shape.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                geom_ids[shape.segid] = shape.objid
        return geom_ids[self._draw_geometry()[1]]

    def geometry(self) -> Geometry:
        """Returns what is where at this moment: depth, labels and poses that belong together."""
        self._collect_scene()
        data = self._simulation.data
        shapes: dict[int, Shape] = {}
        pieces: Counter[tuple[int, int]] = Counter()
        for shape in self._labelled():
            object_key = (shape.objtype, shape.objid)
            if shape.objtype == mujoco.mjtObj.mjOBJ_GEOM:  # the scene moves infinite planes along with the camera
                position, rotation = data.geom_xpos[shape.objid].copy(), data.geom_xmat[shape.objid].copy()
            else:
                position, rotation = shape.pos.astype(float), shape.mat.astype(float)
            shapes[shape.segid] = Shape((*object_key, pieces[object_key]), position, rotation.reshape(3, 3))
            pieces[object_key] += 1
        depth, label = self._draw_geometry()
        return Geometry(depth, label, shapes, self._camera_pose(), self._has_backdrop)

    def camera_pose(self) -> CameraPose:
        """Returns where the camera is now and how it projects."""
        self._collect_scene()
        return self._camera_pose()

    def close(self) -> None:
        """Frees the OpenGL context; the renderer makes a new one if it is used again."""
        if self._finalizer is not None and self._finalizer.detach():
            self._context.free()
        self._model = self._context = self._finalizer = None

    def _collect_scene(self) -> None:
        model, data = self._simulation.model, self._simulation.data
        if model is not self._model:
            self.close()
            self._build(model)
        with self._camera_in_place(model, data):
            mujoco.mjv_updateScene(
                model, data, self._options, None, self._view, mujoco.mjtCatBit.mjCAT_ALL, self._scene
            )
        if self.quality == "fast" and model.ntendon:
            self._simplify_strings()
        if self._dresser is not None:
            self._dresser.dress(data, self._scene)

    def _simplify_strings(self) -> None:
        for (kind, _), shapes in itertools.groupby(self._drawn(), key=lambda shape: (shape.objtype, shape.objid)):
            pieces = list(shapes)
            if kind != mujoco.mjtObj.mjOBJ_TENDON or len(pieces) < 4 * FAST_STRING_PIECES:  # a taut one has few
                continue
            for first in range(0, len(pieces), FAST_STRING_PIECES):
                piece, *others = pieces[first : first + FAST_STRING_PIECES]
                last = others[-1] if others else piece
                start, end = piece.pos - piece.mat[:, 2] * piece.size[2], last.pos + last.mat[:, 2] * last.size[2]
                mujoco.mjv_connector(piece, mujoco.mjtGeom.mjGEOM_CAPSULE, piece.size[0], start, end)
                for other in others:
                    other.type = mujoco.mjtGeom.mjGEOM_LABEL  # an empty one: nothing is drawn

    def _build(self, model: mujoco.MjModel) -> None:
        self._view = self._find_camera(model)
        self._scene = mujoco.MjvScene(model, maxgeom=10_000)
        self._options = mujoco.MjvOption()
        visuals = self._simulation.visuals
        self._dresser = None if visuals is None or not visuals.kinds else Dresser(model, visuals)
        self._context = _Context(model, self.width, self.height, self.quality)
        self._finalizer = weakref.finalize(self, self._context.free)
        self._finalizer.atexit = False
        self._model = model

    def _find_camera(self, model: mujoco.MjModel) -> mujoco.MjvCamera:
        if isinstance(self.camera, mujoco.MjvCamera):
            return copy.copy(self.camera)
        view = mujoco.MjvCamera()
        if self.camera is None:
            mujoco.mjv_defaultFreeCamera(model, view)
            return view
        wanted = self.camera.camera if isinstance(self.camera, Viewpoint) else self.camera
        names = [model.camera(number).name for number in range(model.ncam)]
        if wanted not in names and wanted not in range(model.ncam):
            raise UserError(f"no camera {wanted!r}: expected one of {names}, or a number from 0 to {model.ncam - 1}")
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = names.index(wanted) if isinstance(wanted, str) else wanted
        return view

    @contextmanager
    def _camera_in_place(self, model: mujoco.MjModel, data: mujoco.MjData) -> Iterator[None]:
        if not isinstance(self.camera, Viewpoint):
            yield
            return
        number = self._view.fixedcamid
        position, axes = data.cam_xpos[number].copy(), data.cam_xmat[number].copy()
        data.cam_xpos[number] = self.camera.position
        if self.camera.upside_down:
            data.cam_xmat[number] = (axes.reshape(3, 3) * (-1, -1, 1)).ravel()
        try:
            yield
        finally:
            data.cam_xpos[number], data.cam_xmat[number] = position, axes

    def _read_rgb(self) -> np.ndarray:
        rgb = np.empty((self.height, self.width, 3), np.uint8)
        visuals, backdrop = self._simulation.visuals, None
        if self._dresser is not None and "colour" in visuals.kinds and self._context.painted != visuals.episode:
            self._context.paint(self._model, self._dresser.textures(), visuals.episode)
        if self._has_backdrop:
            backdrop = np.ascontiguousarray(visuals.backdrop(self.height, self.width)[::-1])
        self._context.draw(self._model, self._scene, rgb, backdrop=backdrop)
        return rgb[::-1].copy()

    @property
    def _has_backdrop(self) -> bool:
        return self._simulation.visuals is not None and "background" in self._simulation.visuals.kinds

    def _draw_geometry(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns depth in metres and the label of each pixel, -1 for the sky."""
        rgb = np.empty((self.height, self.width, 3), np.uint8)
        depth = np.empty((self.height, self.width), np.float32)
        flags = self._scene.flags.copy()
        for flag in (mujoco.mjtRndFlag.mjRND_SEGMENT, mujoco.mjtRndFlag.mjRND_IDCOLOR):
            self._scene.flags[flag] = True
        self._context.draw(self._model, self._scene, rgb, depth)
        self._scene.flags[:] = flags
        label = rgb[::-1].astype(np.int32) @ np.array((1, 1 << 8, 1 << 16), np.int32) - 1
        near, far = self._scene.camera[0].frustum_near, self._scene.camera[0].frustum_far
        # The buffer holds 1 at the near and 0 at the far plane, linear in 1/z.
        return near * far / (depth[::-1] * np.float32(far - near) + np.float32(near)), label

    def _drawn(self) -> list[mujoco.MjvGeom]:
        return self._scene.geoms[: self._scene.ngeom]

    def _labelled(self) -> list[mujoco.MjvGeom]:
        return [shape for shape in self._drawn() if shape.segid != -1]

    def _camera_pose(self) -> CameraPose:
        left, right = self._scene.camera  # a stereo pair, of which a mono picture shows the mean
        if left.orthographic:
            raise UserError("the camera is orthographic: only perspective cameras have a CameraPose")
        forward, up = (left.forward + right.forward) / 2.0, (left.up + right.up) / 2.0
        top, bottom, near = left.frustum_top, left.frustum_bottom, left.frustum_near
        center = (left.frustum_center + right.frustum_center) / 2.0
        half_width = left.frustum_width or self.width / self.height * (top - bottom) / 2.0
        focal_x, focal_y = self.width * near / (2.0 * half_width), self.height * near / (top - bottom)
        middle_x = (half_width - center) / (2.0 * half_width) * self.width - 0.5
        middle_y = top / (top - bottom) * self.height - 0.5
        return CameraPose(
            position=((left.pos + right.pos) / 2.0).astype(float),
            rotation=np.stack([np.cross(forward, up), -up, forward]).astype(float),
            matrix=np.array([[focal_x, 0.0, middle_x], [0.0, focal_y, middle_y], [0.0, 0.0, 1.0]]),
        )
