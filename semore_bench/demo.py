"""`make demo`: trains Semore on cartpole from pixels, flow and captions, and shows what came of it."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from semore_bench.envs import EnvConfig
from semore_bench.evaluation import evaluate
from semore_bench.plots import load_curve, plot_runs
from semore_bench.records import UnusableRun, find_video
from semore_bench.workers import Workers

ROOT = Path(__file__).parents[1]
ENV_ID, ACTION_REPEAT, IMAGE_SIZE = "dm_control/cartpole-balance-v0", 8, 64
EPISODES = 4
RUN = Path("runs/demo/semore_sac")


def main() -> int:
    """Trains (or continues), evaluates, and prints the results; returns the exit status."""
    flags = {
        "env-id": ENV_ID,
        "action-repeat": ACTION_REPEAT,
        "preset": "lite",
        "image-size": IMAGE_SIZE,
        "total-env-steps": 40_000,
        "eval-every": 10_000,
        "eval-episodes": EPISODES,
        # As in dmc-lite: values that look three seconds ahead are what a few minutes of one core can learn from.
        "random-steps": 500,
        "n-step": 3,
        "discount": 0.97,
        "tau": 0.05,
        "run-dir": RUN,
    }
    command = ["agents/semore_sac.py", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]
    print("$ python " + " ".join([*command, "--capture-video"]), flush=True)
    began = time.monotonic()
    try:
        status = subprocess.run([sys.executable, *command, "--capture-video"], cwd=ROOT, check=False).returncode
    except KeyboardInterrupt:  # the agent has seen it too, and saved; `make demo` continues
        return 130
    if status:
        return status
    minutes = (time.monotonic() - began) / 60

    curve = ROOT / RUN / "learning_curve.png"
    try:
        returns = load_curve(ROOT / RUN).values
        video = find_video(ROOT / RUN)
    except UnusableRun as reason:
        print(f"{ROOT / RUN}: {reason}; delete the folder and try again", file=sys.stderr)
        return 2
    plot_runs([ROOT / RUN], curve)
    random = _random_return()
    print(f"\ntrained for {minutes:.1f} minutes on {ENV_ID}; mean return of {EPISODES} evaluation episodes:")
    print(f"  semore_sac      {returns[-1]:6.1f}   ({returns[-1] / random:.1f} times the random policy's)")
    print(f"  uniform random  {random:6.1f}")
    print(f"learning curve: {curve}\nvideo:          {video}")
    return 0


def _random_return() -> float:
    """Mean return of a uniform random policy on the evaluation's own episodes."""
    rng = np.random.default_rng(0)
    config = EnvConfig(image_size=IMAGE_SIZE, action_repeat=ACTION_REPEAT, flow=None)
    with Workers(ENV_ID, config, num_envs=2) as workers:
        size = (workers.num_envs, *workers.action_space.shape)
        episodes = evaluate(lambda _: rng.uniform(-1, 1, size), workers, EPISODES, frame_stack=1)
    return float(np.mean([episode.episode_return for episode in episodes]))


if __name__ == "__main__":
    raise SystemExit(main())
