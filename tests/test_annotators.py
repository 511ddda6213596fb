"""Annotators: captioner and CLIP together, remembered, and in a thread of their own."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import tyro

import tests.toy_env  # noqa: F401  (registers Toy-v0)
from semore_bench import suites
from semore_bench.args import CommonArgs
from semore_bench.guidance.evaluation import fit_familiarity
from tests.fakes import FrameCaptioner, HashingClip, describe, fake_annotator, unavailable
from tests.tiny_guidance import toy_frames
from tests.waiting import poll_until
from wrappers import CaptionObservation, PixelObservation, UserError
from wrappers.backends import annotators, captioners, queues
from wrappers.backends.annotation import (
    Annotator,
    patch_probabilities,
)
from wrappers.backends.annotators import annotation_shape, make_annotator
from wrappers.backends.cache import CachedAnnotator
from wrappers.backends.embedded import UNFAMILIAR
from wrappers.backends.familiarity import Familiarity
from wrappers.backends.queues import AsyncQueue, Backoff, Request, SyncQueue
from wrappers.backends.vision_language import BACKGROUND, VisionLanguageAnnotator


def random_frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (count, 12, 12, 3), np.uint8)


# ---- captioner and CLIP ----


def test_objects_come_from_the_captioner_and_places_from_clip():
    annotator = fake_annotator()
    assert isinstance(annotator, Annotator)
    frames = random_frames(3)
    for frame, annotation, frame_step in zip(frames, annotator.annotate(frames, [5, 9, 2]), [5, 9, 2], strict=True):
        said = describe(frame)
        assert (annotation.caption, annotation.objects) == (said.caption, said.objects)
        assert annotation.class_names == (said.objects[0].name, *BACKGROUND)
        assert (annotation.frame_step, annotation.source) == (frame_step, "mean")
        clip = annotator.clip
        np.testing.assert_array_equal(annotation.caption_embedding, clip.encode([said.caption])[0])
        np.testing.assert_array_equal(annotation.class_embeddings, clip.encode_classes(annotation.class_names))
        expected = patch_probabilities(clip.patch_features([frame])[0], annotation.class_embeddings)
        np.testing.assert_array_equal(annotation.patch_probabilities, expected)
        np.testing.assert_allclose(annotation.relevance, 0.5 * expected[0], rtol=1e-6)
    assert annotator.captioner.batches == [3]


def test_a_named_background_is_one_class():
    annotator = fake_annotator()
    annotator = VisionLanguageAnnotator(annotator.captioner, annotator.clip, background=("thing 0", "sky"))
    frame = np.full((4, 4, 3), 7, np.uint8)
    assert annotator.annotate([frame], [0])[0].class_names == ("thing 0", "sky")
    with pytest.raises(UserError, match="background classes must be 1-5 different names, got none"):
        VisionLanguageAnnotator(annotator.captioner, annotator.clip, background=())


@pytest.mark.parametrize("names", [(), ("road",) * 2, (" ",), tuple("abcdef")])
def test_background_classes_that_cannot_be_are_refused_by_the_command_line(names):
    with pytest.raises(UserError, match="background classes must be 1-5 different names"):
        CommonArgs(background_classes=names).resolve()


def test_background_classes_are_told_apart_in_annotations(monkeypatch):
    """From the command line to what is annotated; a suite writes them as a list."""
    monkeypatch.setattr(annotators, "make_captioner", lambda *_: FrameCaptioner())
    monkeypatch.setattr(annotators, "make_clip", lambda *_: HashingClip())
    args = CommonArgs(annotator="openai:http://localhost:1/v1#any", background_classes=("road", "grass"))
    made = make_annotator(args.annotator, background_classes=args.guidance["background_classes"])
    (annotation,) = made.annotate([np.full((8, 8, 3), 9, np.uint8)], [0])
    assert annotation.class_names[1:] == ("road", "grass")
    words = suites.command_line({"background_classes": ["green grass", "road"]})
    assert tyro.cli(CommonArgs, args=words).background_classes == ("green grass", "road")


def test_without_a_usable_answer_the_last_objects_are_looked_for():
    annotator = fake_annotator()
    black, light = np.zeros((12, 12, 3), np.uint8), random_frames(1)[0]
    unanswered, answered, kept, again = annotator.annotate([black, light, black, light], [1, 2, 3, 4])
    assert unanswered is None, "there are no objects yet"
    assert [a.frame_step for a in (answered, kept, again)] == [2, 3, 4]
    assert answered.objects == kept.objects == again.objects == describe(light).objects
    assert kept.caption == describe(light).objects[0].name
    assert answered.source == again.source == "mean" != kept.source
    expected = patch_probabilities(annotator.clip.patch_features([black])[0], kept.class_embeddings)
    np.testing.assert_array_equal(kept.patch_probabilities, expected, "they are looked for in the frame itself")
    assert annotator.statistics() == {"answers": 4, "unusable_answers": 2}


# ---- remembered ----


def test_cached_and_fresh_annotations_are_equal(tmp_path):
    frames = random_frames(6)
    fresh = fake_annotator().annotate(frames, range(6))
    writer, reader = (CachedAnnotator(fake_annotator(), tmp_path) for _ in range(2))
    assert isinstance(writer, Annotator)
    assert writer.annotate(frames, range(6)) == fresh
    order = [3, 0, 5, 3]
    again = reader.annotate(frames[order], [30, 0, 50, 33])
    assert again == [dataclasses.replace(fresh[i], frame_step=s) for i, s in zip(order, [30, 0, 50, 33], strict=True)]
    assert reader.annotator.captioner.batches == [], "everything was known"
    assert reader.statistics() == {"answers": 0, "unusable_answers": 0, "cache_hits": 4, "cache_misses": 0}


def test_only_new_frames_are_annotated_and_equal_ones_once(tmp_path):
    frames = random_frames(4)
    cached = CachedAnnotator(fake_annotator(), tmp_path)
    cached.annotate(frames[:2], [0, 1])
    batch = [frames[2], frames[0], frames[2], frames[3]]
    assert cached.annotate(batch, [7, 8, 9, 10]) == fake_annotator().annotate(batch, [7, 8, 9, 10])
    assert cached.annotator.captioner.batches == [2, 2]


def test_other_models_prompts_and_shapes_have_other_entries(tmp_path):
    frames = random_frames(1)
    CachedAnnotator(fake_annotator(), tmp_path).annotate(frames, [0])
    other = CachedAnnotator(fake_annotator("other"), tmp_path)
    assert other.annotate(frames, [0])[0].source == "other"
    same = CachedAnnotator(fake_annotator(), tmp_path)
    same.annotate(frames.reshape(1, 6, 24, 3), [0])
    assert same.annotator.captioner.batches == [1]


def test_what_leans_on_earlier_frames_is_not_remembered(tmp_path):
    black, light = np.zeros((12, 12, 3), np.uint8), random_frames(1)[0]
    cached = CachedAnnotator(fake_annotator(), tmp_path)
    first, second, third = cached.annotate([black, light, black], [1, 2, 3])
    assert (first, third) == (None, None)
    assert second.frame_step == 2
    assert [a.frame_step for a in cached.annotate([black], [4])] == [4]
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    with pytest.raises(UserError, match="cannot be cached"):
        CachedAnnotator(make_annotator("simulator"), tmp_path)


class Exploding:
    def __reduce__(self):
        return os._exit, (3,)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "pickle", "other arrays", "out of range"])
def test_damaged_entries_are_made_anew(tmp_path, damage):
    frames = random_frames(1)
    fresh = fake_annotator().annotate(frames, [0])
    CachedAnnotator(fake_annotator(), tmp_path).annotate(frames, [0])
    [path] = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    if damage in ("empty", "half", "text"):
        path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "text": b"hello"}[damage])
    else:
        with np.load(path) as archive:
            arrays = dict(archive)
        if damage == "pickle":
            arrays["relevance"] = np.array([Exploding()], object)
        arrays["relevance" if damage != "other arrays" else "surplus"] = arrays["relevance"]
        if damage == "other arrays":
            del arrays["texts"]
        if damage == "out of range":
            arrays["relevance"] = arrays["relevance"] + 7
        np.savez(path, **arrays)
    for calls in ([1], []):
        cached = CachedAnnotator(fake_annotator(), tmp_path)
        assert cached.annotate(frames, [0]) == fresh
        assert cached.annotator.captioner.batches == calls


def test_a_full_disk_is_no_reason_to_stop(tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"some")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", fail)
    frames = random_frames(2)
    cached = CachedAnnotator(fake_annotator(), tmp_path)
    assert cached.annotate(frames, [0, 1]) == fake_annotator().annotate(frames, [0, 1])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", ["compressed", "another source", "another grid", "another name"])
def test_entries_that_are_not_of_this_annotator_are_made_anew(tmp_path, damage):
    frames = random_frames(1)
    fresh = fake_annotator().annotate(frames, [0])
    CachedAnnotator(fake_annotator(), tmp_path).annotate(frames, [0])
    [path] = tmp_path.rglob("*.npz")
    with np.load(path) as archive:
        arrays = dict(archive)
    if damage == "compressed":
        np.savez_compressed(path, **arrays, bomb=np.zeros(1_000_000))
    else:
        texts = arrays["texts"].item()
        if damage == "another source":
            texts = texts.replace('"source": "mean"', '"source": "somebody"')
        if damage == "another name":
            texts = texts.replace('"floor"', '"<script>\\u001b"')
        if damage == "another grid":
            arrays["relevance"] = np.zeros((3, 3), np.float32)
            arrays["patch_probabilities"] = np.full((len(arrays["class_embeddings"]), 3, 3), 1, np.float32)
            arrays["patch_probabilities"] /= len(arrays["class_embeddings"])
        arrays["texts"] = np.array(texts)
        np.savez(path, **arrays)
    for calls in ([1], []):
        cached = CachedAnnotator(fake_annotator(), tmp_path)
        assert cached.annotate(frames, [0]) == fresh
        assert cached.annotator.captioner.batches == calls


def test_the_folder_keeps_its_size_and_the_oldest_go(tmp_path):
    CachedAnnotator(fake_annotator(), tmp_path).annotate(random_frames(1), [0])
    [path] = tmp_path.rglob("*.npz")
    size = path.stat().st_size
    os.utime(path, (0, 0))
    abandoned, under_way = path.with_suffix(".1.2.partial"), path.with_suffix(".3.4.partial")
    abandoned.touch()
    under_way.touch()
    os.utime(abandoned, (0, 0))
    cached = CachedAnnotator(fake_annotator(), tmp_path, max_bytes=20 * size)
    frames = random_frames(100, seed=1)
    for frame in frames:
        cached.annotate([frame], [0])
        kept = list(tmp_path.rglob("*.npz"))
        assert sum(file.stat().st_size for file in kept) <= 23 * size
    assert len(kept) >= 15
    assert not path.exists()
    assert (abandoned.exists(), under_way.exists()) == (False, True)
    assert cached.annotate(frames[-1:], [0]) == fake_annotator().annotate(frames[-1:], [0])
    assert cached.statistics()["cache_hits"] == 1


def test_what_is_wrong_with_many_files_is_said_once(tmp_path, caplog):
    frames = random_frames(5)
    CachedAnnotator(fake_annotator(), tmp_path).annotate(frames, range(5))
    for path in tmp_path.rglob("*.npz"):
        path.write_bytes(b"")
    CachedAnnotator(fake_annotator(), tmp_path).annotate(frames, range(5))
    assert caplog.text.count("is damaged and will be written anew") == 1


def _annotate_all(directory, start, queue):
    start.wait()
    cached = CachedAnnotator(fake_annotator(), directory)
    frames = random_frames(60)
    queue.put([cached.annotate([frame], [index])[0] for index, frame in enumerate(frames)])


def test_two_processes_write_one_cache(tmp_path):
    context = multiprocessing.get_context("fork")  # spawned ones would load PyTorch and more first
    start, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_annotate_all, args=(tmp_path, start, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    fresh = [fake_annotator().annotate([frame], [index])[0] for index, frame in enumerate(random_frames(60))]
    assert all(queue.get(timeout=300) == fresh for _ in processes)
    for process in processes:
        process.join()
    reader = CachedAnnotator(fake_annotator(), tmp_path)
    assert reader.annotate(random_frames(60), range(60)) == fresh
    assert reader.statistics()["cache_hits"] == 60
    assert not list(tmp_path.rglob("*.partial"))


def _stop_in_the_middle(directory, reached):
    save = np.savez

    def half(file, **arrays):
        save(file, **arrays)
        file.flush()
        os.ftruncate(file.fileno(), file.tell() // 2)
        reached.set()
        time.sleep(60)

    frames = random_frames(2)
    cached = CachedAnnotator(fake_annotator(), directory)
    cached.annotate(frames[:1], [0])
    np.savez = half
    cached.annotate(frames[1:], [1])


def test_a_writer_that_is_killed_leaves_a_good_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    reached = context.Event()
    process = context.Process(target=_stop_in_the_middle, args=(tmp_path, reached))
    process.start()
    assert reached.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(tmp_path.rglob("*.partial")), "it was writing"
    cached = CachedAnnotator(fake_annotator(), tmp_path)
    frames = random_frames(2)
    assert cached.annotate(frames, [0, 1]) == fake_annotator().annotate(frames, [0, 1])
    assert cached.statistics()["cache_hits"] == 1
    assert CachedAnnotator(fake_annotator(), tmp_path).annotate(frames, [0, 1])[1].frame_step == 1


# ---- in a thread of its own ----


@pytest.fixture
def quick(monkeypatch):
    """Waits between attempts that are too short to notice."""
    monkeypatch.setattr(queues, "Backoff", lambda: Backoff(first=0.001, longest=0.01))


def requests(frames, first: int = 0) -> list[Request]:
    return [Request(("env", first + index), frame, 100 + first + index) for index, frame in enumerate(frames)]


def collect(annotator: AsyncQueue, count: int) -> dict:
    finished = {}

    def enough() -> bool:
        finished.update(annotator.finished())
        return len(finished) >= count

    poll_until(enough)
    return finished


def test_answers_are_known_by_their_key():
    class Sparing:
        source, embedding_dim, grid = "sparing", 16, 2

        def annotate(self, frames, frame_steps):  # without an answer to every second frame
            annotations = fake_annotator().annotate(frames, frame_steps)
            return [None if step % 2 else note for note, step in zip(annotations, frame_steps, strict=True)]

    frames = random_frames(5)
    for annotator in (AsyncQueue(Sparing(), max_batch=8), SyncQueue(Sparing())):
        annotator.request(requests(frames))
        finished = collect(annotator, 3)
        assert set(finished) == {("env", 0), ("env", 2), ("env", 4)}
        for (_, index), annotation in finished.items():
            assert annotation == fake_annotator().annotate([frames[index]], [100 + index])[0]
        annotator.close()


def test_an_annotator_that_leaves_frames_out_is_told_so():
    class Short:
        source, embedding_dim, grid = "short", 16, 2

        def annotate(self, frames, frame_steps):
            return fake_annotator().annotate(frames[1:], frame_steps[1:])

    with pytest.raises(UserError, match="'short' returned 1 annotations of 2 frames; expected one per frame"):
        SyncQueue(Short()).request(requests(random_frames(2)))


def test_the_oldest_requests_are_dropped():
    inner = fake_annotator()
    inner.captioner.gate.clear()
    annotator = AsyncQueue(inner, max_pending=4)
    frames = random_frames(11)
    annotator.request(requests(frames[:1]))
    assert inner.captioner.entered.wait(30)
    annotator.request(requests(frames[1:], first=1))
    assert annotator.statistics()["pending"] == 4
    inner.captioner.gate.set()
    finished = collect(annotator, 5)
    assert set(finished) == {("env", index) for index in (0, 7, 8, 9, 10)}
    assert inner.captioner.batches == [1, 4], "what waits is answered in one batch"
    statistics = annotator.statistics()
    assert (statistics["drops"], statistics["annotations"], statistics["pending"]) == (6, 5, 0)
    assert statistics["age_seconds"] > 0
    assert statistics["annotations_per_second"] > 0
    annotator.close()


@pytest.mark.parametrize("error", [unavailable(), RuntimeError("out of memory"), KeyError("a bug")])
def test_failures_are_counted_and_tried_again_and_nothing_is_lost(quick, error, caplog):
    inner = fake_annotator()
    inner.captioner.errors = [error] * 4
    annotator = AsyncQueue(inner, max_batch=2)
    frames = random_frames(9)
    annotator.request(requests(frames))
    finished = collect(annotator, 9)
    assert finished == {
        request.key: fake_annotator().annotate([request.frame], [request.frame_step])[0] for request in requests(frames)
    }
    assert annotator.statistics()["failures"] == 4
    assert str(error) in caplog.text
    annotator.close()


def test_a_dead_annotator_costs_neither_time_nor_memory(quick):
    inner = fake_annotator()
    inner.captioner.gate.clear()
    annotator = AsyncQueue(inner, max_pending=3)
    for index in range(200):
        annotator.request(requests(random_frames(1), first=index))
        assert annotator.finished() == {}
    assert annotator.statistics()["pending"] <= 3
    annotator.close(timeout=0.01)
    inner.captioner.gate.set()
    poll_until(lambda: "annotator" not in {thread.name for thread in threading.enumerate()})


def test_a_program_ends_well_while_annotations_are_under_way():
    program = """
