"""`semore-bench doctor`: checks whether this machine can train, and says in one line each what to repair."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

GL_BACKENDS = ("egl", "osmesa", "glfw")
GL_PACKAGES = {
    "egl": "apt-get install libegl1 libgl1 libgl1-mesa-dri",
    "osmesa": "apt-get install libosmesa6",
    "glfw": "needs a display; egl and osmesa do not",
}
GL_TIMEOUT = 30.0  # seconds; the first frame of a working backend takes about one

# Run by a fresh interpreter: a broken driver may hang or crash the process that draws with it.
GL_PROBE = """
import json, time, mujoco
from wrappers.backends.mujoco import Renderer
from wrappers.backends.simulation import Simulation
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='plane' size='2 2 1' rgba='.2 .3 .4 1'/>"
    "<geom size='.3' pos='0 0 .3' rgba='.9 .1 .1 1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = Renderer(Simulation(lambda: (model, data)), 84, 84)
frame = renderer.rgb()
start = time.perf_counter()
for _ in range(20):
    renderer.rgb()
print(json.dumps({"ms": (time.perf_counter() - start) * 50, "contrast": int(frame.max()) - int(frame.min())}))
"""

GIGABYTE = 1e9
DISK_NEEDED, DISK_WANTED = 1 * GIGABYTE, 5 * GIGABYTE  # a replay of 100,000 frames with flow takes 3.6 GB
MEMORY_NEEDED, MEMORY_WANTED = 2 * GIGABYTE, 8 * GIGABYTE

Verdict = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One row of the report. `bad` stops training, `note` only slows it down or narrows what works."""

    subject: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def doctor(runs: Path = Path("runs")) -> int:
    """Check whether this machine can train: versions, rendering, GPU, memory and disk.

    Exits with 0 if it can and with 1 if not.

    Args:
        runs: The folder that will hold the run directories.
    """
    table = Table(title="semore-bench doctor", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]bad[/]"}
    console = Console(highlight=False)
    with console.status("looking at this machine"):
        findings = examine(runs)
    for finding in findings:
        cells = (finding.subject, finding.found, finding.advice)
        table.add_row(marks[finding.verdict], *map(escape, cells))
    console.print(table)
    bad = sum(finding.verdict == "bad" for finding in findings)
    console.print(f"\n{bad} to repair before training." if bad else "\nThis machine can train.")
    return int(bad > 0)


def examine(runs: Path) -> list[Finding]:
    """Every finding about this machine; `runs` is the folder whose disk counts."""
    return [
        check_python(),
        *check_packages(),
        *check_rendering(),
        check_gpu(),
        check_cpu(),
        check_memory(),
        check_disk(runs),
    ]


def check_python() -> Finding:
    """Python's version; the installation has already refused one that is too old."""
    return Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def check_packages(package: str = "semore-bench") -> Iterator[Finding]:
    """Whether what is installed meets every requirement of `package`, and the requirements of these."""
    try:
        requirements = _requirements(package)
    except importlib.metadata.PackageNotFoundError:
        yield Finding("Packages", f"{package} is not installed", "bad", "make setup")
        return
    problems = []
    for requirement in requirements:
        try:
            wanted_by = [(package, requirement)]
            wanted_by += [(requirement.name, inner) for inner in _requirements(requirement.name)]
            problems += [problem for name, inner in wanted_by if (problem := _unmet(name, inner))]
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
    if problems:
        yield Finding("Packages", "; ".join(sorted(set(problems))), "bad", "make setup, in a fresh .venv")
    else:
        names = ("torch", "torchvision", "gymnasium", "mujoco", "dm_control", "metaworld")
        yield Finding("Packages", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names))

    opencvs = sorted(set(importlib.metadata.packages_distributions().get("cv2", [])))
    if len(opencvs) > 1:
        repair = f"pip uninstall -y {' '.join(opencvs)}; pip install opencv-python-headless"
        yield Finding("OpenCV", f"{' and '.join(opencvs)} overwrite each other", "bad", repair)


def _requirements(package: str) -> list[Requirement]:
    """The requirements of an installed package on this machine, extras left out."""
    requirements = map(Requirement, importlib.metadata.requires(package) or [])
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def _unmet(package: str, requirement: Requirement) -> str | None:
    """What is wrong with the installed version of what `package` requires, or None."""
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return f"{package} needs {requirement.name}{requirement.specifier}, {installed} is installed"


