"""Pictures that agents lay over frames: an augmentation with what no environment shows."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from wrappers.backends import textures
from wrappers.errors import UserError

MADE_UP = 500
"""largest number of textures: each takes some milliseconds, at every start of a run"""


class Overlay:
    """Lays a picture half transparent over the frames of each sample, the same one over all frames of a stack.

    Args:
        folder: pictures are read from there, subfolders included; None: made-up textures, of other families than those
            of distractions at test time, and at most `MADE_UP`.
        size: height and width of the frames, in pixels.
        limit: largest number of pictures.
        seed: which pictures are read, or made up.
        device: where the frames are.

    Raises:
        UserError: there is no such folder, or no picture in it; or `limit` is less than 1.
    """

    def __init__(self, folder: str | None, size: int, limit: int, seed: int, device: torch.device):
        self._size, self._margin = size, size // 8
        self._halves = torch.from_numpy(find_pictures(folder, size + self._margin, limit, seed) // 2).to(device)

    def __call__(self, rgb: Tensor) -> Tensor:
        """Each with its own picture, of which a random part that is a ninth smaller is seen: uint8 (B, 3k, H, W)."""
        y, x = torch.randint(self._margin + 1, (2,)).tolist()
        which = torch.randint(len(self._halves), (len(rgb),), device=rgb.device)
        halves = self._halves[which, y : y + self._size, x : x + self._size].permute(0, 3, 1, 2)
        return (rgb.unflatten(1, (-1, 3)) // 2 + halves[:, None]).flatten(1, 2)


def find_pictures(folder: str | None, size: int, limit: int, seed: int) -> np.ndarray:
    """Pictures for augmentation, uint8 (N, size, size, 3); arguments and errors are those of `Overlay`."""
    if limit < 1:
        raise UserError(f"--overlay-limit must be at least 1, got {limit}")
    if folder is None:
        return textures.pictures(min(limit, MADE_UP), size, seed, "train")
    return load_pictures(folder, size, limit, seed)


def load_pictures(folder: str, size: int, limit: int, seed: int) -> np.ndarray:
    """The pictures below a folder, their middle squares resized: uint8 (N, size, size, 3), N at most `limit`.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--overlay-images {folder} is no folder; name one that holds pictures (.jpg, .png, ...)")
    paths = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())
    np.random.default_rng(seed).shuffle(paths)
    read = (cv2.imread(path, cv2.IMREAD_COLOR_RGB) for path in paths if cv2.haveImageReader(path))
    usable = (picture for picture in read if picture is not None)  # None: damaged
    found = [textures.middle_square(picture, size) for picture in itertools.islice(usable, limit)]
    if not found:
        raise UserError(f"no picture can be read below --overlay-images {folder}; .jpg and .png files are welcome")
    return np.stack(found)
