"""How many frames per second environments of every family give: as they are, with flow, and with captions."""

import importlib.util
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv
from rich.console import Console
from rich.table import Table

from semore_bench.benchmarks.guidance import warm_up
from semore_bench.envs import EnvConfig
from semore_bench.workers import vector_env
from wrappers.backends.queues import BATCH_SIZE
from wrappers.errors import UserError

FAMILIES = {
    "dm_control/walker-walk-v0": "shimmy",
    "Meta-World/reach-v3": "metaworld",
    "HalfCheetah-v5": "mujoco",
    "CarRacing-v3": "Box2D",
    "CartPole-v1": "pygame",
    "gymnasium_robotics:FetchReach-v4": "gymnasium_robotics",
    "highway_env:racetrack-v1": "highway_env",
    "ALE/Pong-v5": "ale_py",
    "MiniGrid-Empty-5x5-v0": "minigrid",
    "MiniWorld-Hallway-v0": "miniworld",
}
"""an environment of each family, and the package that it needs"""


@dataclass
class Envs:
    """Frames per second of environments in worker processes: RGB alone, with flow, and with captions too."""

    env_ids: tuple[str, ...] = ()
    """environments; by default one of each family that is installed"""
    image_size: int = 84
    """height and width of the frames in pixels"""
    action_repeat: int = 1
    """simulator steps per frame"""
    annotate_every: int = 4
    """agent steps between annotated frames"""
    annotator: Literal["embedded", "simulator", "none"] = "embedded"
    """annotator; none: without captions"""
    num_envs: tuple[int, ...] = (1, 4)
    """numbers of environments stepped in parallel; frames per second are their total"""
    blocks: int = 3
    """blocks per setting, in alternation"""
    seconds: float = 0.5
    """seconds per block; those with captions go on until a batch of 8 frames of every environment was asked for"""

    def run(self) -> None:
        """Measures, and prints a table, an environment after the other."""
        if not self.num_envs or min(self.blocks, *self.num_envs) < 1 or self.seconds <= 0:
            raise UserError("--blocks and --num-envs must be at least 1, --seconds more than 0")
        env_ids = self.env_ids or tuple(name for name, needs in FAMILIES.items() if importlib.util.find_spec(needs))
        settings = self._settings()
        console = Console(width=max(Console().width, 110))
        table = Table(
            title=f"frames per second at {self.image_size} px, random actions repeated {self.action_repeat} times, "
            f"captions ({self.annotator}) every {self.annotate_every}th frame",
            caption="medians (and ranges) over turns; frames of all environments together",
        )
        table.add_column("environment", no_wrap=True)
        table.add_column("environments", justify="right")
        for name in settings:
            table.add_column(name, justify="right", no_wrap=True)
        try:
            with console.status("") as status:
                for env_id in env_ids:
                    for count in self.num_envs:
                        status.update(f"{env_id}, {count}")
                        speeds = self._measure(env_id, count, settings)
                        table.add_row(env_id, str(count), *map(_median_and_range, speeds.values()))
        finally:  # what was measured before Ctrl-C, or before an environment that cannot be made
            if table.row_count:
                console.print(table)

    def _settings(self) -> dict[str, EnvConfig]:
        rgb = EnvConfig(image_size=self.image_size, action_repeat=self.action_repeat, flow=None)
        settings = {"RGB": rgb, "and flow": replace(rgb, flow="dis")}
        if self.annotator != "none":
            settings["and captions"] = replace(
                settings["and flow"], annotator=self.annotator, annotate_every=self.annotate_every
            )
        return settings

    def _measure(self, env_id: str, count: int, settings: dict[str, EnvConfig]) -> dict[str, list[float]]:
        speeds: dict[str, list[float]] = {name: [] for name in settings}
        with ExitStack() as stack:
            arms = {name: stack.enter_context(_open(env_id, config, count)) for name, config in settings.items()}
            for name, envs in arms.items():  # models are loaded, and everything is warm
                warm_up(partial(_step, envs), partial(_annotations, envs, settings[name]), self.annotate_every)
            order = np.random.default_rng(0)
            for _ in range(self.blocks):
                for name in order.permutation(list(arms)):
                    # A shorter turn may have no annotation in it.
                    least = 0 if settings[name].annotator == "none" else BATCH_SIZE * self.annotate_every
                    speeds[name].append(self._turn(arms[name], least))
        return speeds

    def _turn(self, envs: AsyncVectorEnv, least_steps: int) -> float:
        began, steps = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < self.seconds or steps < least_steps:
            _step(envs)
            steps += 1
        return steps * envs.num_envs / spent


@contextmanager
def _open(env_id: str, config: EnvConfig, count: int) -> Iterator[gym.vector.VectorEnv]:
    envs = vector_env(env_id, config, count, gym.vector.AutoresetMode.NEXT_STEP)
    try:
        envs.action_space.seed(0)
        envs.reset(seed=0)
        yield envs
    finally:
        envs.close(terminate=True)


def _step(envs: gym.vector.VectorEnv) -> None:
    envs.step(envs.action_space.sample())


def _annotations(envs: gym.vector.VectorEnv, config: EnvConfig) -> float | None:
    """Of the environment that has fewest; None without an annotator."""
    return None if config.annotator == "none" else min(row["annotations"] for row in envs.call("statistics"))


def _median_and_range(speeds: list[float]) -> str:
    return f"{statistics.median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})"
