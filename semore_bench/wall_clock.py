"""Agents compared by time: seconds of a run on one worker, and how soon an agent is where the baseline ends."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd

from semore_bench.estimates import bootstrap, iqm, iqm_of_all
from semore_bench.names import PUBLISHED
from semore_bench.scores import Results

LEAST = 0.1
"""seconds to which times are rounded, and below which none counts"""


@dataclass(frozen=True)
class Timed:
    """An agent's runs on a task, at the evaluations (m) that they all had until they are compared.

    `shares` (m,) of the env steps until the comparison, ascending to 1. `scores`, `normalised` and `seconds`
    (n_seeds, m): what a run had reached, and how long it had been worked on, its earlier evaluations included.
    """

    shares: np.ndarray
    scores: np.ndarray
    normalised: np.ndarray
    seconds: np.ndarray

    def at(self, shares: np.ndarray) -> "Timed":
        """The same runs at some of `shares`."""
        places = np.searchsorted(self.shares, shares)
        return Timed(shares, *(values[:, places] for values in (self.scores, self.normalised, self.seconds)))


def timed_runs(results: Results, scores: pd.DataFrame) -> dict[str, dict[str, Timed]]:
    """Agent -> task -> the runs that are in `scores`, those of `results` at some moment, and whose times are known."""
    found: dict[str, dict[str, Timed]] = defaultdict(dict)
    known = scores.dropna(subset=["score", "wall_seconds"])
    for task in results.tasks:
        shown = results.shown[results.shown.task == task.env_id]
        shown = shown.assign(score=shown.success_any if task.success else shown.episode_return)
        shown = shown.dropna(subset=["score", "wall_seconds"])
        low, high = task.bounds or (np.nan, np.nan)
        for agent, compared in known[known.task == task.env_id].groupby("agent"):
            end = compared.env_step.max()
            seeds = compared.seed[compared.env_step == end]
            rows = shown[(shown.agent == agent) & shown.seed.isin(seeds) & (shown.env_step <= end)]
            table = rows.pivot(index="seed", columns="env_step", values=["score", "wall_seconds"]).dropna(axis=1)
            values = table["score"].to_numpy()
            steps = table["score"].columns.to_numpy()
            found[agent][task.env_id] = Timed(
                np.round(steps / end, 12) if end else np.ones(1),
                values,
                (values - low) / (high - low),
                np.maximum(table["wall_seconds"].to_numpy(), LEAST),
            )
    return found


def together(tasks: Sequence[Timed]) -> list[Timed]:
    """Runs on several tasks, at the shares that they have in common."""
    shares = reduce(np.intersect1d, (task.shares for task in tasks))
    return [task.at(shares) for task in tasks]


def curve_in_time(tasks: Sequence[Timed]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds of a run, on average over the tasks (m,), and the IQM of normalised scores then (m,) with its 95%
    interval (2, m)."""
    tasks = together(tasks)
    point, interval = bootstrap([task.normalised for task in tasks], iqm_of_all)
    return np.mean([task.seconds.mean(0) for task in tasks], 0), point, interval


def share_of_time(own: Sequence[Timed], baseline: Sequence[Timed], normalised: bool) -> tuple[float, float, float]:
    """Time until an agent's IQM is the baseline's final one, in units of the baseline's whole time, with the ends of
    its 95% interval; infinity where it is never reached.

    It is reached at the first evaluation with such an IQM: there is no guess at what was between evaluations. What is
    drawn for the interval are runs, each with its scores and its times.
    """
    own, baseline = together(own), together(baseline)

    def parts(tasks: Sequence[Timed], drawn: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """IQM (..., m), and seconds of one run on each of the tasks (..., m)."""
        places = [where[..., 0] for where in drawn]
        of_runs = [task.normalised if normalised else task.scores for task in tasks]
        scores = np.concatenate([values[where] for values, where in zip(of_runs, places, strict=True)], -2)
        seconds = [task.seconds[where].mean(-2) for task, where in zip(tasks, places, strict=True)]
        return iqm(scores), np.sum(seconds, 0)

    def times_as_fast(*drawn: np.ndarray) -> np.ndarray:
        # the inverse of what is asked for: 0, and no infinity, where it is never reached
        scores, seconds = parts(own, drawn[: len(own)])
        theirs, whole = parts(baseline, drawn[len(own) :])
        reached = np.greater_equal(scores, np.take(theirs, [-1], -1))
        until = np.take_along_axis(seconds, reached.argmax(-1)[..., None], -1)
        return np.where(reached.any(-1)[..., None], np.take(whole, [-1], -1) / until, 0)

    places = [np.arange(len(task.scores))[:, None] for task in (*own, *baseline)]
    (point,), ((low,), (high,)) = bootstrap(places, times_as_fast)
    with np.errstate(divide="ignore"):
        share, low_share, high_share = (1 / np.array([point, high, low])).tolist()
    return share, low_share, high_share


def time_columns(
    tasks: Sequence[str], agent: str, baseline: str | None, timed: Mapping[str, Mapping[str, Timed]], normalised: bool
) -> dict[str, float]:
    """What a row of a table says of an agent's times on `tasks`: `seconds` per run, on average over the tasks, and
    `time_share` with its interval, see `share_of_time`; NaN where a number does not exist."""
    names = ("seconds", "time_share", "time_share_low", "time_share_high")
    columns = dict.fromkeys(names, np.nan)
    own, theirs = ({t: runs for t, runs in timed.get(who, {}).items() if t in tasks} for who in (agent, baseline))
    if own:
        columns["seconds"] = float(np.mean([runs.seconds[:, -1].mean() for runs in own.values()]))
    if own and agent != baseline and own.keys() == theirs.keys():
        share = share_of_time([*own.values()], [*theirs.values()], normalised)
        columns |= dict(zip(names[1:], share, strict=True))
    return columns


def time_notes(results: Results, scores: pd.DataFrame, baseline: str | None) -> Iterator[str]:
    """How times are to be read, and which runs have none; nothing where none has any."""
    if scores.wall_seconds.isna().all():
        return
    yield "seconds per run: wall-clock of one worker, evaluations included but the last, pauses of continued runs not"
    if baseline is not None:
        yield (
            f"time to {baseline}'s IQM: seconds until the first evaluation at which an agent's IQM is at least the one "
            f"that {baseline} has at the end, as a share of {baseline}'s seconds per run; ∞ where it is never reached"
        )
    without = scores[scores.wall_seconds.isna() & ~scores.agent.str.endswith(PUBLISHED)]
    hardware_of, usual = results.hardware_of, results.hardware
    lacking: dict[tuple[str, str, str], list[str]] = {}
    for (agent, task), seeds in without.groupby(["agent", "task"], sort=False).seed:
        apart: dict[str, list[int]] = defaultdict(list)
        for seed in sorted(seeds):
            machine = hardware_of.get((agent, task, seed), usual)
            apart["are not known" if machine == usual else f"are those of {machine}, not of {usual}"].append(seed)
        for reason, own in apart.items():
            which = f"seed{'s' * (len(own) > 1)} {', '.join(map(str, own))}"
            lacking.setdefault((agent, which, reason), []).append(task)
    for (agent, which, reason), tasks in lacking.items():
        yield f"{agent} on {', '.join(tasks)}: {which} left out of times, which {reason}"
