"""Distractions: they change what is seen within their ranges, nothing of what happens, and truths about pixels hold."""

import copy
import functools
import pickle
from dataclasses import replace

import cv2
import gymnasium as gym
import numpy as np
import pytest
from mujoco import mjtObj

from agents import drq_sac
from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig, make_env
from semore_bench.evaluation import in_setting
from semore_bench.runs import Run
from tests.toy_env import Toy
from wrappers import ActionRepeat, Distraction, PixelObservation, UserError
from wrappers.backends import backdrops, textures
from wrappers.backends.flow import DISFlow, SimulatorFlow
from wrappers.backends.scenes import Scene, find_scene
from wrappers.backends.simulation import find_simulation
from wrappers.backends.visuals import Drift, Visuals
from wrappers.distractions import DIFFICULTIES, DISTRACTIONS, parse_distraction

CARTPOLE, META_WORLD = "dm_control/cartpole-balance-v0", "Meta-World/button-press-v3"
GYMNASIUM = "HalfCheetah-v5"  # has the smallest textures
SIMULATED = (CARTPOLE, META_WORLD, GYMNASIUM)
STEPS = 2
SMALL = EnvConfig(image_size=48, action_repeat=4, flow=None)


def play(env: gym.Env, seed: int | None = 5, steps: int = STEPS):
    """An episode's first pictures, rewards, ends and infos, and what the environment's own observation would be."""
    random = np.random.default_rng(3)
    low, high = env.action_space.low, env.action_space.high
    observation, info = env.reset(seed=seed)
    frames, rest = [observation["rgb"]], [(info["env_step"],)]
    for _ in range(steps):
        observation, reward, terminated, truncated, info = env.step(random.uniform(low, high).astype(np.float32))
        frames.append(observation["rgb"])
        numbers = {key: float(value) for key, value in info.items() if np.ndim(value) == 0 and np.isreal(value)}
        rest.append((reward, terminated, truncated, numbers, state(env)))
    return np.stack(frames), rest


def state(env: gym.Env) -> bytes:
    data = find_simulation(env).data
    return b"".join(np.asarray(part).tobytes() for part in (data.qpos, data.qvel, data.ctrl, data.time))


def things_of(env: gym.Env) -> tuple[Scene, list[int]]:
    """What there is in the scene of an environment, and the numbers of the geoms that the task is about."""
    scene = find_scene(find_simulation(env).model)
    geoms = [(number, index) for (kind, number), index in scene.shape_class.items() if kind == mjtObj.mjOBJ_GEOM]
    return scene, [number for number, index in geoms if index < len(scene.parts)]


@functools.cache
def seen(env_id: str, spec: str, seed: int = 5, split: str = "train"):
    env = make_env(env_id, replace(SMALL, distraction=spec, visual_split=split))
    with env:
        return play(env, seed)


# -- What happens stays what it is, and what is seen follows from seeds


@pytest.mark.parametrize("env_id", SIMULATED)
def test_nothing_but_pictures_changes(env_id):
    """Rewards, ends, infos and the simulator's state to the last bit; at difficulty 0 the pictures as well."""
    clean, events = seen(env_id, "none")
    unchanged, same_events = seen(env_id, "all-0")
    np.testing.assert_array_equal(unchanged, clean)
    distracted, still_same_events = seen(env_id, "all-hard")
    assert events == same_events == still_same_events
    assert np.abs(distracted.astype(int) - clean).mean() > 20


@pytest.mark.parametrize("env_id", SIMULATED)
def test_looks_follow_from_seed_split_and_episode(env_id):
    def episodes(**settings):
        with pixels_of("all", env_id=env_id, size=32, **settings) as env:
            first, other, again = (env.reset(seed=seed)[0]["rgb"] for seed in (1, 2, 1))
            np.testing.assert_array_equal(first, again)
            assert np.abs(first.astype(int) - other).mean() > 5
            return first

    first = episodes(seed=0)
    assert np.abs(episodes(seed=1).astype(int) - first).mean() > 5
    if env_id == GYMNASIUM:
        np.testing.assert_array_equal(episodes(seed=0), first)
        assert np.abs(episodes(seed=0, split="test").astype(int) - first).mean() > 5


