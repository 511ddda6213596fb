"""How the embedded models learn: three losses on one batch, seeded step by step, continued after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from semore_bench.guidance.frames import MASK_SIZE, SIZE, Frames
from semore_bench.guidance.models import MEAN, PATCH, STD, Guidance, Sizes, answer_pieces, make_tokenizer
from wrappers.backends.clip import TEMPLATES
from wrappers.backends.dense import GRID
from wrappers.backends.embedded import has_bfloat16

DENSE_SCALE = 50.0  # that of wrappers.backends.annotation.patch_probabilities
EXTRA_CAPTIONS = 128  # that no image of the batch shows
DENSE_WEIGHT = 0.1  # more from the start, and its steep gradients leave nothing for what concerns the whole image
WARM_UP = 0.05  # share of the updates
CHECKPOINT_EVERY = 200  # updates


@dataclass(frozen=True)
class Settings:
    """What the trained weights depend on, besides the frames."""

    updates: int
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


class Corpus:
    """Frames of all tasks as arrays, captions and classes as numbers.

    Attributes:
        groups: for each kind of scene the frames' numbers.
        captions: all different captions.
        class_names: all different names of classes.
        identity: differs between corpora of other scenes.
        shares: uint8 (N, 16, 16, K), 64 times the share of each class of a frame's group in each patch.
    """

    def __init__(self, parts: Sequence[Frames]):
        self.images = np.concatenate([part.images for part in parts])
        self.classes = np.concatenate([part.classes for part in parts])
        most = max(len(part.class_names) for part in parts)
        self.shares = np.concatenate([share_counts(part.classes, most) for part in parts])
        self.captions = list(dict.fromkeys(caption for part in parts for caption in part.captions))
        self.class_names = list(dict.fromkeys(name for part in parts for name in part.class_names))
        number = {caption: index for index, caption in enumerate(self.captions)}
        self.caption_of = np.array([number[caption] for part in parts for caption in part.captions])
        kinds: dict[tuple, list[np.ndarray]] = {(part.domain, part.class_names): [] for part in parts}
        start = 0
        for part in parts:
            kinds[part.domain, part.class_names].append(np.arange(start, start + len(part.images)))
            start += len(part.images)
        self.groups = [np.concatenate(numbers) for numbers in kinds.values()]
        # What tells corpora apart: a checkpoint of one that holds another domain would have seen what is left out here.
        words = "\n".join([*self.captions, *self.class_names])
        self.identity = f"{start} {hashlib.blake2b(words.encode()).hexdigest()}"
        self.group_of = np.empty(start, np.int64)
        # The numbers of each group's classes, -1 where a group has fewer than another.
        self.group_classes = np.full((len(kinds), most), -1)
        for group, (_, names) in enumerate(kinds):
            self.group_of[self.groups[group]] = group
            self.group_classes[group, : len(names)] = [self.class_names.index(name) for name in names]
        pieces = {(part.captions[i], part.objects) for part in parts for i in range(len(part.captions))}
        self.pieces = {key: answer_pieces(*key) for key in pieces}
        self.tokenizer = make_tokenizer([piece for answer in self.pieces.values() for piece in answer])
        length = max(map(len, self.pieces.values()))
        vocabulary = self.tokenizer.get_vocab()
        self.answers = np.full((start, length), self.tokenizer.pad_token_id)
        row = 0
        for part in parts:
            for caption in part.captions:
                answer = [vocabulary[piece] for piece in self.pieces[caption, part.objects]]
                self.answers[row, : len(answer)] = answer
                row += 1


def train(corpus: Corpus, settings: Settings, checkpoint: Path, sizes: Sizes) -> tuple[Guidance, list[float]]:
    """Trains both models; a run that was killed goes on from its checkpoint as if nothing had happened.

    Returns:
        The models and the loss of each update.
    """
    torch.manual_seed(settings.seed)
    model = Guidance(corpus.tokenizer, sizes)
    texts = _Texts(corpus, model)
    identity = f"{settings} {sizes} {corpus.identity}"
    losses = optimise(
        model, lambda step: losses_of(model, corpus, texts, step, settings), settings, checkpoint, identity
    )
    return model.eval(), losses


def optimise(
    model: nn.Module, losses_of: Callable[[int], dict[str, Tensor]], settings: Settings, checkpoint: Path, identity: str
) -> list[float]:
    """Trains a network with AdamW; goes on from the checkpoint if that is of the same `identity`.

    Args:
        model: the network.
        losses_of: the losses of an update, by name; nothing but its number and the weights decides them.
        settings: of the optimizer.
        checkpoint: file for what a run that is killed goes on from.
        identity: what else the weights depend on.

    Returns:
        The loss of each update.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in learned if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    losses: list[float] = []
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["identity"] == identity:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            losses = saved["losses"]
    bar = tqdm(total=settings.updates, initial=len(losses), desc=checkpoint.stem, unit="update")
    while (step := len(losses)) < settings.updates:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step / settings.updates)
        with plain_attention(), torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            parts = losses_of(step)
        loss = sum(parts.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss became {losses[-1]} in update {step}: {parts}")
        bar.update()
        if step % 20 == 0:
            bar.set_postfix({name: f"{value.item():.2f}" for name, value in parts.items()})
        if len(losses) % CHECKPOINT_EVERY == 0:
            partial = checkpoint.with_suffix(".partial")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({"identity": identity, "losses": losses, **state}, partial)
            partial.replace(checkpoint)
    bar.close()
    return losses


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention written out, in all models inside: over 64 patches an update takes half of what it takes with the
    default, which is made for long sequences, and six sevenths of that of `SDPBackend.MATH`, which looks for rows that
    are masked out whole. There must be none.
    """
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, without dropout and grouped queries."""
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-1, -2)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1, dtype=value.dtype) @ value


