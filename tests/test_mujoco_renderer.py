"""The renderer against dm_control's and Gymnasium's own pictures, against geometry, and beside other renderers."""

import gc
import importlib
import importlib.util
import os
import subprocess
import sys
import threading

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import shimmy  # noqa: F401  (registers dm_control's ids)

from wrappers.backends import opengl
from wrappers.backends.mujoco import Renderer
from wrappers.backends.simulation import METAWORLD_CAMERA, Simulation, default_camera, find_simulation
from wrappers.errors import UserError

TASKS = ["walker-walk", "cartpole-swingup", "cheetah-run", "reacher-easy", "ball_in_cup-catch", "finger-spin"]
OTHER_TASKS = ["humanoid-walk", "hopper-hop", "manipulator-bring_ball", "fish-swim", "pendulum-swingup"]

BALL_ON_FLOOR = """
<mujoco>
  <visual><map znear="0.01" zfar="20"/></visual>
  <statistic extent="1" center="0 0 0"/>
  <worldbody>
    <light pos="0 0 5"/>
    <camera name="above" pos="0 0 3" fovy="40"/>
    <camera name="aside" pos="1 -3 2" xyaxes="0.94868 0.31623 0 -0.15 0.45 0.88"/>
    <geom name="floor" type="plane" size="5 5 1" rgba="0.2 0.3 0.8 1"/>
    <body name="ball" pos="0.3 0.2 0.5"><freejoint/><geom name="ball" size="0.1" rgba="1 0.2 0.1 1"/></body>
  </worldbody>
</mujoco>
"""


def simulate(xml: str) -> Simulation:
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return Simulation(lambda: (model, data))


def dm_control_env(task: str, steps: int = 5) -> gym.Env:
    env = gym.make(f"dm_control/{task}-v0")
    env.reset(seed=1)
    env.action_space.seed(1)
    for _ in range(steps):
        env.step(env.action_space.sample())
    return env


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean difference in grey levels."""
    return float(np.abs(first.astype(float) - second.astype(float)).mean())


@pytest.mark.parametrize("task", TASKS)
def test_reference_is_what_dm_control_draws(task, dm_control_renders):
    env = dm_control_env(task)
    renderer = Renderer(find_simulation(env), 84, 84, camera=0, quality="reference")
    theirs = env.unwrapped.physics.render(84, 84, camera_id=0)
    assert difference(renderer.rgb(), theirs) < 0.02
    assert difference(renderer.rgb(), np.roll(theirs, 1, axis=1)) > 1.0  # the picture has structure to compare
    renderer.close()
    env.close()


@pytest.mark.parametrize("task", TASKS + OTHER_TASKS)
def test_fast_is_close_to_reference(task):
    env = dm_control_env(task)
    simulation = find_simulation(env)
    fast, reference = (Renderer(simulation, 84, 84, camera=0, quality=quality) for quality in ("fast", "reference"))
    differences = []
    for _ in range(4):
        differences.append(difference(fast.rgb(), reference.rgb()))
        for _ in range(5):
            env.step(env.action_space.sample())
    assert np.mean(differences) < 0.1
    fast.close()
    reference.close()
    env.close()


def test_fast_is_close_to_reference_on_metaworld_and_gymnasium():
    import metaworld  # noqa: F401  (registers its ids)

    for env in (gym.make("Meta-World/MT1", env_name="push-v3", seed=0), gym.make("HalfCheetah-v5")):
        env.reset(seed=0)
        camera = default_camera(env)
        fast, reference = (Renderer(find_simulation(env), 84, 84, camera, quality) for quality in ("fast", "reference"))
        assert difference(fast.rgb(), reference.rgb()) < 0.1
        fast.close()
        reference.close()
        env.close()


def test_settings_of_the_model_are_restored():
    simulation = simulate(BALL_ON_FLOOR)
    quality, size = simulation.model.vis.quality, simulation.model.vis.global_
    before = quality.shadowsize, quality.numstacks, size.offwidth, size.offheight
    renderer = Renderer(simulation, 32, 48)
    assert renderer.rgb().shape == (32, 48, 3)
    assert (quality.shadowsize, quality.numstacks, size.offwidth, size.offheight) == before
    renderer.close()


def test_renderers_do_not_disturb_each_other(dm_control_renders):
    """Contexts are created, used and freed in all orders, between dm_control's own pictures."""
    envs = [dm_control_env(task) for task in ("walker-walk", "cartpole-swingup", "reacher-easy")]
    renderers = [Renderer(find_simulation(env), 84, 84, camera=0, quality="reference") for env in envs]
    truth = [env.unwrapped.physics.render(84, 84, camera_id=0) for env in envs]

    def check() -> None:
        for env, renderer, picture in zip(envs, renderers, truth, strict=True):
            assert difference(renderer.rgb(), picture) < 0.02
            assert difference(env.unwrapped.physics.render(84, 84, camera_id=0), picture) < 0.02

    check()
    extra = [Renderer(find_simulation(env), 64, 64, camera=0) for env in envs]
    for renderer in extra:
        renderer.rgb()
    check()
    for renderer in extra:
        renderer.close()
        check()
    renderers[1].close()
    check()  # a closed renderer opens again when it is used
    envs[0].unwrapped.physics._free_rendering_contexts()
    check()
    for renderer, env in zip(renderers, envs, strict=True):
        renderer.close()
        env.close()