def pixels_of(kind, difficulty="hard", size=48, env_id=GYMNASIUM, action_repeat=4, **settings) -> gym.Env:
    env = make_env(env_id, replace(SMALL, action_repeat=action_repeat)).env  # what is below `PixelObservation`
    return PixelObservation(Distraction(env, kind, difficulty, **settings), size)


def test_episodes_without_a_seed_of_their_own_differ_and_can_be_repeated():
    def pictures():
        with pixels_of("background") as env:
            return [env.reset(seed=seed)[0]["rgb"] for seed in (4, None, None)]

    first, again = pictures(), pictures()
    np.testing.assert_array_equal(first, again)
    assert np.abs(first[1].astype(int) - first[2]).mean() > 5


def looks(visuals: Visuals) -> list:
    drifts = [visuals.drift(name, 4).tolist() for name in ("colour", "camera", "light")]
    return [*drifts, visuals.backdrop(9, 9).tolist()]


@pytest.mark.parametrize("kind", DISTRACTIONS)
def test_difficulties_grow_and_static_ones_stand_still(kind):
    clean = seen(GYMNASIUM, "none")[0].astype(int)
    easy, hard = (np.abs(seen(GYMNASIUM, f"{kind}-{name}")[0] - clean).mean() for name in ("easy", "hard"))
    assert 0.3 < easy < hard
    for dynamic in (False, True):
        visuals = Distraction(Toy(), kind, "hard", dynamic=dynamic).visuals
        before = looks(visuals)
        for _ in range(30):
            visuals.advance()
        assert [one != other for one, other in zip(before, looks(visuals), strict=True)] == 4 * [dynamic]


def test_what_moves_is_seen_to_move():
    with pixels_of("all") as env:
        first = env.reset(seed=0)[0]["rgb"].astype(int)
        for _ in range(30):
            env.get_wrapper_attr("visuals").advance()
        assert np.abs(env.get_wrapper_attr("renderer").rgb() - first).mean() > 5


def test_a_played_back_episode_looks_as_it_did():
    """As a run that was cut off has it: other episodes come in between, then actions are run through again."""
    with pixels_of("all") as env:
        frames, _ = play_from(env, seed=7)
        play_from(env, seed=8)
        again, _ = play_from(env, seed=7)
    np.testing.assert_array_equal(again, frames)


def play_from(env: gym.Env, seed: int, steps: int = 6):
    env.reset(seed=seed)
    env.action_space.seed(seed)
    frames = [env.step(env.action_space.sample())[0]["rgb"] for _ in range(steps)]
    return np.stack(frames), env


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_look_the_same_and_go_on_alone(make_copy):
    env = PixelObservation(Distraction(ActionRepeat(gym.make("HalfCheetah-v5"), 2), "all", "hard"), 32)
    play_from(env, seed=1)
    twin = make_copy(env)
    np.testing.assert_array_equal(play_from(twin, seed=2)[0], play_from(env, seed=2)[0])
    assert twin.get_wrapper_attr("visuals") is not env.get_wrapper_attr("visuals")
    env.close()
    twin.close()


def test_the_spec_makes_it_again():
    base = gym.make("HalfCheetah-v5")
    env = PixelObservation(Distraction(base, "colour", 0.5, seed=3, dynamic=False, split="test"), 32)
    with env, gym.make(env.spec) as again:
        np.testing.assert_array_equal(again.reset(seed=1)[0]["rgb"], env.reset(seed=1)[0]["rgb"])


def test_numbers_that_drift_stay_in_their_range_and_have_no_favourite():
    drift = Drift(np.random.default_rng(0), (2000,))
    values = np.stack([drift.at(time) for time in (0, 60, 1000)])
    assert np.abs(values).max() <= 1.0
    for row in values:
        np.testing.assert_allclose(np.histogram(row, 4, (-1, 1))[0], 500, atol=80)
    assert np.abs(np.diff([drift.at(time) for time in range(300)], axis=0)).max() <= 1 / 37.5


# -- What is said about the pictures stays true


