"""From run directories and folders of results to `Results`: every run once, and a note on whatever was left out."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from semore_bench.eval_settings import CLEAN, setting_of
from semore_bench.families import Task
from semore_bench.names import PUBLISHED, folder_name, printable
from semore_bench.published import read_published
from semore_bench.records import (
    UnusableRun,
    find_runs,
    find_video,
    read_clock,
    read_config,
    read_episodes,
    read_status,
    seconds_at,
)
from semore_bench.scores import COLUMNS, KEY, PROVENANCE, SCORES, Results, load, tidy
from semore_bench.suites import load_suite
from semore_bench.teachers import teacher
from wrappers.errors import UserError

RUNS = Path("runs")
"""where runs are looked for, unless a folder is named"""
Rows = list[tuple[Any, ...]]
"""evaluations of a run, each as `COLUMNS`"""
Piece = tuple[Path, dict[str, Any], Rows]
"""where a run was found, its record, and its evaluations"""


def collect(folders: Sequence[str | Path], suite: str | None = None, published: str | Path | None = None) -> Results:
    """Reads all runs below `folders`.

    Args:
        folders: run directories, folders with some anywhere inside, or folders of results: runs of other times and
            machines, of which nothing else is left.
        suite: name or file of the suite that says which tasks count, and their budgets; runs of a sweep are looked for
            in the folder of that name. None: all tasks, with the largest budget that a run has.
        published: CSV file with rows to compare with, see `read_published`; with a suite there may be no folder.

    Raises:
        UserError: there is no run, or two runs share agent, task and seed, unless one of them alone is finished.
    """
    if not folders and not (suite and published):
        raise UserError("name at least one folder with runs, such as runs/dmc-lite, or --suite and --published")
    title, tasks = read_suite(suite) if suite else (printable(Path(folders[0]).absolute().name), ())
    places = [Path(folder) / title if (Path(folder) / title).is_dir() else Path(folder) for folder in folders]
    kept = {folder: load(folder) for folder in places if (folder / PROVENANCE).exists()}
    searched = find_runs([folder for folder in places if folder not in kept])
    if not suite and len(kept) == 1:
        (title,) = (results.title for results in kept.values())
    notes = [note for results in kept.values() for note in results.notes] + [printable(note) for note in searched.notes]
    found = [(folder, *piece) for folder, results in kept.items() for piece in _pieces(results)]
    for run in searched.runs:
        name = printable(f"{run.parent.parent.name}/{run.parent.name}/{run.name}")
        try:
            record, rows, remarks = read_run(run)
        except UnusableRun as reason:
            notes.append(f"{name} was left out: {reason}")
        else:
            found.append((run, record, rows))
            notes += [f"{name}: {remark}" for remark in remarks]
    if not suite:
        tasks = _tasks(kept.values(), [record for _, record, _ in found])
    chosen = _choose(found, {task.env_id for task in tasks})
    runs = [record for _, record, _ in chosen.values()]
    runs += [record for record in _never_begun(searched.begun, tasks) if tuple(record.values())[:3] not in chosen]
    runs.sort(key=lambda record: (record["task"], record["agent"], record["seed"]))
    notes += [note for note in _unequal_settings(runs) if note not in notes]
    evaluations = tidy(pd.DataFrame([row for *_, rows in chosen.values() for row in rows], columns=list(COLUMNS)))
    usual = _usual(runs)
    theirs = [_published_rows(results, tasks) for results in kept.values()]
    if published:
        read, left_out = read_published(Path(published), tasks, usual)
        theirs.append(tidy(read))
        notes += left_out
    if theirs := [table for table in theirs if len(table)]:
        evaluations = tidy(pd.concat([evaluations, *theirs]).drop_duplicates(list(KEY), keep="last"))
    settings, environments = _factor(runs)
    said = {guidance: text for results in kept.values() for guidance, text in results.teachers.items()}
    guidances = {record["guidance"] for record in runs if record["guidance"]}
    teachers = {guidance: said.get(guidance) or teacher(guidance) for guidance in sorted(guidances)}
    return Results(
        title,
        tasks,
        evaluations,
        tuple(runs),
        tuple(environments),
        settings,
        tuple(notes),
        usual=usual,
        teachers={guidance: text for guidance, text in teachers.items() if text},
    )


def _published_rows(results: Results, tasks: Sequence[Task]) -> pd.DataFrame:
    """What a folder of results keeps of others' numbers on these tasks."""
    rows = results.evaluations
    return rows[rows.agent.str.endswith(PUBLISHED) & rows.task.isin([task.env_id for task in tasks])]


