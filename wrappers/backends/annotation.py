"""What an annotator says about one frame, and what else all annotators have in common."""

import hashlib
import logging
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

logger = logging.getLogger(__name__)

MAX_CAPTION_LENGTH = 256
MAX_OBJECTS = 5
MAX_CLASSES = 10
DEFAULT_GRID = 16  # patches per side of the simulator's and of the embedded models' annotations
PRINTABLE = "".join(map(chr, range(32, 127)))  # the ASCII characters a caption may hold

Motion = Literal["moving", "still", "unknown"]


@dataclass(frozen=True)
class SceneObject:
    """A thing in the image: its name, how much it matters for the task (0-1), and whether it moves."""

    name: str
    relevance: float
    motion: Motion = "unknown"

    def __post_init__(self) -> None:
        if not 0 <= self.relevance <= 1:
            raise ValueError(f"relevance of {self.name!r} must lie in 0-1, got {self.relevance}")
        if self.motion not in get_args(Motion):
            raise ValueError(f"motion of {self.name!r} must be in {get_args(Motion)}, got {self.motion!r}")


@dataclass(frozen=True, eq=False)
class Annotation:
    """What a vision-language model and an image-text model (or the simulator) say about one frame.

    The annotation depends on its frame alone, so it can be computed late, in a batch, and cached.
    The classes are the objects, in their order, followed by background classes such as the floor. Arrays are
    float32, for K classes, a grid of G x G image patches and d-dimensional text embeddings:

    Attributes:
        caption: One line of at most 256 printable ASCII characters.
        objects: At most 5 things that matter for the task.
        caption_embedding: Unit vector (d,).
        class_names: K names, 1 <= K <= 10; the first ones are the objects' names.
        class_embeddings: Unit rows (K, d).
        patch_probabilities: (K, G, G), which class each patch shows; sums to 1 over K.
        relevance: (G, G) in 0-1, see `relevance_map`.
        frame_step: The frame this is about, as CaptionObservation counts them in `info["frame_step"]`.
        source: Who made it, for example "simulator".

    Raises:
        ValueError: If a field breaks what is said above.
    """

    caption: str
    objects: tuple[SceneObject, ...]
    caption_embedding: np.ndarray
    class_names: tuple[str, ...]
    class_embeddings: np.ndarray
    patch_probabilities: np.ndarray
    relevance: np.ndarray
    frame_step: int
    source: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Annotation):
            return NotImplemented
        names = (field.name for field in fields(self))
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)

    def __post_init__(self) -> None:
        classes, grid = len(self.class_names), self.relevance.shape[0]
        dim = self.caption_embedding.shape[0]
        shapes = {
            "caption_embedding": (dim,),
            "class_embeddings": (classes, dim),
            "patch_probabilities": (classes, grid, grid),
            "relevance": (grid, grid),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(f"{name} must be float32 {shape}, got {array.dtype} {array.shape}")
        if self.caption != clean_text(self.caption):
            raise ValueError(f"caption must be as clean_text returns it, got {self.caption!r}")
        if len(self.objects) > MAX_OBJECTS or not 1 <= classes <= MAX_CLASSES:
            raise ValueError(f"at most 5 objects and 1-10 classes, got {len(self.objects)} and {classes}")
        if self.class_names[: len(self.objects)] != tuple(thing.name for thing in self.objects):
            raise ValueError(f"class_names must begin with the objects' names, got {self.class_names}")
        if not (self.patch_probabilities >= 0).all() or abs(self.patch_probabilities.sum(0) - 1).max() > 1e-3:
            raise ValueError("patch_probabilities must be >= 0 and sum to 1 over the classes")
        if not ((self.relevance >= 0) & (self.relevance <= 1)).all():
            raise ValueError("relevance must lie in 0-1")


@runtime_checkable
class Annotator(Protocol):
    """Makes annotations from frames; one that needs the environment also has `attach(env)`, called once."""

    source: str
    embedding_dim: int
    grid: int

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation | None]:
        """Annotate uint8 (H, W, 3) frames: one annotation per frame, in order; None where nothing can be said.

        `frame_steps` become the annotations' `frame_step`; the caller may number frames as it likes.

        Raises:
            AnnotatorUnavailable: if nothing can be said now, but perhaps later.
        """


