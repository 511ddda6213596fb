"""Scores of evaluations, of which tables, plots and the report are made, and the folders of results that keep them."""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from semore_bench.eval_settings import CLEAN
from semore_bench.families import Task
from semore_bench.names import PUBLISHED, printable
from semore_bench.reading import (
    Count,
    Finite,
    Positive,
    Seconds,
    Share,
    Unreadable,
    check_fields,
    read_csv,
    read_json,
)
from semore_bench.suites import check_bounds
from wrappers.errors import UserError

ALL = "all tasks"
"""stands for all tasks together where tasks are named"""
PROVENANCE = "provenance.json"
"""the file that makes a folder one of results"""
COLUMNS = {
    "agent": str,
    "task": str,
    "seed": Count,
    "env_step": Count,
    "episodes": Count,
    "episode_return": Finite | None,
    "success_any": Share | None,
    "success_last": Share | None,
    "setting": str | None,
    "wall_seconds": Seconds | None,
}
"""of evaluations, in their order; files in which all are clean have no setting, those without any time no wall_seconds,
which are the seconds of work on the run until then"""
KEY = ("agent", "task", "seed", "env_step", "setting")
"""columns that tell evaluations apart"""
KEPT = {
    "suite": str,
    "tasks": list[dict],
    "environments": list[dict],
    "settings": dict,
    "notes": list[str],
    "baseline": str | None,
    "runs": list[dict],
    "usual": str | None,
    "teachers": dict | None,
}
KEPT_RUN = {
    "agent": str,
    "task": str,
    "seed": Count,
    "state": str,
    "error": str | None,
    "env_step": Count,
    "total_env_steps": Positive,
    "wall_seconds": Finite | None,
    "guidance": str | None,
    "settings": dict,
    "environment": Count | None,
}
"""what provenance.json holds, and each run in it"""

SCORES = ("episode_return", "success_any", "success_last")


