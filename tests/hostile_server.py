"""A server of a vision-language model that misbehaves in every way, and what it sends."""

import contextlib
import gzip
import http.server
import json
import threading
import zlib
from collections.abc import Callable, Iterator

from tests.tiny_models import ANSWER

DRAFT = ANSWER.replace("a cart with a pole", "a draft")


def message_body(message: object) -> bytes:
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return json.dumps(
        {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    ).encode()


def said(content: object, **more: object) -> bytes:
    """The body of a completion in which the model says `content`."""
    return message_body({"role": "assistant", "content": content, **more})


def reply(body: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> bytes:
    """A response as it is sent."""
    lines = [f"HTTP/1.1 {status} Some", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "\r\n"]).encode() + body


def error(status: int, body: bytes = b'{"error": {"message": "no"}}', **headers: str) -> bytes:
    return reply(body, status, **headers)


_START = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
_BOMB = zlib.compress(b" " * 20_000_000, 1, 31)  # 90 kB of gzip
_LONG = b"Bad gateway, and so on. " * 90_000  # 2 MB

# What is answered, and is an answer to the frame after all.
USABLE = {
    "sane": reply(said(ANSWER)),
    "a draft in think": reply(said(f"<think>perhaps {DRAFT}</think> {ANSWER}")),
    "a draft before </think>": reply(said(f"perhaps {DRAFT}</think> {ANSWER}")),
    "think after the answer": reply(said(f"{ANSWER}<think>or rather {DRAFT}")),
    "a draft before": reply(said(f"First {DRAFT}, and better: {ANSWER}")),
    "only in think": reply(said(f"<think>it is {ANSWER}")),
    "a draft in reasoning_content": reply(said(ANSWER, reasoning_content=DRAFT)),
    "only in reasoning_content": reply(said("", reasoning_content=f"{DRAFT}, no, {ANSWER}")),
    "only in reasoning": reply(said(None, reasoning=ANSWER)),
    "trailing commas": reply(said(ANSWER.replace("}]", ",},]").replace("]}", "], }"))),
    "parts": reply(said([{"type": "text", "text": ANSWER[:30]}, {"type": "text", "text": ANSWER[30:]}, 7])),
    "another type": reply(said(ANSWER), kind="text/html; charset=zlib"),
    "chunked": _START
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"1\r\n%c\r\n" % byte for byte in said(ANSWER))
    + b"0\r\n\r\n",
    "a hundred first": b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" * 100 + reply(said(ANSWER)),
    "long after": reply(said(ANSWER) + b" " * 900_000),
    "cookies": reply(said(ANSWER), Set_Cookie="a=" + "b" * 4000),
}

# What is answered, and is of no use: it concerns the frame alone.
UNUSABLE = {
    "empty": reply(b""),
    "204": reply(b"", 204),
    "no json": reply(b"{"),
    "a page": reply(b"<h1>It works!</h1>", kind="text/html"),
    "null": reply(b"null"),
    "a text": reply(b'"<script>"'),
    "no choices": reply(b'{"choices": []}'),
    "choices of another kind": reply(b'{"choices": {"0": 1}}'),
    "a choice of another kind": reply(b'{"choices": ["x"]}'),
    "a message of another kind": reply(message_body(7)),
    "no content": reply(said(None)),
    "content is empty": reply(said(" \n")),
    "content is a dict": reply(said({"caption": "x", "objects": []})),
    "content is a number": reply(said(7.5)),
    "content is true": reply(said(True)),
    "content is a list of lists": reply(said([[ANSWER]])),
    "parts without text": reply(said([{"type": "text", "text": {"a": 1}}, {"type": "image_url"}])),
    "a refusal": reply(said("I'm sorry, I can't help with that.", refusal="no")),
    "half an answer": reply(said(ANSWER[:-9])),
    "zeros": reply(said("\0" * 100_000)),
    "control characters": reply(said("\x1b[2J\r\n\u202e" * 1000)),
    "surrogates": reply(b'{"choices": [{"message": {"content": "\\ud800\\udfff{"}}]}'),
    "invalid UTF-8": reply(said("caption").replace(b"caption", b"\xff\xfe\x80")),
    "UTF-16": reply(said(ANSWER).decode().encode("utf-16")),
    "nested": reply(b"[" * 500_000),
    "nested content": reply(said('{"a":' * 100_000)),
    "braces": reply(said("{" * 500_000)),
    "quotes": reply(said('{"' + '\\"' * 100_000)),
    "thoughts": reply(said("<think>" * 100_000)),
    "a huge number": reply(said('{"caption": "x", "n": ' + "9" * 100_000 + "}")),
    "a huge number outside": reply(b'{"choices": ' + b"9" * 100_000 + b"}"),
    "megabytes": reply(said(ANSWER + "x" * 3_000_000)),
    "compressed though asked not to": reply(gzip.compress(said(ANSWER)), Content_Encoding="gzip"),
    "gzip bomb": reply(_BOMB, Content_Encoding="gzip"),
    "deflate bomb": reply(_BOMB, Content_Encoding="deflate, deflate"),
    "not compressed though said to be": reply(said("x"), Content_Encoding="br"),
}

