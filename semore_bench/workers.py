"""Environments in worker processes, so that they render while the learner updates."""

import contextlib
import multiprocessing
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import _async_worker

from semore_bench.envs import EnvConfig, make_env
from semore_bench.memory import keep_freed_memory
from semore_bench.signals import STOPPING, leave_signals_to_parent, signals_held
from semore_bench.tether import follow
from semore_bench.transitions import Step
from wrappers.action_repeat import success_of
from wrappers.backends.annotation import Annotation
from wrappers.backends.specs import is_embedded, is_server, is_vlm, loads_models
from wrappers.errors import UserError
from wrappers.flow import encode_flow

START_METHOD = "spawn"  # a forked process cannot render where its parent has rendered
ANNOTATION_INFO = ("annotations", "annotation_ages")
"""what the learner reads of what `CaptionObservation` adds to info"""
ANNOTATION_OBSERVATIONS = ("caption_embedding", "relevance", "caption_age")
"""what it adds to the observation: the newest annotation again, which stays in the worker"""


def episode_seed(seed: int, episode: int) -> int:
    """The seed of a training episode, below 2**31: a hash, so that runs with neighbouring seeds share no episode."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0]) % 2**31  # some environments take an int32


@dataclass
class _Shape:
    """Stands for an annotator where nothing but the shape of its annotations is asked for."""

    embedding_dim: int
    grid: int
    source: str = "nobody"

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation | None]:
        raise RuntimeError("an environment that was made for its spaces alone was stepped")


class _FlowInBytes(gym.ObservationWrapper):
    """Flow leaves the worker as it is stored: a quarter of the bytes, and the learner has nothing to do with it."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        floats = env.observation_space["flow"]
        self._bound = float(floats.high.max())
        low, high = (encode_flow(limit, self._bound) for limit in (floats.low, floats.high))
        stored = spaces.Box(low, high, dtype=np.uint8)
        self.observation_space = spaces.Dict({**env.observation_space.spaces, "flow": stored})

    def observation(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**observation, "flow": encode_flow(observation["flow"], self._bound)}


class _AnnotationsInInfo(gym.ObservationWrapper):
    """Annotations leave the worker once, in info when they are new, and not with every observation.

    Attributes:
        annotation_shape: patches per side of class maps, and length of embeddings.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        entries = env.observation_space.spaces
        self.annotation_shape = entries["relevance"].shape[0], entries["caption_embedding"].shape[0]
        self.observation_space = spaces.Dict(self.observation(entries))

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in observation.items() if key not in ANNOTATION_OBSERVATIONS}


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
    """What of `info` crosses to the learner: `env_step`, success, a lost life, and annotations.

    The latter at resets and when they are new alone, since what is sent every step costs time every step. What else an
    environment says may be of any shape and type, which vectorised environments cannot put together.
    """
    is_news = is_first or info.get("annotations")
    names = "env_step", "success_any", "life_lost", *(ANNOTATION_INFO if is_news else ())
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
        needs_models = loads_models(annotator)
        if (learner := multiprocessing.parent_process()) is not None:
            leave_signals_to_parent()  # the learner finishes the step, saves, and closes the workers
            follow(learner.pid)
            keep_freed_memory()
            import cv2

            cv2.setNumThreads(1)
            if needs_models or config.true_things:
                import torch  # before Mesa, see `preload_triton`

                if annotator == "none" or is_embedded(annotator):
                    torch.set_num_threads(1)
        elif needs_models and isinstance(
            annotator, str
        ):  # Gymnasium makes one in the learner's process too, and asks for its spaces alone
            from wrappers.backends.annotators import annotation_shape

            shape = _Shape(*annotation_shape(annotator, config.clip, config.annotation_grid))
            config = replace(config, annotator=shape)
        env = make_env(self.env_id, config)
        if "flow" in env.observation_space.spaces:
            env = _FlowInBytes(env)
        if "relevance" in env.observation_space.spaces:
            env = _AnnotationsInInfo(env)
        return _Replayable(env, self.index)


def _worker(index: int, env_fn: Callable[[], gym.Env], pipe: Connection, *others: Any) -> None:
    """Gymnasium's own, but silent when its learner is gone: the pipe closes a moment before the kernel ends it too."""
    try:
        _async_worker(index, env_fn, pipe, *others)
    except OSError:
        hung_up = select.poll()
        hung_up.register(pipe.fileno(), 0)
        if not hung_up.poll(0):  # an environment's own trouble, such as a simulator that cannot be reached
            raise


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
    """Environments as `make_env` makes them, each in a spawned process, with flow as `encode_flow` stores it.

    Observations are valid until the next step.
    """
    makers = [_Maker(env_id, config, index) for index in range(num_envs)]
    with _main_module_hidden(), signals_held():
        return _Envs(
            makers,
            context=START_METHOD,
            shared_memory=True,
            copy=False,
            worker=_worker,
            autoreset_mode=autoreset_mode,
        )


