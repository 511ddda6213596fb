"""Optical flow: estimators against known motion, the simulator's flow against analysis, and the wrapper around them."""

import copy
import pickle

import cv2
import gymnasium as gym
import mujoco
import numpy as np
import pytest
import shimmy  # noqa: F401  (registers dm_control's ids)
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from wrappers import ActionRepeat, OpticalFlowObservation, PixelObservation, UserError
from wrappers.backends.flow import MARGIN, DISFlow, FarnebackFlow, flow_between
from wrappers.backends.mujoco import Renderer
from wrappers.backends.simulation import Simulation
from wrappers.flow import decode_flow, encode_flow, flow_to_rgb, relative_flow

# -- Estimators against shifts that are known


def texture(size: int, seed: int, coarseness: float) -> np.ndarray:
    noise = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(size, size, 3)), (0, 0), coarseness)
    return ((noise - noise.min()) / (noise.max() - noise.min()) * 255).astype(np.uint8)


def shifted(picture: np.ndarray, shift: np.ndarray, size: int) -> np.ndarray:
    """A window of `picture`, whose content has moved by `shift`."""
    margin = (len(picture) - size) / 2
    move = np.float32([[1, 0, shift[0] - margin], [0, 1, shift[1] - margin]])
    return cv2.warpAffine(picture, move, (size, size), flags=cv2.INTER_CUBIC)


def shifts(count: int) -> list[np.ndarray]:
    """Displacements up to 6 pixels in all directions, every second one of whole pixels."""
    rng = np.random.default_rng(7)
    length, angle = rng.uniform(0.2, 6.0, count), rng.uniform(0, 2 * np.pi, count)
    vectors = np.stack([length * np.cos(angle), length * np.sin(angle)], axis=1)
    return [np.rint(vector) if number % 2 else vector for number, vector in enumerate(vectors)]


