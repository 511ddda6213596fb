"""Trained agents, loaded from their runs' directories without touching these."""

import copy
import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import torch

from semore_bench import listing, suites
from semore_bench.args import CommonArgs, flag
from semore_bench.checkpoint import find_checkpoints, read_states
from semore_bench.envs import EnvConfig, make_env
from semore_bench.names import printable
from semore_bench.reading import fits, spelt
from semore_bench.records import UnusableRun, read_config
from semore_bench.runs import Run
from semore_bench.suites import Agent
from semore_bench.workers import check_actions
from wrappers.errors import UserError


@dataclass(frozen=True)
class Recorded:
    """What a run's directory says of it: its agent's file, the arguments, and the checkpoints, the newest first."""

    directory: Path
    agent: Agent
    args: CommonArgs
    checkpoints: list[Path]


def find_trained(run: Path, agent_file: Path | None = None) -> Recorded:
    """Reads what `load_trained` needs to know of the run in a directory.

    Args:
        run: the directory.
        agent_file: the agent's file; None where it is one of `agents/`. What a run's directory says of files is not
            followed: it may come from somebody else.

    Raises:
        UserError: there is no run or no checkpoint, the agent is not known, or its flags are no longer those.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run} holds no run (no config.json); expected a run directory, such as runs/ENV/AGENT/seed-1")
    try:
        config = read_config(run)
    except UnusableRun as reason:
        raise UserError(f"{run}: {reason}") from None
    checkpoints = find_checkpoints(run / "checkpoint")
    if not checkpoints:
        raise UserError(f"{run} has no checkpoint yet; train it first, with the command that it was begun with")
    name = config["agent_file"]
    file = agent_file or listing.agent_files().get(name)
    if file is None:
        raise UserError(f"{run}: its agent {name} is none of agents/; name its file with --agent, such as {name}.py")
    agent = suites.load_agent(name, file)
    hints, values = get_type_hints(agent.args), config["args"]
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{run} was made with a flag {flag(printable(key))}, which {agent.file} does not have")
        if not fits(value, hints[key]):
            raise UserError(f"{run}/config.json is damaged: {printable(key)} is {spelt(value)}")
    flags: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    args = agent.args(**flags)
    args.run_dir = str(run)
    return Recorded(run, agent, args, checkpoints)


@dataclass(frozen=True)
class Trained:
    """An agent as it was at a checkpoint, `env_step` steps into its run; `config`: of environments as it knows them."""

    agent: torch.nn.Module
    args: CommonArgs
    config: EnvConfig
    env_step: int


def load_trained(recorded: Recorded, env_id: str | None = None, device: str = "auto") -> Trained:
    """Makes the agent of a run and gives it the weights of the newest checkpoint that can be read.

    Args:
        recorded: see `find_trained`.
        env_id: an environment to act in; None for the one that it was trained in.
        device: as --device.

    Raises:
        UserError: no checkpoint can be read, or the agent does not fit the environment.
    """
    module, args = recorded.agent.module, copy.copy(recorded.args)
    trained_in, args.device = args.env_id, device
    args.env_id = env_id or trained_in
    run = _Loading(args, str(recorded.agent.file))
    run.checkpoints, run.trained_in = recorded.checkpoints, trained_in
    if not (hasattr(module, "Run") and hasattr(module, "main")):
        raise UserError(f"{recorded.agent.file} cannot be loaded: it has no main(args) with a Run, as drq_sac.py has")
    usual = module.Run
    # Every agent's own `main` knows how to make it, and hands it to the run: here to one that takes no step.
    module.Run = lambda *_, **__: run  # type: ignore[attr-defined]
    try:
        inspect.unwrap(module.main)(args)
    finally:
        module.Run = usual  # type: ignore[attr-defined]
    if run.trained is None:
        raise UserError(
            f"{recorded.agent.file} cannot be loaded: its main(args) does not call run.steps(agent, replay)"
        )
    return run.trained


class _Loading(Run):
    """The run that an agent's `main` meets here: it knows the environment's spaces, and ends before the first step."""

    checkpoints: list[Path]
    trained_in: str
    trained: Trained | None = None

    def __enter__(self) -> "_Loading":
        # Whatever annotates, the agent has learned.
        self.config = dataclasses.replace(self._env_config(), annotator="none")
        env = make_env(self.args.env_id, self.config)
        self.workers: Any = SimpleNamespace(observation_space=env.observation_space, action_space=env.action_space)
        env.close()
        check_actions(self.args.env_id, env.action_space, self.config)
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def make_replay(self, *_: Any, **__: Any) -> Any:
        """Takes what agents tell their replay, and holds nothing."""
        return SimpleNamespace()

    def steps(self, agent: torch.nn.Module, replay: Any) -> Iterator[Any]:
        """Loads the agent; there is no turn."""
        _, state = next(read_states(self.checkpoints), (0, None))
        if state is None:
            raise UserError(f"no checkpoint in {self.directory / 'checkpoint'} can be read; restore one from a copy")
        try:
            agent.load_state_dict(state["agent"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            if self.args.env_id != self.trained_in:
                raise UserError(
                    f"the agent of {self.directory} was trained in {self.trained_in} and does not fit "
                    f"{self.args.env_id}, where actions (of size {self.action_dim}) or what is observed are others: "
                    f"{reason}"
                ) from error
            raise UserError(
                f"the checkpoint of {self.directory} does not fit {self.agent_name} ({reason}): has its file been "
                "changed?"
            ) from error
        self.trained = Trained(agent, self.args, self.config, state["counters"]["env_step"])
        yield from ()
