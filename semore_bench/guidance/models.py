"""A small CLIP in open_clip's format and a small captioner that `transformers` loads, trained as one network.

Both look at the image through the same vision transformer while they learn; when they are saved each gets a copy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from semore_bench.guidance.frames import SIZE
from semore_bench.guidance.metrics import phrases
from wrappers.backends import dense, familiarity
from wrappers.backends.annotation import SceneObject

MEAN, STD = (0.35, 0.4, 0.5), (0.2, 0.2, 0.2)
PATCH = 8  # pixels
_PAD, _UNKNOWN, _IMAGE = "<pad>", "<unknown>", "<image>"
# Whatever is asked, the captioner says the same: the question is left out, which saves most of its time.
_CHAT = (
    "{% for message in messages %}{% if message['content'] is not string %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Sizes:
    """Widths and depths of the vision transformer, of CLIP's text transformer and of the captioner's language model."""

    embedding: int = 128
    width: int = 128
    layers: int = 6
    text_width: int = 64
    text_layers: int = 2
    caption_width: int = 128
    caption_layers: int = 2


class Features(NamedTuple):
    """What the tower sees in n images: unit vectors (n, d) and (n, G, G, d), and patch tokens (n, G * G, width)."""

    images: Tensor
    patches: Tensor
    tokens: Tensor


class Guidance(nn.Module):
    """CLIP and captioner on one vision transformer, that of `clip`.

    Args:
        tokenizer: as `make_tokenizer` returns it.
        sizes: of all parts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sizes: Sizes):
        super().__init__()
        self.tokenizer, self.config = tokenizer, clip_config(sizes)
        self.clip = open_clip.CLIP(**self.config)
        self.clip.visual.positional_embedding.requires_grad_(True)  # sines and cosines are where it starts
        for block in self.clip.visual.transformer.resblocks:
            mimetic_(block.attn)
        # With open_clip's own scale, that of long training, captions that differ in one word start out as one vector.
        nn.init.normal_(self.clip.token_embedding.weight, std=0.5)
        nn.init.normal_(self.clip.positional_embedding, std=0.25)
        captioner = LlavaForConditionalGeneration(captioner_config(sizes, tokenizer))
        self.projector, self.language_model = captioner.model.multi_modal_projector, captioner.model.language_model
        self.head = captioner.lm_head

    def see(self, images: Tensor) -> Features:
        """Features of normalised images (n, 3, 64, 64); those of patches as `ClipGrounding` computes them."""
        visual = self.clip.visual
        tokens = visual._embeds(images)
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            tokens = block(tokens)
        attention = last.attn
        query, _, value = F.linear(last.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
        query, value = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, value))
        attended = F.scaled_dot_product_attention(query, query, value).transpose(1, 2).flatten(2)
        patches = visual.ln_post(attention.out_proj(attended)[:, 1:]) @ visual.proj
        tokens = last(tokens)
        pooled, _ = visual._pool(tokens)
        return Features(
            F.normalize(pooled @ visual.proj, dim=-1),
            F.normalize(patches, dim=-1).unflatten(1, visual.grid_size),
            tokens[:, 1:],
        )

    def answer_logits(self, tokens: Tensor, answers: Tensor) -> Tensor:
        """Logits (n, L, vocabulary) of answers (n, L), given patch tokens and, for each piece, those before it."""
        before = self.language_model.embed_tokens(answers[:, :-1])
        states = self.language_model(inputs_embeds=torch.cat([self.projector(tokens), before], 1)).last_hidden_state
        return self.head(states[:, tokens.shape[1] - 1 :])

    def save(self, folder: Path, used_tokens: Tensor) -> None:
        """Writes `folder`/clip and `folder`/captioner in half precision.

        Args:
            folder: where to.
            used_tokens: numbers of the text tokens that were learned; the others' embeddings become 0.
        """
        (folder / "clip").mkdir(parents=True, exist_ok=True)
        weights = {name: value.half().contiguous() for name, value in self.clip.state_dict().items()}
        embedding = weights["token_embedding.weight"]
        weights["token_embedding.weight"] = torch.zeros_like(embedding)
        weights["token_embedding.weight"][used_tokens] = embedding[used_tokens]
        save_file(weights, folder / "clip" / "open_clip_model.safetensors")
        write_clip_config(folder / "clip", self.config)
        for file in (dense.FILE, familiarity.FILE):  # those of an earlier CLIP mean nothing to this one
            (folder / "clip" / file).unlink(missing_ok=True)

        captioner = LlavaForConditionalGeneration(self.captioner_config())
        state = _as_transformers(self.clip.visual.state_dict())
        state = {f"model.vision_tower.{name}": value for name, value in state.items()}
        for prefix, part in (
            ("model.multi_modal_projector.", self.projector),
            ("model.language_model.", self.language_model),
            ("lm_head.", self.head),
        ):
            state |= {prefix + name: value for name, value in part.state_dict().items()}
        captioner.load_state_dict(state)
        captioner.generation_config = _generation_config(self.tokenizer)
        captioner.half().save_pretrained(folder / "captioner")
        make_processor(self.tokenizer).save_pretrained(folder / "captioner")

    def captioner_config(self) -> LlavaConfig:
        """The configuration of the captioner on its own."""
        vision, text = self.config["vision_cfg"], self.language_model.config
        sizes = Sizes(
            width=vision["width"],
            layers=vision["layers"],
            caption_width=text.hidden_size,
            caption_layers=text.num_hidden_layers,
        )
        return captioner_config(sizes, self.tokenizer)


