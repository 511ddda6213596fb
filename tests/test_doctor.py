"""The doctor finds each fault that it is there to find, and names the remedy."""

import importlib.metadata
import types

import psutil
import pytest

from semore_bench import doctor as module
from semore_bench.doctor import (
    Finding,
    check_cpu,
    check_disk,
    check_memory,
    check_packages,
    check_rendering,
    doctor,
    probe_gl,
)


@pytest.fixture
def gl(monkeypatch):
    """Replaces the probes: `gl("egl", "osmesa")` makes these two work."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)

    def set_working(*working: str) -> None:
        answers = {backend: (backend in working, f"answer of {backend}") for backend in module.GL_BACKENDS}
        monkeypatch.setattr(module, "probe_gl", lambda backend, timeout: answers[backend])

    return set_working


def verdicts(findings) -> dict[str, str]:
    return {finding.subject: finding.verdict for finding in findings}


def test_a_real_frame_is_rendered_here():
    works = {backend: probe_gl(backend) for backend in ("egl", "osmesa")}
    assert any(ok for ok, _ in works.values()), works
    assert all("ms per 84 px frame" in found for ok, found in works.values() if ok)


def test_a_hanging_driver_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "GL_PROBE", "import time; time.sleep(60)")
    works, found = probe_gl("egl", timeout=0.5)
    assert not works
    assert "hangs" in found


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("raise ImportError('no libEGL here')", "no libEGL here"),
        ("raise SystemExit(1)", "does not work"),
        ("""print('{"ms": 1.0, "contrast": 0}')""", "empty picture"),
    ],
)
def test_a_broken_driver_is_described(monkeypatch, probe, expected):
    monkeypatch.setattr(module, "GL_PROBE", probe)
    works, found = probe_gl("egl")
    assert not works
    assert expected in found


def test_each_backend_is_probed_under_its_own_name(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    monkeypatch.setattr(module, "GL_PROBE", "import os; raise OSError(os.environ['MUJOCO_GL'])")
    assert [probe_gl(backend)[1][-len(backend) :] for backend in module.GL_BACKENDS] == [*module.GL_BACKENDS]


def test_the_first_working_backend_is_used(gl):
    gl("osmesa", "glfw")
    egl, osmesa, glfw = check_rendering()
    assert (egl.verdict, osmesa.verdict, glfw.verdict) == ("note", "ok", "ok")
    assert "used" in osmesa.found
    assert "used" not in egl.found + glfw.found
    assert "libegl1" in egl.advice


def test_no_backend_at_all_is_bad_and_names_the_packages(gl):
    gl()
    findings = list(check_rendering())
    assert {finding.verdict for finding in findings} == {"bad"}
    advice = " ".join(finding.advice for finding in findings)
    assert all(package in advice for package in ("libegl1", "libgl1-mesa-dri", "libosmesa6"))


def test_a_variable_that_names_no_backend_is_bad(gl, monkeypatch):
    gl("egl")
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    findings = list(check_rendering())
    assert verdicts(findings) == {
        "Rendering": "bad", "GL egl": "ok", "GL osmesa": "note", "GL glfw": "note"
    }  # fmt: skip
    assert "MUJOCO_GL=nonsense" in findings[0].found
    assert "unset MUJOCO_GL" in findings[0].advice


def test_a_variable_that_names_a_broken_backend_is_bad_though_another_works(gl, monkeypatch):
    gl("egl")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    findings = {finding.subject: finding for finding in check_rendering()}
    assert findings["GL osmesa"].verdict == "bad"
    assert "MUJOCO_GL=egl" in findings["GL osmesa"].advice
    assert findings["GL egl"].verdict == "ok"
    assert "used" not in findings["GL egl"].found


def test_a_variable_that_names_a_working_backend_decides(gl, monkeypatch):
    gl("egl", "osmesa")
    monkeypatch.setenv("MUJOCO_GL", "OSMesa")
    findings = {finding.subject: finding.found for finding in check_rendering()}
    assert "used" in findings["GL osmesa"]
    assert "used" not in findings["GL egl"]


def test_the_installed_packages_fit_together():
    assert {finding.verdict for finding in check_packages()} == {"ok"}


def test_an_installation_that_never_happened_is_bad():
    (finding,) = check_packages("no-such-package-as-this")
    assert (finding.verdict, finding.advice) == ("bad", "make setup")


def test_a_torch_too_old_for_torchvision_is_bad(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.0" if name == "torch" else real(name))
    finding = next(check_packages())
    assert finding.verdict == "bad"
    assert "torchvision needs torch" in finding.found
    assert "2.0.0 is installed" in finding.found


def test_a_missing_package_is_bad(monkeypatch):
    real = importlib.metadata.requires

    def requires(name):
        return [*(real(name) or []), "no-such-package-as-this>=1"] if name == "semore-bench" else real(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    finding = next(check_packages())
    assert finding.verdict == "bad"
    assert "no-such-package-as-this is missing" in finding.found


def test_two_opencvs_are_bad(monkeypatch):
    both = ["opencv-python", "opencv-python-headless"]
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"cv2": both})
    finding = list(check_packages())[-1]
    assert (finding.subject, finding.verdict) == ("OpenCV", "bad")
    assert "pip install opencv-python-headless" in finding.advice


@pytest.mark.parametrize(("free", "verdict"), [(0.5e9, "bad"), (2e9, "note"), (50e9, "ok")])
def test_disk(monkeypatch, tmp_path, free, verdict):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
    finding = check_disk(tmp_path / "runs" / "that" / "are" / "not" / "there")
    assert finding.verdict == verdict
    assert str(tmp_path) in finding.subject
    assert not (tmp_path / "runs").exists()
    assert ("--run-dir" in finding.advice) == (verdict != "ok")


def test_a_disk_that_cannot_be_written_is_bad(monkeypatch, tmp_path):
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    assert check_disk(tmp_path).verdict == "bad"


@pytest.mark.parametrize(("available", "verdict"), [(1e9, "bad"), (3e9, "note")])
def test_memory(monkeypatch, available, verdict):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=available))
    assert check_memory().verdict == verdict


def test_a_single_core_is_noted(monkeypatch):
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [0])
    assert check_cpu() == Finding("CPU", "1 core", "note", check_cpu().advice)


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("note", 0), ("bad", 1)])
def test_exit_code_and_report(monkeypatch, capsys, verdict, code, tmp_path):
    findings = [Finding("first", "fine"), Finding("second", "[odd] value", verdict, "turn it off")]
    monkeypatch.setattr(module, "examine", lambda runs: findings)
    assert doctor(tmp_path) == code
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("first", "fine", "second", "[odd] value", verdict, "turn it off"))
    assert ("This machine can train" in shown) == (code == 0)
