"""`semore-bench plot`: learning curves of run directories, drawn for the screen and for print."""

import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.markup import escape

from wrappers.errors import UserError

# Okabe and Ito's palette, which can be told apart with every kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#71717a",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": "#e4e4e7",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "xtick.color": "#3f3f46",
    "ytick.color": "#3f3f46",
}

Metric = Literal["episode_return", "success_any", "success_last"]
AXIS_LABELS = {
    "episode_return": "episode return",
    "success_any": "success rate (any step)",
    "success_last": "success rate (last step)",
}


@dataclass(frozen=True)
class Curve:
    """One run's learning curve: `values` (n,) at `steps` (n,) environment steps, ascending."""

    env_id: str
    agent: str
    seed: int
    steps: np.ndarray
    values: np.ndarray
    from_evaluation: bool  # or else from training episodes


class UnusableRun(Exception):
    """A run directory has nothing to draw yet, or is damaged; the message says which."""


def plot(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),),
    output: Path = Path("curves.png"),
    metric: Metric = "episode_return",
    aggregate: Literal["mean", "iqm"] = "mean",
) -> None:
    """Draw learning curves: a panel per environment, a colour per agent, a thin line per seed.

    Args:
        runs: Run directories, or folders with some anywhere inside.
        output: Where the figure goes; the ending decides the format: .png, .svg or .pdf.
        metric: What to draw: the return, or the share of successful episodes.
        aggregate: The bold line over seeds: their mean, or the mean of their middle half (interquartile).
    """
    console = Console(highlight=False, soft_wrap=True)
    curves, skipped = [], 0
    for run in find_runs(runs):
        try:
            curves.append(load_curve(run, metric))
        except UnusableRun as reason:
            skipped += 1
            console.print(f"[yellow]skipped[/] {escape(str(run))}: {escape(str(reason))}")
    if not curves:
        raise UserError(f"nothing to draw in {' '.join(map(str, runs))}: no run has finished an episode yet")
    plot_curves(curves, output, metric, aggregate)
    console.print(f"drew {len(curves)} of {len(curves) + skipped} runs: {escape(str(output))}")


def plot_runs(
    run_dirs: Iterable[str | Path],
    output: str | Path | None = None,
    metric: Metric = "episode_return",
    aggregate: Literal["mean", "iqm"] = "mean",
) -> Figure:
    """`plot_curves` of every run in or below `run_dirs`; raises `UnusableRun` if one has nothing to draw."""
    return plot_curves([load_curve(run, metric) for run in find_runs(run_dirs)], output, metric, aggregate)


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


