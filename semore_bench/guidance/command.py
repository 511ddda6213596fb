"""`semore-bench train-guidance`: trains the embedded models from scratch, and measures them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from semore_bench.guidance.frames import (
    DISTRACTED,
    DISTRACTED_FRAMES,
    DOMAINS,
    HELD_OUT_FRAMES,
    MASK_SIZE,
    UNKNOWN,
    Frames,
    collect,
    plan,
)
from semore_bench.memory import keep_freed_memory
from semore_bench.names import did_you_mean
from semore_bench.provenance import processor
from semore_bench.reading import read_json
from wrappers.backends.captioners import MODELS
from wrappers.backends.embedded import CONFIG, has_bfloat16, learned_from
from wrappers.backends.specs import EMBEDDED
from wrappers.errors import UserError

if TYPE_CHECKING:  # the modules that need PyTorch are imported when arguments have been checked
    from semore_bench.guidance.evaluation import Measured


def train_guidance(
    output: Path = MODELS,
    cache: Path = Path("runs/guidance"),
    frames: int = 2000,
    updates: int = 2500,
    batch_size: int = 128,
    dense_updates: int = 2000,
    seed: int = 0,
    leave_out: str = "acrobot",
    domains: tuple[str, ...] = tuple(DOMAINS),
    workers: int = 2,
    keep: Literal["nothing", "clip", "all"] = "nothing",
) -> None:
    """Train the embedded CLIP and captioner from scratch: render frames, train, measure on held-out states.

    Typed again after an interruption, it goes on: rendered frames and the training's checkpoints are in the cache.

    Args:
        output: Folder for the models; by default the package's own ones are replaced.
        cache: Folder for frames and checkpoints, about 5 kB per frame; may be deleted afterwards.
        frames: Training frames per domain.
        updates: Updates of the weights of CLIP and captioner.
        batch_size: Frames per update.
        dense_updates: Updates of the weights of CLIP's dense head, of half as many frames.
        seed: Decides frames, weights and batches.
        leave_out: A domain that is measured but not trained on.
        domains: What to train on and to measure.
        workers: Processes that render.
        keep: What in the output folder is kept as it is: clip, the CLIP and the captioner, so that the dense head alone
            is retrained; or all, which trains nothing, fits what tells unfamiliar scenes, and measures.
    """
    for name in sorted({leave_out, *domains} - set(DOMAINS)):
        raise UserError(f"unknown domain {name!r}{did_you_mean(name, DOMAINS)}")
    numbers = {"frames": frames, "updates": updates, "dense-updates": dense_updates, "workers": workers}
    for flag, value in numbers.items():
        if value < 1:
            raise UserError(f"--{flag} must be at least 1, got {value}")
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    trained = [domain for domain in domains if domain != leave_out]
    if not trained or batch_size < 8:
        raise UserError("nothing to learn from: give at least one domain besides --leave-out, and --batch-size 8")
    if keep != "nothing" and not (output / "clip" / CONFIG).is_file():
        raise UserError(f"there is no CLIP in {output / 'clip'} to keep: leave --keep {keep} out, and it is made")

    learned = {"domains": trained, "left_out": leave_out}
    if keep != "nothing" and (before := learned_from(f"{EMBEDDED}:{output}")) not in ({}, learned):
        raise UserError(
            f"the CLIP in {output / 'clip'} learned from {', '.join(before['domains'])} and not from "
            f"{before['left_out']}: type the same --domains and --leave-out with --keep {keep}, or leave it out"
        )

    if keep == "all" and "dense_made" not in read_json(output / "clip" / CONFIG, {}):
        raise UserError(f"there is no dense head in {output / 'clip'} to keep: type --keep clip, and it is trained")

    for folder in (output, cache):  # before hours of work: it may be a file, or read-only
        folder.mkdir(parents=True, exist_ok=True)

    from semore_bench.guidance.cards import write_cards
    from semore_bench.guidance.dense import save_dense_head, train_dense_head
    from semore_bench.guidance.evaluation import fit_familiarity, mean_class_iou, measure, measure_things
    from semore_bench.guidance.models import Sizes, add_to_clip_config, read_clip_config
    from semore_bench.guidance.training import Corpus, Settings, train, used_tokens
    from wrappers.backends.clip import ClipGrounding

    keep_freed_memory()
    clock = _Clock()
    held_out = min(frames, HELD_OUT_FRAMES)
    shards = [
        *plan([*trained, "unfamiliar"], "train", frames, seed),
        *plan([*trained, leave_out, *UNKNOWN], "varied", held_out, seed),
        *plan([*trained, leave_out, *UNKNOWN], "plain", held_out, seed),
        *(shard for name in DISTRACTED for shard in plan(trained, name, min(frames, DISTRACTED_FRAMES), seed)),
    ]
    data: dict[str, list[Frames]] = {}
    for shard, part in zip(shards, collect(shards, cache / f"masks-{MASK_SIZE}", workers), strict=True):
        data.setdefault(shard.split, []).append(part)
    render_minutes = clock.minutes()
    command = (
        f"semore-bench train-guidance --frames {frames} --updates {updates} --batch-size {batch_size} "
        f"--dense-updates {dense_updates} --seed {seed} --leave-out {leave_out}"
        + (f" --domains {' '.join(domains)}" if domains != tuple(DOMAINS) else "")
    )
    if keep != "all":
        corpus = Corpus(data["train"])
        if keep == "nothing":
            model, losses = train(corpus, Settings(updates, batch_size, seed=seed), cache / "training.pt", Sizes())
            model.save(output, used_tokens(corpus, model))
            made = {"command": command, "frames": len(corpus.images), "captions": len(corpus.captions)}
            made |= {"updates": updates, "loss": _last(losses), "minutes": clock.minutes()}
            add_to_clip_config(output / "clip", made=made, learned_from=learned)
        clip = ClipGrounding(output / "clip", device="cpu")
        settings = Settings(dense_updates, max(batch_size // 2, 8), learning_rate=2e-3, weight_decay=0.01, seed=seed)
        head, losses = train_dense_head(corpus, clip, settings, cache / "dense.pt")
        save_dense_head(output / "clip", head)
        dense = {"command": command + (" --keep clip" if keep == "clip" else ""), "updates": dense_updates}
        dense |= {"loss": _last(losses), "minutes": clock.minutes(), "hardware": _hardware()}
        add_to_clip_config(output / "clip", dense_made=dense)
    known = [part for part in data["train"] if part.domain not in UNKNOWN]
    fit_familiarity(output, known, [part for part in data["varied"] if part.domain in trained])
    measured = {split: measure(output, _by_domain(data[split])) for split in ("plain", "varied")}
    distracted = measure_things(output, {name: _by_domain(data[name]) for name in DISTRACTED})
    config = read_clip_config(output / "clip")
    facts = {
        "made": config["made"],
        "dense": config["dense_made"],
        "command": command + (f" --keep {keep}" if keep != "nothing" else ""),
        "domains": trained,
        "left_out": leave_out,
        "class_iou": {split: mean_class_iou(rows, trained) for split, rows in measured.items()},
    }
    _print(measured, leave_out)
    write_cards(output, facts, measured, distracted)
    size = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    for split, value in facts["class_iou"].items():
        print(f"IoU per named thing, on average over the known domains, {split}: {value:.3f}")
    print(
        f"{size / 1e6:.1f} MB of weights in {output}; minutes: rendering {render_minutes}, CLIP and captioner "
        f"{facts['made']['minutes'] if keep == 'nothing' else 'kept'}, dense head "
        f"{facts['dense']['minutes'] if keep != 'all' else 'kept'}, measuring {clock.minutes()}"
    )


class _Clock:
    """Minutes since it was last looked at."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def minutes(self) -> float:
        now, before = time.monotonic(), self._last
        self._last = now
        return round((now - before) / 60, 1)


