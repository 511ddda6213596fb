"""From an environment id to wrapped environments, in this process or in workers."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import parse_env_id
from gymnasium.wrappers import FlattenObservation, RescaleAction, StickyAction, TimeLimit, TransformObservation

from semore_bench.families import ATARI, META_WORLD, register
from wrappers import (
    ActionRepeat,
    BrightestOfTwoFrames,
    CaptionObservation,
    DiscreteAction,
    Distraction,
    LifeLoss,
    OpticalFlowObservation,
    PixelObservation,
    SeededMetaWorld,
    VectorAction,
)
from wrappers.backends.annotation import Annotator
from wrappers.backends.opengl import preload_triton, without_display
from wrappers.backends.specs import is_embedded, is_vlm
from wrappers.distractions import parse_distraction
from wrappers.errors import UserError

VLM_FRAME_SIZE = 224
"""pixels of the frame that is drawn for a vision-language model, where the environment can"""
DEFAULT_TIME_LIMIT = 10_000
"""simulator steps after which an environment without a time limit of its own is cut"""


ATARI_FRAMES = 108_000
"""frames after which an Atari episode is cut (Machado et al. 2018): half an hour of play"""


@dataclass(frozen=True)
class EnvConfig:
    """How an environment is wrapped.

    `image_size` in pixels. `action_repeat` in simulator steps per agent step. `flow`: estimator, or None for no flow.
    `annotator`: who annotates every `annotate_every`-th frame; see `make_annotator`, also for `task_description`,
    `clip`, `annotation_cache`, `background_classes` and, as `grid`, `annotation_grid`. `caption_mode`: see
    `CaptionObservation`; auto is "sync" for the simulator and for annotators that look into the environment,
    "pipelined" for the embedded models and "async" for others. `quality`: MuJoCo rendering, see `PixelObservation`.
    `camera`: camera id or name, None for the environment's usual one. `pixel_source` and `pixel_key`: where pixels come
    from, see `PixelObservation`; None where it finds them itself. `text`: put the caption into the observation.
    `state`: observe what the environment itself does, flattened, as "state" and nothing else; nothing is rendered, and
    so nothing distracts.
    `true_things`: observe, as "state" beside the pixels, the numbers of `semore_bench.things.moments` of the
    simulator's own class maps (privileged). `actions`: what the agent gives: vectors in [-1, 1], or numbers from 0;
    `Workers` refuse environments of the other kind. `sticky_actions`: the probability that a simulator step repeats the
    action before instead; None for what the environment itself does (0.25 in ALE's v5). `life_loss`: tell the replay
    where a life was lost. `distraction`: how the picture is changed, "none" or see `parse_distraction`; `visual_split`:
    whether it is drawn from what training sees or from what is held out for tests; `distraction_folder`: videos and
    pictures of the user's for backgrounds, in place of the project's own; see `Distraction`.
    """

    image_size: int = 84
    action_repeat: int = 4
    flow: Literal["dis", "farneback", "simulator"] | None = "dis"
    annotator: str | Annotator = "none"
    annotate_every: int = 8
    annotation_grid: int | None = None
    task_description: str = ""
    background_classes: tuple[str, ...] | None = None
    clip: str | None = None
    annotation_cache: str | None = None
    caption_mode: Literal["auto", "sync", "pipelined", "async"] = "auto"
    quality: Literal["fast", "reference"] = "fast"
    camera: int | str | None = None
    pixel_source: Literal["observation", "render"] | None = None
    pixel_key: str | None = None
    text: bool = False
    state: bool = False
    true_things: bool = False
    actions: Literal["continuous", "discrete"] = "continuous"
    sticky_actions: float | None = None
    life_loss: bool = False
    distraction: str = "none"
    visual_split: Literal["train", "test"] = "train"
    distraction_folder: str | None = None


def make_env(env_id: str, config: EnvConfig = EnvConfig()) -> gym.Env:
    """Makes an environment with the observations of this project; continuous actions are rescaled to [-1, 1].

    Args:
        env_id: an id that `gymnasium.make` knows, `Meta-World/<task>-v3`, or `module:id`, which imports `module` first.
        config: see `EnvConfig`.

    Raises:
        UserError: the id is unknown (with the nearest ones), a package is missing, or there are no pixels.
    """
    backends = ("", "egl", "osmesa", "glfw", "glx", "wgl", "cgl")
    if (chosen := os.environ.get("MUJOCO_GL", "")).lower() not in backends:
        raise UserError(f"MUJOCO_GL={chosen} names no OpenGL backend; set it to egl or osmesa, or leave it unset")
    with _quietly():
        return _wrap(_make_base(env_id, config), env_id, config)


class _RescaleAction(RescaleAction):
    """Gymnasium's own, made anew where it is copied or pickled: the functions that it holds cannot be."""

    def __reduce__(self) -> tuple[type, tuple[gym.Env, float, float]]:
        return type(self), (self.env, *self._saved_kwargs.values())  # min_action, max_action


def _wrap(env: gym.Env, env_id: str, config: EnvConfig) -> gym.Env:
    if _has_no_time_limit(env):
        env = TimeLimit(env, DEFAULT_TIME_LIMIT)
    if isinstance(env.action_space, spaces.Box):
        env = _RescaleAction(VectorAction(env), -1.0, 1.0)
    elif config.actions == "discrete" and isinstance(env.action_space, spaces.Discrete | spaces.MultiDiscrete):
        env = DiscreteAction(env)
    if config.sticky_actions is not None and not env_id.startswith(ATARI):
        env = StickyAction(env, config.sticky_actions)
    if env_id.startswith(ATARI) and config.action_repeat > 1:
        env = BrightestOfTwoFrames(env)
    env = ActionRepeat(env, config.action_repeat)
    if config.life_loss:  # at any of the steps
        env = LifeLoss(env)
    if config.state:
        return _state_observation(env, env_id)
    if (setting := parse_distraction(config.distraction)) is not None:
        env = Distraction(env, **setting._asdict(), split=config.visual_split, folder=config.distraction_folder)
    env = PixelObservation(
        env,
        size=config.image_size,
        camera=config.camera,
        quality=config.quality,
        source=config.pixel_source or "auto",
        key=config.pixel_key,
    )
    if config.flow is not None:
        env = OpticalFlowObservation(env, estimator=config.flow)
    if config.true_things:
        from semore_bench.things import TrueThings  # brings PyTorch

        return TrueThings(env)
    return env if config.annotator == "none" else _add_captions(env, config)


def _state_observation(env: gym.Env, env_id: str) -> gym.Env:
    pictures = [space for space in _leaves(env.observation_space) if space.dtype == np.uint8 and len(space.shape) > 1]
    if pictures:
        raise UserError(f"{env_id} observes pixels and no state: an agent that learns from states cannot use it")
    env = FlattenObservation(env)
    space = spaces.Dict({"state": spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)})
    return TransformObservation(env, lambda state: {"state": state.astype(np.float32)}, space)


