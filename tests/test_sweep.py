"""Sweeps that are killed, stopped, doubled, given broken agents or other settings."""

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from agents import drq_sac
from semore_bench import executors, suites
from semore_bench import sweep as sweep_module
from semore_bench.executors import Job, supervise
from tests.toy_runs import call
from tests.toy_sweeps import (
    ENVIRONMENT,
    FAKE,
    ROOT,
    count,
    finish,
    gone,
    here,
    nothing_is_left,  # noqa: F401  a fixture
    processes,
    run_dirs,
    start,
    states,
)
from tests.waiting import ended, wait_until
from wrappers.errors import UserError

TOY = """
name = "toy"
[settings]
image_size = 36
batch_size = 4
random_steps = 20
action_repeat = 2
eval_every = 150
eval_episodes = 1
checkpoint_every = 10
device = "cpu"
[[tasks]]
env_id = "tests.toy_env:Toy-v0"
total_env_steps = 300
"""


# ---- real agents ----


def saved_steps(folder: Path) -> int:
    """Agent steps in the last checkpoints of all runs together."""
    total = 0
    for run in run_dirs(folder):
        names = [path.stem for path in (run / "checkpoint").glob("agent-step-*.pt")]
        total += max((int(name.rsplit("-", 1)[1]) for name in names), default=0)
    return total


