"""Run directories, read: what a run was asked to do, how far it is, and what came of it."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from semore_bench.eval_settings import CLEAN
from semore_bench.names import PUBLISHED, printable
from semore_bench.reading import Absent, Count, Finite, Positive, Share, Unreadable, check_fields, read_csv, read_json
from semore_bench.rundir import CLOCK
from wrappers.errors import UserError

CONFIG = {
    "env_id": str,
    "agent": str,
    "seed": Count,
    "args": dict | None,
    "guidance": str | None,
    "commit": str | None,
    "versions": dict | None,
    "hardware": dict | None,
}
ARGS = {"total_env_steps": Positive | None, "eval_every": Positive | None, "distraction": str | None}
STATUS = {
    "state": str,
    "error": str | None,
    "env_step": Count | None,
    "agent_step": Count | None,
    "last_return": float | None,
    "wall_seconds": Finite | None,
    "heartbeat": Finite | None,
}
EPISODES = {
    "env_step": Count,
    "episode_return": Finite,
    "success_any": Share | None,
    "success_last": Share | None,
    "setting": str | None,
}
METRICS = {"env_step": Count, "metric": str, "value": str}


class UnusableRun(Exception):
    """A run directory has nothing to show yet, or is damaged; the message says which."""


@dataclass
class Found:
    """`runs`: directories with a config.json. `begun`: those that have only a status.json. `notes`: what was not
    looked at, and why."""

    runs: list[Path] = field(default_factory=list)
    begun: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_runs(folders: Iterable[str | Path]) -> Found:
    """Every run directory in or below `folders`, once; links are followed.

    Raises:
        UserError: one of the folders has no run.
    """
    found = Found()
    seen: dict[str, Path] = {}  # real path -> where it was seen first
    for folder in map(Path, folders):
        if not _search(folder, found, seen):
            problem = "has no run directory in it" if folder.is_dir() else "does not exist"
            raise UserError(f"{folder} {problem}; expected one made by an agent, such as runs/ENV/AGENT/seed-0")
    return found


def _search(folder: Path, found: Found, seen: dict[str, Path]) -> bool:
    """Adds the runs in or below `folder` to what was found; returns whether there is any, old or new."""

    def cannot_read(error: OSError) -> None:
        if Path(error.filename) != folder or folder.is_dir():
            found.notes.append(f"{error.filename} was left out: {error.strerror}")

    some = False
    for place, folders, files in os.walk(folder, onerror=cannot_read, followlinks=True):
        here, real = Path(place), os.path.realpath(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        some |= "config.json" in files
        if real in seen:
            some = True
            if os.path.abspath(seen[real]) != os.path.abspath(here):
                found.notes.append(f"{here} is the same folder as {seen[real]} and counts once")
            folders.clear()
            continue
        seen[real] = here
        if "config.json" in files:
            found.runs.append(here)
        elif "status.json" in files and here.name.startswith("seed-"):
            found.begun.append(here)
    return some


def read_config(run: Path) -> dict[str, Any]:
    """config.json with the fields of `CONFIG`, and `agent_file`; `ARGS` are what is asked of its `args`.

    In `.../<agent>/seed-<n>` the folder names the agent: a suite may hold an agent twice, with other settings.

    Raises:
        UnusableRun: the file is damaged.
    """
    try:
        config = read_json(run / "config.json", CONFIG)
        config["args"] = config["args"] or {}
        check_fields(config["args"], ARGS, "args")
    except Unreadable as error:
        raise UnusableRun(f"config.json is damaged: {error}") from None
    config["agent_file"] = config["agent"]
    if run.name.startswith("seed-"):
        config["agent"] = run.absolute().parent.name
    for name in ("env_id", "agent", "agent_file"):
        config[name] = printable(config[name])
    if not (config["env_id"] and config["agent"]) or config["agent"].endswith(PUBLISHED):
        raise UnusableRun(f"{config['agent']!r} on {config['env_id']!r} are no names of an agent and an environment")
    return config


def read_status(run: Path) -> dict[str, Any]:
    """status.json with the fields of `STATUS`; empty where there is none yet.

    Raises:
        UnusableRun: the file is damaged.
    """
    try:
        return read_json(run / "status.json", STATUS)
    except Absent:
        return {}
    except Unreadable as error:
        raise UnusableRun(f"status.json is damaged: {error}") from None


def read_episodes(run: Path, name: str = "eval") -> dict[str, list[Any]]:
    """The columns of `EPISODES` in eval.csv or train.csv, which may be in use; empty where there is none yet.

    Files without settings, as all once were, are about the clean one.

    Raises:
        UnusableRun: the file is damaged.
    """
    try:
        columns = read_csv(run / f"{name}.csv", EPISODES, growing=True)
    except Absent:
        return {name: [] for name in EPISODES}
    except Unreadable as error:
        raise UnusableRun(f"{name}.csv is damaged: {error}") from None
    return columns | {"setting": [setting or CLEAN for setting in columns["setting"]]}


def read_clock(run: Path) -> tuple[list[int], list[float]]:
    """Env steps in metrics.csv, ascending, and the seconds that the run's processes had worked until then; both empty
    where nobody knows. A run that is continued counts on: what passed in between is in no process's time.

    Raises:
        UnusableRun: the file is damaged.
    """
    try:
        columns = read_csv(run / "metrics.csv", METRICS, growing=True)
        rows = zip(columns["line"], columns["env_step"], columns["metric"], columns["value"], strict=True)
        steps, seconds = [0], [0.0]
        for line, step, metric, text in rows:
            if metric != CLOCK:
                continue
            value = float(text)
            if not (step >= steps[-1] and seconds[-1] <= value < math.inf):
                raise ValueError(
                    f"line {line}: expected no step and no time before those above it, got {text} at {step}"
                )
            steps.append(step)
            seconds.append(value)
    except Absent:
        return [], []
    except (Unreadable, ValueError) as error:
        raise UnusableRun(f"metrics.csv is damaged: {error}") from None
    return (steps, seconds) if len(steps) > 1 else ([], [])


def seconds_at(clock: tuple[Sequence[int], Sequence[float]], step: int) -> float:
    """Seconds until an env step, between the rows of `read_clock` and, at their speed, behind the last; or NaN."""
    steps, seconds = clock
    if not steps:
        return math.nan
    return float(np.interp(step, steps, seconds)) * max(1.0, step / max(steps[-1], 1))


def find_video(run: Path) -> Path | None:
    """The newest video of a run; raises `UnusableRun` where it is a link, which may lead to any file."""
    videos = sorted(video for video in (run / "videos").glob("*.mp4") if video.is_file())
    if not videos:
        return None
    video = videos[-1]
    if video.resolve() != run.resolve() / "videos" / video.name:
        raise UnusableRun(f"videos/{printable(video.name)} is a link")
    return video
