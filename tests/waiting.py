"""Waiting on busy machines: who waits gives up only on what hangs, not on what is slow."""

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psutil

from tests.forked import Forked

IDLE_SECONDS = 300
"""a process that uses no processor for so long hangs"""
LOOK_SECONDS = 10
"""between two looks at what it has used: they take time themselves"""
BUSY_SECONDS = 600
"""of processor time: one that uses more is in a loop"""


def wait_until(condition: Callable[[], Any], process: subprocess.Popen | Forked) -> None:
    """Waits for a condition that `process` is to bring about.

    Raises:
        AssertionError: the process, or one that it has started, hangs or loops, or it ended before.
    """
    used, moved = _processor_seconds(process), time.monotonic()
    start, looked = used, moved
    while not condition():
        ended = process.poll()
        if ended is not None and not condition():
            raise AssertionError(f"ended with {ended}")
        time.sleep(0.05)
        if time.monotonic() - looked < LOOK_SECONDS:
            continue
        looked = time.monotonic()
        if (now := _processor_seconds(process)) != used:
            used, moved = now, looked
        assert looked - moved < IDLE_SECONDS, f"no sign of life for {IDLE_SECONDS} seconds"
        assert used - start < BUSY_SECONDS, f"it did not come in {BUSY_SECONDS} seconds of processor time"


def poll_until(condition: Callable[[], Any]) -> None:
    """Waits for a condition that a thread of this process is to bring about.

    Raises:
        AssertionError: it has not come after `IDLE_SECONDS`.
    """
    end = time.monotonic() + IDLE_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def ended(process: subprocess.Popen | Forked) -> int:
    """The exit status of a process, once it has ended."""
    wait_until(lambda: process.poll() is not None, process)
    return process.returncode


def run_to_end(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run` with what the command prints as text, and a time limit for hangs alone."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, **options)
        try:
            ended(process)
        finally:
            process.kill()
            process.wait()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())


def _processor_seconds(process: subprocess.Popen | Forked) -> float:
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for member in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += sum(member.cpu_times()[:4])
    return total
