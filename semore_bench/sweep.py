"""`semore-bench sweep`: a suite times agents times seeds, executed run by run until all are finished."""

import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from semore_bench import suites
from semore_bench.args import flag
from semore_bench.executors import Job, LocalExecutor, Outcome, RayExecutor, read_status
from semore_bench.names import folder_name, printable
from semore_bench.records import UnusableRun, read_config, read_episodes
from semore_bench.suites import Agent, Suite, Task
from wrappers.errors import UserError

SECONDS_BETWEEN_LINES = 60
"""of progress, where the output is no terminal"""
SECONDS_UNTIL_ASKED_AGAIN = 3
"""whether a run that another process has taken is free"""
PASSED_ON = ("PYTHONPATH", "MUJOCO_GL", "OMP_NUM_THREADS")
"""variables that runs need on other machines, too"""


@dataclass(frozen=True)
class Planned:
    """A run of the sweep: what executes it, and what is known before."""

    job: Job
    env_id: str
    agent: str
    seed: int
    total_env_steps: int
    action_repeat: int
    replay_bytes: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.env_id} {self.agent} seed {self.seed}"

    def state(self) -> str:
        """finished, failed or begun according to its status.json; or new."""
        state = read_status(self.job.run_dir).get("state", "new")
        return state if state in ("new", "finished", "failed") else "begun"

    def env_step(self) -> int:
        """How far it is."""
        return read_status(self.job.run_dir).get("env_step") or 0