# What is no answer: it is asked again later.
FAILURES = {
    **{f"status {status}": error(status) for status in (400, 401, 403, 404, 408, 409, 413, 418, 422, 429)},
    **{f"status {status}": error(status) for status in (500, 501, 502, 503, 504, 599)},
    "a long error": error(502, _LONG),
    "a long error on many lines": error(400, b"line\n" * 50_000),
    "an error in escape codes": error(400, b"\x1b[2J\x1b]0;title\x07" * 100),
    "an error that is a bomb": error(400, _BOMB, Content_Encoding="gzip"),
    "an error of an odd type": reply(b"x", 500, "text/html; charset=zlib"),
    "an error with lists": error(400, b'{"error": [{"message": {"a": 1}}]}'),
    "come back in a year": error(429, Retry_After="31536000"),
    "come back at an odd date": error(503, Retry_After="Mon, 01 Jan 99999999999 00:00:00 GMT"),
    "come back at no date": error(503, Retry_After="nan", Retry_After_Ms="inf"),
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "an odd status": b"HTTP/1.1 abc OK\r\n\r\n",
    "an odd length": b"HTTP/1.1 200 OK\r\nContent-Length: -7\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nContent-Length: 8\r\n\r\n12345678",
    "a huge header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
    "an odd chunk": _START + b"Transfer-Encoding: chunked\r\n\r\nzzz\r\n",
    "half a body": _START + b"Content-Length: 5000\r\n\r\n" + said(ANSWER),
    "hangs up": b"",
    "half a header": b"HTTP/1.1 200 OK\r\nContent-Ty",
    "an odd redirect": error(302, Location="http://[::1"),
    "a redirect to itself": error(307, Location="/v1/chat/completions"),
    "a redirect to a file": error(302, Location="file:///etc/passwd"),
}


def _for_ever(part: bytes, pause: float) -> Callable[[threading.Event], Iterator[bytes]]:
    def parts(ended: threading.Event) -> Iterator[bytes]:
        while not ended.wait(pause):
            yield part

    return parts


# What never comes to its end: a beginning, and what follows until the server is told to end.
ENDLESS = {
    "silence": (b"", _for_ever(b"", 0.05)),
    "a dripping header": (b"HTTP/1.1 200 OK\r\n", _for_ever(b"X: y\r\n", 0.05)),
    "a dripping body": (_START + b"Content-Length: 900000\r\n\r\n", _for_ever(b" ", 0.05)),
    "silence after the header": (_START + b"Content-Length: 900\r\n\r\n", _for_ever(b"", 0.05)),
    "early hints for ever": (b"", _for_ever(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 10, 0.01)),
}
FLOOD = (_START + b"\r\n", _for_ever(b"x" * 100_000, 0))  # a body without end: what was read of it is an answer

# Servers that cannot answer after a schema, by the status with which they say so.
WITHOUT_SCHEMA = (400, 404, 422, 500, 501)


class HostileServer:
    """Answers on loopback as it is told by `replies`, which maps requests to what is sent.

    Attributes:
        url: the base URL.
        reply: returns bytes, or a beginning and a function that yields more until its argument is set.
        requests: what was asked, with the headers.
    """

    def __init__(self, reply: Callable[[dict], object]):
        self.reply = reply
        self.requests: list[tuple[dict, dict]] = []
        self.ended = threading.Event()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.requests.append((request, {name.lower(): value for name, value in self.headers.items()}))
                sent = owner.reply(request)
                begin, more = sent if isinstance(sent, tuple) else (sent, lambda ended: ())
                self.close_connection = True  # whoever breaks the protocol hangs up, too
                with contextlib.suppress(OSError):  # the client may have given up
                    self.wfile.write(begin)
                    for part in more(owner.ended):
                        self.wfile.write(part)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "HostileServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
