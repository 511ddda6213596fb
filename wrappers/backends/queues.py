"""Queues of annotation requests: synchronous, pipelined, asynchronous."""

import atexit
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from wrappers.backends.annotation import Annotation, Annotator, AnnotatorUnavailable, Complaints, statistics_of
from wrappers.errors import UserError


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


class SyncQueue:
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


BATCH_SIZE = 8
"""frames that a `PipelinedQueue` annotates at once"""


class PipelinedQueue(SyncQueue):
    """Annotates requests a batch at a time, in a thread of its own, and hands them over when the next batch is full.

    Which annotation comes when is fixed, so that results are deterministic; it blocks only where annotating takes
    longer than the time from one batch to the next. Small models annotate a batch in a third of the time.

    Args:
        annotator: what annotates the frames; it is used in the thread alone.
        batch_size: frames that are annotated at once.
    """

    def __init__(self, annotator: Annotator, batch_size: int = BATCH_SIZE):
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


class AsyncQueue:
    """Annotates requests asynchronously, in a thread of its own: never blocks, be the annotator slow, down or broken.

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
                kind = error.kind if isinstance(error, AnnotatorUnavailable) else type(error).__name__
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
    """Annotations by the keys of their requests; without those frames of which nothing can be said."""
    frames, frame_steps = [request.frame for request in requests], [request.frame_step for request in requests]
    annotations = annotator.annotate(frames, frame_steps)
    if len(annotations) != len(requests):
        raise UserError(
            f"annotator {annotator.source!r} returned {len(annotations)} annotations of {len(requests)} frames; "
            "expected one per frame, in their order, or None where nothing can be said"
        )
    answered = zip(requests, annotations, strict=True)
    return {request.key: annotation for request, annotation in answered if annotation is not None}
