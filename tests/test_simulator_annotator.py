"""The simulator's captions and masks, against what the renderer draws and against states set by hand."""

import copy
from collections.abc import Callable

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from dm_control import suite

from wrappers import PixelObservation
from wrappers.backends.annotation import PRINTABLE, Annotation
from wrappers.backends.scenes import BACKGROUND, DOMAINS, Scene, find_scene
from wrappers.backends.simulation import find_simulation
from wrappers.backends.simulator import (
    _LEANS,
    _POINTS,
    _RELATIONS,
    _SLANTS,
    SimulatorAnnotator,
)
from wrappers.errors import UserError

SIZE = 64


class Stage:
    """An environment whose state is set by hand, with annotations pixel by pixel unless `grid` is given."""

    def __init__(
        self, env_id: str, size: int | tuple[int, int] = SIZE, grid: int = SIZE, motion: bool = True, **options
    ):
        self.env = PixelObservation(gym.make(env_id, **options), size=size)
        self.annotator = SimulatorAnnotator(grid=grid, motion=motion)
        self.annotator.attach(self.env)
        self.env.reset(seed=0)
        simulation = find_simulation(self.env)
        self.model, self.data = simulation.model, simulation.data
        self.rest()

    def rest(self) -> "Stage":
        self.data.qpos[:], self.data.qvel[:] = self.model.qpos0, 0
        return self

    def set(self, speed: bool = False, **joints: float) -> "Stage":
        for name, value in joints.items():
            joint = self.data.joint(name)
            setattr(joint, "qvel" if speed else "qpos", value)
        return self

    def advance(self, seconds: float) -> "Stage":
        """Moves everything along at its present speed."""
        mujoco.mj_integratePos(self.model, self.data.qpos, self.data.qvel, seconds)
        return self

    def annotate(self) -> Annotation:
        mujoco.mj_forward(self.model, self.data)
        [annotation] = self.annotator.annotate([None], [0])
        return annotation

    def caption(self) -> str:
        return self.annotate().caption

    def rgb(self) -> np.ndarray:
        mujoco.mj_forward(self.model, self.data)
        return self.env.renderer.rgb().astype(int)

    def mask(self, name: str) -> np.ndarray:
        return self.shares(name) > 0.5

    def shares(self, name: str) -> np.ndarray:
        annotation = self.annotate()
        return annotation.patch_probabilities[annotation.class_names.index(name)]

    def centre(self, name: str) -> np.ndarray:
        """Image position (right, down) of what is drawn of a part, 0-1."""
        shares = self.shares(name)
        places = (np.argwhere(shares >= 0) * shares.reshape(-1, 1)).sum(0) / shares.sum()
        return (places[::-1] + 0.5) / SIZE


def dmc(task: str, **options) -> Stage:
    return Stage(f"shimmy:dm_control/{task}-v0", **options)


@pytest.fixture(scope="module")
def stage() -> Callable[[str], Stage]:
    made: dict[str, Stage] = {}

    def get(task: str) -> Stage:
        if task not in made:
            made[task] = dmc(task)
        return made[task].rest()

    return get


# ---- masks ----


def test_a_thin_pole_is_not_lost_between_pixels():
    """Its share of the image hardly depends on where it is, which masks of the frame's own size cannot say."""
    stage = dmc("cartpole-balance", size=64, grid=16)
    shares = []
    for place in np.linspace(-0.2, 0.2, 9):
        annotation = stage.set(slider=place).annotate()
        assert annotation.patch_probabilities.shape == (6, 16, 16)
        shares.append(annotation.patch_probabilities[annotation.class_names.index("pole")].mean())
    assert np.ptp(shares) < 0.35 * np.mean(shares)


@pytest.mark.parametrize("grid", [1, 7, 16, 28])
def test_a_grid_of_any_size_averages_the_same_picture(grid):
    fine, coarse = (dmc("walker-walk", size=64, grid=g).annotate() for g in (8 * grid, grid))
    averaged = fine.patch_probabilities.reshape(-1, grid, 8, grid, 8).mean((2, 4))
    np.testing.assert_allclose(averaged, coarse.patch_probabilities, atol=0.15 if grid > 7 else 0.05)