import numpy as np, torch
from wrappers.backends.queues import AsyncQueue, Request

class Busy:
    def annotate(self, frames, frame_steps):
        for _ in range(200):
            torch.ones(300, 300) @ torch.ones(300, 300)
        return [None] * len(frames)

busy = AsyncQueue(Busy(), max_batch=1)
busy.request([Request(index, np.zeros((4, 4, 3), np.uint8), 0) for index in range(50)])
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=300).returncode == 0


def test_frames_belong_to_the_caller():
    inner = fake_annotator()
    inner.captioner.gate.clear()
    annotator = AsyncQueue(inner)
    [frame] = random_frames(1)
    kept = frame.copy()
    annotator.request([Request(0, frame, 0)])
    frame[:] = 0
    inner.captioner.gate.set()
    assert collect(annotator, 1)[0] == fake_annotator().annotate([kept], [0])[0]
    annotator.close()


def test_synchronously_an_outage_is_left_alone_for_a_while(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(queues.time, "monotonic", lambda: now[0])
    inner = fake_annotator()
    annotator = SyncQueue(inner)
    frames = random_frames(2)
    inner.captioner.errors = [unavailable()] * 2
    for _ in range(5):
        annotator.request(requests(frames))
        assert annotator.finished() == {}
    assert len(inner.captioner.errors) == 1, "asked once"
    assert annotator.statistics() | {"failures": 1, "drops": 10} == annotator.statistics()
    now[0] += 0.5
    annotator.request(requests(frames))
    assert not inner.captioner.errors
    now[0] += 1
    annotator.request(requests(frames))
    assert len(annotator.finished()) == 2
    inner.captioner.errors = [RuntimeError("a bug")]
    with pytest.raises(RuntimeError, match="a bug"):
        annotator.request(requests(frames))


def test_waits_grow_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(queues.time, "monotonic", lambda: 100.0)
    backoff = Backoff(first=1, longest=10)
    assert backoff.remaining == 0
    for longest in (1, 2, 4, 8, 10, 10):
        backoff.failed()
        assert longest / 2 <= backoff.remaining <= longest
    backoff.succeeded()
    assert backoff.remaining == 0
    backoff.failed()
    assert backoff.remaining <= 1


# ---- in an environment ----


def toy(annotator, **options) -> CaptionObservation:
    env = PixelObservation(gym.make("Toy-v0"), size=40)
    return CaptionObservation(env, **{"annotator": annotator, "every": 3, **options})


class Loop:
    """A training loop that keeps every frame and what was handed over about it, and checks the contract."""

    def __init__(self, env: CaptionObservation):
        self.env, self.frames, self.starts = env, [], []
        self.annotations = {}
        self.ended = True
        env.action_space.seed(0)

    def step(self) -> dict:
        if self.ended:
            self.starts.append(len(self.frames))
            observation, info = self.env.reset(seed=len(self.starts))
            self.ended = False
        else:
            observation, _, terminated, truncated, info = self.env.step(self.env.action_space.sample())
            self.ended = terminated or truncated
        self.frames.append(observation["rgb"])
        now = len(self.frames) - 1
        for annotation, age in zip(info["annotations"], info["annotation_ages"], strict=True):
            assert now - age not in self.annotations, "handed over once"
            self.annotations[now - age] = annotation
        known = [frame for frame in self.annotations if frame >= self.starts[-1]]
        assert observation["caption_age"] == (now - max(known) if known else -1)
        assert info["caption"] == (self.annotations[max(known)].caption if known else "")
        assert self.env.observation_space.contains(observation)
        return info

    @property
    def due(self) -> set[int]:
        """The frames to annotate."""
        ends = [*self.starts[1:], len(self.frames)]
        return {frame for start, end in zip(self.starts, ends, strict=True) for frame in range(start, end, 3)}

    def check_annotations(self) -> None:
        for frame, annotation in self.annotations.items():
            start = max(start for start in self.starts if start <= frame)
            assert annotation == fake_annotator().annotate([self.frames[frame]], [frame - start])[0]


def test_late_annotations_reach_the_frames_that_they_are_about():
    annotator = fake_annotator()
    env = toy(annotator, mode="async", text=True)
    loop = Loop(env)
    annotator.captioner.gate.clear()
    for _ in range(100):  # would hang if a step waited for the captioner
        loop.step()
    assert len(loop.starts) > 3
    assert not loop.annotations
    annotator.captioner.gate.set()
    asked = loop.due
    while not asked <= set(loop.annotations):
        loop.step()
        poll_until(lambda: not env.statistics()["pending"])
    loop.check_annotations()
    statistics = env.statistics()
    assert statistics["drops"] == 0
    assert statistics["annotated_share"] == len(loop.annotations) / len(loop.frames)
    assert statistics["age_frames"] > 0
    env.close()


def test_training_goes_on_while_the_annotator_is_down(quick):
    for mode in ("async", "sync"):
        annotator = fake_annotator()
        env = toy(annotator, mode=mode)
        loop = Loop(env)
        while not loop.annotations:
            loop.step()
        annotator.captioner.errors = [unavailable()] * 5
        known = len(loop.annotations)
        for _ in range(30):
            loop.step()
        while len(loop.annotations) <= known or annotator.captioner.errors:
            loop.step()
            time.sleep(0.002)
        loop.check_annotations()
        assert env.statistics()["failures"] == 5
        env.close()


def test_annotators_are_shared_by_the_environments_made_with_them(tmp_path):
    annotator = CachedAnnotator(fake_annotator(), tmp_path)
    env = toy(annotator)
    assert env.annotator is annotator
    assert env.spec.make().annotator is annotator


def test_the_annotator_may_see_more_than_the_agent():
    sizes = []

    class Spy:
        source, embedding_dim, grid = "spy", 16, 2

        def annotate(self, frames, frame_steps):
            sizes.extend(frame.shape for frame in frames)
            return fake_annotator().annotate(frames, frame_steps)

    make = gym.make("shimmy:dm_control/cartpole-swingup-v0")
    env = CaptionObservation(PixelObservation(make, size=48), annotator=Spy(), frame_size=96)
    observation, info = env.reset(seed=0)
    assert observation["rgb"].shape == (48, 48, 3)
    assert len(info["annotations"]) == 1
    env.close()
    toy(Spy(), frame_size=96).reset(seed=0)
    assert sizes == [(96, 96, 3), (40, 40, 3)]


# ---- by name ----


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tests.tiny_models import save_clip, save_vlm

    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip")
    save_vlm(folder / "captioner")
    return folder


def test_embedded_models_are_loaded_from_the_package(trained, monkeypatch):
    monkeypatch.setattr(captioners, "MODELS", trained[0])
    env = toy("embedded", text=True)
    assert env.mode == "sync"
    observation, info = env.reset(seed=0)
    assert observation["caption"] == info["caption"]
    assert info["caption"] in ("a box; it is white", "a box; it is orange")
    assert info["annotations"][0].source == "embedded"
    assert observation["relevance"].shape == 2 * (make_annotator("embedded").grid,)
    rebuilt = env.spec.make()
    assert rebuilt.reset(seed=0)[1]["annotations"] == info["annotations"]


@pytest.mark.parametrize(("threshold", "warned"), [(np.inf, False), (0.0, True)])
def test_unfamiliar_scenes_are_said_to_be_so(trained, tmp_path, monkeypatch, caplog, threshold, warned):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    fitted = fit_familiarity(tmp_path, [toy_frames("box", 40, 0)], [toy_frames("box", 40, 1)])
    Familiarity(fitted.means, fitted.whitening, min(threshold, 1e9)).save(tmp_path / "clip")
    monkeypatch.setattr(captioners, "MODELS", tmp_path)
    annotator = make_annotator("embedded", device="cpu")
    for seed in range(3):
        found = annotator.annotate(random_frames(16, seed), range(16))
    assert all((annotation.caption == UNFAMILIAR) == warned for annotation in found)
    assert all(bool(annotation.objects) != warned for annotation in found)
    assert ("does not know this kind of scene" in caplog.text) == warned
    assert caplog.text.count("name a real model") == warned, "once"
    assert annotator.statistics()["unfamiliar_share"] == warned


def test_missing_embedded_models_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(captioners, "MODELS", tmp_path)
    with pytest.raises(UserError, match="semore-bench train-guidance"):
        make_annotator("embedded")


def test_annotators_by_name(models, tmp_path):
    assert make_annotator("none") is None
    assert make_annotator("simulator").source == "simulator"
    clip = str(models / "clip")
    annotator = make_annotator(f"transformers:{models / 'captioner'}", "balance", clip=clip, cache_directory=tmp_path)
    fresh = make_annotator(f"transformers:{models / 'captioner'}", "balance", clip=clip)
    assert isinstance(annotator, CachedAnnotator)
    frames = random_frames(3)
    expected = fresh.annotate(frames, range(3))
    assert annotator.annotate(frames, range(3)) == expected
    assert annotator.annotate(frames, range(3)) == expected
    assert annotator.statistics()["cache_hits"] == 3
    assert annotator.identity != make_annotator(f"transformers:{models / 'captioner'}", "swing", clip=clip).identity
    env = CaptionObservation(PixelObservation(gym.make("Toy-v0")), annotator)
    assert env.mode == "sync"
    server = make_annotator("openai:http://127.0.0.1:9/v1#m", clip=clip)
    assert server.source == "openai:http://127.0.0.1:9/v1#m"
    assert server.grid == 4
    assert annotation_shape(server.source, clip) == (8, 4)


@pytest.mark.parametrize("grid", [3, 8, 14])
def test_annotations_are_as_fine_as_asked_for(models, tmp_path, grid):
    clip, spec = str(models / "clip"), f"transformers:{models / 'captioner'}"
    annotator = make_annotator(spec, clip=clip, cache_directory=tmp_path, grid=grid)
    assert annotation_shape(spec, clip, grid) == (annotator.embedding_dim, annotator.grid) == (8, grid)
    [annotation] = annotator.annotate(random_frames(1), [0])
    assert annotation.patch_probabilities.shape == (5, grid, grid)
    assert annotator.identity != make_annotator(spec, clip=clip).identity
    assert make_annotator("simulator", grid=grid).grid == grid


def test_usual_grids():
    assert make_annotator("simulator").grid == 16
    assert annotation_shape("transformers:any") == (512, 28), "ViT-B-16 at 448 pixels"
    assert annotation_shape("transformers:any", grid=14) == (512, 14)
    assert annotation_shape("transformers:any", "ViT-B-32:openai") == (512, 7), "at its usual size, and not loaded"
    embedded = make_annotator("embedded", device="cpu")
    assert annotation_shape("embedded") == (embedded.embedding_dim, embedded.grid)


@pytest.mark.parametrize("spec", ["simulator", "embedded", "openai:http://127.0.0.1:9/v1#m"])
def test_impossible_grids_are_refused(spec):
    with pytest.raises(UserError, match="--annotation-grid must be at least 1, got 0"):
        make_annotator(spec, grid=0)
    with pytest.raises(UserError, match="--annotation-grid must be at least 1, got -3"):
        annotation_shape(spec, grid=-3)


def test_a_tower_with_a_grid_of_its_own_refuses_others(tmp_path):
    from tests.tiny_models import save_clip

    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    clip, spec = str(save_clip(tmp_path, resnet)), "openai:http://127.0.0.1:9/v1#m"
    assert annotation_shape(spec, clip) == annotation_shape(spec, clip, 2) == (8, 2)
    for ask in (annotation_shape, lambda *of: make_annotator(of[0], clip=of[1], grid=of[2])):
        with pytest.raises(UserError, match="sees 2 x 2 patches and no other number"):
            ask(spec, clip, 16)


@pytest.mark.parametrize("spec", ["embeded", "embedded:", "embeddedx", "openai", "hf:SmolVLM", ""])
def test_unknown_annotators_are_explained(spec):
    with pytest.raises(UserError, match=r"expected none, simulator, embedded, embedded:<folder>, transformers:"):
        make_annotator(spec)