def schedule(progress: float) -> float:
    """The learning rate's factor: a linear warm-up, then half a cosine down to 0."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 + 0.5 * float(np.cos(np.pi * (progress - WARM_UP) / (1 - WARM_UP)))


class _Texts:
    """Token numbers of captions and of classes in every template."""

    def __init__(self, corpus: Corpus, model: Guidance):
        tokenizer = open_clip.SimpleTokenizer(context_length=model.clip.context_length)
        self.captions = tokenizer(corpus.captions)
        self.classes = torch.stack([tokenizer([t.format(name) for name in corpus.class_names]) for t in TEMPLATES])


def used_tokens(corpus: Corpus, model: Guidance) -> Tensor:
    """The numbers of CLIP's text tokens that occur in the corpus."""
    texts = _Texts(corpus, model)
    return torch.cat([texts.captions.flatten(), texts.classes.flatten()]).unique()


def losses_of(model: Guidance, corpus: Corpus, texts: _Texts, step: int, settings: Settings) -> dict[str, Tensor]:
    """The three losses on the batch of an update, which is decided by the seed and its number."""
    random = np.random.default_rng([settings.seed, step])
    groups = np.arange(settings.batch_size) % len(corpus.groups)  # every task, in equal shares
    chosen = np.array([random.choice(corpus.groups[group]) for group in groups])
    captions, labels = np.unique(corpus.caption_of[chosen], return_inverse=True)
    known = len(corpus.captions)
    extra = np.setdiff1d(random.choice(known, min(EXTRA_CAPTIONS, known), replace=False), captions)
    template = random.integers(len(TEMPLATES), size=len(corpus.class_names))
    classes = texts.classes[template, np.arange(len(template))]
    embeddings = model.clip.encode_text(
        torch.cat([texts.captions[np.concatenate([captions, extra])], classes]), normalize=True
    )
    caption_embeddings, class_embeddings = embeddings.split([len(captions) + len(extra), len(classes)])
    features = model.see(normalise(augment(corpus, chosen, random)))
    group_classes = torch.from_numpy(corpus.group_classes[corpus.group_of[chosen]])
    shares = patch_shares(corpus, chosen, SIZE // PATCH)
    answers = torch.from_numpy(corpus.answers[chosen])
    logits = model.answer_logits(features.tokens, answers)
    scale = model.clip.logit_scale.exp().clamp(max=100)
    # What is rare is learned first, and made as probable as it is at last.
    progress = step / settings.updates
    dense = dense_loss(features.patches, class_embeddings, group_classes, shares, balance=0.5 * (1 - progress))
    return {
        "contrast": contrastive_loss(features.images, caption_embeddings, torch.from_numpy(labels), scale),
        "dense": DENSE_WEIGHT * (1 + 2 * progress) * dense,
        "caption": F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=model.tokenizer.pad_token_id),
    }


