"""Whether a frame shows a kind of scene that the embedded models were trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from wrappers.errors import UserError

FILE = "familiarity.safetensors"
RIDGE = 1e-3
"""of the mean variance, added to every variance: what hardly varies in training must not decide alone"""
FALSE_ALARMS = 0.003
"""share of the known frames that the threshold takes for unfamiliar"""


def scene_features(tokens: np.ndarray) -> np.ndarray:
    """Means and standard deviations over the patches of a tower's tokens: (n, P, w) -> float32 (n, 2 w)."""
    tokens = np.asarray(tokens, np.float32)
    return np.concatenate([tokens.mean(1), tokens.std(1)], 1)


class Familiarity:
    """Mahalanobis distances of frames to the kinds of scenes of training (Lee et al. 2018, arXiv 1807.03888).

    Each kind is a mean of `scene_features`, and all share one covariance; the distance is that to the nearest kind.
    No example of anything unfamiliar is needed.

    Args:
        means: of the K kinds, whitened: (K, D).
        whitening: (D, D); x @ whitening has unit covariance within a kind, but for `RIDGE`.
        threshold: frames further away are unfamiliar.
    """

    def __init__(self, means: np.ndarray, whitening: np.ndarray, threshold: float):
        self.means, self.whitening, self.threshold = means, whitening, threshold

    @classmethod
    def fit(cls, kinds: Sequence[np.ndarray], known: np.ndarray) -> Familiarity:
        """From features of the K kinds' training frames, each (n, D), and of others (n, D) of these kinds, `known`,
        of which `FALSE_ALARMS` lie beyond the threshold."""
        means = np.stack([features.mean(0) for features in kinds]).astype(np.float64)
        within = np.concatenate([features - mean for features, mean in zip(kinds, means, strict=True)])
        variances, directions = np.linalg.eigh(within.T @ within / len(within))
        whitening = directions / np.sqrt(variances + RIDGE * variances.mean())
        fitted = cls((means @ whitening).astype(np.float32), whitening.astype(np.float32), np.inf)
        fitted.threshold = float(np.quantile(fitted.distances(known), 1 - FALSE_ALARMS))
        return fitted

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Of features (n, D) to the nearest kind: root mean square over the D directions, about 1 in training: (n,)."""
        offsets = (features @ self.whitening)[:, None] - self.means
        return np.sqrt(np.square(offsets).mean(-1)).min(1)

    def knows(self, features: np.ndarray) -> np.ndarray:
        """Which frames are of a known kind, by their features (n, D): bool (n,)."""
        return self.distances(features) <= self.threshold

    def save(self, folder: Path) -> None:
        """Writes `folder`/familiarity.safetensors."""
        threshold = np.array([self.threshold], np.float32)
        save_file({"means": self.means, "whitening": self.whitening, "threshold": threshold}, folder / FILE)

    @classmethod
    def load(cls, folder: Path, size: int) -> Familiarity | None:
        """What `save` wrote of features of `size` numbers; None where there is no such file: then every scene counts
        as known.

        Raises:
            UserError: the file is damaged, or another model's.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        remedy = "make it with semore-bench train-guidance --keep all"
        try:
            saved: Mapping[str, np.ndarray] = load_file(path)
            means, whitening, threshold = saved["means"], saved["whitening"], float(saved["threshold"][0])
            fits = means.ndim == 2 and len(means) > 0 and means.shape[1] == size and whitening.shape == (size, size)
        except Exception as error:  # whatever a damaged file makes of the reader
            raise UserError(f"{path} is damaged ({error}); {remedy}") from None
        if not fits or not all(np.isfinite(value).all() for value in (means, whitening, threshold)):
            raise UserError(f"{path} is damaged, or another model's (its sizes or numbers do not fit); {remedy}")
        return cls(means, whitening, threshold)