def test_a_copy_belongs_to_no_environment_yet():
    stage = dmc("cartpole-balance", grid=4, motion=False)
    copied = copy.deepcopy(stage.annotator)
    assert (copied.grid, copied.motion) == (4, False)
    copied.attach(stage.env)
    expected = stage.annotate()
    assert copied.annotate([None], [0]) == [expected]


def test_a_grid_without_patches_is_refused():
    with pytest.raises(UserError, match="at least 1 patch per side, got 0"):
        SimulatorAnnotator(grid=0)


@pytest.mark.parametrize(("size", "grid"), [(64, 8), (84, 8), (20, 7), ((30, 44), 8), (5, 8)])
def test_patch_probabilities_equal_a_slow_reference_pixel_by_pixel(size, grid):
    stage = dmc("cartpole-swingup", size=size, grid=grid).set(slider=0.7, hinge_1=2.0)
    annotation = stage.annotate()
    of_geom = {"cart": "cart", "pole_1": "pole", "floor": "floor", "rail1": "background", "rail2": "background"}
    of_geom = {stage.model.geom(name).id: kind for name, kind in of_geom.items()} | {-1: "sky"}
    segmentation = stage.annotator._renderer.segmentation()
    height, width = segmentation.shape
    own = stage.env.renderer
    assert height >= max(2 * own.height, 4 * grid)
    assert width * own.height == height * own.width, "the same picture, finer"
    for index, name in enumerate(annotation.class_names):
        drawn = np.array([[of_geom[geom] == name for geom in row] for row in segmentation], float)
        fine = np.kron(drawn, np.ones((grid, grid)))  # every patch is now a whole number of pixels
        slow = fine.reshape(grid, height, grid, width).mean((1, 3))
        np.testing.assert_allclose(annotation.patch_probabilities[index], slow, atol=1e-5)
    np.testing.assert_allclose(annotation.patch_probabilities.sum(0), 1, atol=1e-5)
    by_name = dict(zip(annotation.class_names, annotation.patch_probabilities, strict=True))
    np.testing.assert_allclose(annotation.relevance, by_name["pole"] + 0.8 * by_name["cart"], atol=1e-5)


@pytest.mark.parametrize(
    ("task", "part", "geoms"),
    [
        ("cartpole-swingup", "pole", ["pole_1"]),
        ("cartpole-swingup", "cart", ["cart"]),
        ("reacher-easy", "target", ["target"]),
        ("reacher-easy", "fingertip", ["finger"]),
        ("ball_in_cup-catch", "ball", ["ball"]),
        ("ball_in_cup-catch", "cup", [f"cup_part_{part}" for part in range(5)]),
        ("finger-spin", "spinner", ["cap1", "cap2", "spinner_decoration"]),
        ("walker-walk", "torso", ["torso"]),
        ("cheetah-run", "front leg", ["fthigh", "fshin", "ffoot"]),
        ("hopper-hop", "foot", ["foot"]),
        ("point_mass-easy", "target", ["target"]),
        ("pendulum-swingup", "pole", ["pole", "mass", "base"]),
    ],
)
def test_masks_lie_where_things_are_drawn(stage, task, part, geoms):
    scene = stage(task)
    mask, before = scene.mask(part), scene.rgb()
    visible = {geom: scene.model.geom(geom).rgba.copy() for geom in geoms}
    try:
        for geom in geoms:
            scene.model.geom(geom).rgba[3] = 0
        changed = np.abs(scene.rgb() - before).max(2) > 12
        assert not scene.mask(part).any()
    finally:
        for geom, rgba in visible.items():
            scene.model.geom(geom).rgba[:] = rgba
    assert mask.sum() >= 3
    assert changed[mask].mean() > 0.85
    outside = changed & ~mask
    assert outside.sum() < 0.06 * SIZE**2, "only edges, shadows and reflections change elsewhere"


# ---- where things are and how they point ----


def test_cart_is_where_it_is_drawn(stage):
    words = {}
    for place in (-1.7, -0.7, 0.0, 0.7, 1.7):
        scene = stage("cartpole-swingup").set(slider=place)
        words[place] = scene.caption().split(";")[0]
        assert (scene.centre("cart")[0] - 0.5) * place >= 0
    assert [*words.values()] == [
        "the cart is at the far left",
        "the cart is left of the centre",
        "the cart is in the centre",
        "the cart is right of the centre",
        "the cart is at the far right",
    ]


