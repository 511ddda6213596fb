"""`semore-bench benchmark`: what this machine does in which time, always in comparison, in one go."""

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
    """Measure speed and memory: things to compare take turns, and each turn's quotient counts."""
    what.run()
