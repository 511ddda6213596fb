"""A disk that fills up while a run is at work: one line, nothing lost, and it goes on once there is room."""

import json
import random
import shutil
import subprocess

import pytest

from tests.faults.forked_runs import events, run, said
from tests.toy_runs import assert_same

SETTINGS = {"env-id": "tests.toy_env:ToyShort-v0", "total-env-steps": 120}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up(small_disk, tmp_path, faults, monkeypatch):
    run_dir, filler = small_disk / "run", small_disk / "filler"
    monkeypatch.setenv("FILLER", str(filler))
    assert run(tmp_path / "whole", SETTINGS) == 0, said(tmp_path / "whole")
    dice = random.Random(0)
    filled = 0
    while filled < (10 if faults.long else 1):
        with faults.made():
            ending = run(run_dir, SETTINGS, f"fill_disk:{dice.randint(80, events(tmp_path / 'whole') // 2)}")
            printed = said(run_dir)
            if not filler.exists():  # there was less than that left to do
                assert ending == 0, printed
                assert_same(run_dir, tmp_path / "whole")
                shutil.rmtree(run_dir)
                continue
            filled += 1
            filler.unlink()
            assert ending == 2, printed
            assert "Traceback" not in printed
            assert printed.rstrip().splitlines()[-1].startswith("error: the disk is full")
            assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert run(run_dir, SETTINGS) == 0, said(run_dir)
    assert_same(run_dir, tmp_path / "whole")


def test_a_disk_that_is_too_small_from_the_start(small_disk, faults):
    with faults.made():
        assert run(small_disk / "run", SETTINGS | {"replay-capacity": 10**6, "total-env-steps": 10**6}) == 2
    assert "bytes on disk" in said(small_disk / "run")
    assert not (small_disk / "run").exists()
