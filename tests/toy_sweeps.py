"""Sweeps, most of an agent that only counts: started, ended, and looked at from outside."""

import contextlib
import io
import json
import os
import subprocess
import sys
import unittest.mock
from pathlib import Path

import psutil
import pytest

from semore_bench import cli, executors
from tests.waiting import run_to_end

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FAKE = f'''
name = "fake"
[agents.counter]
agent = "{ROOT}/tests/fake_agent.py"
[[tasks]]
env_id = "A/one-v0"
total_env_steps = 40
'''
STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A test that fails leaves no sweep behind, and so no run."""
    yield
    while STARTED:
        STARTED.pop().kill()


def words(folder: Path, suite: str, *more: str) -> list[str]:
    file = folder / "suite.toml"
    file.write_text(suite)
    program = "import sys; from semore_bench.cli import main; main(sys.argv[1:])"
    return [sys.executable, "-c", program, "sweep", str(file), "--runs-dir", str(folder / "runs"), *more]


def start(folder: Path, suite: str, *more: str, **options) -> subprocess.Popen:
    """Starts a sweep; what it prints is appended to a file."""
    with open(folder / "sweep.log", "a") as log:
        streams = {"stdout": log, "stderr": log} | options
        process = subprocess.Popen(words(folder, suite, *more), env=ENVIRONMENT, cwd=folder, process_group=0, **streams)
    STARTED.append(process)
    return process


def finish(folder: Path, suite: str, *more: str) -> subprocess.CompletedProcess:
    command = words(folder, suite, *more)
    return run_to_end(command, env=ENVIRONMENT, cwd=folder)


def here(folder: Path, suite: str, *more: str) -> subprocess.CompletedProcess:
    """A sweep that starts no run, in this process, which has loaded already what takes seconds to load."""
    command = words(folder, suite, *more)
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        unittest.mock.patch.dict(os.environ, ENVIRONMENT),
    ):
        status = cli.run(command[command.index("sweep") :])
    return subprocess.CompletedProcess(command, status or 0, out.getvalue(), err.getvalue())


def run_dirs(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("*/*/*/seed-*/"))


def states(folder: Path) -> dict[str, str]:
    """`agent/seed-1`: state."""
    return {
        f"{run.parent.name}/{run.name}": json.loads((run / "status.json").read_text())["state"]
        for run in run_dirs(folder)
        if (run / "status.json").exists()
    }


def processes(run: Path) -> list[int]:
    """Of a fake run: the ids of all processes that ever worked on it."""
    file = run / "history.txt"
    return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.exists() else []


def count(run: Path) -> int:
    return executors.read_status(run).get("env_step") or 0


def gone(ids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in ids)
