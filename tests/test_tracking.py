"""`--track`: what reaches Weights & Biases, read back from what it writes when it is offline."""

import json
import os
import struct
import sys
from pathlib import Path

import pandas as pd
import pytest

from semore_bench.provenance import run_id
from tests.waiting import run_to_end

ROOT = Path(__file__).parents[1]
BLOCK = 32768


def records(path: Path) -> list:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, offset, part, found = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(content):
        if BLOCK - offset % BLOCK < 7:
            offset += BLOCK - offset % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", content, offset + 4)
        part += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def test_what_is_logged_is_sent(tmp_path):
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    command = [sys.executable, "tests/faults/tiny_agent.py", "--run-dir", str(run_dir), "--track"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = run_to_end(command, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert run_id(run_dir) in file.name
    sent: dict[str, list[float]] = {}
    for record in records(file):
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            sent.setdefault(name, []).append(json.loads(item.value_json))
    train = pd.read_csv(run_dir / "train.csv").groupby("env_step").episode_return.last()
    assert sent["train/episode_return"] == pytest.approx(train.tolist(), rel=1e-5)
    evaluations = pd.read_csv(run_dir / "eval.csv")
    assert sent["eval/episode_return"] == pytest.approx(evaluations.episode_return.tolist(), rel=1e-5)
    assert "loss" in sent


def test_no_two_folders_share_an_id(tmp_path):
    folders = [tmp_path / name / ("long-" * 30) / "seed-1" for name in ("a", "b", "ä", "a b", "a-b")]
    ids = {run_id(folder) for folder in folders}
    assert len(ids) == len(folders)
    assert all(1 <= len(name) <= 64 and name.isalnum() for name in ids)
