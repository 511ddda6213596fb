"""Runs of the tiny agent in processes of their own, with a fault, and what is left of them."""

import os
import time
from pathlib import Path

from tests.faults import tiny_agent
from tests.forked import Forked
from tests.waiting import wait_until


def run(run_dir: Path, settings: dict, fault: str = "") -> int:
    """Runs it to its end, whatever that is, and returns its exit status; nothing of it is left then."""
    words = ["--run-dir", str(run_dir)]
    for name, value in settings.items():
        words += [f"--{name}"] + ([] if value is True else [str(value)])
    log_of(run_dir).unlink(missing_ok=True)
    process = Forked(lambda: tiny_agent.run_with(words, fault), log_of(run_dir))
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