def test_threads_may_draw_at_the_same_time():
    simulations = [simulate(BALL_ON_FLOOR.replace("1 0.2 0.1 1", colour)) for colour in ("1 0 0 1", "0 1 0 1")]
    renderers = [Renderer(simulation, 64, 64, "above") for simulation in simulations]
    expected = [renderer.rgb() for renderer in renderers]
    wrong = []

    def draw(number: int) -> None:
        for _ in range(20):
            if not np.array_equal(renderers[number].rgb(), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for renderer in renderers:
        renderer.close()


def test_depth_is_metres_along_the_optical_axis():
    renderer = Renderer(simulate(BALL_ON_FLOOR), 64, 64, "above")
    depth, segmentation = renderer.depth(), renderer.segmentation()
    floor, ball = 0, 1
    assert depth.dtype == np.float32
    assert segmentation.dtype == np.int32
    assert set(np.unique(segmentation)) == {floor, ball}
    assert np.abs(depth[segmentation == floor] - 3.0).max() < 1e-3  # also in the corners: not the length of the ray
    assert depth.min() == pytest.approx(3.0 - 0.6, abs=5e-3)  # the top of the ball
    renderer.close()


@pytest.mark.parametrize("camera", ["above", "aside", None])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (60, 90)])
def test_camera_pose_projects_points_to_where_they_are_seen(camera, height, width):
    simulation = simulate(BALL_ON_FLOOR.replace('size="0.1"', 'size="0.03"'))
    renderer = Renderer(simulation, height, width, camera)
    pose = renderer.camera_pose()
    x, y, z = pose.matrix @ pose.rotation @ (simulation.data.body("ball").xpos - pose.position)
    rows, columns = np.nonzero(renderer.segmentation() == 1)
    assert x / z == pytest.approx(columns.mean(), abs=0.5)
    assert y / z == pytest.approx(rows.mean(), abs=0.5)
    assert renderer.depth()[rows, columns].mean() == pytest.approx(z, abs=0.03)
    assert pose.rotation @ pose.rotation.T == pytest.approx(np.eye(3), abs=1e-6)
    renderer.close()


def test_sky_has_no_geom():
    renderer = Renderer(simulate("<mujoco><worldbody><geom size='0.1'/></worldbody></mujoco>"), 32, 32)
    segmentation = renderer.segmentation()
    assert set(np.unique(segmentation)) == {-1, 0}
    assert segmentation[0, 0] == -1
    renderer.close()


def test_metaworld_is_seen_upright_from_the_published_place():
    import metaworld  # noqa: F401

    for settings in ({}, {"camera_name": "corner2"}):
        env = gym.make("Meta-World/MT1", env_name="reach-v3", seed=0, **settings)
        env.reset(seed=0)
        assert default_camera(env) is METAWORLD_CAMERA
    simulation = find_simulation(env)
    before = simulation.model.cam_pos.copy(), simulation.data.cam_xpos.copy(), simulation.data.cam_xmat.copy()
    renderer = Renderer(simulation, 84, 84, METAWORLD_CAMERA)
    renderer.rgb()
    pose = renderer.camera_pose()
    after = simulation.model.cam_pos, simulation.data.cam_xpos, simulation.data.cam_xmat
    assert all(np.array_equal(then, now) for then, now in zip(before, after, strict=True))
    assert pose.position == pytest.approx((0.75, 0.075, 0.7))
    down_in_picture = pose.rotation[1]
    assert down_in_picture[2] < -0.5
    for name in ("hand", "obj"):  # the arm's hand and the object are in the picture
        x, y, z = pose.matrix @ pose.rotation @ (simulation.data.body(name).xpos - pose.position)
        assert z > 0.0
        assert 0 < x / z < 83
        assert 0 < y / z < 83
    renderer.close()
    env.close()


def test_default_cameras():
    cameras = {}
    for name in ("dm_control/walker-walk-v0", "HalfCheetah-v5", "Reacher-v5"):
        env = gym.make(name)
        cameras[name] = default_camera(env)
        env.close()
    assert cameras["dm_control/walker-walk-v0"] == 0
    assert cameras["HalfCheetah-v5"] == "track"
    assert isinstance(cameras["Reacher-v5"], mujoco.MjvCamera)
    env = gym.make("HalfCheetah-v5", camera_id=-1, camera_name=None)
    assert default_camera(env) == "track"
    env.close()


@pytest.mark.parametrize("name", ["Reacher-v5", "InvertedDoublePendulum-v5"])
def test_default_camera_is_gymnasiums_own(name, monkeypatch):
    opengl.preload_triton()
    if "DISPLAY" not in os.environ:
        monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    env = gym.make(name, render_mode="rgb_array", width=84, height=84)
    env.reset(seed=0)
    env.unwrapped.set_state(
        env.unwrapped.init_qpos, env.unwrapped.init_qvel
    )  # theirs looks at the first episode's start
    renderer = Renderer(find_simulation(env), 84, 84, default_camera(env), "reference")
    assert difference(renderer.rgb(), env.render()) < 0.02
    renderer.close()
    env.close()


