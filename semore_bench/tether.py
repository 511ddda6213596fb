"""`python -m semore_bench.tether PID COMMAND...`: becomes COMMAND, which the kernel kills when its parent PID dies.

A sweep that is killed cannot stop its runs any more; this way none is left behind that holds a lock. It is a program of
its own because a process with threads must not run Python between fork and exec.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2); Linux alone


def follow(parent: int) -> None:
    """Has this process killed when the one that started it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was asked
        sys.exit(f"the process {parent} that started this one is gone")


def main() -> None:
    """Ties the process to its parent and hands it over."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    follow(parent)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
