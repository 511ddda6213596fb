"""What counts as a picture: where one is in an observation, and how it becomes uint8 RGB."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from gymnasium import spaces

from wrappers.errors import UserError

PREFERRED_NAMES = ("rgb", "image", "pixels")
OTHER_THINGS = ("depth", "mask", "segment", "semantic", "label", "flow")
"""in the name of what has the shape of a picture and shows something else"""
SMALLEST_SIDE = 32
"""pixels; what is smaller is more likely a board of symbols, as MiniGrid's (7, 7, 3) is"""

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Picture:
    """Where in an observation a picture is (`path`, empty for the observation itself), and what is white in floats."""

    path: Path
    white: float = 1.0

    def rgb(self, observation: Any) -> np.ndarray:
        """The picture in `observation`, uint8 (H, W, 3); raises `UserError` where it is not what its space says."""
        for part in self.path:
            observation = observation[part]
        return to_rgb(observation, self.white, f"the observation{_named(self.path)}")


def find_picture(space: spaces.Space, key: str | None = None, asked: bool = False) -> tuple[Picture | None, str]:
    """Returns the picture in an observation `space` (None if there is none), and what comes near to being one.

    A picture is a Box (H, W), (H, W, C) or (C, H, W) of 1 or 3 channels, or (H, W, 4) with alpha; of integers from 0 to
    255, or floats from 0 to 1 or to 255. Unless it is `asked` for, it has at least `SMALLEST_SIDE` pixels a side and
    none of `OTHER_THINGS` in its name. Of several, the one named `rgb`, `image` or `pixels` is taken, then the one in
    colour. `key` names one, "camera/front" one inside another. Raises `UserError` if there still are several, if there
    is no such key, or what it names is no picture.
    """
    leaves = {_join(path): (path, leaf) for path, leaf in _leaves(space)}
    if key is not None:
        if key not in leaves:
            raise UserError(f"no observation {key!r}: expected one of {sorted(filter(None, leaves))}")
        path, leaf = leaves[key]
        if problem := _problem(leaf):
            raise UserError(f"observation {key!r} is no picture: {problem}")
        return Picture(path, _white(leaf)), ""

    found: dict[str, tuple[tuple[bool, int, bool], Picture]] = {}
    near = ""
    for name, (path, leaf) in leaves.items():
        problem, doubt = _problem(leaf), _doubt(name, leaf)
        if not problem and (asked or not doubt):
            last = name.rsplit("/", 1)[-1].lower()
            rank = PREFERRED_NAMES.index(last) if last in PREFERRED_NAMES else len(PREFERRED_NAMES)
            found[name] = (bool(doubt), rank, not _has_colour(leaf.shape)), Picture(path, _white(leaf))
        elif isinstance(leaf, spaces.Box) and len(leaf.shape) >= 2:
            near = near or f"{_describe(path, leaf)} is no picture: {problem or doubt}"
    if not found:
        return None, near
    best = min(rank for rank, _ in found.values())
    chosen = [name for name, (rank, _) in found.items() if rank == best]
    if len(chosen) > 1:
        raise UserError(f"the observation has several images, {chosen}: choose one with key=, or call it 'rgb'")
    return found[chosen[0]][1], near


def to_rgb(picture: Any, white: float = 1.0, source: str = "render()") -> np.ndarray:
    """A picture as find_picture describes it, as uint8 (H, W, 3); `source` says in errors where it comes from.

    `white` is the value of white in floats. Raises `UserError` for what is no picture.
    """
    array = np.asarray(picture)
    axis = _channel_axis(array.shape)
    if array.dtype.kind not in "uif" or isinstance(axis, str):
        got = f"{array.dtype} {array.shape}" if array.ndim else repr(picture)
        raise UserError(f"{source} gave {got}: expected a picture, uint8 or floats from 0 to 1, (H, W, 3)")
    if array.dtype != np.uint8:
        array = _to_bytes(array, white, source)
    if axis == 0:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 2 or array.shape[2] == 1:
        return cv2.cvtColor(np.ascontiguousarray(array), cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(array[..., :3])


def _to_bytes(array: np.ndarray, white: float, source: str) -> np.ndarray:
    white = 255.0 if array.dtype.kind in "ui" else white
    low, high = array.min(), array.max()
    if not (low >= 0.0 and high <= white):  # NaN too
        raise UserError(f"{source} gave a picture of {array.dtype} from {low} to {high}: expected 0 to {white:g}")
    return np.rint(array * (255.0 / white)).astype(np.uint8)


def _leaves(space: spaces.Space, path: Path = ()) -> Iterator[tuple[Path, spaces.Space]]:
    if isinstance(space, spaces.Dict):
        for key, subspace in space.items():
            yield from _leaves(subspace, (*path, key))
    elif isinstance(space, spaces.Tuple):
        for index, subspace in enumerate(space):
            yield from _leaves(subspace, (*path, index))
    else:
        yield path, space


def _problem(space: spaces.Space) -> str:
    """What keeps a space from being a picture's, and what to do; empty if nothing does."""
    if not isinstance(space, spaces.Box):
        return f"it is {type(space).__name__}, expected Box"
    if isinstance(axis := _channel_axis(space.shape), str):
        return axis
    kind, low, high = space.dtype.kind, space.low, space.high
    whites = (255.0,) if kind in "ui" else (1.0, 255.0) if kind == "f" else ()
    if (low == 0).all() and any((high == white).all() for white in whites):
        return ""
    return f"its values go from {low.min():g} to {high.max():g}, expected 0 to 255, or floats from 0 to 1"


def _white(space: spaces.Box) -> float:
    """White in floats: what was to be integers and comes as floats goes from 0 to 1."""
    return float(space.high.max()) if space.dtype.kind == "f" else 1.0


def _doubt(name: str, space: spaces.Space) -> str:
    """What makes it unlikely that a space is a picture's, and how to say that it is."""
    if any(thing in name.lower() for thing in OTHER_THINGS):
        return f"by its name it shows something else; if that is what you want, say key={name!r}"
    if isinstance(space, spaces.Box) and len(space.shape) in (2, 3):
        height, width = _sides(space.shape)
        if min(height, width) < SMALLEST_SIDE:
            return (
                f"with less than {SMALLEST_SIDE} pixels a side it may be a board of symbols; if it is a picture, "
                "say source='observation'"
            )
    return ""


def _channel_axis(shape: tuple[int, ...]) -> int | None | str:
    """Where the channels are: -1, 0, or None for a grey picture without; or what is wrong with the shape."""
    if len(shape) == 2:
        return None
    if len(shape) == 4:
        return "it has four axes, as a stack of frames has: stack them after PixelObservation"
    if len(shape) != 3:
        return f"it has {len(shape)} axes, expected (H, W, 3)"
    if shape[2] in (1, 3, 4):
        return -1
    if shape[0] in (1, 3):
        return 0
    # Four before the sides are stacked frames rather than RGB and alpha.
    return "expected (H, W, 3); if it is a stack of frames, stack them after PixelObservation"


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = shape[1:] if _channel_axis(shape) == 0 else shape[:2]
    return height, width


def _has_colour(shape: tuple[int, ...]) -> bool:
    axis = _channel_axis(shape)
    return isinstance(axis, int) and shape[axis] >= 3


def _join(path: Path) -> str:
    return "/".join(map(str, path))


def _named(path: Path) -> str:
    return f" {_join(path)!r}" if path else ""


def _describe(path: Path, space: spaces.Box) -> str:
    return f"observation{_named(path)} ({space.dtype} {space.shape})"