def _leaves(space: spaces.Space) -> list[spaces.Space]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = space.values() if isinstance(space, spaces.Dict) else space.spaces
        return [leaf for part in parts for leaf in _leaves(part)]
    return [space]


def _add_captions(env: gym.Env, config: EnvConfig) -> gym.Env:
    annotator, size = config.annotator, None
    usual: Literal["sync", "pipelined", "async"] = "async"
    if annotator == "simulator" or hasattr(annotator, "attach"):  # sees the present alone
        usual = "sync"
    elif is_embedded(annotator):
        usual = "pipelined"
    if is_vlm(annotator):
        size = VLM_FRAME_SIZE
    if isinstance(annotator, str):
        from wrappers.backends.annotators import make_annotator

        # The embedded models are too small to be worth a GPU, and what is on its way there and back.
        device = "cpu" if is_embedded(annotator) else None
        cache = config.annotation_cache if size else None
        annotator = make_annotator(
            annotator,
            config.task_description,
            config.clip,
            device,
            cache,
            config.annotation_grid,
            config.background_classes,
        )
    return CaptionObservation(
        env,
        annotator=annotator,
        every=config.annotate_every,
        text=config.text,
        mode=usual if config.caption_mode == "auto" else config.caption_mode,
        frame_size=size,
    )


