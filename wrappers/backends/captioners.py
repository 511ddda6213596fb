"""Vision-language models that name what matters in an image: one interface, any model or server behind it."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import re
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from wrappers.backends.annotation import (
    MAX_OBJECTS,
    AnnotatorUnavailable,
    SceneObject,
    clean_text,
)
from wrappers.backends.model_files import identify, load_transformers, make_chat
from wrappers.errors import UserError

PROMPT = """{task}Describe this image in one sentence, and name at most five things in it that matter for the task.
Answer with JSON and nothing else:
{{"caption": "<one sentence>", "objects": [{{"name": "<one to three words>", "relevance": <0.0 to 1.0>, \
"motion": "moving" or "still" or "unknown"}}]}}"""

ANSWER_SCHEMA = {
    "type": "object",
    "properties": {
        "caption": {"type": "string"},
        "objects": {
            "type": "array",
            "maxItems": MAX_OBJECTS,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "relevance": {"type": "number", "minimum": 0, "maximum": 1},
                    "motion": {"type": "string", "enum": ["moving", "still", "unknown"]},
                },
                "required": ["name", "relevance", "motion"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["caption", "objects"],
    "additionalProperties": False,
}

MODELS = Path(__file__).parent.parent / "models"  # the embedded ones
IMAGE_SIZE = 224  # pixels on the longer side that a model gets to see: tens of tokens for most, whatever the frame
MAX_NEW_TOKENS = 256
_MAX_ANSWER = 20_000  # characters that are looked at
_MAX_NAME = 40
_MAX_BRACES = 32  # places in an answer where JSON may begin


@dataclass(frozen=True)
class Description:
    """What a vision-language model says about an image: `caption` (clean and not empty), at most 5 `objects`."""

    caption: str
    objects: tuple[SceneObject, ...]


class Captioner(Protocol):
    """Describes images; `source` names it, `identity` changes whenever its answers may."""

    source: str
    identity: str

    def describe(self, frames: Sequence[np.ndarray]) -> list[Description | None]:
        """Describes uint8 (H, W, 3) frames, in order; None for one without a usable answer.

        Raises:
            AnnotatorUnavailable: if no frame got an answer, but later may.
        """


def make_prompt(task_description: str = "") -> str:
    """What a model is asked about an image, given the task in a sentence."""
    task = clean_text(task_description, 1000)
    return PROMPT.format(task=f"The task of the agent in this image: {task}\n" if task else "")


def parse_answer(answer: str) -> Description | None:
    """Finds the JSON in a model's answer, however it is wrapped, and makes it safe to use; None if there is none.

    Texts are cut, freed from HTML and everything that is not printable ASCII; at most 5 objects with different names
    remain, their relevance is clipped to 0-1 (0.5 where it is no number), an unknown motion is "unknown".

    >>> parse_answer('Sure! ```json {"caption": "a <b>cart</b>", "objects": [{"name": "Cart", "relevance": 2}]} ```')
    Description(caption='a cart', objects=(SceneObject(name='cart', relevance=1.0, motion='unknown'),))
    """
    found = _find_json(answer[:_MAX_ANSWER])
    if found is None:
        return None
    entries = found.get("objects")
    objects: dict[str, SceneObject] = {}
    for entry in entries if isinstance(entries, list) else []:
        thing = _parse_object(entry)
        if thing.name and len(objects) < MAX_OBJECTS:
            objects.setdefault(thing.name, thing)
    caption = _clean(found.get("caption")) or ", ".join(objects)
    return Description(caption, tuple(objects.values())) if caption else None


def _find_json(answer: str) -> dict[str, Any] | None:
    decoder = json.JSONDecoder()
    for brace in [match.start() for match in re.finditer("{", answer)][:_MAX_BRACES]:
        try:
            found, _ = decoder.raw_decode(answer, brace)
        except (ValueError, RecursionError):
            continue
        if "caption" in found or "objects" in found:
            return found
    return None


def _parse_object(entry: Any) -> SceneObject:
    entry = entry if isinstance(entry, dict) else {"name": entry}
    relevance, motion = entry.get("relevance"), entry.get("motion")
    is_number = isinstance(relevance, int | float) and relevance == relevance  # JSON as Python reads it knows NaN
    return SceneObject(
        name=_clean(entry.get("name"), _MAX_NAME).lower(),
        relevance=float(min(max(relevance, 0), 1)) if is_number else 0.5,
        motion=motion if motion in ("moving", "still") else "unknown",
    )


def _clean(text: Any, max_length: int = 256) -> str:
    # Tags go first, then single angle brackets: what remains cannot open a tag on any page.
    return clean_text(re.sub(r"<[^<>]*>|[<>]", " ", text), max_length) if isinstance(text, str) else ""


def _resize(frame: np.ndarray, size: int) -> np.ndarray:
    height, width = frame.shape[:2]
    scale = size / max(height, width)
    if scale == 1:
        return frame
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(frame, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


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
        self.identity = f"transformers {identity} {dtype} {self.image_size} {max_new_tokens} {self.prompt}"
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

        images = [[_resize(frame, self.image_size)] for frame in frames]
        inputs = self._processor(text=[self._chat] * len(frames), images=images, padding=True, return_tensors="pt")
        inputs = inputs.to(self._model.device, self._model.dtype)  # integer inputs keep their type
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self._processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class OpenAICaptioner:
    """Any server that speaks OpenAI's chat protocol: vLLM, SGLang, Ollama, llama.cpp, `transformers serve`.

    Frames are sent concurrently, as PNG of `image_size` pixels, and answered by JSON after a schema where the server
    can do that. A request that fails is tried again twice, after exponentially growing pauses, all within `timeout`.
    The key, for servers that want one, is read from the variable OPENAI_API_KEY.

    Args:
        base_url: for example "http://localhost:8000/v1".
        model: what the server calls its model.
        task_description: the task in a sentence, for the prompt.
        image_size: pixels on the longer side.
        concurrency: requests at the same time.
        timeout: seconds for one frame, retries included.
        max_new_tokens: length of an answer.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        task_description: str = "",
        image_size: int = IMAGE_SIZE,
        concurrency: int = 16,
        timeout: float = 60.0,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        self.source = f"openai:{base_url}#{model}"
        self.base_url, self.model, self.prompt = base_url, model, make_prompt(task_description)
        self.image_size, self.concurrency, self.timeout = image_size, concurrency, timeout
        self.max_new_tokens = max_new_tokens
        self.identity = f"{self.source} {image_size} {max_new_tokens} {self.prompt}"
        self._structured = True  # until the server refuses

    def __deepcopy__(self, memo: dict) -> OpenAICaptioner:
        return self  # a connection cannot be copied

    def describe(self, frames: Sequence[np.ndarray]) -> list[Description | None]:
        """Describes uint8 (H, W, 3) frames, in order; None for one without a usable answer.

        Raises:
            AnnotatorUnavailable: if no frame got an answer.
        """
        answers = self._loop.run(self._ask_all(frames))
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if errors and len(errors) == len(frames):
            raise AnnotatorUnavailable(f"{self.source} does not answer ({errors[0]!r})") from errors[0]
        return [None if isinstance(answer, Exception) else parse_answer(answer) for answer in answers]

    @functools.cached_property
    def _loop(self) -> _EventLoop:
        return _EventLoop()

    @functools.cached_property
    def _client(self) -> Any:
        import openai

        key = os.environ.get("OPENAI_API_KEY") or "none"  # the client insists on one, most servers do not
        return openai.AsyncOpenAI(base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=2)

    async def _ask_all(self, frames: Sequence[np.ndarray]) -> list[str | Exception]:
        free = asyncio.Semaphore(self.concurrency)

        async def ask(frame: np.ndarray) -> str | Exception:
            import openai

            async with free:
                try:
                    # The client's own time-out is that of a read: a server that drips would never meet it.
                    async with asyncio.timeout(self.timeout):
                        return await self._ask(frame)
                except (openai.OpenAIError, TimeoutError, json.JSONDecodeError) as error:
                    return error

        return await asyncio.gather(*map(ask, frames))

    async def _ask(self, frame: np.ndarray) -> str:
        import openai

        _, png = cv2.imencode(".png", cv2.cvtColor(_resize(frame, self.image_size), cv2.COLOR_RGB2BGR))
        image = {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": self.prompt}]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": self.max_new_tokens,
        }
        schema = {"name": "description", "strict": True, "schema": ANSWER_SCHEMA}
        create = self._client.chat.completions.create
        try:
            if self._structured:
                return _text(await create(**request, response_format={"type": "json_schema", "json_schema": schema}))
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            answer = _text(await create(**request))
            self._structured = False  # it was the schema that the server did not like
            return answer
        return _text(await create(**request))