class AnnotatorUnavailable(Exception):
    """The annotator cannot answer now, for example because its server is down; later it may.

    `kind` says what went wrong, without what is different each time: it is logged once.
    """

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind or message


class Complaints:
    """Warnings, each kind once: what goes wrong is counted elsewhere, and may go wrong thousands of times."""

    _max_kinds = 64  # a server that finds new words each time is not listened to forever

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def warn(self, kind: str, message: str, *arguments: object, exc_info: bool = False) -> None:
        """Logs the message, unless there was one of this kind."""
        if kind not in self._kinds and len(self._kinds) < self._max_kinds:
            self._kinds.add(kind)
            logger.warning(f"{message} (said once)", *arguments, exc_info=exc_info)


@runtime_checkable
class TextEncoder(Protocol):
    """Maps texts to unit vectors."""

    dim: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 (n, dim) with unit rows."""


class HashingTextEncoder:
    """Texts to unit vectors without a model: the normalised sum of a random sign vector per word and pair.

    Texts that share words are close to each other; pairs of neighbouring words keep their order ("cart left,
    pole right" is not "cart right, pole left"). The signs are bits of SHAKE-256: equal on every machine.

    >>> encoder = HashingTextEncoder(dim=64)
    >>> embeddings = encoder.encode(["the pole points up", "the pole points down", "a green ball"])
    >>> bool(embeddings[0] @ embeddings[1] > embeddings[0] @ embeddings[2])
    True
    """

    def __init__(self, dim: int = 64):
        self.dim = dim

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 (n, dim) with unit rows; case and punctuation are ignored."""
        return np.stack([self._encode(text) for text in texts])

    def _encode(self, text: str) -> np.ndarray:
        words = re.findall(r"[a-z0-9]+", text.lower())
        pairs = [f"{first} {second}" for first, second in pairwise(words)]
        # An odd number of signs: they never cancel.
        total = np.sum([self._signs(feature) for feature in [*words, *pairs] or [""]], axis=0)
        return (total / np.sqrt((total * total).sum())).astype(np.float32)

    def _signs(self, feature: str) -> np.ndarray:
        digest = hashlib.shake_256(feature.encode()).digest(-(-self.dim // 8))
        return 2 * np.unpackbits(np.frombuffer(digest, np.uint8))[: self.dim].astype(np.int64) - 1


def clean_text(text: str, max_length: int = MAX_CAPTION_LENGTH) -> str:
    """One line of printable ASCII, at most `max_length` characters: safe in a space, a log and a terminal.

    Accents are dropped, white space becomes single spaces, what else is not printable ASCII vanishes.
    """
    one_line = " ".join(unicodedata.normalize("NFKD", text).split())
    return " ".join("".join(filter(PRINTABLE.__contains__, one_line)).split())[:max_length].rstrip()


def relevance_map(objects: Sequence[SceneObject], patch_probabilities: np.ndarray) -> np.ndarray:
    """How much each patch matters for the task: M(p) = sum_k relevance_k P(k|p) over the objects, (G, G)."""
    weights = np.array([thing.relevance for thing in objects], np.float32)
    # Rounding may lift a sum of probabilities above 1 by an ulp.
    return np.tensordot(weights, patch_probabilities[: len(objects)], axes=1).clip(0, 1)


def patch_probabilities(features: np.ndarray, class_embeddings: np.ndarray, scale: float = 50.0) -> np.ndarray:
    """Which class each patch shows: P(k|p) = softmax_k(scale <v_p, t_k>), float32 (K, G, G).

    Args:
        features: unit vectors v_p (G, G, d).
        class_embeddings: unit rows t_k (K, d).
        scale: the inverse temperature.
    """
    logits = scale * np.moveaxis(features @ class_embeddings.T, -1, 0)
    exponentials = np.exp(logits - logits.max(0))
    return (exponentials / exponentials.sum(0)).astype(np.float32)


def fingerprint(path: str | Path) -> str:
    """A hash of a file, or of the names and contents of all files in a folder."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            total.update(f"{file.relative_to(path)} {hashlib.file_digest(stream, 'blake2b').hexdigest()}".encode())
    return total.hexdigest()


def statistics_of(annotator: Annotator) -> dict[str, float]:
    """What an annotator counts, if it does."""
    return annotator.statistics() if hasattr(annotator, "statistics") else {}