def _usual(runs: Sequence[dict[str, Any]]) -> str:
    """The setting that most runs are trained in: for the others, whose scores are left out there, it is another's."""
    counts = Counter(setting_of(record["settings"]) for record in runs if record["settings"])
    return max(counts, key=lambda setting: (counts[setting], setting == CLEAN, setting), default=CLEAN)


def _choose(found: Iterable[Piece], tasks: set[str]) -> dict[tuple[str, str, int], Piece]:
    """Each run of these tasks once, by agent, task and seed; of two the one that is finished."""
    chosen: dict[tuple[str, str, int], Piece] = {}
    for place, record, rows in found:
        if record["task"] not in tasks:
            continue
        key = record["agent"], record["task"], record["seed"]
        both = [chosen[key], (place, record, rows)] if key in chosen else [(place, record, rows)]
        finished = [item for item in both if item[1]["state"] == "finished"]
        if len(both) == 2 and len(finished) != 1:
            raise UserError(
                f"{both[0][0]} and {place} both have {key[0]} on {key[1]} with seed {key[2]}; name the folder of one "
                "sweep, or a --suite, and every run once"
            )
        chosen[key] = finished[0] if len(both) == 2 else both[0]
    return chosen


def _tasks(kept: Iterable[Results], runs: Sequence[dict[str, Any]]) -> tuple[Task, ...]:
    """Without a suite: every task, with the largest budget that a run has and the bounds that kept results have."""
    bounds: dict[str, tuple[float, float] | None] = {}
    for task in (task for results in kept for task in results.tasks):
        if bounds.setdefault(task.env_id, task.bounds) != task.bounds:
            raise UserError(f"two folders of results have other bounds for {task.env_id}; name the --suite that counts")
    budgets: dict[str, int] = {}
    for record in runs:
        budgets[record["task"]] = max(budgets.get(record["task"], 0), record["total_env_steps"])
    return tuple(Task(env_id, budget, bounds.get(env_id)) for env_id, budget in sorted(budgets.items()))