def contrastive_loss(images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE between images (n, d) and different texts (m, d); equal captions are one text.

    Args:
        images: unit rows.
        texts: unit rows; those that no label names are negatives.
        labels: (n,) which text each image has.
        scale: the inverse temperature.
    """
    logits = scale * images @ texts.T
    from_images = F.cross_entropy(logits, labels)
    # A text's positives are all images that have it, in equal shares.
    owned = F.one_hot(labels, len(texts)).float()
    counts = owned.sum(0)
    log_shares = F.log_softmax(logits, dim=0)
    from_texts = -((owned * log_shares).sum(0) / counts.clamp(min=1)).sum() / (counts > 0).sum()
    return (from_images + from_texts) / 2


def dense_loss(patches: Tensor, classes: Tensor, group_classes: Tensor, shares: Tensor, balance: float = 0.0) -> Tensor:
    """Cross entropy of each patch's classes.

    Args:
        patches: unit vectors (n, G, G, d).
        classes: unit rows (C, d).
        group_classes: (n, K), which rows are an image's classes, -1 for none.
        shares: (n, G, G, K), the share of each class in each patch.
        balance: with 0 the least loss is at probabilities that equal the shares; with more, rarer classes weigh
            more, by this power of how rare they are.
    """
    texts = classes[group_classes.clamp(min=0)]
    logits = DENSE_SCALE * torch.einsum("nijd,nkd->nijk", patches, texts)
    logits = logits.masked_fill((group_classes < 0)[:, None, None], -1e4)
    frequency = shares.mean((1, 2), keepdim=True)
    weights = shares / (frequency + 0.02) ** balance
    return -(weights * F.log_softmax(logits, dim=-1)).sum() / weights.sum()


def share_counts(classes: np.ndarray, number: int) -> np.ndarray:
    """How many of a patch's 64 places show each class: from uint8 (n, 128, 128) to uint8 (n, 16, 16, number)."""
    patches = classes.reshape(-1, GRID, MASK_SIZE // GRID, GRID, MASK_SIZE // GRID)
    return np.stack([(patches == index).sum((2, 4), dtype=np.uint8) for index in range(number)], axis=-1)


def patch_shares(corpus: Corpus, chosen: np.ndarray, grid: int) -> Tensor:
    """The share of each class in each patch of some frames: (n, grid, grid, K)."""
    shares = torch.from_numpy(corpus.shares[chosen]).float() / (MASK_SIZE // GRID) ** 2
    return shares.view(len(chosen), grid, GRID // grid, grid, GRID // grid, -1).mean((2, 4))


def normalise(images: Tensor) -> Tensor:
    """From (n, 3, H, W) in 0-1 to what the tower sees."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def augment(corpus: Corpus, chosen: np.ndarray, random: np.random.Generator) -> Tensor:
    """Images (n, 3, 64, 64) in 0-1 with other brightness, contrast, tint and noise, some with another background."""
    generator = torch.Generator().manual_seed(int(random.integers(2**62)))
    n = len(chosen)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    images = torch.from_numpy(corpus.images[chosen]).permute(0, 3, 1, 2) / 255
    names = corpus.group_classes[corpus.group_of[chosen]]
    for name, probability in (("sky", 0.4), ("floor", 0.2)):
        is_name = names == corpus.class_names.index(name)
        changed = np.flatnonzero(is_name.any(1) & (random.random(n) < probability))
        if not len(changed):
            continue
        shown = corpus.classes[chosen[changed]] == is_name[changed].argmax(1)[:, None, None]
        covered = F.avg_pool2d(torch.from_numpy(shown)[:, None].float(), MASK_SIZE // SIZE)
        coarse = F.interpolate(uniform(0, 1, len(changed), 3, 5, 5), (SIZE, SIZE), mode="bicubic").clamp(0, 1)
        fine = uniform(-0.3, 0.3, len(changed), 3, SIZE, SIZE) * uniform(0, 1, len(changed), 1, 1, 1)
        images[changed] = torch.lerp(images[changed], coarse + fine, covered)
    images = (images - 0.5) * uniform(0.7, 1.3, n, 1, 1, 1) + 0.5 + uniform(-0.12, 0.12, n, 1, 1, 1)
    images = images * uniform(0.85, 1.15, n, 3, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.03, n, 1, 1, 1)
    return (images + noise).clamp(0, 1)
