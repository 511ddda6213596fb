"""How the dense head learns which of a scene's named things each patch shows: last, while CLIP stands still."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semore_bench.guidance.frames import MASK_SIZE
from semore_bench.guidance.models import add_to_clip_config
from semore_bench.guidance.training import DENSE_SCALE, Corpus, Settings, augment, normalise, optimise, patch_shares
from wrappers.backends.clip import ClipGrounding
from wrappers.backends.dense import GRID, DenseHead

WIDTH = 16  # channels at half of the resolution
BALANCE = 0.5  # the power of how rare a class is by which it weighs more
RAREST = 1e-3  # share of the image: classes that take less weigh no more
IOU_WEIGHT, IOU_WARM_UP = 2.0, 0.25  # its weight, and the share of the updates until it has it
VISIBLE = 0.05  # patches: a thing of which the images of a batch show less is left out of the IoU


def train_dense_head(
    corpus: Corpus, clip: ClipGrounding, settings: Settings, checkpoint: Path, width: int = WIDTH
) -> tuple[DenseHead, list[float]]:
    """Trains a dense head for a CLIP whose embeddings of the classes' names stay as they are.

    Returns:
        The head and the loss of each update.
    """
    torch.manual_seed(settings.seed)
    head = DenseHead(clip.dim, width).to(memory_format=torch.channels_last)
    classes = torch.from_numpy(clip.encode_classes(corpus.class_names))
    frequency = class_frequencies(corpus)
    digest = hashlib.blake2b(classes.numpy().tobytes()).hexdigest()
    identity = f"dense {settings} {width} {len(corpus.images)} {digest}"

    def loss_of(step: int) -> dict[str, Tensor]:
        random = np.random.default_rng([settings.seed, step])
        groups = np.arange(settings.batch_size) % len(corpus.groups)  # every task, in equal shares
        chosen = np.array([random.choice(corpus.groups[group]) for group in groups])
        features = F.normalize(head(normalise(augment(corpus, chosen, random))), dim=-1)
        losses = class_losses(
            features,
            classes,
            torch.from_numpy(corpus.group_classes[groups]),
            patch_shares(corpus, chosen, GRID),
            frequency[groups],
            torch.from_numpy(groups),
        )
        losses["1 - IoU"] *= IOU_WEIGHT * min(step / settings.updates / IOU_WARM_UP, 1.0)
        return losses

    losses = optimise(head, loss_of, settings, checkpoint, identity)
    return head.eval(), losses


def class_frequencies(corpus: Corpus) -> Tensor:
    """The share of the image that each class of each group takes on average: (groups, K)."""
    means = [corpus.shares[group].mean((0, 1, 2)) for group in corpus.groups]
    return torch.from_numpy(np.stack(means)).float() / (MASK_SIZE // GRID) ** 2


def class_losses(
    features: Tensor, classes: Tensor, group_classes: Tensor, shares: Tensor, frequency: Tensor, groups: Tensor
) -> dict[str, Tensor]:
    """How far the classes' maps are from the shares: weighted cross entropy, and what the IoU of each thing lacks.

    Cross entropy with equal weights makes everything background; the IoU alone never finds what is small.

    Args:
        features: unit vectors (n, G, G, d).
        classes: unit rows (C, d).
        group_classes: (n, K), which rows are an image's classes, -1 for none.
        shares: (n, G, G, K), the share of each class in each patch.
        frequency: (n, K), the share of the image that a class takes on average.
        groups: (n,), images of equal ones show the same things.
    """
    logits = DENSE_SCALE * torch.einsum("nijd,nkd->nijk", features, classes[group_classes.clamp(min=0)])
    logits = logits.masked_fill((group_classes < 0)[:, None, None], -1e4)
    weights = shares / (frequency[:, None, None] + RAREST) ** BALANCE
    cross_entropy = -(weights * F.log_softmax(logits, dim=-1)).sum() / weights.sum()
    found = logits.softmax(-1)
    per_image = torch.stack([torch.minimum(found, shares), torch.maximum(found, shares), shares]).sum((2, 3))
    both, either, there = torch.zeros(3, int(groups.max()) + 1, shares.shape[-1]).index_add(1, groups, per_image)
    seen = there > VISIBLE
    return {"cross entropy": cross_entropy, "1 - IoU": (1 - both[seen] / either[seen]).mean()}


def save_dense_head(folder: Path, head: DenseHead) -> None:
    """Writes the head beside the CLIP in `folder`, and says so in its configuration."""
    head.save(folder)
    add_to_clip_config(folder, dense_head={"grid": GRID, "width": head.width})
