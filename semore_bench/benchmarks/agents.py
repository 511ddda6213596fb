"""What a training step of each agent costs, and our DrQ-v2 against the official one."""

import importlib.util
import runpy
import statistics
import sys
import time
import types
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from semore_bench.benchmarks.guidance import quotient
from semore_bench.benchmarks.stepper import Block, Stepper
from semore_bench.envs import EnvConfig
from semore_bench.listing import AGENTS, agent_files
from semore_bench.memory import hand_back_freed_memory, keep_freed_memory
from semore_bench.suites import load_agent
from semore_bench.workers import Workers, random_action
from wrappers.errors import UserError

OFFICIAL = "drqv2-official"
RANDOM_STEPS = 200
"""agent steps before the first update: enough annotated frames for an agent that needs some"""


@dataclass
class Agents:
    """Milliseconds of acting, stepping, sampling and updating, memory, and bytes of the replay, agent by agent."""

    names: tuple[str, ...] = ()
    """agents to measure, with flags if you like: "semore_sac --pixels" (default: all that take actions of the twin's
    kind, and that one)"""
    env_id: str = "dm_control/cartpole-swingup-v0"
    """environment to train in"""
    preset: str = "lite"
    """preset of the agents: reference or lite"""
    batch_size: int | None = None
    """transitions per update (default: the preset's)"""
    action_repeat: int = 4
    """simulator steps per agent step"""
    blocks: int = 5
    """blocks per agent, in alternation"""
    block_steps: int = 20
    """agent steps per block, with an update each"""
    baseline: str = "drq_sac"
    """agent that the others' update times are relative to"""
    bfloat16: bool = False
    """mixed precision: convolutions in bfloat16"""
    against: tuple[str, Path] | None = None
    """`drqv2-official PATH`: measure instead our DrQ-v2 update against the official one, from a checkout of its code"""

    def run(self) -> None:
        """Measures, and prints a table."""
        if self.blocks < 1 or self.block_steps < 1:
            raise UserError("--blocks and --block-steps must be at least 1")
        console = Console(width=max(Console().width, 120))
        if self.against is None:
            self._all_agents(console)
        elif self.against[0] == OFFICIAL:
            self._against_official(self.against[1], console)
        else:
            raise UserError(f"--against {self.against[0]} is not known; expected {OFFICIAL} and the folder of its code")

    def _all_agents(self, console: Console) -> None:
        known = agent_files()
        names = list(dict.fromkeys([self.baseline, *(self.names or self._comparable())]))
        for name in names:
            if name.split(" ")[0] not in known:
                raise UserError(f"there is no agent {name!r}; expected some of {', '.join(known)}")
        flags = ["--env-id", self.env_id, "--preset", self.preset, "--action-repeat", str(self.action_repeat)]
        random_steps = max(RANDOM_STEPS, 2 * self.block_steps)
        flags += ["--random-steps", str(random_steps)]
        flags += ["--bfloat16"] if self.bfloat16 else []
        flags += [] if self.batch_size is None else ["--batch-size", str(self.batch_size)]
        environment = self._environment_milliseconds()
        rounds: list[dict[str, Block]] = []
        try:
            with ExitStack() as stack:
                steppers = {}
                for name in names:
                    agent, *own = name.split()
                    steppers[name] = stack.enter_context(Stepper(AGENTS / f"{agent}.py", [*flags, *own]))
                for stepper in steppers.values():
                    stepper.run(random_steps + self.block_steps)  # random steps, and what is slow the first time
                for _ in range(self.blocks):
                    rounds.append({name: stepper.run(self.block_steps) for name, stepper in steppers.items()})
        finally:  # what was measured before Ctrl-C
            if rounds:
                console.print(self._table(names, rounds, environment))

    def _table(self, names: list[str], rounds: list[dict[str, Block]], environment: dict[str | None, float]) -> Table:
        blocks = {name: [row[name] for row in rounds] for name in names}
        table = Table(
            title=f"milliseconds per agent step, preset {self.preset}, {self.env_id}: medians of {len(rounds)} blocks",
            caption=f"An environment's step alone takes {environment[None]:.1f} ms, with flow {environment['dis']:.1f} "
            "ms; it runs beside the update. step: all, over the longer of environment and act + update in each step. "
            f"update/baseline: against {self.baseline}.",
        )
        columns = (
            "agent",
            "act",
            "update",
            "sample",
            "wait",
            "all",
            "step",
            "update/baseline",
            "MB",
            "GPU MB",
            "bytes/transition",
        )
        for column in columns:
            table.add_column(column, justify="left" if column == "agent" else "right")
        for name in names:
            numbers = [key for key, value in vars(blocks[name][0]).items() if isinstance(value, float)]
            middle = {key: statistics.median(getattr(b, key) for b in blocks[name]) for key in numbers}
            against = statistics.median(
                a.update / b.update for a, b in zip(blocks[name], blocks[self.baseline], strict=True)
            )
            alone = environment["dis" if blocks[name][0].flow else None]
            step = statistics.median(
                block.turn / statistics.mean(max(alone, busy) for busy in block.busy) for block in blocks[name]
            )
            table.add_row(
                name,
                *(f"{middle[key]:.1f}" for key in ("act", "update", "sample", "wait", "turn")),
                f"{step:.2f}",
                f"{against:.2f}",
                *(f"{middle[key]:.0f}" for key in ("memory", "gpu_memory")),
                f"{middle['replay_bytes']:,.0f}",
            )
        return table

    def _environment_milliseconds(self) -> dict[str | None, float]:
        size = 64 if self.preset == "lite" else 84
        rng, found = np.random.default_rng(0), {}
        for flow in (None, "dis"):
            config = EnvConfig(
                image_size=size, action_repeat=self.action_repeat, flow=flow, actions=_actions(self.baseline)
            )
            with Workers(self.env_id, config) as workers:
                workers.reset([0])
                seeds = iter(lambda: int(rng.integers(2**31)), None)
                times = []
                for _ in range(10 + 3 * self.block_steps):
                    began = time.perf_counter()
                    workers.send(random_action(workers.action_space, rng, 1))
                    workers.receive(seeds)
                    times.append(1e3 * (time.perf_counter() - began))
                found[flow] = statistics.median(times[10:])
        return found

    def _comparable(self) -> list[str]:
        names = [name for name in agent_files() if _actions(name) == _actions(self.baseline)]
        return [*names, "semore_sac --pixels"] if "semore_sac" in names else names

    def _against_official(self, folder: Path, console: Console) -> None:
        """One update of each in turn, in this process, on the same batch and with the same threads."""
        import torch

        from semore_bench.replay import Batch

        batch_size, actions = self.batch_size or 256, 6
        module = types.SimpleNamespace(**runpy.run_path(str(AGENTS / "drqv2.py")))
        args = module.Args(
            env_id=self.env_id, preset="reference", batch_size=batch_size, update_every=1, bfloat16=self.bfloat16
        )
        args.resolve()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        ours = module.Agent(actions, args, device)
        official = _official_agent(folder, args, actions, device)

        rng = np.random.default_rng(0)
        shape = (batch_size, args.frame_stack, args.image_size, args.image_size, 3)
        rgb, next_rgb = (rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
        action = rng.uniform(-1, 1, (batch_size, actions)).astype(np.float32)
        reward, discount = (rng.uniform(0, 1, batch_size).astype(np.float32) for _ in range(2))
        batch = Batch(
            rgb=rgb, next_rgb=next_rgb, flow=None, next_flow=None, action=action, reward=reward, discount=discount
        )
        # The official replay keeps stacks with the channels first, and rewards as columns.
        stacked = [
            np.ascontiguousarray(x.transpose(0, 1, 4, 2, 3)).reshape(batch_size, -1, *shape[2:4])
            for x in (rgb, next_rgb)
        ]
        columns = tuple(map(torch.from_numpy, (stacked[0], action, reward[:, None], discount[:, None], stacked[1])))
        replay = types.SimpleNamespace(sample=lambda _: batch)

        def timed(memory: Any, update: Any) -> float:
            memory()  # as our runs have it, and as a process has it by itself
            update()  # untimed: what the other side left in caches and memory is not this one's
            began = time.perf_counter()
            update()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return 1e3 * (time.perf_counter() - began)

        pairs: list[tuple[float, float]] = []
        try:
            for index in range(2 + self.blocks * 2):
                pairs.append(
                    (
                        timed(hand_back_freed_memory, lambda: official.update(iter([columns]), 0)),
                        timed(keep_freed_memory, lambda index=index: ours.update(replay, index)),
                    )
                )
        finally:  # what was measured before Ctrl-C
            if len(pairs) > 2:  # the first two warm up
                theirs, own = map(list, zip(*pairs[2:], strict=True))
                table = Table(
                    title=f"a DrQ-v2 update, {args.image_size} px, batch {batch_size}, {device}, "
                    f"{torch.get_num_threads()} threads, our convolutions in "
                    f"{'bfloat16' if self.bfloat16 else 'float32'}",
                    caption="the official code with its own settings for logs (none); quotient: median (quartiles) "
                    "over pairs",
                )
                for column in ("official, ms", "ours, ms", "official / ours"):
                    table.add_column(column, justify="right")
                medians = [f"{statistics.median(times):.0f}" for times in (theirs, own)]
                table.add_row(*medians, quotient(theirs, own))
                console.print(table)


def _actions(name: str) -> Any:
    """What an agent gives: continuous or discrete actions; "" if there is no such agent."""
    if (file := agent_files().get(name)) is None:
        return ""
    return load_agent(name, file).args().env_config().actions


def _official_agent(folder: Path, args: Any, actions: int, device: Any) -> Any:
    """The agent of the official code, whose configuration packages are not needed for it and may be missing."""
    if not (folder / "drqv2.py").is_file():
        raise UserError(f"no drqv2.py in {folder}: give the folder of a checkout of facebookresearch/drqv2")
    for name, attributes in (("hydra", {}), ("omegaconf", {"OmegaConf": None})):
        if importlib.util.find_spec(name) is None:
            module = sys.modules.setdefault(name, types.ModuleType(name))
            vars(module).update(attributes)
    sys.path.insert(0, str(folder))
    try:
        official = importlib.import_module("drqv2")
    finally:
        sys.path.remove(str(folder))
    return official.DrQV2Agent(
        obs_shape=(3 * args.frame_stack, args.image_size, args.image_size),
        action_shape=(actions,),
        device=device,
        lr=args.learning_rate,
        feature_dim=args.feature_dim,
        hidden_dim=args.hidden_dim,
        critic_target_tau=args.tau,
        num_expl_steps=0,
        update_every_steps=1,
        stddev_schedule="linear(1.0,0.1,100000)",
        stddev_clip=args.noise_clip,
        use_tb=False,
    )