def sweep(
    name: tyro.conf.Positional[str | None] = None,
    *,
    suite: str | None = None,
    agents: tuple[str, ...],
    seeds: int = 5,
    workers: int = 1,
    tasks: tuple[str, ...] = (),
    runs_dir: Path = Path("runs"),
    dry_run: bool = False,
    executor: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    cpus_per_run: float = 1,
    gpus_per_run: float = 0,
    memory_per_run: float = 3,
) -> int:
    """Train agents on every task of a suite with several seeds. The same command goes on where it was cut off.

    Finished runs are skipped, crashed ones tried twice more. A run is the agent's own command line, in
    RUNS_DIR/SUITE/ENV/AGENT/seed-N; what it prints is beside it, in seed-N.log. Ctrl-C lets all runs save and end, a
    second one ends them at once.

    Args:
        name: A suite (see `semore-bench list suites`), or a TOML file of yours.
        suite: The same, as a flag.
        agents: Names (see `semore-bench list agents`), or files of yours that end in .py.
        seeds: How many seeds: 1, 2, ...
        workers: Runs at a time on this machine.
        tasks: Only tasks whose environment id contains one of these.
        runs_dir: Where the runs go; with Ray, on storage that all nodes share.
        dry_run: Stop after the plan, and print the commands.
        executor: local: processes of this machine. ray: tasks of a Ray cluster.
        ray_address: Of a running cluster, such as auto or 10.0.0.1:6379; otherwise one is started on this machine.
        cpus_per_run: Ray: CPUs that a run needs.
        gpus_per_run: Ray: GPUs that a run needs, also fractions of one.
        memory_per_run: Ray: memory that a run needs, in gigabytes.
    """
    if (name is None) == (suite is None):
        raise UserError("name one suite, for example: semore-bench sweep smoke --agents semore_sac drq_sac")
    for number, value in (("--seeds", seeds), ("--workers", workers)):
        if value < 1:
            raise UserError(f"{number} must be at least 1, got {value}")
    if not agents:
        raise UserError("--agents needs at least one name; see `semore-bench list agents`")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    chosen = suites.load_suite(name or suite)
    threads = int(cpus_per_run) if executor == "ray" else _cores() // workers - 1  # one core for the environments
    environment = {"OMP_NUM_THREADS": str(max(1, threads))}
    environment |= {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    runs = plan(chosen, agents, seeds, runs_dir, tasks, environment)
    _print_plan(console, chosen, runs, workers if executor == "local" else None)
    if dry_run:
        for run in runs:
            console.print(run.job.typed, markup=False, soft_wrap=True)
        return 0
    runs_dir.mkdir(parents=True, exist_ok=True)  # before anything starts: it may be a file, or read-only
    _check_disk(runs, runs_dir)
    left = [run for run in runs if run.state() != "finished"]
    outcomes, signalled = {}, 0
    if left:
        if executor == "ray":
            where = RayExecutor(ray_address, cpus_per_run, gpus_per_run, int(memory_per_run * 1e9))
        else:
            where = LocalExecutor(workers)
        outcomes, signalled = Watch(console, where, left).until_done()
    _print_summary(console, runs, outcomes)
    if signalled:
        console.print("stopped; the same command goes on")
        return 128 + signalled
    return 0 if all(run.state() == "finished" for run in runs) else 1


def plan(
    suite: Suite,
    agents: Sequence[str],
    seeds: int,
    runs_dir: Path,
    tasks: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> list[Planned]:
    """Every run of a sweep, all agents with the first seed before any with the second.

    Raises:
        UserError: the suite is wrong, an agent or a task unknown, or a run directory holds a run with other settings.
    """
    chosen = suites.check(suite, agents)
    wanted = [task for task in suite.tasks if not tasks or any(word in task.env_id for word in tasks)]
    if not wanted:
        raise UserError(f"--tasks {' '.join(tasks)}: {suite.name} has {', '.join(task.env_id for task in suite.tasks)}")
    folders: dict[str, str] = {}
    for task in wanted:
        if (other := folders.setdefault(folder_name(task.env_id), task.env_id)) != task.env_id:
            raise UserError(f"{suite.file}: {other} and {task.env_id} share the folder {folder_name(other)}; keep one")
    return [
        _planned(suite, task, agent, seed, runs_dir, environment or {})
        for seed in range(1, seeds + 1)
        for task in wanted
        for agent in chosen
    ]


def _planned(suite: Suite, task: Task, agent: Agent, seed: int, runs_dir: Path, environment: dict[str, str]) -> Planned:
    run_dir = runs_dir / suite.name / folder_name(task.env_id) / agent.name / f"seed-{seed}"
    flags = suite.flags(agent, task)
    typed = {"env_id": flags.pop("env_id"), "seed": seed, "run_dir": run_dir} | flags
    args = agent.args(**{**typed, "run_dir": str(run_dir)})
    args.resolve()
    _check_same(run_dir, vars(args), agent.file.stem)
    decisions = -(-args.total_env_steps // args.action_repeat)
    pixels = args.image_size**2 * (3 + 2 * (args.env_config().flow is not None))
    return Planned(
        Job(
            (sys.executable, str(suites.shown(agent.file)), *suites.words(typed)),
            run_dir.resolve(),
            Path.cwd(),
            environment,
        ),
        task.env_id,
        agent.name,
        seed,
        args.total_env_steps,
        args.action_repeat,
        min(decisions, args.replay_capacity) * pixels,
    )


def _check_same(run_dir: Path, args: dict, agent_file: str) -> None:
    """Refuses to count a run of earlier settings, or of another agent file, as one of this sweep.

    A damaged one is left to the agent, which refuses it: its run fails, and the others go on.
    """
    if not (run_dir / "config.json").exists():
        return
    try:
        config = read_config(run_dir)
    except UnusableRun as reason:
        print(f"note: {printable(str(run_dir))}: {reason}", file=sys.stderr)
        return
    before, now = config["args"] | {"agent": config["agent_file"]}, args | {"agent": agent_file}
    changed = [
        f"{flag(name)} was {before[name]} and now is {now[name]}"
        for name in now
        if name in before and before[name] != json.loads(json.dumps(now[name]))
    ]
    if changed:
        raise UserError(
            f"{run_dir} holds a run with other settings: {'; '.join(changed)}. Delete it, or choose another --runs-dir"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# ---- before ----


def _print_plan(console: Console, suite: Suite, runs: list[Planned], workers: int | None) -> None:
    pace = _seconds_per_decision(runs)
    table = Table("task", "agent", "runs", "env steps to go", "time", "replay on disk", title=f"suite {suite.name}")
    for column in table.columns[3:]:
        column.justify = "right"
    known, longest, unknown = 0.0, 0.0, set()
    groups = dict.fromkeys((run.env_id, run.agent) for run in runs)
    for env_id, agent in groups:
        group = [run for run in runs if (run.env_id, run.agent) == (env_id, agent)]
        left = [run for run in group if run.state() != "finished"]
        decisions = [(run.total_env_steps - run.env_step()) / run.action_repeat for run in left]
        seconds = pace.get((env_id, agent), pace.get(agent))
        if seconds:
            known += sum(decisions) * seconds
            longest = max([longest, *(number * seconds for number in decisions)])
        elif left:
            unknown.add(agent)
        states = Counter(run.state() for run in group)
        table.add_row(
            env_id,
            agent,
            ", ".join(f"{states[state]} {state}" for state in ("finished", "begun", "failed", "new") if states[state]),
            f"{sum(_to_go(run) for run in left):,}",
            _duration(sum(decisions) * seconds) if seconds else "unknown" if left else "",
            _size(sum(run.replay_bytes for run in group)),
        )
    console.print(table)
    left = [run for run in runs if run.state() != "finished"]
    needed, free = _disk(runs)
    time_needed = f"about {_duration(known)} of one worker's time" if known else "time"
    if unknown:
        time_needed += f"{', and' if known else ''} unknown for {', '.join(sorted(unknown))} (no finished run yet)"
    elif known and workers:
        time_needed = f"about {_duration(max(longest, known / min(workers, len(left))))} with {workers} workers"
    console.print(
        f"{len(runs)} runs, {len(left)} to do; {sum(_to_go(run) for run in left):,} env steps; "
        f"{time_needed if left else 'no time'}; {_size(needed)} more on disk for replays, {_size(free)} free\n",
        soft_wrap=True,
    )


def _to_go(run: Planned) -> int:
    return max(0, run.total_env_steps - run.env_step())


def _seconds_per_decision(runs: list[Planned]) -> dict[str | tuple[str, str], float]:
    """Measured on finished runs, by (task, agent) and by agent alone."""
    seconds, decisions = Counter(), Counter()
    for run in runs:
        status = read_status(run.job.run_dir)
        if status.get("state") == "finished" and status.get("agent_step") and status.get("wall_seconds"):
            for key in ((run.env_id, run.agent), run.agent):
                seconds[key] += status["wall_seconds"]
                decisions[key] += status["agent_step"]
    return {key: seconds[key] / decisions[key] for key in seconds}


def _disk(runs: list[Planned]) -> tuple[int, int]:
    """Bytes that the replays will still need, and bytes free."""
    needed = 0
    for run in runs:
        files = (run.job.run_dir / "replay").glob("*.bin")
        present = sum(file.stat().st_blocks * 512 for file in files)  # they are sparse
        needed += max(0, run.replay_bytes - present) if run.state() != "finished" else 0
    folder = next(path for path in (runs[0].job.run_dir, *runs[0].job.run_dir.parents) if path.exists())
    return needed, psutil.disk_usage(str(folder)).free


def _check_disk(runs: list[Planned], runs_dir: Path) -> None:
    needed, free = _disk(runs)
    if needed > free:
        raise UserError(
            f"the replays need {needed:,} bytes on disk and {free:,} are free in {runs_dir}; free some, choose another "
            "--runs-dir, or fewer --seeds"
        )


# ---- meanwhile ----


class Watch:
    """Executes runs and shows how they get on; a signal stops them all in good order, a second one at once."""

    def __init__(self, console: Console, executor: LocalExecutor | RayExecutor, runs: list[Planned]):
        self.console, self.executor, self.runs = console, executor, runs
        self.outcomes: dict[Planned, Outcome] = {}
        self.signalled = 0
        self._stopped = False
        self._futures: dict[Future[Outcome], Planned] = {}
        self._taken: dict[Planned, float] = {}  # by other processes, and when to ask again
        self._waited: set[Planned] = set()
        self._began, self._lined = time.time(), time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[Planned, TaskID] = {}

    def until_done(self) -> tuple[dict[Planned, Outcome], int]:
        """Returns what became of every run, and the number of the signal that ended it early, or 0."""
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        handled = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup
        handlers = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            with self._progress:
                total = self._progress.add_task("all runs", total=len(self.runs), state="")
                self._submit(self.runs)
                while self._futures or self._taken:
                    self._step()
                    self._progress.update(total, completed=len(self.outcomes))
        finally:
            self.executor.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.outcomes, self.signalled

    def _on_signal(self, number: int, _: object) -> None:
        if self.signalled:
            os._exit(128 + number)  # the runs are tied to this process and end with it
        self.signalled = number

    def _submit(self, runs: Iterable[Planned]) -> None:
        for run in runs:
            self._futures[self.executor.submit(replace(run.job, waited=run in self._waited))] = run

    def _step(self) -> None:
        if self.signalled and not self._stopped:
            self._stopped = True
            self._say("stopping: the runs are saving; once more ends them at once")
            self.executor.stop()
            self._taken.clear()
        done, _ = wait(self._futures, timeout=0.5, return_when="FIRST_COMPLETED")
        for future in done:
            self._take(self._futures.pop(future), future)
        if not self._futures:
            time.sleep(0.5)
        due = [run for run, moment in self._taken.items() if time.monotonic() > moment]
        for run in due:
            del self._taken[run]
        self._submit(due)
        self._show()

    def _take(self, run: Planned, future: Future[Outcome]) -> None:
        if error := future.exception():
            outcome = Outcome("stopped" if self._stopped else "failed", error=f"{type(error).__name__}: {error}")
        else:
            outcome = future.result()
        if outcome.state == "taken":
            if run not in self._waited:
                self._waited.add(run)
                self._say(f"{run.name}: another process is at work there; waiting for it")
            if not self._stopped:
                self._taken[run] = time.monotonic() + SECONDS_UNTIL_ASKED_AGAIN
            return
        self.outcomes[run] = outcome
        if run in self._bars:
            self._progress.remove_task(self._bars.pop(run))
        if outcome.state == "finished":
            self._say(f"{run.name}: finished, evaluation return {_final_return(run)}")
        elif outcome.state == "failed":
            self._say(f"{run.name}: failed; {outcome.error}")

    def _show(self) -> None:
        """What the runs that are under way have written into their status.json."""
        print_now = not self.console.is_terminal and time.monotonic() - self._lined > SECONDS_BETWEEN_LINES
        for run in self._futures.values():
            status = read_status(run.job.run_dir)
            if status.get("state") != "running" or (status["heartbeat"] or 0) < self._began:
                continue
            state = f"{status['env_step'] or 0:,} of {run.total_env_steps:,} env steps"
            if status["last_return"] is not None:
                state += f", last return {status['last_return']:.0f}"
            if run not in self._bars:
                self._bars[run] = self._progress.add_task(run.name, total=run.total_env_steps, state="")
            self._progress.update(self._bars[run], completed=status["env_step"] or 0, state=state)
            if print_now:
                self._say(f"{run.name}: {state}")
        if print_now:
            self._lined = time.monotonic()
            self._say(f"{len(self.outcomes)} of {len(self.runs)} runs done")

    def _say(self, text: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, soft_wrap=True)


# ---- after ----


def _print_summary(console: Console, runs: list[Planned], outcomes: dict[Planned, Outcome]) -> None:
    table = Table("task", "agent", "seed", "state", "env steps", "evaluation return", "time", "attempts")
    for column in table.columns[4:]:
        column.justify = "right"
    for run in sorted(runs, key=lambda run: (run.env_id, run.agent, run.seed)):
        status = read_status(run.job.run_dir)
        attempts = outcomes[run].attempts if run in outcomes else 0
        table.add_row(
            run.env_id,
            run.agent,
            str(run.seed),
            printable(status.get("state", "not begun")),
            f"{status.get('env_step') or 0:,}",
            _final_return(run),
            _duration(status.get("wall_seconds") or 0),
            str(attempts or ""),
        )
    console.print(table)


def _final_return(run: Planned) -> str:
    """Mean return of the last evaluation of a finished run, else empty."""
    if run.state() != "finished":
        return ""
    try:
        episodes = read_episodes(run.job.run_dir)
    except UnusableRun as reason:
        return f"unknown ({reason})"
    returns = zip(episodes["env_step"], episodes["episode_return"], strict=True)
    last = [value for step, value in returns if step == episodes["env_step"][-1]]
    return f"{statistics.mean(last):.1f}" if last else "unknown (no evaluation)"


def _duration(seconds: float) -> str:
    """`5 s`, `12 min`, `3 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
