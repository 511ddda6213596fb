"""What the saved models are worth on held-out states, through the very annotator that users get."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from semore_bench.guidance.frames import Frames
from semore_bench.guidance.metrics import attribute_accuracy, exact_match, map_iou, retrieval_accuracy
from wrappers.backends.annotation import relevance_map
from wrappers.backends.embedded import UNFAMILIAR, EmbeddedAnnotator

GRID = 8
BATCH = 64


class Measured(NamedTuple):
    """Numbers of one domain, 0-1; None where there is nothing to measure.

    `exact_match`, `attributes`: captions, and their phrases, equal to the simulator's. `retrieval`: frames whose
    nearest caption among the domain's different ones is theirs. `relevance_iou`: of the relevance maps with the
    simulator's. `unfamiliar`: frames that are called unfamiliar.
    """

    exact_match: float | None
    attributes: float | None
    retrieval: float | None
    relevance_iou: float | None
    unfamiliar: float


def calibrate(folder: Path, parts: Sequence[Frames]) -> float:
    """The similarity of frame and caption that one in a hundred familiar frames falls short of."""
    annotator = EmbeddedAnnotator(folder=folder)
    familiar = [part for part in parts if part.domain != "unfamiliar"]
    similarities = [annotate(annotator, part.images).similarity for part in familiar]
    return float(np.quantile(np.concatenate(similarities), 0.01))


def measure(folder: Path, domains: dict[str, Sequence[Frames]], threshold: float) -> dict[str, Measured]:
    """Measures the models in a folder, domain by domain."""
    annotator = EmbeddedAnnotator(folder=folder)
    return {domain: _measure(annotator, parts, threshold) for domain, parts in domains.items()}


class Answers(NamedTuple):
    """What is said about N frames: captions, "" where there is no usable answer; relevance maps (N, G, G), 0 there;
    cosine (N,) of each frame and its caption, -1 there."""

    captions: list[str]
    relevance: np.ndarray
    similarity: np.ndarray


def annotate(annotator: EmbeddedAnnotator, images: np.ndarray) -> Answers:
    """What the annotator says about uint8 (N, H, W, 3) frames."""
    answers = Answers([""] * len(images), np.zeros((len(images), GRID, GRID), np.float32), np.empty(len(images)))
    for start in range(0, len(images), BATCH):
        batch = range(start, min(start + BATCH, len(images)))
        for annotation in annotator.annotate(list(images[batch.start : batch.stop]), batch):
            answers.captions[annotation.frame_step] = annotation.caption
            answers.relevance[annotation.frame_step] = annotation.relevance
        answers.similarity[batch.start : batch.stop] = annotator.similarities(
            answers.captions[batch.start : batch.stop]
        )
    return answers


def true_relevance(part: Frames) -> np.ndarray:
    """Relevance maps (N, G, G) that the simulator's masks give."""
    n, height, width = part.classes.shape
    patches = part.classes.reshape(n, GRID, height // GRID, GRID, width // GRID)
    shares = np.stack([(patches == number).mean((2, 4)) for number in range(len(part.class_names))], axis=1)
    return np.stack([relevance_map(part.objects, share.astype(np.float32)) for share in shares])


def _measure(annotator: EmbeddedAnnotator, parts: Sequence[Frames], threshold: float) -> Measured:
    images = np.concatenate([part.images for part in parts])
    said, relevance, similarity = annotate(annotator, images)
    is_unfamiliar = (similarity < threshold) | (np.array(said) == UNFAMILIAR)
    if parts[0].domain == "unfamiliar":
        return Measured(None, None, None, None, float(is_unfamiliar.mean()))
    true = [caption for part in parts for caption in part.captions]
    texts = sorted(set(true))
    labels = np.array([texts.index(caption) for caption in true])
    return Measured(
        exact_match(said, true),
        attribute_accuracy(said, true),
        retrieval_accuracy(annotator.clip.image_embeddings(list(images)), annotator.clip.encode(texts), labels),
        map_iou(relevance, np.concatenate([true_relevance(part) for part in parts])),
        float(is_unfamiliar.mean()),
    )
