"""A captioner and CLIP together: one names the objects of a frame, the other locates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wrappers.backends.annotation import (
    MAX_CLASSES,
    MAX_OBJECTS,
    Annotation,
    SceneObject,
    patch_probabilities,
    relevance_map,
)
from wrappers.backends.captioners import Captioner, Description
from wrappers.errors import UserError

if TYPE_CHECKING:
    from wrappers.backends.clip import ClipGrounding

BACKGROUND = ("floor", "sky", "wall", "background")


class VisionLanguageAnnotator:
    """A captioner names what matters in a frame, CLIP says where it is.

    Where the captioner gives no usable answer, the objects of its last one are looked for instead, and `source` says
    so; before the first usable answer there is no annotation.

    Args:
        captioner: gives caption and objects.
        clip: gives embeddings and patch probabilities.
        background: 1-5 names of what else may be seen; they get no relevance.
    """

    def __init__(self, captioner: Captioner, clip: ClipGrounding, background: Sequence[str] = BACKGROUND):
        check_background(background)
        self.captioner, self.clip = captioner, clip
        self._set_up(captioner.source, f"{captioner.identity} | {clip.identity}", clip.dim, clip.grid, background)

    def _set_up(
        self, source: str, identity: str, embedding_dim: int, grid: int, background: Sequence[str] = BACKGROUND
    ) -> None:
        self.background = tuple(background)
        self.source, self.identity = source, f"{identity} | {self.background}"
        self.embedding_dim, self.grid = embedding_dim, grid
        self._objects: tuple[SceneObject, ...] = ()  # of the last usable answer
        self._answers = self._unusable = 0

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation | None]:
        """Annotates uint8 (H, W, 3) frames, in one batch.

        Raises:
            AnnotatorUnavailable: if the captioner cannot answer now.
        """
        annotations: list[Annotation | None] = []
        for description, feature, frame_step in zip(*self._look(frames), frame_steps, strict=True):
            self._answers += 1
            source = self.source
            if description is None:
                self._unusable += 1
                if not self._objects:
                    annotations.append(None)
                    continue
                source += " (objects of an earlier frame)"
                description = Description(", ".join(thing.name for thing in self._objects), self._objects)
            self._objects = description.objects
            annotations.append(self._ground(description, feature, frame_step, source))
        return annotations

    def statistics(self) -> dict[str, float]:
        """Counts since construction: `answers`, and how many of them were `unusable_answers`."""
        return {"answers": self._answers, "unusable_answers": self._unusable}

    def _look(self, frames: Sequence[np.ndarray]) -> tuple[list[Description | None], np.ndarray]:
        return self.captioner.describe(frames), self.clip.patch_features(frames)

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


def check_background(names: Sequence[str] | None) -> None:
    """Raises `UserError` unless there are 1-5 names, all different, none of them empty; None stands for the usual."""
    most = MAX_CLASSES - MAX_OBJECTS
    if names is not None and not (
        1 <= len(names) <= most and all(map(str.strip, names)) and len({*names}) == len(names)
    ):
        raise UserError(f"background classes must be 1-{most} different names, got {' '.join(names) or 'none'}")


def patches_per_side(config: Mapping[str, Any]) -> int | None:
    """What the CLIP of an `open_clip_config.json` sees at its usual size; None where its tower alone can tell."""
    if "dense_head" in config:
        return config["dense_head"]["grid"]
    vision = config.get("model_cfg", {}).get("vision_cfg", {})
    image, patch = vision.get("image_size"), vision.get("patch_size")
    return image // patch if isinstance(image, int) and isinstance(patch, int) else None
