"""An agent for tests of the harness: it keeps the contract of a run directory and counts instead of learning.

It counts to its budget, saves every count, and leaves a line in `history.txt` for every process that worked on it.
"""

import fcntl
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import tyro

from semore_bench.args import CommonArgs


@dataclass
class Args(CommonArgs):
    """A counter."""

    delay: float = 0.02
    """seconds per count"""
    crashes: int = 0
    """how many processes crash in the middle"""
    crash_seed: int = 0
    """the seed that crashes (0: all do)"""
    crash_with: int = 3
    """their exit status, or minus a signal"""
    hang: bool = False
    """stop in the middle, without a heartbeat"""

    def env_config(self):
        return SimpleNamespace(flow=None)


def main(args: Args) -> None:
    args.resolve()
    crashes = args.crashes if args.crash_seed in (0, args.seed) else 0
    run_dir = Path(args.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir / ".lock", "a")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    config = {"agent": "fake_agent", "env_id": args.env_id, "seed": args.seed, "args": vars(args)}
    (run_dir / "config.json").write_text(json.dumps(config))
    with open(run_dir / "history.txt", "a") as file:
        file.write(f"{os.getpid()} {time.time()}\n")
    processes = len((run_dir / "history.txt").read_text().splitlines())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    count = int((run_dir / "count.txt").read_text() or 0) if (run_dir / "count.txt").exists() else 0

    def status(state: str) -> None:
        content = {"state": state, "env_step": count, "agent_step": count, "last_return": None, "error": None}
        content |= {"wall_seconds": count * args.delay, "heartbeat": time.time(), "pid": os.getpid()}
        (run_dir / "status.new").write_text(json.dumps(content))
        (run_dir / "status.new").replace(run_dir / "status.json")

    try:
        while count < args.total_env_steps:
            time.sleep(args.delay)
            count += 1
            (run_dir / "count.new").write_text(str(count))
            (run_dir / "count.new").replace(run_dir / "count.txt")
            status("running")
            if count == args.total_env_steps // 2 and args.hang:
                time.sleep(1000)
            if processes <= crashes and count >= args.total_env_steps // 2:
                print(f"crash number {processes}\nthe reason is here", flush=True)
                if args.crash_with < 0:
                    os.kill(os.getpid(), -args.crash_with)
                sys.exit(args.crash_with)
    except SystemExit:
        status("stopped" if processes > crashes else "failed")
        raise
    (run_dir / "eval.csv").write_text(f"env_step,episode_return\n{count},{args.seed}\n")
    status("finished")


if __name__ == "__main__":
    main(tyro.cli(Args))
