"""`semore-bench results`: a folder of results to keep, and everything in it regenerated from its evaluations."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import tyro

from semore_bench.collect import collect
from semore_bench.looks import save as save_figure
from semore_bench.names import PUBLISHED
from semore_bench.plots import (
    Metric,
    plot_curves,
    plot_efficiency,
    plot_profiles,
    plot_settings,
    plot_time,
    results_curves,
)
from semore_bench.report import write_report
from semore_bench.scores import KEY, PROVENANCE, Results, load, save
from semore_bench.tables import make_table, write_tables
from wrappers.errors import UserError


def results(
    action: tyro.conf.Positional[Literal["build", "rebuild"]],
    folders: tyro.conf.Positional[tuple[Path, ...]],
    suite: str | None = None,
    baseline: str | None = None,
    output: Path | None = None,
    published: Path | None = None,
) -> None:
    """Make a folder of results from runs (build), or its tables, figures and page from its own CSV file (rebuild).

    `build` writes evaluations.csv (a row per agent, task, seed and evaluation) and provenance.json (commits, versions,
    machines, seeds, wall-clock, settings, guidance): these two are enough to make the rest again.

    Args:
        action: build or rebuild.
        folders: Folders with runs, or of results to add to them (from another machine, or an earlier time); for
            rebuild, one folder of results.
        suite: Suite by name or file, for build.
        baseline: Agent against which the probability of improvement is given.
        output: The folder of results, for build (default: results/SUITE).
        published: CSV file with numbers to keep beside, see `semore-bench table`, for build.
    """
    if action == "rebuild":
        if len(folders) != 1 or suite or output or published:
            raise UserError(
                "rebuild takes one folder of results and nothing else, as in: results rebuild results/dmc-lite"
            )
        (folder,) = folders
    else:
        collected = _until_the_end(collect(folders, suite, published))
        folder = output or Path("results") / collected.title
        _refuse_loss(collected, folder, folders)
        made = make_table(collected, baseline=baseline)  # refuses what cannot be compared before anything is written
        save(replace(collected, baseline=made.baseline), folder)
    write_all(folder, baseline)
    print(f"wrote tables, figures and report.html to {folder}")


def _until_the_end(collected: Results) -> Results:
    """Without what others have published beyond the budgets, but for the first evaluation there, which says that a run
    got so far: nothing is compared with it, and it may be most rows."""
    rows = collected.evaluations
    budgets = {task.env_id: task.total_env_steps for task in collected.tasks}
    before = rows.groupby([name for name in KEY if name != "env_step"]).env_step.shift()
    beyond = rows.agent.str.endswith(PUBLISHED) & (before >= rows.task.map(budgets))
    return replace(collected, evaluations=rows[~beyond].reset_index(drop=True))


def _refuse_loss(collected: Results, folder: Path, folders: tuple[Path, ...]) -> None:
    """Raises `UserError` where `folder` keeps runs that `collected` does not have: nobody else may have them."""
    if not (folder / PROVENANCE).exists():
        return
    have = {(run["agent"], run["task"], run["seed"]) for run in collected.runs}
    kept = ((run["agent"], run["task"], run["seed"]) for run in load(folder).runs)
    if lost := sorted(key for key in kept if key not in have):
        agent, task, seed = lost[0]
        raise UserError(
            f"{folder} keeps {len(lost)} run{'s' * (len(lost) > 1)} that would be lost, such as {agent} on {task} with "
            f"seed {seed}. To add to them: results build {' '.join(map(str, folders))} {folder}; to begin anew, delete "
            f"{folder / PROVENANCE}"
        )


def write_all(folder: Path, baseline: str | None = None) -> None:
    """Writes table.md, .csv and .tex, curves, profiles and efficiency as .png and .svg, and report.html; where there
    are several evaluation settings, a table of each, one of them all, and settings.png and .svg; where times are known,
    efficiency-time.png and .svg."""
    loaded = load(folder)
    baseline = baseline or loaded.baseline
    write_tables(loaded, folder, baseline=baseline)
    metric: Metric = "success_any" if all(task.success for task in loaded.tasks) else "episode_return"
    figures = {"curves": plot_curves(results_curves(loaded, metric), metric=metric)}
    if loaded.scores().normalised.notna().any():  # or else no task's best return is known
        figures |= {"profiles": plot_profiles(loaded), "efficiency": plot_efficiency(loaded)}
        if loaded.scores().dropna(subset=["normalised", "wall_seconds"]).size:
            figures["efficiency-time"] = plot_time(loaded)
        if len(loaded.eval_settings) > 1:
            figures["settings"] = plot_settings(loaded)
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            save_figure(figure, folder / f"{name}.{kind}")
    write_report(loaded, folder / "report.html", baseline)
