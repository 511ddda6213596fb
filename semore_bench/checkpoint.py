"""The two newest checkpoints of a run, each whole or not there."""

import io
import pickle
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from semore_bench.rundir import CHECKPOINTS, write_atomically

FORMAT = 2
"""of what a checkpoint holds and of the replay's files"""


class Checkpoints:
    """Writes and reads checkpoints; the two newest ones that are good are kept.

    Args:
        folder: is made if it is not there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for unfinished in folder.glob(f".{CHECKPOINTS}.*"):  # a process was killed while it wrote
            unfinished.unlink()
        self._good: list[Path] = []

    def files(self) -> list[Path]:
        """All of them, the newest first."""
        return find_checkpoints(self.folder)

    def write(self, agent_step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint, then removes all but this one and the good one before it."""
        path = self.folder / f"agent-step-{agent_step:012d}.pt"
        # In memory first: on a full disk PyTorch's own writer aborts the process.
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **state}, buffer)
        write_atomically(path, lambda file: file.write(buffer.getbuffer()))
        self._good = [path, *(good for good in self._good if good != path)][:2]
        for old in self.files():
            if old not in self._good:
                old.unlink()

    def states(self) -> Iterator[dict[str, Any]]:
        """What the checkpoints hold, the newest first; those that cannot be read are left out, which is said."""
        files = self.files()
        for index, state in read_states(files):
            self._good = files[index : index + 2]
            yield state


def find_checkpoints(folder: Path) -> list[Path]:
    """Those in a folder, the newest first."""
    return sorted(folder.glob(CHECKPOINTS), reverse=True)


def read_states(files: Sequence[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Place and content of the checkpoints that can be read; the others are left out, which is said."""
    for index, path in enumerate(files):
        try:
            state = _read(path)
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            _warn(f"checkpoint {path} cannot be read ({error})")
            continue
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            _warn(f"checkpoint {path} was written by another version of semore-bench")
            continue
        yield index, state


def _read(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
