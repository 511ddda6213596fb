"""`semore-bench list`: which environments, agents and suites there are, and which id was probably meant."""

import ast
import difflib
import functools
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import gymnasium as gym
import tyro
from rich.console import Console
from rich.markup import escape

from semore_bench.names import printable
from semore_bench.reading import Unreadable, check_fields, read_text, read_toml
from wrappers.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
_INSIDE = _PACKAGE / "agents"
AGENTS = _INSIDE if _INSIDE.is_dir() else _PACKAGE.parent / "agents"
"""beside the package in the repository, inside of it where a wheel was installed"""
SUITES = _PACKAGE / "suites"
GYMNASIUM_FAMILIES = {
    "classic_control": "Gymnasium classic control",
    "box2d": "Gymnasium Box2D",
    "mujoco": "Gymnasium MuJoCo",
    "toy_text": "Gymnasium toy text",
}


@functools.cache
def env_ids() -> dict[str, tuple[str, ...]]:
    """Every environment id that `make_env` understands, by family; of several versions the newest alone.

    Imports dm_control and Meta-World, which takes about two seconds the first time.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing GLFW complains where there is no display; none is needed
        import metaworld.env_dict  # noqa: F401  registers Meta-World/...
        import shimmy  # noqa: F401  registers dm_control/...

        if importlib.util.find_spec("ale_py"):
            import ale_py

            gym.register_envs(ale_py)
    newest: dict[tuple[str | None, str], gym.envs.registration.EnvSpec] = {}
    for spec in gym.registry.values():
        key = (spec.namespace, spec.name)
        if key not in newest or (spec.version or 0) > (newest[key].version or 0):
            newest[key] = spec

    families: dict[str, list[str]] = {"dm_control": []}
    families["Meta-World"] = [f"Meta-World/{task}" for task in metaworld.env_dict.ALL_V3_ENVIRONMENTS]
    for spec in newest.values():
        if spec.namespace in ("dm_control", "ALE") and spec.name != "compatibility-env":
            families.setdefault(spec.namespace, []).append(spec.id)
        elif spec.namespace is None and str(spec.entry_point).startswith("gymnasium.envs."):
            family = GYMNASIUM_FAMILIES[str(spec.entry_point).split(".")[2]]
            families.setdefault(family, []).append(spec.id)
    return {family: tuple(sorted(ids, key=str.lower)) for family, ids in families.items()}


def nearest_ids(env_id: str, n: int = 3) -> list[str]:
    """The `n` known ids most like `env_id`, best first: `walker_walk` finds `dm_control/walker-walk-v0`."""

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(a=env_id.lower(), b=known.lower()).ratio()
        return whole + difflib.SequenceMatcher(a=_bare_name(env_id), b=_bare_name(known)).ratio()

    return sorted((known for ids in env_ids().values() for known in ids), key=likeness, reverse=True)[:n]


def _bare_name(env_id: str) -> str:
    """`dm_control/walker-walk-v0` without namespace, version, case and choice of separator: `walker walk`."""
    name, _, version = env_id.split("/")[-1].rpartition("-v")
    name = name if version.isdigit() else env_id.split("/")[-1]
    return name.replace("_", " ").replace("-", " ").lower()


def agent_files(folder: Path = AGENTS) -> dict[str, Path]:
    """The files of agents by name.

    Raises:
        UserError: the folder is missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"no agents in {folder}: install semore-bench again, with `make setup` in its repository or from its wheel"
        )
    return {file.stem: file for file in sorted(folder.glob("*.py")) if not file.stem.startswith("_")}


def agents(folder: Path = AGENTS) -> dict[str, str]:
    """Agents by name with the first line of their docstring, read without running them."""
    return {name: _described(file, _agent_summary) for name, file in agent_files(folder).items()}


def suites(folder: Path = SUITES) -> dict[str, str]:
    """Suites by name with their description and number of tasks."""
    return {file.stem: _described(file, _suite_summary) for file in sorted(folder.glob("*.toml"))}


def _described(file: Path, summary: Callable[[Path], str]) -> str:
    """What a file says of itself; one that cannot be read is listed all the same."""
    try:
        return printable(summary(file))
    except Unreadable as error:
        return f"(cannot be used: {error})"


def _agent_summary(file: Path) -> str:
    try:
        return _first_line(ast.get_docstring(ast.parse(read_text(file))))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise Unreadable(f"it is no Python: {printable(str(error))}") from None


def _suite_summary(file: Path) -> str:
    suite = check_fields(read_toml(file), {"description": str | None, "tasks": list[dict] | None})
    return f"{_first_line(suite['description'])} ({len(suite['tasks'] or [])} tasks)".lstrip()


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def list_(what: tyro.conf.Positional[Literal["all", "envs", "agents", "suites"]] = "all", filter: str = "") -> None:
    """List environments, agents and suites.

    Args:
        what: What to list.
        filter: Only entries with this text in their name or description, in whatever case.
    """
    sections: dict[str, dict[str, str]] = {}
    if what in ("all", "agents"):
        sections["Agents: python agents/NAME.py --env-id ID"] = agents()
    if what in ("all", "suites"):
        sections["Suites: semore-bench sweep --suite NAME"] = suites()
    if what in ("all", "envs"):
        sections |= {f"Environments: {family}": dict.fromkeys(ids, "") for family, ids in env_ids().items()}

    console = Console(highlight=False, soft_wrap=True)
    matches = 0
    for title, entries in sections.items():
        shown = {name: text for name, text in entries.items() if filter.lower() in f"{name} {text}".lower()}
        if not shown:
            continue
        matches += len(shown)
        width = max(map(len, shown))
        console.print(f"[bold]{escape(title)}[/]")
        for name, text in shown.items():
            entry = f"  {name:{width}}  {text}".rstrip()
            console.print(escape(entry))
        console.print()
    if not matches:
        nearest = f"; the nearest ids are {', '.join(nearest_ids(filter))}" if what in ("all", "envs") else ""
        raise UserError(f"nothing matches {filter!r}{nearest}")
