"""From what a user types to an annotator; a captioner and CLIP together."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wrappers.backends.annotation import (
    MAX_CLASSES,
    MAX_OBJECTS,
    Annotation,
    Annotator,
    CachedAnnotator,
    SceneObject,
    patch_probabilities,
    relevance_map,
)
from wrappers.backends.captioners import Captioner, Description, embedded_model, make_captioner
from wrappers.errors import UserError

if TYPE_CHECKING:
    from wrappers.backends.clip import ClipGrounding

logger = logging.getLogger(__name__)

BACKGROUND = ("floor", "sky", "wall", "background")
DEFAULT_CLIP = "ViT-B-16:laion2b_s34b_b88k"
UNFAMILIAR = "an unfamiliar scene"
"""what the embedded captioner says of scenes that it knows it does not know"""


class VisionLanguageAnnotator:
    """A captioner names what matters in a frame, CLIP says where it is.

    Where the captioner gives no usable answer, the objects of its last one are looked for instead, and `source` says
    so; before the first usable answer the frame is left out.

    Args:
        captioner: gives caption and objects.
        clip: gives embeddings and patch probabilities.
        background: 1-5 names of what else may be seen; they get no relevance.
    """

    def __init__(self, captioner: Captioner, clip: ClipGrounding, background: Sequence[str] = BACKGROUND):
        if not 1 <= len(background) <= MAX_CLASSES - MAX_OBJECTS:
            raise ValueError(f"1-{MAX_CLASSES - MAX_OBJECTS} background classes are possible, got {background}")
        self.captioner, self.clip, self.background = captioner, clip, tuple(background)
        self.source = captioner.source
        self.identity = f"{captioner.identity} | {clip.identity} | {self.background}"
        self.embedding_dim, self.grid = clip.dim, clip.grid
        self._objects: tuple[SceneObject, ...] = ()  # of the last usable answer
        self._answers = self._unusable = 0

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation]:
        """Annotates uint8 (H, W, 3) frames, in one batch.

        Raises:
            AnnotatorUnavailable: if the captioner cannot answer now.
        """
        annotations = []
        descriptions = self.captioner.describe(frames)
        features = self.clip.patch_features(frames)
        for description, feature, frame_step in zip(descriptions, features, frame_steps, strict=True):
            self._answers += 1
            source = self.source
            if description is None:
                self._unusable += 1
                if not self._objects:
                    continue
                source += " (objects of an earlier frame)"
                description = Description(", ".join(thing.name for thing in self._objects), self._objects)
            self._objects = description.objects
            annotations.append(self._ground(description, feature, frame_step, source))
        return annotations

    def statistics(self) -> dict[str, float]:
        """Counts since construction: `answers`, and how many of them were `unusable_answers`."""
        return {"answers": self._answers, "unusable_answers": self._unusable}

    def _ground(self, description: Description, features: np.ndarray, frame_step: int, source: str) -> Annotation:
        objects = description.objects
        names = tuple(dict.fromkeys([*(thing.name for thing in objects), *self.background]))
        class_embeddings = self.clip.encode_classes(names)
        probabilities = patch_probabilities(features, class_embeddings)
        return Annotation(
            caption=description.caption,
            objects=objects,
            caption_embedding=self.clip.encode([description.caption])[0],
            class_names=names,
            class_embeddings=class_embeddings,
            patch_probabilities=probabilities,
            relevance=relevance_map(objects, probabilities),
            frame_step=frame_step,
            source=source,
        )


class EmbeddedAnnotator(VisionLanguageAnnotator):
    """The small models that come with the package; shown a kind of scene that they do not know, it logs a warning.

    A frame is unfamiliar if the captioner says so, or if its CLIP embedding is less similar to the caption's than
    `familiar_similarity` in the CLIP's configuration. The first frames are checked, and most of them count.

    Args:
        device: a torch device; by default the GPU where there is one.

    Raises:
        UserError: if the models are missing.
    """

    frames_to_check = 32

    def __init__(self, device: str | None = None):
        super().__init__(make_captioner("embedded", device=device), make_clip("embedded", device))
        config = json.loads((embedded_model("clip") / "open_clip_config.json").read_text())
        self._familiar_similarity = config.get("familiar_similarity", -1.0)
        self._checked = self._unfamiliar = 0

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation]:
        """Annotates uint8 (H, W, 3) frames, in one batch."""
        annotations = super().annotate(frames, frame_steps)
        if self._checked < self.frames_to_check and len(annotations) == len(frames):
            self._check(frames, annotations)
        return annotations

    def statistics(self) -> dict[str, float]:
        """Those of `VisionLanguageAnnotator`, and the `unfamiliar_share` of the frames that were checked."""
        return super().statistics() | {"unfamiliar_share": self._unfamiliar / max(self._checked, 1)}

    def _check(self, frames: Sequence[np.ndarray], annotations: Sequence[Annotation]) -> None:
        captions = np.stack([annotation.caption_embedding for annotation in annotations])
        similarities = (self.clip.image_embeddings(frames) * captions).sum(1)
        said = np.array([annotation.caption == UNFAMILIAR for annotation in annotations])
        self._checked += len(frames)
        self._unfamiliar += int((said | (similarities < self._familiar_similarity)).sum())
        if self._checked >= self.frames_to_check and self._unfamiliar > self._checked / 2:
            logger.warning(
                "annotator 'embedded' does not know this kind of scene (%d of %d frames): its captions and maps mean "
                "little here; name a real model, transformers:<name> or openai:<base url>#<model>",
                self._unfamiliar,
                self._checked,
            )


def make_annotator(
    spec: str,
    task_description: str = "",
    clip: str | None = None,
    device: str | None = None,
    cache_directory: str | Path | None = None,
) -> Annotator | None:
    """Makes the annotator that a user named.

    Args:
        spec: "none"; "simulator" (MuJoCo only, exact and privileged); or a captioner: "embedded" (small, offline),
            "transformers:<name on the hub or folder>", "openai:<base url>#<model>".
        task_description: the task in a sentence, for the captioner's prompt.
        clip: who says where things are: "<model>:<weights>" as open_clip knows them, a folder in its format, or
            "embedded", which is the default with the embedded captioner; `DEFAULT_CLIP` otherwise.
        device: a torch device; by default the GPU where there is one.
        cache_directory: where annotations are kept for other runs; by default they are not.

    Returns:
        None for "none".

    Raises:
        UserError: if there is no such annotator, or a model of it cannot be loaded.
    """
    if spec == "none":
        return None
    if spec == "simulator":
        from wrappers.backends.simulator import SimulatorAnnotator

        return SimulatorAnnotator()
    if spec != "embedded" and not spec.startswith(("transformers:", "openai:")):
        raise UserError(
            f"unknown annotator {spec!r}: expected none, simulator, embedded, transformers:<name or folder> or "
            "openai:<base url>#<model>"
        )
    if spec == "embedded" and clip in (None, "embedded"):
        annotator = EmbeddedAnnotator(device)
    else:
        captioner = make_captioner(spec, task_description, device)
        annotator = VisionLanguageAnnotator(captioner, make_clip(clip or DEFAULT_CLIP, device))
    return annotator if cache_directory is None else CachedAnnotator(annotator, cache_directory)


def make_clip(spec: str, device: str | None = None) -> ClipGrounding:
    """Makes the CLIP that a user named: see `clip` of `make_annotator`.

    Raises:
        UserError: if there is no such model, or it cannot be loaded.
    """
    from wrappers.backends.clip import ClipGrounding

    if spec == "embedded":
        return ClipGrounding(embedded_model("clip"), device=device)
    if Path(spec).is_dir() or spec.startswith("hf-hub:"):
        return ClipGrounding(spec, device=device)
    model, _, weights = spec.partition(":")
    return ClipGrounding(model, weights, device=device)
