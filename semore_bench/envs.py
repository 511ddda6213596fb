"""From an environment id to wrapped environments, in this process or in workers."""

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import parse_env_id
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.wrappers import FlattenObservation, RescaleAction, StickyAction, TimeLimit, TransformObservation

from semore_bench.memory import keep_freed_memory
from semore_bench.tether import follow
from wrappers import (
    ActionRepeat,
    BrightestOfTwoFrames,
    CaptionObservation,
    DiscreteAction,
    LifeLoss,
    OpticalFlowObservation,
    PixelObservation,
    SeededMetaWorld,
    VectorAction,
)
from wrappers.action_repeat import success_of
from wrappers.backends.annotation import Annotation, Annotator
from wrappers.backends.opengl import preload_triton, without_display
from wrappers.errors import UserError

META_WORLD = "Meta-World/"
ATARI = "ALE/"
ATARI_FRAMES = 108_000
"""frames after which an Atari episode is cut (Machado et al. 2018): half an hour of play"""
REGISTERED_BY = {
    "dm_control/": "shimmy",
    ATARI: "ale_py",
    "MiniGrid-": "minigrid",
    "BabyAI-": "minigrid",
    "MiniWorld-": "miniworld",
}
"""packages that register their ids when they are imported, by how the ids begin; for others, type `module:id`"""
VLM_FRAME_SIZE = 224
"""pixels of the frame that is drawn for a vision-language model, where the environment can"""
CAPTION_INFO = ("frame_step", "annotations", "annotation_ages", "caption")
"""what `CaptionObservation` adds to info"""
STOPPING = {signal.SIGINT, signal.SIGTERM}
"""signals that ask a run to save and end"""
DEFAULT_TIME_LIMIT = 10_000
"""simulator steps after which an environment without a time limit of its own is cut"""


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
    `state`: observe what the environment itself does, flattened, as "state" and nothing else; nothing is rendered.
    `true_things`: observe, as "state" beside the pixels, the numbers of `semore_bench.things.moments` of the
    simulator's own class maps (privileged). `actions`: what the agent gives: vectors in [-1, 1], or numbers from 0;
    `Workers` refuse environments of the other kind. `sticky_actions`: the probability that a simulator step repeats the
    action before instead; None for what the environment itself does (0.25 in ALE's v5). `life_loss`: tell the replay
    where a life was lost.
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
    usual = "async"
    if annotator == "simulator" or hasattr(annotator, "attach"):  # sees the present alone
        usual = "sync"
    elif annotator == "embedded":
        usual = "pipelined"
    if is_vlm(annotator):
        size = VLM_FRAME_SIZE
    if isinstance(annotator, str):
        from wrappers.backends.annotators import make_annotator

        # The embedded models are too small to be worth a GPU, and what is on its way there and back.
        device = "cpu" if annotator == "embedded" else None
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


def is_vlm(annotator: str | Annotator) -> bool:
    """Whether a vision-language model is named that is not the embedded one."""
    return isinstance(annotator, str) and annotator.startswith(("transformers:", "openai:"))


@dataclass(frozen=True)
class _Shape:
    """Stands for an annotator where nothing but the shape of its annotations is asked for."""

    embedding_dim: int
    grid: int
    source: str = "nobody"

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation]:
        raise NotImplementedError("an environment that was made for its spaces alone was stepped")


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
        yield


def _make_registered(env_id: str, settings: dict[str, Any]) -> gym.Env:
    for prefix, package in REGISTERED_BY.items():  # gymnasium.make says what is missing
        if env_id.startswith(prefix) and importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
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


