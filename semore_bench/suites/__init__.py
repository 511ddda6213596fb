"""Suites: tasks, budgets and settings in TOML, checked against the agents' own flags before anything runs."""

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from semore_bench import listing
from semore_bench.args import CommonArgs, flag
from semore_bench.eval_settings import Setting, read_table
from semore_bench.families import Task
from semore_bench.names import did_you_mean
from semore_bench.reading import Absent, Finite, Positive, Unreadable, check_fields, described, fits, read_toml, spelt
from wrappers.errors import UserError

TOP = {
    "name": str,
    "description": str | None,
    "settings": dict | None,
    "agents": dict | None,
    "tasks": list[dict],
    "evaluations": list[dict] | None,
}
TASK = {"env_id": str, "total_env_steps": Positive, "bounds": tuple[Finite, Finite] | None, "agents": dict | None}
"""what a suite and a task of it may hold, besides flags"""
SWEEP_FLAGS = {"seed": "--seeds", "run_dir": "--runs-dir", "fresh": "another --runs-dir"}
"""flags that a suite must not set, and what says it instead"""


@dataclass(frozen=True)
class Agent:
    """An agent as a suite names it: its file, the dataclass of its flags, and all else that the file defines."""

    name: str
    file: Path
    args: type[CommonArgs]
    module: ModuleType


@dataclass(frozen=True)
class SuiteTask:
    """A task with the flags that all agents share there, and those of single agents."""

    scored: Task
    flags: Mapping[str, Any]
    agents: Mapping[str, Mapping[str, Any]]

    @property
    def env_id(self) -> str:
        """The environment's id."""
        return self.scored.env_id


@dataclass(frozen=True)
class Suite:
    """A suite as its file says it.

    `settings`: flags of all agents. `agents`: flags of single ones; `agent` among them names the file that is meant,
    so that a suite may hold an agent twice, with other flags. The more special wins: settings, agent, task, agent on
    that task. `evaluations`: the settings in which all are evaluated, which become the flag of that name.
    """

    file: Path
    name: str
    settings: Mapping[str, Any]
    agents: Mapping[str, Mapping[str, Any]]
    tasks: tuple[SuiteTask, ...]
    evaluations: tuple[Setting, ...] = ()

    def agent(self, name: str) -> Agent:
        """The agent of that name in this suite or in `agents/`, or in a file of the user's.

        Raises:
            UserError: there is none, or it is no agent.
        """
        if name.endswith(".py"):
            return load_agent(Path(name).stem, Path(name))
        target = self.agents.get(name, {}).get("agent", name)
        if target.endswith(".py"):
            return load_agent(name, self.file.parent / target)
        known = listing.agent_files()
        if target not in known:
            names = sorted({*known, *self.agents} - {target})
            raise UserError(f"there is no agent {target!r}{did_you_mean(target, names, 'A file of yours ends in .py')}")
        return load_agent(name, known[target])

    def flags(self, agent: Agent, task: SuiteTask) -> dict[str, Any]:
        """What `agent` is given on `task`, by field of its `Args`; without seed and run directory.

        Raises:
            UserError: a flag is unknown, or its value of the wrong type or out of range; says where in the file.
        """
        place = f"[[tasks]] {task.env_id}"
        listed = {"evaluations": [setting.word for setting in self.evaluations]}
        sources = {
            "[[evaluations]]": listed if self.evaluations else {},
            "[settings]": self.settings,
            f"[agents.{agent.name}]": {k: v for k, v in self.agents.get(agent.name, {}).items() if k != "agent"},
            place: task.flags,
            f"{place} [tasks.agents.{agent.name}]": task.agents.get(agent.name, {}),
        }
        hints = get_type_hints(agent.args)
        flags: dict[str, Any] = {"env_id": task.env_id}
        for where, table in sources.items():
            for key, value in table.items():
                self._check_flag(where, key, value, hints, agent)
            flags |= table
        try:
            agent.args(**flags).resolve()
        except UserError as error:
            raise UserError(f"{self.file}: {place}: {error}") from None
        return flags

    def _check_flag(self, where: str, key: str, value: Any, hints: dict[str, Any], agent: Agent) -> None:
        if key in SWEEP_FLAGS:
            raise UserError(f"{self.file}: {where}: {key} is the sweep's to say; use {SWEEP_FLAGS[key]}")
        if key not in hints or key == "env_id":
            fields = [name for name in hints if name != "env_id" and name not in SWEEP_FLAGS]
            help_ = f"`python {shown(agent.file)} --help` explains each"
            raise UserError(f"{self.file}: {where}: {agent.name} has no flag {key!r}{did_you_mean(key, fields, help_)}")
        if not fits(value, hints[key]):
            raise UserError(f"{self.file}: {where}: {key} must be {described(hints[key])}, got {spelt(value)}")


def load_suite(name: str) -> Suite:
    """Reads a suite by the name of a shipped one, or from a file of the user's.

    Raises:
        UserError: there is no such suite, or its file is wrong; says file, key, and what was expected.
    """
    file = Path(name) if name.endswith(".toml") else listing.SUITES / f"{name}.toml"
    if not name.endswith(".toml") and name not in listing.suites():
        hint = did_you_mean(name, listing.suites(), "A file of yours ends in .toml")
        raise UserError(f"there is no suite {name!r}{hint}")
    try:
        return _read_suite(file)
    except Absent:
        raise UserError(f"there is no file {name}; expected a suite, or one of {', '.join(listing.suites())}") from None
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None


