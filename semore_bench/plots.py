"""`semore-bench plot`: learning curves, performance profiles and sample efficiency, for the screen and for print."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.markup import escape

from semore_bench.collect import open_results
from semore_bench.estimates import bootstrap, iqm, iqm_of_all, mean
from semore_bench.eval_settings import CLEAN, setting_of
from semore_bench.looks import LONGEST_LABEL, STYLE, Look, add_legend, agent_looks, save
from semore_bench.names import printable, shorten
from semore_bench.records import UnusableRun, find_runs, read_config, read_episodes
from semore_bench.scores import PROVENANCE, Results, in_order
from semore_bench.wall_clock import curve_in_time, timed_runs
from wrappers.errors import UserError

Metric = Literal["episode_return", "success_any", "success_last"]
Axis = Literal["steps", "time"]
SECONDS = "seconds of a run on one worker"
AXIS_LABELS = {
    "episode_return": "episode return",
    "success_any": "success rate (any step)",
    "success_last": "success rate (last step)",
}


@dataclass(frozen=True)
class Curve:
    """One run's learning curve: `values` (n,) at `steps` (n,) environment steps, or seconds, ascending."""

    env_id: str
    agent: str
    seed: int
    steps: np.ndarray
    values: np.ndarray
    from_evaluation: bool  # or else from training episodes


def plot(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),),
    output: Path = Path("curves.png"),
    metric: Metric = "episode_return",
    aggregate: Literal["mean", "iqm"] = "iqm",
    kind: Literal["curves", "profiles", "efficiency", "settings"] = "curves",
    suite: str | None = None,
    published: Path | None = None,
    setting: str | None = None,
    x: Axis = "steps",
) -> None:
    """Draw learning curves: a panel per environment, a colour per agent, a thin line per seed.

    Args:
        runs: Run directories, folders with some anywhere inside, or a folder of results.
        output: Where the figure goes; the ending decides the format: .png, .svg or .pdf.
        metric: What curves show: the return, or the share of successful episodes.
        aggregate: The bold line over seeds: their mean, or the mean of their middle half with its 95% interval.
        kind: Curves, or, over all tasks: performance profiles (the share of runs above each score), sample efficiency
            (the IQM after a quarter, half and all of the budget), or settings (the IQM in each evaluation setting).
        suite: Suite by name or file: the tasks to draw.
        published: CSV file with numbers to show beside, see `semore-bench table`.
        setting: Evaluation setting to draw, such as background-hard (default: the one that the runs were trained in).
        x: Horizontal axis of curves and efficiency: env steps, or the seconds that one worker has taken until then.
    """
    console = Console(highlight=False, soft_wrap=True)
    if x == "time" and kind not in ("curves", "efficiency"):
        raise UserError(f"--x time is for --kind curves and efficiency, not for {kind}")
    if kind != "curves" or x == "time" or suite or published or any((folder / PROVENANCE).exists() for folder in runs):
        results = open_results(runs, suite, published, setting)
        for note in results.notes:
            console.print(f"[yellow]note[/] {escape(note)}")
        efficiency = plot_time if x == "time" else plot_efficiency
        draw = {"profiles": plot_profiles, "efficiency": efficiency, "settings": plot_settings}.get(kind)
        figure = draw(results) if draw else plot_curves(results_curves(results, metric, x), None, metric, aggregate, x)
        save(figure, output)
        console.print(f"drew {len(results.agents)} agents on {len(results.tasks)} tasks: {escape(str(output))}")
        return
    curves, skipped = [], 0
    found = find_runs(runs)
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(printable(note))}")
    for run in found.runs:
        try:
            curves.append(load_curve(run, metric, setting))
        except UnusableRun as reason:
            skipped += 1
            console.print(f"[yellow]skipped[/] {escape(printable(f'{run}: {reason}'))}")
    counts = Counter((curve.agent, curve.env_id, curve.seed) for curve in curves)
    if twice := [key for key, count in counts.items() if count > 1]:
        agent, env_id, seed = twice[0]
        raise UserError(
            f"{' '.join(map(str, runs))}: {agent} on {env_id} with seed {seed} is there more than once; name the "
            "folder of one sweep, or a --suite"
        )
    if not curves:
        what = "has finished an episode yet" if setting is None else f"was evaluated in the setting {setting}"
        raise UserError(f"nothing to draw in {' '.join(map(str, runs))}: no run {what}")
    plot_curves(curves, output, metric, aggregate)
    console.print(f"drew {len(curves)} of {len(curves) + skipped} runs: {escape(str(output))}")