def _make_base(env_id: str, config: EnvConfig) -> gym.Env:
    if env_id.startswith(META_WORLD):
        return _make_meta_world(env_id.removeprefix(META_WORLD))
    return _make_registered(env_id, _atari_settings(config) if env_id.startswith(ATARI) else {})


def _atari_settings(config: EnvConfig) -> dict[str, Any]:
    """Frames are skipped by `ActionRepeat`, as everywhere; so each step of the environment is one frame."""
    sticky = {} if config.sticky_actions is None else {"repeat_action_probability": config.sticky_actions}
    return {"frameskip": 1, "max_episode_steps": ATARI_FRAMES, **sticky}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Makes what needs a display do without, and Shimmy's spaces make NumPy complain of infinite bounds."""
    preload_triton()  # before dm_control loads Mesa: the other way round it crashes
    with warnings.catch_warnings(), without_display():
        warnings.filterwarnings("ignore", "overflow encountered in cast", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*not in the possible render_modes")
        warnings.filterwarnings("ignore", ".*precision lowered by casting")  # the bounds -1 and 1
        yield


def _make_registered(env_id: str, settings: dict[str, Any]) -> gym.Env:
    register(env_id)  # gymnasium.make says what is missing
    if _is_malformed(env_id):
        raise _unknown(env_id)
    try:
        return _make_rendered(env_id, settings)
    except (gym.error.UnregisteredEnv, gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        if isinstance(error, gym.error.UnregisteredEnv):
            raise _unknown(env_id) from None
        raise UserError(f"{env_id} needs a package that is missing: {error}") from None
    except Exception as error:
        if type(error).__name__ != "NoSuchDisplayException":  # of pyglet, which is not ours to import
            raise
        raise UserError(
            f"{env_id} draws with pyglet, which found neither a display nor EGL; on Debian or Ubuntu: "
            "apt install libegl1 libgl1-mesa-dri"
        ) from None


def _is_malformed(env_id: str) -> bool:
    """Whether an id is not `[module:][namespace/]name[-v0]`, for which Gymnasium has no error of its own."""
    module, _, name = env_id.rpartition(":")
    try:
        parse_env_id(name)
    except gym.error.Error:
        return True
    return bool(module) and not all(part.isidentifier() for part in module.split("."))


def _unknown(env_id: str) -> UserError:
    from semore_bench.listing import nearest_ids

    near = ", ".join(nearest_ids(env_id)) or "nothing like it"
    return UserError(f"unknown environment id {env_id!r}; the nearest are {near}; `semore-bench list envs` shows all")


def _make_rendered(env_id: str, settings: dict[str, Any]) -> gym.Env:
    """Makes an environment that renders, if it can: others may still have pixels in their observation."""
    try:
        env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True, **settings)
    except (TypeError, ValueError, AssertionError):
        # of a constructor that knows no render_mode, or not this one; if it is something else, it comes again
        return gym.make(env_id, disable_env_checker=True, **settings)
    if "rgb_array" in env.metadata.get("render_modes", ()):
        return env
    env.close()
    return gym.make(env_id, disable_env_checker=True, **settings)


def _make_meta_world(task: str) -> gym.Env:
    try:
        import metaworld
    except ImportError as error:
        raise UserError(f"Meta-World is not installed ({error}); type: pip install metaworld") from None
    if task not in metaworld.ALL_V3_ENVIRONMENTS:
        from semore_bench.listing import nearest_ids

        near = ", ".join(nearest_ids(META_WORLD + task)) or "nothing like it"
        raise UserError(f"unknown Meta-World task {task!r}; the nearest are {near}; `semore-bench list envs` shows all")
    env = gym.make("Meta-World/MT1", env_name=task, seed=0, render_mode="rgb_array", disable_env_checker=True)
    return SeededMetaWorld(env)


def _has_no_time_limit(env: gym.Env) -> bool:
    if env.spec is not None and env.spec.max_episode_steps is not None:
        return False
    layer = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, TimeLimit):
            return False
        layer = layer.env
    # dm_control and Meta-World count their own time
    own = getattr(layer, "_env", layer)
    return not any(hasattr(own, name) for name in ("_step_limit", "_time_limit", "max_path_length"))
