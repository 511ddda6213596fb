"""Arrays in files: their space is reserved before the first byte is written, and what was in them can be proved."""

import errno
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from semore_bench.rundir import FULL, Damaged
from wrappers.errors import UserError

_CHUNK = 1 << 24
_NO_ALLOCATION = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # what file systems without it answer


class Storage:
    """Memory-mapped arrays in the files of a folder, a row after another, and digests of their rows.

    Args:
        directory: is made if it is not there; what its files hold already stays in them.
        layout: name -> (rows, shape of a row) and type.

    Attributes:
        arrays: name -> (rows, *shape of a row).
        nbytes: size of all files.

    Raises:
        UserError: the disk is too small, with the bytes needed and available.
    """

    def __init__(self, directory: Path, layout: dict[str, tuple[tuple[int, ...], Any]]):
        self.directory = directory
        sizes = {name: int(np.prod(shape)) * np.dtype(kind).itemsize for name, (shape, kind) in layout.items()}
        self.nbytes = sum(sizes.values())
        directory.mkdir(parents=True, exist_ok=True)
        self._found = {name: size for name in layout if (size := _size(self.path(name))) != sizes[name]}
        self._reserve(sizes)
        self._maps = {
            name: np.memmap(self.path(name), kind, "r+", shape=shape) for name, (shape, kind) in layout.items()
        }
        self.arrays = {name: np.asarray(file) for name, file in self._maps.items()}  # quicker to index than memmaps
        self._bytes = {name: array.view(np.uint8).reshape(len(array), -1) for name, array in self.arrays.items()}
        self._row_digests = {name: np.zeros(shape[0], np.uint32) for name, (shape, _) in layout.items()}

    def path(self, name: str) -> Path:
        """The file of an array."""
        return self.directory / f"{name}.bin"

    def flush(self) -> None:
        """Writes the arrays through to the disk."""
        for file in self._maps.values():
            file.flush()

    def digest(self, name: str, rows: np.ndarray, changed: np.ndarray) -> int:
        """Digest of the rows of an array in their order; `changed` are those rows written since they were last part of
        one."""
        digests, content = self._row_digests[name], self._bytes[name]
        for row in changed.tolist():
            digests[row] = zlib.crc32(content[row])
        return zlib.crc32(digests[rows])

    def check(self, name: str, rows: np.ndarray, digest: int) -> None:
        """Raises `Damaged` if the rows are not those that `digest` was made of."""
        if self.digest(name, rows, rows) == digest:
            return
        path, found = self.path(name), self._found.get(name)
        if name not in self._found:
            raise Damaged(f"{path} has been changed")
        raise Damaged(f"{path} was missing" if found is None else f"{path} had another size ({found:,} bytes)")

    def _reserve(self, sizes: dict[str, int]) -> None:
        """Makes the files as long as they have to be, on the disk and not as a promise: a map that finds the disk full
        when it is written to kills the process."""
        before = {name: _size(self.path(name)) for name in sizes}
        present = sum(self.path(name).stat().st_blocks * 512 for name, size in before.items() if size is not None)
        free = psutil.disk_usage(str(self.directory)).free
        try:
            if self.nbytes - present > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name, size in sizes.items():
                with open(self.path(name), "ab") as file:
                    file.truncate(min(size, before[name] or 0))
                    allocate(file.fileno(), size)
        except OSError as error:
            if error.errno not in FULL:
                raise
            for name, size in before.items():  # what could be had is of no use
                if size is None:
                    self.path(name).unlink(missing_ok=True)
                else:
                    os.truncate(self.path(name), min(size, sizes[name]))
            raise UserError(
                f"the replay needs {self.nbytes:,} bytes on disk in {self.directory} and {free + present:,} are "
                "available; free some space, or choose another --run-dir or a smaller --replay-capacity"
            ) from None


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def allocate(descriptor: int, size: int) -> None:
    """Makes a file `size` bytes long, all of them on the disk.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_ALLOCATION:
                raise
    for offset in range(os.fstat(descriptor).st_size, size, _CHUNK):
        count = min(_CHUNK, size - offset)
        while count:
            count -= os.write(descriptor, bytes(count))
