"""Frames of simulated scenes in many looks, with what the simulator says about them, kept in a folder of shards."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
from tqdm import tqdm

from semore_bench.envs import EnvConfig, make_env
from semore_bench.signals import leave_signals_to_parent, signals_held
from semore_bench.tether import follow
from wrappers.backends.annotation import SceneObject, clean_text
from wrappers.backends.embedded import UNFAMILIAR
from wrappers.backends.mujoco import Renderer
from wrappers.backends.scenes import BACKGROUND, find_scene
from wrappers.backends.simulation import find_simulation
from wrappers.backends.simulator import View
from wrappers.distractions import DIFFICULTIES, DISTRACTIONS
from wrappers.errors import UserError

SIZE = 64  # pixels
MASK_SIZE = 128  # pixels of the masks, which are finer than the frames: a pole is one of their pixels wide
VARIED = ("train", "varied")  # splits with varied looks
SHARD_FRAMES = 500
HELD_OUT_FRAMES = 250  # per domain, once as environments look and once varied
DISTRACTED_FRAMES = 40  # per domain and distraction
EPISODE_FRAMES = 10  # between two changes of look

DOMAINS: dict[str, tuple[str, ...]] = {
    "cartpole": ("dm_control/cartpole-swingup-v0",),
    "reacher": ("dm_control/reacher-easy-v0",),
    "cheetah": ("dm_control/cheetah-run-v0",),
    "walker": ("dm_control/walker-walk-v0",),
    "finger": ("dm_control/finger-turn_easy-v0", "dm_control/finger-spin-v0"),
    "ball_in_cup": ("dm_control/ball_in_cup-catch-v0",),
    "hopper": ("dm_control/hopper-hop-v0",),
    "pendulum": ("dm_control/pendulum-swingup-v0",),
    "point_mass": ("dm_control/point_mass-easy-v0",),
    "acrobot": ("dm_control/acrobot-swingup-v0",),
    "metaworld": (
        "Meta-World/reach-v3",
        "Meta-World/push-v3",
        "Meta-World/drawer-open-v3",
        "Meta-World/button-press-topdown-v3",
    ),
}
# Examples of what is none of the above, and kinds of scenes that are measured but never trained on.
UNFAMILIAR_TASKS = (
    "dm_control/fish-swim-v0",
    "dm_control/swimmer-swimmer6-v0",
    "dm_control/humanoid-stand-v0",
    "dm_control/manipulator-bring_ball-v0",
    "dm_control/quadruped-walk-v0",
)
NEVER_SHOWN_TASKS = (
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "Pendulum-v1",
    "LunarLander-v3",
    "CarRacing-v3",
    "HalfCheetah-v5",
    "Ant-v5",
    "dm_control/dog-run-v0",
)
UNKNOWN = {"unfamiliar": UNFAMILIAR_TASKS, "never shown": NEVER_SHOWN_TASKS}
"""what is no domain: nothing is named there"""

DISTRACTED = tuple(f"{kind}-{difficulty}" for kind in DISTRACTIONS if kind != "all" for difficulty in DIFFICULTIES)
Split = str
"""train, varied, plain, or a distraction"""


@dataclass(frozen=True)
class Shard:
    """Frames of one task that are made together, decided by `seed` and what else is said here.

    The split "train" has varied looks; the held-out ones are "varied", "plain", as the environment looks, and
    distractions (`DISTRACTED`), in the looks that are kept for testing.
    """

    domain: str
    env_id: str
    split: Split
    number: int
    frames: int
    seed: int

    @property
    def name(self) -> str:
        """File name without its ending."""
        task = self.env_id.replace("/", "-")
        return f"{task}-{self.split}-{self.number}-{self.frames}-{self.seed}"


@dataclass(frozen=True)
class Frames:
    """N frames of one task and what they show.

    Attributes:
        domain: key of `DOMAINS` or `UNKNOWN`.
        images: uint8 (N, 64, 64, 3).
        classes: uint8 (N, 128, 128), the class at each place, an index into `class_names`.
        captions: N texts.
        objects: what matters, the first of the classes.
        class_names: of objects and background.
    """

    domain: str
    images: np.ndarray
    classes: np.ndarray
    captions: tuple[str, ...]
    objects: tuple[SceneObject, ...]
    class_names: tuple[str, ...]


def plan(domains: Sequence[str], split: Split, frames: int, seed: int) -> list[Shard]:
    """The shards with `frames` frames per domain, in equal shares of its tasks; fewer of what is unknown, and, under
    distractions, of each domain's first task alone."""
    shards = []
    for domain in domains:
        tasks = UNKNOWN[domain] if domain in UNKNOWN else DOMAINS[domain]
        if split in DISTRACTED:
            tasks = tasks[:1]
        each = max(frames // (10 if domain in UNKNOWN else len(tasks)), 1)
        starts = range(0, each, SHARD_FRAMES)
        for env_id in tasks:
            for number, start in enumerate(starts):
                shards.append(Shard(domain, env_id, split, number, min(SHARD_FRAMES, each - start), seed))
    return shards


def collect(shards: Sequence[Shard], folder: Path, workers: int = 2) -> list[Frames]:
    """Renders the shards that the folder lacks, and returns them all, in order.

    Raises:
        UserError: if a scene cannot be rendered, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} for frames ({error}); name another with --cache") from None
    missing = [shard for shard in shards if not (folder / f"{shard.name}.npz").is_file()]
    if missing:
        with _processes(workers) as pool, tqdm(total=len(missing), desc="frames", unit="shard") as bar:
            with signals_held():  # submitting starts the processes
                jobs = [pool.submit(make_shard, shard, folder) for shard in missing]
            for made in as_completed(jobs):
                made.result()
                bar.update()
    return [load_shard(shard, folder) for shard in shards]


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes to work in, which end at once, with what waits and what is under way, if the block ends by an error."""
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        try:
            yield pool
        except BaseException:  # Ctrl-C as well: a pool with its processes waits for everything that was submitted
            for process in multiprocessing.active_children():
                if process not in others:
                    process.kill()
            raise


def _begin(parent: int) -> None:
    leave_signals_to_parent()
    follow(parent)


def make_shard(shard: Shard, folder: Path) -> None:
    """Renders a shard and writes it, at once and complete."""
    random = np.random.default_rng([shard.seed, *shard.name.encode()])
    distraction = shard.split if shard.split in DISTRACTED else "none"
    env = make_env(shard.env_id, EnvConfig(image_size=SIZE, flow=None, distraction=distraction, visual_split="test"))
    try:
        is_simulated = isinstance(env.get_wrapper_attr("renderer"), Renderer)
        render = _render if is_simulated else _render_unknown
        images, classes, captions, objects, class_names = render(env, shard, random)
    finally:
        env.close()
    texts = {"captions": captions, "objects": [asdict(thing) for thing in objects], "class_names": class_names}
    path = folder / f"{shard.name}.npz"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, images=images, classes=classes, texts=np.array(json.dumps(texts)))
    partial.replace(path)


