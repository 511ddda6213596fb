"""The folder of a run: one process at a time, and nothing in it is ever half done."""

import csv
import errno
import fcntl
import functools
import io
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from semore_bench.args import flag
from wrappers.errors import UserError

TRAIN_COLUMNS = "env_step agent_step episode episode_return episode_length success_any success_last".split()
EVAL_COLUMNS = [*TRAIN_COLUMNS[:3], "eval_episode", *TRAIN_COLUMNS[3:], "setting"]
METRIC_COLUMNS = "env_step agent_step metric value".split()
CLOCK = "speed/wall_seconds"
"""the metric that says how long a run has been worked on"""

CHECKPOINTS = "agent-step-*.pt"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""error numbers of disks that are full"""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what network file systems may answer
_TEMPORARY = re.compile(r"\.(config|status)\.json\.\d+")  # as `write_atomically` leaves it when it is killed


class Damaged(UserError):
    """A file that a checkpoint leans on is not as it was when the checkpoint was written."""


class RunDirectory:
    """A run's folder, locked; a context manager.

    `put_aside` makes room for another run without losing the one that is there: it comes back when the folder is
    closed, or opened again after a crash, before the new run has a checkpoint.

    Args:
        path: is made if it is not there.

    Raises:
        UserError: it cannot be made, or another process is at work in it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._aside, self._rubbish = path / ".before-fresh", path / ".rubbish"
        self._aside_config = self._aside / "config.json.aside"  # under another name: nobody takes it for a run's
        self._made = False
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._file = open(path / ".lock", "a+b")  # noqa: SIM115 (held as long as the run)
        except FileExistsError:
            raise UserError(f"--run-dir {path} is a file; name a folder") from None
        except OSError as error:
            raise UserError(f"--run-dir {path} cannot be used ({error.strerror}); choose another") from None
        if not lock(self._file):
            self._file.close()
            raise UserError(
                f"another process is training in {path}; wait for it, or choose another --run-dir or --seed"
            )
        self._repair()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        if self._aside.exists():
            self._roll_back()
        elif self._made:
            self._clear()
        if not self.config.exists():  # leave no trace of a run that never was
            (self.path / ".lock").unlink(missing_ok=True)
            _remove_empty(self.path)
        self._file.close()

    @property
    def config(self) -> Path:
        """The run's settings; a folder without them holds no run."""
        return self.path / "config.json"

    def read_config(self) -> dict[str, Any] | None:
        """The settings of the run that is there; None if there is nothing.

        Raises:
            UserError: they cannot be read, or there is something else.
        """
        if not self.config.exists():
            if self._entries():
                raise UserError(f"{self.path} holds files but no run (no config.json); choose another --run-dir")
            return None
        try:
            config = json.loads(self.config.read_text("utf-8"))
            return {**config, "args": {**config["args"]}, "agent": str(config["agent"])}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{self.config} is damaged ({type(error).__name__}: {error}); restore it, add --fresh to start over, "
                "or choose another --run-dir"
            ) from None

    def put_aside(self) -> None:
        """Moves the run that is there out of the way, until `keep`."""
        self._aside.mkdir()
        for entry in self._entries():
            if entry != self.config:
                entry.rename(self._aside / entry.name)
        self.config.rename(self._aside_config)  # last: now everything that is not put aside is new

    def write_config(self, config: dict[str, Any]) -> None:
        """Makes it a run; it is undone when the folder is closed before `keep`."""
        self._made = True
        write_atomically(self.config, json.dumps(config, indent=2).encode())

    def keep(self) -> None:
        """The run has begun, and stays."""
        self._made = False

    def forget_former(self) -> None:
        """Deletes what was put aside: a checkpoint of the new run is there."""
        if self._aside.exists():
            self._aside.rename(self._rubbish)  # at once: half of a run must not come back
            shutil.rmtree(self._rubbish)

    def _entries(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if entry.name not in (".lock", self._aside.name)]

    def _repair(self) -> None:
        """Puts right what a process that was killed has left behind."""
        if self._rubbish.exists():
            shutil.rmtree(self._rubbish)
        for entry in self._entries():
            if _TEMPORARY.fullmatch(entry.name):
                entry.unlink()
        if self._aside_config.exists():
            if any((self.path / "checkpoint").glob(CHECKPOINTS)):
                self.forget_former()
            else:
                self._roll_back()
        elif self._aside.exists():  # killed while it was moved there, or back
            self._bring_back()

    def _roll_back(self) -> None:
        if self._aside_config.exists():
            self._clear()
            self._aside_config.rename(self.config)
        self._bring_back()

    def _bring_back(self) -> None:
        for entry in self._aside.iterdir():
            entry.rename(self.path / entry.name)
        self._aside.rmdir()

    def _clear(self) -> None:
        for entry in self._entries():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _remove_empty(folder: Path) -> None:
    """Removes a folder, and those around it, for as long as they are empty."""
    try:
        os.removedirs(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def lock(file: BinaryIO) -> bool:
    """Locks a file until it is closed; False if another process has locked it.

    Where the file system has no locks this is said once, and all goes on without.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _say_unlocked(str(Path(file.name).parent), error.strerror)
    return True


@functools.cache
def _say_unlocked(folder: str, reason: str) -> None:
    print(
        f"warning: files in {folder} cannot be locked ({reason}): see to it that no second process trains there",
        file=sys.stderr,
    )


def refuse_changes(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares the settings of a run with those that were typed.

    Raises:
        UserError: they differ, with the differences.
    """
    if changed := changes(before, now):
        raise UserError(
            f"{path} holds a run with other settings: {changed}. Type the same command to continue it, add --fresh to "
            "start over, or choose another --run-dir"
        )


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is different between two runs' settings, in words; empty if they are equal."""
    return "; ".join(
        f"{flag(name)} was {before.get(name, 'not there')} and now is {now.get(name, 'not there')}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    )


class CsvFile:
    """A CSV file that can be cut back to an earlier state."""

    def __init__(self, path: Path, columns: list[str]):
        self.path, self._columns = path, columns
        # Without a buffer: what could not be written, because the disk was full, is not tried again when it is closed.
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (held as long as the run)
        self._size, self._digest = 0, 0

    def check(self, state: dict[str, int]) -> None:
        """Raises `Damaged` if what was written until `state` is not there."""
        self._file.seek(0)
        content = self._file.read(state["bytes"])
        if len(content) < state["bytes"]:
            raise Damaged(f"{self.path} is cut off: {len(content):,} bytes of {state['bytes']:,} are there")
        if zlib.crc32(content) != state["digest"]:
            raise Damaged(f"{self.path} has been changed")

    def restore(self, state: dict[str, int] | None) -> None:
        """Cuts the file back to a state of it; None: to its header."""
        self._size, self._digest = (state["bytes"], state["digest"]) if state else (0, 0)
        self._file.truncate(self._size)
        if not self._size:
            self.write(self._columns)

    def write(self, row: list[Any]) -> None:
        """Appends a row; other processes see it at once."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row)
        line = text.getvalue().encode()
        written = self._file.write(line)
        if written != len(line):  # no room for all of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._size += len(line)
        self._digest = zlib.crc32(line, self._digest)

    def state(self) -> dict[str, int]:
        """Bytes written and their digest; they are written through to the disk."""
        os.fsync(self._file.fileno())
        return {"bytes": self._size, "digest": self._digest}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_atomically(path: Path, content: bytes | Callable[[Any], None]) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_status(path: Path, status: dict[str, Any]) -> None:
    """Writes status.json, in place where the disk has no room for a second one."""
    content = json.dumps(status, indent=2).encode()
    try:
        write_atomically(path, content)
    except OSError as error:
        if error.errno not in FULL or not path.exists():
            raise
        with open(path, "r+b") as file:
            file.write(content)
            file.truncate()
