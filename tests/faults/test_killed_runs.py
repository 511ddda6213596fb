"""Runs that are killed at random and adversarial moments give, bit for bit, what undisturbed ones give."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.faults.forked_runs import events, run, said
from tests.toy_runs import agent_step, assert_same

ENDINGS = {"kill": -signal.SIGKILL, "kill_group": -signal.SIGKILL, "stop_group": 143, "kill_workers": 2}
CASES = {
    "late annotations and a small ring": {},
    "episodes of 1 to 5 steps": {"env-id": "tests.toy_env:ToyShort-v0", "checkpoint-every": 9},
    "a ring shorter than an episode": {"replay-capacity": 9, "checkpoint-every": 33},
    "three environments": {"num-envs": 3, "env-id": "tests.toy_env:ToyShort-v0", "total-env-steps": 330},
    "no annotations": {"no-annotated": True, "replay-capacity": 1000},
}


def damage_newest(run_dir: Path) -> bool:
    """Damages the newest of two checkpoints."""
    files = sorted((run_dir / "checkpoint").glob("agent-step-*.pt"))
    if len(files) < 2:
        return False
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 0xFF
    files[-1].write_bytes(content)
    return True


@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again(case, faults, tmp_path):
    if case != next(iter(CASES)) and not faults.long:
        pytest.skip("in the long form alone (--long)")
    settings, whole, killed = CASES[case], tmp_path / "whole", tmp_path / "killed"
    assert run(whole, settings) == 0, said(whole)
    all_events = events(whole)
    dice = random.Random(case)
    for number in range(14 if faults.long else 4):
        what = list(ENDINGS)[number % len(ENDINGS)]
        with faults.made():
            # early ones for the start, where most of what is done to files is done; the others get somewhere
            when = dice.randint(1, 60) if number % 5 == 3 else dice.randint(60, all_events // 3)
            ending = run(killed, settings, f"{what}:{when}")
            assert ending in (ENDINGS[what], 0), said(killed)
            assert "Traceback" not in said(killed)
            if ending == 143 and agent_step(killed):
                assert f"stopped at env step {env_step(killed)};" in said(killed), "it did not save what it had"
        if number % 3 == 2:
            with faults.made(damage_newest(killed)):
                pass
        if ending == 0:
            assert_same(killed, whole)
            shutil.rmtree(killed)
    assert run(killed, settings) == 0, said(killed)
    assert_same(killed, whole)
    assert "took another course" not in said(killed)


def env_step(run_dir: Path) -> int:
    newest = max((run_dir / "checkpoint").glob("agent-step-*.pt"))
    return torch.load(newest, weights_only=True)["counters"]["env_step"]


def test_killed_while_it_starts_over(faults, tmp_path):
    old, new = {"seed": 1, "total-env-steps": 60}, {"seed": 2, "total-env-steps": 60}
    runs = {}
    for name, settings in (("old", old), ("new", new)):
        runs[name] = tmp_path / name
        assert run(runs[name], settings) == 0, said(runs[name])
    dice, begun = random.Random(0), 0
    for number in range(16 if faults.long else 2):
        victim = tmp_path / f"victim-{number}"
        shutil.copytree(runs["old"], victim)
        with faults.made():
            when = dice.randint(1, 40) if number % 4 else dice.randint(60, 200)
            run(victim, new | {"fresh": True}, f"{('kill', 'kill_group')[number % 2]}:{when}")
            if run(victim, new) == 0:  # it had begun
                begun += 1
                assert_same(victim, runs["new"])
            else:
                assert "--seed was 1 and now is 2" in said(victim)
                assert run(victim, old) == 0
                assert "is finished" in said(victim)
                assert_same(victim, runs["old"])
            assert not [path for path in victim.iterdir() if path.name in (".before-fresh", ".rubbish")]
    assert begun or not faults.long
