"""Text from the embedded captioner, at a fraction of what `generate` of `transformers` takes for a model so small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

MAX_PIECES = 48  # of an answer; the captioner writes a phrase at a time


class Writer:
    """Answers from patch tokens by a LLaVA whose language model is a plain Llama: the likeliest piece after another.

    Same numbers as `transformers`, up to rounding; tested against it.

    Args:
        model: the network; its weights are shared.
        tokenizer: turns pieces into text.
    """

    def __init__(self, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase):
        language, config = model.model.language_model, model.config.text_config
        self._tokenizer, self._projector, self._head = tokenizer, model.model.multi_modal_projector, model.lm_head
        self._embed, self._norm = language.embed_tokens, language.norm
        self._layers = [_Layer(layer, config.num_attention_heads) for layer in language.layers]
        ends = model.generation_config.eos_token_id
        self._ends = torch.tensor([ends] if isinstance(ends, int) else ends, device=model.device)
        size, theta = config.head_dim, config.rope_parameters["rope_theta"]
        frequencies = theta ** (-torch.arange(0, size, 2, device=model.device) / size)
        angles = torch.outer(torch.arange(config.max_position_embeddings, device=model.device), frequencies)
        angles = torch.cat([angles, angles], -1)
        self._cos, self._sin = angles.cos().to(model.dtype), angles.sin().to(model.dtype)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> list[str]:
        """The answers about n images, from their patch tokens (n, P, width)."""
        inputs, begin, pieces = self._projector(tokens), 0, []
        memories: list[tuple[Tensor, Tensor] | None] = [None] * len(self._layers)
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(MAX_PIECES):
            end = begin + inputs.shape[1]
            turn, begin = (self._cos[begin:end], self._sin[begin:end]), end
            for number, layer in enumerate(self._layers):
                inputs, memories[number] = layer(inputs, turn, memories[number])
            piece = self._head(self._norm(inputs[:, -1])).argmax(-1).masked_fill(done, self._tokenizer.pad_token_id)
            pieces.append(piece)
            done |= (piece[:, None] == self._ends).any(1)
            if done.all():
                break
            inputs = self._embed(piece)[:, None]
        return self._tokenizer.batch_decode(torch.stack(pieces, 1), skip_special_tokens=True)


class _Layer:
    """A layer of Llama; projections of the same input are one product."""

    def __init__(self, layer: nn.Module, heads: int):
        attention, mlp = layer.self_attn, layer.mlp
        self._heads = heads
        self._before, self._between = layer.input_layernorm, layer.post_attention_layernorm
        self._qkv = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        self._gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self._out, self._down = attention.o_proj.weight, mlp.down_proj.weight

    def __call__(self, x: Tensor, turn: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor] | None):
        """What comes out, and all keys and values so far."""
        projected = F.linear(_rms(x, self._before), self._qkv)
        query, key, value = projected.unflatten(-1, (3, self._heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = (_turned(vectors, *turn) for vectors in (query, key))
        if memory is not None:
            key, value = torch.cat([memory[0], key], 2), torch.cat([memory[1], value], 2)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=memory is None)
        x = x + F.linear(seen.transpose(1, 2).flatten(2), self._out)
        gate, up = F.linear(_rms(x, self._between), self._gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self._down), (key, value)


def _rms(x: Tensor, norm: nn.Module) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _turned(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves paired as in Llama."""
    first, second = vectors.chunk(2, -1)
    return vectors * cos + torch.cat([-second, first], -1) * sin
