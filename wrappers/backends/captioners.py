"""Vision-language models that name what matters in an image: one interface, any model or server behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from wrappers.backends.answers import (
    IMAGE_SIZE,
    MAX_NEW_TOKENS,
    PARSING,
    Description,
    make_prompt,
    parse_answer,
    resize,
)
from wrappers.backends.model_files import identify, load_transformers, make_chat
from wrappers.backends.servers import OpenAICaptioner
from wrappers.backends.specs import EMBEDDED, is_embedded, split_server
from wrappers.errors import UserError

MODELS = Path(__file__).parent.parent / "models"  # the embedded ones


class Captioner(Protocol):
    """Describes images; `source` names it, `identity` changes whenever its answers may."""

    source: str
    identity: str

    def describe(self, frames: Sequence[np.ndarray]) -> list[Description | None]:
        """Describes uint8 (H, W, 3) frames, in order; None for one without a usable answer.

        Raises:
            AnnotatorUnavailable: if no frame got an answer, but later may.
        """


class TransformersCaptioner:
    """Any image-text-to-text model that `transformers` loads: SmolVLM2, Qwen-VL, Gemma, LLaVA and others.

    Images are not split into tiles, and shown at `image_size` pixels: a frame costs tens of tokens with most models.
    Code that comes with a model is never run.

    Args:
        model: a name on the hub, or a folder.
        task_description: the task in a sentence, for the prompt.
        device: a torch device; by default the GPU where there is one.
        dtype: for example "bfloat16"; "auto" is that of the weights, float32 on a CPU.
        image_size: pixels on the longer side; less where the model takes less.
        batch_size: images per call of the model.
        max_new_tokens: length of an answer.

    Raises:
        UserError: if the model cannot be had, or is no image-text-to-text model.
    """

    def __init__(
        self,
        model: str | Path,
        task_description: str = "",
        device: str | None = None,
        dtype: str = "auto",
        image_size: int = IMAGE_SIZE,
        batch_size: int = 16,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        import torch

        self.source = f"transformers:{model}"
        self.prompt = make_prompt(task_description)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        self._processor, self._model = load_transformers(str(model), device, dtype)
        fixed_size = dict(self._processor.image_processor.size or {}).get("height") or image_size
        self.image_size = min(image_size, fixed_size)
        identity = identify(str(model))
        self.identity = f"transformers {identity} {dtype} {self.image_size} {max_new_tokens} {PARSING} {self.prompt}"
        self._chat = make_chat(self._processor, str(model), self.prompt)

    def __deepcopy__(self, memo: dict) -> TransformersCaptioner:
        return self  # weights are shared: `env.spec` copies the arguments of wrappers

    def describe(self, frames: Sequence[np.ndarray]) -> list[Description | None]:
        """Describes uint8 (H, W, 3) frames, in order; None for one without a usable answer."""
        starts = range(0, len(frames), self.batch_size)
        answers = [answer for start in starts for answer in self._answer(frames[start : start + self.batch_size])]
        return [parse_answer(answer) for answer in answers]

    def _answer(self, frames: Sequence[np.ndarray]) -> list[str]:
        import torch

        images = [[resize(frame, self.image_size)] for frame in frames]
        inputs = self._processor(text=[self._chat] * len(frames), images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(self._model.device, self._model.dtype)  # integer inputs keep their type
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self._processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def make_captioner(spec: str, task_description: str = "", device: str | None = None) -> Captioner:
    """Makes the captioner that a user named.

    Args:
        spec: "embedded", "embedded:<folder>", "transformers:<name on the hub or folder>" or
            "openai:<base url>#<model>".
        task_description: the task in a sentence; the embedded model has no use for it.
        device: a torch device; by default the GPU where there is one. Servers choose for themselves.

    Raises:
        UserError: if it is none of these, or cannot be loaded.
    """
    kind, _, place = spec.partition(":")
    if is_embedded(spec):
        captioner = TransformersCaptioner(embedded_model("captioner", spec), task_description, device)
        captioner.source = spec  # for the package's own, the same wherever it lies
        return captioner
    if kind == "transformers" and place:
        return TransformersCaptioner(place, task_description, device)
    return OpenAICaptioner(*split_server(spec), task_description)


def embedded_model(name: str, spec: str = EMBEDDED) -> Path:
    """The folder of a model, "clip" or "captioner": one that comes with the package, or lies where `spec` says.

    Raises:
        UserError: if it is missing.
    """
    _, _, place = spec.partition(":")
    models = Path(place).expanduser() if place else MODELS
    folder = models / name
    if not folder.is_dir():
        output = f" --output {place}" if place else ""
        raise UserError(
            f"the embedded models are missing from {models}; `semore-bench train-guidance{output}` makes them, and "
            "transformers:<name> or openai:<base url>#<model> name another vision-language model"
        )
    return folder
