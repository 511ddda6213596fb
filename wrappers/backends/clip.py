"""Text-image alignment by any model of open_clip: text embeddings, and which text each image patch looks like."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from wrappers.backends.annotation import fingerprint, patch_probabilities
from wrappers.backends.clip_files import load_clip
from wrappers.errors import UserError

Mode = Literal["clearclip", "maskclip"]

TEMPLATES = (
    "a {}.",
    "a photo of a {}.",
    "a rendering of a {}.",
    "a simulation with a {}.",
    "there is a {} in the scene.",
)
_MAX_REMEMBERED = 4096  # texts whose embeddings are kept


class Look(NamedTuple):
    """What is seen in n images: unit vectors (n, d) and (n, G, G, d), and patch tokens (n, P, width)."""

    images: np.ndarray
    patches: np.ndarray
    tokens: Tensor


class ClipGrounding:
    """Embeds texts, and tells which of several texts each patch of an image looks like; a `TextEncoder`.

    Args:
        model: a name that open_clip knows, "hf-hub:organisation/name", or a folder with `open_clip_config.json` and
            safetensors weights.
        pretrained: the weights' tag in open_clip, or a file; not used with a folder or "hf-hub:".
        mode: dense features of vision transformers: "clearclip" lets patches attend to patches with similar queries,
            softmax(q q^T) v in the last block (Lan et al. 2024, arXiv 2407.12442); "maskclip" keeps v alone (Zhou et
            al. 2022, arXiv 2112.01071). Convolutional towers apply their head at every location. Where a folder has a
            `DenseHead`, as the embedded one has, its features are used instead.
        device: a torch device; by default the GPU where there is one.
        templates: sentences with {} around a class name, whose embeddings are averaged.
        grid: patches per side; by default as many as the model sees at its usual size. Plain vision transformers alone
            see another number, in larger or smaller images, with their position embeddings resampled.
        dtype: what the towers calculate in; embeddings and features are float32 all the same.

    Attributes:
        dim: length of the embeddings.
        grid: patches per side.
        identity: changes whenever embeddings or features may.

    Raises:
        UserError: if there is no such model, its weights cannot be had, or its tower has no features of patches, or not
            on such a grid.

    Example:
        >>> import open_clip, json, pathlib, tempfile
        >>> from safetensors.torch import save_file
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
        >>> text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        >>> config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
        >>> _ = (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        >>> save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
        >>> clip = ClipGrounding(folder)
        >>> clip.patch_probabilities([np.zeros((84, 84, 3), np.uint8)], ["cart", "pole", "floor"]).shape
        (1, 3, 4, 4)
    """

    def __init__(
        self,
        model: str | Path = "ViT-B-16",
        pretrained: str | None = "laion2b_s34b_b88k",
        mode: Mode = "clearclip",
        device: str | None = None,
        templates: Sequence[str] = TEMPLATES,
        dtype: torch.dtype = torch.float32,
        grid: int | None = None,
    ):
        if mode not in get_args(Mode):
            raise UserError(f"unknown mode {mode!r} of dense CLIP features: expected one of {get_args(Mode)}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = str(model)
        network, self._tokenizer, self._head = load_clip(name, pretrained, grid)
        self._model = network.eval().requires_grad_(False).to(self.device, dtype)
        self._dtype = dtype
        self._templates = tuple(templates)
        preprocessing = open_clip.get_model_preprocess_cfg(self._model)
        size = preprocessing["size"]
        self._size = (size, size) if isinstance(size, int) else tuple(size)
        self._mean, self._std = (
            255 * torch.tensor(preprocessing[key], device=self.device).view(3, 1, 1) for key in ("mean", "std")
        )
        self._mode = mode
        if self._head:
            self._head.to(self.device, dtype)
        self._dense = self._head or _dense_encoder(self._model.visual, name, mode)
        with torch.inference_mode():
            blank = torch.zeros(1, 3, *self._size, device=self.device, dtype=dtype)
            _, rows, columns, self.dim = self._dense(blank).shape
        if rows != columns:
            raise UserError(f"CLIP model {name} sees {rows} x {columns} patches: only square grids are supported")
        if grid not in (None, rows):
            raise UserError(
                f"CLIP model {name} sees {rows} x {columns} patches and no other number, so annotations cannot have "
                f"{grid} per side; leave the grid out, or use a model with a plain vision tower, such as ViT-B-16"
            )
        self.grid = rows
        if Path(model).is_dir():
            weights = fingerprint(model)
        elif name.startswith("hf-hub:"):
            weights = name
        else:
            weights = f"{name} {fingerprint(pretrained) if Path(str(pretrained)).is_file() else pretrained}"
        self.identity = f"clip {weights} {dtype} {mode} {self.grid} {self._templates}"
        self._lock = threading.Lock()
        self._texts: dict[str, np.ndarray] = {}
        self._classes: dict[str, np.ndarray] = {}

    def __deepcopy__(self, memo: dict) -> ClipGrounding:
        return self  # weights are shared: `env.spec` copies the arguments of wrappers

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds sentences, as they are: float32 (n, dim) with unit rows."""
        return self._remembered(self._texts, texts, self._embed)

    def encode_classes(self, names: Sequence[str]) -> np.ndarray:
        """Embeds names of things, averaged over the templates: float32 (n, dim) with unit rows."""
        return self._remembered(self._classes, names, self._embed_classes)

    @torch.inference_mode()
    def patch_features(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Features of the patches of uint8 (H, W, 3) frames: float32 (n, grid, grid, dim), unit vectors."""
        return _unit(self._dense(self._images(frames)))

    def patch_probabilities(self, frames: Sequence[np.ndarray], class_names: Sequence[str]) -> np.ndarray:
        """Which of K classes each patch shows: float32 (n, K, grid, grid), sums to 1 over K."""
        classes = self.encode_classes(class_names)
        return np.stack([patch_probabilities(features, classes) for features in self.patch_features(frames)])

    @torch.inference_mode()
    def look(self, frames: Sequence[np.ndarray]) -> Look:
        """Everything that a vision transformer and its dense head see in uint8 (H, W, 3) frames, in a single pass."""
        visual, images = self._model.visual, self._images(frames)
        tokens = _tokens_before_last(visual, images)
        patches = self._head(images) if self._head else _dense_last(visual, tokens, self._mode)
        tokens = visual.transformer.resblocks[-1](tokens)
        pooled, _ = visual._pool(tokens)
        return Look(_unit(pooled @ visual.proj), _unit(patches), tokens[:, 1:])

    @torch.inference_mode()
    def image_embeddings(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings of whole uint8 (H, W, 3) frames: float32 (n, dim) with unit rows."""
        return _unit(self._model.encode_image(self._images(frames)))

    def _images(self, frames: Sequence[np.ndarray]) -> Tensor:
        """The frames as the towers want them: (n, 3, H, W), resized and normalised."""
        if len({frame.shape for frame in frames}) > 1:
            return torch.cat([self._images([frame]) for frame in frames])
        images = torch.from_numpy(np.stack(frames)).to(self.device).permute(0, 3, 1, 2).float()
        if images.shape[2:] != self._size:  # squashed rather than cropped: every patch of the frame is wanted
            images = F.interpolate(images, self._size, mode="bicubic", antialias=True).clamp(0, 255)
        return ((images - self._mean) / self._std).to(self._dtype)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        tokens = self._tokenizer(list(texts)).to(self.device)
        return _unit(self._model.encode_text(tokens))

    def _embed_classes(self, names: Sequence[str]) -> np.ndarray:
        sentences = [template.format(name) for name in names for template in self._templates]
        means = self._embed(sentences).reshape(len(names), len(self._templates), -1).mean(1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def _remembered(
        self, memory: dict[str, np.ndarray], texts: Sequence[str], embed: Callable[[Sequence[str]], np.ndarray]
    ) -> np.ndarray:
        with self._lock:
            new = [text for text in dict.fromkeys(texts) if text not in memory]
            if new:
                memory.update(zip(new, embed(new), strict=True))
            rows = [memory[text] for text in texts]
            while len(memory) > _MAX_REMEMBERED:
                del memory[next(iter(memory))]
        return np.stack(rows) if rows else np.empty((0, self.dim), np.float32)


def _unit(vectors: Tensor) -> np.ndarray:
    return F.normalize(vectors.float(), dim=-1).cpu().numpy()


def _dense_encoder(visual: nn.Module, name: str, mode: Mode) -> Callable[[Tensor], Tensor]:
    """Returns a function from images (n, 3, H, W) to features of patches (n, rows, columns, dim), not normalised."""
    if isinstance(visual, VisionTransformer):
        block = visual.transformer.resblocks[-1]
        if visual.attn_pool is not None:
            raise UserError(_refusal(name, "it pools patches by attention, so they have no embedding of their own"))
        if not isinstance(block.attn, nn.MultiheadAttention):
            raise UserError(_refusal(name, "its attention is not the standard one"))
        return lambda images: _dense_transformer(visual, images, mode)
    if isinstance(visual, ModifiedResNet):
        return lambda images: _dense_resnet(visual, images)
    if isinstance(visual, TimmModel):
        if hasattr(visual.head, "pool"):
            raise UserError(_refusal(name, "it pools locations by timm's attention"))
        probe = torch.zeros(1, 3, *visual.image_size, device=next(visual.parameters()).device)
        shape = visual.trunk.forward_features(probe).shape
        if len(shape) != 4 or shape[1] != visual.trunk.num_features:
            raise UserError(_refusal(name, f"its tower {type(visual.trunk).__name__} gives no map of features"))
        return lambda images: _dense_timm(visual, images)
    raise UserError(_refusal(name, f"towers of type {type(visual).__name__} are not known"))


def _refusal(name: str, reason: str) -> str:
    return f"CLIP model {name} cannot tell patches apart: {reason}; use one with a plain vision tower, such as ViT-B-16"


def _dense_transformer(visual: VisionTransformer, images: Tensor, mode: Mode) -> Tensor:
    return _dense_last(visual, _tokens_before_last(visual, images), mode)


def _tokens_before_last(visual: VisionTransformer, images: Tensor) -> Tensor:
    tokens = visual._embeds(images)
    for block in visual.transformer.resblocks[:-1]:
        tokens = block(tokens)
    return tokens


def _dense_last(visual: VisionTransformer, tokens: Tensor, mode: Mode) -> Tensor:
    """The last block's attention alone, without residual and MLP: softmax(q q^T) v ("clearclip") or v ("maskclip")."""
    last = visual.transformer.resblocks[-1]
    attention = last.attn
    query, _, value = F.linear(last.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    if mode == "clearclip":
        query, value = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, value))
        value = F.scaled_dot_product_attention(query, query, value).transpose(1, 2).flatten(2)
    patches = last.ls_1(attention.out_proj(value))[:, 1:]  # the first token is the class token
    return (visual.ln_post(patches) @ visual.proj).unflatten(1, visual.grid_size)


def _dense_resnet(visual: ModifiedResNet, images: Tensor) -> Tensor:
    """The attention pool's value and output projections at every location."""
    features = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
    return visual.attnpool.c_proj(visual.attnpool.v_proj(features.permute(0, 2, 3, 1)))


def _dense_timm(visual: TimmModel, images: Tensor) -> Tensor:
    """Pooling, norm and projection at every location as if it were an image: class activation (arXiv 1512.04150)."""
    features = visual.trunk.forward_features(images).permute(0, 2, 3, 1)
    locations = visual.head(visual.trunk.forward_head(features.flatten(0, 2)[..., None, None]))
    return locations.unflatten(0, features.shape[:3])
