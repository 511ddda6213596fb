"""From run directories, or a folder of results, to tidy frames: what tables, plots and the report are made of."""

import dataclasses
import io
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from semore_bench.suites import load_suite
from wrappers.errors import UserError

PUBLISHED = " (as published)"
"""ends the name of an agent whose numbers come from a file, not from runs"""
PROVENANCE = "provenance.json"
"""the file that makes a folder one of results"""
COLUMNS = "agent task seed env_step episodes episode_return success_any success_last".split()


class UnusableRun(Exception):
    """A run directory has nothing to show yet, or is damaged; the message says which."""


@dataclass(frozen=True)
class Task:
    """A task of a suite.

    `total_env_steps`: the budget at whose end agents are compared. `bounds`: the scores that count as 0 and 1, None
    where nobody knows them. The score is the episode return, in Meta-World the success rate.
    """

    env_id: str
    total_env_steps: int
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.bounds is None:
            known = (0.0, 1.0) if self.success else (0.0, 1000.0) if self.env_id.startswith("dm_control/") else None
            object.__setattr__(self, "bounds", known)

    @property
    def success(self) -> bool:
        """Whether the score is the success rate."""
        return self.env_id.startswith("Meta-World/")


@dataclass(frozen=True)
class Results:
    """Everything that tables, plots and the report show.

    `evaluations`: a row per agent, task, seed and evaluation (the mean of its episodes), with `COLUMNS`, sorted;
    `env_step` is where the evaluation was due: it takes place at the first decision that reaches it. `runs`: a
    JSON-able record per run directory. `environments`: the commits, versions and machines that the runs name by their
    index. `settings`: of each agent, those that all its runs share, and the agent file in `agent`. `notes`: what was
    left out, and why. `baseline`: the agent that the others were compared with when the results were kept.
    """

    title: str
    tasks: tuple[Task, ...]
    evaluations: pd.DataFrame
    runs: tuple[dict[str, Any], ...] = ()
    environments: tuple[dict[str, Any], ...] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    baseline: str | None = None

    @property
    def agents(self) -> list[str]:
        """Own agents, those on most tasks first, then by name; then published ones."""
        names = {run["agent"] for run in self.runs} | set(self.evaluations.agent)
        return in_order(names, zip(self.evaluations.agent, self.evaluations.task, strict=True))

    @property
    def fractions(self) -> list[float]:
        """Shares of the budget at which every task was evaluated, ascending; for published rows alone, tenths."""
        own = self.evaluations[~self.evaluations.agent.str.endswith(PUBLISHED)]
        if not len(own):
            return [tenth / 10 for tenth in range(1, 11)]
        budgets = {task.env_id: task.total_env_steps for task in self.tasks}
        steps = own.groupby("task").env_step.unique()
        return sorted(
            set.intersection(*({round(step / budgets[task], 12) for step in steps[task]} for task in steps.index))
        )

    def scores(self, at: int | None = None, fraction: float = 1.0) -> pd.DataFrame:
        """The score of every run that got that far, columns agent, task, seed, env_step, score, normalised, success.

        Args:
            at: env step; the last evaluation until then counts, in runs that were evaluated then or later. None: the
                end of each task's budget.
            fraction: of the budget, if `at` is None.
        """
        parts = [self.evaluations.iloc[:0].assign(score=[], normalised=[])]
        for task in self.tasks:
            step = round(task.total_env_steps * fraction) if at is None else at
            rows = self.evaluations[self.evaluations.task == task.env_id]
            by_run = rows.groupby(["agent", "seed"])["env_step"]
            # Published curves may end an evaluation before a round number: the distance of their points is forgiven.
            spacing = by_run.diff().groupby([rows.agent, rows.seed]).transform("max").fillna(0)
            allowed = spacing.where(rows.agent.str.endswith(PUBLISHED), 0)
            rows = rows[(by_run.transform("max") + allowed >= step) & (rows.env_step <= step)]
            rows = rows.groupby(["agent", "seed"]).tail(1)
            score = rows.success_any if task.success else rows.episode_return
            low, high = task.bounds or (np.nan, np.nan)
            parts.append(rows.assign(score=score, normalised=(score - low) / (high - low)))
        rows = pd.concat([part for part in parts if len(part)] or parts)
        rows = rows.rename(columns={"success_any": "success"})
        return rows[["agent", "task", "seed", "env_step", "score", "normalised", "success"]].reset_index(drop=True)