@torch.no_grad()
def mimetic_(attention: nn.MultiheadAttention) -> None:
    """Begins as trained vision transformers end up: patches attend to patches like themselves, and subtract the mean.

    W_q W_k' = 0.7 Z + 0.7 I and W_v W_o = 0.4 Z - 0.4 I with Gaussian Z (Trockman and Kolter 2023, arXiv 2305.09828);
    saves a small transformer much of the time that it takes to find out where things are.
    """
    width, head = attention.embed_dim, attention.head_dim
    identity = torch.eye(width)

    def halves(scale: float, sign: float, rank: int) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(scale * torch.randn(width, width) / width**0.5 + sign * scale * identity)
        root = s[:rank].sqrt()
        return u[:, :rank] * root, v[:rank].T * root

    queries, keys = zip(*(halves(0.7, 1, head) for _ in range(attention.num_heads)), strict=True)
    value, output = halves(0.4, -1, width)
    attention.in_proj_weight.copy_(torch.cat([torch.cat(queries, 1).T, torch.cat(keys, 1).T, value.T]))
    attention.out_proj.weight.copy_(output)


def clip_config(sizes: Sizes) -> dict:
    """What open_clip calls `model_cfg`."""
    vision = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "width": sizes.width,
        "layers": sizes.layers,
        "head_width": 32,
        "pool_type": "avg",
        "pos_embed_type": "sin_cos_2d",
    }
    text = {
        "context_length": 48,
        "vocab_size": 49408,
        "width": sizes.text_width,
        "heads": sizes.text_width // 32,
        "layers": sizes.text_layers,
    }
    return {"embed_dim": sizes.embedding, "vision_cfg": vision, "text_cfg": text}


def write_clip_config(folder: Path, config: dict) -> None:
    """Writes `open_clip_config.json`."""
    preprocessing = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    _write(folder, {"model_cfg": config, "preprocess_cfg": preprocessing})


def read_clip_config(folder: Path) -> dict[str, Any]:
    """Reads `open_clip_config.json`."""
    return json.loads((folder / "open_clip_config.json").read_text())


def add_to_clip_config(folder: Path, **more: object) -> None:
    """Says in `open_clip_config.json` what readers other than open_clip want to know."""
    _write(folder, read_clip_config(folder) | more)


def _write(folder: Path, document: dict) -> None:
    (folder / "open_clip_config.json").write_text(json.dumps(document, indent=2) + "\n")


def captioner_config(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """LLaVA, with a vision tower that is equal to CLIP's."""
    vision = CLIPVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // 32,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        hidden_size=sizes.caption_width,
        intermediate_size=2 * sizes.caption_width,
        num_hidden_layers=sizes.caption_layers,
        num_attention_heads=sizes.caption_width // 32,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=sizes.caption_width**-0.5,  # the usual 0.02 is made for wide models
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE),
        image_seq_length=(SIZE // PATCH) ** 2,
    )


def answer_pieces(caption: str, objects: Sequence[SceneObject]) -> list[str]:
    """The JSON that the captioner answers, in pieces; the last one holds all objects.

    >>> answer_pieces("a cart; a pole", [])
    ['{"caption": "a cart', '; a pole', '", "objects": []}']
    """
    first, *others = phrases(caption)
    return ['{"caption": "' + first, *others, f'", "objects": {json.dumps([asdict(thing) for thing in objects])}}}']


def make_tokenizer(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are whole pieces of answers, so that a caption takes few steps to write."""
    pieces = sorted(set(pieces), key=lambda piece: (-len(piece), piece))
    vocabulary = {word: number for number, word in enumerate([_PAD, _UNKNOWN, _IMAGE, *pieces])}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(_escape, pieces))), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([_PAD, _UNKNOWN, _IMAGE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, unk_token=_UNKNOWN, clean_up_tokenization_spaces=False
    )


def _escape(text: str) -> str:
    return "".join(character if character.isalnum() or character in " ;,'" else f"\\{character}" for character in text)


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """What turns frames and a conversation into the captioner's inputs."""
    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=MEAN, image_std=STD
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which is left out again
        image_token=_IMAGE,
        chat_template=_CHAT,
    )


def _generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    last = [number for word, number in tokenizer.get_vocab().items() if word.startswith('", "objects": ')]
    return GenerationConfig(eos_token_id=sorted(last), pad_token_id=tokenizer.pad_token_id)


_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _as_transformers(visual: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of open_clip's vision transformer under the names of the CLIP in `transformers`."""
    state = {}
    for name, value in visual.items():
        if name == "proj":
            continue
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        if ".attn.in_proj_" in name:
            layer, kind = name.split(".attn.in_proj_")
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[f"{layer}.self_attn.{part}_proj.{kind}"] = rows
        else:
            state[name] = value
    return state