@pytest.mark.parametrize("eighth", range(8))
@pytest.mark.parametrize(
    ("task", "joint", "part", "base"),
    [("cartpole-swingup", "hinge_1", "pole", "cart"), ("pendulum-swingup", "hinge", "pole", None)],
)
def test_pole_points_where_it_is_drawn(stage, task, joint, part, base, eighth):
    scene = stage(task).set(**{joint: eighth * np.pi / 4})
    pivot = scene.centre(base) if base else _project(scene, scene.data.body("pole").xpos)
    assert f"pole points {_POINTS[_octant(scene.centre(part) - pivot)]}" in scene.caption()
    if eighth == 0:
        assert "the pole points straight up" in scene.caption()


def _octant(offset: np.ndarray) -> int:
    """Counts clockwise from the right, by comparing with every direction: slow, and none of the code under test."""
    turn = np.arange(8) * np.pi / 4
    return int(np.argmax(np.cos(turn) * offset[0] + np.sin(turn) * offset[1]))


def _project(scene: Stage, point: np.ndarray) -> np.ndarray:
    pose = scene.env.renderer.camera_pose()
    pixel = pose.matrix @ pose.rotation @ (point - pose.position)
    return (pixel[:2] / pixel[2] + 0.5) / SIZE


NINTHS = [
    ("at the top left", "at the top", "at the top right"),
    ("at the left", "in the centre", "at the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
]


def test_reachers_target_and_fingertip(stage):
    scene = stage("reacher-easy")
    place = scene.model.geom("target").pos
    before = place.copy()
    try:
        seen = set()
        for x in (-0.17, 0.0, 0.17):
            for y in (-0.17, 0.0, 0.17):
                place[:2] = x, y
                column, row = (3 * scene.centre("target")).astype(int)
                assert (column, row) == (1 + np.sign(x), 1 - np.sign(y)), "the camera looks from above, y is up"
                assert f"the target is {NINTHS[row][column]};" in scene.caption()
                offset = scene.centre("fingertip") - scene.centre("target")
                assert f"the fingertip is {_RELATIONS[_octant(offset)]} the target" in scene.caption()
                seen.add(scene.caption())
        assert len(seen) == 9
        place[:2] = scene.data.body("finger").xpos[:2]
        assert "the fingertip is at the target" in scene.caption()
        place[:] = 0.1, 0.1, -0.5
        assert "the target is hidden" in scene.caption()
        place[:] = 3, 0, 0
        assert "the target is out of view" in scene.caption()
        assert not scene.mask("target").any()
    finally:
        place[:] = before


@pytest.mark.parametrize(
    ("x", "z", "words"),
    [
        (0.0, 0.0, "below"),
        (0.0, 0.45, "above"),
        (0.2, 0.35, "right of"),
        (-0.2, 0.35, "left of"),
        (0.2, 0.15, "below and right of"),
        (0.0, 0.35, "at"),  # caught
    ],
)
def test_ball_and_cup(stage, x, z, words):
    scene = stage("ball_in_cup-catch").set(ball_x=x, ball_z=z)
    assert f"the ball is {words} the cup;" in scene.caption()
    offset = scene.centre("ball") - scene.centre("cup")
    assert words == "at" or words == _RELATIONS[_octant(offset)]
    column, row = (3 * scene.centre("cup")).astype(int)
    assert f"the cup is {NINTHS[row][column]};" in scene.caption()


@pytest.mark.parametrize(
    ("angle", "walker", "cheetah"),
    [
        (0, "upright", "to the right"),
        (np.pi / 4, "leaning right", "down and to the right"),
        (np.pi / 2, "lying to the right", "straight down"),
        (np.pi, "upside down", "to the left"),
        (-np.pi / 2, "lying to the left", "straight up"),
        (-np.pi / 4, "leaning left", "up and to the right"),
    ],
)
def test_torsos_lean(stage, angle, walker, cheetah):
    # Turning about y, which points away from the camera, brings z (up) to x (right).
    assert f"the walker is {walker};" in stage("walker-walk").set(rooty=angle).caption()
    assert f"the hopper's torso is {walker};" in stage("hopper-hop").set(rooty=angle).caption()
    assert f"the cheetah points {cheetah};" in stage("cheetah-run").set(rooty=angle).caption()


@pytest.mark.parametrize("quarter", range(4))
def test_spinner_points_where_its_tip_is_drawn(stage, quarter):
    scene = stage("finger-turn_easy").set(hinge=quarter * np.pi / 2)
    caption, tip = scene.caption(), scene.data.site("tip").xpos
    direction = _project(scene, tip) - _project(scene, scene.data.body("spinner").xpos)
    assert f"the spinner points {_POINTS[_octant(direction)]};" in caption
    target = _project(scene, scene.data.site("target").xpos) - _project(scene, scene.data.body("spinner").xpos)
    assert f"the target is {_RELATIONS[_octant(target)]} the spinner" in caption


def test_a_spinner_without_a_mark_has_no_tip(stage):
    captions = [stage("finger-spin").set(hinge=turn * np.pi / 2).caption() for turn in range(4)]
    assert captions[0] == captions[2]
    assert captions[1] == captions[3]
    assert "the spinner is vertical" in captions[0]
    assert "the spinner is horizontal" in captions[1]


# ---- how things move ----


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("task", "joint", "speed", "part", "phrase"),
    [
        ("cartpole-swingup", "slider", 1.0, "cart", "the cart is"),
        ("reacher-easy", "shoulder", 4.0, "fingertip", "the fingertip is"),
        ("ball_in_cup-catch", "ball_x", 0.5, "ball", "the ball is"),
        ("ball_in_cup-catch", "ball_z", 0.5, "ball", "the ball is"),
        ("ball_in_cup-catch", "cup_x", 0.5, "cup", "the cup is"),
        ("point_mass-easy", "root_x", 0.3, "ball", "the ball is"),
        ("point_mass-easy", "root_y", 0.3, "ball", "the ball is"),
    ],
)
def test_motion_words_say_where_the_drawing_goes(stage, task, joint, speed, part, phrase, sign):
    elsewhere = {"root_x": 0.1, "root_y": -0.1} if task.startswith("point_mass") else {}  # not under the target
    scene = stage(task).set(**elsewhere).set(speed=True, **{joint: sign * speed})
    caption, things = scene.caption(), {thing.name: thing for thing in scene.annotate().objects}
    before = scene.centre(part)
    right, down = scene.advance(0.15).centre(part) - before
    word = ("right" if right > 0 else "left") if abs(right) > abs(down) else ("down" if down > 0 else "up")
    assert f"{phrase} moving {word}" in caption
    assert things[part].motion == "moving"
    at_rest = stage(task)
    assert f"{phrase} still" in at_rest.caption()
    assert {thing.motion for thing in at_rest.annotate().objects} <= {"still", "unknown"}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("task", "joint", "part"), [("cartpole-swingup", "hinge_1", "pole"), ("acrobot-swingup", "shoulder", "upper arm")]
)
def test_turning_words_say_how_the_drawing_turns(stage, task, joint, part, sign):
    scene = stage(task).set(speed=True, **{joint: sign * 2.0})
    caption, pivot = (
        scene.caption(),
        _project(scene, scene.data.body(part.replace(" ", "_").replace("pole", "pole_1")).xpos),
    )
    before = scene.centre(part) - pivot
    after = scene.advance(0.2).centre(part) - pivot
    clockwise = before[0] * after[1] - before[1] * after[0] > 0  # seen with y down
    assert f"the {part} is turning {'clockwise' if clockwise else 'counterclockwise'}" in caption