def load_shard(shard: Shard, folder: Path) -> Frames:
    """Reads what `make_shard` wrote."""
    with np.load(folder / f"{shard.name}.npz", allow_pickle=False) as archive:
        texts = json.loads(archive["texts"].item())
        objects = tuple(SceneObject(**thing) for thing in texts["objects"])
        names = tuple(texts["class_names"])
        return Frames(shard.domain, archive["images"], archive["classes"], tuple(texts["captions"]), objects, names)


def _render(env: gym.Env, shard: Shard, random: np.random.Generator) -> tuple:
    simulation, unseen = find_simulation(env), env
    while unseen.has_wrapper_attr("renderer"):  # what is below PixelObservation moves without a picture of each step
        unseen = unseen.env
    renderer = env.get_wrapper_attr("renderer")
    fine = Renderer(simulation, MASK_SIZE, MASK_SIZE, renderer.camera, renderer.quality)
    images = np.empty((shard.frames, SIZE, SIZE, 3), np.uint8)
    classes = np.empty((shard.frames, MASK_SIZE, MASK_SIZE), np.uint8)
    captions: list[str] = []
    env.action_space.seed(int(random.integers(2**31)))
    while len(captions) < shard.frames:
        env.reset(seed=int(random.integers(2**31)))
        with _varied_look(simulation.model, random, shard.split in VARIED):
            for index in range(EPISODE_FRAMES):
                if len(captions) == shard.frames:
                    break
                # Every other frame shows the state that physics led to, the others one set at random. A mocap body
                # pulls Meta-World's arm, whose joints have no say: it is moved further instead.
                is_pulled = simulation.model.nmocap > 0
                is_set = index % 2 == 1 and not is_pulled
                if not is_set:
                    _move(unseen, random, steps=int(random.integers(1, 12 if is_pulled else 5)))
                with _random_state(simulation.model, simulation.data, random, is_set):
                    scene = find_scene(simulation.model)
                    view = View(simulation, scene, fine.geometry())
                    images[len(captions)] = renderer.rgb()
                    classes[len(captions)] = view.classes
                    captions.append(clean_text(scene.domain.caption(view.parts, motion=False)))
    objects = tuple(SceneObject(part.name, part.relevance) for part in scene.parts)
    if shard.domain not in UNKNOWN:
        return images, classes, captions, objects, scene.class_names
    background = BACKGROUND.index("background")
    unnamed = np.where(classes < len(objects), background, classes - np.uint8(len(objects))).astype(np.uint8)
    return images, unnamed, [UNFAMILIAR] * shard.frames, (), BACKGROUND