# ---- learning curves ----


def plot_runs(
    run_dirs: Iterable[str | Path],
    output: str | Path | None = None,
    metric: Metric = "episode_return",
    aggregate: Literal["mean", "iqm"] = "iqm",
) -> Figure:
    """`plot_curves` of every run in or below `run_dirs`; raises `UnusableRun` if one has nothing to draw."""
    return plot_curves([load_curve(run, metric) for run in find_runs(run_dirs).runs], output, metric, aggregate)


def load_curve(run: Path, metric: Metric = "episode_return", setting: str | None = None) -> Curve:
    """Reads a run's learning curve: evaluations, averaged per step, or training episodes if there are none.

    `setting`: of the evaluations; None for the usual one. A row that is being written at this moment is left out.
    Raises `UnusableRun` if there is nothing to draw.
    """
    config = read_config(run)
    for name in ("eval", "train") if setting is None else ("eval",):
        episodes = read_episodes(run, name)
        wanted = setting if setting is not None else setting_of(config["args"]) if name == "eval" else CLEAN
        by_step: dict[int, list[float]] = defaultdict(list)
        for step, value, where in zip(episodes["env_step"], episodes[metric], episodes["setting"], strict=True):
            if value is not None and where == wanted:
                by_step[step].append(value)
        if by_step:
            steps = np.array(sorted(by_step))
            values = np.array([fmean(by_step[step]) for step in steps])
            return Curve(config["env_id"], config["agent"], config["seed"], steps, values, name == "eval")
    where = "in eval.csv or train.csv" if setting is None else f"of the setting {setting} in eval.csv"
    raise UnusableRun(f"no {AXIS_LABELS[metric]} {where} yet")


def results_curves(results: Results, metric: Metric = "episode_return", x: Axis = "steps") -> list[Curve]:
    """A curve per run of `results` that has been evaluated, over env steps or the run's time; raises `UserError` if
    there is none."""
    column = {"steps": "env_step", "time": "wall_seconds"}[x]
    rows = results.shown.dropna(subset=[metric, column])
    curves = [
        Curve(task, agent, seed, run[column].to_numpy(), run[metric].to_numpy(), True)
        for (task, agent, seed), run in rows.groupby(["task", "agent", "seed"])
    ]
    if not curves:
        with_time = " whose time is known" if x == "time" else ""
        raise UserError(f"nothing to draw: no evaluation with {AXIS_LABELS[metric]}{with_time} yet")
    return curves


