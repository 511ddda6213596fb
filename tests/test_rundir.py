"""The folder of a run: what is started over, killed at any moment, damaged, locked, or full."""

import errno
import fcntl
import json
import os
import shutil

import pytest

from semore_bench import rundir
from semore_bench.rundir import CsvFile, Damaged, RunDirectory, write_atomically, write_status
from wrappers.errors import UserError

OLD = {
    "config.json": '{"agent": "old", "args": {}}',
    "train.csv": "1\n2\n",
    "status.json": '{"state": "stopped"}',
    "checkpoint/agent-step-000000000007.pt": "weights",
    "replay/rgb.bin": "frames",
}
NEW = {"config.json": {"agent": "new", "args": {}}, "checkpoint": "agent-step-000000000001.pt"}


class Killed(BaseException):
    """Stands for SIGKILL."""


class Killer:
    """Dies at the `moment`-th change of a folder: from then on nothing that the process does has an effect."""

    def __init__(self, moment: int):
        self.moment, self.count = moment, 0

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, self._deadly(getattr(os, name)))

    def _deadly(self, function):
        def deadly(*args, **kwargs):
            self.count += 1
            if self.count >= self.moment:
                raise Killed
            return function(*args, **kwargs)

        return deadly


def make_old(path) -> None:
    for name, content in OLD.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)


def files(path) -> dict[str, str]:
    found = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_text() for name, file in found.items() if name != ".lock"}


def start_over(path) -> None:
    with RunDirectory(path) as folder:
        folder.put_aside()
        folder.write_config(NEW["config.json"])
        (path / "replay").mkdir()
        (path / "replay" / "rgb.bin").write_text("new frames")
        folder.keep()
        write_status(path / "status.json", {"state": "running"})
        write_atomically(path / "checkpoint" / NEW["checkpoint"], b"new weights")
        folder.forget_former()


def open_again(path) -> None:
    """As a process does that finds a run with other settings."""
    RunDirectory(path).__exit__()


def dies(function, path, moment: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        Killer(moment).watch(patch)
        try:
            function(path)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("second", [None, 1, 2, 3, 5, 8, 13])
def test_starting_over_keeps_the_old_run_until_the_new_one_has_a_checkpoint(tmp_path, second):
    """Killed at every moment, and the process that puts it right at some too."""
    moment, seen = 0, set()
    while True:
        moment += 1
        path = tmp_path / str(moment)
        make_old(path)
        if not dies(start_over, path, moment):
            break
        if second is not None:
            dies(open_again, path, second)
        has_checkpoint = (path / "checkpoint" / NEW["checkpoint"]).exists()
        open_again(path)
        after = files(path)
        if has_checkpoint:
            assert json.loads(after["config.json"]) == NEW["config.json"]
            assert after[f"checkpoint/{NEW['checkpoint']}"] == "new weights"
            assert "train.csv" not in after
        else:
            assert after == OLD
        seen.add(has_checkpoint)
        shutil.rmtree(path)
    assert seen == {False, True}
    assert moment > 15


def test_a_start_that_fails_brings_the_old_run_back(tmp_path):
    make_old(tmp_path)
    with RunDirectory(tmp_path) as folder:
        folder.put_aside()
        assert folder.read_config() is None
        folder.write_config(NEW["config.json"])
        (tmp_path / "train.csv").write_text("")
    assert files(tmp_path) == OLD


def test_a_start_that_fails_leaves_no_trace(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with RunDirectory(tmp_path / "a" / "b") as folder:
        folder.write_config(NEW["config.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("moment", range(1, 4))
def test_killed_while_its_settings_are_first_written(tmp_path, moment):
    def start(path):
        with RunDirectory(path) as folder:
            folder.write_config(NEW["config.json"])
            folder.keep()

    assert dies(start, tmp_path / "run", moment)
    with RunDirectory(tmp_path / "run") as folder:
        assert folder.read_config() is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"agent": 1}', '{"args": 7, "agent": "a"}', "\x00" * 99])
def test_settings_that_are_damaged_are_said_to_be(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "train.csv").write_text("precious")
    with pytest.raises(UserError, match="damaged.*--fresh"), RunDirectory(tmp_path) as folder:
        folder.read_config()
    assert (tmp_path / "train.csv").read_text() == "precious"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with RunDirectory(tmp_path / "run") as folder:
            folder.write_config(NEW["config.json"])
            folder.keep()
    assert capsys.readouterr().err.count("cannot be locked") == 1


def test_two_at_a_time(tmp_path):
    with RunDirectory(tmp_path) as folder, pytest.raises(UserError, match="another process is training"):
        RunDirectory(folder.path)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="--run-dir"):
            RunDirectory(path)


@pytest.mark.parametrize("harm", ["shorter", "changed", "missing"])
def test_a_log_that_is_not_as_it_was(tmp_path, harm):
    path = tmp_path / "train.csv"
    file = CsvFile(path, ["a", "b"])
    file.restore(None)
    file.write([1, 2])
    state = file.state()
    file.write([3, "4,5"])
    file.close()
    content = path.read_bytes()
    assert content == b'a,b\n1,2\n3,"4,5"\n'
    harmed = {"shorter": content[:6], "changed": content.replace(b"1", b"7"), "missing": None}[harm]
    path.unlink() if harmed is None else path.write_bytes(harmed)
    again = CsvFile(path, ["a", "b"])
    with pytest.raises(Damaged, match=r"train\.csv (is cut off|has been changed)"):
        again.check(state)
    again.close()
    assert path.read_bytes() == (harmed or b""), "it is left as it was found"
    path.write_bytes(content)
    again = CsvFile(path, ["a", "b"])
    again.check(state)
    again.restore(state)
    again.write([6, 7])
    assert path.read_bytes() == b"a,b\n1,2\n6,7\n"


def test_a_status_has_room_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_status(path, {"state": "running", "error": "x" * 100})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rundir.os, "fsync", full)
    write_status(path, {"state": "failed"})
    assert json.loads(path.read_text()) == {"state": "failed"}
    assert list(tmp_path.iterdir()) == [path]