def _unequal_settings(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A note for each setting in which an agent's seeds differ on a task: they are averaged all the same."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in runs:
        if record["settings"]:
            groups.setdefault((record["agent"], record["task"]), []).append(record)
    for (agent, task), records in groups.items():
        names = sorted({name for record in records for name in record["settings"]} - {"run_dir"})
        for name in names:
            values = {record["seed"]: json.dumps(record["settings"].get(name)) for record in records}
            if len(set(values.values())) > 1:
                seeds = ", ".join(f"{value} for seed {seed}" for seed, value in values.items())
                yield printable(f"{agent} on {task}: seeds differ in {name}: {seeds}")


def _pieces(results: Results) -> Iterator[tuple[dict[str, Any], Rows]]:
    """Record and evaluations of each run of a folder of results, as `read_run` gives them."""
    by_run: dict[tuple[str, str, int], Rows] = defaultdict(list)
    for row in results.evaluations.itertuples(index=False, name=None):
        by_run[row[:3]].append(row)
    for run in results.runs:
        number = run["environment"]
        record = run | {
            "environment": None if number is None else results.environments[number],
            "settings": results.settings.get(run["agent"], {}) | run["settings"],
        }
        yield record, by_run[run["agent"], run["task"], run["seed"]]


def read_run(run: Path) -> tuple[dict[str, Any], Rows, list[str]]:
    """The record of a run directory, its evaluations, and remarks on what is damaged but not needed.

    Raises:
        UnusableRun: its settings or evaluations are damaged.
    """
    config, remarks = read_config(run), []
    args = config["args"]
    try:
        status = read_status(run)
    except UnusableRun as reason:
        status = {}
        remarks.append(f"{reason}; nobody knows whether it has finished")
    columns = read_episodes(run)
    try:
        clock = read_clock(run)
    except UnusableRun as reason:
        clock = [], []
        remarks.append(f"{reason}; its times were left out")
    budget = args.get("total_env_steps") or max([1, *columns["env_step"]])
    every = args.get("eval_every") or 1
    # An evaluation takes place at the first decision that reaches its step.
    due = [step // every * every if step < budget else budget for step in columns["env_step"]]
    together: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, (setting, step) in enumerate(zip(columns["setting"], due, strict=True)):
        together[setting, step].append(index)
    identity = {"agent": config["agent"], "task": config["env_id"], "seed": config["seed"]}
    rows = [
        (
            *identity.values(),
            step,
            len(of),
            *(_mean([columns[name][index] for index in of]) for name in SCORES),
            setting,
            round(seconds_at(clock, columns["env_step"][of[0]]), 1),
        )
        for (setting, step), of in together.items()
    ]
    try:
        video = find_video(run)
    except UnusableRun as reason:
        video = None
        remarks.append(f"{reason} and was left out")
    record = identity | _progress(status, budget)
    record |= {
        "guidance": None if config["guidance"] is None else printable(config["guidance"]),
        "environment": {key: config[key] for key in ("commit", "versions", "hardware")},
        "settings": {name: value for name, value in args.items() if name not in ("env_id", "seed")}
        | {"agent": config["agent_file"]},
        "video": None if video is None else str(video),
    }
    return record, rows, remarks


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan


def _never_begun(folders: Iterable[Path], tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
    """Records of runs that failed before their config.json was there: a sweep leaves a status.json alone."""
    by_folder = {folder_name(task.env_id): task for task in tasks}
    for run in folders:
        task, seed = by_folder.get(run.parent.parent.name), run.name.removeprefix("seed-")
        if task is None or not (seed.isascii() and seed.isdigit() and len(seed) < 19):
            continue
        try:
            status = read_status(run)
        except UnusableRun as reason:
            status = {"error": str(reason)}
        identity = {"agent": printable(run.absolute().parent.name), "task": task.env_id, "seed": int(seed)}
        yield identity | _progress(status, task.total_env_steps) | {"guidance": None, "settings": {}, "video": None}


def _progress(status: dict[str, Any], budget: int) -> dict[str, Any]:
    return {
        "state": printable(status.get("state", "unknown")),
        "error": status.get("error"),
        "env_step": status.get("env_step") or 0,
        "total_env_steps": budget,
        "wall_seconds": status.get("wall_seconds"),
    }


def _factor(runs: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Takes out of the records what repeats: (settings of each agent, environments); leaves differences and indices."""
    environments: list[dict[str, Any]] = []
    for record in runs:
        environment = record.pop("environment", None)
        if environment is not None and environment not in environments:
            environments.append(environment)
        record["environment"] = environments.index(environment) if environment else None
    settings = {}
    for agent in sorted({record["agent"] for record in runs}):
        own = [record["settings"] for record in runs if record["agent"] == agent and record["settings"]] or [{}]
        shared = {key: value for key, value in own[0].items() if all(key in s and s[key] == value for s in own)}
        settings[agent] = shared
        for record in runs:
            if record["agent"] == agent:
                record["settings"] = {key: value for key, value in record["settings"].items() if key not in shared}
    return settings, environments


def read_suite(suite: str) -> tuple[str, tuple[Task, ...]]:
    """Name and tasks of a suite, by its name or file; raises `UserError`."""
    loaded = load_suite(suite)
    return loaded.name, tuple(task.scored for task in loaded.tasks)


def open_results(
    folders: Sequence[Path], suite: str | None = None, published: Path | None = None, setting: str | None = None
) -> Results:
    """`load` of one folder of results, or `collect` of everything else, asked for an evaluation setting.

    Without any run of one's own, published numbers can be seen alone.
    """
    if suite and published and [*folders] == [RUNS] and not any(RUNS.rglob("seed-*")):
        folders = ()
    if len(folders) == 1 and (folders[0] / PROVENANCE).exists() and not suite and not published:
        return load(folders[0]).choose(setting)
    return collect(folders, suite, published).choose(setting)
