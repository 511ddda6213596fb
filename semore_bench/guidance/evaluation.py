"""What the saved models are worth on held-out states, through the very annotator that users get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from semore_bench.guidance.frames import UNKNOWN, Frames
from semore_bench.guidance.metrics import attribute_accuracy, exact_match, map_iou, retrieval_accuracy
from wrappers.backends.annotation import relevance_map
from wrappers.backends.clip import ClipGrounding
from wrappers.backends.embedded import UNFAMILIAR, EmbeddedAnnotator
from wrappers.backends.familiarity import Familiarity, scene_features

BATCH = 64


class Measured(NamedTuple):
    """Numbers of one domain, 0-1; None where there is nothing to measure.

    `exact_match`, `attributes`: captions, and their phrases, equal to the simulator's. `retrieval`: frames whose
    nearest caption among the domain's different ones is theirs. `relevance_iou`: of the relevance maps with the
    simulator's. `class_iou`: the same of the maps of the scene's named things, on average over these. `unfamiliar`:
    frames that are called unfamiliar. `by_class`: the IoU of each thing.
    """

    exact_match: float | None
    attributes: float | None
    retrieval: float | None
    relevance_iou: float | None
    class_iou: float | None
    unfamiliar: float
    by_class: Mapping[str, float]

    def numbers(self) -> dict[str, float | None]:
        """All but the things' own ones."""
        return {name: value for name, value in self._asdict().items() if name != "by_class"}


def mean_class_iou(rows: Mapping[str, Measured], domains: Sequence[str]) -> float:
    """The mean over some domains of `class_iou`."""
    return float(np.mean([rows[domain].class_iou for domain in domains]))


def fit_familiarity(folder: Path, trained: Sequence[Frames], held_out: Sequence[Frames]) -> Familiarity:
    """Fits `Familiarity` to what the CLIP in a folder sees, each task being a kind of scene, and writes it there.

    Args:
        folder: of the models.
        trained: frames of the known domains, of which every third is looked at: of states that physics led to and of
            others that were set, which alternate.
        held_out: others of these domains, for the threshold.
    """
    clip = ClipGrounding(folder / "clip", device="cpu")

    def features(images: np.ndarray) -> np.ndarray:
        looks = (clip.look(list(images[start : start + BATCH])) for start in range(0, len(images), BATCH))
        return np.concatenate([scene_features(look.tokens.numpy()) for look in looks])

    kinds: dict[tuple, list[np.ndarray]] = {}
    for part in trained:
        kinds.setdefault((part.domain, part.class_names), []).append(features(part.images[::3]))
    known = np.concatenate([features(part.images) for part in held_out])
    fitted = Familiarity.fit([np.concatenate(found) for found in kinds.values()], known)
    fitted.save(folder / "clip")
    return fitted


def measure(folder: Path, domains: Mapping[str, Sequence[Frames]]) -> dict[str, Measured]:
    """Measures the models in a folder, domain by domain."""
    annotator = EmbeddedAnnotator(folder=folder)
    return {domain: _measure(annotator, parts) for domain, parts in domains.items()}


def measure_things(
    folder: Path, settings: Mapping[str, Mapping[str, Sequence[Frames]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """The IoU of each thing's maps, as `Measured.by_class` has it: by setting, domain and thing."""
    annotator = EmbeddedAnnotator(folder=folder)
    return {
        setting: {
            domain: class_ious(
                annotate(annotator, np.concatenate([part.images for part in parts])).maps, parts, annotator.grid
            )
            for domain, parts in domains.items()
        }
        for setting, domains in settings.items()
    }


class Answers(NamedTuple):
    """What is said about N frames: captions, "" where there is no usable answer; relevance maps (N, G, G), 0 there;
    maps of the things that are named, frame by frame."""

    captions: list[str]
    relevance: np.ndarray
    maps: list[dict[str, np.ndarray]]


def annotate(annotator: EmbeddedAnnotator, images: np.ndarray) -> Answers:
    """What the annotator says about uint8 (N, H, W, 3) frames."""
    n, grid = len(images), annotator.grid
    answers = Answers([""] * n, np.zeros((n, grid, grid), np.float32), [{} for _ in range(n)])
    for start in range(0, len(images), BATCH):
        batch = range(start, min(start + BATCH, len(images)))
        for index, annotation in zip(
            batch, annotator.annotate(list(images[batch.start : batch.stop]), batch), strict=True
        ):
            if annotation is None:
                continue
            answers.captions[index], answers.relevance[index] = annotation.caption, annotation.relevance
            maps = zip(annotation.class_names, annotation.patch_probabilities, strict=True)
            answers.maps[index] = dict(maps)
    return answers


def true_shares(part: Frames, grid: int) -> np.ndarray:
    """The share of each class in each patch (N, K, G, G) that the simulator's masks give."""
    n, height, width = part.classes.shape
    patches = part.classes.reshape(n, grid, height // grid, grid, width // grid)
    shares = [(patches == number).mean((2, 4), dtype=np.float32) for number in range(len(part.class_names))]
    return np.stack(shares, axis=1)


def class_ious(maps: Sequence[Mapping[str, np.ndarray]], parts: Sequence[Frames], grid: int) -> dict[str, float]:
    """The IoU of each named thing's maps over all frames; a thing that is not named has none.

    Args:
        maps: of each frame of all parts, by name.
        parts: what is true.
        grid: patches per side.
    """
    found: dict[str, list[np.ndarray]] = {}
    true: dict[str, list[np.ndarray]] = {}
    nothing, start = np.zeros((grid, grid), np.float32), 0
    for part in parts:
        shares = true_shares(part, grid)
        for index, thing in enumerate(part.objects):
            found.setdefault(thing.name, []).extend(
                named.get(thing.name, nothing) for named in maps[start : start + len(shares)]
            )
            true.setdefault(thing.name, []).extend(shares[:, index])
        start += len(shares)
    return {name: map_iou(np.stack(found[name]), np.stack(true[name])) for name in true}


def _measure(annotator: EmbeddedAnnotator, parts: Sequence[Frames]) -> Measured:
    images = np.concatenate([part.images for part in parts])
    said, relevance, maps = annotate(annotator, images)
    is_unfamiliar = np.array(said) == UNFAMILIAR
    if parts[0].domain in UNKNOWN:
        return Measured(None, None, None, None, None, float(is_unfamiliar.mean()), {})
    true = [caption for part in parts for caption in part.captions]
    texts = sorted(set(true))
    labels = np.array([texts.index(caption) for caption in true])
    by_class = class_ious(maps, parts, annotator.grid)
    true_relevance = [
        [relevance_map(part.objects, shares) for shares in true_shares(part, annotator.grid)] for part in parts
    ]
    return Measured(
        exact_match(said, true),
        attribute_accuracy(said, true),
        retrieval_accuracy(annotator.clip.image_embeddings(list(images)), annotator.clip.encode(texts), labels),
        map_iou(relevance, np.concatenate(true_relevance)),
        float(np.mean(list(by_class.values()))),
        float(is_unfamiliar.mean()),
        by_class,
    )
