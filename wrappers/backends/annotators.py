"""The factory: from an annotator's spec to an annotator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wrappers.backends.annotation import DEFAULT_GRID, Annotator
from wrappers.backends.cache import CachedAnnotator
from wrappers.backends.captioners import embedded_model, make_captioner
from wrappers.backends.servers import check_base_url
from wrappers.backends.specs import EMBEDDED, EXPECTED, is_embedded, is_known, is_server, split_server
from wrappers.backends.vision_language import BACKGROUND, VisionLanguageAnnotator, patches_per_side
from wrappers.errors import UserError

if TYPE_CHECKING:
    from wrappers.backends.clip import ClipGrounding

DEFAULT_CLIP = "ViT-B-16:laion2b_s34b_b88k"
DEFAULT_CLIP_GRID = 28
"""patches per side that it sees at 448 pixels, twice its usual size"""


def check_annotator(spec: str) -> None:
    """Raises `UserError` unless `spec` has the form of what `make_annotator` takes; nothing is loaded."""
    if not is_known(spec):
        raise UserError(f"unknown annotator {spec!r}: expected {EXPECTED}")
    if is_server(spec):
        check_base_url(split_server(spec)[0])


def check_grid(grid: int | None) -> None:
    """Raises `UserError` unless annotations can have so many patches per side; None stands for the usual number."""
    if grid is not None and grid < 1:
        raise UserError(f"--annotation-grid must be at least 1, got {grid}")


def annotation_shape(spec: str, clip: str | None = None, grid: int | None = None) -> tuple[int, int]:
    """Length of the embeddings and patches per side of what `make_annotator` makes, without loading a captioner.

    Raises:
        UserError: if CLIP cannot see the patches that are asked for.
    """
    check_grid(grid)
    clip, grid = _choose_clip(spec, clip, grid)
    try:
        config = _clip_config(clip)
        own = patches_per_side(config)
        dim = config["model_cfg"]["embed_dim"] if own else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"CLIP model {clip} cannot be loaded: open_clip_config.json is missing or damaged ({error!r})"
        ) from error
    if own is None:
        made = make_clip(clip, "cpu", grid)
        return made.dim, made.grid
    if "dense_head" in config:
        _refuse_other_grids(clip, own, grid)
    return dim, own if grid is None else grid


def _choose_clip(spec: str, clip: str | None, grid: int | None) -> tuple[str, int | None]:
    if clip is None and not is_embedded(spec):
        return DEFAULT_CLIP, DEFAULT_CLIP_GRID if grid is None else grid
    return clip or (EMBEDDED if spec == EMBEDDED else str(embedded_model("clip", spec))), grid


def _clip_config(clip: str) -> dict[str, Any]:
    """What is known of a CLIP without loading it, as `open_clip_config.json` says it; empty where nothing is."""
    folder = embedded_model("clip") if clip == "embedded" else Path(clip)
    if folder.is_dir():
        return json.loads((folder / "open_clip_config.json").read_text())
    if clip.startswith("hf-hub:"):
        return {}
    import open_clip

    config = open_clip.get_model_config(clip.partition(":")[0])
    return {"model_cfg": config} if config else {}


def _refuse_other_grids(clip: str, own: int, grid: int | None) -> None:
    if grid not in (None, own):
        raise UserError(
            f"CLIP model {clip} tells {own} x {own} patches apart and no other number, got --annotation-grid {grid}: "
            "leave it out, or name another model with --clip"
        )


def make_annotator(
    spec: str,
    task_description: str = "",
    clip: str | None = None,
    device: str | None = None,
    cache_directory: str | Path | None = None,
    grid: int | None = None,
    background_classes: Sequence[str] | None = None,
) -> Annotator | None:
    """Makes the annotator that a user named.

    Args:
        spec: "none"; "simulator" (MuJoCo only, exact and privileged); or a captioner: "embedded" (small, offline),
            "embedded:<folder>" (as `semore-bench train-guidance --output` makes it), "transformers:<name on the hub or
            folder>", "openai:<base url>#<model>".
        task_description: the task in a sentence, for the captioner's prompt.
        clip: the CLIP that locates objects: "<model>:<weights>" as open_clip knows them, a folder in its format, or
            "embedded", which is the default with the embedded captioner; `DEFAULT_CLIP` otherwise.
        device: a torch device; by default the GPU where there is one.
        cache_directory: where annotations are kept for other runs; by default they are not.
        grid: patches per side of the annotations' maps; by default 16 with "simulator" and "embedded", 28 with
            `DEFAULT_CLIP`, what the model sees at its usual size with another CLIP.
        background_classes: names of what else may be seen, `BACKGROUND` by default; "embedded" has its own.

    Returns:
        None for "none".

    Raises:
        UserError: if there is no such annotator, a model of it cannot be loaded, or it cannot have such a grid.
    """
    check_grid(grid)
    if spec == "none":
        return None
    if spec == "simulator":
        from wrappers.backends.simulator import SimulatorAnnotator

        return SimulatorAnnotator(grid=DEFAULT_GRID if grid is None else grid)
    check_annotator(spec)
    if is_embedded(spec) and (clip is None or clip == spec == EMBEDDED):
        from wrappers.backends.embedded import EmbeddedAnnotator

        annotator: VisionLanguageAnnotator = EmbeddedAnnotator(device, embedded_model("clip", spec).parent)
        annotator.source = spec
        _refuse_other_grids(spec, annotator.grid, grid)
    else:
        captioner = make_captioner(spec, task_description, device)
        clip, grid = _choose_clip(spec, clip, grid)
        background = background_classes or BACKGROUND
        annotator = VisionLanguageAnnotator(captioner, make_clip(clip, device, grid), background)
    return annotator if cache_directory is None else CachedAnnotator(annotator, cache_directory)


def make_clip(spec: str, device: str | None = None, grid: int | None = None) -> ClipGrounding:
    """Makes the CLIP that a user named: see `clip` and `grid` of `make_annotator`.

    Raises:
        UserError: if there is no such model, or it cannot be loaded.
    """
    from wrappers.backends.clip import ClipGrounding

    if spec == "embedded":
        return ClipGrounding(embedded_model("clip"), device=device, grid=grid)
    if Path(spec).is_dir() or spec.startswith("hf-hub:"):
        return ClipGrounding(spec, device=device, grid=grid)
    model, _, weights = spec.partition(":")
    return ClipGrounding(model, weights, device=device, grid=grid)