@pytest.mark.parametrize("env_id", SIMULATED)
def test_hard_backgrounds_leave_the_things_alone(env_id):
    """Things are where they were, in the colours they had; floor, walls, tables and sky are behind the backdrop."""
    config = replace(SMALL, image_size=64)
    with make_env(env_id, config) as plain, make_env(env_id, replace(config, distraction="background-hard")) as env:
        clean, covered = (each.reset(seed=2)[0]["rgb"].astype(int) for each in (plain, env))
        scene, things = things_of(env)
        mask, same = (np.isin(each.get_wrapper_attr("renderer").segmentation(), things) for each in (plain, env))
        assert same[mask].all()  # and more of them, where a table was in front
        inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
        if inside.any():
            assert np.abs(clean - covered)[inside].mean() < 6  # their shadows on each other may differ
        ids = env.get_wrapper_attr("renderer").segmentation()
        shown = set(np.unique(ids)) - set(things)
        left = {scene.class_names[scene.shape_class[mjtObj.mjOBJ_GEOM, number]] for number in shown - {-1}}
        assert not left & {"floor", "wall"}
        empty = cv2.erode((ids == -1).astype(np.uint8), np.ones((3, 3))).astype(bool)
        backdrop = env.get_wrapper_attr("visuals").backdrop(64, 64)
        assert (covered == backdrop).all(-1)[empty].mean() > 0.9  # but for what is too thin to have a pixel's middle


def test_easy_backgrounds_cover_the_sky_alone_and_medium_ones_half_of_the_floor():
    clean = seen(GYMNASIUM, "none")[0][0].astype(int)
    easy, medium, hard = (seen(GYMNASIUM, f"background-{name}")[0][0].astype(int) for name in DIFFICULTIES)
    floor = np.s_[-8:]
    np.testing.assert_array_equal(easy[floor], clean[floor])
    assert np.abs(medium - clean)[floor].mean() > 3
    assert np.abs(hard - clean)[:8].mean() > 20
    assert np.abs(easy - clean)[:8].mean() > 20


def test_annotations_are_of_what_is_seen():
    """With camera and background changed, masks are where things are in the picture, and no floor or sky is left."""
    config = replace(SMALL, image_size=64, annotator="simulator", annotate_every=1, annotation_grid=64)
    with make_env(CARTPOLE, replace(config, distraction="all-hard")) as env:
        _, info = env.reset(seed=2)
        (annotation,) = info["annotations"]
        shares = dict(zip(annotation.class_names, annotation.patch_probabilities, strict=True))
        renderer = env.get_wrapper_attr("renderer")
        ids = renderer.segmentation()
        model = find_simulation(env).model
        cart = np.isin(ids, [number for number in range(model.ngeom) if model.geom(number).name == "cart"])
        assert cart.sum() > 5
        assert (shares["cart"][cart] > 0.2).all()
        assert shares["floor"].max() == shares["sky"].max() == 0.0
        assert shares["background"].mean() > 0.5
        pose = renderer.camera_pose()  # masks and poses agree with a pinhole camera
        x, y, depth = pose.matrix @ pose.rotation @ (find_simulation(env).data.geom("cart").xpos - pose.position)
        rows, columns = np.nonzero(cart)
        np.testing.assert_allclose((x / depth, y / depth), (columns.mean(), rows.mean()), atol=1.5)


@pytest.mark.parametrize("env_id", SIMULATED)
def test_cameras_stay_within_their_ranges_and_keep_the_things_in_view(env_id):
    with pixels_of("camera", env_id=env_id, size=32) as env, pixels_of("camera", 0, env_id=env_id, size=32) as clean:
        visuals, renderer = env.get_wrapper_attr("visuals"), env.get_wrapper_attr("renderer")
        plain = clean.get_wrapper_attr("renderer")
        env.reset(seed=0)
        clean.reset(seed=0)
        things = find_simulation(env).data.geom_xpos[things_of(env)[1]]

        def places(pose):
            x, y, depth = pose.matrix @ pose.rotation @ (things - pose.position).T
            return np.where(depth > 0, np.maximum(abs(x / depth - 15.5), abs(y / depth - 15.5)) / 16, np.inf)

        usual = plain.camera_pose()
        visible = places(usual) < 0.95
        assert visible.any()
        poses = []
        for episode in range(40):
            visuals.begin([episode, 0])
            poses.append(renderer.camera_pose())
            assert (places(poses[-1])[visible] < 1.0).all()
        turns = [np.degrees(np.arccos(np.clip(pose.rotation[2] @ usual.rotation[2], -1, 1))) for pose in poses]
        assert 15 < max(turns) < 40  # 27 to a side and up
        assert min(pose.position[2] for pose in poses) > 0


# -- True flow