def moving_picture(size: int, seed: int, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A textured picture that moves as a whole: previous frame, current frame, flow."""
    rng = np.random.default_rng(seed)
    picture = texture(size + 48, seed, rng.uniform(1.0, 3.0))
    flow = np.broadcast_to(shift, (size, size, 2))
    return shifted(picture, np.zeros(2), size), shifted(picture, shift, size), flow


def moving_disc(size: int, seed: int, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A textured disc that moves over a textured background that stands still."""
    rng = np.random.default_rng(seed)
    background, inside = (
        texture(size, 2 * seed, rng.uniform(1, 3)),
        texture(size + 48, 2 * seed + 1, rng.uniform(1, 2.5)),
    )
    radius, centre = rng.uniform(8, 16), rng.uniform(24, size - 24, 2)
    y, x = np.mgrid[:size, :size]

    def frame(shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cover = np.clip(radius - np.hypot(x - centre[0] - shift[0], y - centre[1] - shift[1]) + 0.5, 0, 1)[..., None]
        return (shifted(inside, shift, size) * cover + background * (1 - cover)).round().astype(np.uint8), cover > 0.5

    (previous, _), (current, covered) = frame(np.zeros(2)), frame(shift)
    return previous, current, covered * shift


def end_point_errors(estimator, scenes) -> tuple[float, float]:
    """Mean end-point error over all pixels and over those that move, in pixels, averaged over `scenes`."""
    everywhere, moving = [], []
    for previous, current, flow in scenes:
        error = np.linalg.norm(estimator(previous, current) - flow, axis=-1)
        moves = np.linalg.norm(flow, axis=-1) > 0.25
        everywhere.append(error.mean())
        if moves.any():
            moving.append(error[moves].mean())
    return float(np.mean(everywhere)), float(np.mean(moving))


@pytest.fixture
def report(capsys, record_property):
    """Prints one line even when all goes well: these are results, not only checks."""

    def line(scene: str, everywhere: float, moving: float) -> None:
        record_property(scene, (everywhere, moving))
        with capsys.disabled():
            print(f"\nflow error, {scene}: {everywhere:.2f} px, where it moves {moving:.2f} px", end=" ")

    return line


@pytest.mark.parametrize("place", [(0, 0), (0, 83), (83, 0), (83, 83), (40, 2), (40, 40)])
def test_dis_finds_nothing_far_from_what_changed(place):
    still = np.random.default_rng(0).integers(0, 200, (84, 84, 3), np.uint8)
    changed = still.copy()
    changed[place] = 255
    flow = DISFlow()(still, changed)
    y, x = np.indices((84, 84))
    assert not flow[(abs(y - place[0]) > MARGIN) | (abs(x - place[1]) > MARGIN)].any()
    assert not DISFlow()(still, still).any()
    assert np.isfinite(flow).all()


@pytest.mark.parametrize("size", [64, 84])
@pytest.mark.parametrize(("estimator", "moving_bound"), [(DISFlow, 0.5), (FarnebackFlow, 1.0)])
def test_known_shifts_are_recovered(estimator, moving_bound, size, report):
    name = f"{estimator.__name__} at {size} px"
    whole = end_point_errors(estimator(), [moving_picture(size, *case) for case in enumerate(shifts(80))])
    disc = end_point_errors(estimator(), [moving_disc(size, *case) for case in enumerate(shifts(80))])
    report(f"{name}, moving picture", *whole)
    report(f"{name}, moving disc", *disc)
    assert whole[0] < 0.3
    assert disc[0] < 0.3
    assert disc[1] < moving_bound


@pytest.mark.parametrize("estimator", [DISFlow, FarnebackFlow])
def test_estimators_are_deterministic(estimator):
    previous, current, _ = moving_disc(84, 0, np.array([3.0, -2.0]))
    first = estimator()(previous, current)
    reused = estimator()
    reused(current, previous)
    assert np.array_equal(reused(previous, current), first)
    assert not np.array_equal(reused(current, previous), first)


def test_dis_is_still_where_nothing_moves():
    picture = texture(84, 0, 1.5)
    assert np.abs(DISFlow()(picture, picture)).max() < 1e-3


# -- The simulator's flow against analysis

BOX = """
<mujoco>
  <statistic extent="1" center="0 0 0"/>
  <visual><map znear="0.01" zfar="50"/></visual>
  <worldbody>
    <light pos="0 0 5"/>
    <geom name="floor" type="plane" size="0 0 1" pos="0 0 -0.5"/>
    <body name="eye" mocap="true" pos="0 0 3"><camera name="eye" fovy="40"/></body>
    <body name="box" mocap="true"><geom name="box" type="box" size="0.4 0.3 0.2"/></body>
  </worldbody>
</mujoco>
"""


class Scene:
    """A box (geom 1) that faces the camera at a distance of 2.8 m, 3.5 m above the floor (geom 0)."""

    def __init__(self, xml: str = BOX) -> None:
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)
        mujoco.mj_forward(self.model, self.data)
        self.renderer = Renderer(Simulation(lambda: (self.model, self.data)), 64, 80, "eye")
        y, x = np.mgrid[:64, :80]
        self.x, self.y = x - 39.5, y - 31.5  # from the middle of the picture
        self.focal_length = 32 / np.tan(np.deg2rad(20))

    def move(self, body: str, shift=(0, 0, 0), axis=(0, 0, 1), degrees=0.0) -> None:
        number = self.model.body(body).mocapid[0]
        self.data.mocap_pos[number] += shift
        mujoco.mju_axisAngle2Quat(self.data.mocap_quat[number], np.array(axis, float), np.deg2rad(degrees))
        mujoco.mj_forward(self.model, self.data)

    def flow(self, **motion) -> tuple[np.ndarray, np.ndarray]:
        """The flow of a motion, and what is seen at its end: 1 for the box, 0 for the floor, -1 for the sky."""
        before = self.renderer.geometry()
        self.move(**motion)
        flow, seen = flow_between(before, self.renderer.geometry()), self.renderer.segmentation()
        self.renderer.close()
        return flow, seen


def test_flow_of_a_body_that_moves_sideways():
    scene = Scene()
    flow, seen = scene.flow(body="box", shift=(0.11, 0.05, 0))
    pixels_per_metre = scene.focal_length / 2.8
    assert flow[seen == 1] == pytest.approx(np.tile([0.11, -0.05], ((seen == 1).sum(), 1)) * pixels_per_metre, abs=0.02)
    assert np.abs(flow[seen == 0]).max() < 1e-3
    assert (seen == 1).sum() > 200


def test_flow_of_a_body_that_comes_nearer():
    scene = Scene()
    flow, seen = scene.flow(body="box", shift=(0, 0, 0.4))
    growth = 1 - 2.4 / 2.8
    box = seen == 1
    assert flow[box] == pytest.approx(np.stack([scene.x[box], scene.y[box]], axis=1) * growth, abs=0.02)


def test_flow_of_a_body_that_turns():
    scene = Scene()
    flow, seen = scene.flow(body="box", degrees=20.0)
    angle = np.deg2rad(20.0)  # counter-clockwise, seen from above
    box = seen == 1
    x, y = scene.x[box], scene.y[box]
    origin = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=1)
    assert flow[box] == pytest.approx(np.stack([x, y], axis=1) - origin, abs=0.02)


