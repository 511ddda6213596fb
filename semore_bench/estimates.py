"""Statistics over seeds and tasks as in Agarwal et al. 2021 (arXiv 2108.13264): rliable's, all resamples at once."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

REPETITIONS = 2000
"""bootstrap samples per interval"""
AT_ONCE = 1 << 21
"""resampled scores in memory at a time"""


def iqm(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half of the runs: rliable's `aggregate_iqm` of scores (..., n_runs, k) -> (..., k)."""
    runs = scores.shape[-2]
    cut = int(0.25 * runs)
    if cut:
        scores = np.sort(scores, -2)
    return scores[..., cut : runs - cut, :].mean(-2)


def iqm_of_all(*tasks: np.ndarray) -> np.ndarray:
    """`iqm` of the runs on all tasks together."""
    return iqm(np.concatenate(tasks, -2))


def mean(*tasks: np.ndarray) -> np.ndarray:
    """Mean over the runs on all tasks together."""
    return np.concatenate(tasks, -2).mean(-2)


def aggregate(*tasks: np.ndarray) -> np.ndarray:
    """Mean, median, IQM and optimality gap of scores (..., n_seeds, 1) per task -> (..., 4).

    As rliable defines them (mean and median over the tasks' means, IQM and gap over all runs), but the tasks may have
    different numbers of seeds.
    """
    means = np.concatenate([task.mean(-2) for task in tasks], -1)
    runs = np.concatenate(tasks, -2)
    parts = means.mean(-1), np.median(means, -1), iqm(runs)[..., 0], 1 - np.minimum(runs, 1).mean((-2, -1))
    return np.stack(parts, -1)


def probability_of_improvement(*tasks: np.ndarray) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2, averaged over tasks: all scores of X (..., n_seeds, 1) per task, then all of Y ->
    (..., 1).

    Equals rliable's function of that name, which computes a p-value as well at every call.
    """
    half = len(tasks) // 2
    pairs = [np.sign(x - y.swapaxes(-1, -2)).mean((-2, -1)) for x, y in zip(tasks[:half], tasks[half:], strict=True)]
    return 0.5 + 0.5 * np.mean(pairs, 0)[..., None]


def bootstrap(tasks: Sequence[np.ndarray], statistic: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`statistic(*tasks)` (m,) and its 95% interval (2, m), from a stratified bootstrap: seeds within tasks.

    It equals rliable's, but all resamples are computed together instead of one after the other.
    Where no task has two seeds there is nothing to resample: the interval is NaN.

    Args:
        tasks: per task, scores (n_seeds, k); the k columns are resampled independently of each other.
        statistic: of as many arrays (..., n_seeds, k) as there are tasks; m = k where k > 1, for each column alone.
    """
    point = statistic(*tasks)
    if max(map(len, tasks)) < 2:
        return point, np.full((2, len(point)), np.nan)
    columns, runs = tasks[0].shape[1], sum(map(len, tasks))
    width = max(1, AT_ONCE // (REPETITIONS * runs))
    intervals = []
    for start in range(0, columns, width):
        parts = [np.ascontiguousarray(task[:, start : start + width]) for task in tasks]
        places = _draws(tuple(part.shape for part in parts), REPETITIONS)
        values = statistic(*(part.ravel().take(drawn) for part, drawn in zip(parts, places, strict=True)))
        # along the last axis, in memory too: ten times as fast
        intervals.append(np.percentile(np.ascontiguousarray(values.T), [2.5, 97.5], axis=1))
    return point, np.concatenate(intervals, 1)


@functools.lru_cache(maxsize=8)
def _draws(shapes: tuple[tuple[int, int], ...], repetitions: int) -> list[np.ndarray]:
    """Which score stands where in each resample: per task, flat indices (repetitions, n_seeds, k).

    They are the same for the same shapes, so that results are deterministic.
    """
    random = np.random.RandomState(0)  # noqa: NPY002 (rliable draws from this one)
    places = [np.empty((repetitions, *shape), np.intp) for shape in shapes]
    for repetition in range(repetitions):
        for (seeds, columns), drawn in zip(shapes, places, strict=True):
            drawn[repetition] = random.randint(seeds, size=(seeds, columns))
    for (_, columns), drawn in zip(shapes, places, strict=True):
        drawn *= columns
        drawn += np.arange(columns)
    return places
