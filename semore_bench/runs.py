"""A run and its directory: settings, logs, checkpoints, evaluation, and the exact continuation of what was cut off."""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from semore_bench.args import CommonArgs
from semore_bench.checkpoint import Checkpoints
from semore_bench.envs import EnvConfig
from semore_bench.evaluation import Episode, Evaluator
from semore_bench.logs import LOG_EVERY, RunLogs
from semore_bench.memory import keep_freed_memory
from semore_bench.names import folder_name
from semore_bench.provenance import find_device, run_config, track
from semore_bench.replay import Replay
from semore_bench.rundir import FULL, Damaged, RunDirectory, refuse_changes
from semore_bench.signals import Stopped, StopRequest
from semore_bench.transitions import Step
from semore_bench.workers import Workers, episode_seed, random_action
from wrappers.errors import UserError

CHECKPOINT_SECONDS = 120.0


def one_line_errors(main: Callable[[Any], None]) -> Callable[[Any], None]:
    """Lets `main` answer a user's mistake, or a full disk, with one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(args: Any) -> None:
        try:
            main(args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except OSError as error:
            if error.errno not in FULL:
                raise
            where = f" ({error.filename})" if error.filename else ""
            print(
                f"error: the disk is full{where}: free some space, then the same command continues from the last "
                "checkpoint",
                file=sys.stderr,
            )
        else:
            return
        raise SystemExit(2) from None

    return wrapped


@dataclass(frozen=True)
class Turn:
    """One iteration of the training loop.

    `agent_step`: agent steps taken so far, in all environments. `observation`: the newest stacks of all environments
    (see `Replay.latest`). `random`: whether to act uniformly at random still. `updates`: numbers of the calls of
    `Agent.update` that are due, counted from 0: `--updates-per-step` per agent step, once learning has begun.
    """

    agent_step: int
    observation: dict[str, np.ndarray]
    random: bool
    updates: range


class Run:
    """A training run in its directory; a context manager. The same arguments continue it where it was cut off.

    Args:
        args: the agent's settings; `args.resolve()` is called.
        agent_file: the agent's `__file__`; its stem is the agent's name.

    Raises:
        UserError: a setting is wrong, differs from the run's own, or another process is at work in the directory.
    """

    def __init__(self, args: CommonArgs, agent_file: str):
        keep_freed_memory()
        args.resolve()
        self.args, self.agent_name = args, Path(agent_file).stem
        self.device = find_device(args.device)
        default = Path("runs") / folder_name(args.env_id) / self.agent_name / f"seed-{args.seed}"
        self.directory = Path(args.run_dir) if args.run_dir else default
        self._stop = StopRequest()
        self.workers: Workers | None = None

        self.agent_step = self.env_step = self.episodes = self.updates = 0
        self._evaluated = 0
        self._running: list[Episode] = []
        self._numbers: list[int] = []  # of the running episodes
        self._rng = np.random.default_rng([args.seed, 0])
        self._last: Episode | None = None

    # ---- opening and closing ----

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(RunDirectory(self.directory))
            self._prepare_folder()
            self.workers = stack.enter_context(Workers(self.args.env_id, self._env_config(), self.args.num_envs))
            self._evaluator = Evaluator(self.args, self._env_config())
            stack.callback(self._evaluator.close)
            if "OMP_NUM_THREADS" not in os.environ:
                # The workers need cores of their own: threads that wait for one another at every layer cannot share
                # theirs.
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - self.args.num_envs))
            torch.manual_seed(self.args.seed)
            self._checkpoints = Checkpoints(self.directory / "checkpoint")
            self._checkpointed = 0
            self._saved = time.monotonic()
            self._logs = RunLogs(self.directory, self.args.total_env_steps, stack)
            stack.enter_context(self._stop)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        with self._resources:
            if kind is None:
                self._status("finished")
            elif issubclass(kind, (Stopped, KeyboardInterrupt)):
                self._status("stopped")
            else:
                self._status("failed", error=f"{kind.__name__}: {error}")

    def _prepare_folder(self) -> None:
        """Checks that this run may go on in its folder, or makes it a run's."""
        if self.args.fresh and self._folder.config.exists():
            self._folder.put_aside()
        before = self._folder.read_config()
        if before is None:
            self._folder.write_config(run_config(self.args, self.agent_name, self.device))
            return
        was, now = before["args"] | {"agent": before["agent"]}, self.args.settings | {"agent": self.agent_name}
        refuse_changes(self.directory, was, now)

    def _env_config(self) -> EnvConfig:
        args = self.args
        shared = "pixel_source pixel_key distraction distraction_folder".split()  # what no agent has a say in
        config = dataclasses.replace(args.env_config(), **{name: getattr(args, name) for name in shared})
        # What was annotated once is not asked for again, least of all when the run goes on after a crash.
        return dataclasses.replace(
            config, annotation_cache=config.annotation_cache or str(self.directory / "annotations")
        )

    # ---- the training loop ----

    @property
    def observation_space(self) -> Any:
        """Of one environment, without stacking."""
        return self.workers.observation_space

    @property
    def action_dim(self) -> int:
        """Length of an action vector; where actions are discrete, how many there are."""
        space = self.workers.action_space
        return int(space.n) if self.is_discrete else int(np.prod(space.shape))

    @property
    def is_discrete(self) -> bool:
        """Whether actions are numbers, from 0, and not vectors."""
        return isinstance(self.workers.action_space, spaces.Discrete)

    def make_replay(self, n_step: int = 1, discount: float = 0.99, features: int = 0) -> Replay:
        """The run's replay, in its directory; with room for `features` numbers per frame, see `Replay.describe`."""
        args, guidance = self.args, {}
        if self.workers.annotation_shape is not None:
            grid, embedding_dim = self.workers.annotation_shape
            guidance = {"annotate_every": args.annotate_every, "grid": grid, "embedding_dim": embedding_dim}
        decisions = -(-args.total_env_steps // args.action_repeat) + args.num_envs
        return Replay(
            self.directory / "replay",
            self.observation_space,
            None if self.is_discrete else self.action_dim,
            capacity=min(args.replay_capacity, decisions),
            num_envs=args.num_envs,
            frame_stack=args.frame_stack,
            n_step=n_step,
            discount=discount,
            seed=args.seed,
            features=features,
            # Last frames of episodes come on top; where they are more, because episodes are short, it saves more often.
            slack=-(-args.checkpoint_every // args.num_envs) * 5 // 4 + 8,
            **guidance,
        )

    def steps(self, agent: torch.nn.Module, replay: Replay) -> Iterator[Turn]:
        """Yields a turn per step of the environments until the budget is spent, continuing where the run was cut off.

        In each turn the caller sends actions, updates, receives, and stores what it received. Evaluation, logs and
        checkpoints happen between the turns.
        """
        args = self.args
        self._folder.keep()
        self._restore(agent, replay)
        if self._evaluated == self.env_step >= args.total_env_steps:
            print(f"{self.directory} is finished ({self.env_step} env steps); --fresh starts over")
            return
        if args.track:
            self._resources.callback(track(self.directory, self.agent_name, args))
        self._logs.start(f"{self.agent_name} seed {args.seed}", self.env_step, self._resources)
        while True:
            finished = self.env_step >= args.total_env_steps
            if not self._stop.asked and (
                self.env_step // args.eval_every > self._evaluated // args.eval_every
                or (finished and self._evaluated < self.env_step)
            ):
                self._evaluate(agent)
            if self._checkpoint_due(replay, finished):
                self.checkpoint(agent, replay)
            if self._stop.asked:
                print(f"\nstopped at env step {self.env_step}; the same command continues", file=sys.stderr)
            self._stop.raise_if_asked()
            if finished:
                return
            learning = self.agent_step >= args.random_steps and len(replay) > replay.n_step
            yield Turn(
                agent_step=self.agent_step,
                observation=replay.latest(),
                random=self.agent_step < args.random_steps,
                updates=range(self.updates, self.updates + args.num_envs * args.updates_per_step * learning),
            )
            if self.agent_step // LOG_EVERY > (self.agent_step - args.num_envs) // LOG_EVERY:
                self._log_metrics(replay)
            self._heartbeat()

    def _checkpoint_due(self, replay: Replay, finished: bool) -> bool:
        return self.agent_step > 0 and (
            finished
            or self._stop.asked
            or self._evaluated == self.env_step
            or self.agent_step - self._checkpointed >= self.args.checkpoint_every
            or time.monotonic() - self._saved > CHECKPOINT_SECONDS
            or replay.checkpoint_due
        )

    def random_action(self) -> np.ndarray:
        """Uniform actions, float32 (N, A) in [-1, 1], or int64 (N,) where they are discrete."""
        return random_action(self.workers.action_space, self._rng, self.args.num_envs)

    def send(self, actions: np.ndarray) -> None:
        """Starts a step in every environment; what follows runs beside it."""
        self.workers.send(actions)

    def receive(self) -> list[Step]:
        """Waits for the step of every environment, logs episodes that ended, and starts the next ones."""
        steps = self.workers.receive(self._next_seeds())
        for env, step in enumerate(steps):
            episode = self._running[env]
            self.env_step += int(step.info["env_step"]) - episode.length
            episode.add(step)
        self.agent_step += len(steps)
        for env, step in enumerate(steps):
            if step.next_episode is not None:
                self._end_episode(env)
        self._logs.advance(self.env_step)
        return steps

    def _next_seeds(self) -> Iterator[int]:
        number = self.episodes + len(self._running)
        while True:
            yield episode_seed(self.args.seed, number)
            number += 1

    def _end_episode(self, env: int) -> None:
        episode = self._last = self._running[env]
        self._logs.training_episode(*self._moment, self._numbers[env], episode)
        self._running[env] = Episode(seed=-1)
        self._numbers[env] = self.episodes + len(self._running)
        self.episodes += 1

    # ---- logs ----

    def log(self, metrics: dict[str, torch.Tensor]) -> None:
        """Takes the metrics of one update, as tensors: they are read, averaged and checked later, all at once."""
        self.updates += 1
        self._logs.add_update(metrics)

    @property
    def _moment(self) -> tuple[int, int]:
        return self.env_step, self.agent_step

    @property
    def _last_return(self) -> float | None:
        return self._last.episode_return if self._last else None

    def _log_metrics(self, replay: Replay) -> None:
        guidance = {f"guidance/{name}": value for name, value in self.workers.statistics().items()}
        if replay.annotation_slots:
            guidance["guidance/frames_in_replay"] = replay.annotated_frames
            guidance["guidance/annotations_dropped"] = replay.annotations_dropped
        self._logs.write_metrics(*self._moment, guidance)

    def _heartbeat(self) -> None:
        self._logs.heartbeat(*self._moment, self._last_return)

    def _status(self, state: str, error: str | None = None) -> None:
        self._logs.status(state, *self._moment, self._last_return, error)

    # ---- evaluation ----

    def _evaluate(self, agent: torch.nn.Module) -> None:
        def on_step() -> None:
            self._heartbeat()
            self._stop.raise_if_asked()

        film_to = self.directory / "videos" / f"env-step-{self.env_step:09d}" if self.args.capture_video else None
        try:
            at_end, began = self.env_step >= self.args.total_env_steps, self._logs.wall_seconds
            evaluated = self._evaluator.run(agent, at_end, film_to, on_step)
        except Stopped:  # cut short, and repeated when the run goes on
            return
        self._logs.evaluation(*self._moment, self.episodes, evaluated, began)
        self._evaluated = self.env_step

    # ---- checkpoints ----

    def checkpoint(self, agent: torch.nn.Module, replay: Replay) -> None:
        """Writes everything that the run needs to continue exactly; keeps the one before it too.

        Raises:
            UserError: a loss or a weight is not finite; the last good checkpoint stays.
        """
        if self._logs.pending:  # what is not written would be lost with this process
            self._log_metrics(replay)  # raises: a state that is already lost is never kept
        for name, weight in agent.state_dict().items():
            if torch.is_tensor(weight) and weight.is_floating_point() and not torch.isfinite(weight).all():
                raise UserError(
                    f"the weight {name} became NaN or infinite before agent step {self.agent_step}; the last good "
                    f"checkpoint is kept in {self._checkpoints.folder}; try a smaller learning rate"
                )
        state = {
            "agent": agent.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in agent.optimizers.items()},
            "replay": replay.state_dict(),
            "torch_random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "random": json.dumps(self._rng.bit_generator.state),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "running": [dataclasses.asdict(episode) for episode in self._running],
            "numbers": self._numbers,
            "csv": {name: file.state() for name, file in self._logs.csv.items()},
            "wall_seconds": self._logs.wall_seconds,
        }
        self._checkpoints.write(self.agent_step, state)
        self._folder.forget_former()
        self._checkpointed, self._saved = self.agent_step, time.monotonic()
        self._status("running")

    def _restore(self, agent: torch.nn.Module, replay: Replay) -> None:
        """Takes up the newest good checkpoint, or begins."""
        state = self._find_state(replay)
        for name, file in self._logs.csv.items():
            file.restore(state["csv"][name] if state else None)
        if state is None:
            self._begin(replay)
            return
        try:
            agent.load_state_dict(state["agent"])
            for name, optimizer in agent.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the checkpoint does not fit {self.agent_name} ({str(error).splitlines()[0]}): has its file been "
                "changed? Change it back, or add --fresh to start over"
            ) from error
        torch.set_rng_state(state["torch_random"])
        if state["cuda_random"] and self.device.type == "cuda":
            torch.cuda.set_rng_state_all(state["cuda_random"])
        self._rng.bit_generator.state = json.loads(state["random"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self._running = [Episode(**episode) for episode in state["running"]]
        self._numbers, self._logs.wall_before = state["numbers"], state["wall_seconds"]
        self._checkpointed = self.agent_step
        if self.env_step < self.args.total_env_steps:
            self._return_to_episodes(replay)
            print(f"continuing {self.directory} at env step {self.env_step}", file=sys.stderr)

    def _find_state(self, replay: Replay) -> dict[str, Any] | None:
        """The newest checkpoint that can be read and whose files are as it left them, and `replay` as it was then; None
        if there is none at all."""
        reason = ""
        for state in self._checkpoints.states():
            try:
                for name, file in self._logs.csv.items():
                    file.check(state["csv"][name])
                replay.load_state_dict(state["replay"])
            except Damaged as error:
                reason = f": {error}"
                print(f"warning: {error}; trying the checkpoint before", file=sys.stderr)
                continue
            return state
        if self._checkpoints.files():
            raise UserError(
                f"no checkpoint in {self._checkpoints.folder} can be used{reason}; restore its files from a copy, or "
                "add --fresh to start over"
            )
        return None

    def _begin(self, replay: Replay) -> None:
        num_envs = self.args.num_envs
        self._running = [Episode(seed=-1) for _ in range(num_envs)]
        self._numbers = list(range(num_envs))
        first = self.workers.reset([episode_seed(self.args.seed, number) for number in self._numbers])
        for env, (observation, info) in enumerate(first):
            replay.begin(env, observation, info)

    def _return_to_episodes(self, replay: Replay) -> None:
        """The environments return to where they were by taking the same actions again."""
        seeds = [episode_seed(self.args.seed, number) for number in self._numbers]
        resumed = self.workers.reset(seeds, replay.episode_actions)
        for env, (observation, _) in enumerate(resumed):
            difference = replay.difference(env, observation)
            if difference > 1:
                print(
                    f"warning: {self.args.env_id} took another course from the same seed and actions (frames differ "
                    f"by {difference:.1f} grey levels): the run goes on, but not exactly as it would have",
                    file=sys.stderr,
                )


_COUNTERS = "agent_step env_step episodes updates _evaluated".split()
