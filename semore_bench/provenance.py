"""Provenance of a run: settings, commit, versions, hardware; devices; Weights & Biases."""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from semore_bench.args import CommonArgs
from wrappers.backends.captioners import make_prompt
from wrappers.backends.specs import is_vlm
from wrappers.errors import UserError


def run_config(args: CommonArgs, agent: str, device: torch.device) -> dict[str, Any]:
    """What config.json says of a run."""
    return {
        "agent": agent,
        "env_id": args.env_id,
        "seed": args.seed,
        "guidance": args.guidance_source,
        "prompt": make_prompt(args.task_description) if is_vlm(args.annotator) else None,
        "args": args.settings,
        "command": sys.argv,
        **provenance(device),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Commit, versions and hardware, as JSON-able values."""
    packages = "semore-bench gymnasium mujoco dm_control metaworld shimmy torch numpy opencv-python-headless".split()
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": _commit(),
        "versions": versions,
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
            "system": platform.platform(),
        },
    }


def _commit() -> str:
    """Of the repository that this code is in; an installed wheel may lie in somebody else's."""
    repository = Path(__file__).parents[1]
    if not (repository / ".git").exists():
        return "unknown"
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    try:
        git = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a clone in a container without git
        return "unknown"
    return git.stdout.strip() or "unknown"


def processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def find_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        UserError: there is none of that name, or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown --device {name!r}; type cpu, cuda or cuda:<number>") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name} is not there ({torch.cuda.device_count()} GPUs found); type --device cpu, or see "
            "`semore-bench doctor`"
        )
    return device


def track(directory: Path, agent: str, args: CommonArgs) -> Callable[[], None]:
    """Sends what TensorBoard gets to Weights & Biases too; to be called before there is a writer, which it watches.

    Returns:
        What ends it, once the writer is closed.

    Raises:
        UserError: its package is not installed, or it does not start.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("--track needs the wandb package; type: pip install wandb") from None
    try:
        wandb.init(
            project="semore-bench",
            name=f"{agent}__{args.env_id}__{args.seed}",
            id=run_id(directory),
            resume="allow",
            dir=directory,
            config=dataclasses.asdict(args),
            sync_tensorboard=True,
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases does not start ({str(error).splitlines()[0]}); type `wandb login`, set "
            "WANDB_MODE=offline to send the logs later, or leave --track away"
        ) from None
    return wandb.finish


def run_id(directory: Path) -> str:
    """The same for every process that continues the run in this folder, and for no other folder or machine."""
    place = f"{platform.node()}:{directory.resolve()}"
    return hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:32]
