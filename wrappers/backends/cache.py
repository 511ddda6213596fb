"""Annotations that are kept in a folder, for other runs and for those that run at the same time."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from wrappers.backends.annotation import (
    Annotation,
    Annotator,
    Complaints,
    SceneObject,
    clean_text,
    statistics_of,
)
from wrappers.errors import UserError

MAX_BYTES = 10_000_000_000
_ABANDONED = 3600.0  # seconds after which nobody is still writing a file


class CachedAnnotator:
    """Remembers annotations in a folder, for later runs and for those that run at the same time.

    The key is a hash of `annotator.identity` (models, prompt, settings) and the frame's content. Each annotation is
    a NumPy archive of its own that appears at once and complete, so that crashes and concurrent writers do no harm;
    one that cannot be read is made anew. Archives are read without unpickling, and checked as `Annotation` does.

    Args:
        annotator: what annotates the frames that are new; its `identity` must change whenever its answers may.
        directory: where to keep the annotations; created if it is missing.
        max_bytes: how much is kept, about; beyond that the oldest go.

    Raises:
        UserError: if what the annotator says depends on more than the frame.
    """

    def __init__(self, annotator: Annotator, directory: str | Path, max_bytes: int = MAX_BYTES):
        if not hasattr(annotator, "identity"):
            raise UserError(f"annotator {annotator.source!r} depends on more than the frame: it cannot be cached")
        self.annotator, self.directory, self.max_bytes = annotator, Path(directory), max_bytes
        self.source, self.identity = annotator.source, annotator.identity
        self.embedding_dim, self.grid = annotator.embedding_dim, annotator.grid
        self._hits = self._misses = 0
        self._written = max_bytes  # since room was made; what others left counts from the start
        self._complaints = Complaints()

    def annotate(self, frames: Sequence[np.ndarray], frame_steps: Sequence[int]) -> list[Annotation | None]:
        """Annotates frames; those that were seen before are looked up, equal ones are annotated once."""
        paths = [self._path(frame) for frame in frames]
        known = {path: self._load(path) for path in dict.fromkeys(paths)}
        new = {path: index for index, path in enumerate(paths) if known[path] is None}
        self._hits += len(paths) - len(new)
        self._misses += len(new)
        if new:
            indices = list(new.values())
            annotations = self.annotator.annotate(
                [frames[index] for index in indices], [frame_steps[index] for index in indices]
            )
            for path, annotation in zip(new, annotations, strict=True):
                known[path] = annotation
                # An annotation of another source leans on earlier frames (see VisionLanguageAnnotator).
                if annotation is not None and annotation.source == self.source:
                    self._save(path, annotation)
        return [
            None if annotation is None else replace(annotation, frame_step=frame_step)
            for annotation, frame_step in zip(map(known.get, paths), frame_steps, strict=True)
        ]

    def statistics(self) -> dict[str, float]:
        """Counts since construction: `cache_hits`, `cache_misses`, and those of the annotator."""
        return statistics_of(self.annotator) | {"cache_hits": self._hits, "cache_misses": self._misses}

    def _save(self, path: Path, annotation: Annotation) -> None:
        try:
            self._written += _save_annotation(path, annotation)
            if self._written > self.max_bytes / 10:
                self._written = 0
                _make_room(self.directory, self.max_bytes)
        except OSError as error:  # a full disk is no reason to stop
            self._complaints.warn("disk", "cannot remember an annotation: %s", error)

    def _load(self, path: Path) -> Annotation | None:
        try:
            annotation = _load_annotation(path)
            shape = annotation.caption_embedding.shape + annotation.relevance.shape
            if (annotation.source, *shape) != (self.source, self.embedding_dim, self.grid, self.grid):
                raise ValueError(f"it is of {annotation.source} and {shape}")
            return annotation
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with the file, its frame can be annotated again
            self._complaints.warn("damage", "%s is damaged and will be written anew (%s)", path, error)
            return None

    def _path(self, frame: np.ndarray) -> Path:
        key = hashlib.blake2b(f"{self.identity} {frame.shape} ".encode(), digest_size=20)
        key.update(np.ascontiguousarray(frame).data)
        name = key.hexdigest()
        return self.directory / name[:2] / f"{name}.npz"


_ARRAYS = ("caption_embedding", "class_embeddings", "patch_probabilities", "relevance")


def _save_annotation(path: Path, annotation: Annotation) -> int:
    """Writes it, and returns how many bytes it takes."""
    texts = {
        "caption": annotation.caption,
        "objects": [asdict(thing) for thing in annotation.objects],
        "class_names": annotation.class_names,
        "source": annotation.source,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, texts=np.array(json.dumps(texts)), **{name: getattr(annotation, name) for name in _ARRAYS})
            size = file.tell()
        partial.replace(path)  # atomic: other processes see nothing or everything
    finally:
        partial.unlink(missing_ok=True)
    return size


def _load_annotation(path: Path) -> Annotation:
    with np.load(path, allow_pickle=False) as archive:
        if sum(entry.file_size for entry in archive.zip.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed, which no annotation is")
        texts = json.loads(archive["texts"].item())
        arrays = {name: archive[name] for name in _ARRAYS}
    objects = tuple(SceneObject(**thing) for thing in texts.pop("objects"))
    names = tuple(texts.pop("class_names"))
    if list(names) != [clean_text(name) for name in names]:
        raise ValueError("it has names that no annotation has")
    return Annotation(objects=objects, class_names=names, frame_step=0, **texts, **arrays)


def _make_room(directory: Path, max_bytes: int) -> None:
    """Deletes what crashed writers left, and the oldest annotations until there is a tenth to spare."""
    files = []
    for path in directory.glob("??/*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process makes room, too
            continue
        if path.suffix == ".npz":
            files.append((status.st_mtime, status.st_size, path))
        elif path.suffix == ".partial" and status.st_mtime < time.time() - _ABANDONED:
            path.unlink(missing_ok=True)
    surplus = sum(size for _, size, _ in files) - max_bytes
    if surplus <= 0:
        return
    surplus += max_bytes // 10
    for _, size, path in sorted(files):
        if surplus <= 0:
            return
        path.unlink(missing_ok=True)
        surplus -= size
