"""Where the runs of a sweep are executed: as processes of this machine, or as tasks of a Ray cluster."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from semore_bench import records
from semore_bench.names import printable
from semore_bench.rundir import lock, write_atomically
from wrappers.errors import UserError

ATTEMPTS = 3
"""how often a run may crash before it is given up"""
HANG_SECONDS = 1800
"""a run that neither logs nor lives a heartbeat for so long is killed, which counts as a crash"""
STOP_SECONDS = 60
"""time to save that a run is given when it is asked to stop"""
NODE_DEATHS = 20
"""how many dead nodes or Ray workers one run may survive"""
POLL_SECONDS = 0.2
TAIL_LINES = 12

State = Literal["finished", "failed", "stopped", "taken"]
"""how an executor left a run; `taken`: another process is at work there"""


@dataclass(frozen=True)
class Job:
    """A run to be executed.

    `environment`: variables that differ from the executor's own. `waited`: it was taken by another process before,
    whose verdict on it counts.
    """

    command: tuple[str, ...]
    run_dir: Path
    cwd: Path
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    waited: bool = False

    @property
    def typed(self) -> str:
        """The command as it is typed by hand."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])

    @property
    def log(self) -> Path:
        """What the run prints, beside its directory."""
        return self.run_dir.with_name(f"{self.run_dir.name}.log")


@dataclass(frozen=True)
class Outcome:
    """What became of a run, after how many attempts, and why if it failed."""

    state: State
    attempts: int = 0
    error: str = ""


class LocalExecutor:
    """Runs as processes of this machine, `workers` at a time."""

    def __init__(self, workers: int):
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers)

    def submit(self, job: Job) -> Future[Outcome]:
        """Queues a run."""
        return self._pool.submit(supervise, job, self._stop.is_set)

    def stop(self) -> None:
        """Asks all runs to save and end; those that wait do not begin."""
        self._stop.set()

    def close(self) -> None:
        """Ends what is left."""
        self.stop()
        self._pool.shutdown()


class RayExecutor:
    """Runs as tasks of a Ray cluster, which decides by the resources they need how many go on where, and starts those
    of a dead node anew on another; the run directories must be on storage that all nodes share.

    Args:
        address: of a running cluster; None: the one that RAY_ADDRESS names, or a new one on this machine.
        cpus, gpus, memory: what one run needs; `gpus` may be a fraction, `memory` is in bytes.

    Raises:
        UserError: Ray is not installed, or nothing answers at that address.
    """

    def __init__(self, address: str | None, cpus: float, gpus: float, memory: int):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # a cluster also starts on a busy machine
        try:
            import ray
        except ImportError:
            raise UserError("--executor ray needs Ray; type: pip install ray") from None
        self._ray = ray
        address = address or os.environ.get("RAY_ADDRESS")
        try:
            if (host := (address or "").removeprefix("ray://").rpartition(":"))[1]:
                socket.create_connection((host[0], int(host[2])), timeout=10).close()  # Ray itself tries for minutes
            ray.init(address, log_to_driver=False, logging_level="error")
        except Exception as error:  # Ray raises plain ones
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"no Ray cluster answers at {address} ({reason}); start one with `ray start --head`, or leave "
                "--ray-address away"
                if address
                else f"Ray did not start ({reason}); its logs are in /tmp/ray/session_latest/logs"
            ) from None
        needed = {"CPU": cpus, "GPU": gpus, "memory": memory}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= amount for name, amount in needed.items()) for node in nodes):
            print(f"warning: no node of the Ray cluster has {needed}; the runs wait for one", file=sys.stderr)
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, memory=memory, max_retries=NODE_DEATHS)(supervise)
        self._references: list[Any] = []

    def submit(self, job: Job) -> Future[Outcome]:
        """Hands a run to Ray."""
        reference = self._task.remote(job)
        self._references.append(reference)
        return reference.future()

    def stop(self) -> None:
        """Asks all runs to save and end."""
        for reference in self._references:
            self._ray.cancel(reference)

    def close(self) -> None:
        """Leaves the cluster; one that was started here ends."""
        self._ray.shutdown()


