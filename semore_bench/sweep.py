"""`semore-bench sweep`: a suite times agents times seeds, executed run by run until all are finished."""

import os
from collections import Counter
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from semore_bench import suites
from semore_bench.executors import LocalExecutor, Outcome, RayExecutor, read_status
from semore_bench.names import printable
from semore_bench.plan import Planned, check_disk, disk, plan
from semore_bench.suites import Suite
from semore_bench.watch import Watch
from wrappers.errors import UserError

PASSED_ON = ("PYTHONPATH", "MUJOCO_GL", "OMP_NUM_THREADS")
"""variables that runs need on other machines, too"""


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
    check_disk(runs, runs_dir)
    left = [run for run in runs if run.state() != "finished"]
    outcomes: dict[Planned, Outcome] = {}
    signalled = 0
    if left:
        if executor == "ray":
            where: RayExecutor | LocalExecutor = RayExecutor(
                ray_address, cpus_per_run, gpus_per_run, int(memory_per_run * 1e9)
            )
        else:
            where = LocalExecutor(workers)
        outcomes, signalled = Watch(console, where, left).until_done()
    _print_summary(console, runs, outcomes)
    if signalled:
        console.print("stopped; the same command goes on")
        return 128 + signalled
    return 0 if all(run.state() == "finished" for run in runs) else 1


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
    needed, free = disk(runs)
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
    seconds: Counter = Counter()
    decisions: Counter = Counter()
    for run in runs:
        status = read_status(run.job.run_dir)
        if status.get("state") == "finished" and status.get("agent_step") and status.get("wall_seconds"):
            for key in ((run.env_id, run.agent), run.agent):
                seconds[key] += status["wall_seconds"]
                decisions[key] += status["agent_step"]
    return {key: seconds[key] / decisions[key] for key in seconds}


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
            run.final_return(),
            _duration(status.get("wall_seconds") or 0),
            str(attempts or ""),
        )
    console.print(table)


def _duration(seconds: float) -> str:
    """`5 s`, `12 min`, `3 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