def _hardware() -> str:
    return f"{os.cpu_count()} processor cores ({processor()}{', bfloat16' if has_bfloat16() else ''})"


def _last(losses: Sequence[float]) -> float:
    return sum(losses[-20:]) / len(losses[-20:])


def _by_domain(parts: Sequence[Frames]) -> dict[str, list[Frames]]:
    found: dict[str, list[Frames]] = {}
    for part in parts:
        found.setdefault(part.domain, []).append(part)
    return found


def _print(measured: Mapping[str, Mapping[str, Measured]], leave_out: str) -> None:
    console = Console(width=max(Console().width, 100))
    for split, title in (("plain", "in the environments' own look"), ("varied", "in varied looks")):
        table = Table(title=f"held-out states, {title}")
        table.add_column("domain", no_wrap=True)
        for name in next(iter(measured[split].values())).numbers():
            table.add_column(name.replace("_", " "), justify="right")
        for domain, row in measured[split].items():
            numbers = ("-" if value is None else f"{value:.2f}" for value in row.numbers().values())
            table.add_row(f"{domain} (left out)" if domain == leave_out else domain, *numbers)
        console.print(table)
    table = Table(title="IoU per named thing: own look, varied looks")
    table.add_column("domain", no_wrap=True)
    table.add_column("things")
    for domain, row in measured["plain"].items():
        varied = measured["varied"][domain].by_class
        things = (f"{name} {value:.2f} {varied[name]:.2f}" for name, value in row.by_class.items())
        if row.by_class:
            table.add_row(f"{domain} (left out)" if domain == leave_out else domain, ", ".join(things))
    console.print(table)
