"""The `semore-bench` command: imports the asked-for subcommand alone and turns its errors into one line."""

import codecs
import importlib
import io
import os
import sys
from typing import Any, TextIO

from semore_bench import __version__
from semore_bench.names import did_you_mean, printable

# name: (function that tyro makes a command line of, what `semore-bench --help` says about it)
COMMANDS = {
    "list": ("semore_bench.listing:list_", "List environments, agents and suites."),
    "view": ("semore_bench.view:view", "Record a video of an environment's wrapped observations."),
    "sweep": ("semore_bench.sweep:sweep", "Train agents on a suite with several seeds; resumable."),
    "evaluate": ("semore_bench.evaluate:evaluate_runs", "Load trained agents and evaluate them, on whatever you like."),
    "table": ("semore_bench.tables:table", "Compare agents with confidence intervals: Markdown, CSV, LaTeX."),
    "plot": ("semore_bench.plots:plot", "Plot learning curves, performance profiles, sample efficiency."),
    "report": ("semore_bench.report:report", "Write one HTML page: leaderboard, curves, runs, videos."),
    "results": ("semore_bench.results:results", "Build a folder of results, or rebuild it from its CSV file."),
    "benchmark": ("semore_bench.benchmarks:benchmark", "Measure speed and memory of agents and wrappers."),
    "train-guidance": (
        "semore_bench.guidance.command:train_guidance",
        "Train the embedded CLIP and captioner.",
    ),
    "doctor": ("semore_bench.doctor:doctor", "Check whether this machine can train, and what to do if not."),
}


def main(argv: list[str] | None = None) -> None:
    """Run `semore-bench` and exit: 0 on success, 1 on failure, 2 on a user's mistake, 130 on Ctrl-C."""
    write_everywhere(sys.stdout)
    write_everywhere(sys.stderr)
    try:
        sys.exit(run(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        sys.exit(130)


def run(arguments: list[str]) -> int | None:
    """Run one subcommand and return its exit code, None for 0."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"semore-bench {__version__}")
        return 0
    if name not in COMMANDS:
        return complain(f"unknown command {name!r}{did_you_mean(name, COMMANDS, 'See `semore-bench --help`')}")

    import tyro  # here, because these two cost more than everything else that `--help` needs

    from wrappers.errors import UserError

    module, function = COMMANDS[name][0].split(":")
    try:
        command = getattr(importlib.import_module(module), function)
        return tyro.cli(command, prog=f"semore-bench {name}", args=rest)
    except UserError as error:
        return complain(str(error))
    except OSError as error:
        if error.filename is None:  # it is not about a file that the user named, or that is in the way
            raise
        return complain(f"{os.fsdecode(error.filename)}: {error.strerror}")


def complain(message: str) -> int:
    """Say in one line what the user can repair, and return the exit code for it."""
    print(f"semore-bench: {printable(message)}", file=sys.stderr)
    return 2


PLAIN = {"±": "+-", "–": "-", "…": "...", "·": "-"}


def write_everywhere(stream: TextIO) -> None:
    """Lets a stream write every text, whatever its encoding: a name or a `±` must not end a command."""
    if isinstance(stream, io.TextIOWrapper):
        codecs.register_error("semore-bench", _plain)
        stream.reconfigure(errors="semore-bench")


def _plain(error: Any) -> tuple[str, int]:
    """For characters that the encoding lacks: their likes in ASCII, or their escapes."""
    characters = error.object[error.start : error.end]
    plain = (PLAIN.get(character) or character.encode("unicode_escape").decode() for character in characters)
    return "".join(plain), error.end


def usage() -> str:
    """The text of `semore-bench --help`."""
    width = max(map(len, COMMANDS))
    commands = "".join(f"  {name:{width}}  {summary}\n" for name, (_, summary) in COMMANDS.items())
    return f"usage: semore-bench COMMAND [options]\n\n{commands}\nFor one: semore-bench COMMAND --help"


if __name__ == "__main__":
    main()
