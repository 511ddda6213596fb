"""The files of a run directory."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRAIN_COLUMNS = "env_step agent_step episode episode_return episode_length success_any success_last".split()
EVAL_COLUMNS = "env_step agent_step episode eval_episode episode_return episode_length success_any success_last".split()
METRIC_COLUMNS = "env_step agent_step metric value".split()


class CsvFile:
    """A CSV file that can be cut back to an earlier size."""

    def __init__(self, path: Path, columns: list[str]):
        self._columns = columns
        self._file = open(path, "a+", newline="")  # noqa: SIM115 (held as long as the run)
        self._writer = csv.writer(self._file, lineterminator="\n")

    def truncate(self, size: int | None) -> None:
        """Cuts the file back to `size` bytes; None: to its header."""
        self._file.flush()
        self._file.truncate(size or 0)
        self._file.seek(0, os.SEEK_END)
        if not size:
            self.write(self._columns)

    def write(self, row: list[Any]) -> None:
        """Appends a row; other processes see it at once."""
        self._writer.writerow(row)
        self._file.flush()

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def flush(self) -> None:
        """Writes through to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def write_atomically(path: Path, content: bytes | Callable[[Any], None]) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        content(file) if callable(content) else file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
