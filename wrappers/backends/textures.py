"""Pictures with the statistics of natural ones, made from random numbers: families for training, and others for tests.

Natural images have spectra of about 1/f, edges where things hide one another, and channels that go up and down
together. All families have these; how their shapes come about differs, and no family is in both splits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np

from wrappers.errors import UserError

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


def pictures(count: int, size: int, seed: int = 0, split: Split = "train") -> np.ndarray:
    """Different pictures, uint8 (count, size, size, 3), for agents to paste or lay over what they see.

    The same `seed` gives the same pictures; the families of `split` "train" are not those that tests draw from. Raises
    `UserError` for a split that there is not.
    """
    return np.stack([draw(np.random.default_rng([seed, _number(split), index]), size, split) for index in range(count)])


def draw(random: np.random.Generator, size: int, split: Split) -> np.ndarray:
    """One picture of any of a split's families, uint8 (size, size, 3)."""
    families = FAMILIES[_number(split)]
    picture = families[random.integers(len(families))](random, size)
    return np.clip(picture, 0.0, 255.0).astype(np.uint8)


def middle_square(picture: np.ndarray, size: int) -> np.ndarray:
    """The middle of a picture of any proportions, uint8 (size, size, 3)."""
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return cv2.resize(picture[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)


def _number(split: str) -> int:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of pictures: expected 'train' or 'test'")
    return SPLITS.index(split)


# ---- what families share ----


def _noise(random: np.random.Generator, size: int, slope: float, channels: int = 1) -> np.ndarray:
    """Random fields whose amplitude falls with 1/f**slope: float32 (size, size, channels), mean 0, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(random.standard_normal((channels, size, size), np.float32))
    field = np.fft.irfft2(white / frequency**slope, s=(size, size))
    field /= field.std(axis=(1, 2), keepdims=True)
    return np.moveaxis(field, 0, -1).astype(np.float32)


def _colours(random: np.random.Generator, count: int) -> np.ndarray:
    """Colours that go together, float32 (count, 3): spread in lightness around one hue, less in what hue it is."""
    middle = random.uniform(70.0, 180.0) + random.normal(0.0, 35.0, 3)
    lightness, hue = random.normal(0.0, 55.0, (count, 1)), random.normal(0.0, 28.0, (count, 3))
    return (middle + lightness + hue).astype(np.float32)


def _blend(random: np.random.Generator, fields: np.ndarray) -> np.ndarray:
    """Three fields (H, W, 3) as colours: the first is lightness, the others shift the hue."""
    lightness, *hues = np.moveaxis(fields, -1, 0)[..., None]
    axes = random.normal(0.0, 20.0, (2, 3)).astype(np.float32)
    middle = random.uniform(70.0, 180.0) + random.normal(0.0, 35.0, 3).astype(np.float32)
    return middle + random.uniform(35.0, 60.0) * lightness + hues[0] * axes[0] + hues[1] * axes[1]


def _ramp(random: np.random.Generator, height: np.ndarray, count: int = 5) -> np.ndarray:
    """A field (H, W) as colours between `count` ones, from its lowest to its highest."""
    place = (height - height.min()) / max(float(np.ptp(height)), 1e-6) * (count - 1)
    colours = _colours(random, count)
    return np.stack([np.interp(place, np.arange(count), colours[:, channel]) for channel in range(3)], -1)


def _grain(random: np.random.Generator, size: int, strength: float = 14.0) -> np.ndarray:
    return strength * _noise(random, size, 0.8)


def _overlapping(
    random: np.random.Generator, size: int, shape: Callable[[np.ndarray, float, float, float, list[float]], None]
) -> np.ndarray:
    """The dead leaves model: shapes that hide one another, few of them large and many small."""
    canvas = np.empty((size, size, 3), np.float32)
    count = 200
    colours = _colours(random, count)
    canvas[:] = colours[0]
    radii = 0.02 * size * np.minimum(random.pareto(1.0, count) + 1.0, 12.0)
    for radius, colour in zip(radii, colours, strict=True):
        x, y = random.uniform(0.0, size, 2)
        shape(canvas, x, y, radius, colour.tolist())
    return canvas + _grain(random, size)


# ---- training and augmentation ----


def _clouds(random: np.random.Generator, size: int) -> np.ndarray:
    return _blend(random, _noise(random, size, random.uniform(1.0, 1.8), 3))


def _discs(random: np.random.Generator, size: int) -> np.ndarray:
    def disc(canvas: np.ndarray, x: float, y: float, radius: float, colour: list[float]) -> None:
        cv2.circle(canvas, (int(x), int(y)), max(1, int(radius)), colour, -1)

    return _overlapping(random, size, disc)


def _cells(random: np.random.Generator, size: int) -> np.ndarray:
    """Voronoi cells, darker towards their borders."""
    count = int(random.integers(15, 50))
    centres = random.uniform(0.0, 1.0, (count, 2))
    places = (np.arange(size) + 0.5) / size
    warp = 0.02 * _noise(random, size, 1.5, 2)
    grid = np.stack(np.meshgrid(places, places), -1) + warp
    distance = np.full((size, size, 2), np.inf, np.float32)  # to the nearest centre and to the next
    nearest = np.zeros((size, size), np.int64)
    for index, centre in enumerate(centres):
        away = np.hypot(*np.moveaxis(grid - centre, -1, 0)).astype(np.float32)
        closer = away < distance[..., 0]
        distance[..., 1] = np.where(closer, distance[..., 0], np.minimum(distance[..., 1], away))
        distance[..., 0] = np.where(closer, away, distance[..., 0])
        nearest[closer] = index
    edge = np.clip((distance[..., 1] - distance[..., 0]) * 25.0, 0.0, 1.0)[..., None]
    return _colours(random, count)[nearest] * (0.55 + 0.45 * edge) + _grain(random, size)


def _waves(random: np.random.Generator, size: int) -> np.ndarray:
    """Gratings of all directions, the finer the fainter."""
    x, y = np.meshgrid(*[np.arange(size, dtype=np.float32) / size] * 2)
    fields = np.zeros((size, size, 3), np.float32)
    for frequency in np.geomspace(1.0, size / 6.0, 14):
        angle, phase = random.uniform(0.0, 2.0 * np.pi, 2)
        wave = np.sin(2.0 * np.pi * frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        fields += wave[..., None] * random.normal(0.0, 1.0, 3).astype(np.float32) / np.sqrt(frequency)
    return _blend(random, fields / fields.std(axis=(0, 1)))


# ---- tests ----


def _marble(random: np.random.Generator, size: int) -> np.ndarray:
    """Stripes bent by turbulence."""
    x, y = np.meshgrid(*[np.arange(size, dtype=np.float32) / size] * 2)
    angle = random.uniform(0.0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    bent = 2.0 * np.pi * random.uniform(2.0, 6.0) * along + random.uniform(1.5, 3.0) * _noise(random, size, 2.2)[..., 0]
    return _ramp(random, np.sin(bent)) + _grain(random, size, 8.0)


def _shards(random: np.random.Generator, size: int) -> np.ndarray:
    """Polygons that hide one another."""

    def shard(canvas: np.ndarray, x: float, y: float, radius: float, colour: list[float]) -> None:
        angles = np.sort(random.uniform(0.0, 2.0 * np.pi, int(random.integers(3, 6))))
        corners = np.stack([x + 1.3 * radius * np.cos(angles), y + 1.3 * radius * np.sin(angles)], -1)
        cv2.fillPoly(canvas, [corners.astype(np.int32)], colour)

    return _overlapping(random, size, shard)


def _threads(random: np.random.Generator, size: int) -> np.ndarray:
    """Ridges: branches, veins or cracks, of several widths."""
    ridges = np.zeros((size, size), np.float32)
    for weight, slope in ((1.0, 1.9), (0.6, 1.5), (0.35, 1.2)):
        ridges += weight * np.exp(-4.0 * np.abs(_noise(random, size, slope)[..., 0]))
    return _ramp(random, ridges) + _grain(random, size, 10.0)


def _patches(random: np.random.Generator, size: int) -> np.ndarray:
    """Camouflage: a few colours in blots with sharp borders."""
    height = _noise(random, size, random.uniform(1.3, 1.8))[..., 0]
    count = int(random.integers(4, 8))
    levels = np.searchsorted(np.quantile(height, np.linspace(0.0, 1.0, count + 1)[1:-1]), height)
    return _colours(random, count)[levels] + _grain(random, size)


FAMILIES: tuple[tuple[Callable[[np.random.Generator, int], np.ndarray], ...], ...] = (
    (_clouds, _discs, _cells, _waves),
    (_marble, _shards, _threads, _patches),
)
"""of training, then of tests"""