def in_order(agents: Iterable[str], evaluated: Iterable[tuple[str, str]]) -> list[str]:
    """Agents as figures list them, given pairs of agent and task: those compared most get the clearest colours."""
    tasks = Counter(agent for agent, _ in set(evaluated))
    return sorted(agents, key=lambda agent: (agent.endswith(PUBLISHED), -tasks[agent], agent))


# ---- run directories ----


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Every run directory in or below `folders`, once; raises `UserError` if one of them has none."""
    runs: dict[Path, Path] = {}
    for folder in map(Path, folders):
        found = sorted(config.parent for config in folder.rglob("config.json"))
        if not found:
            problem = "has no run directory in it" if folder.is_dir() else "does not exist"
            raise UserError(f"{folder} {problem}; expected one made by an agent, such as runs/ENV/AGENT/seed-0")
        runs = {run.resolve(): run for run in found} | runs
    return list(runs.values())


def read_config(run: Path) -> dict[str, Any]:
    """config.json with at least `env_id`, `seed`, `agent` and `agent_file`; raises `UnusableRun`.

    In `.../<agent>/seed-<n>` the folder names the agent: a suite may hold an agent twice, with other settings.
    """
    try:
        config = json.loads((run / "config.json").read_text("utf-8"))
        config |= {"env_id": str(config["env_id"]), "agent": str(config["agent"]), "seed": int(config["seed"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableRun(f"config.json is damaged ({type(error).__name__}: {error})") from error
    config["agent_file"] = config["agent"]
    if run.name.startswith("seed-"):
        config["agent"] = run.absolute().parent.name
    return config


def read_csv(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Numeric `columns` of a CSV file that may be in use: a half-written last row is left out, an absent file is empty.

    Rows without a value in the first two columns are dropped. Raises `UnusableRun` where a column is missing.
    """
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    text = text[: text.rfind("\n") + 1]
    if not text.strip():
        return pd.DataFrame(columns=columns, dtype=float)
    table = pd.read_csv(io.StringIO(text), on_bad_lines="skip")
    if missing := set(columns) - set(table.columns):
        raise UnusableRun(f"{file.name} has no column {' or '.join(sorted(missing))}")
    table = table[list(columns)].apply(pd.to_numeric, errors="coerce")
    return table.dropna(subset=list(columns[:2]))


def collect(folders: Sequence[str | Path], suite: str | None = None, published: str | Path | None = None) -> Results:
    """Reads all runs below `folders`.

    Args:
        folders: run directories, folders with some anywhere inside, or folders of results: runs of other times and
            machines, of which nothing else is left.
        suite: name or file of the suite that says which tasks count, and their budgets; runs of a sweep are looked for
            in the folder of that name. None: all tasks, with the largest budget that a run has.
        published: CSV file with rows to compare with, see `read_published`.

    Raises:
        UserError: there is no run, or two runs share agent, task and seed, unless one of them alone is finished.
    """
    title, tasks = read_suite(suite) if suite else (Path(folders[0]).absolute().name, ())
    folders = [Path(folder) / title if (Path(folder) / title).is_dir() else Path(folder) for folder in folders]
    kept = {folder: load(folder) for folder in folders if (folder / PROVENANCE).exists()}
    folders = [folder for folder in folders if folder not in kept]
    if not suite and len(kept) == 1:
        (title,) = (results.title for results in kept.values())
    notes = [note for results in kept.values() for note in results.notes]
    found = [(folder, *piece) for folder, results in kept.items() for piece in _pieces(results)]
    for run in find_runs(folders):
        try:
            found.append((run, *read_run(run)))
        except UnusableRun as reason:
            notes.append(f"{run.parent.parent.name}/{run.parent.name}/{run.name} was left out: {reason}")
    if not suite:
        tasks = _tasks(kept.values(), [record for _, record, _ in found])
    chosen: dict[tuple[str, str, int], tuple[Path, dict[str, Any], pd.DataFrame]] = {}
    for place, record, rows in found:
        if record["task"] not in {task.env_id for task in tasks}:
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
    runs, evaluations = [record for _, record, _ in chosen.values()], [rows for _, _, rows in chosen.values()]
    runs += [record for record in _never_begun(folders, tasks) if tuple(record.values())[:3] not in chosen]
    runs.sort(key=lambda record: (record["task"], record["agent"], record["seed"]))
    notes += [note for note in _unequal_settings(runs) if note not in notes]
    if published:
        rows, note = read_published(Path(published), tasks)
        evaluations.append(rows)
        notes += [note] if note else []
    settings, environments = _factor(runs)
    return Results(title, tasks, _tidy(evaluations), tuple(runs), tuple(environments), settings, tuple(notes))


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
                yield f"{agent} on {task}: seeds differ in {name}: {seeds}"


