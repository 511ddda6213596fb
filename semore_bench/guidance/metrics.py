"""How good captions and maps are, as numbers between 0 and 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

# "up and to the right" and "above and left of" are single attributes.
_BOUNDARY = re.compile(r"(?=; |, | and (?!to the |left of|right of))")


def phrases(caption: str) -> list[str]:
    """Cuts a caption into pieces with about one attribute each; joined they are the caption.

    >>> phrases("the fish is above and left of the target, and points up and to the right; it is far")
    ['the fish is above and left of the target', ',', ' and points up and to the right', '; it is far']
    """
    return [phrase for phrase in _BOUNDARY.split(caption) if phrase]


def exact_match(predicted: Sequence[str], true: Sequence[str]) -> float:
    """Share of captions that are equal to the true ones, letter by letter."""
    return float(np.mean([a == b for a, b in zip(predicted, true, strict=True)]))


def attribute_accuracy(predicted: Sequence[str], true: Sequence[str]) -> float:
    """Share of the true captions' phrases that stand at the same place in the predicted ones.

    >>> attribute_accuracy(["the cart is left; the pole points up"], ["the cart is left; the pole points down"])
    0.5
    """
    right = total = 0
    for a, b in zip(predicted, true, strict=True):
        wanted = phrases(b)
        right += sum(x == y for x, y in zip(phrases(a), wanted, strict=False))
        total += len(wanted)
    return right / total


def retrieval_accuracy(images: np.ndarray, texts: np.ndarray, labels: np.ndarray) -> float:
    """Share of images (N, d) whose nearest text (M, d), by cosine, is the one that their label (N,) says.

    >>> retrieval_accuracy(np.eye(2), np.array([[0.0, 2.0], [1.0, 0.0]]), np.array([1, 1]))
    0.5
    """
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    return float(((images @ texts.T).argmax(1) == labels).mean())


def map_iou(predicted: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union of maps (N, G, G) with values in 0-1: sum of minima over sum of maxima.

    For masks of 0 and 1 this is the usual quotient; 1 if both are empty.

    >>> map_iou(np.array([[[1.0, 1.0], [0.0, 0.0]]]), np.array([[[1.0, 0.0], [0.0, 0.0]]]))
    0.5
    """
    union = np.maximum(predicted, true).sum()
    return float(np.minimum(predicted, true).sum() / union) if union else 1.0