@pytest.mark.parametrize(("joint", "words"), [("rootx", ("right", "left")), ("rootz", ("up", "down"))])
@pytest.mark.parametrize("task", ["walker-walk", "cheetah-run", "hopper-hop"])
def test_motion_is_the_worlds_where_the_camera_follows(stage, task, joint, words):
    for sign, word in zip((1, -1), words, strict=True):
        assert f"it is moving {word}" in stage(task).set(speed=True, **{joint: sign * 2.0}).caption()


def test_spinner_spins(stage):
    first = stage("finger-spin").set(speed=True, hinge=5.0).caption()
    second = stage("finger-spin").set(speed=True, hinge=-5.0).caption()
    assert {"clockwise" in caption.split() or "clockwise;" in caption.split() for caption in (first, second)} == {
        True,
        False,
    }
    assert "the spinner is not turning" in stage("finger-spin").caption()


@pytest.mark.parametrize("task", ["cartpole-swingup", "walker-walk", "reacher-easy"])
def test_without_motion_a_caption_follows_from_the_frame(task):
    scene = dmc(task, motion=False)
    still = scene.annotate()
    scene.data.qvel[:] = 3.0
    fast = scene.annotate()
    assert fast == still
    assert not {"moving", "turning", "still"} & set(fast.caption.replace(";", " ").split())
    assert {thing.motion for thing in fast.objects} == {"unknown"}


