"""What vision-language models are asked, and what is made of their answers, whatever they look like."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from wrappers.backends.annotation import MAX_OBJECTS, SceneObject, clean_text

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

IMAGE_SIZE = 224  # pixels on the longer side that a model gets to see: tens of tokens for most, whatever the frame
MAX_NEW_TOKENS = 256
PARSING = 2
"""Counts changes of what is made of an answer: descriptions that were cached before are then made anew."""

_MAX_ANSWER = 20_000  # characters that are looked at, the last ones
_MAX_BRACES = 128  # places in an answer where JSON may begin, the last ones
_MAX_NAME = 40


@dataclass(frozen=True)
class Description:
    """What a vision-language model says about an image: `caption` (clean and not empty), at most 5 `objects`."""

    caption: str
    objects: tuple[SceneObject, ...]


def make_prompt(task_description: str = "") -> str:
    """What a model is asked about an image, given the task in a sentence."""
    task = clean_text(task_description, 1000)
    return PROMPT.format(task=f"The task of the agent in this image: {task}\n" if task else "")


def parse_answer(answer: str) -> Description | None:
    """Finds the JSON in a model's answer, however it is wrapped, and makes it safe to use; None if there is none.

    The last usable JSON counts, with trailing commas too. Reasoning (`<think>...</think>` and the like) counts only
    where nothing follows it: drafts never beat the answer.
    Texts are cut, freed from HTML and everything that is not printable ASCII; at most 5 objects with different names
    remain, their relevance is clipped to 0-1 (0.5 where it is no number), an unknown motion is "unknown".

    >>> parse_answer('Sure! ```json {"caption": "a <b>cart</b>", "objects": [{"name": "Cart", "relevance": 2}]} ```')
    Description(caption='a cart', objects=(SceneObject(name='cart', relevance=1.0, motion='unknown'),))
    """
    said = _without_reasoning(answer)
    text = said if said.strip() else answer
    last = None
    for found in _find_json(text[-_MAX_ANSWER:]):
        last = _describe(found) or last
    return last


def resize(frame: np.ndarray, size: int) -> np.ndarray:
    """An image (H, W, 3) with `size` pixels on its longer side, its proportions as they are."""
    height, width = frame.shape[:2]
    scale = size / max(height, width)
    if scale == 1:
        return frame
    shape = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(frame, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def decode_completion(body: bytes) -> str:
    """The text in a server's answer to a chat completion request; "" if there is none, whatever the bytes are.

    Content in parts is joined; where there is no content at all, the model's reasoning stands for it.
    """
    try:
        message = json.loads(body.decode("utf-8-sig"))["choices"][0]["message"]
        texts = [_join(message.get(field)) for field in ("content", "reasoning_content", "reasoning")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""  # not what the protocol says: a proxy's error page, for example
    return next((text for text in texts if text.strip()), "")


def _join(content: Any) -> str:
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


_REASONING = re.compile(r"(</?(?:think|thinking|thought|reasoning|reflection)>|\u25c1/?think\u25b7)", re.IGNORECASE)


def _without_reasoning(answer: str) -> str:
    said: list[str] = []
    is_reasoning = False
    for piece in _REASONING.split(answer):
        if not _REASONING.fullmatch(piece):
            said += [] if is_reasoning else [piece]
        elif "/" not in piece:
            is_reasoning = True
        else:
            if not is_reasoning:  # it began in the prompt
                said.clear()
            is_reasoning = False
    return "".join(said)


def _find_json(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in the text that may be an answer, in order."""
    braces = [match.start() for match in re.finditer("{", text)][-_MAX_BRACES:]
    text = text[braces[0] :] if braces else ""
    while text:
        found, rest = _decode(text)
        if "caption" in found or "objects" in found:
            yield found
            text = rest
        else:
            text = text[1:]  # what is no answer may hold one
        text = text[text.find("{") :] if "{" in text else ""


_DECODER = json.JSONDecoder(strict=False)  # line breaks in a text are forgiven
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+"?)|,(?=\s*[}\]])', re.DOTALL)


def _decode(text: str) -> tuple[dict[str, Any], str]:
    """The JSON object that the text begins with, and what follows it; an empty one if it is none."""
    for repair in (str, lambda text: _TRAILING_COMMA.sub(r"\1", text)):
        repaired = repair(text)
        try:
            found, end = _DECODER.raw_decode(repaired)
        except (ValueError, RecursionError):
            continue
        return found, repaired[end:]
    return {}, ""


def _describe(found: dict[str, Any]) -> Description | None:
    entries = found.get("objects")
    objects: dict[str, SceneObject] = {}
    for entry in entries if isinstance(entries, list) else []:
        thing = _parse_object(entry)
        if thing.name and len(objects) < MAX_OBJECTS:
            objects.setdefault(thing.name, thing)
    caption = _clean(found.get("caption")) or ", ".join(objects)
    return Description(caption, tuple(objects.values())) if caption else None


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