@dataclass(frozen=True)
class Results:
    """Everything that tables, plots and the report show.

    `evaluations`: a row per agent, task, seed and evaluation (the mean of its episodes), with `COLUMNS`, sorted;
    `env_step` is where the evaluation was due: it takes place at the first decision that reaches it. `runs`: a
    JSON-able record per run directory. `environments`: the commits, versions and machines that the runs name by their
    index. `settings`: of each agent, those that all its runs share, and the agent file in `agent`. `notes`: what was
    left out, and why. `baseline`: the agent that the others were compared with when the results were kept. `usual`: the
    evaluation setting that runs are trained in; `teachers`: of guidance by its name, who trained its models with what;
    `chosen`: the one whose scores and curves are asked for, None for that.
    """

    title: str
    tasks: tuple[Task, ...]
    evaluations: pd.DataFrame
    runs: tuple[dict[str, Any], ...] = ()
    environments: tuple[dict[str, Any], ...] = ()
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    baseline: str | None = None
    usual: str = CLEAN
    teachers: dict[str, str] = field(default_factory=dict)
    chosen: str | None = None

    @property
    def setting(self) -> str:
        """The evaluation setting of `scores` and all that is made of them."""
        return self.chosen or self.usual

    @property
    def eval_settings(self) -> list[str]:
        """Every setting that something was evaluated in, the usual one first."""
        return [self.usual, *sorted(set(self.evaluations.setting) - {self.usual})]

    @property
    def shown(self) -> pd.DataFrame:
        """The evaluations in `setting`, without the times of runs on other hardware than `hardware`."""
        rows = self.evaluations[self.evaluations.setting == self.setting]
        hardware = self.hardware
        elsewhere = [key for key, machine in self.hardware_of.items() if machine != hardware]
        if not elsewhere:
            return rows
        apart = pd.MultiIndex.from_frame(rows[["agent", "task", "seed"]]).isin(elsewhere)
        return rows.assign(wall_seconds=rows.wall_seconds.mask(apart))

    @property
    def hardware_of(self) -> dict[tuple[str, str, int], str]:
        """(Agent, task, seed) -> the device and processor of each run of which they are known."""
        machines = [environment.get("hardware") or {} for environment in self.environments]
        return {
            (run["agent"], run["task"], run["seed"]): describe_hardware(machines[run["environment"]])
            for run in self.runs
            if run.get("environment") is not None and machines[run["environment"]]
        }

    @property
    def hardware(self) -> str | None:
        """That of most runs of the baseline, or of all, which alone are compared by time; None where none is known."""
        known = self.hardware_of
        of_baseline = [machine for (agent, _, _), machine in known.items() if agent == self.baseline]
        counted = Counter(of_baseline or known.values()).most_common(1)
        return counted[0][0] if counted else None

    def choose(self, setting: str | None) -> "Results":
        """The same results, asked for another evaluation setting; raises `UserError` if there is none of that name."""
        if setting is not None and setting not in self.eval_settings:
            known = " or ".join(map(printable, self.eval_settings))
            raise UserError(f"--setting {printable(setting)}: nothing was evaluated there; expected {known}")
        return dataclasses.replace(self, chosen=setting)

    @property
    def agents(self) -> list[str]:
        """Own agents, those on most tasks first, then by name; then published ones."""
        names = {run["agent"] for run in self.runs} | set(self.evaluations.agent)
        return in_order(names, zip(self.evaluations.agent, self.evaluations.task, strict=True))

    @property
    def fractions(self) -> list[float]:
        """Shares of the budget at which every task was evaluated, ascending; for published rows alone, tenths."""
        own = self.shown[~self.shown.agent.str.endswith(PUBLISHED)]
        if not len(own):
            return [tenth / 10 for tenth in range(1, 11)]
        budgets = {task.env_id: task.total_env_steps for task in self.tasks}
        steps = own.groupby("task").env_step.unique()
        return sorted(
            set.intersection(*({round(step / budgets[task], 12) for step in steps[task]} for task in steps.index))
        )

    def scores(self, at: int | None = None, fraction: float = 1.0) -> pd.DataFrame:
        """The score of every run that got that far, columns agent, task, seed, env_step, score, normalised, success,
        wall_seconds.

        Args:
            at: env step; the last evaluation until then counts, in runs that were evaluated then or later. None: the
                end of each task's budget.
            fraction: of the budget, if `at` is None.
        """
        shown = self.shown
        parts = [shown.iloc[:0].assign(score=[], normalised=[])]
        for task in self.tasks:
            step = round(task.total_env_steps * fraction) if at is None else at
            rows = shown[shown.task == task.env_id]
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
        columns = "agent task seed env_step score normalised success wall_seconds".split()
        return rows[columns].reset_index(drop=True)

    def normalised_curves(self, fractions: Sequence[float], times: bool = False) -> dict[str, dict[str, np.ndarray]]:
        """Agent -> task -> normalised scores (n_seeds, n_fractions): those of `scores` at shares of the budget.

        NaN where a run did not get that far; without tasks of which nobody knows the best return. `times`: not the
        scores, but the seconds of these evaluations.
        """
        curves: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for task in self.tasks:
            if task.bounds is None:
                continue
            low, high = task.bounds
            wanted = np.array([round(task.total_env_steps * fraction) for fraction in fractions])
            rows = self.shown[self.shown.task == task.env_id]
            seeds: dict[str, list[np.ndarray]] = defaultdict(list)
            for (agent, _), run in rows.groupby(["agent", "seed"]):
                steps = run.env_step.to_numpy()
                values = (run.success_any if task.success else run.episode_return).to_numpy()
                values = run.wall_seconds.to_numpy() if times else (values - low) / (high - low)
                spacing = np.diff(steps).max(initial=0) if agent.endswith(PUBLISHED) else 0  # as in `scores`
                last = np.searchsorted(steps, wanted, side="right") - 1
                reached = (last >= 0) & (steps[-1] + spacing >= wanted)
                seeds[agent].append(np.where(reached, values[last], np.nan))
            for agent, curve in seeds.items():
                curves[agent][task.env_id] = np.stack(curve)
        return curves


def describe_hardware(hardware: Mapping[str, Any]) -> str:
    """Device and processor in one line, for people."""
    device, processor = hardware.get("device"), hardware.get("processor")
    return str(processor) if device == "cpu" else f"{device} ({processor})"


