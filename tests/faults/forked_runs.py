"""Runs of the tiny agent in processes of their own, with a fault, and what is left of them."""

import os
import sys
import time
import traceback
from pathlib import Path

from tests.faults import tiny_agent
from tests.waiting import wait_until


class Forked:
    """A learner in a process group of its own. It is forked, because PyTorch is loaded here already, which otherwise
    takes most of the time of a short run. What it prints goes to a file."""

    def __init__(self, words: list[str], fault: str, log: Path):
        tiny_agent.Agent(1, tiny_agent.Args())  # PyTorch loads more with the first optimizer: once for all
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setpgid(0, 0)
                sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115
                os.dup2(sys.stdout.fileno(), 1)
                os.dup2(sys.stdout.fileno(), 2)
                tiny_agent.run_with(words, fault)
                os._exit(0)
            except SystemExit as end:
                os._exit(end.code)
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    def poll(self) -> int | None:
        """Its exit status, or minus a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def run(run_dir: Path, settings: dict, fault: str = "") -> int:
    """Runs it to its end, whatever that is, and returns its exit status; nothing of it is left then."""
    words = ["--run-dir", str(run_dir)]
    for name, value in settings.items():
        words += [f"--{name}"] + ([] if value is True else [str(value)])
    process = Forked(words, fault, log_of(run_dir))
    wait_until(lambda: process.poll() is not None, process)
    end = time.monotonic() + 300
    while group_exists(process.pid):
        assert time.monotonic() < end, "workers outlived the learner"
        time.sleep(0.02)
    return process.returncode


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def log_of(run_dir: Path) -> Path:
    """What it prints: beside it, but not on a disk of its own that may be full."""
    parent = run_dir.parent
    return (parent.parent if parent.is_mount() else parent) / f"{run_dir.name}.log"


def said(run_dir: Path) -> str:
    return log_of(run_dir).read_text()


def events(run_dir: Path) -> int:
    return int(said(run_dir).rsplit("events ", 1)[1])