def supervise(job: Job, stopping: Callable[[], bool] = lambda: False) -> Outcome:
    """Executes a run's command until it finishes, is stopped, or has crashed too often; what it prints goes to its log.

    Its log is locked for as long as the run or a worker of it lives, so that no other sweep takes it up.
    """
    if stopping():
        return Outcome("stopped")
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        if not (lock(log) and _is_idle(job.run_dir)):
            return Outcome("taken")
        status = read_status(job.run_dir)
        if status.get("state") == "finished":
            return Outcome("finished")
        if job.waited and status.get("state") == "failed":
            return Outcome("failed", error=status.get("error") or "")
        for attempt in range(1, ATTEMPTS + 1):
            code = _attempt(job, log, stopping)
            if code == 0:
                return Outcome("finished", attempt)
            if code is None:
                return Outcome("stopped", attempt)
        error = f"{_ending(code)} {ATTEMPTS} times; the last lines of {job.log}:\n{tail(job.log)}"
        _mark_failed(job.run_dir, error)
        return Outcome("failed", ATTEMPTS, error)


def _attempt(job: Job, log: BinaryIO, stopping: Callable[[], bool]) -> int | None:
    """The exit status of the command; None if it was stopped."""
    _clear_remains(job.run_dir)
    log.write(f"\n$ {job.typed}\n".encode())
    log.flush()
    process = subprocess.Popen(
        [sys.executable, "-m", "semore_bench.tether", str(os.getpid()), *job.command],
        cwd=job.cwd,
        env={**os.environ, **job.environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,  # Ctrl-C reaches the sweep alone, which asks its runs to stop, once
    )
    life, lived = None, time.monotonic()
    try:
        while (code := process.poll()) is None:
            if stopping():
                return None
            if (signs := _signs_of_life(job)) != life:
                life, lived = signs, time.monotonic()
            elif time.monotonic() - lived > HANG_SECONDS:
                log.write(f"no sign of life for {HANG_SECONDS} seconds: killed\n".encode())
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        return code
    finally:  # also when Ray cancels the task, which raises KeyboardInterrupt here
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Lets a process save and end, then sees to it that nothing of its group is left."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _is_idle(run_dir: Path) -> bool:
    """Whether nobody trains there, by hand for example."""
    try:
        with open(run_dir / ".lock", "r+b") as file:
            return lock(file)
    except FileNotFoundError:
        return True


def _signs_of_life(job: Job) -> list[float]:
    return [path.stat().st_mtime for path in (job.log, job.run_dir / "status.json") if path.exists()]


def _clear_remains(run_dir: Path) -> None:
    """Removes what stays of a run that ended before it had a config.json: an agent begins in an empty folder."""
    if not (run_dir / "config.json").exists():
        for path in (run_dir / "status.json", *run_dir.glob(".config.json.*")):
            path.unlink(missing_ok=True)


def _ending(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"ended with exit status {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _mark_failed(run_dir: Path, error: str) -> None:
    status = read_status(run_dir) | {"state": "failed", "error": error}
    write_atomically(run_dir / "status.json", json.dumps(status, indent=2).encode())


def read_status(run_dir: Path) -> dict[str, Any]:
    """status.json of a run; empty where there is none yet, or it is damaged: the run itself will write it anew."""
    with suppress(records.UnusableRun):
        return records.read_status(run_dir)
    return {}


def tail(log: Path) -> str:
    """The last lines of a log, without escape codes; of a progress bar its last state."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
        lines = [line.rpartition("\r")[2] for line in re.split(r"\r?\n", file.read().decode("utf-8", "replace"))]
    return "\n".join([_shown(line) for line in lines if line.strip()][-TAIL_LINES:])


def _shown(line: str) -> str:
    """A line of a log as a terminal may show it, its indentation kept."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)  # colours
    return plain[: len(plain) - len(plain.lstrip())] + printable(plain)