def in_order(agents: Iterable[str], evaluated: Iterable[tuple[str, str]]) -> list[str]:
    """Agents as figures list them, given pairs of agent and task: those compared most get the clearest colours."""
    tasks = Counter(agent for agent, _ in set(evaluated))
    return sorted(agents, key=lambda agent: (agent.endswith(PUBLISHED), -tasks[agent], agent))


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """The columns of evaluations in their order and types, sorted."""
    kinds = dict.fromkeys(("seed", "env_step", "episodes"), int) | dict.fromkeys((*SCORES, "wall_seconds"), float)
    return table.reindex(columns=list(COLUMNS)).astype(kinds).sort_values(list(KEY), ignore_index=True)


# ---- folders of results ----


def save(results: Results, folder: Path) -> None:
    """Writes what cannot be regenerated without the runs: evaluations.csv and provenance.json."""
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
    evaluations = results.evaluations
    if results.usual != CLEAN:
        provenance["usual"] = results.usual
    if results.teachers:
        provenance["teachers"] = results.teachers
    if (evaluations.setting == CLEAN).all():
        evaluations = evaluations.drop(columns="setting")
    if evaluations.wall_seconds.isna().all():
        evaluations = evaluations.drop(columns="wall_seconds")
    folder.mkdir(parents=True, exist_ok=True)
    evaluations.to_csv(folder / "evaluations.csv", index=False, lineterminator="\n")
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", "utf-8")


def load(folder: Path) -> Results:
    """Reads what `save` wrote; raises `UserError`."""
    try:
        return _load(folder)
    except Unreadable as error:
        raise UserError(f"{folder} holds no complete results: {error}; see `semore-bench results build`") from None


def _load(folder: Path) -> Results:
    try:
        kept = read_json(folder / PROVENANCE, KEPT)
        tasks = tuple(_task(entry, f"tasks, number {number}") for number, entry in enumerate(kept["tasks"], 1))
        runs = tuple(
            check_fields(run, KEPT_RUN, f"runs, number {number}") | {"video": None}
            for number, run in enumerate(kept["runs"], 1)
        )
        for agent, settings in kept["settings"].items():
            check_fields(settings, {}, f"settings of {printable(agent)}")
        teachers = check_fields(kept["teachers"] or {}, dict.fromkeys(kept["teachers"] or {}, str), "teachers")
        budgets = {task.env_id for task in tasks}
        for number, run in enumerate(runs, 1):
            if run["task"] not in budgets or (run["environment"] or 0) >= max(1, len(kept["environments"])):
                raise Unreadable(f"runs, number {number}: its task or its environment is not in the file")
    except Unreadable as error:
        raise Unreadable(f"{PROVENANCE}: {error}") from None
    try:
        columns = read_csv(folder / "evaluations.csv", COLUMNS)
        lines: dict[tuple[Any, ...], int] = {}
        columns["setting"] = [setting or CLEAN for setting in columns["setting"]]
        for line, *key in zip(columns.pop("line"), *(columns[name] for name in KEY), strict=True):
            if key[1] not in budgets:
                raise Unreadable(f"line {line}, column task: {key[1]} is not among the tasks in {PROVENANCE}")
            if lines.setdefault(tuple(key), line) != line:
                raise Unreadable(f"lines {lines[tuple(key)]} and {line} are of the same evaluation")
    except Unreadable as error:
        raise Unreadable(f"evaluations.csv: {error}") from None
    return Results(
        printable(kept["suite"]),
        tasks,
        tidy(pd.DataFrame(columns)),
        runs,
        tuple(kept["environments"]),
        kept["settings"],
        tuple(map(printable, kept["notes"])),
        kept["baseline"],
        kept["usual"] or CLEAN,
        {printable(guidance): printable(teacher) for guidance, teacher in teachers.items()},
    )


def _task(entry: dict[str, Any], where: str) -> Task:
    kinds = {"env_id": str, "total_env_steps": Positive, "bounds": tuple[Finite, Finite] | None}
    checked = check_fields(entry, kinds, where)
    bounds = None if checked["bounds"] is None else check_bounds(checked["bounds"], where)
    return Task(checked["env_id"], checked["total_env_steps"], bounds)
