"""Processes forked from the tests' own, which has loaded PyTorch already: that takes most of a short run's time."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


class Forked:
    """Does some work in a process group of its own; much like a `subprocess.Popen`.

    Args:
        work: what it does. Its exit status is 0, what it asks `sys.exit` for, or 1 after any other error.
        log: what it prints is appended to this file.
    """

    def __init__(self, work: Callable[[], None], log: Path):
        torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # the first one loads more: once for all
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setpgid(0, 0)
                sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
                os.dup2(sys.stdout.fileno(), 1)
                os.dup2(sys.stdout.fileno(), 2)
                work()
                os._exit(0)
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    def poll(self) -> int | None:
        """Its exit status, or minus a signal; None while it runs."""
        if self.returncode is None:
            self._take(*os.waitpid(self.pid, os.WNOHANG))
        return self.returncode

    def wait(self) -> int:
        """Waits until it has ended."""
        if self.returncode is None:
            self._take(*os.waitpid(self.pid, 0))
        return self.returncode

    def _take(self, pid: int, status: int) -> None:
        if pid:
            self.returncode = os.waitstatus_to_exitcode(status)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
