"""The MuJoCo simulation behind an environment, and the camera that shows it."""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import gymnasium as gym
import mujoco
import numpy as np

from wrappers.backends.visuals import Visuals, find_visuals


@dataclass(frozen=True)
class Viewpoint:
    """A fixed camera of the model seen from another `position` (metres, world frame), turned by 180° if `upside_down`.

    The model keeps its own camera: the pose is in place only while a scene is collected.
    """

    camera: str
    position: tuple[float, float, float]
    upside_down: bool = False


Camera: TypeAlias = int | str | mujoco.MjvCamera | Viewpoint | None

# The view used by work on Meta-World from pixels (MWM, arXiv 2206.14244; DrM, arXiv 2310.19668): `corner2`, moved
# towards the table. The model defines this camera upside down.
METAWORLD_CAMERA = Viewpoint("corner2", position=(0.75, 0.075, 0.7), upside_down=True)


GYMNASIUM_DRAWS = "gymnasium.envs.mujoco.mujoco_rendering"
KNOWN_WAYS = (
    "gymnasium.core.Env.render",  # none
    "gymnasium.envs.mujoco.mujoco_env.MujocoEnv.render",
    "shimmy.dm_control_compatibility.DmControlCompatibilityV0.render",
)
PASSIVE_WRAPPERS = ("OrderEnforcing", "PassiveEnvChecker", "RecordVideo")
"""wrappers that define `render` and show what they were given"""


@dataclass(frozen=True)
class Simulation:
    """The MuJoCo structs behind an environment, looked up anew each time: dm_control may recompile its model.

    `visuals`: of the `Distraction` around it, None where there is none; every renderer draws them.
    """

    _lookup: Callable[[], tuple[mujoco.MjModel, mujoco.MjData]]
    visuals: Visuals | None = None

    @property
    def model(self) -> mujoco.MjModel:
        return self._lookup()[0]

    @property
    def data(self) -> mujoco.MjData:
        return self._lookup()[1]


def find_simulation(env: gym.Env) -> Simulation | None:
    """The simulation behind `env` (dm_control, Meta-World, Gymnasium or any other MuJoCo env); None if it has none."""
    base, visuals = env.unwrapped, find_visuals(env)
    if isinstance(getattr(base, "model", None), mujoco.MjModel):
        return Simulation(functools.partial(_own_structs, base), visuals)
    physics = getattr(base, "physics", None)  # dm_control wraps both structs
    if isinstance(getattr(getattr(physics, "model", None), "ptr", None), mujoco.MjModel):
        return Simulation(functools.partial(_wrapped_structs, base), visuals)
    return None


# Functions that can be pickled, for environments that can.
def _own_structs(base: Any) -> tuple[mujoco.MjModel, mujoco.MjData]:
    return base.model, base.data


def _wrapped_structs(base: Any) -> tuple[mujoco.MjModel, mujoco.MjData]:
    return base.physics.model.ptr, base.physics.data.ptr


def default_camera(env: gym.Env) -> Camera:
    """The camera of a MuJoCo `env` that published results from pixels use, or else the one its authors chose.

    Meta-World: `METAWORLD_CAMERA`, unless the env was made with another camera than `corner2`. Gymnasium: the camera
    that the env was made with, else the model's `track`, which keeps the agent in view, else the env's free camera.
    dm_control: the camera that the env was made with, else number 0 (quadruped: 2).
    """
    base = env.unwrapped
    model = find_simulation(env).model
    chosen = base.mujoco_renderer.camera_id if hasattr(base, "mujoco_renderer") else -1
    if type(base).__module__.startswith("metaworld.") and chosen in (-1, model.camera(METAWORLD_CAMERA.camera).id):
        return METAWORLD_CAMERA
    if hasattr(base, "render_kwargs"):  # of Shimmy
        chosen = base.render_kwargs.get("camera_id", -1)
    if chosen != -1:
        return chosen
    if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track") != -1:
        return "track"
    if hasattr(base, "mujoco_renderer"):
        return _free_camera(model, base.mujoco_renderer.default_cam_config or {})
    if type(getattr(base, "task", None)).__module__ == "dm_control.suite.quadruped":
        return 2
    return 0 if model.ncam else None


def drawn_by_itself(env: gym.Env) -> str:
    """What in the way a MuJoCo `env` draws itself our renderer does not know; empty if it knows all of it.

    It knows dm_control's through Shimmy, and that of Gymnasium's `MujocoEnv`, which Meta-World uses. Whoever defines
    `render` anew has a reason: goals that are moved into place for the picture, a simulation inside, another camera.
    """
    layer = env
    while isinstance(layer, gym.Wrapper):
        if type(layer).render is not gym.Wrapper.render and type(layer).__name__ not in PASSIVE_WRAPPERS:
            return f"{type(layer).__name__}.render"
        layer = layer.env
    way = type(layer).render
    known = "render" not in vars(layer) and f"{way.__module__}.{way.__qualname__}" in KNOWN_WAYS
    drawer = getattr(layer, "mujoco_renderer", None)
    if not known:
        return way.__qualname__
    if drawer is not None and (
        type(drawer).__module__ != GYMNASIUM_DRAWS or drawer._vopt or drawer.model is not layer.model
    ):
        return type(drawer).__name__
    more = set(getattr(layer, "render_kwargs", ())) - {"height", "width", "camera_id"}
    return f"render_kwargs {sorted(more)}" if more else ""


def _restore_camera(fields: dict[str, Any]) -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    for name, value in fields.items():
        setattr(camera, name, value)
    return camera


def _reduce_camera(camera: mujoco.MjvCamera) -> tuple:
    names = "type fixedcamid trackbodyid lookat distance azimuth elevation".split()
    return _restore_camera, ({name: copy.copy(getattr(camera, name)) for name in names},)


copyreg.pickle(mujoco.MjvCamera, _reduce_camera)  # MuJoCo lets it be copied, but not pickled


def _free_camera(model: mujoco.MjModel, settings: dict[str, Any]) -> mujoco.MjvCamera:
    """The camera of Gymnasium's own renderer: it looks at the median geom, unless the env's `settings` differ."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    camera = mujoco.MjvCamera()
    camera.lookat = np.median(data.geom_xpos, axis=0)
    camera.distance = model.stat.extent
    for name, value in settings.items():
        setattr(camera, name, value)
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    return camera
