"""Suites: tasks, budgets and settings in TOML, checked against the agents' own flags before anything runs."""

import dataclasses
import difflib
import importlib.util
import re
import sys
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from semore_bench import listing
from semore_bench.args import CommonArgs, flag
from wrappers.errors import UserError

TASK_KEYS = ("env_id", "total_env_steps", "bounds", "agents")
"""what a task may hold besides flags: `bounds` are the scores that count as 0 and 1 in tables"""
SWEEP_FLAGS = {"seed": "--seeds", "run_dir": "--runs-dir", "fresh": "another --runs-dir"}
"""flags that a suite must not set, and what says it instead"""


@dataclass(frozen=True)
class Agent:
    """An agent as a suite names it: its file, and the dataclass of its flags."""

    name: str
    file: Path
    args: type[CommonArgs]


@dataclass(frozen=True)
class Task:
    """An environment with the flags that all agents share there, and those of single agents."""

    env_id: str
    flags: Mapping[str, Any]
    agents: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Suite:
    """A suite as its file says it.

    `settings`: flags of all agents. `agents`: flags of single ones; `agent` among them names the file that is meant,
    so that a suite may hold an agent twice, with other flags. The more special wins: settings, agent, task, agent on
    that task.
    """

    file: Path
    name: str
    settings: Mapping[str, Any]
    agents: Mapping[str, Mapping[str, Any]]
    tasks: tuple[Task, ...]

    def agent(self, name: str) -> Agent:
        """The agent of that name in this suite or in `agents/`, or in a file of the user's.

        Raises:
            UserError: there is none, or it is no agent.
        """
        if name.endswith(".py"):
            return _load_agent(Path(name).stem, Path(name))
        target = self.agents.get(name, {}).get("agent", name)
        if target.endswith(".py"):
            return _load_agent(name, self.file.parent / target)
        known = listing.agents()
        if target not in known:
            names = sorted({*known, *self.agents} - {target})
            raise UserError(f"there is no agent {target!r}{_nearest(target, names)}; a file of yours ends in .py")
        return _load_agent(name, listing.ROOT / "agents" / f"{target}.py")

    def flags(self, agent: Agent, task: Task) -> dict[str, Any]:
        """What `agent` is given on `task`, by field of its `Args`; without seed and run directory.

        Raises:
            UserError: a flag is unknown, or its value of the wrong type or out of range; says where in the file.
        """
        place = f"[[tasks]] {task.env_id}"
        sources = {
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
            raise UserError(
                f"{self.file}: {where}: {agent.name} has no flag {key!r}{_nearest(key, fields)}; "
                f"`python {shown(agent.file)} --help` explains each"
            )
        if not _fits(value, hints[key]):
            raise UserError(f"{self.file}: {where}: {key} must be {_described(hints[key])}, got {_toml(value)}")


def load_suite(name: str) -> Suite:
    """Reads a suite by the name of a shipped one, or from a file of the user's.

    Raises:
        UserError: there is no such suite, or its file is wrong; says file, key, and what was expected.
    """
    file = Path(name) if name.endswith(".toml") else listing.SUITES / f"{name}.toml"
    if not file.is_file():
        if name.endswith(".toml"):
            raise UserError(f"there is no file {name}; expected a suite, or one of {', '.join(listing.suites())}")
        hint = _nearest(name, listing.suites())
        raise UserError(f"there is no suite {name!r}{hint}; a file of yours ends in .toml")
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not TOML: {error}") from None

    def take(table: dict[str, Any], where: str, key: str, kind: Any, default: Any = None) -> Any:
        value = table.get(key, default)
        if value is None:
            raise UserError(f"{file}: {where}{key} is missing; expected {_described(kind)}")
        if not _fits(value, kind):
            raise UserError(f"{file}: {where}{key} must be {_described(kind)}, got {_toml(value)}")
        return value

    top = ("name", "description", "settings", "agents", "tasks")
    for key in content:
        if key not in top:
            raise UserError(f"{file}: unknown key {key!r}{_nearest(key, top)}; flags belong into [settings]")
    suite = take(content, "", "name", str)
    if not re.fullmatch(r"\w[\w.-]*", suite):
        raise UserError(f"{file}: name must be letters, digits, -, _ and . (it names a folder), got {_toml(suite)}")
    take(content, "", "description", str, "")
    agents = take(content, "", "agents", dict, {})
    for agent in agents:
        take(agents, "agents.", agent, dict)
        take(agents[agent], f"[agents.{agent}] ", "agent", str, agent)
    tables = take(content, "", "tasks", list[dict])
    tasks = []
    for number, table in enumerate(tables, 1):
        env_id = take(table, f"[[tasks]] number {number}: ", "env_id", str)
        where = f"[[tasks]] {env_id}: "
        take(table, where, "total_env_steps", int)
        take(table, where, "bounds", tuple[float, float], [0, 1])
        own = take(table, where, "agents", dict, {})
        for agent in own:
            take(own, f"{where}agents.", agent, dict)
        flags = {key: value for key, value in table.items() if key not in TASK_KEYS or key == "total_env_steps"}
        tasks.append(Task(env_id, flags, own))
    twice = {task.env_id for task in tasks if [other.env_id for other in tasks].count(task.env_id) > 1}
    if twice:
        raise UserError(f"{file}: [[tasks]]: {min(twice)} is there more than once")
    if not tasks:
        raise UserError(f"{file}: tasks is empty; expected at least one [[tasks]] with env_id and total_env_steps")
    return Suite(file, suite, take(content, "", "settings", dict, {}), agents, tuple(tasks))


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


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as they are typed: `{"n_step": 3, "motion": False}` -> `["--n-step", "3", "--no-motion"]`."""
    typed: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            typed.append(flag(name if value else f"no_{name}"))
        else:
            typed += [flag(name), *(map(str, value) if isinstance(value, list) else [str(value)])]
    return typed


def shown(file: Path) -> Path:
    """A path as it would be typed here: relative if it lies below the working directory."""
    file = file.resolve()
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def _load_agent(name: str, file: Path) -> Agent:
    if not file.is_file():
        raise UserError(f"there is no agent file {file}")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"the agent's name {name!r} names a folder: use letters, digits, -, _ and .")
    file = file.resolve()
    spec = importlib.util.spec_from_file_location(f"agent_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where type hints are looked up
    sys.path.insert(0, str(file.parent))  # as if it were run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file} cannot be imported: {type(error).__name__}: {error}; run it with --help") from error
    finally:
        sys.path.remove(str(file.parent))
    args = getattr(module, "Args", None)
    if not (dataclasses.is_dataclass(args) and isinstance(args, type) and issubclass(args, CommonArgs)):
        raise UserError(f"{file} is no agent: it has no dataclass Args(CommonArgs); begin with a copy of drq_sac.py")
    return Agent(name, file, args)


def _nearest(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; expected one of {', '.join(known)}"


def _fits(value: Any, kind: Any) -> bool:
    """Whether a TOML value is of the type that a flag is annotated with; whole numbers are numbers, too."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return any(value == allowed and type(value) is type(allowed) for allowed in arguments)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin in (tuple, list):
        if origin is tuple and arguments[-1] is not ...:
            return isinstance(value, list) and len(value) == len(arguments) and all(map(_fits, value, arguments))
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _described(kind: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(_toml, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in arguments if one is not type(None))
    if origin is tuple and arguments[-1] is not ...:
        return f"a list of {' and '.join(map(_described, arguments))}"
    if origin in (tuple, list):
        return f"a list, each {_described(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes", dict: "a table"}
    return names.get(kind, str(kind))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