def _text(completion: Any) -> str:
    try:
        return completion.choices[0].message.content or ""
    except (AttributeError, IndexError, TypeError):  # not what the protocol says: a proxy's error page, for example
        return ""


class _EventLoop:
    """A thread that runs coroutines for callers that have no event loop, or one that is busy, as in a notebook."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: a server that does not answer must not keep the program from ending.
        threading.Thread(target=self._loop.run_forever, name="captioner", daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def make_captioner(spec: str, task_description: str = "", device: str | None = None) -> Captioner:
    """Makes the captioner that a user named.

    Args:
        spec: "embedded", "transformers:<name on the hub or folder>" or "openai:<base url>#<model>".
        task_description: the task in a sentence; the embedded model has no use for it.
        device: a torch device; by default the GPU where there is one. Servers choose for themselves.

    Raises:
        UserError: if it is none of these, or cannot be loaded.
    """
    kind, _, place = spec.partition(":")
    if spec == "embedded":
        captioner = TransformersCaptioner(embedded_model("captioner"), task_description, device)
        captioner.source = spec  # the same wherever the package lies
        return captioner
    if kind == "transformers" and place:
        return TransformersCaptioner(place, task_description, device)
    if kind == "openai":
        base_url, _, model = place.rpartition("#")
        if base_url.startswith(("http://", "https://")) and model:
            return OpenAICaptioner(base_url, model, task_description)
    raise UserError(
        f"unknown captioner {spec!r}: expected embedded, transformers:<name or folder> or openai:<base url>#<model>, "
        "for example openai:http://localhost:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct"
    )


def embedded_model(name: str) -> Path:
    """The folder of a model that comes with the package, "clip" or "captioner".

    Raises:
        UserError: if it is missing.
    """
    folder = MODELS / name
    if not folder.is_dir():
        raise UserError(
            f"the embedded models are missing from {MODELS}; `semore-bench train-guidance` makes them, and "
            "transformers:<name> or openai:<base url>#<model> name another vision-language model"
        )
    return folder
