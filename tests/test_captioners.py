"""Captioners: answers of any kind made safe, a transformers model, and servers that misbehave."""

import base64
import contextlib
import copy
import csv
import http.server
import io
import json
import string
import threading

import cv2
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import HashingClip
from tests.hostile_server import FAILURES, UNUSABLE, USABLE, HostileServer, error
from tests.tiny_models import ANSWER, save_vlm
from wrappers.backends.annotation import (
    MAX_CAPTION_LENGTH,
    MAX_OBJECTS,
    PRINTABLE,
    AnnotatorUnavailable,
    SceneObject,
)
from wrappers.backends.answers import Description, decode_completion, make_prompt, parse_answer
from wrappers.backends.cache import CachedAnnotator
from wrappers.backends.captioners import TransformersCaptioner, make_captioner
from wrappers.backends.queues import Request, SyncQueue
from wrappers.backends.servers import MAX_BODY, OpenAICaptioner
from wrappers.backends.vision_language import VisionLanguageAnnotator
from wrappers.errors import UserError

torch.set_num_threads(1)

POLE = Description("a cart with a pole", (SceneObject("pole", 1.0, "moving"),))


def random_frames(count: int, size: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


# ---- answers ----


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        f"```json\n{ANSWER}\n```",
        f"Sure! Here is what {{I}} see: {ANSWER} I hope that helps. {{}}",
        ANSWER.replace("a cart with a pole", "a  <i>cart</i>\\n\\twith\\u0007 a\\u001b pole\\u202e"),
        ANSWER.replace("]", ', "cart\\u4e2d\\u6587", {"name": "POLE", "relevance": 0}]').replace(
            ', "cart', ', "\\u4e2d'
        ),
    ],
)
def test_json_is_found_and_cleaned(answer):
    assert parse_answer(answer) == POLE


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I see a cart.",
        "[1, 2]",
        "{}",
        '{"caption": "", "objects": []}',
        '{"caption": "\u5c0f\u8eca", "objects": [{"name": "\u6746"}]}',
        '{"caption": 7, "objects": 7}',
        ANSWER[:-2],
        "{" * 50_000,
        '{"a":' * 50_000,
        '{"caption": ' + "[" * 50_000,
        '{"caption": "x", "n": ' + "9" * 10_000 + "}",
        ANSWER + "a" * 10_000_000,
        "<think>" * 100_000 + "{" * 100_000,
        '{"' + '\\"' * 100_000,
        f"<think>{ANSWER}</think>I cannot tell.",
    ],
)
def test_what_is_no_answer_is_none(answer):
    assert parse_answer(answer) is None


DRAFT = ANSWER.replace("cart with a pole", "draft")


@pytest.mark.parametrize(
    "answer",
    [
        f"<think>{DRAFT}</think>{ANSWER}",
        f"<think>{DRAFT}\n{DRAFT}</think>\n```json\n{ANSWER}\n```",
        f"{DRAFT}</think>{ANSWER}",
        f"<Thinking>{DRAFT}</Thinking>{ANSWER}",
        f"\u25c1think\u25b7{DRAFT}\u25c1/think\u25b7{ANSWER}",
        f"{ANSWER}<think>{DRAFT}</think>",
        f"{ANSWER}<think>{DRAFT}",
        f"<think>a</think>{DRAFT}<think>b</think>{ANSWER}",
        f"{DRAFT} No, better: {ANSWER}",
        f"{DRAFT} {ANSWER} {{}} {{'caption': 'x'}} {{\"caption\": 7}}",
        f"<think>{DRAFT}, no, {ANSWER}",
        f"<think>{DRAFT}, no, {ANSWER}</think>\n",
        f'{{"answer": {ANSWER}}}',
        ANSWER.replace("}]}", ",},],}"),
        ANSWER.replace("a cart", "a\\ncart"),
        ANSWER.replace("a cart", "a\ncart"),
        "a" * 10_000_000 + ANSWER,
    ],
)
def test_the_last_answer_counts_and_drafts_do_not(answer):
    assert parse_answer(answer) == POLE


def test_commas_in_texts_stay():
    assert parse_answer('{"caption": "a, ] b, } c \\", ]", "objects": [],}').caption == 'a, ] b, } c ", ]'