def _render_unknown(env: gym.Env, shard: Shard, random: np.random.Generator) -> tuple:
    """What no simulator explains: every pixel is background. Contrast and colours vary."""
    images = np.empty((shard.frames, SIZE, SIZE, 3), np.uint8)
    gain, offset = np.ones(3), np.zeros(3)
    env.action_space.seed(int(random.integers(2**31)))
    for number in range(shard.frames):
        if number % EPISODE_FRAMES == 0:
            observation, _ = env.reset(seed=int(random.integers(2**31)))
            if shard.split in VARIED:
                gain, offset = random.uniform(0.6, 1.4, 3), random.normal(scale=20, size=3)
        images[number] = (gain * (observation["rgb"] - 128.0) + 128 + offset).clip(0, 255)
        action = env.action_space.sample()
        for _ in range(int(random.integers(1, 5))):
            observation, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                observation, _ = env.reset(seed=int(random.integers(2**31)))
    background = np.full((shard.frames, MASK_SIZE, MASK_SIZE), BACKGROUND.index("background"), np.uint8)
    return images, background, [UNFAMILIAR] * shard.frames, (), BACKGROUND


def _move(env: gym.Env, random: np.random.Generator, steps: int) -> None:
    action = env.action_space.sample()
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset(seed=int(random.integers(2**31)))


@contextmanager
def _random_state(
    model: mujoco.MjModel, data: mujoco.MjData, random: np.random.Generator, active: bool
) -> Iterator[None]:
    """Shows joints at random angles and places; afterwards everything is as physics left it."""
    kinds = mujoco.mjtJoint
    before = data.qpos.copy()
    if active:
        for joint in range(model.njnt):
            address, (low, high) = model.jnt_qposadr[joint], model.jnt_range[joint]
            if model.jnt_type[joint] not in (kinds.mjJNT_HINGE, kinds.mjJNT_SLIDE):
                continue
            if model.jnt_limited[joint]:
                data.qpos[address] = random.uniform(low, high)
            elif model.jnt_type[joint] == kinds.mjJNT_HINGE:
                data.qpos[address] = random.uniform(-np.pi, np.pi)
            else:
                data.qpos[address] += random.normal(scale=0.1)
    mujoco.mj_forward(model, data)  # also puts a changed camera in place
    try:
        yield
    finally:
        data.qpos[:] = before
        mujoco.mj_forward(model, data)


_LOOKS = ("mat_rgba", "geom_rgba", "light_diffuse", "light_pos", "cam_pos", "cam_pos0", "cam_poscom0", "cam_fovy")


@contextmanager
def _varied_look(model: mujoco.MjModel, random: np.random.Generator, active: bool) -> Iterator[None]:
    """Changes colours, lights and cameras of a model for a while."""
    before = {name: getattr(model, name).copy() for name in _LOOKS}
    headlight = model.vis.headlight.diffuse.copy()
    if active:
        strength = random.uniform(0, 0.35)
        for colours in (model.mat_rgba, model.geom_rgba):
            shown = colours[:, :3]
            is_default = (colours == 0.5).all(1, keepdims=True) | (colours == (0.5, 0.5, 0.5, 1)).all(1, keepdims=True)
            # A geom of the default colour takes that of its material.
            shown[:] = np.where(is_default, shown, (shown + random.normal(scale=strength, size=shown.shape)).clip(0, 1))
        model.light_diffuse[:] *= random.uniform(0.5, 1.4)
        model.vis.headlight.diffuse[:] = headlight * random.uniform(0.5, 1.4)
        model.light_pos[:] += random.normal(scale=0.3, size=model.light_pos.shape)
        shift = random.normal(scale=0.02, size=model.cam_pos.shape) * np.linalg.norm(model.cam_pos, axis=1)[:, None]
        for places in (model.cam_pos, model.cam_pos0, model.cam_poscom0):
            places[:] += shift
        model.cam_fovy[:] *= random.uniform(0.9, 1.1)
    try:
        yield
    finally:
        for name, value in before.items():
            getattr(model, name)[:] = value
        model.vis.headlight.diffuse[:] = headlight