def episode_seed(seed: int, episode: int) -> int:
    """The seed of a training episode, below 2**31: a hash, so that runs with neighbouring seeds share no episode."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0]) % 2**31  # some environments take an int32


class _Replayable(gym.Wrapper):
    """Lets a worker run an interrupted episode again, up to where it was: `options["actions"][index]`.

    Of `info`, what the harness needs leaves the worker: see `_sent`.
    """

    def __init__(self, env: gym.Env, index: int):
        super().__init__(env)
        self._index = index

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, _sent(info)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        options = dict(options or {})
        actions = options.pop("actions", None)
        observation, info = self.env.reset(seed=seed, options=options or None)
        for action in () if actions is None else actions[self._index]:
            observation, _, _, _, info = self.env.step(action)
        sent = _sent(info, is_first=True)
        return observation, {key: value for key, value in sent.items() if key != "annotations" or actions is None}


def _sent(info: dict[str, Any], is_first: bool = False) -> dict[str, Any]:
    """What of `info` crosses to the learner: `env_step`, success, and what `CAPTION_INFO` names.

    The latter at resets and with new annotations alone, since what is sent every step costs time every step. What else
    an environment says may be of any shape and type, which vectorised environments cannot put together.
    """
    is_news = is_first or info.get("annotations")
    names = "env_step", "success_any", "life_lost", *(CAPTION_INFO if is_news else ())
    sent = {name: info[name] for name in names if name in info}
    success = success_of(info)
    return sent if success is None else sent | {"success": success}


@dataclass(frozen=True)
class _Maker:
    env_id: str
    config: EnvConfig
    index: int

    def __call__(self) -> gym.Env:
        config, annotator = self.config, self.config.annotator
        needs_models = isinstance(annotator, str) and annotator not in ("none", "simulator")
        if (learner := multiprocessing.parent_process()) is not None:
            # Signals are the learner's business: it finishes the step, saves, and closes the workers.
            for number in STOPPING:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            follow(learner.pid)
            keep_freed_memory()
            import cv2

            cv2.setNumThreads(1)
            if needs_models or config.true_things:
                import torch  # before Mesa, see `preload_triton`

                if annotator in ("embedded", "none"):
                    torch.set_num_threads(1)
        elif needs_models:  # Gymnasium makes one in the learner's process too, and asks for its spaces alone
            from wrappers.backends.annotators import annotation_shape

            config = replace(
                config, annotator=_Shape(*annotation_shape(annotator, config.clip, config.annotation_grid))
            )
        return _Replayable(make_env(self.env_id, config), self.index)


@dataclass(frozen=True)
class Step:
    """What one environment did: the action, its reward, the frame it led to, and the next episode where one ended.

    `action`: float32 (A,) in [-1, 1], or an int64 number where actions are discrete. `observation` is the last one of
    the episode if `terminated` or `truncated`; then `next_episode` holds the first observation and info of the episode
    that follows, if one was asked for.
    """

    action: np.ndarray | np.int64
    reward: float
    terminated: bool
    truncated: bool
    observation: dict[str, np.ndarray]
    info: dict[str, Any]
    next_episode: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None


class _Envs(AsyncVectorEnv):
    """Gymnasium's own, but a user's mistake that a worker finds, or a full disk, is raised without its traceback
    printed first, and workers are not asked to end: they hear no signal, and have nothing to save."""

    def _check_spaces(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # all are started; what they load may take long
        super()._check_spaces()

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Ends the workers, whatever they are doing."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()

    def _raise_if_errors(self, successes: Sequence[bool]) -> None:
        if all(successes):
            return
        with warnings.catch_warnings(record=True) as said:
            try:
                super()._raise_if_errors(successes)
            except UserError:
                raise
            except Exception as error:
                if error.args and isinstance(error.args[0], OSError):  # Gymnasium's has lost the number
                    raise error.args[0] from None
                print(*(warning.message for warning in said), sep="\n", file=sys.stderr)
                raise


def vector_env(env_id: str, config: EnvConfig, num_envs: int, autoreset_mode: AutoresetMode) -> AsyncVectorEnv:
    """Environments as `make_env` makes them, each in a spawned process; observations are valid until the next step."""
    makers = [_Maker(env_id, config, index) for index in range(num_envs)]
    with _main_module_hidden(), _signals_held():
        return _Envs(makers, context="spawn", shared_memory=True, copy=False, autoreset_mode=autoreset_mode)


ACTION_SPACES = {"continuous": spaces.Box, "discrete": spaces.Discrete}


def random_action(space: spaces.Space, rng: np.random.Generator, count: int) -> np.ndarray:
    """Uniform actions for `count` environments: float32 (N, A) in [-1, 1], or int64 (N,) from 0."""
    if isinstance(space, spaces.Discrete):
        return rng.integers(space.n, size=count)
    return rng.uniform(-1, 1, (count, *space.shape)).astype(np.float32)


def _other_actions(env_id: str, space: spaces.Space, config: EnvConfig) -> UserError:
    kind = type(space).__name__
    if config.actions == "discrete":
        what = "discrete ones; for continuous ones take agents/semore_sac.py, agents/drq_sac.py or another *_sac.py"
    elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        what = "continuous ones; for discrete ones take agents/semore_dqn.py or agents/drq_dqn.py"
    else:
        what = "continuous ones; wrap the environment so that they are a Box or Discrete"
    return UserError(f"{env_id} has {kind} actions and this agent needs {what}")


class Workers:
    """Environments in spawned worker processes: `send` actions, do something else, `receive` what came of them.

    Args:
        env_id: see `make_env`.
        config: see `make_env`.
        num_envs: number of worker processes.

    Raises:
        UserError: as `make_env`, or the environment's actions are of another kind than the agent's.
    """

    def __init__(self, env_id: str, config: EnvConfig, num_envs: int = 1):
        self.env_id, self.num_envs = env_id, num_envs
        if is_vlm(config.annotator) and num_envs > 1 and config.annotator.startswith("transformers:"):
            raise UserError(
                f"{config.annotator} would be loaded by each of {num_envs} environments: serve it (`transformers "
                "serve`, vLLM, ...) and type --annotator openai:<base url>#<model>, or use one environment"
            )
        self._envs = vector_env(env_id, config, num_envs, AutoresetMode.DISABLED)
        self.observation_space: spaces.Dict = self._envs.single_observation_space
        self.action_space: spaces.Space = self._envs.single_action_space
        self._actions: np.ndarray | None = None
        self._dtype = np.int64 if config.actions == "discrete" else np.float32
        if not isinstance(self.action_space, ACTION_SPACES[config.actions]):
            self.close()
            raise _other_actions(env_id, self.action_space, config)

    def reset(
        self, seeds: Sequence[int | None], actions: Sequence[np.ndarray] | None = None
    ) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Starts an episode in every environment whose seed is not None; `actions` are run through at once.

        Returns:
            Observation and info of every environment; those of the others are without meaning.
        """
        mask = np.array([seed is not None for seed in seeds])
        options: dict[str, Any] = {"reset_mask": mask}
        if actions is not None:
            options["actions"] = list(actions)
        observations, infos = self._guarded(self._envs.reset, seed=list(seeds), options=options)
        return [(_row(observations, i), _info(infos, i)) for i in range(self.num_envs)]

    def send(self, actions: np.ndarray) -> None:
        """Starts a step in every environment; actions float32 (N, A) in [-1, 1], or int64 (N,) from 0."""
        self._actions = np.array(actions, self._dtype)
        self._guarded(self._envs.step_async, self._actions)

    def receive(self, next_seeds: Iterator[int] | None = None) -> list[Step]:
        """Waits for the steps; where an episode ended, the next one starts with a seed from `next_seeds`.

        Raises:
            UserError: an environment crashed or gave NaN or infinity.
        """
        observations, rewards, terminated, truncated, infos = self._guarded(self._envs.step_wait)
        if not np.isfinite(rewards).all():
            raise UserError(f"{self.env_id} gave the reward {rewards}: it must be finite; the last checkpoint is kept")
        done = terminated | truncated
        steps = [
            Step(
                self._actions[i],
                float(rewards[i]),
                bool(terminated[i]),
                bool(truncated[i]),
                _row(observations, i, copy=bool(done[i])),
                _info(infos, i),
            )
            for i in range(self.num_envs)
        ]
        if next_seeds is not None and done.any():
            first = self.reset([next(next_seeds) if ended else None for ended in done])
            steps = [
                Step(**{**vars(step), "next_episode": first[i]}) if done[i] else step for i, step in enumerate(steps)
            ]
        return steps

    def statistics(self) -> dict[str, float]:
        """What the environments' annotators count: shares and ages on average, everything else in total."""
        if "relevance" not in self.observation_space.spaces:
            return {}
        rows = self._guarded(self._envs.call, "statistics")
        totals = {name: sum(row[name] for row in rows) for name in rows[0]}
        is_mean = {name: name.endswith("_share") or name.startswith("age_") for name in totals}
        return {name: total / (len(rows) if is_mean[name] else 1) for name, total in totals.items()}

    def _guarded(self, call, *args, **kwargs):
        try:
            return call(*args, **kwargs)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self.close()
            raise UserError(
                f"the worker process of {self.env_id} died ({type(error).__name__}), perhaps for lack of memory or "
                "in the graphics driver; `semore-bench doctor` checks; the same command continues the run"
            ) from None

    def close(self) -> None:
        """Ends the workers."""
        self._envs.close()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _row(observations: dict[str, np.ndarray], index: int, copy: bool = False) -> dict[str, np.ndarray]:
    return {key: value[index].copy() if copy else value[index] for key, value in observations.items()}


def _info(infos: dict[str, Any], index: int) -> dict[str, Any]:
    return {key: value[index] for key, value in infos.items() if f"_{key}" in infos and infos[f"_{key}"][index]}


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Has signals wait, so that processes started meanwhile are not killed by one before they can ignore it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keeps spawned workers from importing the agent's file: it would cost each of them torch's time and memory."""
    main = sys.modules["__main__"]
    hidden = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)
