"""A real server of a vision-language model, `transformers serve`, forked from a process that has imported it all."""

import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.vlm_server_imports"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_server(folder: Path, port: int) -> multiprocessing.Process:
    """Returns when the server accepts connections."""
    process = CONTEXT.Process(target=_serve, args=(str(folder), port), daemon=True)
    process.start()
    while True:
        assert process.is_alive(), "the server could not start"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process
        except OSError:
            time.sleep(0.05)


def _serve(folder: str, port: int) -> None:
    from transformers.cli.serve import Serve

    threading.Thread(target=_end_with_parent, daemon=True).start()
    Serve(force_model=folder, device="cpu", host="127.0.0.1", port=port)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(0)