def test_flow_of_a_camera_that_moves():
    """The infinite floor follows the camera in MuJoCo's scene; it must not in the flow."""
    scene = Scene()
    flow, seen = scene.flow(body="eye", shift=(0.2, 0, 0))
    for thing, distance in ((0, 3.5), (1, 2.8)):
        expected = np.tile([-0.2 * scene.focal_length / distance, 0], ((seen == thing).sum(), 1))
        assert flow[seen == thing] == pytest.approx(expected, abs=0.02)


def test_flow_of_the_sky():
    no_floor = BOX.replace('<geom name="floor"', "<geom name=\"far\" contype='0' rgba='1 1 1 0'")
    still, seen = Scene(no_floor).flow(body="eye", shift=(0.2, 0.1, 0))
    sky = seen == -1
    assert sky.sum() > 1000
    assert np.abs(still[sky]).max() < 1e-6  # infinitely far away
    scene = Scene(no_floor)
    flow, seen = scene.flow(body="eye", degrees=10.0)  # about the optical axis: a rotation of the picture
    sky, angle = seen == -1, np.deg2rad(10.0)
    x, y = scene.x[sky], scene.y[sky]
    origin = np.stack([x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)], axis=1)
    assert flow[sky] == pytest.approx(np.stack([x, y], axis=1) - origin, abs=0.02)


# -- Estimator and simulator on scenes that move

SCENES = {  # action repeat, bounds of DIS's mean error in pixels: everywhere, where it moves
    "cartpole-swingup": (4, 0.1, 0.8),
    "reacher-easy": (4, 0.2, 2.0),
    "cheetah-run": (4, 0.3, 0.9),
    "walker-walk": (2, 1.2, 1.8),
    "ball_in_cup-catch": (4, 0.3, 4.5),
    "finger-spin": (2, 0.25, 1.7),
}


def play(env: gym.Env, steps: int = 24):
    """Yields previous frame, current frame and flow; every action is held for four steps, so that things get moving."""
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for step in range(steps):
        if step % 4 == 0:
            action = env.action_space.sample()
        previous = observation["rgb"]
        observation, *_ = env.step(action)
        yield previous, observation["rgb"], observation["flow"]
    env.close()


def dm_control(task: str, action_repeat: int) -> gym.Env:
    env = ActionRepeat(gym.make(f"dm_control/{task}-v0"), action_repeat)
    return OpticalFlowObservation(PixelObservation(env, 84), "simulator")


