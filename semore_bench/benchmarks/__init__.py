"""`semore-bench benchmark`: speed and memory on this machine, always relative to a reference in the same session."""

from typing import Annotated

import tyro

from semore_bench.benchmarks.agents import Agents
from semore_bench.benchmarks.envs import Envs
from semore_bench.benchmarks.guidance import Guidance


def benchmark(
    what: Annotated[
        Annotated[Agents, tyro.conf.subcommand("agents")]
        | Annotated[Envs, tyro.conf.subcommand("envs")]
        | Annotated[Guidance, tyro.conf.subcommand("guidance")],
        tyro.conf.arg(name=""),
    ],
) -> None:
    """Measure speed and memory: compared settings alternate in blocks, and ratios of neighbours count."""
    what.run()
