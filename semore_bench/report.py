"""`semore-bench report`: leaderboard, curves, runs and videos as one HTML file that needs nothing but a browser."""

import base64
import hashlib
import html
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import tyro

from semore_bench.collect import open_results
from semore_bench.estimates import bootstrap, iqm_of_all
from semore_bench.generalisation import Generalisation, generalisation
from semore_bench.looks import COLOURS
from semore_bench.names import PUBLISHED, printable
from semore_bench.scores import ALL, Results
from semore_bench.tables import Table, check_baseline, make_notes, make_table, seed_census
from semore_bench.teachers import teacher
from wrappers.errors import UserError

PAGE = Path(__file__).parent / "page"


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),),
    suite: str | None = None,
    baseline: str | None = None,
    published: Path | None = None,
    output: Path = Path("report.html"),
    video_megabytes: float = 2,
    all_videos_megabytes: float = 40,
) -> None:
    """Write one self-contained HTML page: leaderboard, curves to hover and filter, per-seed dots, runs, videos.

    Args:
        runs: Run directories, folders with some anywhere inside, or a folder of results.
        suite: Suite by name or file: which tasks are compared, and at which budget (default: all that were run).
        baseline: Agent against which the probability of improvement is given.
        published: CSV file with numbers to show beside, see `semore-bench table`.
        output: The page.
        video_megabytes: Larger videos are linked, not embedded.
        all_videos_megabytes: Videos are linked once so much has been embedded.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"cannot write {output}: expected a name that ends in .html")
    for flag, value in (("video", video_megabytes), ("all-videos", all_videos_megabytes)):
        if not 0 <= value < math.inf:
            raise UserError(f"--{flag}-megabytes must be 0 or more, and finite, got {value}")
    results = open_results(runs, suite, published)
    limits = int(video_megabytes * 1e6), int(all_videos_megabytes * 1e6)
    embedded = write_report(results, output, baseline, *limits)
    size = output.stat().st_size / 1e6
    print(f"wrote {output} ({size:.1f} MB, {len(results.runs)} runs, {embedded} videos embedded)")


def write_report(results: Results, output: Path, baseline: str | None = None, one: int = 0, together: int = 0) -> int:
    """Writes the page; embeds videos of up to `one` bytes, `together` in all, links the rest; returns how many."""
    content = page_content(results, baseline)
    embedded = embed_videos(content, output, one, together)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(render(content), "utf-8")
    return embedded


def render(content: dict[str, Any]) -> str:
    """The page around its data. Data is never markup: it is JSON with no `<` in it, which the script adds as text."""
    style, script = ((PAGE / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    # The browser runs this script and no other, whatever a caption or file name says.
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(_without_nan(content), separators=(",", ":"))
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    text = (PAGE / "report.html").read_text("utf-8")
    parts = {"POLICY": policy, "TITLE": html.escape(content["title"]), "STYLE": style, "SCRIPT": script, "DATA": data}
    first, *rest = text.split("{{")
    for part in rest:
        name, _, following = part.partition("}}")
        first += parts[name] + following
    return first


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null instead; floats to six digits."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def page_content(results: Results, baseline: str | None = None) -> dict[str, Any]:
    """What the page shows, for its script to draw. Before the first finished run there is no leaderboard."""
    agents = results.agents
    check_baseline(results, baseline)
    results = replace(results, baseline=baseline or results.baseline)
    # None is the colour of the text: black on white, white on black
    palette: list[str | None] = [*COLOURS[:6], None]
    return {
        "title": results.title,
        "baseline": baseline,
        "agents": [
            {
                "name": agent,
                "colour": palette[number % len(palette)],
                "dash": number // len(palette) % 3,  # where colours come again
                "published": agent.endswith(PUBLISHED),
                "settings": results.settings.get(agent, {}),
            }
            for number, agent in enumerate(agents)
        ],
        "tasks": [
            {
                "name": task.env_id,
                "budget": task.total_env_steps,
                "bounds": task.bounds,
                "unit": "success rate" if task.success else "episode return",
            }
            for task in results.tasks
        ],
        "all": ALL,
        "settings": [_in_setting(results.choose(name), baseline) for name in results.eval_settings],
        "generalisation": _generalisation_content(generalisation(results)),
        "runs": [{**run} for run in results.runs],  # `embed_videos` changes them
        "environments": results.environments,
        "guidance": _guidance(results),
    }


def _guidance(results: Results) -> dict[str, str]:
    """Guidance -> who trained its models with what; for results of the time before that was kept, as it is now."""
    names = sorted({run["guidance"] for run in results.runs if run["guidance"]})
    said = {name: results.teachers.get(name) or teacher(name) for name in names}
    return {name: text for name, text in said.items() if text}


def _in_setting(results: Results, baseline: str | None) -> dict[str, Any]:
    """What the page shows of the evaluation setting that `results` are asked for."""
    try:
        made = make_table(results, baseline=baseline)
    except UserError as error:
        notes = str(error), *make_notes(results, seed_census(results, results.scores()))
        made = Table(results.title, results.evaluations.iloc[:0].assign(task=[]), notes, baseline)
    scores = results.scores()
    return {
        "name": results.setting,
        "caption": made.caption,
        "rows": [_with_never(row) for row in made.rows.to_dict("records")],
        "dots": [[row.task, row.agent, row.seed, row.score, row.normalised] for row in scores.itertuples()],
        "curves": _curves(results),
        "notes": made.notes,
    }


def _with_never(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no infinity: what is never reached says so."""
    return {name: "never" if value == math.inf else value for name, value in row.items()}