@pytest.mark.parametrize("task", SCENES)
def test_simulator_flow_explains_the_pictures_and_dis_agrees_with_it(task, report):
    action_repeat, bound_everywhere, bound_moving = SCENES[task]
    scenes = list(play(dm_control(task, action_repeat)))

    unexplained = unmoved = 0.0
    y, x = np.mgrid[:84, :84].astype(np.float32)
    for previous, current, flow in scenes:
        warped = cv2.remap(
            previous, x - flow[..., 0], y - flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        moves = np.linalg.norm(flow, axis=-1) > 0.25
        unexplained += np.abs(warped[moves].astype(float) - current[moves]).sum()
        unmoved += np.abs(previous[moves].astype(float) - current[moves]).sum()
    assert unexplained < 0.65 * unmoved  # the rest came into sight, or is a shadow or mirror image

    everywhere, moving = end_point_errors(lambda *frames: np.clip(DISFlow()(*frames), -8, 8), scenes)
    report(f"DIS on {task}", everywhere, moving)
    assert everywhere < bound_everywhere
    assert moving < bound_moving
    assert moving < 0.85 * end_point_errors(lambda previous, current: np.zeros(2), scenes)[1]


# -- The wrapper


class Pictures(gym.Env):
    """Shows a picture of its step number."""

    observation_space = spaces.Dict(rgb=spaces.Box(0, 255, (42, 60, 3), np.uint8))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 100
        return {"rgb": np.full((42, 60, 3), 100, np.uint8)}, {}

    def step(self, action):
        self.count += 1
        return {"rgb": np.full((42, 60, 3), self.count, np.uint8)}, 0.0, False, False, {}


class Recorder:
    """An estimator that records how it is used."""

    def __init__(self, flow: float = 1.0) -> None:
        self.calls: list = []
        self.flow = flow

    def attach(self, env):
        self.calls.append(type(env).__name__)

    def reset(self):
        self.calls.append("reset")

    def __call__(self, previous_rgb, current_rgb):
        self.calls.append((int(previous_rgb.mean()), int(current_rgb.mean())))
        return np.full((42, 60, 2), self.flow)


def test_estimator_sees_consecutive_frames_of_one_episode():
    estimator = Recorder()
    env = OpticalFlowObservation(Pictures(), estimator)
    for _ in range(2):
        first, _ = env.reset()
        assert not first["flow"].any()
        assert first in env.observation_space
        for _ in range(2):
            observation, *_ = env.step(0)
            assert observation in env.observation_space
            assert np.all(observation["flow"] == 1.0)
    episode = ["reset", (100, 101), (101, 102)]
    assert estimator.calls == ["Pictures", *episode, *episode]


def test_flow_is_clipped_to_a_bound_that_scales_with_each_side():
    env = OpticalFlowObservation(Pictures(), Recorder(flow=1e9))
    env.reset()
    flow = env.step(0)[0]["flow"]
    wide = np.float32(8 * 60 / 84)
    assert env.bound == wide
    assert np.all(flow[..., 0] == wide)
    assert np.all(flow[..., 1] == 4.0)
    assert flow.dtype == np.float32
    highest = np.broadcast_to(np.float32([wide, 4.0]), (42, 60, 2))
    assert env.observation_space["flow"] == spaces.Box(-highest, highest, dtype=np.float32)
    assert decode_flow(encode_flow(flow, env.bound), env.bound) == pytest.approx(flow, abs=env.bound / 254 + 1e-6)
    assert OpticalFlowObservation(Pictures(), bound=2.5).bound == 2.5


def test_a_step_before_the_reset_is_explained():
    with pytest.raises(gym.error.ResetNeeded, match="before reset"):
        OpticalFlowObservation(Pictures()).step(0)


@pytest.mark.parametrize("estimator", ["dis", "farneback", "simulator"])
@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_what_is_wrapped_can_be_copied(estimator, make_copy):
    env = OpticalFlowObservation(PixelObservation(gym.make("HalfCheetah-v5"), 32), estimator)
    env.reset(seed=0)
    copied = make_copy(env)
    action = env.action_space.sample()
    for one in (env, copied):
        one.reset(seed=1)
    seen, again = env.step(action)[0], copied.step(action)[0]
    assert seen["flow"].any()
    assert all(np.array_equal(seen[key], again[key]) for key in seen)
    copied.close()
    assert np.array_equal(env.reset(seed=1)[0]["rgb"].shape, (32, 32, 3))
    env.close()


def test_a_plain_function_is_an_estimator():
    env = OpticalFlowObservation(Pictures(), lambda previous, current: np.zeros((42, 60, 2)))
    env.reset()
    assert env.step(0)[0] in env.observation_space


def test_simulator_flow_forgets_the_last_episode():
    env = dm_control("reacher-easy", 1)
    for _ in range(2):
        env.reset(seed=0)
        first_step = env.step(np.array([0.1, -0.1]))[0]["flow"]
        for _ in range(5):
            env.step(np.array([1.0, 1.0]))
    env.reset(seed=0)
    assert np.array_equal(env.step(np.array([0.1, -0.1]))[0]["flow"], first_step)
    env.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OpticalFlowObservation(Pictures(), "raft"), "unknown flow estimator 'raft'.*'dis'"),
        (lambda: OpticalFlowObservation(Pictures(), "simulator"), "'simulator' needs a MuJoCo"),
        (lambda: OpticalFlowObservation(PixelObservation(Rgb()), "simulator"), "'simulator' needs a MuJoCo"),
        (lambda: OpticalFlowObservation(gym.make("CartPole-v1")), "needs an 'rgb' observation"),
        (lambda: OpticalFlowObservation(Pictures(), bound=0), "bound of the flow must be"),
        (lambda: OpticalFlowObservation(Pictures(), bound=float("nan")), "bound of the flow must be"),
    ],
)
def test_what_is_wrong_is_explained(make, message):
    with pytest.raises(UserError, match=message) as failure:
        make()
    assert "\n" not in str(failure.value)


