"""A wheel, built and unpacked without a network, works elsewhere and gets in nobody's way."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT_FROM = "wrappers semore_bench agents pyproject.toml setup.py MANIFEST.in README.md LICENSE".split()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with what a wheel puts into site-packages."""
    source = tmp_path_factory.mktemp("source with a space")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, source / name)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(site: Path, cwd: Path, *command: str) -> str:
    """Runs Python where nothing but the wheel's content is, this repository's own names cannot be imported."""
    blocker = site.parent / "blocker"
    blocker.mkdir(exist_ok=True)
    names = "wrappers", "agents", "tests"
    (blocker / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({names}))\n")
    environment = os.environ | {"PYTHONPATH": f"{blocker}{os.pathsep}{site}"}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_one_name_is_put_into_site_packages(site):
    names = {path.name for path in site.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"semore_bench"}
    (top_level,) = site.glob("*.dist-info/top_level.txt")
    assert top_level.read_text().split() == ["semore_bench"]


def test_every_file_of_the_packages_is_there(site):
    for folder, place in (("wrappers", "semore_bench/wrappers"), ("semore_bench", "semore_bench"), ("agents",) * 2):
        place = site / ("semore_bench/agents" if folder == "agents" else place)
        for file in (path for path in (ROOT / folder).rglob("*") if path.is_file()):
            if "__pycache__" not in file.parts:
                assert (place / file.relative_to(ROOT / folder)).exists(), file


def test_wrappers_are_imported_by_their_name_and_need_little(site, tmp_path):
    program = """
import sys
from semore_bench.wrappers import ActionRepeat, CaptionObservation, OpticalFlowObservation, PixelObservation
import gymnasium as gym
env = OpticalFlowObservation(PixelObservation(gym.make("CartPole-v1", render_mode="rgb_array"), size=32))
env.reset(seed=0)
print(env.step(0)[0]["flow"].shape, PixelObservation.__module__, "torch" in sys.modules)
"""
    assert run(site, tmp_path, "-c", program).strip() == "(32, 32, 2) semore_bench.wrappers.pixels False"


def test_a_sweep_runs_from_an_empty_folder(site, tmp_path):
    words = "-m semore_bench sweep smoke --agents drq_sac --seeds 1 --tasks cartpole".split()
    assert "finished, evaluation return" in run(site, tmp_path, *words)
    assert (tmp_path / "runs/smoke/dm_control_cartpole-balance-v0/drq_sac/seed-1/eval.csv").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert "drq_sac" in run(site, tmp_path, *"-m semore_bench table runs --suite smoke".split())
