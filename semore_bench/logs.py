"""What a training run writes while it runs: CSV files, TensorBoard, a progress bar and status.json."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from semore_bench.evaluation import Episode
from semore_bench.rundir import CLOCK, EVAL_COLUMNS, METRIC_COLUMNS, TRAIN_COLUMNS, CsvFile, write_status
from wrappers.errors import UserError

LOG_EVERY = 100
"""agent steps between rows of metrics"""
HEARTBEAT_SECONDS = 5


class RunLogs:
    """The logs of a run; `env_step` and `agent_step` say when something was so.

    Args:
        directory: of the run.
        total_env_steps: the run's budget.
        resources: closes the CSV files, and what `start` opens.

    Attributes:
        pending: metrics of the updates since they were last written.
    """

    def __init__(self, directory: Path, total_env_steps: int, resources: contextlib.ExitStack):
        self.directory, self.total_env_steps = directory, total_env_steps
        columns = {"train": TRAIN_COLUMNS, "eval": EVAL_COLUMNS, "metrics": METRIC_COLUMNS}
        self.csv = {
            name: resources.enter_context(contextlib.closing(CsvFile(directory / f"{name}.csv", columns[name])))
            for name in columns
        }
        self.wall_before = 0.0  # seconds of the processes that this one continues
        self._began = self._beat = time.monotonic()
        self._tensorboard: SummaryWriter | None = None
        self._progress: tqdm | None = None
        self.pending: list[dict[str, torch.Tensor]] = []
        self._written: tuple[int, float] | None = None  # env step and time of the metrics written last

    def start(self, description: str, env_step: int, resources: contextlib.ExitStack) -> None:
        """Opens TensorBoard's events and the progress bar."""
        self._tensorboard = SummaryWriter(self.directory / "tensorboard", purge_step=env_step)
        resources.callback(self._tensorboard.close)
        self._progress = tqdm(
            total=self.total_env_steps,
            initial=env_step,
            unit=" env steps",
            desc=description,
            mininterval=0.5 if sys.stderr.isatty() else 30,
            smoothing=0.05,
        )
        resources.callback(self._progress.close)

    @property
    def wall_seconds(self) -> float:
        """Seconds of the run so far, those of earlier processes included."""
        return self.wall_before + time.monotonic() - self._began

    def advance(self, env_step: int) -> None:
        """Moves the progress bar."""
        if self._progress is not None:
            self._progress.update(min(env_step, self.total_env_steps) - self._progress.n)

    def training_episode(self, env_step: int, agent_step: int, number: int, episode: Episode) -> None:
        """Writes a row of train.csv."""
        self.csv["train"].write([env_step, agent_step, number, *_columns(episode)])
        self._scalar("train/episode_return", episode.episode_return, env_step)
        if self._progress is not None:
            self._progress.set_postfix_str(f"last return {episode.episode_return:.0f}")

    def evaluation(
        self, env_step: int, agent_step: int, number: int, evaluated: dict[str, list[Episode]], wall_seconds: float
    ) -> None:
        """Writes a row of eval.csv per setting, the usual one first, and episode; `number` training episodes had ended
        by then. `wall_seconds`: of the run when the evaluation began; its own time is none of what it evaluates."""
        self.csv["metrics"].write([env_step, agent_step, CLOCK, f"{wall_seconds:.6g}"])
        for place, (setting, episodes) in enumerate(evaluated.items()):
            for index, episode in enumerate(episodes):
                self.csv["eval"].write([env_step, agent_step, number, index, *_columns(episode), setting])
            mean = float(np.mean([episode.episode_return for episode in episodes]))
            self._scalar(f"eval/{setting}/episode_return" if place else "eval/episode_return", mean, env_step)
            how = f"{len(episodes)} episodes" + (f", {setting}" if len(evaluated) > 1 else "")
            tqdm.write(f"env step {env_step}: evaluation return {mean:.1f} ({how})", sys.stderr)

    def add_update(self, metrics: dict[str, torch.Tensor]) -> None:
        """Keeps the metrics of an update, as tensors: they are read, averaged and checked later, all at once."""
        self.pending.append(metrics)

    def write_metrics(self, env_step: int, agent_step: int, more: dict[str, float]) -> None:
        """Writes the means of the updates' metrics since it was last done, speed, memory, and `more`."""
        values, self.pending = self._read_pending(agent_step), []
        now = time.monotonic()
        if self._written is not None:
            steps, moment = self._written
            values["speed/env_steps_per_second"] = (env_step - steps) / max(now - moment, 1e-9)
        self._written = env_step, now
        values[CLOCK] = self.wall_seconds
        values["speed/memory_megabytes"] = psutil.Process().memory_info().rss / 1e6
        for name, value in (values | more).items():
            self.csv["metrics"].write([env_step, agent_step, name, f"{value:.6g}"])
            self._scalar(name, value, env_step)

    def _read_pending(self, agent_step: int) -> dict[str, float]:
        """Means of the metrics since they were last written.

        Raises:
            UserError: one of them is not finite; what was saved before stays.
        """
        collected: dict[str, list[torch.Tensor]] = {}
        for metrics in self.pending:
            for name, value in metrics.items():
                collected.setdefault(name, []).append(value)
        if not collected:
            return {}
        means = torch.stack([torch.stack(list(values)).float().mean() for values in collected.values()]).tolist()
        for name, mean in zip(collected, means, strict=True):
            if not np.isfinite(mean):
                raise UserError(
                    f"{name} became {mean} between agent steps {agent_step - LOG_EVERY} and {agent_step}; the last "
                    f"good checkpoint is kept in {self.directory / 'checkpoint'}; try a smaller learning rate"
                )
        return dict(zip(collected, means, strict=True))

    def heartbeat(self, env_step: int, agent_step: int, last_return: float | None) -> None:
        """Writes status.json, if it is time."""
        if time.monotonic() - self._beat > HEARTBEAT_SECONDS:
            self._beat = time.monotonic()
            self.status("running", env_step, agent_step, last_return)

    def status(
        self, state: str, env_step: int, agent_step: int, last_return: float | None, error: str | None = None
    ) -> None:
        """Writes status.json."""
        status = {
            "state": state,
            "error": error,
            "env_step": env_step,
            "agent_step": agent_step,
            "total_env_steps": self.total_env_steps,
            "last_return": last_return,
            "wall_seconds": round(self.wall_seconds, 1),
            "heartbeat": time.time(),
            "pid": os.getpid(),
        }
        write_status(self.directory / "status.json", status)

    def _scalar(self, name: str, value: float, env_step: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add_scalar(name, value, env_step)


def _columns(episode: Episode) -> list[Any]:
    # repr keeps every digit: two runs are equal only if these are
    return [repr(episode.episode_return), episode.length, episode.success_any, episode.success_last]