class Rgb(Pictures):
    observation_space = spaces.Box(0, 255, (42, 60, 3), np.uint8)


# -- Bytes and pictures of flow

BOUNDS = st.floats(0.125, 64.0, width=32)


@given(bound=BOUNDS, unit=npst.arrays(np.float32, (5, 4, 2), elements=st.floats(-1, 1, width=32)))
def test_bytes_keep_flow_to_half_a_step(bound, unit):
    flow = unit * np.float32(bound)
    encoded = encode_flow(flow, bound)
    decoded = decode_flow(encoded, bound)
    assert encoded.dtype == np.uint8
    assert decoded.dtype == np.float32
    assert np.abs(decoded - flow).max() <= bound / 127 / 2 * (1 + 1e-5)
    assert np.array_equal(encode_flow(decoded, bound), encoded)
    assert np.abs(decoded).max() <= bound * (1 + 1e-6)


@given(bound=BOUNDS)
def test_bytes_keep_zero_exactly_and_clip_what_is_too_fast(bound):
    assert encode_flow(np.zeros(3), bound).tolist() == [128] * 3
    assert decode_flow(np.uint8([128]), bound).tolist() == [0.0]
    assert encode_flow(np.array([-2 * bound, -bound, bound, np.inf]), bound).tolist() == [1, 1, 255, 255]
    assert decode_flow(np.uint8([1, 255]), bound) == pytest.approx([-bound, bound])
    assert relative_flow(np.float32([1, 128, 255])).tolist() == [-1.0, 0.0, 1.0]


def test_picture_of_flow():
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    ring = 4.0 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None].astype(np.float32)
    full, half, beyond = (flow_to_rgb(scale * ring, 4.0).astype(int) for scale in (1.0, 0.5, 3.0))
    still = flow_to_rgb(np.zeros((2, 3, 2), np.float32), 4.0)
    assert np.all(still == 255)
    assert len({tuple(colour) for colour in full[0]}) == 8  # each direction has its colour
    assert full[0, 0].tolist() == [255, 0, 0]
    assert np.all(full.min(axis=-1) <= 1)
    assert np.all(np.abs(half.min(axis=-1) - 127) <= 1)  # half as fast, half as saturated
    assert np.array_equal(beyond, full)