# ---- every model ----


def check(annotation: Annotation) -> None:
    assert 10 <= len(annotation.caption) <= 200
    assert set(annotation.caption) <= set(PRINTABLE) - set("0123456789_{}")
    assert 1 <= len(annotation.objects) <= 5
    assert annotation.class_names[len(annotation.objects) :] == BACKGROUND
    assert len(set(annotation.class_names)) == len(annotation.class_names)
    np.testing.assert_allclose(annotation.patch_probabilities.sum(0), 1, atol=1e-5)
    assert annotation.relevance.max() > 0, "something that matters is in view"


FIRST_TASKS = dict(reversed(suite.ALL_TASKS))
OTHER_TASKS = [("cartpole", "two_poles"), ("finger", "turn_easy"), ("fish", "swim"), ("manipulator", "insert_peg")]


@pytest.mark.parametrize(("domain", "task"), [*FIRST_TASKS.items(), *OTHER_TASKS])
def test_every_domain_of_the_suite_is_described(domain, task, monkeypatch):
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # NumPy 2.4 dropped what dm_control's quadruped uses
    scene = dmc(f"{domain}-{task}", grid=8)
    check(scene.annotate())
    scene.env.step(scene.env.action_space.sample())
    check(scene.annotate())


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("HalfCheetah-v5", ["the cheetah points to the right"]),
        ("Pusher-v5", ["the goal is", "the object is", "of the goal"]),
        ("Ant-v5", ["the torso is", "the front leg is"]),
        ("InvertedDoublePendulum-v5", ["the cart is in the centre", "the pole is"]),
    ],
)
def test_gymnasiums_own_environments_are_described(env_id, words):
    scene = Stage(env_id, size=48, grid=8)
    check(scene.annotate())
    assert all(word in scene.caption() for word in words)


@pytest.mark.filterwarnings("ignore:.*observation space")  # Meta-World's own
@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("reach-v3", ("goal", "object", "gripper", "arm")),
        ("door-open-v3", ("goal", "door", "gripper", "arm")),
        ("button-press-topdown-wall-v3", ("button", "gripper", "arm")),
        ("peg-insert-side-v3", ("goal", "peg", "box", "gripper", "arm")),
    ],
)
def test_meta_world_is_described(task, names):
    scene = Stage("metaworld:Meta-World/MT1", env_name=task, seed=0, render_mode="rgb_array")
    scene.env.reset(seed=0)
    annotation = scene.annotate()
    check(annotation)
    assert tuple(thing.name for thing in annotation.objects) == names
    assert all(scene.mask(name).sum() >= 3 for name in names if name != "goal")
    if "goal" in names and "goal is hidden" not in annotation.caption:
        assert np.linalg.norm(scene.centre("goal") - _project(scene, scene.data.site("goal").xpos)) < 0.05


class Wordy:
    """A part all of whose words are the longest there are."""

    points, leans, slants = (max(words, key=len) for words in (_POINTS, _LEANS, _SLANTS))
    moves, turns = "moving closer", "turning counterclockwise"
    where, column = "at the bottom right", "right of the centre"

    def __getitem__(self, other: str) -> str:
        return max(_RELATIONS, key=len)


