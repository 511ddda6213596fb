"""`semore-bench train-guidance`: makes the embedded models from nothing, and says how good they are."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from semore_bench.guidance.frames import DOMAINS, HELD_OUT_FRAMES, MASK_SIZE, Frames, collect, plan
from wrappers.backends.captioners import MODELS
from wrappers.errors import UserError

if TYPE_CHECKING:  # the modules that need PyTorch are imported when arguments have been checked
    from semore_bench.guidance.evaluation import Measured


def train_guidance(
    output: Path = MODELS,
    cache: Path = Path("runs/guidance"),
    frames: int = 2000,
    updates: int = 2500,
    batch_size: int = 128,
    seed: int = 0,
    leave_out: str = "acrobot",
    domains: tuple[str, ...] = tuple(DOMAINS),
    workers: int = 2,
) -> None:
    """Make the embedded CLIP and captioner from nothing: render frames, train, measure on held-out states.

    Typed again after an interruption, it goes on: rendered frames and the training's checkpoint are in the cache.

    Args:
        output: Folder for the models; by default the package's own ones are replaced.
        cache: Folder for frames and checkpoint, about 16 kB per frame; may be deleted afterwards.
        frames: Training frames per domain.
        updates: Updates of the weights.
        batch_size: Frames per update.
        seed: Decides frames, weights and batches.
        leave_out: A domain that is measured but not trained on.
        domains: What to train on and to measure.
        workers: Processes that render.
    """
    for name in {leave_out, *domains} - set(DOMAINS):
        raise UserError(f"unknown domain {name!r}: expected one of {', '.join(DOMAINS)}")
    for flag, value in (("frames", frames), ("updates", updates), ("workers", workers)):
        if value < 1:
            raise UserError(f"--{flag} must be at least 1, got {value}")
    trained = [domain for domain in domains if domain != leave_out]
    if not trained or batch_size < 8:
        raise UserError("nothing to learn from: give at least one domain besides --leave-out, and --batch-size 8")

    from semore_bench.guidance.cards import write_cards
    from semore_bench.guidance.evaluation import calibrate, measure
    from semore_bench.guidance.models import Sizes, write_clip_config
    from semore_bench.guidance.training import Corpus, Settings, train, used_tokens

    start = time.monotonic()
    held_out = min(frames, HELD_OUT_FRAMES)
    shards = [
        *plan([*trained, "unfamiliar"], "train", frames, seed),
        *plan([*trained, leave_out, "unfamiliar"], "varied", held_out, seed),
        *plan([*trained, leave_out, "unfamiliar"], "plain", held_out, seed),
    ]
    data: dict[str, list[Frames]] = {"train": [], "varied": [], "plain": []}
    for shard, part in zip(shards, collect(shards, cache / f"masks-{MASK_SIZE}", workers), strict=True):
        data[shard.split].append(part)
    rendered = time.monotonic()
    corpus = Corpus(data["train"])
    settings = Settings(updates, batch_size, seed=seed)
    model, losses = train(corpus, settings, cache / "training.pt", Sizes())
    model.save(output, used_tokens(corpus, model))
    threshold = calibrate(output, [part for part in data["varied"] if part.domain in trained])
    write_clip_config(output / "clip", model.config, familiar_similarity=threshold)
    trained_at = time.monotonic()
    measured = {split: measure(output, _by_domain(data[split]), threshold) for split in ("plain", "varied")}
    minutes = [round(seconds / 60, 1) for seconds in (rendered - start, trained_at - rendered)]
    facts = {
        "command": f"semore-bench train-guidance --frames {frames} --updates {updates} --batch-size {batch_size} "
        f"--seed {seed} --leave-out {leave_out}"
        + (f" --domains {' '.join(domains)}" if domains != tuple(DOMAINS) else ""),
        "domains": trained,
        "left_out": leave_out,
        "frames": len(corpus.images),
        "captions": len(corpus.captions),
        "updates": updates,
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "render_minutes": minutes[0],
        "train_minutes": minutes[1],
        "cores": os.cpu_count(),
        "familiar_similarity": threshold,
    }
    _print(measured["plain"], leave_out)
    write_cards(output, facts, measured)
    size = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    print(f"{size / 1e6:.1f} MB of weights in {output}; rendering took {minutes[0]} min, training {minutes[1]} min")


def _by_domain(parts: Sequence[Frames]) -> dict[str, list[Frames]]:
    found: dict[str, list[Frames]] = {}
    for part in parts:
        found.setdefault(part.domain, []).append(part)
    return found


def _print(rows: Mapping[str, Measured], leave_out: str) -> None:
    table = Table(title="held-out states, in the environments' own look")
    table.add_column("domain", no_wrap=True)
    for name in next(iter(rows.values()))._fields:
        table.add_column(name.replace("_", " "), justify="right")
    for domain, row in rows.items():
        label = f"{domain} (left out)" if domain == leave_out else domain
        table.add_row(label, *("-" if value is None else f"{value:.2f}" for value in row))
    Console().print(table)
