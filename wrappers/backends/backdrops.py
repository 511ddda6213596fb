"""Moving pictures to stand behind a scene: textures that drift and bend, or videos and pictures of the user's."""

from __future__ import annotations

import functools
from pathlib import Path

import cv2
import numpy as np

from wrappers.backends.textures import SPLITS, Split, draw, middle_square
from wrappers.errors import UserError

PICTURE_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"))
VIDEO_ENDINGS = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v"))
SIZE = 128
"""pixels a side in which pictures are kept"""
MAX_FRAMES = 250
"""frames of a video that are read"""


class Backdrop:
    """A picture that moves: `at` says how it looks at a time, in steps.

    A single frame drifts by up to 2.5% of its width a step at `speed` 1, turns, and bends like cloth; a video plays to
    and fro, a frame a step. Both are cut to the proportions asked for, never squeezed.
    """

    def __init__(self, frames: np.ndarray, random: np.random.Generator, speed: float) -> None:
        self._frames = frames
        self._start = int(random.integers(len(frames)))
        self._direction = random.choice((-1, 1))
        heading, pace = random.uniform(0.0, 2.0 * np.pi), speed * random.uniform(0.3, 1.0) * 0.025
        self._velocity = pace * np.array((np.cos(heading), np.sin(heading)))
        self._zoom = random.uniform(0.6, 1.0)  # the share of the picture that is seen at a time
        self._turn = speed * random.uniform(-0.01, 0.01), random.uniform(-np.pi, np.pi)  # radians a step, at first
        self._bend = random.uniform(0.0, 0.06, 2), random.uniform(0.0, 2.0 * np.pi, 2)
        self._bend_speed = speed * random.uniform(0.02, 0.08, 2)
        self._offset = random.uniform(0.0, 1.0, 2)

    def at(self, time: float, height: int, width: int) -> np.ndarray:
        """The picture at a time in steps, uint8 (height, width, 3)."""
        if len(self._frames) > 1:
            return self._video(int(time), height, width)
        sides = np.array((width, height), np.float32) / max(height, width)
        x, y = np.meshgrid(*[(np.arange(n, dtype=np.float32) + 0.5) / n - 0.5 for n in (width, height)])
        angle = self._turn[0] * time + self._turn[1]
        cosine, sine = np.cos(angle) * self._zoom, np.sin(angle) * self._zoom
        x, y = sides[0] * x, sides[1] * y
        u, v = cosine * x - sine * y, sine * x + cosine * y
        shift = self._offset + self._velocity * time
        phase = self._bend[1] + self._bend_speed * time
        u, v = u + self._bend[0][0] * np.sin(7.0 * v + phase[0]), v + self._bend[0][1] * np.sin(7.0 * u + phase[1])
        # Periodic by hand: OpenCV's own mirroring takes the longer the farther it has to go.
        columns, rows = (_mirrored(field + start) * (SIZE - 1) for field, start in zip((u, v), shift, strict=True))
        return cv2.remap(
            self._frames[0], columns.astype(np.float32), rows.astype(np.float32), interpolation=cv2.INTER_LINEAR
        )

    def _video(self, time: int, height: int, width: int) -> np.ndarray:
        count = len(self._frames)
        place = (self._start + self._direction * time) % (2 * count - 2)
        frame = self._frames[min(place, 2 * count - 2 - place)]
        tall, wide = (min(SIZE, round(SIZE * side / max(height, width))) for side in (height, width))
        top, left = (SIZE - tall) // 2, (SIZE - wide) // 2
        shrinks = max(height, width) < SIZE
        return cv2.resize(
            frame[top : top + tall, left : left + wide],
            (width, height),
            interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
        )


def _mirrored(place: np.ndarray) -> np.ndarray:
    """Any number to 0-1, to and fro."""
    return 1.0 - np.abs(place % 2.0 - 1.0)


class Textures:
    """The project's own pictures: see `wrappers.backends.textures`."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def frames(self, number: int, seed: int) -> np.ndarray:
        """Picture `number` of those of a seed, uint8 (1, SIZE, SIZE, 3)."""
        random = np.random.default_rng([seed, SPLITS.index(self._split), number])
        return draw(random, SIZE, self._split)[None]


class Footage:
    """The user's videos and pictures, of a folder and all that lie in it.

    A video is a file, or a folder of pictures that are named by numbers alone (as DAVIS has them); all else are single
    pictures (as Places has them). Tests get what lies in a folder `test` or `val`, where there is one beside `train`,
    and else the last quarter in the order of names, at least one. Raises `UserError` where there is too little.
    """

    def __init__(self, folder: str, split: Split) -> None:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"there is no folder {folder} to take videos or pictures for backgrounds from")
        held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
        if held_out is not None and (root / "train").is_dir():
            clips = _clips(root / "train" if split == "train" else held_out)
            enough = len(clips) > 0
        else:
            clips = _clips(root)
            enough, kept = len(clips) > 1, len(clips) - max(1, len(clips) // 4)
            clips = clips[:kept] if split == "train" else clips[kept:]
        if not enough:
            raise UserError(
                f"{folder} has too few videos or pictures: backgrounds need at least two, one of them held out for "
                f"tests, in files that end in {', '.join(sorted(PICTURE_ENDINGS | VIDEO_ENDINGS))}"
            )
        self._clips = clips

    def frames(self, number: int, seed: int) -> np.ndarray:
        """Clip `number` in an order that follows from a seed, uint8 (N, SIZE, SIZE, 3)."""
        order = np.random.default_rng(seed).permutation(len(self._clips))
        return _read(self._clips[order[number % len(order)]])


def _clips(root: Path) -> list[tuple[Path, ...]]:
    """Files of videos, files of pictures, and frames of videos, in the order of their names."""
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS | VIDEO_ENDINGS)
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    clips: list[tuple[Path, ...]] = []
    for inside in folders.values():
        is_video = len(inside) > 1 and all(path.stem.isdecimal() for path in inside)
        clips += [tuple(inside[:MAX_FRAMES])] if is_video else [(path,) for path in inside]
    return clips


@functools.lru_cache(maxsize=16)
def _read(files: tuple[Path, ...]) -> np.ndarray:
    frames = _read_video(files[0]) if files[0].suffix.lower() in VIDEO_ENDINGS else [_open(path) for path in files]
    return np.stack(frames)


def _open(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise UserError(f"{path} is no picture that OpenCV can read: take it out of the folder")
    return middle_square(picture, SIZE)


def _read_video(path: Path) -> list[np.ndarray]:
    video = cv2.VideoCapture(str(path))
    frames: list[np.ndarray] = []
    while len(frames) < MAX_FRAMES and (answer := video.read())[0]:
        frames.append(cv2.cvtColor(middle_square(answer[1], SIZE), cv2.COLOR_BGR2RGB))
    video.release()
    if not frames:
        raise UserError(f"{path} is no video that OpenCV can read: take it out of the folder")
    return frames