def check_rendering(timeout: float = GL_TIMEOUT) -> Iterator[Finding]:
    """Draws a small MuJoCo scene with each GL backend; at least the one that will be used has to work."""
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    if asked and asked not in GL_BACKENDS:
        repair = f"unset MUJOCO_GL, or set it to one of {', '.join(GL_BACKENDS)}"
        yield Finding("Rendering", f"MUJOCO_GL={asked} is not a backend", "bad", repair)
    results = {backend: probe_gl(backend, timeout) for backend in GL_BACKENDS}
    working = [backend for backend, (works, _) in results.items() if works]
    chosen = asked if asked in GL_BACKENDS else next(iter(working), None)
    for backend, (works, found) in results.items():
        if works:
            yield Finding(f"GL {backend}", f"{found}, used" if backend == chosen else found)
        elif backend == asked:
            repair = GL_PACKAGES[backend] + (f", or MUJOCO_GL={working[0]}" if working else "")
            yield Finding(f"GL {backend}", f"{found}, asked for by MUJOCO_GL", "bad", repair)
        else:
            yield Finding(f"GL {backend}", found, "note" if working else "bad", GL_PACKAGES[backend])


def probe_gl(backend: str, timeout: float = GL_TIMEOUT) -> tuple[bool, str]:
    """Whether MuJoCo renders with a GL backend, and how fast or why not; takes at most `timeout` seconds."""
    environment = os.environ | {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    if backend == "glfw":
        del environment["PYOPENGL_PLATFORM"]
    root = Path(__file__).resolve().parents[1]
    try:
        probe = subprocess.run(
            [sys.executable, "-c", GL_PROBE],
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return False, f"hangs: no frame after {timeout:g} s"
    if probe.returncode < 0:
        return False, f"crashes with signal {-probe.returncode}"
    if probe.returncode > 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1].rpartition("wrappers.errors.UserError: ")[2]
        return False, f"does not work: {textwrap.shorten(reason, 90, placeholder=' ...')}"
    result = json.loads(probe.stdout.splitlines()[-1])
    if result["contrast"] < 10:
        return False, "draws an empty picture"
    return True, f"{result['ms']:.1f} ms per 84 px frame"


def check_gpu() -> Finding:
    """The GPU that PyTorch will use, if one computes."""
    import torch  # takes seconds

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        try:
            (torch.ones(8, device="cuda") * 2).sum().item()
        except RuntimeError as error:
            repair = f"install a PyTorch for this GPU (this one is {torch.__version__}), or use --device cpu"
            return Finding("GPU", f"{name} does not compute: {str(error).splitlines()[0]}", "bad", repair)
        free, total = torch.cuda.mem_get_info()
        return Finding("GPU", f"{name}, {free / GIGABYTE:.0f} of {total / GIGABYTE:.0f} GB free")
    if shutil.which("nvidia-smi"):
        repair = f"update the driver, or install a PyTorch for it (this one is for CUDA {torch.version.cuda})"
        return Finding("GPU", "there is one, but PyTorch cannot use it", "note", repair)
    return Finding("GPU", "none", "note", "the suites smoke and dmc-lite are made for a CPU")


def check_cpu() -> Finding:
    """Cores that this process may use: one for the learner, one for the environment."""
    process = psutil.Process()
    cores = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    if cores < 2:
        advice = "environment and learner take turns; two or more cores overlap them"
        return Finding("CPU", f"{cores} core", "note", advice)
    return Finding("CPU", f"{cores} cores")


def check_memory() -> Finding:
    """Free memory, within the limit of a container if there is one."""
    available = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return _amount("Memory", available, MEMORY_NEEDED, MEMORY_WANTED, "close other programs")


def check_disk(runs: Path) -> Finding:
    """Free disk where the run directories will be, replay included."""
    folder = runs.resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("Disk", f"{folder} is read-only", "bad", "choose another folder with --run-dir")
    advice = "free some, or choose another disk with --run-dir"
    return _amount(f"Disk at {folder}", shutil.disk_usage(folder).free, DISK_NEEDED, DISK_WANTED, advice)


def _amount(subject: str, available: float, needed: float, wanted: float, advice: str) -> Finding:
    found = f"{available / GIGABYTE:.1f} GB free"
    if available < needed:
        return Finding(subject, found, "bad", f"at least {needed / GIGABYTE:.0f} GB are needed: {advice}")
    if available < wanted:
        return Finding(subject, found, "note", f"large replays want {wanted / GIGABYTE:.0f} GB: {advice}")
    return Finding(subject, found)
