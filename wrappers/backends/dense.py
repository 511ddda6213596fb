"""The embedded CLIP's dense head: a small U-Net whose features of patches lie where CLIP embeds the names of things."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GRID = 16
FILE = "dense_head.safetensors"


class DenseHead(nn.Module):
    """Features of 16 x 16 patches of images of 64 x 64 pixels, with a whole image's context in each.

    Ronneberger et al. (2015, arXiv 1505.04597), from half to a sixteenth of the resolution and back to a quarter.

    Args:
        dim: length of a feature.
        width: channels at half of the resolution; each halving doubles them, up to four times as many.
        fused: batch norms are part of the convolutions' weights, as `save` leaves them.
    """

    def __init__(self, dim: int, width: int, fused: bool = False):
        super().__init__()
        self.width = width

        def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=fused),
                nn.Identity() if fused else nn.BatchNorm2d(outputs),
            )

        self.stem = nn.Sequential(nn.PixelUnshuffle(2), conv(12, width), nn.ReLU(), conv(width, width), nn.ReLU())
        self.quarter = nn.Sequential(conv(width, 2 * width, 2), nn.ReLU(), _Residual(2 * width, conv))
        self.eighth = nn.Sequential(conv(2 * width, 4 * width, 2), nn.ReLU(), _Residual(4 * width, conv))
        self.sixteenth = nn.Sequential(conv(4 * width, 4 * width, 2), nn.ReLU(), _Residual(4 * width, conv))
        self.whole = nn.Linear(4 * width, 4 * width)
        self.up_eighth, self.up_quarter = nn.Conv2d(4 * width, 4 * width, 1), nn.Conv2d(4 * width, 2 * width, 1)
        self.back_eighth = nn.Sequential(conv(4 * width, 4 * width), nn.ReLU())
        self.back_quarter = _Residual(2 * width, conv)
        self.project = nn.Conv2d(2 * width, dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        """From normalised images (n, 3, 64, 64) to features (n, 16, 16, dim), not normalised."""
        quarter = self.quarter(self.stem(images.contiguous(memory_format=torch.channels_last)))
        eighth = self.eighth(quarter)
        coarse = self.sixteenth(eighth)
        coarse = coarse + self.whole(coarse.mean((2, 3)))[:, :, None, None]
        eighth = self.back_eighth(eighth + _doubled(self.up_eighth(coarse)))
        quarter = self.back_quarter(quarter + _doubled(self.up_quarter(eighth)))
        return self.project(quarter).permute(0, 2, 3, 1)

    def save(self, folder: Path) -> None:
        """Writes `folder`/dense_head.safetensors in half precision, batch norms being folded into convolutions."""
        state = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
                fused = nn.utils.fuse_conv_bn_eval(module[0].eval(), module[1].eval())
                state |= {f"{name}.0.weight": fused.weight, f"{name}.0.bias": fused.bias}
                for key in module[1].state_dict():
                    del state[f"{name}.1.{key}"]
        save_file({name: value.half().contiguous() for name, value in state.items()}, folder / FILE)

    @classmethod
    def load(cls, folder: Path, dim: int, width: int) -> DenseHead:
        """Reads what `save` wrote."""
        head = cls(dim, width, fused=True).to(memory_format=torch.channels_last)
        head.load_state_dict({name: value.float() for name, value in load_file(folder / FILE).items()})
        return head.eval().requires_grad_(False)


class _Residual(nn.Module):
    def __init__(self, width: int, conv):
        super().__init__()
        self.first, self.second = conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


def _doubled(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2.0)
