"""Space that is reserved, also where the file system cannot, and disks that are too small."""

import errno
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest

from semore_bench import storage
from semore_bench.storage import Storage
from wrappers.errors import UserError

LAYOUT = {"a": ((1000, 100), np.uint8), "b": ((1000,), np.float32)}


def test_the_space_is_taken_at_once(tmp_path):
    store = Storage(tmp_path, LAYOUT)
    assert store.nbytes == 104_000
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) >= store.nbytes


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_allocate(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "posix_fallocate", refuse)
    store = Storage(tmp_path, LAYOUT)
    store.arrays["a"][:] = 7
    store.flush()
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) >= store.nbytes
    assert Storage(tmp_path, LAYOUT).arrays["a"].min() == 7, "what was there is kept"


def test_a_file_that_has_another_size_is_brought_to_its_own(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x" * 10**6)
    (tmp_path / "b.bin").write_bytes(b"x")
    Storage(tmp_path, LAYOUT)
    assert [(tmp_path / name).stat().st_size for name in ("a.bin", "b.bin")] == [100_000, 4000]


def test_a_disk_that_fills_up_meanwhile(tmp_path):
    """Another run takes it between the question how much is free and the answer; a limit stands for the disk."""
    script = f"""
import resource, sys, types
import numpy as np, psutil
from semore_bench.storage import Storage
psutil.disk_usage = lambda path: types.SimpleNamespace(free=10**12)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
Storage(__import__("pathlib").Path({str(tmp_path)!r}), {{"b": ((1000,), np.float32), "a": ((1000, 100), np.uint8)}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "bytes on disk" in done.stderr
    assert "--replay-capacity" in done.stderr
    assert list(tmp_path.iterdir()) == [], "what could be had is given back"


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    Storage(tmp_path, {"b": LAYOUT["b"]})
    monkeypatch.setattr(psutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"needs 104,000 bytes on disk.*5,096 are available.*--replay-capacity"):
        Storage(tmp_path, LAYOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["b.bin"]
