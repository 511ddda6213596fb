"""An agent's own command that trains a block of turns at a time, whenever it is told to.

So two agents, or two settings of one, can take turns on one machine, and what else goes on there meets both.
"""

import contextlib
import functools
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wrappers.errors import UserError

_MARK = "measured: "


@dataclass(frozen=True)
class Block:
    """What one turn took on average, in milliseconds: `turn` in all, and its parts.

    `wait` is for the environment, after the updates; `sample` is a part of `update`. Memory in megabytes: the most
    that the process, without its environments, and the GPU have held so far. `replay_bytes` per transition. `flow`:
    whether the environment computes it. `busy`: acting and updating, turn by turn, for not all have an update.
    """

    turn: float
    act: float
    update: float
    sample: float
    wait: float
    add: float
    memory: float
    gpu_memory: float
    replay_bytes: float
    flow: bool
    busy: list[float]


class Stepper:
    """An agent in a process of its own; a context manager.

    Args:
        file: the agent's file.
        flags: its flags, without --run-dir: it gets a folder that is deleted afterwards.
        environment: variables for the process, besides the usual ones.

    Raises:
        UserError: the agent ends; with the last line that it said.
    """

    def __init__(self, file: Path, flags: Sequence[str], environment: dict[str, str] | None = None):
        self.name = file.stem
        self._folder = tempfile.TemporaryDirectory(prefix="semore-bench-")
        self.folder = Path(self._folder.name)
        self._log = self.folder / "log.txt"
        fixed = {"run-dir": str(self.folder / "run"), "total-env-steps": 10**7, "eval-every": 10**7}
        fixed |= {"checkpoint-every": 5000, "replay-capacity": 5000}
        words = [word for name, value in fixed.items() for word in (f"--{name}", str(value))]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(file), *words, *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | (environment or {}),
                start_new_session=True,
            )

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()

    def run(self, turns: int) -> Block:
        """Trains for a number of turns; before and afterwards the process and its environments are halted."""
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            self._process.stdin.write(f"{turns}\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith(_MARK):
                    os.killpg(self._process.pid, signal.SIGSTOP)
                    return Block(**json.loads(line.removeprefix(_MARK)))
        except (BrokenPipeError, ProcessLookupError):
            pass
        said = self._log.read_text().strip().splitlines() or ["nothing"]
        raise UserError(f"{self.name} ended while it was measured; the last thing that it said: {said[-1]}")


def serve(file: str, flags: Sequence[str]) -> None:
    """Runs an agent's command in this process, a block of turns for each number that comes in on stdin."""
    import psutil
    import torch

    from semore_bench import runs
    from semore_bench.replay import Replay

    spent: dict[str, float] = defaultdict(float)
    process = psutil.Process()

    def timed(owner: Any, name: str, key: str) -> None:
        function: Callable = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            if torch.cuda.is_available() and key in ("act", "update"):
                torch.cuda.synchronize()
            spent[key] += time.perf_counter() - began
            return result

        setattr(owner, name, wrapped)

    steps = runs.Run.steps

    def in_blocks(run: runs.Run, agent: torch.nn.Module, replay: Replay) -> Iterator[runs.Turn]:
        for name in ("act", "update"):
            timed(agent, name, name)
        turns, most = steps(run, agent, replay), 0.0
        for line in sys.stdin:
            spent.clear()
            began = time.perf_counter()
            busy = []
            for turn in itertools.islice(turns, int(line)):
                before = spent["act"] + spent["update"]
                yield turn
                busy.append(1e3 * (spent["act"] + spent["update"] - before))
            seconds = dict.fromkeys(("act", "update", "sample", "wait", "add"), 0.0) | spent
            seconds["turn"] = time.perf_counter() - began
            most = max(most, process.memory_info().rss / 1e6)
            gpu = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else 0.0
            means = {name: 1e3 * value / int(line) for name, value in seconds.items()}
            more = {"memory": most, "gpu_memory": gpu, "replay_bytes": replay.nbytes / (replay.num_envs * replay.slots)}
            more |= {"flow": "flow" in run.observation_space.spaces, "busy": busy}
            print(_MARK + json.dumps(means | more), flush=True)

    setattr(runs.Run, "steps", in_blocks)  # noqa: B010 (of another class, as far as types go)
    runs.CHECKPOINT_SECONDS = float("inf")
    timed(runs.Run, "receive", "wait")
    for name, key in (("sample", "sample"), ("add", "add")):
        timed(Replay, name, key)
    sys.argv = [file, *flags]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