def test_killed_at_random_moments_it_gives_what_undisturbed_runs_give(tmp_path, request):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    arguments = ("--agents", "drq_sac", "--seeds", "2", "--workers", "2")
    dice = random.Random(5)
    # What is killed, and how much later than it began: agent steps, or seconds while everything loads or restores.
    # Nothing waits for more than 30 steps, so that there is something left to kill on a fast machine too.
    moments = (("run", 15, 300), ("all", 30, 4), ("sweep", 15, 300), ("sweep", 30, 7), ("all", 20, 300))
    moments = moments if request.config.getoption("--long") else moments[:2]
    for victims, steps, seconds in moments:
        process = start(killed, TOY, *arguments)
        goal = saved_steps(killed) + (steps if seconds < 300 else dice.randint(steps // 2, 2 * steps))
        end = time.monotonic() + (dice.uniform(0, seconds) if seconds < 300 else seconds)
        while saved_steps(killed) < goal and time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, (killed / "sweep.log").read_text()
        tree = psutil.Process(process.pid).children(recursive=True)
        if victims != "sweep" and tree:
            for victim in dice.sample(tree, len(tree)) if victims == "all" else [dice.choice(tree)]:
                victim.kill()
            time.sleep(dice.uniform(0, 2) if victims == "run" else 0)
            tree += psutil.Process(process.pid).children(recursive=True)  # a second attempt may have begun
        process.kill()
        process.wait()
        assert not psutil.wait_procs(tree, timeout=300)[1], "something outlived the sweep"
    assert saved_steps(killed) < 2 * 150, "it was over before it was killed for the last time"

    done = finish(killed, TOY, *arguments)
    assert done.returncode == 0, done.stdout
    suite = tomllib.loads(TOY)
    assert len(run_dirs(killed)) == 2
    for seed, run in enumerate(run_dirs(killed), 1):
        call(drq_sac, whole / run.name, seed=seed, **suite["settings"], **suite["tasks"][0])
        for file in ("train.csv", "eval.csv"):
            assert (run / file).read_bytes() == (whole / run.name / file).read_bytes(), (run, file)
    before = {run: (run / "status.json").read_bytes() for run in run_dirs(killed)}
    again = here(killed, TOY, *arguments)
    assert (again.returncode, "2 runs, 0 to do" in again.stdout) == (0, True)
    assert {run: (run / "status.json").read_bytes() for run in run_dirs(killed)} == before, "a run was run twice"


def test_a_run_is_a_command_line_that_can_be_typed(tmp_path):
    short = TOY.replace("total_env_steps = 300", "total_env_steps = 60")
    shown = here(tmp_path, short, "--agents", "drq_sac", "--seeds", "1", "--dry-run").stdout
    assert not (tmp_path / "runs").exists()
    (typed,) = [line for line in shown.splitlines() if "agents/drq_sac.py" in line]
    subprocess.run(typed, shell=True, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)
    again = here(tmp_path, short, "--agents", "drq_sac", "--seeds", "1")
    assert (again.returncode, "1 runs, 0 to do" in again.stdout) == (0, True)

    changed = short.replace("batch_size = 4", "batch_size = 5")
    refused = here(tmp_path, changed, "--agents", "drq_sac", "--seeds", "1")
    assert refused.returncode == 2
    assert "--batch-size was 4 and now is 5" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


# ---- fake agents, which count ----


def test_a_crash_is_retried_and_a_hopeless_run_does_not_hold_up_the_others(tmp_path):
    suite = FAKE
    for name, crashes, status in (("shaky", 2, 3), ("hopeless", 99, 3), ("killed", 99, -signal.SIGKILL)):
        suite = suite.replace("[[tasks]]", f'[agents.{name}]\nagent = "{ROOT}/tests/fake_agent.py"\n[[tasks]]')
        suite = suite.replace(f"[agents.{name}]", f"[agents.{name}]\ncrashes = {crashes}\ncrash_with = {status}")
    names = ("hopeless", "shaky", "killed", "counter")
    done = finish(tmp_path, suite, "--agents", *names, "--seeds", "1", "--workers", "2")
    assert done.returncode == 1, done.stderr
    expected = {"hopeless": "failed", "shaky": "finished", "killed": "failed", "counter": "finished"}
    assert states(tmp_path) == {f"{name}/seed-1": state for name, state in expected.items()}
    runs = {run.parent.name: run for run in run_dirs(tmp_path)}
    assert {name: len(processes(run)) for name, run in runs.items()} == {
        "hopeless": 3,
        "shaky": 3,
        "killed": 3,
        "counter": 1,
    }
    error = json.loads((runs["hopeless"] / "status.json").read_text())["error"]
    assert "ended with exit status 3" in error
    assert "crash number 3\nthe reason is here" in error
    assert "the reason is here" in done.stdout
    assert "was killed by SIGKILL" in json.loads((runs["killed"] / "status.json").read_text())["error"]

    calm = suite.replace("crashes = 99", "crashes = 1")  # what the user has repaired
    assert finish(tmp_path, calm, "--agents", *names[2:], "--seeds", "1", "--workers", "2").returncode == 2
    for run in runs.values():
        (run / "config.json").unlink()
    assert finish(tmp_path, calm, "--agents", *names, "--seeds", "1", "--workers", "2").returncode == 0
    assert len(processes(runs["counter"])) == 1


def test_an_agent_that_never_comes_to_life_is_marked_and_can_be_tried_again(tmp_path):
    run_dir = tmp_path / "runs" / "seed-1"
    job = Job((sys.executable, "-c", "print('no such thing'); raise SystemExit(2)"), run_dir, tmp_path)
    outcome = supervise(job)
    assert (outcome.state, outcome.attempts) == ("failed", 3)
    assert executors.read_status(run_dir)["state"] == "failed"
    assert "no such thing" in executors.read_status(run_dir)["error"]
    (run_dir / ".config.json.123").write_text("{")  # as a SIGKILL at the wrong moment leaves it
    program = "import os, sys; sys.exit(os.listdir(sys.argv[1]) != [])"
    assert supervise(Job((sys.executable, "-c", program, str(run_dir)), run_dir, tmp_path)).state == "finished"


def test_a_run_that_hangs_is_killed_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "HANG_SECONDS", 5)
    flags = suites.command_line({"env_id": "x", "run_dir": tmp_path / "run", "total_env_steps": 10, "hang": True})
    command = (sys.executable, str(ROOT / "tests/fake_agent.py"), *flags)
    outcome = supervise(Job(command, tmp_path / "run", tmp_path, {"PYTHONPATH": str(ROOT)}))
    assert (outcome.state, outcome.attempts) == ("finished", 2)
    assert "no sign of life" in (tmp_path / "run.log").read_text()


def test_two_sweeps_share_the_work_and_leave_each_others_runs_alone(tmp_path):
    arguments = ("--agents", "counter", "--seeds", "3", "--workers", "2")
    both = [start(tmp_path, FAKE, *arguments) for _ in range(2)]
    assert [ended(process) for process in both] == [0, 0], (tmp_path / "sweep.log").read_text()
    assert [len(processes(run)) for run in run_dirs(tmp_path)] == [1, 1, 1]
    assert "another process is at work there" in (tmp_path / "sweep.log").read_text()


def test_a_run_that_was_started_by_hand_is_waited_for_and_its_failure_believed(tmp_path):
    runs = [tmp_path / f"runs/fake/A_one-v0/counter/seed-{seed}" for seed in (1, 2)]
    suite = FAKE.replace("total_env_steps = 40", "total_env_steps = 100\ndelay = 0.1\ncrashes = 1\ncrash_seed = 2")
    by_hand = []
    for seed, run in enumerate(runs, 1):
        flags = {"env_id": "A/one-v0", "seed": seed, "run_dir": run, "total_env_steps": 100, "delay": 0.1}
        flags |= {"crashes": 1, "crash_seed": 2}
        command = [sys.executable, str(ROOT / "tests/fake_agent.py"), *suites.command_line(flags)]
        by_hand.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL))
    for process, run in zip(by_hand, runs, strict=True):
        wait_until(lambda run=run: count(run), process)
    process = start(tmp_path, suite, "--agents", "counter", "--seeds", "2", "--workers", "1")
    assert ended(process) == 1
    assert [ended(process) for process in by_hand] == [0, 3]
    assert states(tmp_path) == {"counter/seed-1": "finished", "counter/seed-2": "failed"}
    assert [len(processes(run)) for run in runs] == [1, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_lets_the_runs_save_and_the_same_command_goes_on(tmp_path, number):
    suite = FAKE.replace("total_env_steps = 40", "total_env_steps = 60\ndelay = 0.05")
    arguments = ("--agents", "counter", "--seeds", "3", "--workers", "2")
    master, slave = pty.openpty()  # a terminal: the progress bars are drawn
    process = start(tmp_path, suite, *arguments, stdout=slave, stderr=slave)
    os.close(slave)
    wait_until(lambda: len(run_dirs(tmp_path)) == 2 and all(map(count, run_dirs(tmp_path))), process)
    time.sleep(1)
    process.send_signal(number)
    shown = read_all(master)
    os.close(master)
    assert ended(process) == 128 + number
    assert "A/one-v0 counter seed 1" in shown
    assert "of 60 env steps" in shown
    assert "the same command goes on" in shown
    assert states(tmp_path) == {"counter/seed-1": "stopped", "counter/seed-2": "stopped"}
    assert all(gone(processes(run)) for run in run_dirs(tmp_path))
    so_far = {run: count(run) for run in run_dirs(tmp_path)}
    assert finish(tmp_path, suite, *arguments).returncode == 0
    assert [len(processes(run)) for run in run_dirs(tmp_path)] == [2, 2, 1]
    assert all(0 < steps < 60 for steps in so_far.values())


def read_all(terminal: int) -> str:
    """Everything until the other side closes it."""
    parts = []
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # so Linux says that it was closed
            part = b""
        if not part:
            return b"".join(parts).decode("utf-8", "replace")
        parts.append(part)


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path):
    run = tmp_path / "runs" / "fake" / "A_one-v0" / "counter" / "seed-1"
    suite = FAKE.replace("total_env_steps = 40", "total_env_steps = 20\nhang = true")
    process = start(tmp_path, suite, "--agents", "counter", "--seeds", "1")
    wait_until(lambda: count(run) == 10, process)
    os.kill(processes(run)[0], signal.SIGSTOP)  # it cannot react to SIGTERM
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "stopping" in (tmp_path / "sweep.log").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert ended(process) == 130
    end = time.monotonic() + 300
    while not gone(processes(run)):
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- the plan ----


