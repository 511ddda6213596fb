"""Which runs a sweep consists of, what is known of them before they are executed, and what they need on disk."""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from semore_bench import suites
from semore_bench.args import CommonArgs
from semore_bench.executors import Job, read_status
from semore_bench.names import folder_name, printable
from semore_bench.records import UnusableRun, read_config, read_episodes
from semore_bench.rundir import changes
from semore_bench.suites import Agent, Suite, SuiteTask
from wrappers.errors import UserError


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
    setting: str

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

    def final_return(self) -> str:
        """Mean return of the last evaluation in the usual setting if it is finished, else empty."""
        if self.state() != "finished":
            return ""
        try:
            episodes = read_episodes(self.job.run_dir)
        except UnusableRun as reason:
            return f"unknown ({reason})"
        rows = zip(episodes["env_step"], episodes["setting"], episodes["episode_return"], strict=True)
        usual = [(step, value) for step, setting, value in rows if setting == self.setting]
        last = [value for step, value in usual if step == usual[-1][0]]
        return f"{statistics.mean(last):.1f}" if last else "unknown (no evaluation)"


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


def _planned(
    suite: Suite, task: SuiteTask, agent: Agent, seed: int, runs_dir: Path, environment: dict[str, str]
) -> Planned:
    run_dir = runs_dir / suite.name / folder_name(task.env_id) / agent.name / f"seed-{seed}"
    flags = suite.flags(agent, task)
    typed = {"env_id": flags.pop("env_id"), "seed": seed, "run_dir": run_dir} | flags
    args = agent.args(**{**typed, "run_dir": str(run_dir)})
    args.resolve()
    _check_same(run_dir, args, agent.file.stem)
    decisions = -(-args.total_env_steps // args.action_repeat)
    pixels = args.image_size**2 * (3 + 2 * (args.env_config().flow is not None))
    return Planned(
        Job(
            (sys.executable, str(suites.shown(agent.file)), *suites.command_line(typed)),
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
        args.eval_settings[0].name,
    )


def _check_same(run_dir: Path, args: CommonArgs, agent_file: str) -> None:
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
    before, now = config["args"] | {"agent": config["agent_file"]}, args.settings | {"agent": agent_file}
    shared = before.keys() & now.keys()  # flags that are new, or gone, are the agent's to judge
    if changed := changes({name: before[name] for name in shared}, {name: now[name] for name in shared}):
        raise UserError(
            f"{run_dir} holds a run with other settings: {changed}. Delete it, or choose another --runs-dir"
        )


def disk(runs: list[Planned]) -> tuple[int, int]:
    """Bytes that the replays will still need, and bytes free."""
    needed = 0
    for run in runs:
        files = (run.job.run_dir / "replay").glob("*.bin")
        present = sum(file.stat().st_blocks * 512 for file in files)  # they are sparse
        needed += max(0, run.replay_bytes - present) if run.state() != "finished" else 0
    folder = next(path for path in (runs[0].job.run_dir, *runs[0].job.run_dir.parents) if path.exists())
    return needed, psutil.disk_usage(str(folder)).free


def check_disk(runs: list[Planned], runs_dir: Path) -> None:
    needed, free = disk(runs)
    if needed > free:
        raise UserError(
            f"the replays need {needed:,} bytes on disk and {free:,} are free in {runs_dir}; free some, choose another "
            "--runs-dir, or fewer --seeds"
        )
