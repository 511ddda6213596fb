"""What may stand in a file's place."""

import os
from pathlib import Path

from tests.synthetic_runs import WALKER

PLACE = Path(WALKER.replace("/", "_"))
RUNS, OTHER = PLACE / "drq_sac" / "seed-1", PLACE / "semore_sac" / "seed-1"


def spoil(path: Path, content: object) -> None:
    """Puts something else in a file's place."""
    path.unlink()
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode("utf-8", "surrogatepass"))


ODD_FILES = {
    "empty": "",
    "list": "[]",
    "null": "null",
    "number": "1",
    "text": '"x"',
    "half": '{"agent": "drq_s',
    "trailing": '{"state": "finished"} x',
    "no fields": "{}",
    "not UTF-8": b'{"agent": "\xff\xfe"}',
    "UTF-16": "{}".encode("utf-16"),
    "NUL": b"\0" * 100,
    "binary": bytes(range(256)),
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 50_000,
    "long number": '{"seed": 1' + "0" * 5000 + "}",
    "NaN": '{"env_step": NaN, "seed": NaN, "state": "finished"}',
    "surrogate": '{"env_id": "\\ud800", "agent": "\\udfff", "state": "\\ud800", "seed": 1}',
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