ACTION_SPACES = {"continuous": spaces.Box, "discrete": spaces.Discrete}


def random_action(space: spaces.Space, rng: np.random.Generator, count: int) -> np.ndarray:
    """Uniform actions for `count` environments: float32 (N, A) in [-1, 1], or int64 (N,) from 0."""
    if isinstance(space, spaces.Discrete):
        return rng.integers(space.n, size=count)
    return rng.uniform(-1, 1, (count, *space.shape)).astype(np.float32)


def check_actions(env_id: str, space: spaces.Space, config: EnvConfig) -> None:
    """Raises `UserError` for an action space of another kind than the agent's."""
    if isinstance(space, ACTION_SPACES[config.actions]):
        return
    kind = type(space).__name__
    if config.actions == "discrete":
        what = "discrete ones; for continuous ones take agents/semore_sac.py, agents/drq_sac.py or another *_sac.py"
    elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        what = "continuous ones; for discrete ones take agents/semore_dqn.py or agents/drq_dqn.py"
    else:
        what = "continuous ones; wrap the environment so that they are a Box or Discrete"
    raise UserError(f"{env_id} has {kind} actions and this agent needs {what}")


class Workers:
    """Environments in spawned worker processes: `send` actions, do something else, `receive` what came of them.

    Flow is uint8 (H, W, 2), as `wrappers.flow.encode_flow` stores it: 128 is 0, 1 and 255 are the bound. Annotations
    are in info: `annotations` and `annotation_ages`, see `CaptionObservation`.

    Args:
        env_id: see `make_env`.
        config: see `make_env`.
        num_envs: number of worker processes.

    Attributes:
        annotation_shape: patches per side of annotations' class maps, and length of their embeddings; None without an
            annotator.

    Raises:
        UserError: as `make_env`, or the environment's actions are of another kind than the agent's.
    """

    def __init__(self, env_id: str, config: EnvConfig, num_envs: int = 1):
        self.env_id, self.num_envs = env_id, num_envs
        if is_vlm(config.annotator) and not is_server(config.annotator) and num_envs > 1:
            raise UserError(
                f"{config.annotator} would be loaded by each of {num_envs} environments: serve it (`transformers "
                "serve`, vLLM, ...) and type --annotator openai:<base url>#<model>, or use one environment"
            )
        self._envs = vector_env(env_id, config, num_envs, AutoresetMode.DISABLED)
        self.observation_space: spaces.Dict = self._envs.single_observation_space
        self.action_space: spaces.Space = self._envs.single_action_space
        self._actions: np.ndarray | None = None
        self._dtype = np.int64 if config.actions == "discrete" else np.float32
        try:
            check_actions(env_id, self.action_space, config)
        except UserError:
            self.close()
            raise
        is_annotated = config.annotator != "none"
        self.annotation_shape: tuple[int, int] | None = (
            self._guarded(self._envs.get_attr, "annotation_shape")[0] if is_annotated else None
        )

    def reset(
        self, seeds: Sequence[int | None], actions: Sequence[Sequence[Any] | np.ndarray] | None = None
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
        if self.annotation_shape is None:
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
def _main_module_hidden() -> Iterator[None]:
    """Keeps spawned workers from importing the agent's file: it would cost each of them torch's time and memory."""
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {
        name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__
    }
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)
