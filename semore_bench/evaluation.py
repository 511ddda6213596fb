"""The evaluation protocol: own environments, fixed seeds, deterministic policy, no annotator."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig
from semore_bench.eval_settings import Setting
from semore_bench.transitions import Step, frames_back
from semore_bench.workers import Workers
from wrappers.backends.specs import is_embedded
from wrappers.flow import decode_flow

FIRST_SEED = 10_000
"""evaluation episode i is seeded with 10,000 + i, for every agent and every run"""
EVAL_WORKERS = 2
"""evaluation episodes run at a time: fixed, so that results do not depend on the machine's number of cores"""

Policy = Callable[[dict[str, np.ndarray]], np.ndarray]
"""stacked observations of N environments -> actions (N, A) in [-1, 1]"""

Explain = Callable[[dict[str, np.ndarray]], list[tuple[str, np.ndarray]]]
"""stacked observation of one environment -> names of things and where they are seen, float32 (h, w) in 0-1"""


@dataclass
class Episode:
    """Running totals of one episode; `length` in env steps; success is None where the environment reports none."""

    seed: int
    episode_return: float = 0.0
    length: int = 0
    success_any: int | None = None
    success_last: int | None = None

    def add(self, step: Step) -> None:
        """Counts one agent step."""
        self.episode_return += step.reward
        self.length = int(step.info["env_step"])
        if "success_any" in step.info:  # at any simulator step of this one
            self.success_any = max(int(step.info["success_any"]), self.success_any or 0)
            self.success_last = int(step.info.get("success", 0.0) > 0)


