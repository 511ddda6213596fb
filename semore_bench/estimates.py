"""Statistics over seeds and tasks as in Agarwal et al. 2021 (arXiv 2108.13264), with rliable's stratified bootstrap."""

from collections.abc import Callable, Sequence

import numpy as np

REPETITIONS = 2000
"""bootstrap samples per interval"""


def iqm(scores: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of the middle half along `axis`: rliable's `aggregate_iqm`, but an array operation, fast in a bootstrap."""
    scores = np.sort(scores, axis)
    cut = int(0.25 * scores.shape[axis])
    return np.take(scores, range(cut, scores.shape[axis] - cut), axis).mean(axis)


def aggregate(*tasks: np.ndarray) -> np.ndarray:
    """Mean, median, IQM and optimality gap of scores (n_seeds, 1) per task -> (4,).

    As rliable defines them (mean and median over the tasks' means, IQM and gap over all runs), but the tasks may have
    different numbers of seeds.
    """
    means = [task.mean() for task in tasks]
    runs = np.concatenate(tasks).ravel()
    return np.array([np.mean(means), np.median(means), iqm(runs), 1 - np.minimum(runs, 1).mean()])


def probability_of_improvement(*tasks: np.ndarray) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2, averaged over tasks: all scores of X (n_seeds, 1) per task, then all of Y -> (1,).

    Equals rliable's function of that name, which computes a p-value as well at every call.
    """
    half = len(tasks) // 2
    pairs = [np.sign(x - y.T).mean() for x, y in zip(tasks[:half], tasks[half:], strict=True)]
    return np.array([0.5 + 0.5 * np.mean(pairs)])


def bootstrap(tasks: Sequence[np.ndarray], statistic: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`statistic(*tasks)` (k,) and its 95% interval (2, k), from rliable's stratified bootstrap: seeds within tasks.

    The same scores give the same digits. Where no task has two seeds there is nothing to resample: the interval is NaN.

    Args:
        tasks: per task, scores (n_seeds, ...).
        statistic: of as many arrays as there are tasks.
    """
    if max(map(len, tasks)) < 2:
        point = statistic(*tasks)
        return point, np.full((2, len(point)), np.nan)
    from rliable.library import get_interval_estimates  # here, because it takes seconds to import

    # rliable draws from NumPy's global generator whatever its `random_state` is.
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        points, intervals = get_interval_estimates({"": list(tasks)}, statistic, reps=REPETITIONS)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    return points[""], intervals[""]
