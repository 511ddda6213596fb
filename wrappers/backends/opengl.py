"""One thread for all OpenGL calls of a process, and contexts without a window.

dm_control remembers which context is current on the thread that it renders on: a context made current behind its back
would have it draw into the wrong buffers. Hence a thread of our own.
"""

from __future__ import annotations

import ctypes.util
import functools
import importlib
import importlib.util
import multiprocessing
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from wrappers.errors import UserError

T = TypeVar("T")

BACKENDS = ("egl", "osmesa", "glfw")


class _RenderThread(threading.Thread):
    """A daemon, unlike the threads of `concurrent.futures`: it must still be there when `atexit` frees what is left."""

    def __init__(self) -> None:
        super().__init__(name="opengl", daemon=True)
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()
        self.start()

    def submit(self, job: Callable[[], Any]) -> Future:
        future: Future = Future()
        self._jobs.put((future, job))
        return future

    def run(self) -> None:
        while True:
            future, job = self._jobs.get()
            try:
                future.set_result(job())
            except BaseException as error:  # the caller waits for the future and gets the exception from it
                future.set_exception(error)
            del future, job  # or the caller's arrays would live until the next job


_thread: _RenderThread | None = None
_parent_rendered = False


def run(job: Callable[[], Any]) -> Any:
    """Runs `job` on the render thread and returns its result or raises its exception."""
    global _thread
    if _parent_rendered:  # Mesa would wait forever for threads that did not survive the fork
        raise UserError(
            "cannot render in a process forked from one that rendered: start workers with the 'spawn' method, "
            "for example AsyncVectorEnv(..., context='spawn')"
        )
    if _thread is None:
        preload_triton()
        _thread = _RenderThread()
    return _thread.submit(job).result()


def clean_up(job: Callable[[], Any]) -> None:
    """Runs `job`, which frees what an earlier one created; for finalizers too, which may interrupt any thread."""
    if _thread is None:  # a forked child does not own what its parent created
        return
    done = _thread.submit(job)
    if threading.current_thread() is not _thread:
        done.result()


def _after_fork() -> None:
    global _thread, _parent_rendered
    _parent_rendered = _parent_rendered or _thread is not None
    _thread = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def preload_triton() -> None:
    """Imports Triton if this process may learn: its LLVM has to be loaded before Mesa's, or without seeing that one.

    PyTorch imports it when it first compiles something, long after rendering began, and the process would crash.
    dm_control loads Mesa when it is imported with MUJOCO_GL=egl: call this before.
    """
    may_learn = "torch" in sys.modules or multiprocessing.parent_process() is None
    if not may_learn or "triton" in sys.modules or not importlib.util.find_spec("triton"):
        return
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_DEEPBIND)
    try:
        importlib.import_module("triton")
    finally:
        sys.setdlopenflags(flags)


def prepare_native() -> None:
    """To be called before an environment draws by itself: some load Mesa for that, see `preload_triton`."""
    if not sys.modules.keys().isdisjoint(("mujoco", "OpenGL", "pyglet")):
        preload_triton()


@contextmanager
def without_display() -> Iterator[None]:
    """Where there is no display, and nobody chose, lets others than our renderer draw without one.

    MuJoCo and what draws with it would try GLFW, and complain; pyglet, which reads this when it is imported, would want
    an X server. Afterwards nothing is chosen: our renderer tries what works.
    """
    if sys.platform != "linux" or "DISPLAY" in os.environ or (backend := _headless_backend()) is None:
        yield
        return
    chosen = {"MUJOCO_GL": backend} | ({"PYGLET_HEADLESS": "1"} if backend == "egl" else {})
    chosen = {name: value for name, value in chosen.items() if name not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            os.environ.pop(name, None)


@functools.cache
def _headless_backend() -> str | None:
    return "egl" if ctypes.util.find_library("EGL") else "osmesa" if ctypes.util.find_library("OSMesa") else None


def create_context(width: int, height: int, prepare: Callable[[], T]) -> tuple[Any, T]:
    """Returns a new OpenGL context of MuJoCo's, made current, and what `prepare` made of it; for the render thread.

    MUJOCO_GL chooses one of `BACKENDS`; without it, the first that works is taken. Raises `UserError` if none does.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    failures = []
    for backend in (chosen,) if chosen in BACKENDS else BACKENDS:
        try:
            context = importlib.import_module(f"mujoco.{backend}").GLContext(width, height)
            if not context._context:  # without a display, GLFW warns and returns nothing
                raise RuntimeError("no context")
            context.make_current()
            return context, prepare()
        except Exception as error:  # each backend fails in its own ways; they are reported together
            failures.append(f"{backend}: {str(error).strip() or type(error).__name__}")
            _unload_pyopengl()
    raise UserError(
        f"cannot render: no OpenGL backend works ({'; '.join(failures)}). On Debian or Ubuntu: "
        "apt install libegl1 libgl1-mesa-dri libosmesa6; MUJOCO_GL=egl|osmesa|glfw chooses one of them; "
        "`semore-bench doctor` checks"
    )


def _unload_pyopengl() -> None:
    """PyOpenGL ties itself to one backend when it is imported: the next one needs a fresh import."""
    os.environ.pop("PYOPENGL_PLATFORM", None)
    for module in [name for name in sys.modules if name.split(".")[0] == "OpenGL"]:
        del sys.modules[module]
