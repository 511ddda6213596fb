"""The execution of a sweep's runs, watched."""

import os
import signal
import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from semore_bench.executors import LocalExecutor, Outcome, RayExecutor, read_status
from semore_bench.plan import Planned

SECONDS_BETWEEN_LINES = 60
"""of progress, where the output is no terminal"""
SECONDS_UNTIL_ASKED_AGAIN = 3
"""whether a run that another process has taken is free"""


class Watch:
    """Executes runs and shows how they get on; a signal stops them all in good order, a second one at once."""

    def __init__(self, console: Console, executor: LocalExecutor | RayExecutor, runs: list[Planned]):
        self.console, self.executor, self.runs = console, executor, runs
        self.outcomes: dict[Planned, Outcome] = {}
        self.signalled = 0
        self._stopped = False
        self._futures: dict[Future[Outcome], Planned] = {}
        self._taken: dict[Planned, float] = {}  # by other processes, and when to ask again
        self._waited: set[Planned] = set()
        self._began, self._lined = time.time(), time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            TextColumn("{task.fields[state]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[Planned, TaskID] = {}

    def until_done(self) -> tuple[dict[Planned, Outcome], int]:
        """Returns what became of every run, and the number of the signal that ended it early, or 0."""
        signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        handled = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]  # nohup
        handlers = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            with self._progress:
                total = self._progress.add_task("all runs", total=len(self.runs), state="")
                self._submit(self.runs)
                while self._futures or self._taken:
                    self._step()
                    self._progress.update(total, completed=len(self.outcomes))
        finally:
            self.executor.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.outcomes, self.signalled

    def _on_signal(self, number: int, _: object) -> None:
        if self.signalled:
            os._exit(128 + number)  # the runs are tied to this process and end with it
        self.signalled = number

    def _submit(self, runs: Iterable[Planned]) -> None:
        for run in runs:
            self._futures[self.executor.submit(replace(run.job, waited=run in self._waited))] = run

    def _step(self) -> None:
        if self.signalled and not self._stopped:
            self._stopped = True
            self._say("stopping: the runs are saving; once more ends them at once")
            self.executor.stop()
            self._taken.clear()
        done, _ = wait(self._futures, timeout=0.5, return_when="FIRST_COMPLETED")
        for future in done:
            self._take(self._futures.pop(future), future)
        if not self._futures:
            time.sleep(0.5)
        due = [run for run, moment in self._taken.items() if time.monotonic() > moment]
        for run in due:
            del self._taken[run]
        self._submit(due)
        self._show()

    def _take(self, run: Planned, future: Future[Outcome]) -> None:
        if error := future.exception():
            outcome = Outcome("stopped" if self._stopped else "failed", error=f"{type(error).__name__}: {error}")
        else:
            outcome = future.result()
        if outcome.state == "taken":
            if run not in self._waited:
                self._waited.add(run)
                self._say(f"{run.name}: another process is at work there; waiting for it")
            if not self._stopped:
                self._taken[run] = time.monotonic() + SECONDS_UNTIL_ASKED_AGAIN
            return
        self.outcomes[run] = outcome
        if run in self._bars:
            self._progress.remove_task(self._bars.pop(run))
        if outcome.state == "finished":
            self._say(f"{run.name}: finished, evaluation return {run.final_return()}")
        elif outcome.state == "failed":
            self._say(f"{run.name}: failed; {outcome.error}")

    def _show(self) -> None:
        """What the runs that are under way have written into their status.json."""
        print_now = not self.console.is_terminal and time.monotonic() - self._lined > SECONDS_BETWEEN_LINES
        for run in self._futures.values():
            status = read_status(run.job.run_dir)
            if status.get("state") != "running" or (status["heartbeat"] or 0) < self._began:
                continue
            state = f"{status['env_step'] or 0:,} of {run.total_env_steps:,} env steps"
            if status["last_return"] is not None:
                state += f", last return {status['last_return']:.0f}"
            if run not in self._bars:
                self._bars[run] = self._progress.add_task(run.name, total=run.total_env_steps, state="")
            self._progress.update(self._bars[run], completed=status["env_step"] or 0, state=state)
            if print_now:
                self._say(f"{run.name}: {state}")
        if print_now:
            self._lined = time.monotonic()
            self._say(f"{len(self.outcomes)} of {len(self.runs)} runs done")

    def _say(self, text: str) -> None:
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, soft_wrap=True)