def _read_suite(file: Path) -> Suite:
    content = read_toml(file)
    for key in content:
        if key not in TOP:
            raise Unreadable(f"unknown key {key!r}{did_you_mean(key, TOP, 'Flags belong into [settings]')}")
    content = check_fields(content, TOP)
    if not re.fullmatch(r"\w[\w.-]{0,99}", content["name"]):
        expected = "up to 100 letters, digits, -, _ and . (it names a folder)"
        raise Unreadable(f"name must be {expected}, got {spelt(content['name'])}")
    agents = content["agents"] or {}
    check_fields(agents, dict.fromkeys(agents, dict), "agents")
    for agent in agents:
        check_fields(agents[agent], {"agent": str | None}, f"[agents.{agent}]")
    tasks = [_read_task(table, number) for number, table in enumerate(content["tasks"], 1)]
    if not tasks:
        raise Unreadable("tasks is empty; expected at least one [[tasks]] with env_id and total_env_steps")
    ids = [task.env_id for task in tasks]
    if twice := {env_id for env_id in ids if ids.count(env_id) > 1}:
        raise Unreadable(f"[[tasks]]: {min(twice)} is there more than once")
    evaluations = [
        read_table(table, f"[[evaluations]] number {number}")
        for number, table in enumerate(content["evaluations"] or (), 1)
    ]
    return Suite(file, content["name"], content["settings"] or {}, agents, tuple(tasks), tuple(evaluations))


def _read_task(table: dict[str, Any], number: int) -> SuiteTask:
    env_id = check_fields(table, {"env_id": str}, f"[[tasks]] number {number}")["env_id"]
    if not env_id.isprintable() or not 0 < len(env_id) <= 200:
        raise Unreadable(f"[[tasks]] number {number}: env_id must have 1 to 200 characters, got {spelt(env_id)}")
    where = f"[[tasks]] {env_id}"
    checked = check_fields(table, TASK, where)
    agents = checked["agents"] or {}
    check_fields(agents, dict.fromkeys(agents, dict), f"{where}: agents")
    bounds = None if checked["bounds"] is None else check_bounds(checked["bounds"], where)
    flags = {key: value for key, value in table.items() if key not in TASK or key == "total_env_steps"}
    return SuiteTask(Task(env_id, checked["total_env_steps"], bounds), flags, agents)


def check_bounds(bounds: Sequence[float], where: str) -> tuple[float, float]:
    """The scores that count as 0 and 1; raises `Unreadable` unless the second is larger."""
    low, high = bounds
    if not low < high:
        raise Unreadable(f"{where}: bounds must be two numbers, the lower one first, got {spelt(list(bounds))}")
    return low, high


def check(suite: Suite, chosen: Iterable[str] = ()) -> list[Agent]:
    """Checks every table of a suite, also those of agents that were not chosen; returns the chosen agents.

    Raises:
        UserError: an agent does not exist, or a flag is wrong.
    """
    agents = [suite.agent(name) for name in chosen]
    names = [agent.name for agent in agents]
    if len(set(names)) < len(names):
        raise UserError(f"--agents names one twice: {' '.join(names)}")
    named = {*suite.agents, *(name for task in suite.tasks for name in task.agents)} - set(names)
    for agent in [*agents, *map(suite.agent, sorted(named))]:
        for task in suite.tasks:
            suite.flags(agent, task)
    return agents


def command_line(flags: Mapping[str, Any]) -> list[str]:
    """Flags as they are typed: `{"n_step": 3, "motion": False}` -> `["--n-step", "3", "--no-motion"]`."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            words += [flag(name), *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def shown(file: Path) -> Path:
    """A path as it would be typed here: relative if it lies below the working directory."""
    file = file.resolve()
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def load_agent(name: str, file: Path) -> Agent:
    """Imports an agent's file; raises `UserError` if that cannot be done, or it is no agent."""
    if not file.is_file():
        raise UserError(f"there is no agent file {file}")
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UserError(f"the agent's name {name!r} names a folder: use up to 100 letters, digits, -, _ and .")
    file = file.resolve()
    spec = importlib.util.spec_from_file_location(f"agent_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where type hints are looked up
    path = [*sys.path]
    sys.path.insert(0, str(file.parent))  # as if it were run
    try:
        spec.loader.exec_module(module)
    except SystemExit:
        raise UserError(
            f'{file} exits when it is imported; put what it runs under `if __name__ == "__main__":`'
        ) from None
    except Exception as error:
        raise UserError(f"{file} cannot be imported: {type(error).__name__}: {error}; run it with --help") from error
    finally:
        sys.path[:] = path
    args = getattr(module, "Args", None)
    if not (dataclasses.is_dataclass(args) and isinstance(args, type) and issubclass(args, CommonArgs)):
        raise UserError(f"{file} is no agent: it has no dataclass Args(CommonArgs); begin with a copy of drq_sac.py")
    try:
        get_type_hints(args)
        args()
    except Exception as error:
        raise UserError(f"{file}: Args cannot be made: {type(error).__name__}: {error}; run it with --help") from error
    return Agent(name, file, args, module)