def _generalisation_content(summary: Generalisation | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    return {"others": summary.settings, "rows": summary.rows.to_dict("records"), "notes": summary.document.notes}


def _curves(results: Results) -> dict[str, dict[str, Any]]:
    """Task -> agent -> seeds with their points, and the IQM with its interval and the number of seeds at each step."""
    curves: dict[str, dict[str, Any]] = {ALL: _curves_over_tasks(results)}
    for task in results.tasks:
        rows = results.shown[results.shown.task == task.env_id]
        rows = rows.assign(score=rows.success_any if task.success else rows.episode_return).dropna(subset=["score"])
        curves[task.env_id] = {}
        for agent, own in rows.groupby("agent"):
            table = own.pivot(index="seed", columns="env_step", values=["score", "wall_seconds"])
            steps, scores = table["score"].columns.to_numpy(), table["score"].to_numpy()
            seconds = table["wall_seconds"].to_numpy()
            seeds = [
                {"seed": seed, "steps": steps[known], "values": values[known], **_times(times[known])}
                for seed, values, times, known in zip(table.index, scores, seconds, ~np.isnan(scores), strict=True)
            ]
            curves[task.env_id][agent] = {
                "steps": steps,
                **_curve([scores]),
                **_times(own.groupby("env_step").wall_seconds.mean().to_numpy()),
                "seeds": seeds,
            }
    return curves


def _times(seconds: np.ndarray) -> dict[str, np.ndarray]:
    """The times of a curve's points, if they are known."""
    return {} if np.isnan(seconds).all() else {"seconds": seconds}


def _curves_over_tasks(results: Results) -> dict[str, dict[str, Any]]:
    """Agent -> the curve of its normalised scores on all tasks; where a task is missing there is no point."""
    fractions = np.array(results.fractions)
    normalised = results.normalised_curves(results.fractions)
    seconds = results.normalised_curves(results.fractions, times=True)
    needed = sum(task.bounds is not None for task in results.tasks)
    curves: dict[str, Any] = {}
    for agent in results.agents:
        tasks = list(normalised.get(agent, {}).values())
        reached = [(~np.isnan(task)).any(0) for task in tasks]
        # an average over other tasks than before would be another curve
        whole = np.all(reached, 0) if 0 < len(tasks) == needed else np.zeros(len(fractions), bool)
        curves[agent] = {"steps": fractions[whole], **_curve([task[:, whole] for task in tasks]), "seeds": []}
        if whole.any():
            of_tasks = [pd.DataFrame(task[:, whole]).mean().to_numpy() for task in seconds[agent].values()]
            curves[agent] |= _times(np.mean(of_tasks, 0))
    return curves


def _curve(tasks: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The IQM of scores (n_seeds, k) per task, at each of the k moments, with its interval and the number of runs.

    A seed that failed ends early, with NaN: moments that have the same runs are resampled together.
    """
    moments = tasks[0].shape[1] if tasks else 0
    curve = {name: np.full(moments, np.nan) for name in ("iqm", "low", "high")} | {"counts": np.zeros(moments, int)}
    if not moments:
        return curve
    present = ~np.isnan(np.concatenate(tasks))
    kinds, kind_of = np.unique(present, axis=1, return_inverse=True)
    for number, runs in enumerate(kinds.T):
        here = np.flatnonzero(kind_of.ravel() == number)
        in_task = np.split(runs, np.cumsum([len(task) for task in tasks])[:-1])
        scores = [task[np.ix_(rows, here)] for task, rows in zip(tasks, in_task, strict=True)]
        curve["iqm"][here], (curve["low"][here], curve["high"][here]) = bootstrap(scores, iqm_of_all)
        curve["counts"][here] = runs.sum()
    return curve


def embed_videos(content: dict[str, Any], output: Path, one: int, together: int) -> int:
    """Puts videos into the runs of `content`, those too large in bytes as links from the page; returns how many."""
    embedded = 0
    for run in content["runs"]:
        if not run["video"]:
            continue
        path = Path(run["video"])
        size = path.stat().st_size
        name = printable(path.name)
        if size <= min(one, together):
            together -= size
            embedded += 1
            data = base64.b64encode(path.read_bytes()).decode()
            run["video"] = {"name": name, "source": f"data:video/mp4;base64,{data}"}
        else:
            link = Path(os.path.relpath(path, output.parent)).as_posix()
            run["video"] = {"name": name, "link": quote(os.fsencode(link))}
    return embedded