def flow_errors(env: gym.Env, steps: int = 12) -> dict[str, tuple[float, float]]:
    """Mean end point error inside the things of DIS, and of no flow at all, and how well truth explains pictures."""
    renderer, things = env.get_wrapper_attr("renderer"), things_of(env)[1]
    truth, dis = SimulatorFlow(), DISFlow()
    truth.attach(env)
    random = np.random.default_rng(1)
    previous = env.reset(seed=1)[0]["rgb"]
    truth.reset()
    y, x = np.mgrid[: len(previous), : len(previous)].astype(np.float32)
    totals = np.zeros(4)
    for _ in range(steps):
        current = env.step(random.uniform(-1, 1, env.action_space.shape).astype(np.float32))[0]["rgb"]
        flow = truth(previous, current).astype(np.float32)
        inside = np.isin(renderer.segmentation(), things)
        warped = cv2.remap(previous, x - flow[..., 0], y - flow[..., 1], cv2.INTER_LINEAR)
        totals += (
            np.linalg.norm(dis(previous, current) - flow, axis=-1)[inside].mean(),
            np.linalg.norm(flow, axis=-1)[inside].mean(),
            np.abs(warped.astype(float) - current)[inside].mean(),
            np.abs(previous.astype(float) - current)[inside].mean(),
        )
        previous = current
    return dict(zip(("dis", "none", "explained", "unmoved"), totals / steps, strict=True))


@pytest.mark.parametrize("kind", ["none", "camera", "background", "all"])
def test_true_flow_against_dis_inside_the_things(kind, capsys):
    setting = ("all", 0) if kind == "none" else (kind, "hard")
    with pixels_of(*setting, 84, "dm_control/walker-walk-v0", action_repeat=2) as env:
        errors = flow_errors(env)
    with capsys.disabled():
        print(f"\n  inside the walker, {kind:10}:", *(f"{name} {value:.2f}" for name, value in errors.items()))
    assert errors["explained"] < 0.5 * errors["unmoved"]  # grey levels: truth moves pictures to where they go
    assert errors["dis"] < 0.85 * errors["none"]


def test_a_backdrop_counts_as_standing_still():
    with pixels_of("background") as env:
        env.reset(seed=0)
        truth = SimulatorFlow()
        truth.attach(env)
        truth.reset()
        frame = env.step(env.action_space.sample())[0]["rgb"]
        nothing = env.get_wrapper_attr("renderer").geometry().label == -1
        assert nothing.mean() > 0.5
        assert not truth(frame, frame)[nothing].any()


# -- Where there is no simulation


@pytest.mark.parametrize("kind", ["background", "colour", "all"])
@pytest.mark.parametrize("make", [lambda: gym.make("CartPole-v1", render_mode="rgb_array"), Toy])
def test_pixels_alone_are_overlaid_and_recoloured(kind, make):
    def first(*args, **settings):
        with PixelObservation(Distraction(make(), *args, **settings), 64) as env:
            return env.reset(seed=1)[0]["rgb"].astype(int)

    clean, hard = first(kind, 0), first(kind, "hard")
    with PixelObservation(make(), 64) as env:
        np.testing.assert_array_equal(clean, env.reset(seed=1)[0]["rgb"])
    np.testing.assert_array_equal(first(kind, "hard"), hard)
    assert np.abs(hard - clean).mean() > 10
    assert np.abs(first(kind, "hard", seed=1) - hard).mean() > 2
    assert np.abs(first(kind, "hard", split="test") - hard).mean() > 2


@pytest.mark.parametrize("kind", ["camera", "light"])
def test_what_pixels_cannot_do_is_refused(kind):
    with pytest.raises(UserError, match=f"the distraction {kind} needs a MuJoCo simulation .* CartPole-v1"):
        PixelObservation(Distraction(gym.make("CartPole-v1", render_mode="rgb_array"), kind, "hard"))


# -- Pictures