def test_objects_are_limited_distinct_and_clipped():
    entries = [
        {"name": "cart", "relevance": 7, "motion": "moving"},
        {"name": "CART", "relevance": 0.1},
        {"name": "pole", "relevance": -1, "motion": "still"},
        {"name": "rail", "relevance": "much", "motion": "slowly"},
        "floor",
        {"relevance": 1},
        {"name": "x" * 1000, "relevance": float("nan"), "motion": ["moving"]},
        {"name": "wall", "relevance": 10**400},
    ]
    description = parse_answer(json.dumps({"caption": "", "objects": entries}))
    assert description.objects == (
        SceneObject("cart", 1.0, "moving"),
        SceneObject("pole", 0.0, "still"),
        SceneObject("rail", 0.5),
        SceneObject("floor", 0.5),
        SceneObject("x" * 40, 0.5),
    )
    assert description.caption.startswith("cart, pole, rail, floor"), "a caption is made of the objects"


class Parrot:
    source = identity = "parrot"

    def __init__(self, answers):
        self.answers = answers

    def describe(self, frames):
        return [parse_answer(answer) for answer in self.answers]


_texts = st.text(max_size=60) | st.text("<>&\"'{}[]\\,:\n\r\0\x1b=+-@ab\u202e\u4e2d", max_size=60)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=10,
)
_objects = st.fixed_dictionaries({}, optional={"name": _values, "relevance": _values, "motion": _values})
_documents = st.fixed_dictionaries(
    {}, optional={"caption": _values, "objects": st.lists(_objects | _values, max_size=9) | _values}
)
_answers = _texts | _documents.map(json.dumps) | st.tuples(_texts, _documents.map(json.dumps), _texts).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(_answers, min_size=1, max_size=4))
def test_no_answer_breaks_an_annotation_a_space_a_log_or_a_page(answers):
    annotator = VisionLanguageAnnotator(Parrot(answers), HashingClip())
    frames = [np.zeros((8, 8, 3), np.uint8)] * len(answers)
    space = spaces.Text(MAX_CAPTION_LENGTH, min_length=0, charset=PRINTABLE)
    for annotation in annotator.annotate(frames, range(len(frames))):  # an Annotation checks itself
        if annotation is None:
            continue
        assert len(annotation.objects) <= MAX_OBJECTS
        assert annotation.caption in space
        for text in [annotation.caption, *annotation.class_names]:
            assert not set(text) & set("<>\n\r\0\x1b")
            assert set(text) <= set(string.printable)
        line = io.StringIO()
        csv.writer(line).writerow([annotation.caption, *annotation.class_names])
        assert len(line.getvalue().splitlines()) == 1
        [row] = csv.reader([line.getvalue()])
        assert row == [annotation.caption, *annotation.class_names]
    assert annotator.statistics()["answers"] == len(answers)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text('{}[]",:\\<>/think \n0', max_size=200))
def test_any_text_is_an_answer_or_none(text):
    assert parse_answer(text) is None or parse_answer(text).caption


_messages = _values | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("content", "reasoning_content", "reasoning"), _values | st.lists(_objects))
)
_completions = _values | st.fixed_dictionaries(
    {}, optional={"choices": _values | st.lists(_values | st.fixed_dictionaries({"message": _messages}))}
)


@settings(max_examples=300, deadline=None)
@given(st.binary() | _completions.map(lambda completion: json.dumps(completion).encode()))
def test_any_response_is_a_text(body):
    assert isinstance(decode_completion(body), str)


@settings(max_examples=100, deadline=None)
@given(_texts, st.sampled_from(["utf-8", "utf-8-sig"]))
def test_what_a_server_says_is_understood(text, encoding):
    body = {"choices": [{"message": {"content": text}}]}
    assert decode_completion(json.dumps(body).encode(encoding)).strip() == text.strip()


def test_prompt_holds_the_task():
    prompt = make_prompt("balance the {pole}\n on the cart")
    assert "balance the {pole} on the cart" in prompt
    assert '{"caption":' in prompt
    assert "task of the agent" not in make_prompt("")


