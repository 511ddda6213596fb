"""`semore-bench table`: agents compared per task and over a suite, with intervals and every seed accounted for."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from semore_bench.collect import open_results
from semore_bench.estimates import aggregate, bootstrap, probability_of_improvement
from semore_bench.generalisation import generalisation
from semore_bench.names import PUBLISHED, folder_name
from semore_bench.scores import ALL, Results
from semore_bench.table_text import Document, as_latex, as_markdown, rounded, with_interval
from semore_bench.wall_clock import time_columns, time_notes, timed_runs
from wrappers.errors import UserError

STATISTICS = ("mean", "median", "iqm", "optimality_gap")


@dataclass(frozen=True)
class Table:
    """What `make_table` returns.

    `rows`: a row per task (`ALL` first) and agent, those with most tasks first and among these the best IQM; scores of
    a task in its own unit, scores of `ALL` and every optimality gap normalised; NaN where a number does not exist.
    `caption`: what is compared. `notes`: seeds that failed or are missing, and whatever else a reader must know.
    `guidance`: who trained the models that guide which agents.
    """

    caption: str
    rows: pd.DataFrame
    notes: tuple[str, ...]
    baseline: str | None
    guidance: tuple[str, ...] = ()


def table(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),),
    suite: str | None = None,
    baseline: str | None = None,
    at: int | None = None,
    published: Path | None = None,
    setting: str | None = None,
    output: Path | None = None,
) -> None:
    """Compare agents: mean, median, IQM with 95% intervals, optimality gap, success, time, and how many seeds.

    Runs that were evaluated in several settings are compared in that of their training; a table of the others follows.

    Args:
        runs: Run directories, folders with some anywhere inside, or a folder of results.
        suite: Suite by name or file: which tasks are compared, and at which budget (default: all that were run).
        baseline: Agent against which the probability of improvement is given, and the time to its final IQM.
        at: Env step at which agents are compared (default: the end of each task's budget).
        published: CSV file (agent, task, seed, env_step, episode_return) with numbers to show beside, marked as such.
        setting: Evaluation setting, such as background-hard (default: the one that the runs were trained in).
        output: Folder for table.md, table.csv and table.tex, and such of each setting if there are several.
    """
    results = open_results(runs, suite, published, setting)
    made = make_table(results, at, baseline)
    texts = [markdown(made)]
    if setting is None and (summary := generalisation(results, at)):
        texts.append(as_markdown(summary.document))
    if output is not None:
        write_tables(results, output, at, baseline)
    print("\n".join(texts), end="")
    if output is not None:
        print(f"\nwrote table.md, table.csv and table.tex to {output}")


def write_tables(results: Results, folder: Path, at: int | None = None, baseline: str | None = None) -> None:
    """Writes table.md, .csv and .tex; of other settings table-<setting>, and generalisation, which compares them."""
    write_table(make_table(results.choose(None), at, baseline), folder)
    for other in map(results.choose, results.eval_settings[1:]):
        if len(other.scores(at)):
            write_table(make_table(other, at, baseline), folder, f"table-{folder_name(other.setting)}")
    if summary := generalisation(results, at):
        _write(summary.document, summary.rows, folder, "generalisation")


def write_table(made: Table, folder: Path, name: str = "table") -> None:
    """Writes it as Markdown, CSV and LaTeX."""
    _write(_document(made), made.rows, folder, name)


def _write(document: Document, rows: pd.DataFrame, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(as_markdown(document), "utf-8")
    (folder / f"{name}.tex").write_text(as_latex(document), "utf-8")
    rows.round(6).to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")


# ---- numbers ----


def make_table(results: Results, at: int | None = None, baseline: str | None = None) -> Table:
    """Computes the table of `results` at env step `at` (None: the end of each budget); raises `UserError`."""
    agents = results.agents
    check_baseline(results, baseline)
    results = replace(results, baseline=baseline or results.baseline)
    scores = results.scores(at)
    if not len(scores):
        when = "the end of its budget" if at is None else f"env step {at}"
        raise UserError(f"no run has been evaluated at {when} yet; choose an earlier step with --at")
    census = seed_census(results, scores)
    scaled = [task.env_id for task in results.tasks if task.bounds]
    rows = [
        _row(ALL, agent, census[census.task.isin(scaled)], scores[scores.task.isin(scaled)], baseline)
        for agent in agents
        if scaled
    ]
    for task in results.tasks:
        here, counts = scores[scores.task == task.env_id], census[census.task == task.env_id]
        rows += [_row(task.env_id, agent, counts, here, baseline) for agent in agents]
    if timed := timed_runs(results, scores):
        for row in rows:
            where, agent = str(row["task"]), str(row["agent"])
            tasks = scaled if where == ALL else [where]
            row |= time_columns(tasks, agent, baseline, timed, normalised=where == ALL)
    order = {task: number for number, task in enumerate([ALL, *(task.env_id for task in results.tasks)])}
    frame = pd.DataFrame(rows)
    frame = frame.assign(order=frame.task.map(order))
    frame = frame.sort_values(["order", "tasks", "iqm"], ascending=[True, False, False], kind="stable")
    frame = frame.drop(columns="order").reset_index(drop=True)
    where = "the end of each task's budget" if at is None else f"{at:,} env steps"
    caption = f"{results.title} at {where}, {len(results.tasks)} task{'s' * (len(results.tasks) > 1)}"
    if results.setting != results.usual:
        caption += f", evaluated in {results.setting}"
    notes = *time_notes(results, scores, baseline), *make_notes(results, census)
    return Table(caption, frame, notes, baseline, tuple(_guidance(results)))


def _guidance(results: Results) -> Iterator[str]:
    for guidance, trained in results.teachers.items():
        agents = sorted({run["agent"] for run in results.runs if run["guidance"] == guidance})
        yield f"guidance of {', '.join(agents)} is {guidance}: {trained}"


def check_baseline(results: Results, baseline: str | None) -> None:
    """Raises `UserError` if there is no such agent."""
    if baseline is not None and baseline not in results.agents:
        raise UserError(f"--baseline {baseline} is not among the agents: {', '.join(results.agents)}")


def seed_census(results: Results, scores: pd.DataFrame) -> pd.DataFrame:
    """Which seeds there are: a row per agent and task with lists of seeds.

    `scored` have a score; `failed` crashed for good; `unfinished` did not get as far as asked (yet); `missing` have no
    run; `extra` are seeds that most others lack. A seed is expected everywhere when at least half of the agents and
    tasks have it, among own agents and for each published agent by itself.
    """
    states = {(run["agent"], run["task"], run["seed"]): run["state"] for run in results.runs}
    seeds: dict[tuple[str, str], set[int]] = defaultdict(set)
    scored: dict[tuple[str, str], set[int]] = defaultdict(set)
    for agent, task, seed in zip(scores.agent, scores.task, scores.seed, strict=True):
        scored[agent, task].add(seed)
    for agent, task, seed in (*states, *zip(scores.agent, scores.task, scores.seed, strict=True)):
        seeds[agent, task].add(seed)
    rows = []
    for group in _groups(results.agents):
        have = {(agent, task.env_id): seeds[agent, task.env_id] for agent in group for task in results.tasks}
        counts = Counter(seed for own in have.values() for seed in own)
        filled = sum(map(bool, have.values()))
        expected = {seed for seed, count in counts.items() if 2 * count >= filled}
        for (agent, task), own in have.items():
            done = scored[agent, task]
            failed = {seed for seed in own if states.get((agent, task, seed)) == "failed"}
            row = {"scored": done, "failed": failed, "unfinished": own - done - failed}
            row |= {"missing": expected - own, "extra": own - expected}
            rows.append({"agent": agent, "task": task} | {name: sorted(values) for name, values in row.items()})
    return pd.DataFrame(rows)


def _groups(agents: list[str]) -> list[list[str]]:
    own = [agent for agent in agents if not agent.endswith(PUBLISHED)]
    return [own, *([agent] for agent in agents if agent.endswith(PUBLISHED))]


def _row(name: str, agent: str, census: pd.DataFrame, scores: pd.DataFrame, baseline: str | None) -> dict[str, object]:
    """One agent's row over the tasks of `census`."""
    unit = "normalised" if name == ALL else "score"
    counts = census[census.agent == agent]
    own = scores[scores.agent == agent]
    by_task = {task: rows[[unit]].to_numpy() for task, rows in own.groupby("task")}
    row: dict[str, object] = {"task": name, "agent": agent, "source": "runs"}
    if agent.endswith(PUBLISHED):
        row["source"] = "published"
    row |= dict.fromkeys(("mean", "std", "median", "iqm", "iqm_low", "iqm_high"), np.nan)
    row |= dict.fromkeys(("optimality_gap", "optimality_gap_low", "optimality_gap_high"), np.nan)
    row |= dict.fromkeys(("p_improvement", "p_improvement_low", "p_improvement_high", "success_rate"), np.nan)
    if by_task:
        point, (low, high) = bootstrap(list(by_task.values()), aggregate)
        row |= dict(zip(STATISTICS, point, strict=True))
        row |= {"iqm_low": low[2], "iqm_high": high[2]}
        if unit == "normalised":
            row |= {"optimality_gap_low": low[3], "optimality_gap_high": high[3]}
        else:  # the score's own unit says nothing about a gap to 1
            row |= {"median": own.score.median(), "optimality_gap": 1 - own.normalised.clip(upper=1).mean()}
        # over seeds, each with its mean over the tasks: the spread of what is averaged
        seeds = own.pivot(index="seed", columns="task", values=unit).dropna().mean(axis=1)
        row["std"] = seeds.std(ddof=1)
        row["success_rate"] = own.groupby("task").success.mean().mean()
    against = scores[scores.agent == baseline]
    if baseline not in (None, agent) and by_task:
        theirs = {task: rows[[unit]].to_numpy() for task, rows in against.groupby("task")}
        if set(theirs) == set(by_task):
            pairs = [*by_task.values(), *theirs.values()]
            (point,), ((low,), (high,)) = bootstrap(pairs, probability_of_improvement)
            row |= {"p_improvement": point, "p_improvement_low": low, "p_improvement_high": high}
    row |= {"tasks": len(by_task), "tasks_expected": len(counts)}
    row |= {kind: int(counts[kind].map(len).sum()) for kind in _KINDS}
    sizes = [len(rows) for rows in by_task.values()] or [0]  # seeds of the tasks counted in "tasks"
    row |= {"seeds_low": min(sizes), "seeds_high": max(sizes)}
    return row


_KINDS = ("scored", "failed", "unfinished", "missing", "extra")


def make_notes(results: Results, census: pd.DataFrame) -> Iterator[str]:
    """What a reader must know: seeds that failed or are missing, what is not comparable, what was left out."""
    errors = {(run["agent"], run["task"], run["seed"]): run["error"] for run in results.runs}
    begun = census[["scored", "failed", "unfinished"]].map(len).sum(axis=1) > 0
    tried = set(census.task[begun])
    words = {"unfinished": "not there yet", "missing": "missing", "extra": "extra: most others lack it"}
    if results.setting != results.usual:
        words["unfinished"] = f"not evaluated in {results.setting}"
    uneven: dict[tuple[str, str], list[str]] = {}  # agent and what of its seeds -> tasks
    for row in census[begun].itertuples():
        for seed in row.failed:
            lines = (errors[row.agent, row.task, seed] or "").strip().splitlines()
            yield f"{row.agent} on {row.task}: seed {seed} failed" + (f" ({lines[-1][:160]})" if lines else "")
        for kind in words:
            if seeds := getattr(row, kind):
                what = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} {words[kind]}"
                uneven.setdefault((row.agent, what), []).append(row.task)
    for (agent, what), tasks in uneven.items():
        yield f"{agent} on {', '.join(tasks)}: {what}"
    without = census[census.task.isin(tried) & (census.scored.map(len) == 0)]
    lacking: dict[tuple[str, ...], list[str]] = {}  # tasks -> the agents that have a score on none of these
    for agent, tasks in without.groupby("agent", sort=False).task:
        lacking.setdefault(tuple(tasks), []).append(agent)
    for absent, agents in lacking.items():
        who = "it is" if len(agents) == 1 else "they are"
        yield (
            f"{', '.join(agents)}: no score on {', '.join(absent)}; "
            f"over all tasks {who} compared on the others only: not fair"
        )
    if untried := [task.env_id for task in results.tasks if task.env_id not in tried]:
        yield f"nothing was run on {', '.join(untried)}"
    if len(set(census[begun & ~census.agent.str.endswith(PUBLISHED)].scored.map(len))) > 1:
        yield "numbers of seeds are unequal: a task with more seeds weighs more in IQM and optimality gap"
    for task in results.tasks:
        if not task.bounds:
            yield f"{task.env_id} is not in `{ALL}`: nobody knows its best return; give its `bounds` in a suite"
    if any(agent.endswith(PUBLISHED) for agent in results.agents):
        yield f"rows marked{PUBLISHED} come from a file, under their authors' protocol, and were not measured here"
    yield from results.notes


