"""What stands for captioners and CLIP in tests: fast, exact, and dependent on the frame."""

import threading

import numpy as np

from wrappers.backends.annotation import AnnotatorUnavailable, HashingTextEncoder, SceneObject
from wrappers.backends.captioners import Description
from wrappers.backends.vision_language import VisionLanguageAnnotator


class HashingClip:
    """Embeds texts by hashing; a patch's features depend on its mean colour."""

    dim, grid, identity = 16, 2, "hashing"

    def __init__(self):
        self.encode = self.encode_classes = HashingTextEncoder(self.dim).encode

    def patch_features(self, frames):
        patches = [np.array_split(half, 2, axis=1) for frame in frames for half in np.array_split(frame, 2)]
        texts = [f"{patch.mean():.3f}" for pair in patches for patch in pair]
        return self.encode(texts).reshape(len(frames), 2, 2, self.dim)


class FrameCaptioner:
    """Says a frame's mean; None for black frames. Waits for `gate`, raises what is in `errors`, counts its calls."""

    def __init__(self, name: str = "mean"):
        self.source = self.identity = name
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []
        self.batches: list[int] = []

    def describe(self, frames):
        self.entered.set()
        assert self.gate.wait(60)
        if self.errors:
            raise self.errors.pop(0)
        self.batches.append(len(frames))
        return [describe(frame) if frame.any() else None for frame in frames]


def describe(frame: np.ndarray) -> Description:
    name = f"thing {int(frame.mean()) % 7}"
    return Description(f"the mean is {frame.mean():.4f}", (SceneObject(name, 0.5, "still"),))


def fake_annotator(name: str = "mean") -> VisionLanguageAnnotator:
    return VisionLanguageAnnotator(FrameCaptioner(name), HashingClip())


def unavailable() -> AnnotatorUnavailable:
    return AnnotatorUnavailable("the server is down")
