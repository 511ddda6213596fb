"""A vision-language model's server that answers with anything, or not at all: training neither waits nor stops."""

import itertools
import logging
import time

import numpy as np
import pytest

from tests.fakes import HashingClip
from tests.hostile_server import ENDLESS, FAILURES, FLOOD, UNUSABLE, USABLE, WITHOUT_SCHEMA, HostileServer, error
from wrappers.backends import queues
from wrappers.backends.annotation import Annotation
from wrappers.backends.cache import CachedAnnotator
from wrappers.backends.queues import AsyncQueue, Backoff, Request
from wrappers.backends.servers import OpenAICaptioner
from wrappers.backends.vision_language import VisionLanguageAnnotator

ALL = {**USABLE, **UNUSABLE, **FAILURES, **ENDLESS, "a body without end": FLOOD}
CAPTION = "a cart with a pole"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Pauses between attempts that are too short to notice."""
    monkeypatch.setattr(queues, "Backoff", lambda: Backoff(first=0.001, longest=0.02))
    for name in ("INITIAL_RETRY_DELAY", "MAX_RETRY_DELAY"):
        monkeypatch.setattr(f"openai._base_client.{name}", 0.01, raising=False)


class Training:
    """What asks for annotations of frames that are all different, and never waits for them."""

    def __init__(self, server: HostileServer, directory, timeout: float = 1.0):
        captioner = OpenAICaptioner(server.url, "m", timeout=timeout)
        annotator = CachedAnnotator(VisionLanguageAnnotator(captioner, HashingClip()), directory)
        self.source, self.annotator = captioner.source, AsyncQueue(annotator, max_pending=8, max_batch=4)
        self.numbers = itertools.count()
        self.annotations: dict[int, Annotation] = {}

    def step(self) -> int:
        """Asks about a frame, and takes what is done."""
        number = next(self.numbers)
        frame = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
        self.annotator.request([Request(number, frame, number)])
        self.annotations |= self.annotator.finished()
        return number

    def until(self, condition) -> None:
        end = time.monotonic() + 200  # for a hang
        while not condition():
            assert time.monotonic() < end, f"it did not happen: {self.annotator.statistics()}"
            time.sleep(0.02)
            self.annotations |= self.annotator.finished()

    def seen(self, kind: str) -> float:
        return self.annotator.statistics()[kind]

    def is_described(self, number: int) -> bool:
        return number in self.annotations and self.annotations[number].source == self.source

    def recovers(self) -> None:
        """Goes on until a new frame is described; on a busy machine one may be late, and lost."""
        new = []

        def described() -> bool:
            if not self.seen("pending"):
                new.append(self.step())
            return any(map(self.is_described, new))

        self.until(described)
        assert {self.annotations[number].caption for number in new if self.is_described(number)} == {CAPTION}


def survives(behaviour: str, directory) -> None:
    """Training meets the behaviour, counts it, and goes on with good annotations when the server is sane again."""
    with HostileServer(lambda request: ALL[behaviour]) as server:
        training = Training(server, directory)
        number = training.step()
        if behaviour in USABLE:
            training.until(lambda: training.is_described(number))
            assert training.annotations[number].caption == CAPTION
            assert training.seen("unusable_answers") == 0
        elif behaviour in FAILURES or behaviour in ENDLESS:
            training.until(lambda: training.seen("failures"))
            assert not training.annotations
        else:
            training.until(lambda: training.seen("unusable_answers"))
            assert training.seen("failures") == 0
        if behaviour not in USABLE:
            assert not list(directory.rglob("*.npz")), "nothing of it is kept"
        server.reply = lambda request: USABLE["sane"]
        training.recovers()
        training.annotator.close(timeout=300)


@pytest.mark.parametrize("behaviour", ALL)
def test_training_goes_on(behaviour, faults, tmp_path, caplog):
    with faults.made():
        survives(behaviour, tmp_path)
    for record in caplog.records:
        if record.name.startswith("wrappers"):
            message = record.getMessage()
            assert message.isprintable()
            assert message.isascii()
            assert len(message) < 500
            assert not record.exc_info
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 3


@pytest.mark.parametrize("status", WITHOUT_SCHEMA)
def test_a_server_without_schemas_is_asked_without(status, faults, tmp_path):
    with (
        faults.made(),
        HostileServer(lambda r: error(status) if "response_format" in r else USABLE["sane"]) as server,
    ):
        training = Training(server, tmp_path, timeout=300)
        for _ in range(2):
            number = training.step()
            training.until(lambda number=number: training.is_described(number))
        training.annotator.close()
        with_schema = ["response_format" in request for request, _ in server.requests]
        assert with_schema == sorted(with_schema, reverse=True), "never again once it was clear"
        assert training.seen("failures") == 0


def test_a_server_that_changes_its_ways_all_the_time(faults, tmp_path):
    random = np.random.default_rng(0)
    behaviours = sorted(set(ALL) - set(ENDLESS) - {"a body without end"})
    with HostileServer(lambda request: ALL[random.choice(behaviours)]) as server:
        training = Training(server, tmp_path)
        for _ in range(400 if faults.long else 40):
            with faults.made():
                training.step()
                time.sleep(0.01)
                assert training.seen("pending") <= 8
        server.reply = lambda request: USABLE["sane"]
        training.recovers()
        assert {a.caption for a in training.annotations.values()} <= {CAPTION, "pole"}
        training.annotator.close(timeout=300)
