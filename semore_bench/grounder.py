"""The grounder: a small U-Net that annotated frames train to find named things in every frame."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semore_bench.pasting import Pasting
from semore_bench.replay import Replay
from semore_bench.things import HAZE, THINGS, Vocabulary, quarters


class Grounder(nn.Module):
    """Class maps of single frames: uint8 (B, H, W, 3) -> logits (B, THINGS + 1, h, w) at half the resolution.

    The last class is the background. After Ronneberger et al. (2015, arXiv 1505.04597), with one skip.

    Args:
        width: channels at full resolution; twice as many below.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1), nn.SiLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.SiLU()
        )
        self.coarse = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 2, dilation=2), nn.SiLU(),
        )  # fmt: skip
        self.classify = nn.Sequential(
            nn.Conv2d(4 * width, 2 * width, 1), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.SiLU(),
            nn.Conv2d(2 * width, THINGS + 1, 1),
        )  # fmt: skip

    def forward(self, rgb: np.ndarray) -> Tensor:
        frames = torch.from_numpy(rgb).to(self.classify[-1].weight.device, non_blocking=True)
        fine = self.fine(frames.permute(0, 3, 1, 2).float().div_(127.5).sub_(1))
        coarse = F.interpolate(self.coarse(fine), fine.shape[2:])
        return self.classify(torch.cat([fine, coarse], 1))

    @torch.no_grad()
    def maps(self, rgb: np.ndarray, vocabulary: Vocabulary) -> Tensor:
        """Probabilities of the things in uint8 (B, H, W, 3) frames: (B, THINGS, h, w), 0 where there is no name."""
        maps = self(rgb).softmax(1)[:, :-1]
        named = torch.arange(THINGS, device=maps.device) < len(vocabulary)
        return torch.where((maps > HAZE) & named[:, None, None], maps, 0)

    def fit(
        self,
        replay: Replay,
        vocabulary: Vocabulary,
        updates: int,
        batch_size: int,
        rate: float,
        pasting: Pasting | None = None,
    ) -> Tensor:
        """A round of AdamW updates on annotated frames, with a learning rate that falls from `rate` to 0.

        `pasting` changes the frames in what must not matter.

        Returns:
            The mean loss of the last 50 updates.
        """
        optimizer = torch.optim.AdamW(self.parameters(), weight_decay=1e-4)
        places, device = vocabulary.places(replay.named()[0], replay.names), self.classify[-1].weight.device
        share = vocabulary.targets(replay.sample_annotated(256), places)[0].mean((0, 2, 3))
        losses = []
        for number in range(updates):
            # What is small is learned first, and made as probable as it is at last: masses without bias.
            weight = np.where(share > 0, np.maximum(share, 1e-4) ** (0.5 * (number / updates - 1)), 0)
            weight = torch.from_numpy((weight / (weight * share).sum()).astype(np.float32)).to(device)
            optimizer.param_groups[0]["lr"] = rate * min(1, (number + 1) / 30) * (1 - number / updates)
            batch = replay.sample_annotated(batch_size)
            target, named = vocabulary.targets(batch, places)
            rgb, target = quarters(batch.rgb, target, share)
            rgb = rgb if pasting is None else pasting(rgb, target)
            target, named = (torch.from_numpy(array).to(device) for array in (target, named))
            loss = grounding_loss(self(rgb), target, named, weight)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses[-50:]).mean()


def grounding_loss(logits: Tensor, target: Tensor, named: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy of shares (B, K + 1, G, G), the last one of the background, averaged over patches.

    The logits (B, K + 1, h, w) become shares by averaging their probabilities, so that coarse teachers give shares and
    not edges. What was not `named` (B, K) in a frame may be there all the same: it counts as background, whichever of
    both the grounder says. `weight` (K + 1,): of each class.
    """
    shares = F.adaptive_avg_pool2d(logits.softmax(1), target.shape[-1])
    things = shares[:, :-1]
    background = shares[:, -1:] + (things * ~named[:, :, None, None]).sum(1, keepdim=True)
    entropy = target * (torch.cat([things, background], 1) + 1e-6).log()
    return -(weight[:, None, None] * entropy).sum(1).mean()
