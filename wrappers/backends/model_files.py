"""Vision-language models from files that may come from anybody: loaded without running code of theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wrappers.backends.annotation import fingerprint
from wrappers.errors import UserError


@contextlib.contextmanager
def no_remote_code() -> Iterator[None]:
    """Where `transformers` would ask on the terminal whether a model's code may run, the answer is no.

    It asks wherever `trust_remote_code` was not passed on, and a "y" on the standard input would do.
    """
    from transformers import dynamic_module_utils

    seconds_to_answer = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds_to_answer


def load_transformers(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """The processor and the network of an image-text-to-text model, its images in one tile, its weights safetensors.

    Raises:
        UserError: if it cannot be had, or is none.
    """
    import transformers

    if Path(model).is_dir():  # nothing to wait for
        transformers.utils.logging.disable_progress_bar()
    try:
        with no_remote_code():
            processor, network = _load(model, dtype)
    except Exception as error:  # each file of it can be wrong in ways of its own
        raise UserError(
            f"vision-language model {model!r} cannot be loaded ({error}); expected a folder or a name on the hub of an "
            "image-text-to-text model; a download needs a network once (afterwards HF_HUB_OFFLINE=1 works), annotator "
            "'embedded' needs none"
        ) from error
    if not hasattr(processor, "image_processor") or not getattr(processor, "chat_template", None):
        raise UserError(f"model {model!r} takes no conversation with images; expected one such as SmolVLM2 or Qwen-VL")
    processor.tokenizer.padding_side = "left"  # answers of a batch begin at the same place
    images = processor.image_processor
    for splitting in ("do_image_splitting", "crop_to_patches", "do_pan_and_scan"):
        if hasattr(images, splitting):
            setattr(images, splitting, False)
    if hasattr(images, "max_image_size"):  # Idefics3 and SmolVLM would enlarge to several tiles before shrinking to one
        images.size = images.max_image_size
    return processor, network.to(device).eval()


def make_chat(processor: Any, model: str, prompt: str) -> str:
    """The conversation in which the model is shown one image and asked `prompt`, as its template writes it.

    Raises:
        UserError: if the template, a program that runs in a sandbox of Jinja, fails.
    """
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    try:
        return processor.apply_chat_template([message], add_generation_prompt=True)
    except Exception as error:  # whatever a program may raise
        raise UserError(f"the chat template of model {model!r} cannot be used ({error})") from error


def identify(model: str) -> str:
    """What changes whenever the model's files do: a hash of the folder's, or the revision that the hub gave."""
    if Path(model).is_dir():
        return fingerprint(model)
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    return f"{model} {Path(config).parent.name if isinstance(config, str) else None}"


def _load(model: str, dtype: str) -> tuple[Any, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    _check(config)
    processor = transformers.AutoProcessor.from_pretrained(model, trust_remote_code=False)
    network = transformers.AutoModelForImageTextToText.from_pretrained(
        model, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    return processor, network


def _check(config: Any) -> None:
    """Raises `ValueError` if the model wants its attention computed by a kernel of the hub, which is code."""
    kernel = getattr(config, "_attn_implementation", None)
    if "/" in str(kernel):
        raise ValueError(f"config.json asks for code of the hub, {kernel}; remove attn_implementation from it")
    for name in config.sub_configs:
        if hasattr(config, name):
            _check(getattr(config, name))