# ---- transformers ----


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def noisy_vlm(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("noisy"), answer=None)


def test_a_transformers_model_describes_frames(vlm):
    captioner = make_captioner(f"transformers:{vlm}", "balance the pole")
    assert captioner.describe(random_frames(3)) == [POLE] * 3
    assert captioner.source == f"transformers:{vlm}"
    assert "balance the pole" in captioner.prompt


def test_answers_depend_on_the_frame_but_not_on_its_batch(noisy_vlm):
    captioner = TransformersCaptioner(noisy_vlm, batch_size=2, max_new_tokens=6)
    small, large, wide = random_frames(1)[0], random_frames(1, 300)[0], np.zeros((20, 90, 3), np.uint8)
    frames = [small, large, wide, 255 - small, wide]
    together = [answer for start in (0, 2, 4) for answer in captioner._answer(frames[start : start + 2])]
    assert together == [captioner._answer([frame])[0] for frame in frames]
    assert len(set(together)) > 1
    assert captioner.describe(frames) == [None] * 5, "random bytes are no answer"


def test_a_frame_is_not_split_into_tiles(vlm, monkeypatch):
    captioner = TransformersCaptioner(vlm)
    lengths = []
    generate = captioner._model.generate

    def spy(**inputs):
        lengths.append((inputs["input_ids"] == captioner._model.config.image_token_id).sum().item())
        return generate(**inputs)

    monkeypatch.setattr(captioner._model, "generate", spy)
    captioner.describe(random_frames(1, 1000))
    assert lengths == [4], "as many tokens as one tile has"
    assert captioner._processor.image_processor.do_image_splitting is False


def test_identity_of_a_transformers_model(vlm, noisy_vlm):
    captioners = [
        TransformersCaptioner(vlm),
        TransformersCaptioner(vlm, "balance"),
        TransformersCaptioner(vlm, image_size=64),
        TransformersCaptioner(vlm, dtype="bfloat16"),
        TransformersCaptioner(noisy_vlm),
    ]
    assert len({captioner.identity for captioner in captioners}) == 5
    assert captioners[0].identity == TransformersCaptioner(vlm).identity
    assert captioners[3].describe(random_frames(1)) == [POLE]
    assert copy.deepcopy(captioners[0]) is captioners[0]


