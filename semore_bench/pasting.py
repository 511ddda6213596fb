"""Annotated frames as they might look elsewhere: named things on other backgrounds and in other colours."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semore_bench.overlays import find_pictures

PASTED, RECOLOURED, OVERLAID = 0.6, 0.7, 0.5
"""shares of the frames that each change is made in; of a recoloured frame's things and background, the same share"""
OPAQUE = 0.6
"""of an overlaid picture, at most"""


class Pasting:
    """Changes in annotated frames what must not matter to a grounder; what is named stays where it is.

    Each thing, and all else, takes a contrast and a colour of its own; things are cut out by their class maps and
    pasted onto a picture (as in "Cut, Paste and Learn", Dwibedi et al. 2017, arXiv 1708.01642); another picture is laid
    over, half transparent. Each of the three happens in a share of the frames, independently; draws from PyTorch's
    generator.

    Args:
        folder, size, limit, seed: of the pictures, as `Overlay` has them.

    Raises:
        UserError: as `Overlay`.
    """

    def __init__(self, folder: str | None, size: int, limit: int, seed: int):
        found = find_pictures(folder, size + size // 8, limit, seed)
        self._pictures = torch.from_numpy(found).permute(0, 3, 1, 2)

    def __call__(self, rgb: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3), and shares of things and of all else, float32 (B, K + 1, G, G) -> uint8 (B, H, W, 3)."""
        frames = torch.from_numpy(rgb).permute(0, 3, 1, 2).float()
        masks = _masks(torch.from_numpy(shares), frames.shape[2:])
        background = masks[:, -1:]
        frames = torch.where(_some(frames, RECOLOURED), _recoloured(frames, masks), frames)
        pasted = frames + background * (self._draw(frames) - frames)
        frames = torch.where(_some(frames, PASTED), pasted, frames)
        opacity = OPAQUE * torch.rand(len(frames), 1, 1, 1) * _some(frames, OVERLAID)
        frames = frames + opacity * (self._draw(frames) - frames)
        return frames.clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()

    def _draw(self, frames: Tensor) -> Tensor:
        """A picture for each frame, of which a random part is seen."""
        height, width = frames.shape[2:]
        y, x = (
            int(torch.randint(whole - part + 1, ()))
            for whole, part in zip(self._pictures.shape[2:], (height, width), strict=True)
        )
        which = torch.randint(len(self._pictures), (len(frames),))
        return self._pictures[which, :, y : y + height, x : x + width].float()


def _some(frames: Tensor, share: float) -> Tensor:
    """For which frames: bool (B, 1, 1, 1)."""
    return torch.rand(len(frames), 1, 1, 1) < share


def _masks(shares: Tensor, size: torch.Size) -> Tensor:
    """How much of each pixel is whose, (B, K + 1, H, W): a patch that is a third a thing's is taken for its own, since
    thin things fill no patch."""
    things = F.interpolate(shares[:, :-1], size, mode="bilinear", align_corners=False).mul(3).clamp(max=1)
    masks = torch.cat([things, (1 - things.sum(1, keepdim=True)).clamp(min=0)], 1)
    return masks / masks.sum(1, keepdim=True)


def _recoloured(frames: Tensor, masks: Tensor) -> Tensor:
    """Contrasts and colours that are each thing's own."""
    size = (len(frames), masks.shape[1], 3)
    gain, offset = torch.empty(size).uniform_(0.3, 1.7), torch.empty(size).uniform_(-90, 90)
    spared = torch.rand(*size[:2], 1) < 1 - RECOLOURED
    gain, offset = torch.where(spared, 1, gain), torch.where(spared, 0, offset)
    gain, offset = (torch.einsum("bkhw,bkc->bchw", masks, values) for values in (gain, offset))
    return (frames - 128) * gain + 128 + offset
