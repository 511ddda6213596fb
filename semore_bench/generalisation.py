"""What is left of an agent's return in evaluation settings that it was not trained in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from semore_bench.estimates import bootstrap
from semore_bench.names import PUBLISHED
from semore_bench.scores import ALL, Results
from semore_bench.table_text import Document, rounded, with_interval

RUN = ["agent", "task", "seed"]


@dataclass(frozen=True)
class Generalisation:
    """What `generalisation` returns.

    `rows`: a row per task (`ALL` first) and agent, the best in the other settings first: `usual`, the mean score in the
    setting of training; `others`, that over the other settings; `share`, the quotient of both, NaN where `usual` is not
    positive; each with the ends of its 95% interval; and `in <setting>` for each other setting. Scores of a task are in
    its own unit, those of `ALL` normalised.
    """

    document: Document
    settings: list[str]
    rows: pd.DataFrame


def generalisation(results: Results, at: int | None = None) -> Generalisation | None:
    """Compares the settings of `results` at env step `at` (None: the end of each budget); None if there is but one, or
    no run has been evaluated in all."""
    usual, *others = results.eval_settings
    scores = [results.choose(setting).scores(at).set_index(RUN) for setting in (usual, *others)]
    wide = {
        unit: pd.concat([frame[unit] for frame in scores], axis=1, keys=(usual, *others)).dropna()
        for unit in ("score", "normalised")
    }
    if not others or not len(wide["score"]):
        return None
    parts = [(ALL, wide["normalised"])]
    parts += [(task.env_id, wide["score"].query("task == @task.env_id")) for task in results.tasks]
    expected = sum(task.bounds is not None for task in results.tasks)
    rows = [_row(name, agent, own, usual, others) for name, runs in parts for agent, own in runs.groupby("agent")]
    frame = pd.DataFrame(rows).assign(tasks_expected=lambda rows: np.where(rows.task == ALL, expected, 1))
    order = {name: number for number, (name, _) in enumerate(parts)}
    frame = frame.assign(order=frame.task.map(order), part=frame.tasks < frame.tasks_expected)
    frame = frame.sort_values(["order", "part", "others"], ascending=[True, True, False], kind="stable")
    frame = frame.drop(columns=["order", "part"]).reset_index(drop=True)
    caption = f"{results.title}: what is left of {usual} in {', '.join(others)}"
    sections = [
        (f"{name}, normalised" if name == ALL else name, _columns(rows, usual, others))
        for name, rows in frame.groupby("task", sort=False)
    ]
    notes = list(_notes(scores[0], wide["score"], usual, others))
    return Generalisation(Document(caption, sections, notes), others, frame)


def _row(name: str, agent: str, own: pd.DataFrame, usual: str, others: Sequence[str]) -> dict[str, object]:
    """One agent's row over the runs of `own`: a column per setting."""
    tasks = [runs for _, runs in own.groupby("task")]
    row: dict[str, object] = {"task": name, "agent": agent}
    row["source"] = "published" if agent.endswith(PUBLISHED) else "runs"
    # Drawn are places, not scores: a run that is drawn is drawn in all settings.
    places = [np.arange(len(runs))[:, None] for runs in tasks]

    def mean(settings: Sequence[str], drawn: Sequence[np.ndarray]) -> np.ndarray:
        of_runs = [runs[[*settings]].mean(axis=1).to_numpy() for runs in tasks]
        return np.concatenate([scores[where] for scores, where in zip(of_runs, drawn, strict=True)], -2).mean(-2)

    def share(*drawn: np.ndarray) -> np.ndarray:
        whole = mean([usual], drawn)
        return np.divide(mean(others, drawn), whole, out=np.full_like(whole, np.nan), where=whole > 0)

    statistics = {
        "usual": lambda *drawn: mean([usual], drawn),
        "others": lambda *drawn: mean(others, drawn),
        "share": share,
    }
    for key, statistic in statistics.items():
        (point,), ((low,), (high,)) = bootstrap(places, statistic)
        row |= {key: point, f"{key}_low": low, f"{key}_high": high}
    row |= {f"in {setting}": mean([setting], places)[0] for setting in others}
    sizes = [len(runs) for runs in tasks]
    return row | {"tasks": len(tasks), "seeds_low": min(sizes), "seeds_high": max(sizes)}


def _columns(rows: pd.DataFrame, usual: str, others: Sequence[str]) -> dict[str, list[str]]:
    """Header -> cells."""
    digits = 3 if rows[["usual", "usual_high"]].max(axis=None) <= 1 else 1
    columns = {
        "agent": list(rows.agent),
        f"{usual} [95%]": [with_interval(row, "usual", digits) for row in rows.itertuples()],
        "mean of the others [95%]": [with_interval(row, "others", digits) for row in rows.itertuples()],
        f"share of {usual} [95%]": [with_interval(row, "share", 3) for row in rows.itertuples()],
    }
    columns |= {setting: [rounded(value, digits) for value in rows[f"in {setting}"]] for setting in others}
    if (rows.tasks_expected > 1).any():
        columns["tasks"] = [f"{row.tasks} of {row.tasks_expected}" for row in rows.itertuples()]
    seeds = zip(rows.seeds_low, rows.seeds_high, strict=True)
    return columns | {"seeds": [str(low) if low == high else f"{low}–{high}" for low, high in seeds]}


def _notes(usual_scores: pd.DataFrame, complete: pd.DataFrame, usual: str, others: Sequence[str]) -> Iterator[str]:
    yield (
        f"means over runs; the share is the quotient of two means: of {', '.join(others)} together, and of {usual}; "
        "[95% stratified bootstrap interval over seeds]"
    )
    lacking = usual_scores.index.difference(complete.index).to_frame(index=False)
    for (agent, task), seeds in lacking.groupby(["agent", "task"]).seed:
        which = ", ".join(map(str, seeds))
        yield f"{agent} on {task}: left out seeds {which}, which were not evaluated in all settings"