def make_plan(tmp_path, suite=FAKE, agents=("counter",), **options) -> list[sweep_module.Planned]:
    file = tmp_path / "suite.toml"
    file.write_text(suite)
    return sweep_module.plan(suites.load_suite(str(file)), agents, runs_dir=tmp_path / "runs", **options)


def test_the_plan_counts_what_is_left_and_measures_how_long_it_takes(tmp_path, capsys):
    suite = FAKE.replace("total_env_steps = 40", "total_env_steps = 40000\naction_repeat = 4")
    (tmp_path / "suite.toml").write_text(suite)

    def dry_run() -> str:
        file = str(tmp_path / "suite.toml")
        status = sweep_module.sweep(
            file, agents=("counter",), seeds=4, workers=2, runs_dir=tmp_path / "runs", dry_run=True
        )
        assert status == 0
        return capsys.readouterr().out

    shown = dry_run()
    assert "4 runs, 4 to do; 160,000 env steps; time unknown for counter" in shown
    assert "4 new" in shown
    first, second, *_ = make_plan(tmp_path, suite, seeds=4)
    assert first.replay_bytes == 10_000 * 84 * 84 * 3, "uint8 frames, each stored once"
    for run, state, steps in ((first, "finished", 40_000), (second, "stopped", 20_000)):
        status = {"state": state, "env_step": steps, "agent_step": steps // 4, "wall_seconds": 1200}
        run.job.run_dir.mkdir(parents=True)
        (run.job.run_dir / "status.json").write_text(json.dumps(status))
    shown = dry_run()
    assert "1 finished, 1 begun, 2 new" in shown
    # 20 minutes for a whole run: 10 + 20 + 20 minutes are left, for two workers
    assert "4 runs, 3 to do; 100,000 env steps; about 25 min with 2 workers" in shown


@pytest.mark.parametrize(
    ("change", "words"),
    [({"agent": "another"}, "--agent was another and now is fake_agent"), ({"args": {"seed": 7}}, "--seed was 7")],
)
def test_finished_runs_of_other_settings_or_another_file_are_not_counted(tmp_path, change, words):
    (run, *_) = make_plan(tmp_path, seeds=1)
    run.job.run_dir.mkdir(parents=True)
    config = {"agent": "fake_agent", "env_id": "A/one-v0", "seed": 1, "args": {}}
    (run.job.run_dir / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        make_plan(tmp_path, seeds=1)
    (run.job.run_dir / "config.json").write_text(json.dumps(config | {"args": {"seed": 1}}))
    make_plan(tmp_path, seeds=1)


def test_seeds_come_one_after_the_other_and_every_run_has_a_folder_of_its_own(tmp_path):
    suite = FAKE.replace("[[tasks]]", f'[agents.other]\nagent = "{ROOT}/tests/fake_agent.py"\n[[tasks]]')
    suite += '[[tasks]]\nenv_id = "A/two-v0"\ntotal_env_steps = 9\n'
    runs = make_plan(tmp_path, suite, ("counter", "other"), seeds=2)
    assert [run.seed for run in runs] == [1] * 4 + [2] * 4
    assert len({run.job.run_dir for run in runs}) == 8
    assert runs[0].job.run_dir == tmp_path / "runs/fake/A_one-v0/counter/seed-1"
    (only,) = make_plan(tmp_path, suite, ("counter",), seeds=1, tasks=("two",))
    assert only.env_id == "A/two-v0"
    with pytest.raises(UserError, match="A/one-v0, A/two-v0"):
        make_plan(tmp_path, suite, seeds=1, tasks=("three",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "name one suite"),
        ({"name": "smoke", "suite": "smoke"}, "name one suite"),
        ({"name": "smoke", "seeds": 0}, "--seeds must be at least 1"),
        ({"name": "smoke", "workers": 0}, "--workers must be at least 1"),
        ({"name": "smoke", "agents": ()}, "--agents needs"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        sweep_module.sweep(**{"agents": ("drq_sac",), **arguments})


def test_a_disk_that_is_too_small_is_noticed_before_the_first_step(tmp_path):
    suite = FAKE.replace("total_env_steps = 40", f"total_env_steps = {10**12}\nreplay_capacity = {10**12}")
    refused = finish(tmp_path, suite, "--agents", "counter", "--seeds", "1")
    assert refused.returncode == 2
    assert "bytes on disk" in refused.stderr
    assert run_dirs(tmp_path) == []