def load_curve(run: Path, metric: Metric = "episode_return") -> Curve:
    """Reads a run's learning curve: evaluations, averaged per step, or training episodes if there are none.

    A row that is being written at this moment is left out. Raises `UnusableRun` if there is nothing to draw.
    """
    try:
        config = json.loads((run / "config.json").read_text("utf-8"))
        env_id, agent, seed = config["env_id"], config["agent"], int(config["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableRun(f"config.json is damaged ({type(error).__name__}: {error})") from error
    for name in ("eval", "train"):
        values = _read_csv(run / f"{name}.csv", metric)
        if len(values):
            return Curve(env_id, agent, seed, values.index.to_numpy(), values.to_numpy(), name == "eval")
    raise UnusableRun(f"no {AXIS_LABELS[metric]} in eval.csv or train.csv yet")


def _read_csv(file: Path, metric: Metric) -> pd.Series:
    """The mean of `metric` by env_step, without a half-written last row; empty if there is no row at all."""
    text = file.read_text("utf-8", errors="replace") if file.exists() else ""
    text = text[: text.rfind("\n") + 1]
    if not text.strip():
        return pd.Series(dtype=float)
    table = pd.read_csv(io.StringIO(text), on_bad_lines="skip")
    if missing := {"env_step", metric} - set(table.columns):
        raise UnusableRun(f"{file.name} has no column {' or '.join(sorted(missing))}")
    table = table[["env_step", metric]].apply(pd.to_numeric, errors="coerce").dropna()
    return table.groupby("env_step")[metric].mean()


def plot_curves(
    curves: Sequence[Curve],
    output: str | Path | None = None,
    metric: Metric = "episode_return",
    aggregate: Literal["mean", "iqm"] = "mean",
) -> Figure:
    """Draws learning curves: a panel per environment, a colour per agent, seeds thin and their mean bold.

    Curves of training episodes, drawn where a run has no evaluation, are dashed. The bold line covers the
    steps that every seed has reached, with straight lines between a seed's points. In `Axes.lines` its label
    is the agent's name, and that of a seed is `agent seed 0`.

    Args:
        curves: at least one.
        output: file to write as well; its ending decides the format.
        metric: names the y axis.
        aggregate: "mean", or "iqm" for the mean of the middle half of the seeds.
    """
    agents = sorted({curve.agent for curve in curves})
    palette = COLOURS
    if len(agents) > len(palette):
        palette = matplotlib.colormaps["turbo"](np.linspace(0, 1, len(agents)))
    colours = dict(zip(agents, palette, strict=False))
    panels: dict[str, dict[str, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    for curve in sorted(curves, key=lambda curve: (curve.env_id, curve.agent, curve.seed)):
        panels[curve.env_id][curve.agent].append(curve)

    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 3.4 * columns, 0.9 + 2.5 * rows), dpi=200, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis, (env_id, by_agent) in zip(axes.flat, panels.items(), strict=False):
            for agent, seeds in by_agent.items():
                _draw_agent(axis, agent, seeds, colours[agent], aggregate)
            axis.set_title(env_id)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_xlim(left=0)
            if axis.dataLim.ymin >= 0:
                axis.set_ylim(bottom=0)
        for axis in axes.flat[len(panels) :]:
            axis.remove()
        figure.supxlabel("environment steps", fontsize=9)
        figure.supylabel(AXIS_LABELS[metric], fontsize=9)
        _add_legend(figure, curves, colours)
        if output is not None:
            _save(figure, Path(output))
    return figure


def _draw_agent(axis: Axes, agent: str, seeds: list[Curve], colour: str, aggregate: str) -> None:
    dashes = "-" if all(curve.from_evaluation for curve in seeds) else "--"
    for curve in seeds:
        axis.plot(
            curve.steps,
            curve.values,
            "-" if curve.from_evaluation else "--",
            color=colour,
            linewidth=0.7,
            alpha=0.4,
            zorder=2,
            label=f"{agent} seed {curve.seed}",
        )
    steps, values = aggregate_seeds(seeds, aggregate)
    marker = "o" if len(steps) == 1 else None  # a line needs two points to be seen
    axis.plot(steps, values, dashes, color=colour, linewidth=1.8, marker=marker, markersize=4, zorder=3, label=agent)


def aggregate_seeds(seeds: Sequence[Curve], aggregate: str = "mean") -> tuple[np.ndarray, np.ndarray]:
    """The steps that all `seeds` have reached and the aggregate of their values there, both (n,)."""
    first = max(curve.steps[0] for curve in seeds)
    last = min(curve.steps[-1] for curve in seeds)
    steps = np.unique(np.concatenate([curve.steps for curve in seeds]))
    steps = steps[(steps >= first) & (steps <= last)]
    values = np.stack([np.interp(steps, curve.steps, curve.values) for curve in seeds])
    if aggregate == "mean":
        return steps, values.mean(axis=0)
    from scipy.stats import trim_mean  # here, because it takes a second to import

    return steps, trim_mean(values, 0.25, axis=0)


def _add_legend(figure: Figure, curves: Sequence[Curve], colours: dict[str, str]) -> None:
    handles = []
    for agent, colour in colours.items():
        seeds = len({curve.seed for curve in curves if curve.agent == agent})
        label = f"{agent} ({seeds} seed{'s' * (seeds > 1)})"
        handles.append(Line2D([], [], color=colour, linewidth=1.8, label=label))
    if not all(curve.from_evaluation for curve in curves):
        handles.append(Line2D([], [], color="#71717a", linestyle="--", label="training episodes"))
    entry_width = 0.7 + 0.075 * max(len(handle.get_label()) for handle in handles)  # inches, at 9 points
    fitting = max(1, int(figure.get_figwidth() / entry_width))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), fitting))


def _save(figure: Figure, output: Path) -> None:
    supported = ("png", "svg", "pdf")
    if output.suffix.lstrip(".").lower() not in supported:
        raise UserError(f"cannot write {output}: expected a name that ends in .{', .'.join(supported)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