def plot_curves(
    curves: Sequence[Curve],
    output: str | Path | None = None,
    metric: Metric = "episode_return",
    aggregate: Literal["mean", "iqm"] = "iqm",
    x: Axis = "steps",
) -> Figure:
    """Draws learning curves: a panel per environment, a colour per agent, seeds thin and their aggregate bold.

    The shade is the aggregate's 95% interval, where there are two seeds or more. Curves of training episodes, drawn
    where a run has no evaluation, are dashed. The bold line covers the steps that every seed has reached, with
    straight lines between a seed's points. In `Axes.lines` its label is the agent's name, and that of a seed is
    `agent seed 0`.

    Args:
        curves: at least one.
        output: file to write as well; its ending decides the format.
        metric: names the y axis.
        aggregate: "mean", or "iqm" for the mean of the middle half of the seeds.
        x: names the x axis.
    """
    agents = in_order({curve.agent for curve in curves}, ((curve.agent, curve.env_id) for curve in curves))
    looks = agent_looks(agents)
    panels: dict[str, dict[str, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    for curve in sorted(curves, key=lambda curve: (curve.env_id, curve.agent, curve.seed)):
        panels[curve.env_id][curve.agent].append(curve)

    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 3.4 * columns, 0.9 + 2.5 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, (env_id, by_agent) in zip(axes.flat, panels.items(), strict=False):
            for agent, seeds in by_agent.items():
                _draw_agent(axis, agent, seeds, looks[agent], aggregate)
            axis.set_title(shorten(env_id, LONGEST_LABEL))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_xlim(left=0)
            if axis.dataLim.ymin >= 0:
                axis.set_ylim(bottom=0)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        figure.supxlabel({"steps": "environment steps", "time": SECONDS}[x], fontsize=9)
        figure.supylabel(AXIS_LABELS[metric], fontsize=9)
        _add_curve_legend(figure, curves, looks)
    if output is not None:
        save(figure, Path(output))
    return figure


def _draw_agent(axis: Axes, agent: str, seeds: list[Curve], look: Look, aggregate: str) -> None:
    dashes = "-" if all(curve.from_evaluation for curve in seeds) else "--"
    for curve in seeds:
        axis.plot(
            curve.steps,
            curve.values,
            "-" if curve.from_evaluation else "--",
            color=look.colour,
            linewidth=0.7,
            alpha=0.4,
            zorder=2,
            label=f"{agent} seed {curve.seed}",
        )
    steps, values, (low, high) = aggregate_seeds(seeds, aggregate)
    axis.fill_between(steps, low, high, color=look.colour, alpha=0.15, linewidth=0, zorder=1)
    axis.plot(steps, values, dashes, label=agent, zorder=3, markevery=max(1, len(steps) // 6), **look.line)


def aggregate_seeds(
    seeds: Sequence[Curve], aggregate: str = "iqm"
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The steps that all `seeds` have reached, the aggregate there (n,), and the ends of its 95% interval.

    Between a seed's points lie straight lines. With a single seed the interval is NaN.
    """
    first = max(curve.steps[0] for curve in seeds)
    last = min(curve.steps[-1] for curve in seeds)
    steps = np.unique(np.concatenate([curve.steps for curve in seeds]))
    steps = steps[(steps >= first) & (steps <= last)]
    if not len(steps):
        return steps, steps, (steps, steps)
    values = np.stack([np.interp(steps, curve.steps, curve.values) for curve in seeds])
    point, (low, high) = bootstrap([values], iqm if aggregate == "iqm" else mean)
    return steps, point, (low, high)


def _add_curve_legend(figure: Figure, curves: Sequence[Curve], looks: dict[str, Look]) -> None:
    handles = []
    for agent, look in looks.items():
        seeds = len({curve.seed for curve in curves if curve.agent == agent})
        handles.append(Line2D([], [], label=f"{agent} ({seeds} seed{'s' * (seeds > 1)})", **look.line))
    if not all(curve.from_evaluation for curve in curves):
        handles.append(Line2D([], [], color="#71717a", linestyle="--", label="training episodes"))
    add_legend(figure, handles)


# ---- over all tasks ----


def plot_profiles(results: Results) -> Figure:
    """Draws, for each agent, the share of runs (over tasks and seeds) whose final normalised score exceeds x."""
    scores = _normalised(results, 1.0)
    looks = agent_looks(results.agents)
    limits = np.linspace(0, max(1.0, scores.normalised.max()), 101)
    with matplotlib.rc_context(STYLE):
        figure = _figure(looks)
        axis = figure.subplots()
        labels = _labels(scores)
        by_task = _by_task(scores)
        for agent in [agent for agent in looks if agent in by_task]:
            tasks = by_task[agent]
            share, (low, high) = bootstrap(tasks, lambda *tasks: mean(*(task > limits for task in tasks)))
            axis.fill_between(limits, low, high, color=looks[agent].colour, alpha=0.15, linewidth=0)
            axis.plot(limits, share, label=labels[agent], markevery=12, **looks[agent].line)
        axis.set(xlim=(0, limits[-1]), ylim=(0, 1.02), xlabel="normalised score x", ylabel="share of runs above x")
        add_legend(figure, axis.lines)
    return figure


def plot_efficiency(results: Results) -> Figure:
    """Draws bars: the IQM over tasks and seeds, with its 95% interval, after a quarter, half and all of the budget.

    Without the moments at which not every task was evaluated.
    """
    fractions = [fraction for fraction in (0.25, 0.5, 1.0) if fraction in results.fractions or fraction == 1]
    groups = {f"{fraction:.0%} of the budget": _normalised(results, fraction) for fraction in fractions}
    return _plot_bars(results, groups)


def plot_time(results: Results) -> Figure:
    """Draws the IQM over tasks and seeds, with its 95% interval, over the seconds of a run, on average over the tasks.

    At the evaluations that all tasks and seeds of an agent have in common. Runs whose time is not known are left out;
    raises `UserError` where that is all of them.
    """
    timed = timed_runs(results, results.scores())
    scaled = [task.env_id for task in results.tasks if task.bounds]
    by_agent = {
        a: runs for a in results.agents if (runs := [timed.get(a, {})[t] for t in scaled if t in timed.get(a, {})])
    }
    if not by_agent:
        raise UserError(
            "nothing to draw: no finished run on a task whose best return is known has its time in metrics.csv"
        )
    looks = agent_looks(results.agents)
    most = max(map(len, by_agent.values()))
    with matplotlib.rc_context(STYLE):
        figure = _figure(looks)
        axis = figure.subplots()
        for agent, tasks in by_agent.items():
            seconds, iqms, (low, high) = curve_in_time(tasks)
            label = agent if len(tasks) == most else f"{agent} ({len(tasks)} of {most} tasks)"
            axis.fill_between(seconds, low, high, color=looks[agent].colour, alpha=0.15, linewidth=0)
            axis.plot(seconds, iqms, label=label, **looks[agent].line)
        axis.set(xlabel=f"{SECONDS}, on average over the tasks", ylabel="normalised score (IQM)")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=min(0, axis.dataLim.ymin))
        add_legend(figure, axis.lines)
    return figure


def plot_settings(results: Results) -> Figure:
    """Draws bars: the IQM over tasks and seeds at the end, with its 95% interval, in each evaluation setting."""
    scores = {name: results.choose(name).scores().dropna(subset=["normalised"]) for name in results.eval_settings}
    groups = {name: table for name, table in scores.items() if len(table)}
    return _plot_bars(results, groups or {results.usual: _normalised(results, 1.0)})


def _plot_bars(results: Results, groups: dict[str, pd.DataFrame]) -> Figure:
    """A group of bars, one for each agent, for each table of `_normalised` scores."""
    looks = agent_looks(results.agents)
    with matplotlib.rc_context(STYLE):
        figure = _figure(looks, len(groups))
        axis = figure.subplots()
        width = 0.8 / len(looks)
        labels: dict[str, str] = {}
        handles: list[BarContainer] = []
        for group, scores in enumerate(groups.values()):
            by_task, new = _by_task(scores), {a: b for a, b in _labels(scores).items() if a not in labels}
            labels |= new
            for number, (agent, look) in enumerate(looks.items()):
                if agent not in by_task:
                    continue
                (point,), (low, high) = bootstrap(by_task[agent], iqm_of_all)
                bars = axis.bar(
                    group + (number - (len(looks) - 1) / 2) * width,
                    point,
                    0.92 * width,
                    yerr=np.abs(np.array([low, high]) - point),
                    color=look.colour,
                    hatch=look.hatch,
                    edgecolor="white",
                    error_kw={"elinewidth": 1, "ecolor": "#18181b", "capsize": 2},
                    label=new.get(agent),
                )
                handles += [bars] * (agent in new)
        axis.set_xticks(range(len(groups)), [shorten(name, LONGEST_LABEL // 3) for name in groups])
        axis.set_ylabel("normalised score (IQM)")
        add_legend(figure, handles)
    return figure


def _figure(looks: dict[str, Look], groups: int = 1) -> Figure:
    return Figure(figsize=(max(5.2, 0.45 * len(looks), 1.3 * groups), 3.4), layout="constrained")


def _normalised(results: Results, fraction: float) -> pd.DataFrame:
    scores = results.scores(fraction=fraction).dropna(subset=["normalised"])
    if fraction == 1 and not len(scores):
        raise UserError("nothing to draw: no run has finished yet on a task whose best return is known")
    return scores


def _labels(scores: pd.DataFrame) -> dict[str, str]:
    """Agent -> its name, and how many tasks it ran if that is not all: its numbers are then of other tasks."""
    ran, whole = scores.groupby("agent").task.nunique(), scores.task.nunique()
    return {agent: agent if n == whole else f"{agent} ({n} of {whole} tasks)" for agent, n in ran.items()}


def _by_task(scores: pd.DataFrame) -> dict[str, list[np.ndarray]]:
    """Agent -> per task, normalised scores (n_seeds, 1)."""
    return {
        agent: [task[["normalised"]].to_numpy() for _, task in rows.groupby("task")]
        for agent, rows in scores.groupby("agent")
    }