class FrameStack:
    """The last k frames of N environments, stacked as the replay does: see `frames_back`.

    Args:
        num_envs: N.
        size: k.
    """

    def __init__(self, num_envs: int, size: int):
        self._size = size
        self._frames: list[list[dict[str, np.ndarray]]] = [[] for _ in range(num_envs)]

    def begin(self, env: int, observation: dict[str, np.ndarray]) -> None:
        """Takes the first frame of an environment's episode."""
        self._frames[env] = [self._kept(observation)]

    def push(self, env: int, observation: dict[str, np.ndarray]) -> None:
        """Appends a frame and forgets what is too old."""
        self._frames[env] = [*self._frames[env], self._kept(observation)][-self._size :]

    def _kept(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = {"rgb": "rgb", "flow": "flow", "state": "features"}
        return {kept: observation[name].copy() for name, kept in names.items() if name in observation}

    def stack(self) -> dict[str, np.ndarray]:
        """As `Replay.latest`: uint8 rgb (N, k, H, W, 3) and flow (N, k-1, H, W, 2), or states as features (N, k, F)."""
        back = [frames_back(self._size, len(frames) - 1) for frames in self._frames]
        stacks = [[frames[-1 - age] for age in ages] for frames, ages in zip(self._frames, back, strict=True)]
        names = [name for name in ("rgb", "features") if name in stacks[0][0]]
        stacked: dict[str, np.ndarray] = {
            name: np.stack([[frame[name] for frame in stack] for stack in stacks]) for name in names
        }
        if "flow" in stacks[0][0] and self._size > 1:
            stacked["flow"] = np.stack([[frame["flow"] for frame in stack[1:]] for stack in stacks])
        return stacked


def evaluate(
    policy: Policy,
    workers: Workers,
    episodes: int,
    frame_stack: int,
    on_step: Callable[[], None] = lambda: None,
    first_seed: int = FIRST_SEED,
) -> list[Episode]:
    """Runs evaluation episodes 0, 1, ... and returns them in this order.

    Args:
        policy: must be deterministic for results that can be repeated.
        workers: environments of their own, without an annotator.
        episodes: number of episodes; they are dealt out to the workers.
        frame_stack: as in training.
        on_step: called after every step; what it raises ends the evaluation.
        first_seed: of episode 0; the others have the seeds that follow.
    """
    stack = FrameStack(workers.num_envs, frame_stack)
    pending = iter(range(first_seed, first_seed + episodes))
    finished: list[Episode] = []
    running: list[Episode | None] = [None] * workers.num_envs

    def begin(envs: list[int]) -> None:
        seeds: list[int | None] = [None] * workers.num_envs
        for env in envs:
            seed = next(pending, None)
            running[env] = None if seed is None else Episode(seed)
            # All workers step together, so one that has nothing left to do idles in an episode that nobody counts.
            seeds[env] = first_seed if seed is None else seed
        first = workers.reset(seeds)
        for env in envs:
            stack.begin(env, first[env][0])

    begin(list(range(workers.num_envs)))
    while any(running):
        workers.send(policy(stack.stack()))
        ended = []
        for env, step in enumerate(workers.receive()):
            stack.push(env, step.observation)
            if episode := running[env]:
                episode.add(step)
                if step.terminated or step.truncated:
                    finished.append(episode)
            if step.terminated or step.truncated:
                ended.append(env)
        if ended:
            begin(ended)
        on_step()
    return sorted(finished, key=lambda episode: episode.seed)


def film(
    policy: Policy,
    env_id: str,
    config: EnvConfig,
    path: Path,
    frame_stack: int,
    on_step: Callable[[], None] = lambda: None,
    explain: Explain | None = None,
    seed: int = FIRST_SEED,
) -> Episode:
    """Films the first evaluation episode: RGB, flow, relevance and caption side by side.

    The annotator, if `config` names one, works for the film alone: the policy sees frames and flow, as in `evaluate`.
    `explain`: what the agent itself makes of its observation, if it can say.
    """
    from semore_bench.videos import VideoWriter, compose_frame  # brings Matplotlib: for films alone

    if config.flow is None:
        config = replace(config, flow="dis")  # to be looked at; the policy's stack leaves it out
        shown = {"rgb", "state"}
    else:
        shown = {"rgb", "flow", "state"}
    # Quick enough for what is said to be about the frame shown.
    if config.annotator == "simulator" or is_embedded(config.annotator):
        config = replace(config, annotate_every=1, caption_mode="sync")
    episode = Episode(seed)
    where = env_id if config.distraction == "none" else f"{env_id}   {config.distraction}"
    with Workers(env_id, config) as workers, VideoWriter(path, fps=15) as video:
        stack = FrameStack(1, frame_stack)
        caption, relevance, known = "", None, -1
        if workers.annotation_shape is not None:
            relevance = np.zeros(2 * workers.annotation_shape[:1], np.float32)
        ((observation, info),) = workers.reset([seed])
        stack.begin(0, {key: observation[key] for key in shown & observation.keys()})
        while True:
            for annotation in info.get("annotations", ()):
                if annotation.frame_step > known:  # they may come in any order
                    caption, relevance, known = annotation.caption, annotation.relevance, annotation.frame_step
            video.add(
                compose_frame(
                    observation["rgb"],
                    flow=decode_flow(observation["flow"], bound=1.0),
                    relevance=relevance,
                    caption=caption,
                    things=None if explain is None else explain(stack.stack()) or None,
                    flow_bound=1.0,
                    footer=f"{where}   env step {episode.length}   return {episode.episode_return:.1f}",
                )
            )
            workers.send(policy(stack.stack()))
            (step,) = workers.receive()
            episode.add(step)
            observation, info = step.observation, step.info
            stack.push(0, {key: observation[key] for key in shown & observation.keys()})
            on_step()
            if step.terminated or step.truncated:
                return episode


class Evaluator:
    """Evaluates a run's agent every now and then, in environments that are kept from one evaluation to the next.

    Args:
        args: the run's arguments.
        config: the training environments'; their annotator works for films alone.
    """

    def __init__(self, args: CommonArgs, config: EnvConfig):
        self.args, self.config = args, config
        self._usual: Workers | None = None

    def run(
        self, agent: Any, at_end: bool, film_to: Path | None, on_step: Callable[[], None]
    ) -> dict[str, list[Episode]]:
        """Runs the evaluation episodes of every setting whose time it is, the usual one first; see `evaluate`.

        Args:
            agent: has `act`.
            at_end: whether this is the run's last evaluation.
            film_to: path without its ending; one episode per setting is filmed, see `film`.
            on_step: called after every step; what it raises ends the evaluation.
        """
        episodes = {}
        for number, setting in enumerate(self.args.eval_settings):
            if setting.when == "always" or at_end:
                episodes[setting.name] = self._episodes(agent, setting, number == 0, on_step)
                if film_to is not None:
                    path = film_to.with_name(f"{film_to.name}{f'-{setting.name}' if number else ''}.mp4")
                    self._film(agent, setting, path, on_step)
        return episodes

    def _episodes(self, agent: Any, setting: Setting, usual: bool, on_step: Callable[[], None]) -> list[Episode]:
        number = setting.episodes or self.args.eval_episodes

        def run(workers: Workers) -> list[Episode]:
            return evaluate(agent_policy(agent), workers, number, self.args.frame_stack, on_step)

        def open_workers() -> Workers:
            config = replace(in_setting(self.config, setting.distraction), annotator="none")
            return Workers(self.args.env_id, config, min(EVAL_WORKERS, number))

        if not usual:  # seldom needed: nothing of it is held in memory until then
            with open_workers() as workers:
                return run(workers)
        self._usual = self._usual or open_workers()
        try:
            return run(self._usual)
        except BaseException:  # they are in the middle of their episodes
            self.close()
            raise

    def _film(self, agent: Any, setting: Setting, path: Path, on_step: Callable[[], None]) -> None:
        args, explain = self.args, getattr(agent, "explain", None)
        config = in_setting(self.config, setting.distraction)
        film(agent_policy(agent), args.env_id, config, path, args.frame_stack, on_step, explain)

    def close(self) -> None:
        """Ends the environments; they are made again when they are needed."""
        if self._usual is not None:
            self._usual.close()
            self._usual = None


def in_setting(config: EnvConfig, distraction: str) -> EnvConfig:
    """The same environment under a distraction, whose looks are those kept for testing."""
    return replace(config, distraction=distraction, visual_split="test")


def agent_policy(agent: Any) -> Policy:
    """An agent without exploration."""
    return lambda observation: agent.act(observation, deterministic=True)
