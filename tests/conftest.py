"""Settings for all tests, and what several of them use."""

import importlib
import os
import signal

import cv2
import hypothesis
import pytest

from wrappers.backends import opengl

# Some test files load Mesa when they are imported, if MUJOCO_GL says so; whatever comes after them, in any order.
opengl.preload_triton()
# One thread per process: several of them share the machine, in the tests more than anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
cv2.setNumThreads(1)
# What is slow on a busy machine is not wrong.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")
# Failed assertions of helpers show their values too.
pytest.register_assert_rewrite("tests")
# Started in a shell's background, tests and all that they start would ignore the Ctrl-C that some are about.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Tiny embedded models that learned to say of which colour a square is: folder, corpus, model and losses."""
    import torch
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one process trains, the others wait for it
        base = base.parent
    folder, results = base / "models", base / "models.pt"
    with FileLock(base / "models.lock"):
        if not results.exists():
            torch.save(_train(folder), results)
        return folder, *torch.load(results, weights_only=False)


def _train(folder):
    import torch

    from semore_bench.guidance.dense import save_dense_head, train_dense_head
    from semore_bench.guidance.training import Corpus, Settings, train, used_tokens
    from tests.tiny_guidance import DENSE, TINY, toy_frames
    from wrappers.backends.clip import ClipGrounding

    torch.set_num_threads(1)
    folder.mkdir()
    corpus = Corpus([toy_frames("box", 200, 0)])
    model, losses = train(corpus, Settings(updates=80, batch_size=16), folder / "state.pt", TINY)
    model.save(folder, used_tokens(corpus, model))
    head, _ = train_dense_head(corpus, ClipGrounding(folder / "clip"), DENSE, folder / "dense.pt", width=8)
    save_dense_head(folder / "clip", head)
    return corpus, model, losses


@pytest.fixture
def dm_control_renders(monkeypatch):
    """Without a display, dm_control draws with EGL if MUJOCO_GL said so before its import, which may be long past."""
    from dm_control import _render

    if _render.BACKEND == "glfw" and "DISPLAY" not in os.environ:
        egl = importlib.import_module("dm_control._render.pyopengl.egl_renderer")
        monkeypatch.setattr(_render, "Renderer", egl.EGLContext)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long form of the fault suite (tests/faults)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many faults `tests/faults` made and survived, all processes of the session together."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    counts = [
        value
        for report in reports
        for name, value in getattr(report, "user_properties", ())  # filled in when the fixture is torn down
        if name == "faults"
    ]
    if counts:
        made, survived = (sum(count[name] for count in counts) for name in ("made", "survived"))
        terminalreporter.write_line(f"{made} faults made, {survived} survived")
