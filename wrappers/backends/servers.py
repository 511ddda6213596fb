"""Vision-language models behind a server that speaks OpenAI's protocol, and may be slow, down, or hostile."""

from __future__ import annotations

import asyncio
import base64
import functools
import os
import re
import threading
from collections.abc import Coroutine, Sequence
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np

from wrappers.backends.annotation import AnnotatorUnavailable, Complaints, clean_text
from wrappers.backends.answers import (
    ANSWER_SCHEMA,
    IMAGE_SIZE,
    MAX_NEW_TOKENS,
    PARSING,
    Description,
    decode_completion,
    make_prompt,
    parse_answer,
    resize,
)
from wrappers.errors import UserError

MAX_BODY = 1_000_000  # bytes of a response that are read; an answer has some hundred
_MAX_LINE = 200  # characters of what a server says that come into the log
_NO_SCHEMA = (400, 404, 422, 500, 501)  # how servers say that they cannot answer after a schema


class OpenAICaptioner:
    """Any server that speaks OpenAI's chat protocol: vLLM, SGLang, Ollama, llama.cpp, `transformers serve`.

    Frames are sent concurrently, as PNG of `image_size` pixels, and answered by JSON after a schema where the server
    can do that. A request that fails is tried again twice, after exponentially growing pauses, all within `timeout`.
    The key, for servers that want one, is read from the variable OPENAI_API_KEY; it goes to this server alone.

    Whatever the server does concerns the frame that it was asked about: a response with another status than success
    is no answer, anything else is one, if perhaps without use. A megabyte of a response is read, as it is sent (it is
    asked for uncompressed); redirects are not followed, cookies not kept.

    Args:
        base_url: for example "http://localhost:8000/v1".
        model: what the server calls its model.
        task_description: the task in a sentence, for the prompt.
        image_size: pixels on the longer side.
        concurrency: requests at the same time.
        timeout: seconds for one frame, retries included.
        max_new_tokens: length of an answer.

    Raises:
        UserError: if the URL is none of a server, or the key cannot be sent.
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
        check_base_url(base_url)
        _api_key()
        self.source = f"openai:{base_url}#{model}"
        self.base_url, self.model, self.prompt = base_url, model, make_prompt(task_description)
        self.image_size, self.concurrency, self.timeout = image_size, concurrency, timeout
        self.max_new_tokens = max_new_tokens
        self.identity = f"{self.source} {image_size} {max_new_tokens} {PARSING} {self.prompt}"
        self._structured = True  # until the server refuses
        self._complaints = Complaints()

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
            message = f"{self.source} does not answer ({_one_line(errors[0])})"
            raise AnnotatorUnavailable(message, kind=_kind(errors[0])) from errors[0]
        for error in errors:
            self._complaints.warn(_kind(error), "%s refused a frame (%s)", self.source, _one_line(error))
        return [None if isinstance(answer, Exception) else self._parse(answer) for answer in answers]

    def _parse(self, answer: str) -> Description | None:
        description = parse_answer(answer)
        if description is None:
            said = clean_text(answer[-1000:], _MAX_LINE) or "nothing"
            self._complaints.warn("unusable", "%s gave an answer without use: %s", self.source, said)
        return description

    @functools.cached_property
    def _loop(self) -> _EventLoop:
        return _EventLoop()

    @functools.cached_property
    def _client(self) -> Any:
        import openai

        unwanted = dict.fromkeys(("OpenAI-Organization", "OpenAI-Project"), openai.Omit())  # for OpenAI, if for anybody
        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=_api_key() or "none",  # the client insists on one, most servers do not
            timeout=self.timeout,
            max_retries=2,
            http_client=_make_http_client(),
            default_headers={"Accept-Encoding": "identity", **unwanted},
        )

    async def _ask_all(self, frames: Sequence[np.ndarray]) -> list[str | Exception]:
        free = asyncio.Semaphore(self.concurrency)
        self._client  # noqa: B018  (what it imports takes a while, which is not the server's time)

        async def ask(frame: np.ndarray) -> str | Exception:
            async with free:
                try:
                    # The client's own time-out is that of a read: a server that drips would never meet it.
                    async with asyncio.timeout(self.timeout):
                        return await self._ask(frame)
                except Exception as error:  # of what a server may do, one frame alone has the damage
                    return error

        return await asyncio.gather(*map(ask, frames))

    async def _ask(self, frame: np.ndarray) -> str:
        import openai

        _, png = cv2.imencode(".png", cv2.cvtColor(resize(frame, self.image_size), cv2.COLOR_RGB2BGR))
        image = {"url": f"data:image/png;base64,{base64.b64encode(png.tobytes()).decode()}"}
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": self.prompt}]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": self.max_new_tokens,
        }
        if not self._structured:
            return await self._send(request)
        schema = {"name": "description", "strict": True, "schema": ANSWER_SCHEMA}
        try:
            return await self._send({**request, "response_format": {"type": "json_schema", "json_schema": schema}})
        except openai.APIStatusError as error:
            if error.status_code not in _NO_SCHEMA:
                raise
            answer = await self._send(request)
            self._structured = False  # it was the schema that the server did not like
            return answer

    async def _send(self, request: dict[str, Any]) -> str:
        response = await self._client.chat.completions.with_raw_response.create(**request)
        return decode_completion(response.http_response.content)


def check_base_url(base_url: str) -> None:
    """Raises `UserError` unless it is a URL of a server, and nothing but that."""
    fault = _fault_of(base_url)
    if fault:
        place = base_url.rpartition("@")[2]  # without a password
        raise UserError(f"unusable base URL {place!r}: {fault}; expected one such as http://localhost:8000/v1")


def _fault_of(base_url: str) -> str | None:
    if not re.fullmatch(r"[!-~]+", base_url):
        return "it has white space, or characters other than ASCII"
    try:
        url = urlsplit(base_url)
        url.port  # noqa: B018  (raises if there is none such)
    except ValueError as error:
        return str(error)
    if url.scheme not in ("http", "https"):
        return "it does not begin with http:// or https://"
    if "@" in url.netloc:
        return "a key or password is read from OPENAI_API_KEY, and must not be in it"
    if not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*\.?|[0-9a-f:.]*:[0-9a-f:.]*", url.hostname or ""):
        return "it names no host"
    if url.query or url.fragment:
        return "it has a query or fragment"
    return None


def _api_key() -> str:
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError("OPENAI_API_KEY has white space, or characters other than ASCII: no server takes such a key")
    return key


def _make_http_client() -> Any:
    """A client that reads a limited part of a response, and believes nothing that its header says about it."""
    import openai

    class HttpClient(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, **options: Any) -> Any:
            response = await super().send(request, **{**options, "stream": True, "follow_redirects": False})
            try:
                body = await _read(response)
            finally:
                await response.aclose()
                self.cookies.clear()
            headers = {"Content-Type": "application/json"}
            if re.fullmatch(r"\d{1,4}", response.headers.get("Retry-After", "")):
                headers["Retry-After"] = response.headers["Retry-After"]
            return type(response)(response.status_code, headers=headers, content=body, request=request)

    return HttpClient()


async def _read(response: Any) -> bytes:
    if 300 <= response.status_code < 400:
        return b"it redirects to " + response.headers.get("Location", "nowhere").encode()
    body = bytearray()
    async for part in response.aiter_raw():  # not decompressed: a small body may stand for a huge one
        body += part[: MAX_BODY - len(body)]
        if len(body) == MAX_BODY:
            break
    return bytes(body)


def _one_line(error: Exception) -> str:
    status, response = getattr(error, "status_code", None), getattr(error, "response", None)
    if status is None or response is None:
        return clean_text(f"{type(error).__name__}: {error}", _MAX_LINE)
    return clean_text(f"HTTP status {status}: {response.text[:1000]}", _MAX_LINE)


def _kind(error: Exception) -> str:
    return f"{type(error).__name__} {getattr(error, 'status_code', '')}"


class _EventLoop:
    """A thread that runs coroutines for callers that have no event loop, or one that is busy, as in a notebook."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: a server that does not answer must not keep the program from ending.
        threading.Thread(target=self._loop.run_forever, name="captioner", daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