@pytest.mark.parametrize("split", textures.SPLITS)
def test_textures_have_natural_statistics_and_follow_from_their_seed(split):
    pictures = textures.pictures(24, 64, seed=3, split=split)
    assert pictures.shape == (24, 64, 64, 3)
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(textures.pictures(24, 64, seed=3, split=split), pictures)
    assert len({picture.tobytes() for picture in pictures}) == 24
    grey = pictures.astype(float).mean(-1) - pictures.mean((1, 2, 3))[:, None, None]
    power = (np.abs(np.fft.fft2(grey)) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    band = (frequency > 0.03) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert -3.5 < slope < -1.0  # natural images: about -2
    channels = np.corrcoef(pictures.reshape(-1, 3).T)
    assert channels.min() > 0.3


def test_tests_see_other_families_than_training():
    train, test = map(set, textures.FAMILIES)
    assert len(train) >= 3
    assert len(test) >= 3
    assert not train & test
    one, other = (textures.pictures(8, 32, split=split) for split in textures.SPLITS)
    assert not {picture.tobytes() for picture in one} & {picture.tobytes() for picture in other}


def write_footage(folder, names, colour=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        cv2.imwrite(str(folder / name), np.full((40, 60, 3), (colour + 20 * index) % 256, np.uint8))


def test_the_users_pictures_are_used_and_some_of_them_held_out(tmp_path):
    write_footage(tmp_path, [f"place-{index}.png" for index in range(8)])
    write_footage(tmp_path / "film", [f"{index:05}.jpg" for index in range(4)])
    writer = cv2.VideoWriter(str(tmp_path / "zebra.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for level in (30, 90, 150):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    clips = {split: backdrops.Footage(str(tmp_path), split) for split in textures.SPLITS}
    lengths = {split: sorted(len(clips[split].frames(n, 0)) for n in range(10)) for split in clips}
    assert set(lengths["train"]) | set(lengths["test"]) == {1, 3, 4}
    files = {split: set(clips[split]._clips) for split in clips}
    assert not files["train"] & files["test"]
    assert len(files["train"] | files["test"]) == 10
    with pixels_of("background", "hard", folder=str(tmp_path)) as env:
        assert env.reset(seed=1)[0]["rgb"][0, 0].std() < 1  # grey, as the pictures are


def test_folders_for_training_and_tests_are_taken_as_they_are(tmp_path):
    write_footage(tmp_path / "train", ["a.png", "b.png"], colour=10)
    write_footage(tmp_path / "val", ["c.png"], colour=200)
    assert {int(backdrops.Footage(str(tmp_path), "test").frames(n, 0)[0, 0, 0, 0]) for n in range(3)} == {200}
    assert {int(backdrops.Footage(str(tmp_path), "train").frames(n, 0)[0, 0, 0, 0]) for n in range(4)} == {10, 30}


def test_folders_that_will_not_do_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        backdrops.Footage(str(tmp_path / "nowhere"), "train")
    write_footage(tmp_path, ["one.png"])
    with pytest.raises(UserError, match="at least two, one of them held out"):
        backdrops.Footage(str(tmp_path), "train")
    (tmp_path / "two.png").write_text("no picture")
    with pytest.raises(UserError, match=r"two\.png is no picture"):
        backdrops.Footage(str(tmp_path), "test").frames(0, 0)


# -- Names


def test_names_say_kind_difficulty_and_whether_it_moves():
    assert parse_distraction("none") is None
    assert parse_distraction("background-hard") == ("background", 1.0, True)
    assert parse_distraction("all-0.5-static") == ("all", 0.5, False)


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [("backgroud-hard", "background-hard"), ("colour", "colour-hard"), ("color-easy-static", "colour-easy-static")],
)
def test_misspelt_names_are_answered_with_the_nearest(spec, nearest):
    with pytest.raises(UserError, match=f"unknown distraction '{spec}'.*{nearest}.*expected none or"):
        CommonArgs(distraction=spec).resolve()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "fog"}, "unknown distraction 'fog'"),
        ({"kind": "light", "difficulty": "light"}, "unknown distraction 'light-light'"),
        ({"kind": "light", "difficulty": 1.5}, "unknown distraction 'light-1.5'"),
        ({"kind": "light", "split": "validation"}, "expected 'train' or 'test'"),
        ({"kind": "light", "seed": -1}, "must not be negative"),
    ],
)
def test_what_there_is_not_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Distraction(Toy(), **settings)


def test_the_flags_reach_the_environments_of_training(tmp_path):
    flags = {"distraction": "colour-hard-static", "distraction_folder": str(tmp_path)}
    run = Run(drq_sac.Args(device="cpu", run_dir=str(tmp_path / "run"), **flags), drq_sac.__file__)
    config = run._env_config()
    assert {name: getattr(config, name) for name in flags} == flags
    assert config.visual_split == "train"


def test_evaluation_sees_what_is_held_out():
    assert in_setting(EnvConfig(), "all-hard").visual_split == "test"
