"""Short runs on the toy environment: started, called, waited for, and compared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.forked import Forked
from tests.waiting import run_to_end, wait_until

ROOT = Path(__file__).parents[1]
TOY = {"env_id": "tests.toy_env:Toy-v0", "image_size": 36, "batch_size": 4, "random_steps": 20, "action_repeat": 2}
TOY |= {"total_env_steps": 500, "eval_every": 200, "eval_episodes": 3, "checkpoint_every": 30, "device": "cpu"}


def command(agent: str, run_dir: Path, settings: dict) -> list[str]:
    words = [sys.executable, str(ROOT / "agents" / f"{agent}.py"), "--run-dir", str(run_dir)]
    for name, value in settings.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def start(module, run_dir: Path, **settings) -> Forked:
    """Starts an agent; what it prints is appended to a file beside its run directory."""
    return Forked(lambda: call(module, run_dir, **settings), Path(f"{run_dir}.log"))


def finish(*args) -> subprocess.CompletedProcess:
    """Types an agent's command line and waits."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return run_to_end(command(*args), env=environment)


def call(module, run_dir: Path, **settings) -> None:
    module.main(module.Args(run_dir=str(run_dir), **{**TOY, **settings}))


def agent_step(run_dir: Path) -> int:
    names = [path.stem for path in (run_dir / "checkpoint").glob("agent-step-*.pt")]
    return max((int(name.rsplit("-", 1)[1]) for name in names), default=0)


def wait_for(process: Forked, run_dir: Path, condition) -> None:
    try:
        wait_until(condition, process)
    except AssertionError as error:
        pytest.fail(f"{error}: {Path(f'{run_dir}.log').read_text()[-3000:]}")


def outcome(run_dir: Path) -> dict:
    """Everything that must not depend on interruptions: logs, and all that the last checkpoint holds."""
    newest = max((run_dir / "checkpoint").glob("agent-step-*.pt"))
    state = torch.load(newest, weights_only=True)
    del state["wall_seconds"], state["csv"]["metrics"]
    return {
        "train": (run_dir / "train.csv").read_bytes(),
        "eval": (run_dir / "eval.csv").read_bytes(),
        "state": state,
    }


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same(run_dir: Path, reference: Path) -> None:
    got, want = outcome(run_dir), outcome(reference)
    assert got["train"] == want["train"]
    assert got["eval"] == want["eval"]
    for name in want["state"]:
        assert equal(got["state"][name], want["state"][name]), name
