"""What an annotator says about one frame, and ways to ask it: at once, a batch later, or without waiting."""

import atexit
import hashlib
import logging
import random
import re
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
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

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation]:
        """Annotate uint8 (H, W, 3) frames, in order; one of which nothing can be said is left out.

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
        total = sum(self._signs(feature) for feature in [*words, *pairs] or [""])
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


@dataclass(frozen=True)
class Request:
    """A frame to annotate: uint8 (H, W, 3), its `frame_step`, and a key to know the answer by."""

    key: Hashable
    frame: np.ndarray
    frame_step: int


class Backoff:
    """How long to leave a failing service alone: 1, 2, 4, ... times `first` seconds, at most `longest`.

    Each wait is cut by up to a half at random, so that many clients do not come back at the same moment.
    """

    def __init__(self, first: float = 0.5, longest: float = 15.0):
        self._first, self._longest = first, longest
        self._failures, self._until = 0, 0.0
        self._random = random.Random()  # of its own: seeded runs must not depend on when a server was down

    def failed(self) -> None:
        """Starts the next wait."""
        delay = min(self._first * 2 ** min(self._failures, 32), self._longest) * self._random.uniform(0.5, 1)
        self._failures, self._until = self._failures + 1, time.monotonic() + delay

    def succeeded(self) -> None:
        """Ends all waiting."""
        self._failures, self._until = 0, 0.0

    @property
    def remaining(self) -> float:
        """Seconds to wait from now; 0 if there is nothing to wait for."""
        return max(0.0, self._until - time.monotonic())


class SyncAnnotator:
    """Annotates requests when they are made; while the annotator is unavailable they are dropped, and counted."""

    def __init__(self, annotator: Annotator):
        self.annotator = annotator
        self._finished: dict[Hashable, Annotation] = {}
        self._backoff, self._complaints = Backoff(), Complaints()
        self._start = time.monotonic()
        self._annotations = self._failures = self._drops = 0

    def request(self, requests: Sequence[Request]) -> None:
        """Annotates frames in one batch."""
        if self._backoff.remaining:
            self._drops += len(requests)
            return
        try:
            annotations = _annotate(self.annotator, requests)
        except AnnotatorUnavailable as error:
            self._complaints.warn(error.kind, "no annotation for now: %s", error)
            self._backoff.failed()
            self._failures += 1
            self._drops += len(requests)
        else:
            self._backoff.succeeded()
            self._finished |= annotations
            self._annotations += len(annotations)

    def finished(self) -> dict[Hashable, Annotation]:
        """Hands over what is annotated, by key."""
        finished, self._finished = self._finished, {}
        return finished

    def statistics(self) -> dict[str, float]:
        """Counts since construction, and those of the annotator.

        `annotations` and `annotations_per_second`; `failures`, calls that found the annotator unavailable; `drops`,
        requests that were not answered for that reason.
        """
        return statistics_of(self.annotator) | {
            "annotations": self._annotations,
            "annotations_per_second": self._annotations / max(time.monotonic() - self._start, 1e-9),
            "failures": self._failures,
            "drops": self._drops,
        }

    def close(self) -> None:
        """Does nothing: there is nothing under way."""


class PipelinedAnnotator(SyncAnnotator):
    """Annotates requests a batch at a time, in a thread of its own, and hands them over when the next batch is full.

    Which annotation comes when is fixed, so that results are deterministic; nobody waits unless annotating takes
    longer than the time from one batch to the next. Small models annotate a batch in a third of the time.

    Args:
        annotator: what annotates the frames; it is used in the thread alone.
        batch_size: frames that are annotated at once.
    """

    def __init__(self, annotator: Annotator, batch_size: int = 8):
        super().__init__(annotator)
        self.batch_size = batch_size
        self._thread = ThreadPoolExecutor(1, "annotator")
        self._gathered: list[Request] = []
        self._under_way: Future | None = None
        self._handed: dict[Hashable, Annotation] = {}

    def request(self, requests: Sequence[Request]) -> None:
        """Asks for annotations; waits for the batch before when one is full. Frames are copied."""
        self._gathered += [replace(request, frame=request.frame.copy()) for request in requests]
        if len(self._gathered) >= self.batch_size:
            self._send()

    def flush(self) -> None:
        """Waits for everything that was asked for; `finished` hands it over."""
        if self._gathered:
            self._send()
        self._collect()

    def finished(self) -> dict[Hashable, Annotation]:
        """Hands over the batches that are done, by key."""
        handed, self._handed = self._handed, {}
        return handed

    def close(self) -> None:
        """Ends the thread, once what is under way is done."""
        self._thread.shutdown(cancel_futures=True)

    def _send(self) -> None:
        self._collect()
        self._under_way = self._thread.submit(super().request, self._gathered)
        self._gathered = []

    def _collect(self) -> None:
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()  # or the exception
            self._handed |= super().finished()


class AsyncAnnotator:
    """Annotates requests in a thread of its own: nobody ever waits for the annotator, be it slow, down or broken.

    At most `max_pending` requests wait; a new one pushes out the oldest. The newest are answered first, up to
    `max_batch` at once. A batch that fails waits again, with exponential back-off, for as long as there is room.

    Args:
        annotator: what annotates the frames; it is used in the thread alone.
        max_pending: requests that may wait.
        max_batch: frames that are annotated at once.
    """

    def __init__(self, annotator: Annotator, max_pending: int = 64, max_batch: int = 16):
        if max_pending < 1 or max_batch < 1:
            raise ValueError(f"max_pending and max_batch must be at least 1, got {max_pending} and {max_batch}")
        self.annotator, self.max_pending, self.max_batch = annotator, max_pending, max_batch
        self._pending: OrderedDict[Hashable, tuple[Request, float]] = OrderedDict()  # with the time of the request
        self._finished: dict[Hashable, Annotation] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._backoff, self._complaints = Backoff(), Complaints()
        self._start = time.monotonic()
        self._annotations = self._failures = self._drops = 0
        self._waited = 0.0  # seconds, by all annotated frames together

    def request(self, requests: Sequence[Request]) -> None:
        """Asks for annotations, without waiting; frames are copied."""
        now = time.monotonic()
        with self._changed:
            for request in requests:
                self._pending[request.key] = replace(request, frame=request.frame.copy()), now
            self._drop_oldest()
            if self._thread is None:
                # A daemon: a call that never ends must not keep the program from ending. But one that can end should:
                # a thread inside of PyTorch's C++ when Python goes down takes it along with an abort.
                self._thread = threading.Thread(target=self._work, name="annotator", daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._changed.notify()

    def finished(self) -> dict[Hashable, Annotation]:
        """Hands over what was annotated since the last call, by key, without waiting."""
        with self._changed:
            finished, self._finished = self._finished, {}
        return finished

    def statistics(self) -> dict[str, float]:
        """Counts since construction, and those of the annotator.

        `annotations` and `annotations_per_second`; `age_seconds`, from request to answer on average; `failures`,
        calls that raised an exception; `drops`, requests that were pushed out; `pending`, those that wait now.
        """
        with self._changed:
            return statistics_of(self.annotator) | {
                "annotations": self._annotations,
                "annotations_per_second": self._annotations / max(time.monotonic() - self._start, 1e-9),
                "age_seconds": self._waited / max(self._annotations, 1),
                "failures": self._failures,
                "drops": self._drops,
                "pending": len(self._pending),
            }

    def close(self, timeout: float = 10.0) -> None:
        """Ends the thread, waiting at most `timeout` seconds for a call under way; what is pending is forgotten."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._pending)
                self._changed.wait_for(lambda: self._closed, self._backoff.remaining)
                if self._closed:
                    return
                batch = dict(self._pending.popitem() for _ in range(min(self.max_batch, len(self._pending))))
            try:
                annotations = _annotate(self.annotator, [request for request, _ in batch.values()])
            except Exception as error:
                # Whatever it is, training goes on: said, counted and tried again.
                is_expected = isinstance(error, AnnotatorUnavailable)
                kind = error.kind if is_expected else type(error).__name__
                message = "annotating failed and will be tried again: %s"
                self._complaints.warn(kind, message, error, exc_info=not is_expected)
                with self._changed:
                    self._failures += 1
                    self._backoff.failed()
                    # The batch is newest first: this puts it back in order, before what came in the meantime.
                    for key, waiting in batch.items():
                        self._pending.setdefault(key, waiting)
                        self._pending.move_to_end(key, last=False)
                    self._drop_oldest()
                continue
            now = time.monotonic()
            with self._changed:
                self._backoff.succeeded()
                self._finished |= annotations
                self._annotations += len(annotations)
                self._waited += sum(now - batch[key][1] for key in annotations)

    def _drop_oldest(self) -> None:
        while len(self._pending) > self.max_pending:
            self._pending.popitem(last=False)
            self._drops += 1


def _annotate(annotator: Annotator, requests: Sequence[Request]) -> dict[Hashable, Annotation]:
    # The indices stand for frame steps, so that answers are matched by what they say, not by their position.
    annotations = annotator.annotate([request.frame for request in requests], range(len(requests)))
    asked = [(requests[annotation.frame_step], annotation) for annotation in annotations]
    return {request.key: replace(annotation, frame_step=request.frame_step) for request, annotation in asked}


def statistics_of(annotator: Annotator) -> dict[str, float]:
    """What an annotator counts, if it does."""
    return annotator.statistics() if hasattr(annotator, "statistics") else {}
