"""Every example runs as its first lines say, and says what it found."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.waiting import run_to_end

ROOT = Path(__file__).parents[1]

SHORT = "--image-size 36 --batch-size 4 --random-steps 20 --total-env-steps 240 --eval-every 160 --eval-episodes 1"
CASES = {
    "plain_loop": ("--steps 12", r"step 8: .*pole.* pixels from frame to frame", None),
    "own_environment": ("", r"understood: .*'rgb': \(48, 48, 3\).*Discrete\(3\)", None),
    "own_annotator": ("", r"step 5: the ball is there and the paddle is there; the ball in patch \(5, ", None),
    "own_agent": (f"--env-id tests.toy_env:Toy-v0 {SHORT} --device cpu --run-dir RUN", "", None),
    "stable_baselines3_ppo": ("--steps 64 --rollout 16", r"64 steps, mean return of the last \d", "stable_baselines3"),
    "torchrl_rollout": ("--steps 5", r"rgb \(5, 3, 64, 64\) torch.float32\nflow \(5, 2, 64, 64\)", "torchrl"),
}


def test_every_example_is_tried():
    assert {file.stem for file in (ROOT / "examples").glob("*.py")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_example(name, tmp_path):
    flags, said, needs = CASES[name]
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    words = [word.replace("RUN", str(tmp_path / "run")) for word in flags.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = run_to_end([sys.executable, str(ROOT / "examples" / f"{name}.py"), *words], env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(said, result.stdout), result.stdout
    if name == "own_agent":
        evaluations = pd.read_csv(tmp_path / "run" / "eval.csv")
        assert evaluations.env_step.nunique() == 2