# ---- text ----


def markdown(made: Table) -> str:
    """The table as Markdown."""
    return as_markdown(_document(made))


def latex(made: Table) -> str:
    """The table as LaTeX for the booktabs package."""
    return as_latex(_document(made))


def _document(made: Table) -> Document:
    sections = []
    for task, rows in made.rows.groupby("task", sort=False):
        rows = rows[rows[["scored", "failed", "unfinished"]].any(axis=1)]
        if len(rows):  # a note says where nothing was run at all, and who has no score on which tasks
            title = f"{task}, normalised" if task == ALL else task
            sections.append((title, _columns(made, rows, normalised=task == ALL)))
    first = "IQM: mean of the middle half of the runs; [95% stratified bootstrap interval over seeds]"
    return Document(made.caption, sections, [first, *made.guidance, *made.notes])


def _columns(made: Table, rows: pd.DataFrame, normalised: bool) -> dict[str, list[str]]:
    """Header -> cells."""
    digits = 3 if normalised or rows[["iqm", "iqm_high"]].max(axis=None) <= 1 else 1
    columns = {
        "agent": list(rows.agent),
        "IQM [95%]": [with_interval(row, "iqm", digits) for row in rows.itertuples()],
        "mean ± std": [f"{rounded(r.mean, digits)} ± {rounded(r.std, digits)}" for r in rows.itertuples()],
        "median": [rounded(value, digits) for value in rows["median"]],
        "optimality gap" + " [95%]" * normalised: [
            with_interval(row, "optimality_gap", 3) for row in rows.itertuples()
        ],
    }
    if made.baseline is not None:
        columns[f"P(better than {made.baseline}) [95%]"] = [
            with_interval(row, "p_improvement", 2) for row in rows.itertuples()
        ]
    if "seconds" in rows:
        columns["seconds per run"] = [rounded(value, 0) for value in rows.seconds]
        if made.baseline is not None:
            columns[f"time to {made.baseline}'s IQM [95%]"] = [
                with_interval(row, "time_share", 2).replace("inf", "∞") for row in rows.itertuples()
            ]
    if rows.success_rate.notna().any():
        columns["success rate"] = [rounded(value, 2) for value in rows.success_rate]
    if normalised:
        columns["tasks"] = [f"{row.tasks} of {row.tasks_expected}" for row in rows.itertuples()]
    columns["seeds"] = [_span(row.seeds_low, row.seeds_high) for row in rows.itertuples()]
    for kind in _KINDS[1:]:
        if kind in ("failed", "missing") or rows[kind].any():
            columns[kind] = [str(value) for value in rows[kind]]
    return columns


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"