def test_what_is_no_model_is_explained(vlm, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        make_captioner(f"transformers:{tmp_path}")
    for file in vlm.iterdir():
        if file.name not in ("processor_config.json", "chat_template.jinja"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="conversation with images|cannot be loaded"):
        make_captioner(f"transformers:{tmp_path}")


def test_code_of_a_model_is_never_run(vlm, tmp_path):
    for file in vlm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((vlm / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        make_captioner(f"transformers:{tmp_path}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "spec",
    ["", "gpt", "transformers:", "openai:", "openai:http://localhost:1/v1", "openai:localhost#m", "openai:ftp://a#m"],
)
def test_unknown_captioners_are_explained(spec):
    with pytest.raises(UserError, match="expected embedded, embedded:<folder>, transformers:"):
        make_captioner(spec)


# ---- servers ----


@contextlib.contextmanager
def scripted_server(reply):
    """A server on loopback that answers with what `reply(request, number)` says: (status, type, body)."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((request, {name.lower(): value for name, value in self.headers.items()}))
            status, kind, body = reply(request, len(requests))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have given up
                for part in body if isinstance(body, list) else [body]:
                    self.wfile.write(part)
                    self.wfile.flush()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(content: str | None = ANSWER) -> tuple[int, str, bytes]:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, "application/json", json.dumps(body).encode()


ERROR = b'{"error": {"message": "no"}}'


def test_a_server_gets_image_prompt_and_schema(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    frames = random_frames(1, 224)
    with scripted_server(lambda request, number: completion()) as (url, requests):
        captioner = make_captioner(f"openai:{url}#my/model", "balance the pole")
        assert captioner.describe(frames) == [POLE]
    [(request, headers)] = requests
    assert request["model"] == "my/model"
    assert request["response_format"]["json_schema"]["schema"]["properties"]["objects"]["maxItems"] == 5
    assert headers["authorization"] == "Bearer secret"
    image, text = request["messages"][0]["content"]
    assert "balance the pole" in text["text"]
    kind, data = image["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), frames[0])


def test_requests_are_concurrent_and_answers_keep_their_order():
    barrier = threading.Barrier(3, timeout=300)  # breaks unless three requests are there at once
    frames = random_frames(3)

    def reply(request, number):
        barrier.wait()
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
        return completion(json.dumps({"caption": f"mean {picture.mean():.0f}", "objects": []}))

    frames = [np.full((16, 16, 3), grey, np.uint8) for grey in (10, 200, 90)]
    with scripted_server(reply) as (url, _):
        captions = [description.caption for description in OpenAICaptioner(url, "m").describe(frames)]
    assert captions == ["mean 10", "mean 200", "mean 90"]


@pytest.mark.parametrize("status", [400, 404, 422, 500, 501])
def test_a_server_without_schemas_is_asked_without(status):
    def reply(request, number):
        return (status, "application/json", ERROR) if "response_format" in request else completion()

    with scripted_server(reply) as (url, requests):
        captioner = OpenAICaptioner(url, "m")
        for _ in range(2):
            assert captioner.describe(random_frames(1)) == [POLE]
    asked = ["response_format" in request for request, _ in requests]
    assert asked == [True] * (3 if status >= 500 else 1) + [False, False]


def test_a_request_that_fails_is_tried_again():
    with scripted_server(lambda r, number: completion() if number > 1 else (503, "application/json", ERROR)) as (
        url,
        _,
    ):
        assert OpenAICaptioner(url, "m").describe(random_frames(1)) == [POLE]


@pytest.mark.parametrize(
    "reply",
    [
        completion(""),
        completion(None),
        completion("\0" * 100_000),
        (200, "text/html", b"<h1>It works!</h1>"),
        (200, "application/json", b'{"choices": []}'),
        (200, "application/json", b'"<script>"'),
        (200, "application/json", b"null"),
        (200, "application/json", b"{"),
        (200, "application/json", b"\xff\xfe\x80"),
        completion({"caption": "x"}),
        completion(7),
        completion([{"type": "image_url"}]),
    ],
)
def test_nonsense_is_no_answer(reply):
    with scripted_server(lambda request, number: reply) as (url, _):
        assert OpenAICaptioner(url, "m").describe(random_frames(2)) == [None, None]


def test_one_failure_does_not_spoil_the_batch():
    def reply(request, number):
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
        return completion() if picture.any() else (404, "application/json", ERROR)

    frames = random_frames(3)
    frames[1] = 0
    with scripted_server(reply) as (url, _):
        assert OpenAICaptioner(url, "m").describe(frames) == [POLE, None, POLE]


def test_an_odd_answer_does_not_spoil_the_batch_nor_is_it_kept(tmp_path):
    odd = [
        completion({"caption": "x"}),
        completion(7),
        (200, "application/json", b"\xff"),
        completion(f"<think>{DRAFT}"),
    ]

    def reply(request, number):
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(url.split(",")[1]), np.uint8), cv2.IMREAD_COLOR)
        return odd[picture[0, 0, 0]] if picture[0, 0, 0] < 3 else completion()

    frames = [np.full((8, 8, 3), grey, np.uint8) for grey in (9, 0, 1, 2)]
    with scripted_server(reply) as (url, _):
        annotator = VisionLanguageAnnotator(OpenAICaptioner(url, "m"), HashingClip())
        annotations = CachedAnnotator(annotator, tmp_path).annotate(frames, range(4))
    assert [annotation.caption for annotation in annotations] == ["a cart with a pole", "pole", "pole", "pole"]
    assert annotator.statistics() == {"answers": 4, "unusable_answers": 3}
    assert len(list(tmp_path.rglob("*.npz"))) == 1


@pytest.mark.parametrize("long", [b"x", b"\r\n", b"\0"])
def test_a_limited_part_of_a_response_is_read(monkeypatch, long):
    read = []
    monkeypatch.setattr("wrappers.backends.servers.decode_completion", lambda body: read.append(body) or "")
    with scripted_server(lambda request, number: (200, "application/json", long * 3_000_000)) as (url, _):
        OpenAICaptioner(url, "m").describe(random_frames(1))
    assert [len(body) for body in read] == [MAX_BODY]


def test_nothing_is_decompressed(monkeypatch):
    read = []
    monkeypatch.setattr("wrappers.backends.servers.decode_completion", lambda body: read.append(body) or "")
    with HostileServer(lambda request: UNUSABLE["gzip bomb"]) as server:
        OpenAICaptioner(server.url, "m").describe(random_frames(1))
    assert [len(body) < 100_000 for body in read] == [True]
    assert server.requests[0][1]["accept-encoding"] == "identity"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "my-secret")
    with HostileServer(lambda request: USABLE["sane"]) as other:
        redirect = error(status, b"", Location=f"{other.url}/chat/completions")
        with HostileServer(lambda request: redirect) as server:
            captioner = OpenAICaptioner(server.url, "m")
            with pytest.raises(AnnotatorUnavailable, match=f"HTTP status {status}: it redirects to {other.url}"):
                captioner.describe(random_frames(1))
    assert not other.requests


def test_nothing_but_the_key_is_told_to_a_server(monkeypatch):
    for name in ("ORG_ID", "ORGANIZATION", "PROJECT_ID", "ADMIN_KEY", "WEBHOOK_SECRET", "API_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", f"my-{name}")
    with HostileServer(lambda request: USABLE["cookies"]) as server:
        captioner = OpenAICaptioner(server.url, "m")
        for _ in range(2):
            assert captioner.describe(random_frames(1)) == [POLE]
    for _, headers in server.requests:
        assert [value for value in headers.values() if "my-" in value] == ["Bearer my-API_KEY"]
        assert "cookie" not in headers


def test_an_error_is_a_line_and_is_said_once(caplog):
    with HostileServer(lambda request: FAILURES["a long error on many lines"]) as server:
        captioner = OpenAICaptioner(server.url, "m")
        annotator = SyncQueue(VisionLanguageAnnotator(captioner, HashingClip()))
        for number in range(3):
            annotator._backoff.succeeded()
            annotator.request([Request(number, random_frames(1)[0], 0)])
    assert annotator.statistics()["failures"] == 3
    [message] = [record.getMessage() for record in caplog.records if record.name.startswith("wrappers")]
    assert "HTTP status 400: line line" in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "base_url",
    [
        "http://", "http:///v1", "http://local host/v1", "http://localhost:99999/v1", "http://localhost:x/v1",
        "http://[::1/v1", "http://key@localhost/v1", "http://me:secret@localhost/v1", "http://localhost/v1?key=1",
        "http://localhost/v1#x", "http://..", "http://\u00e4.de/v1", "http://a\n/v1", "ftp://localhost",
        "localhost:8000",
    ],
)  # fmt: skip
def test_base_urls_are_checked(base_url):
    with pytest.raises(UserError, match="unusable base URL .* expected one such as") as caught:
        OpenAICaptioner(base_url, "m")
    assert "secret" not in str(caught.value)


def test_base_urls_that_are_fine():
    for base_url in ("http://localhost:8000/v1", "https://api.example.com", "http://[::1]:80/v1", "http://my_host:1/"):
        assert OpenAICaptioner(base_url, "m").base_url == base_url


def test_a_key_that_cannot_be_sent_is_explained(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        OpenAICaptioner("http://localhost:8000/v1", "m")


@pytest.mark.parametrize("trouble", ["error", "silence", "drips", "nobody"])
def test_no_answer_at_all_is_unavailability(trouble):
    ended = threading.Event()

    class Drips(list):
        def __iter__(self):
            while not ended.wait(0.1):
                yield b" "

        def __len__(self):
            return 1_000_000

    def reply(request, number):
        if trouble == "silence":
            ended.wait(30)
        if trouble == "drips":
            return 200, "application/json", Drips()
        return 401, "application/json", ERROR

    with scripted_server(reply) as (url, _):
        captioner = OpenAICaptioner("http://127.0.0.1:9/v1" if trouble == "nobody" else url, "m", timeout=0.7)
        with pytest.raises(AnnotatorUnavailable, match="does not answer"):
            captioner.describe(random_frames(2))
        ended.set()
