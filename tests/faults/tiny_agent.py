"""A learner that is quick and forgets nothing: whatever it draws from its replay moves its weights.

A fault, <what>:<when>, has it do something to itself at its `when`-th event; the number of all events is printed at the
end.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from semore_bench.args import CommonArgs
from semore_bench.envs import EnvConfig
from semore_bench.rundir import CsvFile
from semore_bench.runs import Run, one_line_errors
from semore_bench.workers import Workers
from tests.faults.tiny_annotator import TinyAnnotator


@dataclass
class Args(CommonArgs):
    """A tiny agent on a tiny environment."""

    env_id: str = "tests.toy_env:Toy-v0"
    image_size: int = 36
    batch_size: int = 8
    random_steps: int = 10
    action_repeat: int = 1
    total_env_steps: int = 220
    eval_every: int = 90
    eval_episodes: int = 1
    checkpoint_every: int = 20
    replay_capacity: int = 60
    annotate_every: int = 2
    device: str = "cpu"
    annotated: bool = True

    def env_config(self) -> EnvConfig:
        annotator = TinyAnnotator() if self.annotated else "none"
        return EnvConfig(
            self.image_size, self.action_repeat, None, annotator, self.annotate_every, caption_mode="pipelined"
        )


class Agent(torch.nn.Module):
    def __init__(self, action_dim: int, args: Args):
        super().__init__()
        self.batch_size = args.batch_size
        self.policy = torch.nn.Linear(3 * args.frame_stack, action_dim)
        self.value = torch.nn.Linear(3 * args.frame_stack, 1)
        self.optimizers = {"all": torch.optim.Adam(self.parameters(), 1e-2)}

    def act(self, observation: dict[str, np.ndarray], deterministic: bool = False) -> np.ndarray:
        with torch.no_grad():
            action = self.policy(_colours(observation["rgb"]))
            return (action if deterministic else action + 0.5 * torch.randn_like(action)).tanh().numpy()

    def update(self, replay, number: int) -> dict[str, torch.Tensor]:
        batch, annotated = replay.sample(self.batch_size), replay.sample_annotated(self.batch_size)
        value, following = self.value(_colours(batch.rgb)), self.value(_colours(batch.next_rgb))
        goal = torch.from_numpy(batch.reward)[:, None] + torch.from_numpy(batch.discount)[:, None] * following.detach()
        loss = (value - goal).square().mean()
        loss = loss + (self.policy(_colours(batch.rgb)) - torch.from_numpy(batch.action)).square().mean()
        if annotated is not None:
            seen = torch.from_numpy(annotated.rgb).float().mean((1, 2)) / 255
            said = torch.from_numpy(annotated.patch_probabilities[:, :1].mean((2, 3)))
            loss = loss + (self.value(seen.repeat(1, 3)) - said).square().mean()
        self.optimizers["all"].zero_grad()
        loss.backward()
        self.optimizers["all"].step()
        return {"loss": loss.detach()}


def _colours(rgb: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rgb).float().mean((2, 3)).flatten(1) / 255


# ---- faults ----


class Fault:
    """What is done at which event."""

    def __init__(self, text: str):
        what, _, when = text.partition(":")
        self.what, self.when, self.events = what, int(when or 0), 0

    def event(self) -> None:
        self.events += 1
        if self.events == self.when:
            getattr(self, self.what)()

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_group(self) -> None:
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def stop_group(self) -> None:
        """Twice, as `timeout` does."""
        os.kill(os.getpid(), signal.SIGTERM)
        os.killpg(os.getpgid(0), signal.SIGTERM)

    def fill_disk(self) -> None:
        """Until not a byte more can be written."""
        with open(os.environ["FILLER"], "wb", buffering=0) as file:
            size = 1 << 16
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2

    def kill_workers(self) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    def watch(self, owner: object, name: str) -> None:
        """Makes a call an event, before and after it."""
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            self.event()
            result = original(*args, **kwargs)
            self.event()
            return result

        setattr(owner, name, watched)


@one_line_errors
def main(args: Args) -> None:
    with Run(args, "tiny_agent.py") as run:
        agent = Agent(run.action_dim, args)
        replay = run.make_replay(2, 0.9)
        for turn in run.steps(agent, replay):
            run.send(run.random_action() if turn.random else agent.act(turn.observation))
            for number in turn.updates:
                run.log(agent.update(replay, number))
            replay.add(run.receive())


def run_with(words: Sequence[str], fault: str) -> None:
    """As if it had been typed; everything that is done to a file, and every step of an environment, is an event."""
    watcher = Fault(fault)
    files = [(Path, "replace"), (Path, "rename"), (Path, "unlink"), (CsvFile, "write")]
    files += [(os, "fsync"), (os, "truncate"), (os, "posix_fallocate")]
    for place in (*files, (Workers, "send"), (Workers, "receive")):
        watcher.watch(*place)
    main(tyro.cli(Args, args=words))
    print(f"events {watcher.events}")


if __name__ == "__main__":
    run_with(sys.argv[1:], os.environ.get("FAULT", ""))