def test_follows_a_recompiled_model():
    simulations = [simulate(BALL_ON_FLOOR), simulate(BALL_ON_FLOOR.replace("1 0.2 0.1 1", "0 1 0 1"))]
    current = [simulations[0]]
    renderer = Renderer(Simulation(lambda: (current[0].model, current[0].data)), 64, 64, "above")
    first = renderer.rgb()
    current[0] = simulations[1]
    fresh = Renderer(simulations[1], 64, 64, "above")
    assert np.array_equal(renderer.rgb(), fresh.rgb())
    assert not np.array_equal(renderer.rgb(), first)
    renderer.close()
    fresh.close()


def test_follows_a_new_terrain():
    """dm_control's quadruped-escape draws a height field at each reset."""
    simulation = simulate("""<mujoco><asset><hfield name="hills" nrow="20" ncol="20" size="1 1 0.5 0.1"/></asset>
        <worldbody><light pos="0 0 5"/><geom type="hfield" hfield="hills"/></worldbody></mujoco>""")
    renderer = Renderer(simulation, 64, 64)
    flat = renderer.rgb()
    simulation.model.hfield_data[:] = np.random.default_rng(0).random(400)
    fresh = Renderer(simulation, 64, 64)
    assert np.array_equal(renderer.rgb(), fresh.rgb())
    assert difference(renderer.rgb(), flat) > 1.0
    renderer.close()
    fresh.close()


def test_no_simulation_in_other_environments():
    assert find_simulation(gym.make("CartPole-v1")) is None


def test_wrong_arguments_are_explained():
    simulation = simulate(BALL_ON_FLOOR)
    with pytest.raises(UserError, match=r"no camera 'below'.*'above', 'aside'"):
        Renderer(simulation, 64, 64, "below")
    with pytest.raises(UserError, match="no camera 2"):
        Renderer(simulation, 64, 64, 2)
    with pytest.raises(UserError, match="quality 'best'"):
        Renderer(simulation, 64, 64, quality="best")


def test_an_exception_on_the_render_thread_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        opengl.run(lambda: 1 / 0)
    assert opengl.run(lambda: "alive") == "alive"


def test_without_a_backend_the_error_says_what_to_install(monkeypatch):
    real_import = importlib.import_module

    def no_backend(name: str):
        if name.startswith("mujoco."):
            raise ImportError(f"{name} is broken")
        return real_import(name)

    monkeypatch.setattr(opengl.importlib, "import_module", no_backend)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(UserError, match=r"egl is broken.*osmesa is broken.*glfw is broken.*libosmesa6.*MUJOCO_GL"):
        Renderer(simulate(BALL_ON_FLOOR), 64, 64).rgb()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(UserError, match=r"^(?!.*egl is broken).*osmesa is broken"):
        Renderer(simulate(BALL_ON_FLOOR), 64, 64).rgb()


def test_collecting_a_renderer_on_the_render_thread_does_not_lock_up():
    holder = [Renderer(simulate(BALL_ON_FLOOR), 64, 64, "above")]
    holder[0].rgb()
    survivor = Renderer(simulate(BALL_ON_FLOOR), 64, 64, "above")
    picture = survivor.rgb()
    finished = []

    def collect() -> None:
        opengl.run(lambda: (holder.clear(), gc.collect()))
        finished.append(True)

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(timeout=300)
    assert finished
    assert np.array_equal(survivor.rgb(), picture)
    survivor.close()


SCRIPT = """
import atexit, gc, os, warnings
atexit.register(lambda: renderers[0].close())  # runs after those that are registered later
from test_mujoco_renderer import BALL_ON_FLOOR, simulate
from wrappers import UserError
from wrappers.backends.mujoco import Renderer
renderers = [Renderer(simulate(BALL_ON_FLOOR), 32, 32, "above") for _ in range(4)]
pictures = [renderer.rgb() for renderer in renderers]
renderers[1].close()
del renderers[1]
del renderers[2]
gc.collect()
warnings.simplefilter("ignore")  # from Python 3.12 on, of a fork beside threads, which is what this is about
child = os.fork()
if child == 0:
    try:
        renderers[-1].rgb()
    except UserError as error:
        print(error, flush=True)
        os._exit(0)  # as workers of multiprocessing do
os.waitpid(child, 0)
print((renderers[-1].rgb() == pictures[-1]).all())
"""


def test_exit_is_silent_and_a_forked_child_gets_an_error_instead_of_hanging():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{os.getcwd()}:{os.path.dirname(__file__)}"},
    )
    assert result.returncode == 0
    assert result.stderr == ""
    assert "context='spawn'" in result.stdout
    assert result.stdout.endswith("True\n")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_and_mesa_live_in_one_process():
    """dm_control loads Mesa when it is imported; what PyTorch compiles with brings another LLVM."""
    script = "import dm_control.mujoco; from wrappers.backends import opengl; opengl.preload_triton(); import triton"
    environment = {**os.environ, "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