@pytest.mark.parametrize("domain", [domain for domains in DOMAINS.values() for domain in domains])
def test_no_handwritten_caption_can_be_too_long(domain):
    assert len(domain.caption({part.name: Wordy() for part in domain.parts}, motion=True)) <= 200


def scene_of(bodies: str) -> tuple[mujoco.MjModel, Scene]:
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{bodies}</worldbody></mujoco>")
    return model, find_scene(model)


def test_a_model_without_moving_parts_is_described():
    _, scene = scene_of("<geom type='plane' size='1 1 1'/>")
    assert scene.class_names == BACKGROUND
    assert scene.domain.caption({}, motion=True) == "nothing moves here"


def body(name: str, size: float, inside: str = "", alpha: int = 1) -> str:
    geom = f'<geom type="box" size="{size} {size} {size}" rgba="1 1 1 {alpha}"/>'
    return f'<body name="{name}"><joint/>{geom}{inside}</body>'


def test_unknown_models_are_described_by_their_bodies():
    hanging = [
        body("left_arm", 0.5, body("link_3", 0.1)),
        body("right_arm", 0.5),
        body("bolt", 0.01),
        body("ghost", 0.4, alpha=0),
        body("hook", 0.3),
        body("cab", 0.2),
    ]
    model, scene = scene_of(
        '<geom name="ground" type="plane" size="1 1 1"/>'
        '<geom name="backdrop" type="plane" size="1 1 1" zaxis="1 0 0"/>'
        '<body name="shelf"><geom type="box" size="1 1 1"/></body>'
        + body("BigCrane_2", 0.1, "".join(hanging))
        + body("target_ball", 0.05)
    )
    names = [(part.name, part.relevance) for part in scene.parts]
    assert names == [("target ball", 1.0), ("big crane", 0.8), ("arm", 0.5), ("hook", 0.5), ("cab", 0.5)]
    of_geom = [scene.class_names[scene.shape_class[mujoco.mjtObj.mjOBJ_GEOM, geom]] for geom in range(model.ngeom)]
    of_body = {model.body(model.geom_bodyid[geom]).name: of_geom[geom] for geom in range(2, model.ngeom)}
    assert of_geom[:2] == ["floor", "wall"]
    assert of_body["shelf"] == "background"
    assert of_body["left_arm"] == of_body["right_arm"] == of_body["link_3"] == "arm"
    assert of_body["bolt"] == of_body["ghost"] == "big crane", "what is left out belongs to what it hangs on"
    assert "the big crane is {big crane[target ball]} the target ball" in scene.domain.look


# ---- what it refuses ----


def test_an_environment_without_mujoco_is_refused():
    env = PixelObservation(gym.make("CartPole-v1", render_mode="rgb_array"), size=32)
    with pytest.raises(UserError, match="not simulated by MuJoCo.*use a VLM annotator"):
        SimulatorAnnotator().attach(env)


def test_a_picture_that_is_not_drawn_by_our_renderer_is_refused():
    env = gym.make("InvertedPendulum-v5", render_mode="rgb_array")
    for wrapped in (env, PixelObservation(env, size=32, renderer="native")):
        with pytest.raises(UserError, match="needs the camera of a PixelObservation"):
            SimulatorAnnotator().attach(wrapped)


def test_frames_of_the_past_are_refused(stage):
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    with pytest.raises(ValueError, match="present frame alone, got 2 frames"):
        stage("cartpole-swingup").annotator.annotate([frame, frame], [0, 1])


def test_the_given_text_encoder_is_used_once_per_text():
    class Counting:
        dim = 4
        texts: list[str] = []  # noqa: RUF012

        def encode(self, texts):
            self.texts += texts
            return np.eye(4, dtype=np.float32)[[len(text) % 4 for text in texts]]

    env = PixelObservation(gym.make("InvertedPendulum-v5"), size=32)
    annotator = SimulatorAnnotator(text_encoder=Counting())
    annotator.attach(env)
    env.reset(seed=0)
    first, second = (annotator.annotate([None], [step])[0] for step in range(2))
    assert annotator.embedding_dim == 4
    assert sorted(Counting.texts) == sorted({first.caption, *first.class_names})
    np.testing.assert_array_equal(second.caption_embedding, np.eye(4)[len(second.caption) % 4])