def _pieces(results: Results) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Record and evaluations of each run of a folder of results, as `read_run` gives them."""
    by_run = dict(tuple(results.evaluations.groupby(["agent", "task", "seed"])))
    for run in results.runs:
        number = run["environment"]
        record = run | {
            "environment": None if number is None else results.environments[number],
            "settings": results.settings.get(run["agent"], {}) | run["settings"],
        }
        yield record, by_run.get((run["agent"], run["task"], run["seed"]), results.evaluations.iloc[:0])


def read_run(run: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The record of a run directory and its evaluations; raises `UnusableRun`."""
    config = read_config(run)
    args = config.get("args", {})
    try:
        status = json.loads((run / "status.json").read_text("utf-8"))
    except FileNotFoundError:
        status = {}  # killed before it wrote any
    except ValueError as error:
        raise UnusableRun(f"status.json is damaged ({error})") from error
    rows = read_csv(run / "eval.csv", ["env_step", "episode_return", "success_any", "success_last"])
    budget = int(args.get("total_env_steps") or (rows.env_step.max() if len(rows) else 0))
    every = int(args.get("eval_every", 1))
    due = (rows.env_step // every * every).where(rows.env_step < budget, budget)
    rows = rows.assign(env_step=due.astype(int), episodes=1).groupby("env_step", as_index=False)
    rows = rows.agg({"episodes": "sum", "episode_return": "mean", "success_any": "mean", "success_last": "mean"})
    identity = {"agent": config["agent"], "task": config["env_id"], "seed": config["seed"]}
    videos = sorted((run / "videos").glob("*.mp4"))
    record = identity | _progress(status, budget)
    record |= {
        "guidance": config.get("guidance"),
        "environment": {key: config.get(key) for key in ("commit", "versions", "hardware")},
        "settings": {name: value for name, value in args.items() if name not in ("env_id", "seed")}
        | {"agent": config["agent_file"]},
        "video": str(videos[-1]) if videos else None,
    }
    return record, rows.assign(**identity)


def _never_begun(folders: Iterable[Path], tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
    """Records of runs that failed before their config.json was there: a sweep leaves a status.json alone."""
    by_folder = {re.sub(r"[^\w.-]+", "_", task.env_id): task for task in tasks}
    for file in sorted(path for folder in folders for path in folder.rglob("seed-*/status.json")):
        run, status = file.parent, json.loads(file.read_text("utf-8"))
        task = by_folder.get(run.parent.parent.name)
        if task is None or (run / "config.json").exists() or not run.name.removeprefix("seed-").isdigit():
            continue
        identity = {"agent": run.parent.name, "task": task.env_id, "seed": int(run.name.removeprefix("seed-"))}
        yield identity | _progress(status, task.total_env_steps) | {"guidance": None, "settings": {}, "video": None}


def _progress(status: dict[str, Any], budget: int) -> dict[str, Any]:
    return {
        "state": status.get("state", "unknown"),
        "error": status.get("error"),
        "env_step": int(status.get("env_step") or 0),
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


def _tidy(parts: list[pd.DataFrame]) -> pd.DataFrame:
    parts = [part for part in parts if len(part)]
    table = pd.concat(parts) if parts else pd.DataFrame(columns=COLUMNS)
    kinds = dict.fromkeys(("seed", "env_step", "episodes"), int)
    kinds |= dict.fromkeys(("episode_return", "success_any", "success_last"), float)
    return table[COLUMNS].astype(kinds).sort_values(COLUMNS[:4], ignore_index=True)


# ---- suites and published numbers ----


def read_suite(suite: str) -> tuple[str, tuple[Task, ...]]:
    """Name and tasks of a suite, by its name or file; raises `UserError`."""
    loaded = load_suite(suite)
    entries = tomllib.loads(loaded.file.read_text("utf-8"))["tasks"]
    return loaded.name, tuple(map(_task, entries))


def _task(entry: dict[str, Any]) -> Task:
    bounds = entry.get("bounds")
    return Task(entry["env_id"], entry["total_env_steps"], tuple(bounds) if bounds else None)


def read_published(path: Path, tasks: Sequence[Task]) -> tuple[pd.DataFrame, str | None]:
    """Rows of a CSV file with the columns agent, task, seed, env_step, episode_return, and a note on what was left out.

    A task is known by its id or by its bare name: `walker_walk` is `dm_control/walker-walk-v0`. Agents get a name that
    ends in `PUBLISHED`.

    Raises:
        UserError: the file or a column is missing, or a run is in it twice.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--published {path} cannot be read: {error}") from error
    needed = COLUMNS[:4] + ["episode_return"]
    if missing := [name for name in needed if name not in table]:
        raise UserError(f"--published {path} has no column {', '.join(missing)}; expected {', '.join(needed)}")
    names = {bare_name(task.env_id): task.env_id for task in tasks}
    known = table.task.astype(str).map(bare_name).map(names)
    left_out = sorted(set(table.task[known.isna()].astype(str)))
    note = f"{path.name}: left out tasks that are not compared here: {', '.join(left_out)}" if left_out else None
    table = table.assign(task=known, agent=table.agent.astype(str) + PUBLISHED).dropna(subset=needed)
    if (twice := table[table.duplicated(COLUMNS[:4])]).size:
        agent, task, seed, step = twice.iloc[0][COLUMNS[:4]]
        raise UserError(f"--published {path} has {agent} on {task}, seed {seed}, env step {step} more than once")
    return table.reindex(columns=COLUMNS).assign(episodes=1), note


def bare_name(task: str) -> str:
    """`dm_control/walker-walk-v0` without namespace, version, case and choice of separator: `walker walk`."""
    name, _, version = task.split("/")[-1].rpartition("-v")
    name = name if version.isdigit() else task.split("/")[-1]
    return name.replace("_", " ").replace("-", " ").lower()


# ---- folders of results ----


def save(results: Results, folder: Path) -> None:
    """Writes what cannot be made again without the runs: evaluations.csv and provenance.json."""
    shown = [{key: value for key, value in run.items() if key != "video"} for run in results.runs]
    seconds = [run["wall_seconds"] or 0 for run in results.runs]
    provenance = {
        "suite": results.title,
        "tasks": [dataclasses.asdict(task) for task in results.tasks],
        "seeds": sorted({run["seed"] for run in results.runs}),
        "guidance": {
            agent: sorted({str(run["guidance"]) for run in results.runs if run["agent"] == agent})
            for agent in results.settings
        },
        "wall_seconds": round(sum(seconds), 1),
        "environments": results.environments,
        "settings": results.settings,
        "notes": results.notes,
        "baseline": results.baseline,
        "runs": shown,
    }
    folder.mkdir(parents=True, exist_ok=True)
    results.evaluations.to_csv(folder / "evaluations.csv", index=False, lineterminator="\n")
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", "utf-8")


def load(folder: Path) -> Results:
    """Reads what `save` wrote; raises `UserError`."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text("utf-8"))
        evaluations = pd.read_csv(folder / "evaluations.csv", dtype={"agent": str, "task": str})
        return Results(
            provenance["suite"],
            tuple(map(_task, provenance["tasks"])),
            _tidy([evaluations]),
            tuple(run | {"video": None} for run in provenance["runs"]),
            tuple(provenance["environments"]),
            provenance["settings"],
            tuple(provenance["notes"]),
            provenance.get("baseline"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no complete results ({type(error).__name__}: {error}); see `semore-bench results build`"
        ) from error


def open_results(folders: Sequence[Path], suite: str | None = None, published: Path | None = None) -> Results:
    """`load` of one folder of results, or `collect` of everything else."""
    if len(folders) == 1 and (folders[0] / PROVENANCE).exists() and not suite and not published:
        return load(folders[0])
    return collect(folders, suite, published)
