"""What captions and flow cost: env steps per second with them, and training beside a slow vision-language model."""

import json
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from semore_bench.benchmarks.stepper import Stepper
from semore_bench.envs import EnvConfig
from semore_bench.listing import AGENTS
from semore_bench.workers import Workers
from wrappers.backends.queues import BATCH_SIZE
from wrappers.errors import UserError

SLOW_SECONDS = 2.0
ANSWER = {"caption": "a cart with a pole", "objects": [{"name": "pole", "relevance": 1.0, "motion": "moving"}]}


@dataclass
class Guidance:
    """Env steps per second with flow and captions against RGB alone, and training beside a slow captioner."""

    env_ids: tuple[str, ...] = (
        "dm_control/cartpole-swingup-v0",
        "dm_control/walker-walk-v0",
        "dm_control/cheetah-run-v0",
    )
    """environments of the first table"""
    image_size: int = 84
    """height and width of the frames in pixels"""
    action_repeat: int = 4
    """simulator steps per agent step"""
    annotate_every: int = 8
    """agent steps between annotated frames"""
    blocks: int = 15
    """blocks per setting, in alternation"""
    block_steps: int = 100
    """agent steps per block"""
    training_blocks: int = 10
    """blocks of training, with and without captions; 0 leaves the second table out"""
    training_steps: int = 50
    """agent steps per such block, with an update each"""
    annotator: Literal["embedded", "simulator"] = "embedded"
    """annotator of the first table"""

    def run(self) -> None:
        """Measures, and prints two tables."""
        if min(self.blocks, self.block_steps, self.training_steps) < 1 or self.training_blocks < 0:
            raise UserError("--blocks, --block-steps and --training-steps must be at least 1")
        if not self.env_ids:
            raise UserError("--env-ids is empty; name one environment or more, or leave it out")
        console = Console(width=max(Console().width, 110))
        table = Table(
            title=f"env steps per second at {self.image_size} px, captions ({self.annotator}) every "
            f"{self.annotate_every}th frame",
            caption="quotients are medians (and quartiles) over blocks in turn",
        )
        for name in ("environment", "RGB", "and flow", "quotient", "and captions", "quotient"):
            table.add_column(name, justify="left" if name == "environment" else "right", no_wrap=True)
        together: dict[str, list[float]] = {"rgb": [], "flow": [], "captions": []}
        try:
            for env_id in self.env_ids:
                speeds = self._environment(env_id)
                for name, values in speeds.items():
                    together[name] += values
                cells = [f"{statistics.median(speeds['rgb']):.0f}"]
                for name in ("flow", "captions"):
                    cells += [f"{statistics.median(speeds[name]):.0f}", quotient(speeds[name], speeds["rgb"])]
                table.add_row(env_id.removeprefix("dm_control/"), *cells)
        finally:  # what was measured before Ctrl-C, or before an environment that cannot be made
            if table.row_count:
                flow, captions = (quotient(together[name], together["rgb"]) for name in ("flow", "captions"))
                table.add_row("all of these", "", "", flow, "", captions)
                console.print(table)
        if self.training_blocks:
            self._training(console)

    def _environment(self, env_id: str) -> dict[str, list[float]]:
        rgb = EnvConfig(image_size=self.image_size, action_repeat=self.action_repeat, flow=None)
        flow = replace(rgb, flow="dis")
        captions = replace(flow, annotator=self.annotator, annotate_every=self.annotate_every)
        rng = np.random.default_rng(0)
        speeds: dict[str, list[float]] = {"rgb": [], "flow": [], "captions": []}
        with ExitStack() as stack:
            arms = {
                name: stack.enter_context(Workers(env_id, config))
                for name, config in zip(speeds, (rgb, flow, captions), strict=True)
            }
            for workers in arms.values():  # models are loaded, and everything is warm
                workers.reset([0])
                warm_up(partial(_walk, workers, 1, rng), partial(_annotations, workers), self.annotate_every)
            for _ in range(self.blocks):
                for name in rng.permutation(list(arms)):
                    began = time.perf_counter()
                    _walk(arms[name], self.block_steps, rng)
                    env_steps = self.block_steps * self.action_repeat
                    speeds[name].append(env_steps / (time.perf_counter() - began))
        return speeds

    def _training(self, console: Console) -> None:
        agent = AGENTS / "semore_sac.py"
        common = ["--env-id", self.env_ids[0], "--preset", "lite", "--random-steps", "50"]
        # Where things are named, actor and critics read numbers instead of pixels: with both, the two train alike.
        common += ["--annotate-every", str(self.annotate_every), "--pixels"]
        rounds: list[tuple[float, float]] = []
        try:
            with _slow_server() as url, ExitStack() as stack:
                annotators = ["none"], [f"openai:{url}#slow", "--clip", "embedded"]
                off, slow = (
                    stack.enter_context(Stepper(agent, [*common, "--annotator", *flags])) for flags in annotators
                )
                for arm in (off, slow):
                    arm.run(100)
                for _ in range(self.training_blocks):
                    rounds.append((off.run(self.training_steps).turn, slow.run(self.training_steps).turn))
        finally:  # what was measured before Ctrl-C
            if rounds:
                without, beside = map(list, zip(*rounds, strict=True))
                table = Table(
                    title="a training step of semore_sac --pixels, captions from a server that takes "
                    f"{SLOW_SECONDS:g} s"
                )
                for name in ("captions", "milliseconds", "speed against captions off: median (quartiles)"):
                    table.add_column(name, justify="left" if name == "captions" else "right")
                table.add_row("off", f"{statistics.median(without):.1f}", "")
                table.add_row("slow, async", f"{statistics.median(beside):.1f}", quotient(without, beside))
                console.print(table)


def warm_up(step: Callable[[], object], annotations: Callable[[], float | None], annotate_every: int) -> None:
    """Steps until everything is loaded: models only are with the first annotations, which wait for a batch of frames.

    Args:
        step: takes an agent step.
        annotations: annotations so far; None where there is no annotator.
        annotate_every: agent steps between annotated frames.
    """
    for taken in range(1, 3 * BATCH_SIZE * annotate_every + 1):  # no longer, for an annotator that cannot answer
        step()
        if taken >= 3 * annotate_every and annotations() != 0:
            return


def _annotations(workers: Workers) -> float | None:
    return workers.statistics().get("annotations")


def _walk(workers: Workers, steps: int, rng: np.random.Generator) -> None:
    seeds = iter(lambda: int(rng.integers(2**31)), None)
    size = (workers.num_envs, *workers.action_space.shape)
    for _ in range(steps):
        workers.send(rng.uniform(-1, 1, size))
        workers.receive(seeds)


def quotient(over: list[float], under: list[float]) -> str:
    """Median and quartiles of the quotients of blocks that took turns."""
    low, middle, high = np.quantile(np.array(over) / np.array(under), [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


class _Slow(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(SLOW_SECONDS)
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(ANSWER)}}
        answer = {"id": "0", "object": "chat.completion", "created": 0, "model": "slow", "choices": [message]}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A training that is over does not wait for its last answers."""


@contextmanager
def _slow_server():
    server = _Server(("127.0.0.1", 0), _Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
