"""Signals that ask a run to save and end."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

STOPPING = {signal.SIGINT, signal.SIGTERM}
"""signals that ask a run to save and end"""
SIGNAL_SECONDS = 1
"""signals this close together are one: `timeout` and others send theirs to the process and to its group"""


class Stopped(SystemExit):
    """The run was asked to stop by a signal; everything is saved."""


class StopRequest:
    """Takes `STOPPING` signals down for the training loop to act on; a context manager. A second one interrupts."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._moment = 0.0

    @property
    def asked(self) -> bool:
        """Whether the run was asked to stop."""
        return self._number is not None

    def raise_if_asked(self) -> None:
        """Raises `Stopped` with the exit status of the signal that asked."""
        if self._number is not None:
            raise Stopped(128 + self._number)

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._on_signal) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self._number is None:
            self._number, self._moment = number, now
        elif now - self._moment > SIGNAL_SECONDS:  # asked again: at once
            raise KeyboardInterrupt


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Has signals wait, so that processes started meanwhile are not killed by one before they can ignore it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def leave_signals_to_parent() -> None:
    """To be called first in a process begun under `signals_held`: its parent sees the signals too, and ends it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
