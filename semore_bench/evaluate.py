"""`semore-bench evaluate`: trained agents, loaded from their runs and evaluated on whatever one likes."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from semore_bench.estimates import bootstrap, mean
from semore_bench.eval_settings import usual_setting
from semore_bench.evaluation import EVAL_WORKERS, FIRST_SEED, Episode, agent_policy, evaluate, film, in_setting
from semore_bench.names import folder_name, printable
from semore_bench.records import find_runs
from semore_bench.rundir import write_atomically
from semore_bench.table_text import rounded
from semore_bench.trained import Recorded, Trained, find_trained, load_trained
from semore_bench.workers import Workers
from wrappers.distractions import check_distraction
from wrappers.errors import UserError

COLUMNS = "env_step eval_episode seed episode_return episode_length success_any success_last setting env_id".split()
"""of a file in `evaluations/`; `env_step`: of the checkpoint"""


def evaluate_runs(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    distraction: tuple[str, ...] = (),
    env_id: str | None = None,
    episodes: int = 30,
    seed: int = FIRST_SEED,
    capture_video: bool = False,
    agent: Path | None = None,
    device: str = "auto",
) -> None:
    """Load trained agents and evaluate them, without exploration, on the episodes that all evaluations share.

    The newest checkpoint of each run is loaded, and nothing is changed that the run goes on from. Each episode is a row
    of evaluations/<setting>.csv in the run directory; an evaluation that is there is replaced.

    Args:
        runs: Run directories, or folders with some anywhere inside.
        distraction: Distractions to evaluate under, such as none background-hard camera-medium (default: the one of the
            training); their looks are those that are kept for testing.
        env_id: Another environment than the run's, with actions of the same size.
        episodes: Episodes per setting.
        seed: Seed of the first episode; the others have the seeds that follow.
        capture_video: Film the first episode of each setting.
        agent: The agent's file, where it is none of agents/.
        device: cpu, cuda, cuda:1, ...; auto takes the GPU if there is one.
    """
    if not runs:
        raise UserError("name at least one run, for example: semore-bench evaluate runs/demo/semore_sac")
    if episodes < 1:
        raise UserError(f"--episodes must be at least 1, got {episodes}")
    if not 0 <= seed < 2**31 - episodes:
        raise UserError(f"--seed must be from 0 to 2147483647, with all episodes that follow, got {seed}")
    for spec in distraction:
        check_distraction(spec)
    found = find_runs(runs)
    recorded = [find_trained(run, agent) for run in found.runs]  # before anything is computed
    if not recorded:
        raise UserError(f"{' '.join(map(str, runs))}: no run has got as far as a checkpoint")
    console = Console(highlight=False, soft_wrap=True)
    table = Table("agent", "seed", "environment", "setting", "env steps", "episodes", "return [95%]", "std", "success")
    for column in table.columns[4:]:
        column.justify = "right"
    for run in recorded:
        run.args.capture_video = capture_video  # those that have nothing to film say so
        trained = load_trained(run, env_id, device)
        for spec in dict.fromkeys(distraction or [trained.args.distraction]):
            result = _evaluate(trained, spec, episodes, seed)
            path = _write(run, trained, spec, result)
            console.print(f"{printable(str(path))}: mean return {_returns(result).mean():.1f}", markup=False)
            if capture_video:
                _film(trained, spec, path.with_suffix(".mp4"), seed)
            table.add_row(*_row(run, trained, spec, result))
    console.print(table, soft_wrap=False)


def _evaluate(trained: Trained, spec: str, episodes: int, seed: int) -> list[Episode]:
    args, config = trained.args, in_setting(trained.config, spec)
    with Workers(args.env_id, config, min(EVAL_WORKERS, episodes)) as workers:
        return evaluate(agent_policy(trained.agent), workers, episodes, args.frame_stack, first_seed=seed)


def _film(trained: Trained, spec: str, path: Path, seed: int) -> None:
    args, config = trained.args, in_setting(trained.config, spec)
    explain = getattr(trained.agent, "explain", None)
    film(agent_policy(trained.agent), args.env_id, config, path, args.frame_stack, explain=explain, seed=seed)


def _write(run: Recorded, trained: Trained, spec: str, episodes: list[Episode]) -> Path:
    """Writes the file of a setting; other environments than the run's have a folder each."""
    folder, setting = run.directory / "evaluations", usual_setting(spec)
    if trained.args.env_id != run.args.env_id:
        folder /= folder_name(trained.args.env_id)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for number, episode in enumerate(episodes):
        what = repr(episode.episode_return), episode.length, episode.success_any, episode.success_last
        writer.writerow([trained.env_step, number, episode.seed, *what, setting, trained.args.env_id])
    path = folder / f"{setting}.csv"
    write_atomically(path, text.getvalue().encode())
    return path


def _returns(episodes: list[Episode]) -> np.ndarray:
    return np.array([episode.episode_return for episode in episodes])


def _row(run: Recorded, trained: Trained, spec: str, episodes: list[Episode]) -> list[str]:
    """A row of the table; the interval is over episodes, not over seeds of the training."""
    returns = _returns(episodes)
    (point,), ((low,), (high,)) = bootstrap([returns[:, None]], mean)
    digits = 3 if np.abs(returns).max() <= 1 else 1
    interval = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    successes: list[Any] = [episode.success_any for episode in episodes if episode.success_any is not None]
    return [
        run.agent.name,
        str(trained.args.seed),
        printable(trained.args.env_id),
        usual_setting(spec),
        f"{trained.env_step:,}",
        str(len(episodes)),
        f"{point:.{digits}f}{interval}",
        rounded(returns.std(ddof=1) if len(returns) > 1 else np.nan, digits),
        f"{np.mean(successes):.2f}" if successes else "–",
    ]
