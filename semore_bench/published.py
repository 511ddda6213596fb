"""Numbers that others have published, from a CSV file."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from semore_bench.eval_settings import CLEAN
from semore_bench.families import Task
from semore_bench.names import PUBLISHED
from semore_bench.reading import Count, Finite, Positive, Share, Unreadable, read_csv
from wrappers.errors import UserError

COLUMNS = {
    "agent": str,
    "task": str,
    "seed": Count,
    "env_step": Count,
    "episode_return": Finite | None,
    "success_any": Share | None,
    "success_last": Share | None,
    "setting": str | None,
    "image_size": Positive | None,
}


def read_published(path: Path, tasks: Sequence[Task], usual: str = CLEAN) -> tuple[pd.DataFrame, list[str]]:
    """Rows of a CSV file with the columns agent, task, seed, env_step, and episode_return or, for tasks whose score is
    the success rate, success_any; and notes on what was left out. A column setting names evaluation settings; where
    there is none, it is the `usual` one. A column image_size gives the frames' height in pixels, which the agent's name
    then says.

    A task is known by its id or by its bare name: `walker_walk` is `dm_control/walker-walk-v0`. Agents get a name that
    ends in `PUBLISHED`.

    Raises:
        UserError: the file, a row or a cell is wrong, a name may mean two tasks, or a run is there twice.
    """
    where = f"--published {path}"
    try:
        columns = read_csv(path, COLUMNS)
    except Unreadable as error:
        raise UserError(f"{where}: {error}") from None
    if not any(value is not None for name in ("episode_return", "success_any") for value in columns[name]):
        raise UserError(f"{where}: it has no numbers in a column episode_return or success_any")
    known = {name: _find_task(name, tasks, where) for name in dict.fromkeys(columns["task"])}
    rows: list[dict[str, Any]] = []
    lines: dict[tuple[Any, ...], int] = {}
    without: dict[str, list[int]] = defaultdict(list)  # column of the score -> lines that have none
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        line, task = row.pop("line"), known[row["task"]]
        if task is None:
            continue
        row["setting"] = row["setting"] or usual
        if size := row.pop("image_size"):
            row["agent"] += f", {size} px"
        key = row["agent"], task.env_id, row["seed"], row["env_step"], row["setting"]
        if (before := lines.setdefault(key, line)) != line:
            raise UserError(
                f"{where}: lines {before} and {line} both have {key[0]} on {key[1]}, seed {key[2]}, env step {key[3]}; "
                "expected each once, not more than once"
            )
        score = "success_any" if task.success else "episode_return"
        if row[score] is None:
            without[score].append(line)
        else:
            rows.append(row | {"agent": row["agent"] + PUBLISHED, "task": task.env_id, "episodes": 1})
    notes = []
    if strange := [name for name, task in known.items() if task is None]:
        notes.append(f"{path.name}: left out tasks that are not compared here: {', '.join(sorted(strange))}")
    for score, missing in without.items():
        notes.append(
            f"{path.name}: left out {len(missing)} row{'s' * (len(missing) > 1)} without {score}, which is the score "
            f"there, the first in line {missing[0]}"
        )
    return pd.DataFrame(rows, columns=[*(name for name in COLUMNS if name != "image_size"), "episodes"]), notes


def _find_task(name: str, tasks: Sequence[Task], where: str) -> Task | None:
    """The task that a name means; a name without namespace or version stands for that of any."""
    if exact := [task for task in tasks if task.env_id == name]:
        return exact[0]
    wanted = _parts(name)
    found = [
        task
        for task in tasks
        if all(mine is None or mine == theirs for mine, theirs in zip(wanted, _parts(task.env_id), strict=True))
    ]
    if len(found) > 1:
        raise UserError(f"{where}: task {name} may be {' or '.join(task.env_id for task in found)}; write which it is")
    return found[0] if found else None


def _parts(task: str) -> tuple[str | None, str, str | None]:
    """Namespace, name without case and choice of separator, and version: `dm_control`, `walker walk`, `0`."""
    namespace, _, rest = task.rpartition("/")
    name, _, version = rest.rpartition("-v")
    if not (name and version.isdigit()):
        name, version = rest, ""
    return namespace or None, name.replace("_", " ").replace("-", " ").lower(), version or None
