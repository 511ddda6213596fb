"""Models of tiny size with random weights, in the formats of open_clip and transformers."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 3, "width": 24, "head_width": 8, "patch_size": 8}

ANSWER = '{"caption": "a cart with a pole", "objects": [{"name": "Pole", "relevance": 1.0, "motion": "moving"}]}'

_CHAT = (
    "{% for message in messages %}{{ message['role'] }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_clip(folder: Path, vision: dict = VIT, **config) -> Path:
    """Saves a CLIP model, its image mean being 0.2, 0.4, 0.6 and its deviation 0.5, 0.6, 0.7."""
    torch.manual_seed(0)
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": TEXT, **config}
    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = {"mean": [0.2, 0.4, 0.6], "std": [0.5, 0.6, 0.7]}
    document = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    model = open_clip.create_model(f"local-dir:{folder}")
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: nothing may be left out unnoticed
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def save_vlm(folder: Path, answer: str | None = ANSWER) -> Path:
    """Saves an Idefics3 (the architecture of SmolVLM) that always says `answer`, or with None random bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(answer or "unused", normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=4096
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, fast, image_seq_len=4, chat_template=_CHAT)
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {
        name: fast.convert_tokens_to_ids(token) for name, token in [("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")]
    }
    ids = {f"{name}_token_id": number for name, number in ids.items()}
    config = Idefics3Config(
        vision_config={**tiny, "image_size": 32, "patch_size": 8},
        text_config={
            **tiny, **ids, "model_type": "llama", "vocab_size": len(fast), "max_position_embeddings": 4096,
            "num_key_value_heads": 2,
        },
        image_token_id=fast.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        **ids,
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than they begin, so that every image gets its own answer
            parameter.add_(0.3 * torch.randn_like(parameter))
    silent = [number for number in range(len(fast)) if number != len(fast) - 1] if answer else [ids["eos_token_id"]]
    model.generation_config = GenerationConfig(**ids, suppress_tokens=silent, max_new_tokens=4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
